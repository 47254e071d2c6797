"""A converted model is trained on: with its facts, its mask row, and the AR model that it was made from as teacher."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from decausal.cli import main
from decausal.diffusion.layout import Layout
from decausal.errors import UserError
from decausal.exchange.card import ModelCard
from decausal.exchange.converted_files import facts_to_hand_on
from decausal.exchange.importing import import_checkpoint
from decausal.models.adapt import load_source
from decausal.models.backbone import body_forward
from decausal.models.checkpoint import load_converted
from decausal.models.facts import read_facts, write_facts
from decausal.training.run_directory import checkpoints
from decausal.training.teacher import AdapterTeacher, Teacher
from decausal.training.trainer import ConversionTrainer
from tests.exchange.public_forms import publish
from tests.runs import ROOT, assert_same, logged, run, save_source, weights, write_text

BLOCK = {"layout": "block", "block_size": 4, "causal_context": True, "shift": 0}
STILL = {"learning_rate": 0.0, "weight_decay": 0.0, "max_steps": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """An AR model, text, and two first stages: `bidirectional` and `block`."""
    root = tmp_path_factory.mktemp("stages")
    source, text = save_source(root / "source", "llama"), write_text(root / "text.jsonl")
    first = {"learning_rate": 0.01, "save_steps": 100}
    run(source, text, root / "bidirectional", sampler={"threshold": 0.7}, **first)
    run(source, text, root / "block", **BLOCK, **first)
    return root


def stage(root: Path, start: str, output_dir: Path, **options):
    return run(root / start, root / "text.jsonl", output_dir, **options)


def fact_values(directory: Path) -> dict:
    facts = read_facts(directory)
    names = ("source", "layout", "block_size", "causal_context", "shift", "mask_token_id", "sampler")
    return {name: getattr(facts, name) for name in names}


# What is inherited


@pytest.mark.parametrize("start", ["bidirectional", "block"])
@pytest.mark.parametrize("options", [{}, {"freeze_embeddings": True}, {"lora_r": 2}], ids=["all", "frozen", "lora"])
def test_a_stage_that_learns_nothing_gives_the_weights_and_facts_that_it_began_with(root, tmp_path, start, options):
    stage(root, start, tmp_path / "out", **STILL, **options)
    assert_same(weights(tmp_path / "out"), weights(root / start))
    assert fact_values(tmp_path / "out") == fact_values(root / start)
    assert fact_values(root / start)["source"] == str(root / "source")
    assert load_converted(tmp_path / "out").model.config.is_causal is False


def test_the_stages_are_on_record_and_on_the_card(root, tmp_path):
    stage(root, "bidirectional", tmp_path / "second", max_steps=1, seed=5)
    run(tmp_path / "second", root / "text.jsonl", tmp_path / "third", max_steps=1, seed=6)
    converted = load_converted(tmp_path / "third")
    recipes = [*converted.facts.earlier_stages, converted.facts.recipe]
    names = [Path(recipe["model_name_or_path"]).name for recipe in recipes]
    assert names == ["source", "bidirectional", "second"]
    assert [recipe.get("seed") for recipe in recipes] == [None, 5, 6]
    handed_on = facts_to_hand_on(converted.facts)
    assert str(tmp_path) not in json.dumps(handed_on.earlier_stages)
    card = ModelCard().text(handed_on, converted.model.config)
    assert re.findall("## (Training.*)", card) == [f"Training, stage {number}" for number in (1, 2, 3)]
    assert re.findall(r"\| `model_name_or_path` \| (\S+) \|", card) == names


def test_what_a_stage_changes_is_trained_reported_and_written_down(root, tmp_path, caplog):
    changed = stage(root, "bidirectional", tmp_path / "out", **BLOCK, max_steps=1)
    assert "bidirectional -> block, block_size None -> 4, causal_context False -> True, shift 1 -> 0" in caplog.text
    facts = {"sampler": {}, "source": str(root / "source")}  # sampler settings belong to a layout
    assert fact_values(tmp_path / "out") == fact_values(root / "bidirectional") | BLOCK | facts
    # The block loss of the first stage's weights, and not of the AR model's.
    from_ar = run(root / "source", root / "text.jsonl", tmp_path / "ar", **BLOCK, max_steps=1)
    assert logged(changed, "token_loss") != logged(from_ar, "token_loss")
    stage(root, "block", tmp_path / "larger", block_size=8, max_steps=1)
    assert fact_values(tmp_path / "larger") == fact_values(root / "block") | {"block_size": 8}


def test_a_stage_stays_silent_where_nothing_changes(root, tmp_path, caplog):
    stage(root, "block", tmp_path / "out", **STILL)
    assert "changes" not in caplog.text


def test_save_dtype_source_is_the_type_of_the_model_that_the_stage_began_with(root, tmp_path):
    stage(root, "block", tmp_path / "half", **STILL, save_dtype="bfloat16")
    run(tmp_path / "half", root / "text.jsonl", tmp_path / "out", **STILL, save_dtype="source")
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}


# The teacher


class Kept:
    """Keeps the last batch that a teacher is asked about, and the teacher."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ask = ConversionTrainer._ask_teacher

        def kept(trainer, batch, terms):
            self.teacher, self.batch = trainer.teacher, batch
            return ask(trainer, batch, terms)

        monkeypatch.setattr(ConversionTrainer, "_ask_teacher", kept)


def mean_distance(model, teacher, batch) -> float:
    """The alignment loss by its definition: over all states and aligned positions, 1 - cosine."""
    documents = {"document_ids": batch["document_ids"], "position_ids": batch["position_ids"]}
    with torch.no_grad():
        student = body_forward(
            model, batch["noised_ids"], Layout("bidirectional"), output_hidden_states=True, **documents
        )
        taught = body_forward(teacher, batch["clean_ids"], Layout("causal"), output_hidden_states=True, **documents)
    distances = [
        1
        - torch.cosine_similarity(
            ours.flatten(0, 1)[batch["aligned_index"]], theirs.flatten(0, 1)[batch["teacher_index"]]
        )
        for ours, theirs in zip(student.hidden_states, taught.hidden_states, strict=True)
    ]
    return torch.stack(distances).mean().item()


@pytest.mark.parametrize("options", [{}, {"lora_r": 2}], ids=["all", "lora"])
def test_the_teacher_of_a_stage_is_the_ar_model_that_the_first_began_with(root, tmp_path, monkeypatch, options):
    kept = Kept(monkeypatch)
    conversion = stage(root, "bidirectional", tmp_path / "out", align_weight=1.0, **STILL, **options)
    assert type(kept.teacher) is Teacher
    first, _ = load_source(root / "source")
    assert_same(kept.teacher.model.state_dict(), first.state_dict())
    model = load_converted(root / "bidirectional").model
    (loss,) = logged(conversion, "alignment_loss")
    assert loss == pytest.approx(mean_distance(model, first, kept.batch), abs=1e-5)
    assert loss != pytest.approx(mean_distance(model, model, kept.batch), abs=1e-3)


def test_adapters_on_an_ar_model_need_no_second_one(root, tmp_path, monkeypatch):
    kept = Kept(monkeypatch)
    run(root / "source", root / "text.jsonl", tmp_path / "out", align_weight=1.0, lora_r=2, max_steps=1)
    assert type(kept.teacher) is AdapterTeacher


def test_another_teacher_may_be_named(root, tmp_path, monkeypatch):
    kept = Kept(monkeypatch)
    other = save_source(tmp_path / "other", "llama", intermediate_size=40)
    stage(root, "bidirectional", tmp_path / "out", kl_weight=1.0, teacher_model_name_or_path=str(other), **STILL)
    assert kept.teacher.model.config.intermediate_size == 40


@pytest.fixture
def orphan(root, tmp_path) -> Path:
    """A converted model whose source is gone."""
    directory = shutil.copytree(root / "bidirectional", tmp_path / "orphan")
    write_facts(directory, replace(read_facts(directory), source=str(tmp_path / "gone")))
    return directory


def test_without_its_source_a_stage_needs_a_teacher_named_or_none(root, orphan, tmp_path):
    text = root / "text.jsonl"
    with pytest.raises(UserError, match=r"gone, which cannot be loaded.*--teacher_model_name_or_path") as caught:
        run(orphan, text, tmp_path / "out", align_weight=1.0)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    run(orphan, text, tmp_path / "plain", max_steps=1)
    named = str(root / "source")
    run(orphan, text, tmp_path / "named", max_steps=1, align_weight=1.0, teacher_model_name_or_path=named)
    assert read_facts(tmp_path / "named").source == str(tmp_path / "gone")


def test_an_imported_model_is_fine_tuned_and_needs_a_teacher_named(root, tmp_path):
    publish(tmp_path / "public", "Dream")
    import_checkpoint(tmp_path / "public", tmp_path / "imported")
    conversion = run(tmp_path / "imported", root / "text.jsonl", tmp_path / "out", max_steps=1)
    assert conversion.facts.earlier_stages == [{"imported_as": "Dream"}]
    with pytest.raises(UserError, match=r"public, which cannot be loaded.*--teacher_model_name_or_path"):
        run(tmp_path / "imported", root / "text.jsonl", tmp_path / "aligned", max_steps=1, align_weight=1.0)


# What is refused


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        ({"mask_token": "<gap>"}, r"--mask_token <gap>: .* was trained with <\|mask\|>"),
        ({"anneal_steps": 3}, "--anneal_steps 3 opens attention from causal"),
        ({"block_size": 4}, "--block_size 4 is for --layout block, not bidirectional"),
        ({"layout": "block"}, "--layout block needs --block_size"),
        ({"rows": "rollout"}, "--rows rollout needs --layout block, not bidirectional"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_go_with_the_model_is_refused(root, tmp_path, options, reported):
    with pytest.raises(UserError, match=reported):
        stage(root, "bidirectional", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_mask_token_that_the_model_has_may_be_named(root, tmp_path):
    stage(root, "bidirectional", tmp_path / "out", mask_token="<|mask|>", **STILL)
    assert_same(weights(tmp_path / "out"), weights(root / "bidirectional"))


def test_a_run_does_not_overwrite_the_model_that_it_begins_with(root, tmp_path):
    out = shutil.copytree(root / "bidirectional", tmp_path / "out")
    for model in (out, checkpoints(out)[-1]):
        with pytest.raises(UserError, match=r"holds the model .* that the run begins with"):
            run(model, root / "text.jsonl", out, overwrite=True)
    assert_same(weights(out), weights(root / "bidirectional"))


# Resuming


@pytest.mark.parametrize(
    "options",
    [{"align_weight": 1.0}, {"lora_r": 2, "align_weight": 1.0}, BLOCK | {"rows": "rollout", "kl_weight": 1.0}],
    ids=["aligned", "lora", "rollouts"],
)
def test_a_resumed_stage_ends_with_the_weights_of_one_that_was_never_stopped(root, tmp_path, options):
    options = options | {"save_steps": 2, "max_steps": 4}
    if "rows" in options:
        options |= {"max_length": 32, "rollout_tokens": 8}
    out = tmp_path / "out"
    stage(root, "bidirectional", out, **options)
    whole, facts = weights(out), read_facts(out)
    shutil.rmtree(out / "checkpoint-4")
    (out / "model.safetensors").unlink()
    stage(root, "bidirectional", out, resume_from_checkpoint="true", **options)
    assert_same(weights(out), whole)
    assert read_facts(out).earlier_stages == facts.earlier_stages
    other = {"block_size": 8} if "rows" in options else {"shift": 0}
    with pytest.raises(UserError, match=r"--shift 0: .* was trained with 1|--block_size 8: .* was trained with 4"):
        stage(root, "bidirectional", out, resume_from_checkpoint="true", **options | other)


# The documentation


def test_the_commands_of_the_page_run(tmp_path, monkeypatch, capfd):
    section = (ROOT / "docs" / "convert.md").read_text().split("## In stages")[1]
    commands = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].splitlines()
    monkeypatch.chdir(tmp_path)
    save_source(tmp_path / "MODEL", "llama", chat=True)
    for name in ("DATA", "PROMPTS"):
        Path(name).write_text("the rain in spain\n" * 40)
    turns = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "rain"}]
    Path("CONVERSATIONS").write_text(json.dumps({"messages": turns}) + "\n")
    few = ["--max_length", "32", "--max_steps", "1", "--use_cpu", "--per_device_train_batch_size", "2"]
    for command in commands:
        words = shlex.split(command)[1:]
        rollouts = ["--rollout_prompts", "2"] if "opdlm" in words else []
        assert main([*words, *few, *rollouts]) == 0, capfd.readouterr().err
    assert (read_facts("TUNED").layout, len(read_facts("TUNED").earlier_stages)) == ("block", 2)
