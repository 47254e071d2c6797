"""The plain export holds what makes the model and nothing else, beside a card that says only what is on record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from decausal.errors import UserError
from decausal.exchange.card import ModelCard, read_evaluation
from decausal.exchange.plain import export_plain
from decausal.models.facts import read_facts
from tests.exchange.checkpoints import our_logits, save_block_model, save_sharded, tensors_of
from tests.runs import assert_same

ON_THE_HUB = {"source": "Qwen/Qwen3-0.6B", "source_revision": "abc123"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_block_model(tmp_path / "converted", facts=ON_THE_HUB)
    return tmp_path / "converted"


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def exported_card(tmp_path: Path, card: ModelCard | None = None, **facts: Any) -> str:
    save_block_model(tmp_path / "source", facts=facts)
    export_plain(tmp_path / "source", tmp_path / "card", card=card)
    return (tmp_path / "card" / "README.md").read_text()


def test_the_export_is_the_model(directory, tmp_path):
    export_plain(directory, tmp_path / "out")
    assert read_facts(tmp_path / "out") == read_facts(directory)
    assert torch.equal(our_logits(tmp_path / "out"), our_logits(directory))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_a_run_left_stays_behind(directory, tmp_path):
    for name in ("run.yaml", "training_args.bin", "optimizer.pt", "README.md", "model.bin", ".lock"):
        (directory / name).write_text("of the run")
    (directory / "checkpoint-2").mkdir()
    export_plain(directory, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "decausal.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert not names & {"run.yaml", "training_args.bin", "optimizer.pt", "model.bin", ".lock", "checkpoint-2"}
    assert "of the run" not in (tmp_path / "out" / "README.md").read_text()


def test_shards_are_all_carried(directory, tmp_path):
    tensors = tensors_of(directory)
    (directory / "model.safetensors").unlink()
    save_sharded(directory, tensors)
    export_plain(directory, tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == tensors.keys()
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model-00002-of-00003\.safetensors"):
        export_plain(directory, tmp_path / "again")


def test_the_front_matter_says_what_the_hub_reads(tmp_path):
    data = ("HuggingFaceTB/smollm-corpus:cosmopedia-v2", "stdlib", "texts/more.jsonl")
    card = exported_card(tmp_path, ModelCard(license="apache-2.0"), recipe={"data": data}, **ON_THE_HUB)
    front = front_matter(card)
    assert (front["license"], front["library_name"]) == ("apache-2.0", "transformers")
    assert (front["base_model"], front["base_model_relation"]) == ("Qwen/Qwen3-0.6B", "finetune")
    assert front["datasets"] == ["HuggingFaceTB/smollm-corpus"]
    assert "diffusion-language-model" in front["tags"]


def test_what_is_not_on_record_is_not_claimed(tmp_path):
    card = exported_card(tmp_path, source="models/mine")  # a path that looks like a name on the hub
    assert not {"license", "base_model", "datasets"} & front_matter(card).keys()
    assert "Not measured for this card." in card


def test_missing_parts_of_the_card_are_reported(tmp_path, directory):
    assert export_plain(directory, tmp_path / "a").notes[0].startswith("the card states no license")
    card = ModelCard(license="mit", results=(("bits_per_byte", "0.9"),), evaluation="nll.json")
    assert not export_plain(directory, tmp_path / "b", card=card).notes


def test_facts_recipe_sampler_and_figures_are_in_the_card(tmp_path):
    results = (("bits_per_byte", "0.9 ± 0.01"),)
    recipe = {"align_weight": 10.0, "max_length": 512, "mask_token": "<|a|b|>", "eval_data": None}
    card = exported_card(
        tmp_path,
        ModelCard(name="Mine", evaluation="nll.json", results=results),
        recipe=recipe,
        sampler={"threshold": 0.7},
        **ON_THE_HUB,
    )
    assert "# Mine" in card
    for line in (
        "| attention layout | `block`: text is written in blocks of 4 tokens, each read in both directions |",
        "| shift | 0: the state at a token's place predicts it |",
        "| `threshold` | 0.7 |",
        "| `align_weight` | 10.0 |",
        "| `mask_token` | <\\|a\\|b\\|> |",
        "| `bits_per_byte` | 0.9 ± 0.01 |",
    ):
        assert line in card
    assert "eval_data" not in card
    assert "(revision `abc123`)" in card


def test_paths_of_somebodys_disk_are_not_published(tmp_path):
    recipe = {"data": ("/home/ada/secret/texts", "owner/set"), "model_name_or_path": "/home/ada/secret/model"}
    card = exported_card(tmp_path, source="/home/ada/secret/model", recipe=recipe)
    assert "/home/ada" not in card
    assert "secret" not in card
    assert "| `data` | texts, owner/set |" in card


def test_figures_are_read_with_their_standard_errors(tmp_path):
    record = {
        "nelbo_per_token": 1.23456,
        "nelbo_standard_error": 0.01,
        "bits_per_byte": 0.5,
        "bits_per_byte_standard_error": None,
        "num_tokens": 12345,
        "bins": [{"low": 0.0}],
        "ar_missing": "not at hand",
        "tasks": {"addition": {"accuracy": 0.75, "accuracy_standard_error": 0.02}},
        "is_fast": True,
    }
    (tmp_path / "eval.json").write_text(json.dumps(record))
    assert read_evaluation(tmp_path / "eval.json") == (
        ("nelbo_per_token", "1.235 ± 0.01"),
        ("bits_per_byte", "0.5"),
        ("num_tokens", "12,345"),
        ("tasks.addition.accuracy", "0.75 ± 0.02"),
    )


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "is not JSON"), ("[1]", "no figures"), ('{"a": "b"}', "no figures")]
)
def test_a_file_without_figures_is_refused(text, reason, tmp_path):
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(UserError, match=reason):
        read_evaluation(tmp_path / "eval.json")
    with pytest.raises(UserError, match="No such file"):
        read_evaluation(tmp_path / "none.json")


def test_what_is_no_converted_model_is_refused(tmp_path, directory):
    (directory / "decausal.json").unlink()
    with pytest.raises(UserError, match="is not a decausal checkpoint"):
        export_plain(directory, tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        export_plain(tmp_path / "nothing", tmp_path / "out")


def test_a_tied_head_that_was_written_twice_is_handed_on_once(directory, tmp_path):
    tensors = tensors_of(directory)
    assert "lm_head.weight" not in tensors
    twice = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(twice, directory / "model.safetensors", {"format": "pt"})
    export_plain(directory, tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), tensors)
    assert torch.equal(our_logits(tmp_path / "out"), our_logits(directory))
