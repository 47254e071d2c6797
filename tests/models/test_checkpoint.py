"""Facts survive the disk, and a directory that is broken or contradicts itself is refused with both sides named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from decausal.errors import UserError
from decausal.models import checkpoint
from decausal.models.adapt import adapt
from decausal.models.checkpoint import load_converted, save_converted
from decausal.models.facts import ConversionFacts, read_facts, write_facts
from tests.families import FAMILIES, tiny_tokenizer


def some_facts(**changes: Any) -> ConversionFacts:
    facts = {
        "source": "Qwen/Qwen3-0.6B",
        "source_revision": "abc123",
        "layout": "block",
        "block_size": 4,
        "shift": 0,
        "mask_token_id": 268,
        "recipe": {"name": "repr-align", "alignment": {"weight": 10.0}},
        "sampler": {"num_steps": 8},
    }
    return ConversionFacts(**{**facts, **changes})


def save(directory: Path, **changes: Any) -> ConversionFacts:
    model, tokenizer = FAMILIES["qwen3"](), tiny_tokenizer()
    mask_token_id = adapt(model, tokenizer)
    defaults = {"layout": "bidirectional", "block_size": None, "shift": 1, "mask_token_id": mask_token_id}
    facts = some_facts(**{**defaults, **changes})
    save_converted(directory, model, tokenizer, facts)
    return facts


def refused(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_converted(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_facts_read_are_the_facts_written(tmp_path: Path) -> None:
    write_facts(tmp_path, some_facts())
    assert read_facts(tmp_path) == some_facts()
    assert [path.name for path in tmp_path.iterdir()] == ["decausal.json"]


def test_facts_name_the_version_that_wrote_them(tmp_path: Path) -> None:
    write_facts(tmp_path, some_facts())
    assert json.loads((tmp_path / "decausal.json").read_text())["decausal_version"]


def test_facts_that_cannot_be_written_leave_the_old_ones(tmp_path: Path) -> None:
    write_facts(tmp_path, some_facts())
    with pytest.raises(TypeError):
        write_facts(tmp_path, some_facts(recipe={"name": object()}))
    assert read_facts(tmp_path) == some_facts()
    assert [path.name for path in tmp_path.iterdir()] == ["decausal.json"]


def test_directory_without_facts_is_met_with_how_to_convert(tmp_path: Path) -> None:
    assert "is not a decausal checkpoint" in refused(tmp_path)
    assert f"decausal convert {tmp_path}" in refused(tmp_path)


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{broken", "cannot be read"),
        ("[1, 2]", "holds no table of facts"),
        ("{}", "lacks 'schema_version'"),
        ('{"schema_version": 2}', "has schema 2, this decausal reads up to 1"),
        ("[" * 100_000, "cannot be read: the JSON is nested too deeply"),
        ('{"shift": ' + "9" * 5000 + "}", "cannot be read: the JSON holds a number with too many digits"),
    ],
)
def test_broken_facts_are_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "decausal.json").write_text(text)
    assert reason in refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shfit": 1}, "holds 'shfit', which is not a fact of a conversion; did you mean 'shift'?"),
        ({"shift": None}, "lacks 'shift'"),
        ({"shift": 2}, "shift is 2; accepted: 0, 1"),
        ({"shift": "one"}, 'has shift "one"; expected a whole number'),
        ({"layout": "diagonal"}, "layout 'diagonal' is not known"),
        ({"block_size": None}, "layout 'block' has block_size None"),
        ({"noise_schedule": "cosine"}, "noise_schedule is 'cosine'"),
    ],
)
def test_wrong_facts_are_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    write_facts(tmp_path, some_facts())
    record = json.loads((tmp_path / "decausal.json").read_text()) | change
    record = {name: fact for name, fact in record.items() if fact is not None}
    (tmp_path / "decausal.json").write_text(json.dumps(record))
    assert reason in refused(tmp_path)


def test_mask_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    write_facts(tmp_path, some_facts(layout="bidirectional", block_size=None, mask_token_id=300))
    assert "has mask_token_id 300, the weights have 269 embedding rows" in refused(tmp_path)


def test_ends_of_answers_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    write_facts(tmp_path, some_facts(layout="bidirectional", block_size=None, end_token_ids=[1, 300]))
    assert "has end_token_ids 300, the weights have 269 embedding rows" in refused(tmp_path)


def test_mask_token_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "has mask_token_id 268, the tokenizer's mask token has id None" in refused(tmp_path)


def test_attention_that_contradicts_the_layout_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"is_causal": True}))
    assert "has layout 'bidirectional', config.json has is_causal True" in refused(tmp_path)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "holds no weights (model.safetensors)" in refused(tmp_path)


def test_weights_load_in_the_type_asked_for(tmp_path: Path) -> None:
    save(tmp_path)
    model = load_converted(tmp_path, dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_a_save_cut_short_is_not_taken_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)

    def cut_short(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "write_facts", cut_short)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path)
    assert "is not a decausal checkpoint" in refused(tmp_path)
