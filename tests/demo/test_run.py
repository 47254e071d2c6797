"""The whole demo on a tiny random model: files, figures, models, and a second time in the same place."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.control import strip_control_codes

import decausal
from decausal.cli import main
from decausal.demo.result import DemoResult
from decausal.demo.run import run_demo
from decausal.demo.settings import DemoSettings
from decausal.errors import UserError
from tests.families import FAMILIES, tiny_tokenizer

CODE = "".join(f"def f{number}(a, b):\n    c = a\n    return c\n\n" for number in range(40))


class Finished:
    """A demo that has run, what it returned and what it printed."""

    def __init__(self, settings: DemoSettings) -> None:
        console = Console(file=io.StringIO(), width=100)
        self.settings = settings
        self.result: DemoResult = run_demo(settings, console)
        self.printed: str = console.file.getvalue()
        self.directory = Path(settings.output_dir)
        self.report: dict[str, Any] = json.loads((self.directory / "report.json").read_text())
        self.page = (self.directory / "report.html").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, text to train on and held-out text; rows are cached there too."""
    folder = tmp_path_factory.mktemp("demo")
    FAMILIES["qwen3"]().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "train.py").write_text(CODE)
    (folder / "heldout.py").write_text(CODE.replace("c = a", "d = b"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("decausal.data.rows.HF_HOME", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def settings(folder: Path) -> DemoSettings:
    return DemoSettings(
        output_dir=str(folder / "demo"),
        model_name_or_path=str(folder / "model"),
        data=str(folder / "train.py"),
        eval_data=str(folder / "heldout.py"),
        data_fraction=1.0,
        max_steps=5,
        eval_every=2,
        per_device_train_batch_size=2,
        max_length=32,
        eval_rows=3,
        eval_samples=2,
        infill_tokens=12,
        bf16=False,
    )


@pytest.fixture(scope="module")
def finished(settings: DemoSettings) -> Finished:
    return Finished(settings)


def test_report_and_models_are_there(finished: Finished) -> None:
    names = {path.name for path in finished.directory.iterdir()}
    assert names == {"plain", "aligned", "report.html", "report.json", "report.png", "run.yaml"}
    assert (finished.directory / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_nothing_but_itself(finished: Finished) -> None:
    sources = re.findall(r"""(?:src|srcset|href|action|data)=["']?([^"'\s>]+)""", finished.page)
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not re.search(r"@import|url\(|<script|<link|<iframe", finished.page)


def test_the_page_shows_all_figures_in_light_and_dark(finished: Finished) -> None:
    assert finished.page.count("data:image/svg+xml") == 8
    assert finished.page.count("prefers-color-scheme: dark") == 5  # the style's, and one for each figure


def test_the_report_holds_what_was_recorded(finished: Finished) -> None:
    for name, arm in finished.result.arms.items():
        written = finished.report["arms"][name]
        assert written["measurements"] == [asdict(measurement) for measurement in arm.measurements]
        assert written["token_losses"] == arm.token_losses
        assert written["step_seconds"] == arm.step_seconds
        assert finished.report["cosines"][name] == finished.result.cosines[name]
    for measure, found in finished.result.crossings.items():
        assert finished.report["crossings"][measure] == asdict(found) | {"sentence": found.sentence()}
    assert finished.report["settings"] == asdict(finished.settings)
    assert finished.report["versions"]["torch"] == torch.__version__
    assert finished.report["hardware"]["cores"] >= 1


def test_what_is_measured_is_what_the_saved_model_has(finished: Finished) -> None:
    held_out = finished.result.held_out
    for name, arm in finished.result.arms.items():
        again = held_out.likelihood(decausal.load(finished.directory / name).model)
        assert again.masked_cross_entropy == pytest.approx(arm.measurements[-1].masked_cross_entropy, rel=1e-5)
        assert again.nelbo_per_token == pytest.approx(arm.measurements[-1].nelbo_per_token, rel=1e-5)


def test_runs_are_measured_before_the_first_step_every_so_many_and_after_the_last(finished: Finished) -> None:
    for arm in finished.result.arms.values():
        assert [measurement.step for measurement in arm.measurements] == [0, 2, 4, 5]
        assert len(arm.token_losses) == len(arm.step_seconds) == 5


def test_both_runs_start_from_the_same_model_on_the_same_masked_rows(finished: Finished) -> None:
    plain, aligned = (finished.result.arms[name] for name in ("plain", "aligned"))
    assert plain.token_losses[0] == aligned.token_losses[0]
    assert plain.token_losses[-1] != aligned.token_losses[-1]
    assert plain.measurements[0] == aligned.measurements[0]


def test_both_runs_differ_in_the_alignment_alone(finished: Finished) -> None:
    plain, aligned = (finished.report["arms"][name]["recipe"] for name in ("plain", "aligned"))
    differing = {name for name in plain if plain[name] != aligned[name]}
    assert differing == {"align_weight", "output_dir"}
    assert plain["align_weight"] == 0


def test_training_time_counts_the_steps_and_not_the_measuring(finished: Finished) -> None:
    for arm in finished.result.arms.values():
        seconds = [measurement.seconds for measurement in arm.measurements]
        assert seconds == sorted(seconds)
        assert seconds[0] == 0
        assert sum(arm.step_seconds) == pytest.approx(seconds[-1], abs=0.05)


def test_alignment_keeps_hidden_states_nearer_to_the_ar_model(finished: Finished) -> None:
    cosines = finished.result.cosines
    assert len(cosines["before"]) == 3
    assert sum(cosines["aligned"]) > sum(cosines["plain"])


def test_what_is_printed_says_how_both_fell_and_what_came_of_it(finished: Finished) -> None:
    assert "\x1b" not in finished.printed
    for arm in finished.result.arms.values():
        for measurement in arm.measurements:
            assert f"masked cross-entropy {measurement.masked_cross_entropy:.4f}" in finished.printed
    flowing = " ".join(finished.printed.split())
    for found in finished.result.crossings.values():
        assert found.sentence() in flowing
    gap = finished.result.gap
    assert gap is not None
    written = "".join(finished.result.fillings["aligned"].pieces)
    assert strip_control_codes(written) in finished.printed  # the console keeps bells and form feeds from terminals


def test_every_filled_token_has_the_step_in_which_it_was_kept(finished: Finished) -> None:
    for filling in finished.result.fillings.values():
        assert len(filling.pieces) == len(filling.step_of_piece) == finished.result.gap.num_tokens
        assert set(filling.step_of_piece) == set(range(filling.num_forwards))


def test_the_commands_it_prints_work(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    for command in finished.result.commands():
        assert command in finished.printed
        program, *arguments = shlex.split(command)
        assert program == "decausal"
        if "--max_new_tokens" in arguments:
            arguments[arguments.index("--max_new_tokens") + 1] = "4"
        if arguments[0] == "eval":
            arguments += ["--max_length", "32", "--num_rows", "2", "--samples_per_row", "1"]
        assert main(arguments) == 0, capsys.readouterr().err
        capsys.readouterr()


def test_the_command_for_a_real_model_is_one_that_compare_understands(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = finished.result.command_for_real_model()
    assert command in finished.printed
    program, verb, _, *arguments = shlex.split(command)
    assert (program, verb) == ("decausal", "compare")
    arguments[arguments.index("--output_dir") + 1] = str(tmp_path / "compared")
    assert main([verb, str(tmp_path / "nowhere"), *arguments]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_second_demo_in_the_same_place_replaces_the_first_and_no_file_of_others(
    finished: Finished, tmp_path: Path
) -> None:
    output_dir = tmp_path / "again"
    shutil.copytree(finished.directory, output_dir)
    (output_dir / "notes.txt").write_text("mine")
    second = Finished(replace(finished.settings, output_dir=str(output_dir), max_steps=2))
    assert (output_dir / "notes.txt").read_text() == "mine"
    assert second.report["settings"]["max_steps"] == 2
    assert decausal.load(output_dir / "aligned").facts.recipe["max_steps"] == 2


def test_bad_input_costs_nobody_an_earlier_demo(finished: Finished) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.directory.rglob("*")}
    for name, value in (("data", "no/such/file.txt"), ("model_name_or_path", "no/such/model"), ("max_length", 10_000)):
        with pytest.raises(UserError, match=str(value)):
            run_demo(replace(finished.settings, **{name: value}), Console(file=io.StringIO()))
    assert {path: path.stat().st_mtime_ns for path in finished.directory.rglob("*")} == before


@pytest.mark.parametrize("flag", ["--max_steps=0", "--eval_every=0", "--data_fraction=0", "--align_weight=0"])
def test_a_setting_out_of_range_is_refused_in_one_line_and_leaves_nothing(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--output_dir", str(tmp_path / "demo"), flag]) == 2
    assert flag.partition("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
