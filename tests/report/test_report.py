"""A page over runs and records: it holds every figure, its manifest, no secrets, no paths and nothing from outside."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from decausal.cli import main
from decausal.errors import UserError
from decausal.report.records import Evaluation, read_record, without_flags, write_record
from decausal.report.reproducing import compared, recorded
from decausal.report.sources import find

SECRET = "hf_0123456789abcdefghij"
MANIFEST = {"date": "2026-01-02", "commit": "abc123", "hardware": {"processor": "Some CPU"}, "versions": {"torch": "9"}}
NLL = {
    "nelbo_per_token": 3.25,
    "nelbo_standard_error": 0.125,
    "bits_per_byte": 1.5,
    "bits_per_byte_standard_error": 0.0625,
    "num_rows": 7,
    "samples_per_row": 8,
    "ar_nll_per_token": 2.6,
    "ar_nll_standard_error": 0.1,
    "ar_bits_per_byte": 1.2,
    "ar_bits_per_byte_standard_error": 0.05,
}
LOOK = {
    "num_texts": 3,
    "length": 9.5,
    "repetition": 0.25,
    "distinct": [0.5, 0.6, 0.7],
    "entropy": 1.75,
    "unit": "tokens",
}


def point(series: str, accuracy: float, speed: float, **options: Any) -> dict[str, Any]:
    return {
        "series": series,
        "options": options,
        "accuracy": accuracy,
        "standard_error": 0.01,
        "num_examples": 5,
        "tokens_per_forward": speed,
        "tokens_per_second": 10 * speed,
        "texts": LOOK,
        "retention": 100 * accuracy,
        "retention_standard_error": 1.5,
        "speedup": speed,
    }


def nll(folder: Path, **changes: Any) -> Evaluation:
    model = {"name": str(folder / "student"), "fingerprint": {"model.safetensors": "f00"}, "facts": {"layout": "block"}}
    arguments = ["eval", "nll", str(folder / "student"), "--data", str(folder / "held_out.txt")]
    return Evaluation("nll", arguments, model, NLL | changes, MANIFEST | {"data_hash": "d4t4", "seeds": {"masks": 3}})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Records of three kinds, and a run."""
    record = nll(tmp_path)
    write_record(tmp_path / "evals" / "nll.json", record)
    points = [point("AR", 1.0, 1.0), point("threshold", 0.9, 1.5, threshold=0.9), point("verified", 1.0, 1.25)]
    write_record(
        tmp_path / "evals" / "sweep.json",
        Evaluation("sweep", ["sweep", "student"], record.model, {"tasks": ["addition"], "points": points}, MANIFEST),
    )
    written = {"look": LOOK, "perplexity": 17.5, "first": ["a <b> text"]}
    write_record(
        tmp_path / "evals" / "texts.json",
        Evaluation("texts", ["eval", "texts"], record.model, {"model": written, "source": None}, MANIFEST),
    )
    run = tmp_path / "run-one"
    run.mkdir()
    settings = {"learning_rate": 0.001, "seed": 5, "data": str(tmp_path / "mine.txt"), "hub_token": SECRET}
    (run / "run.yaml").write_text(yaml.safe_dump(settings))
    entries = [{"step": step, "tokens": 9 * step, "seconds": 2.0 * step, "loss": 4.0 - step} for step in (1, 2)]
    shares = {"eval_draft_accuracy_1": 0.5, "eval_draft_accuracy_2": 0.25, "eval_tokens_per_pass": 1.6}
    entries.append({"step": 2, "tokens": 18, "seconds": 4.0, "eval_nelbo_per_token": 3.5} | shares)
    lines = [json.dumps(entry) for entry in entries]
    (run / "log.jsonl").write_text("\n".join([*lines, '{"step": 3, "lo']))  # a killed run's last line
    sample = {"step": 2, "prompt": "It", "text": "rains and rains", "finish_reason": "length"}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return tmp_path


class Checker(HTMLParser):
    """Fails where tags are not closed in their order, and collects targets and anchors."""

    void = ("meta", "br", "path", "use")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: set[str] = set()
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {found["id"]} if found.get("id") else set()
        self.links |= {found["href"][1:]} if tag == "a" and found.get("href") else set()
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag


def test_the_page_holds_every_figure_with_its_manifest_and_needs_nothing_from_outside(folder: Path) -> None:
    page = folder / "out" / "page.html"
    assert main(["report", str(folder / "evals"), str(folder / "run-one"), "--output", str(page)]) == 0
    text = page.read_text()
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert checker.links == {"e1", "e2", "e3"} <= checker.anchors
    for shown in ("3.250", "0.125", "1.500", "80.0", "17.500", "1.750", "Some CPU", "abc123", "d4t4", "masks 3", "f00"):
        assert shown in text, shown
    assert "a &lt;b&gt; text" in text
    assert text.count("<svg") == text.count("</svg>") >= 5
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    assert not re.search(r'(src|href)="(?!#)', text.replace('xlink:href="#', 'xlink:href=#"'))
    assert all(f">{label}<" in text for label in ("draft 1", "draft 2"))
    assert ">draft 3<" not in text
    assert "run-one: share of drafts that are right" in text
    assert SECRET not in text + page.with_suffix(".json").read_text()
    assert str(folder) not in text
    names = json.loads(page.with_suffix(".json").read_text())
    assert [each["kind"] for each in names["evaluations"]] == ["nll", "sweep", "texts"]
    assert [run["name"] for run in names["runs"]] == ["run-one"]


def test_perplexity_never_stands_without_entropy(folder: Path) -> None:
    (headings,) = re.findall(r"<tr>(<th>texts</th>.*?)</tr>", _page(folder, folder / "evals"))
    columns = re.findall(r"<th>(.*?)</th>", headings)
    assert columns.index("entropy") == columns.index("perplexity") - 1


def _page(folder: Path, *paths: Path) -> str:
    output = folder / "again.html"
    assert main(["report", *map(str, paths), "--output", str(output)]) == 0
    return output.read_text()


def test_models_stand_beside_each_other_in_one_table(folder: Path) -> None:
    other = nll(folder, bits_per_byte=1.75)
    other.model["name"] = "other"
    write_record(folder / "evals" / "other.json", other)
    (row,) = re.findall(r"<tr><td>held_out.txt, bits per byte</td>(.*?)</tr>", _page(folder, folder / "evals"))[:1]
    assert re.findall(r"<td>([\d.]+)", row) == ["1.500", "1.750", "1.200"]


def test_a_report_is_read_like_its_records(folder: Path) -> None:
    _page(folder, folder / "evals")
    assert [each.kind for each in find([folder / "again.json"]).evaluations] == ["nll", "sweep", "texts"]
    assert [each.kind for each in recorded(folder / "again.html")] == ["nll", "sweep", "texts"]


@pytest.mark.parametrize(
    ("made", "reported"),
    [
        (lambda folder: folder / "nowhere", "does not exist"),
        (lambda folder: _written(folder / "empty" / "notes.txt", "text").parent, "neither a run nor an evaluation"),
        (lambda folder: _written(folder / "x.json", '{"decausal_evaluation": 9}'), "upgrade"),
        (lambda folder: _written(folder / "x.json", '{"decausal_evaluation": 1, "kind": "nll"}'), "'arguments'"),
    ],
)
def test_what_cannot_be_reported_is_refused(made: Any, reported: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reported):
        find([made(tmp_path)])


def _written(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_differences_name_their_place_and_times_do_not_count(tmp_path: Path) -> None:
    before, now = nll(tmp_path, seconds=1.0), nll(tmp_path, seconds=2.0)
    assert compared(before, now).is_identical
    now = nll(tmp_path, bits_per_byte=1.625)
    now.manifest["commit"] = "def456"
    found = compared(before, now)
    assert ("bits_per_byte", 1.5, 1.625) in found.differences
    assert found.circumstances == [("commit", "abc123", "def456")]
    assert "  bits_per_byte: 1.5 before, 1.625 now (+0.125)" in list(found.lines())


def test_flags_about_output_are_not_part_of_what_is_run_again() -> None:
    arguments = ["m", "--json", "--output", "a.json", "--seed", "1", "--output=b"]
    assert without_flags(arguments, "--output", switches=["--json"]) == ["m", "--seed", "1"]


def test_other_files_are_no_records(tmp_path: Path) -> None:
    assert read_record(_written(tmp_path / "a.json", "{}")) is None
    assert read_record(_written(tmp_path / "b.json", "[1")) is None
