"""One command for a new GPU: fills in every figure that this project owes, stage by stage, and can be run again.

    python -m pytest -m gpu && python benchmarks/first_hour.py --output_dir first-hour

Each stage is one of the benchmarks beside this file, in a process of its own and with a limit of time; together the
limits are under 25 minutes. A stage whose file is there is not run again; one that fails or takes too long is reported,
and the others go on. The summary is in OUTPUT_DIR/summary.md.
"""

from __future__ import annotations

import argparse
import json
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
MINUTES = 25


@dataclass(frozen=True)
class Stage:
    """One measurement.

    Attributes:
        name: What its file is called.
        script: The benchmark.
        arguments: At full size.
        tiny: At a size for a CPU, to see that it runs.
        seconds: What it may take at full size.
        owes: What it fills in.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    tiny: tuple[str, ...]
    seconds: int
    owes: str


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TINY_STEP = _words("--rows 2 --length 32 --rounds 1")
STAGES = (
    Stage(
        "steps",
        "kinds_step.py",
        _words("--rows 4 --length 4096 --rounds 5"),
        (*TINY_STEP, "--kinds", "plain", "aligned, 2 views", "block"),
        300,
        "utilisation of plain denoising (45 %), block training over its floor (1.15), memory at 4 x 4096 (80 GiB)",
    ),
    Stage(
        "steps-compiled",
        "kinds_step.py",
        (
            "--rows",
            "4",
            "--length",
            "4096",
            "--rounds",
            "5",
            "--compile_layers",
            "--kinds",
            "plain",
            "aligned",
            "block",
        ),
        (*TINY_STEP, "--kinds", "plain"),
        300,
        "the same with compiled layers",
    ),
    Stage(
        "train",
        "train_step.py",
        _words("--batch_size 8 --length 1024 --steps 6"),
        _words("--batch_size 2 --length 32 --steps 1 --cases plain aligned"),
        240,
        "REPR-ALIGN over plain (1.30, two views 1.18), memory (1.15), waits of the host, memory of the loss",
    ),
    Stage(
        "on-policy",
        "opd_step.py",
        _words("--rounds 4 --prompts 16 --new_tokens 128"),
        _words("--rounds 1 --prompts 2 --prompt_length 8 --new_tokens 8"),
        180,
        "an on-policy step: rollout, teacher, student",
    ),
    Stage(
        "decode",
        "decode.py",
        _words("--batch_sizes 1 8 32 --rounds 3 --new_tokens 64"),
        _words("--batch_sizes 1 --rounds 1 --prompt_length 8 --new_tokens 8"),
        270,
        "tokens per second at batch 1, 8 and 32 with and without CUDA graphs, beside transformers",
    ),
    Stage(
        "serve",
        "serve.py",
        _words("--concurrency 1,16,64 --seconds 15"),
        (),
        180,
        "requests per second and time to the first token",
    ),
)


def stage_arguments(stage: Stage, output: Path, args: argparse.Namespace) -> list[str]:
    """The command line of a stage."""
    chosen = stage.tiny if args.tiny else stage.arguments
    model = ["--model", args.model] if args.model and stage.script != "serve.py" else []
    device = [] if stage.script == "serve.py" else ["--device", args.device]
    return [*chosen, *model, *device, "--json", str(output)]


def run_stage(stage: Stage, output: Path, args: argparse.Namespace) -> str | None:
    """Runs a stage; returns why it gave no figures, or None. Its file appears whole or not at all."""
    partial = output.with_suffix(".part")
    arguments = stage_arguments(stage, partial, args)
    try:
        if args.tiny:
            _in_this_process(HERE / stage.script, arguments)
        else:
            command = [sys.executable, str(HERE / stage.script), *arguments]
            subprocess.run(command, check=True, timeout=stage.seconds, cwd=args.output_dir)
    except subprocess.TimeoutExpired:
        return f"took longer than {stage.seconds} s"
    except subprocess.CalledProcessError as error:
        return f"ended with code {error.returncode}"
    except (Exception, SystemExit) as error:  # whatever a benchmark meets: the next one may not
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    if not partial.is_file():
        return "wrote no figures"
    partial.replace(output)
    return None


def _in_this_process(script: Path, arguments: Sequence[str]) -> None:
    with _command_line([str(script), *arguments]):
        runpy.run_path(str(script), run_name="__main__")


@contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    before, path = sys.argv, list(sys.path)
    sys.argv = arguments
    sys.path.insert(0, str(HERE))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before, path


def summary(directory: Path, failures: dict[str, str]) -> str:
    """What is there and what is missing, with every number that the stages' files hold."""
    lines = ["# The first hour", ""]
    for stage in STAGES:
        file = directory / f"{stage.name}.json"
        lines += [f"## {stage.name}: {stage.owes}", ""]
        if not file.is_file():
            lines += [f"**Missing**: {failures.get(stage.name, 'not run yet')}", ""]
            continue
        found = json.loads(file.read_text())
        lines += [
            f"{key}: {found[key]}  " for key in ("hardware", "versions", "commit", "command", "date") if key in found
        ]
        lines += ["", "| figure | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in _numbers(found)]
        lines.append("")
    return "\n".join(lines)


def _numbers(tree: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """All single numbers in nested records; lists, which are single timings, are left to the files."""
    if isinstance(tree, dict):
        for name, part in tree.items():
            if name not in ("hardware", "versions", "commit", "command", "date"):
                yield from _numbers(part, f"{path} / {name}" if path else str(name))
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield path, float(tree)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("first-hour"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", help="a shape or a directory; none: each benchmark's own for the device")
    parser.add_argument("--stages", nargs="+", choices=[stage.name for stage in STAGES], help="only these")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU: shows that all of it runs, no figures")
    args = parser.parse_args()
    if args.device == "cpu" and not args.tiny:
        parser.error("there is no GPU here: give --tiny to see that the stages run")
    args.output_dir = args.output_dir.resolve()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    for stage in STAGES:
        output = args.output_dir / f"{stage.name}.json"
        is_wanted = args.stages is None or stage.name in args.stages
        if not is_wanted or output.is_file() or (args.tiny and not stage.tiny):
            continue
        print(f"== {stage.name}: {stage.owes}", flush=True)
        start = time.perf_counter()
        reason = run_stage(stage, output, args)
        if reason is not None:
            failures[stage.name] = reason
        print(f"== {stage.name}: {reason or 'done'} after {time.perf_counter() - start:.0f} s", flush=True)
    (args.output_dir / "summary.md").write_text(summary(args.output_dir, failures) + "\n")
    print(f"the summary is in {args.output_dir / 'summary.md'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
