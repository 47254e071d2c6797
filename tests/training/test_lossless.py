"""Recipe lossless: the source stays as it is, byte for byte, and a draft beside it makes it write faster."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from decausal import load
from decausal.config import read_recipe
from decausal.data.rows import load_rows
from decausal.errors import UserError
from decausal.evaluation.drafts import evaluate_drafts
from decausal.evaluation.texts import evaluate_texts
from decausal.exchange.plain import export_plain
from decausal.exchange.sdar import export_sdar
from decausal.models.adapt import load_source
from decausal.models.base_files import base_files
from decausal.models.checkpoint import load_converted
from decausal.models.draft_head import draft_vocabulary
from decausal.models.examination import examine_path
from decausal.training.settings import ConversionSettings
from decausal.training.step_records import read_records
from tests.runs import GATED, T, assert_same, kept_from_others, run, save_source, weights

SETTINGS = GATED | {"anchors": "all", "kl_mean": "token", "lora_r": 4, "learning_rate": 3e-2}


def write_answers(path: Path, number: int = 12) -> Path:
    words = ["the", "rain", "in", "spain", "stays", "on", "the", "hat", "that", "a", "heron", "saw"]
    records = [
        {"prompt": words[i % len(words)], "completion": " " + " ".join(words[(i + j) % len(words)] for j in range(5))}
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_answers(tmp_path_factory.mktemp("data") / "answers.jsonl")


@pytest.fixture(scope="module", params=["qwen3", "gemma3", "qwen3 with a draft head"])
def made(request, tmp_path_factory: pytest.TempPathFactory, answers: Path) -> Path:
    family, _, head = request.param.partition(" with ")
    root = tmp_path_factory.mktemp(family)
    save_source(root / "source", family, chat=True)
    run(root / "source", answers, root / "out", **options_of(root, head=bool(head)))
    return root


def options_of(root: Path, *, head: bool | None = None) -> dict[str, Any]:
    """The settings of a run, or of the one that was made there."""
    has_head = load_converted(root / "out").facts.draft_head if head is None else head
    return SETTINGS | ({"draft_head": True, "draft_vocabulary": 40} if has_head else {})


def source_text(directory: Path, prompt: str, num_tokens: int) -> str:
    """The source's own greedy text, by transformers."""
    model, tokenizer = load_source(directory)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=num_tokens, do_sample=False)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_sources_files_are_in_the_directory_byte_for_byte(made: Path) -> None:
    files = base_files(made / "source")
    assert {path.name for path in files} >= {"config.json", "model.safetensors", "tokenizer.json"}
    for path in files:
        assert (made / "out" / path.name).read_bytes() == path.read_bytes()
    assert set(load_converted(made / "out").facts.base) == {path.name for path in files}
    assert kept_from_others(made / "out") == []


def test_plain_transformers_loads_the_source_from_it(made: Path) -> None:
    found = AutoModelForCausalLM.from_pretrained(made / "out").state_dict()
    assert_same(found, AutoModelForCausalLM.from_pretrained(made / "source").state_dict())


def test_all_texts_are_those_of_the_source_beside_it(made: Path, answers: Path) -> None:
    found = evaluate_texts(made / "out", answers, num_prompts=4, max_new_tokens=6, temperature=0.0)
    assert (found.agreement, found.same_texts) == (1.0, 1.0)


def test_the_draft_is_a_peft_adapter_and_disabled_it_is_the_source(made: Path) -> None:
    ids = torch.arange(5, 12)[None]
    source = AutoModelForCausalLM.from_pretrained(made / "source").eval()
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made / "out"), made / "out" / "draft").eval()
    with torch.no_grad(), whole.disable_adapter():
        assert torch.equal(whole(ids).logits, source(ids).logits)


@pytest.mark.parametrize("place", ["out/draft", "copy"])
def test_the_draft_by_itself_is_never_merged(made: Path, answers: Path, tmp_path: Path, place: str) -> None:
    shutil.copytree(made / "out" / "draft", made / "copy", dirs_exist_ok=True)
    settings = json.loads((made / "copy" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(made / "source")
    (made / "copy" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"is the draft of a gated conversion.*never merged; give "):
        run(made / place, answers, tmp_path / "out", merge_adapter=True)


def test_a_source_whose_settings_hold_a_secret_is_refused_because_they_are_kept(tmp_path: Path, answers: Path) -> None:
    source = save_source(tmp_path / "source", chat=True)
    values = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(values | {"more": [{"api_key": "nobody may read it"}]}))
    with pytest.raises(UserError, match=r"tokenizer_config.json holds a secret, 'api_key', which is not handed on"):
        run(source, answers, tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer_extra.json", "chat_template.jinja", "LICENSE"])
def test_a_link_to_a_file_elsewhere_is_refused_because_the_sources_files_are_kept(
    tmp_path: Path, answers: Path, name: str
) -> None:
    source = save_source(tmp_path / "source", chat=True)
    (tmp_path / "secret").write_text("nobody may read it")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=f"{name} is a link to a file outside .*source, which is not handed on"):
        run(source, answers, tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["out", "out/checkpoint-2"])
def test_what_it_writes_is_the_sources_own_text(made: Path, where: str) -> None:
    model = load(made / where)
    for prompt in ("the rain", "a heron saw the"):
        found = model.generate(prompt, max_new_tokens=10)
        assert found.text == source_text(made / "source", prompt, 10)


def test_the_draft_learns_what_the_source_writes(made: Path, answers: Path) -> None:
    first, last = (load_converted(made / "out" / name) for name in ("checkpoint-2", "checkpoint-4"))
    rows = load_rows([str(answers)], first.tokenizer, T)
    before, after = (evaluate_drafts(model.model, model.facts, rows) for model in (first, last))
    assert after.num_tokens == before.num_tokens > 20
    assert 1 <= after.tokens_per_pass <= 4
    assert len(after.acceptance) == 3


def test_tokens_per_pass_on_a_text_that_the_source_wrote_are_those_of_decoding(made: Path) -> None:
    model = load(made / "out")
    prompts = ["the rain", "a heron saw the", "in spain"]
    written = [model.generate(prompt, max_new_tokens=16, draft="quadratic") for prompt in prompts]
    rows = [own_row(model.tokenizer(p).input_ids, row.ids) for p, row in zip(prompts, written, strict=True)]
    figures = evaluate_drafts(model.model, model.facts, rows)
    # A first pass reads the prompt and brings one token, which no draft precedes.
    num_tokens, num_passes = sum(len(row.ids) - 1 for row in written), sum(row.num_forwards - 1 for row in written)
    assert figures.num_tokens == num_tokens
    assert figures.tokens_per_pass == pytest.approx(num_tokens / num_passes)


def own_row(prompt: list[int], ids: list[int], length: int = 40) -> dict[str, torch.Tensor]:
    """A prompt and an answer as a packed row."""
    place, num_tokens = torch.arange(length), len(prompt) + len(ids)
    return {
        "clean_ids": torch.tensor([*prompt, *ids, *[0] * (length - num_tokens)]),
        "document_ids": torch.where(place < num_tokens, 0, -1),
        "is_maskable": (place >= len(prompt)) & (place < num_tokens),
    }


def test_a_draft_head_chooses_from_the_most_frequent_tokens_and_the_ends(made: Path, answers: Path) -> None:
    model, tokenizer, facts = load_converted(made / "out")
    if not facts.draft_head:
        assert draft_vocabulary(model, facts.mask_token_id).tokens is None
        return
    found = draft_vocabulary(model, facts.mask_token_id)
    assert len(found.tokens) == len(found.head.weight) == 40
    assert found.tokens.tolist() == sorted(set(found.tokens.tolist()))
    trained = {
        token
        for line in answers.read_text().splitlines()
        for token in tokenizer(json.loads(line)["completion"]).input_ids
    }
    assert len(trained) < 40
    assert trained <= set(found.tokens.tolist())
    assert torch.equal(found.head.weight, model.get_output_embeddings().weight[found.tokens])
    assert found.ids(torch.tensor([0, 39])).tolist() == [found.tokens[0], found.tokens[39]]


def test_a_resumed_run_ends_with_the_draft_of_an_uninterrupted_one(made: Path, answers: Path, tmp_path: Path) -> None:
    half = made / "out" / "checkpoint-2"
    (tmp_path / "out" / "draft").mkdir(parents=True)
    for name in (".decausal", "run.yaml"):
        if (made / "out" / name).exists():
            shutil.copy(made / "out" / name, tmp_path / "out" / name)
    (tmp_path / "out" / "draft" / "adapter_config.json.tmp1").touch()  # of a run that was killed as it wrote this
    run(made / "source", answers, tmp_path / "out", **options_of(made), resume_from_checkpoint=str(half))
    whole, resumed = (load_converted(directory / "out").model.state_dict() for directory in (made, tmp_path))
    assert_same(resumed, whole)
    assert {path.name for path in (tmp_path / "out" / "draft").iterdir()} == {
        path.name for path in (made / "out" / "draft").iterdir()
    }


def test_a_base_that_differs_is_refused_with_both_hashes(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"model.safetensors is not the file .*SHA-256 is [0-9a-f]{64}, expected [0-9a-f]{64}"
    ):
        load_converted(tmp_path / "out")


def test_a_draft_of_another_architecture_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    other = save_source(tmp_path / "other", "gpt2")
    for path in base_files(other):
        shutil.copyfile(path, tmp_path / "out" / path.name)
    facts = json.loads((tmp_path / "out" / "decausal.json").read_text())
    (tmp_path / "out" / "decausal.json").write_text(json.dumps(facts | {"base": {}}))
    with pytest.raises(UserError, match=r"does not fit its base model|mask_token_id"):
        load_converted(tmp_path / "out")


def test_a_draft_without_one_of_its_files_is_refused_by_name(made: Path, tmp_path: Path) -> None:
    files = {path.name for path in (made / "out" / "draft").glob("*.safetensors")}
    has_head = load_converted(made / "out").facts.draft_head
    assert files == {"adapter_model.safetensors", "mask_row.safetensors"} | (
        {"draft_head.safetensors"} if has_head else set()
    )
    for name in files:
        directory = tmp_path / name / "out"
        shutil.copytree(made / "out", directory)
        (directory / "draft" / name).unlink()
        with pytest.raises(UserError, match=name):
            load_converted(directory)


def test_the_doctor_finds_it_usable(made: Path) -> None:
    assert all(probe.passed or not probe.required for probe in examine_path(str(made / "out")))


def test_denoising_is_refused_with_the_reason(made: Path) -> None:
    model = load(made / "out")
    with pytest.raises(UserError, match="draft for verified decoding alone"):
        model.generate("the rain", speculative=False)
    with pytest.raises(UserError, match="masks draft what it then verifies from left to right"):
        model.infill("the", "rain", length=2)


def test_it_is_exported_as_it_is_with_a_card(made: Path, tmp_path: Path) -> None:
    export_plain(made / "out", tmp_path / "hf")
    for path in (*base_files(made / "source"), *(made / "out" / "draft").iterdir()):
        inside = path.name if path.parent.name != "draft" else f"draft/{path.name}"
        assert (tmp_path / "hf" / inside).read_bytes() == path.read_bytes()
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "draft" in card
    assert str(made) not in card + (tmp_path / "hf" / "decausal.json").read_text()
    assert load(tmp_path / "hf").generate("the rain", max_new_tokens=6).text == source_text(
        made / "source", "the rain", 6
    )


def test_other_forms_and_further_training_are_refused_with_the_reason(
    made: Path, answers: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="never merged"):
        export_sdar(made / "out", tmp_path / "sdar")
    with pytest.raises(UserError, match="gated conversion"):
        run(made / "out", answers, tmp_path / "out", **SETTINGS)


def test_its_draft_alone_is_never_merged(made: Path, answers: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="never merged; give"):
        run(made / "out" / "draft", answers, tmp_path / "merged", layout="causal", merge_adapter=True)


def test_a_chat_template_that_is_not_saved_is_reported(made: Path, answers: Path, tmp_path: Path, caplog) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    run(made / "source", answers, tmp_path / "out", **SETTINGS, chat_template=str(template))
    assert "hold for this run alone" in caplog.text
    source = made / "source" / "chat_template.jinja"
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == source.read_bytes()


def test_rollouts_are_the_sources_own_answers(tmp_path: Path, answers: Path) -> None:
    save_source(tmp_path / "source")
    made = run(
        tmp_path / "source",
        answers,
        tmp_path / "out",
        **SETTINGS,
        rows="rollout",
        rollout_tokens=8,
        rollout_temperature=0.0,
    )
    logged = [entry for entry in made.history if "rollout_length" in entry]
    assert len(logged) == 4
    assert all(0 < entry["rollout_length"] <= 8 for entry in logged)
    # A pass of verified decoding brings a token of the AR model's, and at most a whole group of right drafts before it.
    assert all(0.5 < entry["rollout_tokens_per_forward"] <= SETTINGS["block_size"] + 1 for entry in logged)
    assert load_converted(tmp_path / "out").facts.weights == "gated"


def test_held_out_drafts_are_measured_at_each_evaluation(tmp_path: Path, answers: Path) -> None:
    save_source(tmp_path / "source")
    made = run(tmp_path / "source", answers, tmp_path / "out", **SETTINGS, eval_data=str(answers), eval_steps=2)
    measured = [entry for entry in made.history if "eval_tokens_per_pass" in entry]
    assert len(measured) == 2
    assert {f"eval_draft_accuracy_{place}" for place in (1, 2, 3)} <= measured[0].keys()


def test_a_figure_of_the_drafts_stands_beside_the_checkpoints_and_goes_on_in_a_resumed_run(
    tmp_path: Path, answers: Path
) -> None:
    save_source(tmp_path / "source")
    options = {**SETTINGS, "eval_data": str(answers), "eval_steps": 1, "save_steps": 2}
    out = tmp_path / "out"
    made = run(tmp_path / "source", answers, out, **options)
    measured = [entry for entry in made.history if "eval_tokens_per_pass" in entry]
    whole, image = read_records(out / "drafts.jsonl"), (out / "drafts.png").read_bytes()
    assert [record["tokens_per_pass"] for record in whole] == [entry["eval_tokens_per_pass"] for entry in measured]
    assert [record["accuracy"][1] for record in whole] == [entry["eval_draft_accuracy_2"] for entry in measured]
    counts = [record["num_tokens"] for record in whole]
    assert counts == sorted(set(counts))
    assert counts[0] > 0
    assert image.startswith(b"\x89PNG")
    run(tmp_path / "source", answers, out, **options, resume_from_checkpoint=str(out / "checkpoint-2"))
    assert read_records(out / "drafts.jsonl") == whole
    assert (out / "drafts.png").read_bytes() == image


def test_gradient_checkpointing_is_refused_before_anything_is_written(tmp_path: Path, answers: Path) -> None:
    save_source(tmp_path / "source")
    with pytest.raises(UserError, match="--gradient_checkpointing is not for --noise all"):
        run(tmp_path / "source", answers, tmp_path / "out", **SETTINGS, gradient_checkpointing=True)
    assert not (tmp_path / "out").exists()


def test_introspective_trains_one_set_of_weights_on_growing_groups(tmp_path: Path, answers: Path) -> None:
    save_source(tmp_path / "source")
    own = ConversionSettings.__dataclass_fields__
    recipe = {name: value for name, value in read_recipe("introspective").items() if name in own}
    made = run(tmp_path / "source", answers, tmp_path / "out", **recipe)
    assert not torch.equal(
        weights(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"],
        weights(tmp_path / "source")["model.layers.0.mlp.up_proj.weight"],
    )
    facts = load_converted(tmp_path / "out").facts
    assert (facts.causal_groups, facts.weights, facts.block_size) == (True, "shared", 3)
    assert all(entry["clean_loss"] > 0 for entry in made.history if "clean_loss" in entry)
    written = load(tmp_path / "out").generate("the rain", max_new_tokens=6)
    assert 1 <= written.num_forwards <= 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": "level", "anchors": "grid"}, "--weights gated needs --noise all"),
        ({"noise": "level", "weights": "shared"}, "--anchors all is for --noise all"),
        ({"lora_r": 0}, "--weights gated needs --lora_r"),
        ({"causal_context": False}, "--noise all needs --layout block, --causal_context true and --shift 1"),
        ({"shift": 0}, "--noise all needs"),
        ({"views": 2}, "--views 2 is not for --noise all"),
        ({"eval_samples": 2}, "--eval_samples 2 is not for --noise all"),
        ({"clean_weight": 1.0}, "its gradient would be 0"),
        ({"block_size_schedule": "1,2"}, "ends with 2, and --block_size is 3"),
        ({"block_size_schedule": "1,x"}, "give whole numbers with commas"),
        ({"anchors": "some"}, "anchors is 'some'; accepted: grid, all or a number"),
        ({"offset_gamma": 0.0}, "--offset_gamma 0.0: must be above 0"),
        ({"mask_token": "<m>"}, "--mask_token is for --weights shared"),
        ({"save_dtype": "bfloat16"}, "--save_dtype bfloat16 is for --weights shared"),
        ({"weights": "shared", "draft_head": True}, "--draft_head is for --weights gated"),
        ({"draft_head": True, "draft_vocabulary": 0}, "--draft_vocabulary 0: must be at least 1"),
        ({"weights": "shared", "reference_base": True}, "--reference_base is for --weights gated"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict, message: str) -> None:
    settings = {name: value for name, value in SETTINGS.items() if name not in ("learning_rate", *changes)} | changes
    with pytest.raises(UserError, match=message):
        ConversionSettings(data="x", **settings)


def test_a_reference_to_the_base_needs_a_model_of_the_hub(tmp_path: Path, answers: Path) -> None:
    save_source(tmp_path / "source")
    with pytest.raises(UserError, match="--reference_base needs a model of the hub"):
        run(tmp_path / "source", answers, tmp_path / "out", **SETTINGS, reference_base=True)
