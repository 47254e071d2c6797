"""Figures of drafts: what a row counts, sums, and where they are reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from decausal.models.checkpoint import Converted
from decausal.sampling.generate import generate
from decausal.sampling.jobs import Drafts
from decausal.sampling.model import DiffusionModel
from decausal.verbs.sampling import print_generations
from tests.sampling.tiny_models import converted

SPECULATIVE = {"speculative": True, "draft": "quadratic", "draft_length": 3, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def model() -> Converted:
    return converted(layout="block", block_size=4)


def constant(model: Converted) -> Converted:
    """A model that reads nothing, so that all drafts are right."""
    embeddings = model.model.get_input_embeddings().weight
    embeddings.data.copy_(embeddings.data[:1].expand_as(embeddings))
    return model


def test_a_row_counts_its_drafts() -> None:
    drafts = generate(constant(converted("llama", layout="block", block_size=4)), "import", **SPECULATIVE).drafts
    assert drafts == Drafts((6, 6, 6), (6, 6, 6), {"quadratic 3": 6}, 24)
    assert (drafts.acceptances, drafts.tokens_per_pass) == ([1.0, 1.0, 1.0], 4.0)
    assert str(drafts) == "4.00 tokens per pass, drafts right 1.00 1.00 1.00, quadratic 3"


def test_a_draft_counts_where_those_before_it_are_right(model: Converted) -> None:
    drafts = generate(model, "def area(width", **SPECULATIVE | {"max_new_tokens": 40}).drafts
    assert drafts.num_verified[0] == sum(drafts.passes.values())
    assert drafts.num_verified[1:] == drafts.num_right[:2][: len(drafts.num_verified) - 1]
    assert drafts.num_tokens == sum(drafts.passes.values()) + sum(drafts.num_right)


def test_rows_that_are_denoised_have_none(model: Converted) -> None:
    assert generate(model, "import", max_new_tokens=4).drafts is None


def test_figures_of_rows_add_up() -> None:
    one, other = Drafts((4, 2), (2, 1), {"linear 2": 4}, 7), Drafts((3,), (0,), {"linear 2": 2, "strided 1": 1}, 3)
    assert Drafts.sum([one, None, other]) == Drafts((7, 2), (2, 1), {"linear 2": 6, "strided 1": 1}, 10)
    assert Drafts.sum([None]) is None


def test_json_and_files_tell_them(model: Converted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = generate(model, ["import", "x"], **SPECULATIVE)
    print_generations(found, as_json=True)
    reported = [json.loads(line)["drafts"] for line in capsys.readouterr().out.splitlines()]
    assert reported == [row.drafts.as_dict() for row in found]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("import", "x")))
    result = DiffusionModel(model).run_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", **SPECULATIVE)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["drafts"] for line in lines] == reported
    assert result.drafts == Drafts.sum(row.drafts for row in found)
    print_generations(found, as_json=False)
    assert "tokens per pass, drafts right" in capsys.readouterr().err
