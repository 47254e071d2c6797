"""The commands of the results: bounded, continued, and reading curves rightly."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType

import pytest

from decausal.config import resolve
from decausal.training.settings import ConversionSettings
from tests.benchmarks.test_verified import BENCHMARKS
from tests.runs import save_source

SCRIPT = "import pathlib, sys; pathlib.Path(sys.argv[1]).open('a').write('x')"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from results import steps

    return steps


def test_steps_that_are_done_are_not_run_again_and_one_without_its_output_stops_all(
    steps: ModuleType, tmp_path: Path
) -> None:
    script = tmp_path / "write.py"
    script.write_text(SCRIPT)
    first, second = (steps.Step([str(script), str(tmp_path / name)], tmp_path / name) for name in "ab")
    assert steps.run_steps([first], None)
    assert steps.run_steps([first, second], 1.0)
    assert (tmp_path / "a").read_text() == "x"
    marked = steps.Step([str(script), str(tmp_path / "c")], tmp_path / "c.done")
    assert steps.run_steps([marked], None)
    with pytest.raises(SystemExit, match="step 1 failed"):
        steps.run_steps([steps.Step([str(script), str(tmp_path / "d")], tmp_path / "nowhere")], None)


def test_a_call_that_has_no_time_left_runs_nothing(steps: ModuleType, tmp_path: Path) -> None:
    assert not steps.run_steps([steps.Step(["never.py"], tmp_path / "a")], 0.0)


def test_a_crossing_is_where_the_aligned_curve_meets_the_lowest_of_the_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from results import alignment

    def run(values: list[float], pace: float) -> list[dict[str, float]]:
        return [{"step": 10 * i, "seconds": 10 * pace * i, "nelbo": value} for i, value in enumerate(values)]

    plain, aligned = run([9.0, 6.0, 4.0, 5.0], 1.0), run([9.0, 5.0, 3.0, 3.0], 1.2)
    found = alignment.crossing(plain, aligned, cost=1.25)
    assert found == pytest.approx({"step": 15 / 20, "seconds": 18 / 20, "operations": 1.25 * 15 / 20})
    assert alignment.crossing(plain, run([9.0, 8.0], 1.0), cost=1.25) == {}
    assert alignment.crossing(run([4.0, 5.0], 1.0), aligned, cost=1.25) == {}  # training only made it worse


def test_finished_runs_become_a_table_a_figure_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from results import alignment

    for file in ("wikitext2_valid.txt", "wikitext2_test.txt"):
        (tmp_path / file).write_text(" = A title = \n\n text \n")
    save_source(tmp_path / "source", "llama")
    work = tmp_path / "work"
    for fraction in alignment.FRACTIONS:
        for is_frozen in (False, True):
            for recipe, values in {"mdm": (9.0, 6.0, 4.0), "repr-align": (9.0, 4.0, 3.0)}.items():
                run = work / alignment.name_of(recipe, fraction, 1e-4, is_frozen, 0)
                run.mkdir(parents=True)
                (run / "decausal.json").write_text("{}")
                log = [{"step": 10 * i, "seconds": i, alignment.MEASURE: value} for i, value in enumerate(values)]
                (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    command = ["alignment.py", str(tmp_path / "source"), "--data", str(tmp_path), "--work", str(work)]
    monkeypatch.setattr("sys.argv", command)
    alignment.main()
    table = (work / "alignment.md").read_text()
    assert table in capsys.readouterr().out
    assert "| 10% | 0.0001 | frozen | 4.000 | 3.000 | 0.500 | " in table
    assert (work / "alignment.png").read_bytes().startswith(b"\x89PNG")
    assert "mdm-data0.01-rate0.0001-seed0" in (work / "report.html").read_text()

    # The same figures on another machine, without the runs.
    made = (work / "alignment.json").read_text()
    (tmp_path / "known.json").write_text(made)
    elsewhere = [*command[:-1], str(tmp_path / "elsewhere"), "--known", str(tmp_path / "known.json")]
    monkeypatch.setattr("sys.argv", elsewhere)
    alignment.main()
    rows = json.loads(made)["rows"]
    assert json.loads((tmp_path / "elsewhere" / "alignment.json").read_text())["rows"] == rows
    monkeypatch.setattr("sys.argv", [*elsewhere, "--fractions", "0.1"])
    alignment.main()
    found = json.loads((tmp_path / "elsewhere" / "alignment.json").read_text())["rows"]
    assert found == [row for row in rows if row["data"] == 0.1] != []


@pytest.mark.parametrize("name", ["alignment", "distillation", "infilling"])
def test_every_conversion_of_a_result_has_settings_that_exist(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from importlib import import_module

    from decausal.config import read_recipe, take_flag

    made = import_module(f"results.{name}")
    for file in ("wikitext2_valid.txt", "wikitext2_test.txt"):
        (tmp_path / file).write_text(" = A title = \n\n text \n = Another = \n\n more \n")
    (tmp_path / "instructions.jsonl").write_text('{"messages": ["a\u2028b"]}\n' * 300)
    command = ["", "tiny", "--data", str(tmp_path), "--work", str(tmp_path / "work"), "--plan"]
    monkeypatch.setattr("sys.argv", command)
    made.main()
    assert "convert tiny --recipe" in capsys.readouterr().out
    flags = argparse.Namespace(model="tiny", data=tmp_path, work=tmp_path / "work", seeds=(0, 1), steps=None)
    vars(flags).update(
        limit=None, minutes=None, rates=None, fractions=(0.01, 0.1, 1.0), learning_rate=1e-4, bf16="true", known={}
    )
    vars(flags).update(methods=["corpus", "off-policy", "opdlm", "lossless"])
    conversions = [step for step in made.steps_of(flags) if step.arguments[0] == "convert"]
    assert len(conversions) == {"alignment": 24, "distillation": 8, "infilling": 2}[name]
    for step in conversions:
        given, recipe = take_flag(step.arguments[2:], "recipe", "")
        assert resolve(ConversionSettings, read_recipe(recipe), given)
