"""Whole comparisons on a tiny random model: two arms, two seeds, a few steps; killed and continued."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import decausal
from decausal.cli import main
from decausal.compare.arms import read_arms
from decausal.compare.budget_callback import Event
from decausal.compare.records import MEASUREMENTS
from decausal.compare.run import run_compare
from decausal.compare.settings import CompareSettings
from decausal.compare.view import ComparisonView
from decausal.data.rows import load_rows
from decausal.errors import UserError
from tests.families import FAMILIES, tiny_tokenizer

CONTEXT = 128
SECRET = "canary7f3ab2notsecretlooking"
SHARED = {"max_length": "64", "per_device_train_batch_size": "2", "hub_token": SECRET}
OVERRIDES = ("aligned.align_weight=2",)


class Compared:
    """A comparison that has run, and what it left and printed."""

    def __init__(self, settings: CompareSettings, shared: dict[str, str] | None = None) -> None:
        console = Console(file=io.StringIO(), width=100)
        arms = read_arms(settings.recipes, OVERRIDES, SHARED | (shared or {}))
        self.found = run_compare(settings, arms, console, "decausal compare")
        self.printed: str = console.file.getvalue()
        self.directory = Path(settings.output_dir)
        self.report: dict[str, Any] = json.loads((self.directory / "report.json").read_text())

    def page(self) -> str:
        return (self.directory / "report.md").read_text()

    def figures(self) -> list[Any]:
        """All that was measured, without times."""
        return [
            [run["arm"], run["seed"], run["final"], [found | {"seconds": 0} for found in run["measurements"]]]
            for run in self.report["runs"]
        ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model; rows are cached there too."""
    folder = tmp_path_factory.mktemp("compare")
    FAMILIES["qwen3"](max_position_embeddings=CONTEXT).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("decausal.data.rows.HF_HOME", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def settings(folder: Path) -> CompareSettings:
    return CompareSettings(
        output_dir=str(folder / "compared"),
        model_name_or_path=str(folder / "model"),
        recipes="mdm,aligned=repr-align",
        seeds=(0, 1),
        data="tasks:brackets:40@{seed}",
        eval_data="tasks-heldout:brackets",
        max_steps=4,
        eval_at=(0.5,),
        eval_prompts=3,
        final_prompts=4,
        thresholds=(1.0, 0.01),
        max_new_tokens=4,
        num_workers=1,
    )


@pytest.fixture(scope="module")
def compared(settings: CompareSettings) -> Compared:
    return Compared(settings)


def test_every_arm_and_seed_is_a_converted_model_beside_the_report(compared: Compared) -> None:
    names = {path.name for path in compared.directory.iterdir()}
    runs = {f"{arm}-seed{seed}" for arm in ("mdm", "aligned") for seed in (0, 1)}
    assert names == runs | {"report.json", "report.md", "report.png", "run.yaml"}
    assert (compared.directory / "report.png").read_bytes().startswith(b"\x89PNG")
    for name in runs:
        assert not list((compared.directory / name).glob("checkpoint-*"))
        assert decausal.load(compared.directory / name).facts.recipe["max_steps"] == 4


def test_no_file_holds_a_secret(compared: Compared) -> None:
    files = [path for path in compared.directory.rglob("*") if path.is_file()]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_runs_are_measured_at_the_start_at_shares_of_the_budget_and_at_the_end(compared: Compared) -> None:
    for run in compared.report["runs"]:
        assert [found["step"] for found in run["measurements"]] == [0, 2, 4]
        assert [found["progress"] for found in run["measurements"]] == [0, 0.5, 1]
        assert [[score["threshold"] for score in found["scores"]] for found in run["measurements"]] == [[1, 0.9]] * 3
        assert [score["threshold"] for score in run["final"]] == [1, 0.01]
        assert [len(score["right"]) for score in run["final"]] == [4, 4]


def test_the_static_schedule_keeps_one_token_per_forward_and_a_low_threshold_all(compared: Compared) -> None:
    for run in compared.report["runs"]:
        static, bold = run["final"]
        assert static["tokens_per_forward"] == 1
        assert bold["tokens_per_forward"] > 1


def test_arms_of_one_seed_differ_in_their_recipe_alone(compared: Compared) -> None:
    runs = {(run["arm"], run["seed"]): run for run in compared.report["runs"]}
    for seed in (0, 1):
        plain, aligned = runs["mdm", seed], runs["aligned", seed]
        differing = {name for name in plain["settings"] if plain["settings"][name] != aligned["settings"].get(name)}
        assert differing == {"align_weight", "align_schedule", "output_dir"}
        assert [found["tokens"] for found in plain["measurements"]] == [
            found["tokens"] for found in aligned["measurements"]
        ]
        assert plain["measurements"][0]["scores"] == aligned["measurements"][0]["scores"]
    assert runs["mdm", 0]["settings"]["data"] == "tasks:brackets:40@0"
    assert runs["mdm", 1]["settings"]["data"] == "tasks:brackets:40@1"


def test_an_epoch_trains_on_the_datas_tokens_and_half_of_what_may_be_masked(
    settings: CompareSettings, tmp_path: Path
) -> None:
    rows = load_rows("tasks:brackets:40@0", tiny_tokenizer(), 64)
    num_maskable = sum(int(rows[index]["is_maskable"].sum()) for index in range(len(rows)))
    changed = replace(settings, output_dir=str(tmp_path), recipes="mdm", seeds=(0,), max_steps=len(rows))
    console = Console(file=io.StringIO())
    shared = SHARED | {"per_device_train_batch_size": "1"}
    found = run_compare(changed, read_arms("mdm", (), shared), console)
    tokens = found.results[0].measurements[-1].tokens
    assert tokens.clean == tokens.total == rows.num_tokens
    assert tokens.generated == 0
    assert tokens.supervised == pytest.approx(num_maskable / 2, rel=0.25)


def test_what_is_printed_and_written_says_what_was_found(compared: Compared) -> None:
    assert "\x1b" not in compared.printed
    flowing, page = " ".join(compared.printed.split()), (compared.directory / "report.md").read_text()
    for sentence in compared.found.sentences():
        assert sentence in flowing
        assert sentence in page
    assert "| AR model |" in page
    assert compared.report["ar"]["final"]["quality"] == compared.found.ar.quality
    assert compared.report["hardware"]["cores"] >= 1


def test_a_second_comparison_trains_nothing_again_and_finds_the_same(
    compared: Compared, settings: CompareSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decausal.compare.training.convert", lambda *_, **__: pytest.fail("trained again"))
    again = Compared(settings)
    assert again.figures() == compared.figures()


def test_another_threshold_is_measured_without_training(
    compared: Compared, settings: CompareSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decausal.compare.training.convert", lambda *_, **__: pytest.fail("trained again"))
    again = Compared(replace(settings, thresholds=(1.0, 0.5)))
    for before, now in zip(compared.report["runs"], again.report["runs"], strict=True):
        assert now["final"][0] == before["final"][0]
        assert now["final"][1]["threshold"] == 0.5


def test_block_arms_are_also_measured_by_self_speculation_of_which_finished_runs_need_no_training(
    settings: CompareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"any_facts": True, "seeds": (0,), "max_steps": 2, "output_dir": str(tmp_path)}
    changed = replace(settings, recipes="mdm,aligned=bd3lm", thresholds=(1.0,), **shared)
    without = Compared(replace(changed, speculative=False))
    monkeypatch.setattr("decausal.compare.training.convert", lambda *_, **__: pytest.fail("trained again"))
    found = Compared(changed)
    for before, now in zip(without.report["runs"], found.report["runs"], strict=True):
        assert now["final"][: len(before["final"])] == before["final"]
    whole_rows, blocks = ([score["threshold"] for score in run["final"]] for run in found.report["runs"])
    assert (whole_rows, blocks) == ([1.0], [1.0, "speculative"])
    (lost,) = found.report["parallel_losses"]
    assert (lost["arm"], lost["threshold"]) == ("aligned", "speculative")
    assert "to self-speculation, at " in found.printed
    cells = {
        line.split("|")[1].strip(): line.split("|")[-2].strip() for line in found.page().splitlines() if "|" in line
    }
    assert cells["arm"] == "speculative"
    assert cells["mdm"] == ""
    assert cells["aligned"].endswith("/fwd)")


def test_arms_that_only_draft_are_measured_by_verified_decoding(settings: CompareSettings, tmp_path: Path) -> None:
    changed = replace(settings, recipes="aligned=bd3lm,lossless,introspective", any_facts=True, seeds=(0,), max_steps=2)
    console = Console(file=io.StringIO(), width=100)
    changed = replace(changed, output_dir=str(tmp_path))
    arms = read_arms(changed.recipes, ("lossless.lora_r=2",), SHARED)
    run_compare(changed, arms, console, "decausal compare")
    report = json.loads((tmp_path / "report.json").read_text())
    by_arm = {run["arm"]: run["final"] for run in report["runs"]}
    assert [score["threshold"] for score in by_arm["introspective"]] == ["speculative"]
    assert [score["threshold"] for score in by_arm["lossless"]] == ["speculative"]
    assert all(1 <= score["tokens_per_forward"] <= 4 for score in by_arm["introspective"] + by_arm["lossless"])


def test_a_comparison_killed_again_and_again_goes_on_to_the_same_figures(
    compared: Compared, settings: CompareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = replace(settings, output_dir=str(tmp_path), seeds=(0,))
    on_event = ComparisonView.on_event
    for run, step in (("mdm-seed0", 1), ("mdm-seed0", 3), ("aligned-seed0", 3)):  # after a checkpoint, too

        def killing(view: ComparisonView, event: Event, run: str = run, step: int = step) -> None:
            if (event.run, event.kind, event.step) == (run, "stepped", step):
                raise KeyboardInterrupt
            on_event(view, event)

        with monkeypatch.context() as patch:
            patch.setattr(ComparisonView, "on_event", killing)
            with pytest.raises(KeyboardInterrupt):
                Compared(changed)
    assert Compared(changed).figures() == [run for run in compared.figures() if run[1] == 0]


def test_runs_in_processes_of_their_own_tell_and_return_the_same(compared: Compared, settings: CompareSettings) -> None:
    again = Compared(replace(settings, seeds=(0,), num_workers=2))
    assert again.figures() == [run for run in compared.figures() if run[1] == 0]
    assert all(f"{run}-seed0" in again.printed for run in ("mdm", "aligned"))


def test_a_measurement_cut_short_on_disk_does_not_count(
    compared: Compared, settings: CompareSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decausal.compare.training.convert", lambda *_, **__: pytest.fail("trained again"))
    with (compared.directory / "mdm-seed0" / MEASUREMENTS).open("a") as file:
        file.write('{"step": 6, "progr')
    assert Compared(settings).figures() == compared.figures()


@pytest.mark.parametrize(
    ("changes", "shared", "named"),
    [
        ({}, {"learning_rate": "0.5"}, "learning_rate"),
        ({"eval_prompts": 2}, {}, "prompts"),
    ],
)
def test_other_settings_in_the_same_place_are_refused_and_cost_nothing(
    changes: dict[str, Any], shared: dict[str, str], named: str, compared: Compared, settings: CompareSettings
) -> None:
    before = {path: path.stat().st_mtime_ns for path in compared.directory.rglob("*")}
    with pytest.raises(UserError, match=rf"mdm-seed0 holds a run with .*{named}.*--overwrite"):
        Compared(replace(settings, **changes), shared)
    assert {path: path.stat().st_mtime_ns for path in compared.directory.rglob("*")} == before


def test_a_directory_of_another_verb_is_refused(settings: CompareSettings, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("verb: demo\n")
    with pytest.raises(UserError, match="another verb"):
        Compared(replace(settings, output_dir=str(tmp_path)))


def test_text_is_compared_by_nelbo_and_the_budget_ends_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train.txt").write_text("the rain in spain stays on the hat\n" * 200)
    flags = f"""compare {folder / "model"} --recipes mdm --seeds 0 --output_dir {folder / "nll"} --json --eval nll
        --data {folder / "train.txt"} --eval_data {folder / "train.txt"} --budget_tokens 300 --max_length 32
        --eval_rows 2 --eval_samples 1 --num_workers 1 --per_device_train_batch_size 2 --eval_at 0.5"""
    assert main(flags.split()) == 0, capsys.readouterr().err
    report = json.loads(capsys.readouterr().out)
    (run,) = report["runs"]
    assert [found["tokens"]["clean"] for found in run["measurements"]] == [0, 192, 320]  # 64 tokens a step
    assert run["settings"]["max_steps"] == 5
    assert report["arms"][0]["final"][0]["quality"]["mean"] == run["measurements"][-1]["scores"][0]["quality"]
    assert not report["quality"]["higher_is_better"]
    page = (folder / "nll" / "report.md").read_text()
    assert "| AR model (exact likelihood) |" in page
    assert re.search(r"mdm ends with NELBO [\d.]+, [\d.]+% of the AR model's exact likelihood\.", page)


def test_tasks_need_a_tokenizer_that_reads_them(folder: Path, settings: CompareSettings, tmp_path: Path) -> None:
    lossy = tiny_tokenizer()
    lossy.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    FAMILIES["qwen3"](max_position_embeddings=CONTEXT).save_pretrained(tmp_path / "model")
    lossy.save_pretrained(tmp_path / "model")
    words = replace(settings, eval_data="tasks-heldout:words", model_name_or_path=str(tmp_path / "model"))
    with pytest.raises(UserError, match="reads the tasks' characters"):
        Compared(replace(words, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_what_rollouts_write_is_counted_apart(settings: CompareSettings, tmp_path: Path) -> None:
    changed = replace(settings, output_dir=str(tmp_path), recipes="corpus=bd3lm,opdlm", seeds=(0,))
    rollouts = {"rollout_prompts": 4, "rollout_updates": 2, "rollout_tokens": 6, "rollout_tokens_start": 6}
    alike = SHARED | {"causal_context": "true", "shift": "1"}
    arms = read_arms(changed.recipes, [f"opdlm.{name}={value}" for name, value in rollouts.items()], alike)
    corpus, on_policy = run_compare(changed, arms, Console(file=io.StringIO())).results
    assert corpus.measurements[-1].tokens.generated == 0
    for before, now in pairwise(on_policy.measurements):
        assert now.tokens.supervised > before.tokens.supervised
        assert now.tokens.clean > before.tokens.clean
    num_rollouts = 4 * 2 // 2  # rows of all steps, each rollout trained on twice
    tokens = on_policy.measurements[-1].tokens
    assert num_rollouts <= tokens.generated <= num_rollouts * (6 + 4)
    assert tokens.total == tokens.clean + tokens.generated
