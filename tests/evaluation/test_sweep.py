"""A sweep asks the same questions under each setting; the AR source and verified decoding write the same text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from decausal.cli import main
from decausal.data.tokenizer import character_tokenizer
from decausal.errors import UserError
from decausal.evaluation.sweep import OurQuestions, Point, sweep, written
from decausal.evaluation.sweep_settings import AR, VERIFIED, Tried, tried_settings
from decausal.evaluation.tasks import write_greedily
from decausal.evaluation.texts import causal
from decausal.models.adapt import adapt, load_source
from decausal.models.checkpoint import Converted, save_converted
from decausal.models.facts import ConversionFacts
from decausal.sampling.settings.of_model import settings_for
from tests.families import FAMILIES

QUESTIONS = OurQuestions(["addition", "lookup"], 2, 4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, tokenizer = tmp_path_factory.mktemp("source"), character_tokenizer(256)
    FAMILIES["qwen3"](vocab_size=len(tokenizer), eos_token_id=0, max_position_embeddings=256).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def student(source: Path) -> Converted:
    """A block model with the very weights of its source."""
    model, tokenizer = load_source(str(source))
    facts = ConversionFacts(str(source), "block", 1, adapt(model, tokenizer), block_size=4, causal_context=True)
    return Converted(model, tokenizer, facts)


def test_verified_decoding_writes_what_the_source_writes_and_a_sweep_says_so(student: Converted) -> None:
    source = causal(student.model, student)
    settings = tried_settings(student.facts, ["threshold=1.0,1e-9", "draft_length=0,2", "block_size=2"], {})
    points = list(sweep(student, source, QUESTIONS, settings))
    assert [point.series for point in points] == [AR, *["threshold"] * 2, *["draft_length"] * 2, "block_size"]
    ar, verified = points[0], points[4]
    assert ar.tokens_per_forward == pytest.approx(1)
    assert verified.texts == ar.texts
    assert verified.accuracy == ar.accuracy
    assert points[2].tokens_per_forward > points[1].tokens_per_forward
    assert all(point.num_examples == 4 and point.tokens_per_second > 0 for point in points)


def test_the_source_in_the_engine_writes_greedily_from_left_to_right(student: Converted) -> None:
    prompts = ["1+2=", "17+25=", "3"]
    ids = student.tokenizer(prompts, add_special_tokens=False)["input_ids"]
    rows, _ = written(causal(student.model, student), ids, 6, 2, {})
    expected = write_greedily(student.model, student.tokenizer, prompts, batch_size=1, max_new_tokens=6)
    assert [row.ids for row in rows] == [one.ids for one in expected]


def test_points_of_an_interrupted_sweep_are_not_measured_again(student: Converted) -> None:
    settings = [Tried("threshold", {"threshold": value}) for value in (1.0, 0.5)]
    done = Point("threshold", {"threshold": 1.0}, 0.123, None, 4, 1.0, 9.0)
    points = list(sweep(student, None, QUESTIONS, settings, done=[done]))
    assert points[0] == done
    assert points[1].accuracy != 0.123


FACTS = ConversionFacts("tiny", "block", 1, 3, block_size=4, causal_context=True)


def test_without_settings_thresholds_and_drafts_are_tried() -> None:
    tried = tried_settings(FACTS, [], {})
    assert {one.series for one in tried} == {"threshold", VERIFIED}
    assert next(one.options for one in tried if one.series == VERIFIED) == {"speculative": True}


@pytest.mark.parametrize(
    ("over", "fixed", "series"),
    [
        (["threshold=0.5"], {}, ["threshold", VERIFIED]),
        (["block_size=2", "threshold=0.5"], {}, ["block_size", "threshold", VERIFIED]),
        (["threshold=0.5", "draft_length=2"], {}, ["threshold", "draft_length"]),
        (["temperature=0.5"], {"speculative": True}, ["temperature"]),
    ],
)
def test_verified_decoding_stands_once_beside_what_is_swept(
    over: list[str], fixed: dict[str, Any], series: list[str]
) -> None:
    assert [one.series for one in tried_settings(FACTS, over, fixed)] == series


@pytest.mark.parametrize("over", [[], ["threshold=0.5,0.7"], ["num_steps=2"], ["confidence=margin"]])
def test_steps_are_swept_by_denoising_where_a_model_verifies_by_itself(over: list[str]) -> None:
    verifying = replace(FACTS, sampler={"speculative": True})
    tried = tried_settings(verifying, over, {})
    assert all(settings_for(verifying, **one.options).speculative == (one.series == VERIFIED) for one in tried)


@pytest.mark.parametrize(
    ("over", "reported"),
    [
        ("threshold", "write NAME=VALUE"),
        ("treshold=1", "did you mean 'threshold'"),
        ("threshold=high", "threshold='high' is not accepted"),
        ("block_size=0", "at least 1"),
        ("window=4", "not possible under layout 'block'"),
    ],
)
def test_settings_that_the_model_does_not_have_are_refused_before_it_is_loaded(over: str, reported: str) -> None:
    with pytest.raises(UserError, match=reported):
        tried_settings(FACTS, [over], {})


def test_a_sweep_and_an_evaluation_are_kept_drawn_and_reproduced(
    student: Converted, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_converted(tmp_path / "student", *student)
    monkeypatch.chdir(tmp_path)
    command = ["sweep", "student", "--tasks", "addition", "--num_examples", "2", "--over", "threshold=1.0,0.5"]
    assert main([*command, "--output", "sweep.json"]) == 0
    first = json.loads(Path("sweep.json").read_text())
    assert [point["series"] for point in first["figures"]["points"]] == [AR, "threshold", "threshold", VERIFIED]
    assert {"commit", "hardware", "versions", "data_hash", "seeds", "sampler"} <= first["manifest"].keys()
    assert first["model"]["fingerprint"].keys() == {"model.safetensors"}
    assert main([*command, "--output", "sweep.json"]) == 0  # nothing but the source is measured again
    again = json.loads(Path("sweep.json").read_text())
    assert again["figures"]["points"][1:] == first["figures"]["points"][1:]
    assert main(["report", "sweep.json"]) == 0
    assert "<svg" in Path("report.html").read_text()
    other = ["sweep", "student", "--tasks", "lookup", "--over", "threshold=1.0", "--output", "sweep.json"]
    assert main(other) == 2
    assert "holds another sweep" in capsys.readouterr().err


def test_texts_have_entropy_beside_their_perplexity_and_the_source_is_surest_of_its_own(
    student: Converted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_converted(tmp_path / "student", *student)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+2=", "completion": ""}\n' * 2)
    command = ["eval", "texts", str(tmp_path / "student"), "--data", str(tmp_path / "prompts.jsonl")]
    found: dict[str, Any] = {}
    for flags in (["--json"], ["--json", "--no_source"]):
        assert main([*command, "--max_new_tokens", "8", "--max_length", "64", *flags]) == 0
        found[flags[-1]] = json.loads(capsys.readouterr().out)
    whole = found["--json"]
    assert whole["model"]["perplexity"] >= whole["source"]["perplexity"] > 1
    assert whole["model"]["look"]["entropy"] is not None
    assert whole["sampler"]["max_new_tokens"] == 8
    assert found["--no_source"]["model"]["perplexity"] is None
    assert found["--no_source"]["model"]["look"] == whole["model"]["look"]
