"""The recipes of block layouts from beginning to end: on text and on prompts, aligned, with adapters, frozen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from decausal.config import read_recipe, resolve
from decausal.diffusion.layout import Layout
from decausal.models.backbone import logits
from decausal.models.checkpoint import load_converted
from decausal.training.settings import ConversionSettings
from tests.runs import assert_same, logged, run, save_source, weights, write_text

RECIPES = ["bd3lm", "sdar", "fast-dllm-v2"]
OPTIONS = {
    "plain": {},
    "aligned": {"align_weight": 1.0, "freeze_embeddings": True},
    "adapters": {"align_weight": 1.0, "align_positions": "all", "lora_r": 4, "causal_context": True},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_source(tmp_path_factory.mktemp("source") / "model", "qwen3")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    prompts = root / "prompts.jsonl"
    records = [{"prompt": "say" * (1 + n % 5), "completion": " again" * (1 + n % 3)} for n in range(24)]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"text": write_text(root / "text.jsonl"), "prompts": prompts}


def recipe(name: str) -> dict[str, object]:
    """The recipe's own values, in settings that fit the tiny model."""
    _, training = resolve(ConversionSettings, read_recipe(name), [])
    own = {key: value for key, value in read_recipe(name).items() if key not in training}
    return own | training | {"block_size": min(own["block_size"], 6), "warmup_steps": 0}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("rows", ["text", "prompts"])
@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_trains_on_text_and_on_prompts_and_what_comes_out_loads(
    tmp_path, source, data, name, rows, options
):
    values = recipe(name) | options | {"max_steps": 2, "save_strategy": "no", "learning_rate": 1e-3}
    conversion = run(source, data[rows], tmp_path / "out", max_length=40, **values)
    names = ("token_loss", "alignment_loss") if "align_weight" in options else ("token_loss",)
    for logged_name in names:
        found = torch.tensor(logged(conversion, logged_name))
        assert len(found) == 2
        assert (found.isfinite() & (found > 0)).all()
    assert not all(map(torch.equal, weights(tmp_path / "out").values(), weights(source).values()))
    model, _, facts = load_converted(tmp_path / "out")
    assert facts.attention == Layout("block", values["block_size"], values.get("causal_context", False))
    assert facts.shift == values["shift"]
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = logits(conversion.model, ids, facts.attention)
        assert torch.equal(logits(model, ids, facts.attention), expected)


@pytest.mark.parametrize("option", ["causal_context", "noise_per", "block_size", "shift", "token_weight"])
def test_every_choice_of_a_block_layout_reaches_training(tmp_path, source, data, option):
    changes = {"causal_context": True, "noise_per": "document", "block_size": 3, "shift": 1, "token_weight": 0.5}
    values = recipe("bd3lm") | {"max_steps": 1, "save_strategy": "no"}
    losses = [
        logged(run(source, data["text"], tmp_path / name, **(values | change)), "loss")
        for name, change in (("plain", {}), ("changed", {option: changes[option]}))
    ]
    assert losses[0] != losses[1]


def test_losses_count_from_their_start_to_their_stop(tmp_path, source, data):
    conversion = run(
        source,
        data["text"],
        tmp_path / "out",
        **recipe("sdar") | {"align_weight": 2.0, "align_start_step": 1, "align_stop_step": 3, "token_stop_step": 0.5},
    )
    steps = {
        name: [entry["step"] for entry in conversion.history if name in entry]
        for name in ("token_loss", "alignment_loss")
    }
    # At step 4 nothing counts any more: the token loss is watched, at weight 0.
    assert steps == {"token_loss": [1, 2, 4], "alignment_loss": [2, 3]}
    assert logged(conversion, "loss")[3] == 0


def test_gradient_checkpointing_changes_nothing(tmp_path, source, data):
    for name, gradient_checkpointing in (("without", False), ("with", True)):
        values = recipe("bd3lm") | {"gradient_checkpointing": gradient_checkpointing, "save_strategy": "no"}
        run(source, data["text"], tmp_path / name, **values)
    assert_same(weights(tmp_path / "with"), weights(tmp_path / "without"))


def test_held_out_data_is_measured_block_by_block_while_training(tmp_path, source, data):
    options = {"eval_data": str(data["text"]), "eval_rows": 2, "eval_steps": 2, "save_strategy": "no"}
    conversion = run(source, data["text"], tmp_path / "out", **recipe("bd3lm") | options)
    assert all(value > 0 for value in logged(conversion, "eval_nelbo_per_token"))
    assert len(logged(conversion, "eval_nelbo_per_token")) == 2


def test_blocks_that_reach_over_a_learned_context_are_cut_there(tmp_path, data):
    """Rows as long as the context, no multiple of the block: the last block has no position for all its fills."""
    source = save_source(tmp_path / "model", "gpt2", n_positions=26)
    conversion = run(source, data["text"], tmp_path / "out", max_length=26, **recipe("bd3lm") | {"max_steps": 1})
    assert logged(conversion, "token_loss")[0] > 0
