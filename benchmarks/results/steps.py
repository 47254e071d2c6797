"""Steps of a result: command lines whose outputs are kept, so that a killed or bounded call goes on where it was."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decausal.files import write_whole
from decausal.report.sources import find
from decausal.report.write import write_report


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        arguments: What stands after `decausal`, or after `python` if it begins with a script.
        done: The file that is there once it has ended well; one that ends with .done is made then.
        resumes: The directory of a run of training, which is continued if it is there.
    """

    arguments: list[str]
    done: Path
    resumes: Path | None = None

    def command(self) -> list[str]:
        """Returns the command line, which continues what an earlier call began."""
        if self.arguments[0].endswith(".py"):
            return [sys.executable, *self.arguments]
        resume = ["--resume_from_checkpoint", "true"] if self.resumes is not None and self.resumes.exists() else []
        return [sys.executable, "-m", "decausal", *self.arguments, *resume]


@dataclass
class Clock:
    """How long this call may take."""

    minutes: float | None
    start: float = field(default_factory=time.monotonic)

    def seconds_left(self) -> float | None:
        """Returns the seconds that are left; None: any number."""
        return None if self.minutes is None else max(0.0, 60 * self.minutes - (time.monotonic() - self.start))


def run_steps(steps: Sequence[Step], minutes: float | None) -> bool:
    """Runs what is not done yet, one after another. Returns whether everything is done.

    Args:
        steps: The steps, in their order.
        minutes: The longest that this call may take; what runs then is ended, and continued by the next call.

    Raises:
        SystemExit: A step failed, whose own message stands above.
    """
    clock = Clock(minutes)
    for number, step in enumerate(steps, 1):
        if step.done.exists():
            continue
        left = clock.seconds_left()
        if left == 0.0:
            break
        command = step.command()
        print(f"[{number} of {len(steps)}] {' '.join(command[1:])}", flush=True)
        step.done.parent.mkdir(parents=True, exist_ok=True)
        try:
            ended = subprocess.run(command, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            break
        if not ended.returncode and step.done.suffix == ".done":
            step.done.touch()
        if ended.returncode or not step.done.exists():
            raise SystemExit(f"step {number} failed with code {ended.returncode}: {' '.join(command)}")
    num_left = sum(not step.done.exists() for step in steps)
    if num_left:
        print(f"{num_left} of {len(steps)} steps are left: the same command goes on")
    return not num_left


def run_or_print(steps: Sequence[Step], flags: argparse.Namespace) -> bool:
    """Runs what is not done yet, or prints the commands with `--plan`. Returns whether everything is done."""
    if flags.plan:
        print("\n".join(" ".join(step.command()[1:]) for step in steps))
        return False
    return run_steps(steps, flags.minutes)


def publish(work: Path, name: str, title: str, figures: Any, table: str, shown: Sequence[Path]) -> None:
    """Writes a result as JSON and Markdown, and a page of its runs and evaluations, and prints the table.

    Args:
        work: Where to.
        name: Of the two files.
        title: Of the page.
        figures: For JSON.
        table: The Markdown.
        shown: Directories of runs and evaluations; without any there is no page.
    """
    write_whole(work / f"{name}.json", json.dumps(figures, indent=2) + "\n")
    write_whole(work / f"{name}.md", table)
    if shown:
        write_report(find(list(shown)), work / "report.html", title)
    print(table)


def runs_of(steps: Sequence[Step]) -> list[Path]:
    """Returns the directories of the runs of training."""
    return [step.resumes for step in steps if step.resumes is not None]


def conversion(
    flags: argparse.Namespace, output_dir: Path, recipe: str, data: Path | str, max_steps: int, seed: int, *own: str
) -> Step:
    """Returns a run of training. Its checkpoints are kept sparse: only the last one."""
    arguments = ["convert", flags.model, "--recipe", recipe, "--data", str(data), "--output_dir", str(output_dir)]
    arguments += ["--max_steps", str(max_steps), "--seed", str(seed), "--bf16", flags.bf16, "--logging_steps", "4"]
    arguments += ["--save_steps", str(max(1, max_steps // 5)), "--save_total_limit", "1", *own]
    return Step(arguments, output_dir / "decausal.json", output_dir)


def evaluation(output: Path, *arguments: str) -> Step:
    """Returns an evaluation whose record is kept."""
    return Step([*arguments, "--output", str(output)], output)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the flags that all results have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", help="an AR model: a directory or hub id")
    made.add_argument("--data", required=True, type=Path, help="the directory of data files, see local_tasks.py")
    made.add_argument("--work", required=True, type=Path, help="where runs, records and the table are kept")
    made.add_argument("--minutes", type=float, help="end this call after so many; the same command goes on")
    made.add_argument("--limit", type=int, help="examples of each task, held-out rows and prompts, for a short look")
    made.add_argument("--steps", type=int, help="training steps of each run, for a short look")
    made.add_argument("--seeds", type=numbers, default=(0,), help="seeds of the runs, with commas (0)")
    made.add_argument(
        "--bf16", choices=("true", "false"), default="true", help="false: for processors without bf16 products (true)"
    )
    made.add_argument("--plan", action="store_true", help="print the commands, and run nothing")
    return made


def numbers(text: str) -> tuple[int, ...]:
    """Reads whole numbers with commas."""
    return tuple(int(part) for part in text.split(","))


def decimals(text: str) -> tuple[float, ...]:
    """Reads numbers with commas."""
    return tuple(float(part) for part in text.split(","))


def limited(flags: argparse.Namespace, name: str, otherwise: int) -> list[str]:
    """Returns a flag with the limit of this call, or with a number of its own."""
    return [name, str(flags.limit or otherwise)]
