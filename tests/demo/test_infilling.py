"""A gap is whole lines of a held-out document, and fits the model."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from decausal.demo.infilling import Gap, _pieces, choose_gap
from decausal.models.embedded import embedded_model_path
from decausal.sampling.texts import text_ids
from tests.families import tiny_tokenizer

CODE = "".join(f"def f{number}(a, b):\n    c = a + {number}\n    return c\n\n" for number in range(8))


def gap_in(
    path: Path, text: str, most_tokens: int = 40, context_length: int | None = None, seed: int = 0
) -> Gap | None:
    path.write_text(text)
    return choose_gap(str(path), tiny_tokenizer(), most_tokens=most_tokens, context_length=context_length, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_prefix_gap_and_suffix_are_consecutive_whole_lines_of_the_document(tmp_path: Path, seed: int) -> None:
    gap = gap_in(tmp_path / "code.py", CODE, seed=seed)
    assert gap is not None
    assert gap.prefix + gap.text + gap.suffix in CODE
    assert gap.prefix.endswith(":")
    assert all(part.startswith("\n") and not part.endswith("\n") for part in (gap.text, gap.suffix.rstrip("\n")))
    assert gap.num_tokens == len(tiny_tokenizer()(gap.text)["input_ids"])
    assert 20 <= gap.num_tokens <= 40


def test_the_parts_have_the_tokens_that_the_whole_has(tmp_path: Path) -> None:
    """With a tokenizer that joins a line break and the indentation after it."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path("tiny"))
    (tmp_path / "code.py").write_text(CODE)
    for seed in range(4):
        gap = choose_gap(str(tmp_path / "code.py"), tokenizer, most_tokens=20, context_length=None, seed=seed)
        parts = [text_ids(tokenizer, part) for part in (gap.prefix, gap.text, gap.suffix)]
        assert list(chain(*parts)) == text_ids(tokenizer, gap.prefix + gap.text + gap.suffix)


def test_the_same_seed_chooses_the_same_gap_and_another_seed_another(tmp_path: Path) -> None:
    chosen = [gap_in(tmp_path / "code.py", CODE, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) > 1


@pytest.mark.parametrize("context_length", [64, 80, 120])
def test_a_gap_with_what_surrounds_it_fits_the_context(tmp_path: Path, context_length: int) -> None:
    gap = gap_in(tmp_path / "code.py", CODE, context_length=context_length, most_tokens=24)
    assert gap is not None
    num_given = sum(len(tiny_tokenizer()(text)["input_ids"]) for text in (gap.prefix, gap.suffix))
    assert num_given + gap.num_tokens <= context_length


@pytest.mark.parametrize(("text", "context_length"), [("one line\n", None), ("word " * 500, None), (CODE, 16)])
def test_where_no_lines_fit_there_is_no_gap(tmp_path: Path, text: str, context_length: int | None) -> None:
    assert gap_in(tmp_path / "text.txt", text, context_length=context_length) is None


@pytest.mark.parametrize("text", ["the train, he said", "naïve — 字 done", "\n\n    tabs\t"])
def test_pieces_of_tokens_join_to_the_text_without_broken_characters(text: str) -> None:
    ids = tiny_tokenizer()(text)["input_ids"]
    pieces = _pieces(tiny_tokenizer(), ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
