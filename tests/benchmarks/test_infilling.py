"""The benchmarks of infilling and editing run, and draw gaps and slips as they say."""

from __future__ import annotations

import json
import random
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from decausal.models.checkpoint import save_converted
from decausal.sampling.texts import text_ids
from tests.sampling.tiny_models import converted

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEXTS = ["def f(x):\n    return x\n", "the rain in\n the area or not\n the rain\n"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import edit_slips
    import infill_length

    monkeypatch.setattr(infill_length, "PREFIX_TOKENS", 6)
    monkeypatch.setattr(infill_length, "SUFFIX_TOKENS", 4)
    return SimpleNamespace(edit_slips=edit_slips, infill_length=infill_length)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks")
    save_converted(root / "model", *converted())
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return root


@pytest.mark.parametrize("kind", ["span", "line"])
def test_a_gap_is_a_piece_of_a_text(benchmark: SimpleNamespace, kind: str) -> None:
    tokenizer = converted().tokenizer
    drawn = benchmark.infill_length.gaps_of(kind, tokenizer, TEXTS, 5, random.Random(1))
    for gap in (next(drawn) for _ in range(20)):
        assert 1 <= len(gap.truth) <= 5
        assert any(tokenizer.decode([*gap.prefix, *gap.truth, *gap.suffix]) in text for text in TEXTS)
        if kind == "line":
            assert "\n" not in tokenizer.decode(gap.truth)
            assert tokenizer.decode(gap.suffix).startswith("\n")


def test_slips_are_other_tokens_in_as_many_places_as_asked_for(benchmark: SimpleNamespace) -> None:
    tokenizer = converted().tokenizer
    flags = Namespace(seed=1, num_rows=5, max_length=12, num_slips=3)
    wrong, right = benchmark.edit_slips.slipped(tokenizer, TEXTS, flags)
    texts = [text_ids(tokenizer, text) for text in TEXTS]
    for with_slips, without in zip(wrong, right, strict=True):
        assert sum(a != b for a, b in zip(with_slips, without, strict=True)) == 3
        assert any(text[start : start + 12] == without for text in texts for start in range(len(text)))
        assert with_slips[0] == without[0]


def test_a_perfect_judge_finds_all_slips_and_a_blind_one_half(benchmark: SimpleNamespace) -> None:
    wrong, right = [[0, 1, 9, 3, 9]], [[0, 1, 2, 3, 4]]
    detection = benchmark.edit_slips.detection
    assert detection([[0.0, -1.0, 0.0, -2.0]], wrong, right) == (1, 1)
    assert detection([[1.0, 1.0, 1.0, 1.0]], wrong, right)[0] == 0.5


def test_both_run_and_say_with_what(
    benchmark: SimpleNamespace, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    flags = [str(directory / "model"), "--data", str(directory / "text.jsonl"), "--device", "cpu"]
    gaps = ["--num_gaps", "2", "--max_gap", "3", "--json", str(directory / "figures.json")]
    monkeypatch.setattr(sys, "argv", ["infill_length.py", *flags, *gaps])
    benchmark.infill_length.main()
    record = json.loads((directory / "figures.json").read_text())
    for figures in (record["figures"]["span"], record["figures"]["line"]):
        assert figures["the true length"]["exact length"] == 1
        assert figures["search: candidates"]["row passes"] > figures["the true length"]["row passes"]
    assert {"command", "commit", "hardware", "versions", "date"} <= record.keys()
    slips = ["--num_rows", "2", "--max_length", "12", "--num_slips", "2", "--groups", "2"]
    monkeypatch.setattr(sys, "argv", ["edit_slips.py", *flags, *slips])
    benchmark.edit_slips.main()
    reported = capsys.readouterr().out
    assert "masked, 2 groups" in reported
    assert "'slips': 4" in reported
