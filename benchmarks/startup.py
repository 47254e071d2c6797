"""How long commands take until they have done something: an answer, a first token, a first training step.

Each is a process of its own, from its start to the line of output that shows it. Beside them stands what plain PyTorch
and transformers need for the same: imports, a model read and run once, a training step of transformers' own Trainer.
Commands take turns. Ratios are medians over rounds of seconds over those of the plain program in the same round.

    taskset -c 0,1 python benchmarks/startup.py HuggingFaceTB/SmolLM2-135M-Instruct     # a directory, too

Seconds tell something on an idle machine only; processor seconds (of all threads) tell it nearly on a busy one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from decausal.provenance import provenance

PROMPT = "The capital of France is"
IMPORTS = "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
READ = """
import sys
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
"""
RUN = """
with torch.no_grad():
    print("token", model(**tokenizer(sys.argv[2], return_tensors="pt")).logits[0, -1].argmax())
"""
TRAIN = """
from transformers import Trainer, TrainingArguments
ids = tokenizer(sys.argv[2] * 30)["input_ids"][:128]
args = TrainingArguments(sys.argv[3], max_steps=1, per_device_train_batch_size=1, save_strategy="no", report_to="none",
    logging_steps=1, use_cpu=True, disable_tqdm=True)
Trainer(model, args, train_dataset=[{"input_ids": ids, "labels": ids}]).train()
"""


@dataclass(frozen=True)
class Command:
    """A command to be timed.

    Attributes:
        arguments: of the Python interpreter.
        until: the text that it writes when it has done what is timed; None: until it ends.
        floor: the plain program that does the same, by name.
        target: seconds that it may take on two idle cores.
        directory: where it runs: in another checkout it runs that one's code.
        removed: what it wrote when it was timed before, which is removed first.
    """

    arguments: tuple[str, ...]
    until: str | None = None
    floor: str | None = None
    target: float | None = None
    directory: str | None = None
    removed: Path | None = None


@dataclass(frozen=True)
class Seconds:
    """What one start took."""

    wall: float
    processor: float


def seconds_until(command: Command) -> Seconds:
    """Starts a command, and ends it as soon as it has written what is waited for.

    Raises:
        RuntimeError: it ended without.
    """
    if command.removed is not None:
        shutil.rmtree(command.removed, ignore_errors=True)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-u", *command.arguments],
        cwd=command.directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    written, wall = "", None
    with process:
        for line in process.stdout:
            written += line
            if command.until is not None and command.until in line:
                wall = time.perf_counter() - start
                process.kill()
                break
    if wall is None and command.until is not None:
        raise RuntimeError(f"{command.arguments} did not write '{command.until}':\n{written}")
    wall = wall or time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Seconds(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def commands(model: str, converted: Path, scratch: Path, recipe: str) -> dict[str, Command]:
    """Returns what is timed by name, plain programs first."""
    text = scratch / "text.txt"
    text.write_text(f"{PROMPT} Paris.\n" * 300, encoding="utf-8")
    out = str(scratch / "run")
    read, train = IMPORTS + READ + RUN, IMPORTS + READ + TRAIN
    ours = ("-m", "decausal")
    convert = (*ours, "convert", model, "--recipe", recipe, "--data", str(text), "--output_dir", out)
    convert += ("--max_length", "128", "--max_steps", "1", "--per_device_train_batch_size", "1", "--logging_steps", "1")
    generate = (*ours, "generate", str(converted), PROMPT, "--max_new_tokens", "1")
    return {
        "import torch": Command(("-c", "import torch")),
        "import transformers' models too": Command(("-c", IMPORTS)),
        "read a model and run it once": Command(("-c", read, model, PROMPT), until="token"),
        "read a model and train it once": Command(("-c", train, model, PROMPT, f"{out}-plain"), until="'loss'"),
        "decausal convert --help": Command((*ours, "convert", "--help"), target=1),
        "decausal convert --print_config": Command((*ours, "convert", model, "--print_config"), target=1),
        "decausal convert, unknown flag": Command((*ours, "convert", model, "--lerning_rate", "1"), target=1),
        "decausal generate, wrong path": Command((*ours, "generate", "./nowhere", PROMPT), target=1),
        "decausal convert, missing data": Command((*convert, "--data", "nowhere.txt"), target=1),
        "decausal compare, wrong path": Command((*ours, "compare", "./nowhere"), target=1),
        "decausal generate, first token": Command(generate, PROMPT, "read a model and run it once", target=5),
        "decausal convert, first step": Command(
            convert, "step 1/1", "read a model and train it once", target=5, removed=Path(out)
        ),
    }


def convert_untrained(model: str, directory: Path) -> None:
    """Writes what `decausal generate` takes: the model with a mask token, not trained."""
    from decausal.models.adapt import adapt, load_source, source_dtype
    from decausal.models.checkpoint import save_converted
    from decausal.models.facts import ConversionFacts

    source, tokenizer = load_source(model)
    facts = ConversionFacts(model, "bidirectional", 1, adapt(source, tokenizer))
    save_converted(directory, source, tokenizer, facts, dtype=source_dtype(model))


def measured(named: dict[str, Command], num_rounds: int) -> dict[str, list[Seconds]]:
    """Starts every command in every round, in a new order each time."""
    found: dict[str, list[Seconds]] = {name: [] for name in named}
    draw = random.Random(0)
    for _ in range(num_rounds):
        for name in draw.sample(list(named), len(named)):
            found[name].append(seconds_until(named[name]))
    return found


def summary(named: dict[str, Command], found: dict[str, list[Seconds]]) -> dict[str, dict[str, float | None]]:
    """Returns the least seconds of each command, and how many times those of the plain program it took."""
    figures: dict[str, dict[str, float | None]] = {}
    for name, command in named.items():
        floor = found.get(command.floor or "")
        quotients = [ours.processor / plain.processor for ours, plain in zip(found[name], floor or (), strict=False)]
        figures[name] = {
            "seconds": min(one.wall for one in found[name]),
            "processor_seconds": min(one.processor for one in found[name]),
            "ratio": statistics.median(quotients) if quotients else None,
            "target_seconds": command.target,
        }
    return figures


def as_table(figures: dict[str, dict[str, float | None]], title: str) -> Table:
    """Returns the figures for a terminal."""
    table = Table("until", title=title, title_justify="left")
    for heading in ("seconds", "target", "processor seconds", "over plain"):
        table.add_column(heading, justify="right")
    for name, figure in figures.items():
        target = "" if figure["target_seconds"] is None else f"{figure['target_seconds']:g}"
        ratio = "" if figure["ratio"] is None else f"{figure['ratio']:.2f}"
        table.add_row(name, f"{figure['seconds']:.2f}", target, f"{figure['processor_seconds']:.2f}", ratio)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny", help="an AR model (tiny)")
    parser.add_argument("--recipe", default="repr-align", help="of the conversion (repr-align)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", metavar="CHECKOUT", help="time the commands of another checkout, too")
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        converted = Path(scratch, "converted")
        convert_untrained(flags.model, converted)
        named = commands(flags.model, converted, Path(scratch), flags.recipe)
        if flags.against is not None:
            ours = [(name, command) for name, command in named.items() if name.startswith("decausal")]
            named |= {f"{name}, before": replace(command, directory=flags.against) for name, command in ours}
        before = os.getloadavg()[0]
        figures = summary(named, measured(named, flags.rounds))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    title = f"{flags.model}, {cores} cores, load {before:.1f} before; least of {flags.rounds} rounds"
    Console(width=120).print(as_table(figures, title))
    about = {"settings": vars(flags), "cores": cores, "load_before": before, "figures": figures}
    print(json.dumps({"command": " ".join(sys.orig_argv[1:]), **provenance(), **about}))


if __name__ == "__main__":
    main()
