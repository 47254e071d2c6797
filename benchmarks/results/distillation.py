"""OPDLM against corpus training and off-policy distillation, and a conversion without loss, on a real model.

    python benchmarks/results/distillation.py SMOLLM2 --data DIR --work WORK [--minutes 100]

The AR model answers the first instruction prompts once (`decausal answers`); the last 255 are held out. Then, from the
same model, with blocks of 4, shift 1 and a causal context, at equal steps of equal rows:

    corpus      bd3lm on those answers
    off-policy  the same rows, compared with the AR model's next-token distributions
    opdlm       the student's own answers to the same prompts
    lossless    gated weights on the AR model's answers

Each is measured, with `--limit` examples: LAMBADA and PIQA (NELBO) and WikiText-2 bits per byte, with the AR source
beside them; and what it writes after held-out prompts, and how far that is the AR model's answer.
Training tokens stand in each run's log: an on-policy step reads prompts of its own. `--rates 1e-5,3e-5,1e-4` compares
learning rates, by texts alone. WORK/distillation.md is the table, WORK/distillation.png what is kept
by speed, WORK/report.html the page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from results.figures import draw_points
from results.steps import Step, conversion, decimals, evaluation, limited, parser, publish, run_or_print, runs_of
from results.texts import articles, instructions

from decausal.provenance import provenance
from decausal.report.figures import Figure, figures_of
from decausal.report.records import Evaluation, read_record
from decausal.report.sources import read_run

STEPS, ROWS, LENGTH, NEW_TOKENS = 100, 4, 256, 64
NUM_ANSWERED = 600
"""Prompts that the AR model answers."""
BLOCKS = ["--block_size", "4", "--shift", "1", "--causal_context", "true"]
ROLLOUTS = ["--rollout_prompts", str(ROWS), "--rollout_tokens", str(NEW_TOKENS)]


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        recipe: The recipe.
        rate: Its learning rate.
        own: Settings of its own.
    """

    recipe: str
    rate: float
    own: Sequence[str] = ()


METHODS = {
    "corpus": Method("bd3lm", 1e-4, BLOCKS),
    "off-policy": Method("bd3lm", 1e-4, [*BLOCKS, "--token_weight", "0", "--kl_weight", "1"]),
    "opdlm": Method("opdlm", 1e-4, [*ROLLOUTS, "--rollout_curriculum", "10"]),
    "lossless": Method("lossless", 1e-3),
}
TASKS = "lambada_local,piqa_local"


def steps_of(flags: argparse.Namespace) -> list[Step]:
    """Returns answers, runs and evaluations, in their order."""
    data, tasks = flags.work / "data", flags.work / "tasks"
    train, held_out = instructions(flags.data, data / "prompts.jsonl", data / "held_out.jsonl")
    wikitext, answers = articles(flags.data, "wikitext2_test.txt", data / "wikitext.jsonl"), data / "answers.jsonl"
    asked = limited(flags, "--num_prompts", NUM_ANSWERED)
    local = str(Path(__file__).parent.parent / "local_tasks.py")
    steps = [
        Step([local, "--data", str(flags.data), "--output_dir", str(tasks)], tasks / "piqa_local.yaml"),
        Step(
            [
                *("answers", flags.model, "--data", str(train), "--output", str(answers), "--temperature", "0"),
                *("--max_new_tokens", str(NEW_TOKENS), "--max_rows", "32", *asked),
            ],
            data / "answers.done",
        ),
    ]
    for name, rate, seed in cells(flags):
        method = METHODS[name]
        steps.append(
            conversion(
                flags,
                flags.work / name_of(name, rate, seed),
                method.recipe,
                train if method.recipe == "opdlm" else answers,
                flags.steps or STEPS,
                seed,
                *("--max_length", str(LENGTH), "--per_device_train_batch_size", str(ROWS)),
                *("--learning_rate", str(rate), *method.own),
            )
        )
        steps += measured(flags, name_of(name, rate, seed), held_out, wikitext, tasks)
    return steps


def cells(flags: argparse.Namespace) -> list[tuple[str, float, int]]:
    """Returns (method, learning rate, seed) of all runs."""
    return [
        (name, rate, seed)
        for seed in flags.seeds
        for name in flags.methods
        for rate in flags.rates or (METHODS[name].rate,)
    ]


def name_of(method: str, rate: float, seed: int) -> str:
    """Returns a run's name."""
    return f"{method}-rate{rate:g}-seed{seed}"


def measured(flags: argparse.Namespace, name: str, held_out: Path, wikitext: Path, tasks: Path) -> list[Step]:
    """Returns the evaluations of one model."""
    model, kept = str(flags.work / name), flags.work / "evals" / name
    harness = ["eval", "harness", model, "--include_path", str(tasks)]
    scores = evaluation(
        kept / "harness.json", *harness, "--tasks", TASKS, "--with_source", *limited(flags, "--limit", 200)
    )
    likelihood = evaluation(
        kept / "nll.json", "eval", "nll", model, "--data", str(wikitext), *limited(flags, "--num_rows", 32)
    )
    texts = evaluation(
        kept / "texts.json",
        *("eval", "texts", model, "--data", str(held_out), *limited(flags, "--num_prompts", 100)),
        *("--max_new_tokens", str(NEW_TOKENS), "--temperature", "0"),
    )
    return [texts] if flags.rates else [scores, likelihood, texts]


def table(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of each method and seed."""
    rows = []
    for method, rate, seed in cells(flags):
        name = name_of(method, rate, seed)
        kept = [read_record(path) for path in sorted((flags.work / "evals" / name).glob("*.json"))]
        records = [record for record in kept if record is not None]
        last = read_run(flags.work / name).log[-1]
        rows.append(
            {"method": method, "seed": seed, "rate": rate, "tokens": last["tokens"], "seconds": last["seconds"]}
            | {figure.measure: shown(figure) for figure in figures_of(records)}
            | written(records)
        )
    return provenance() | {"command": " ".join(["python", *sys.argv]), "rows": rows}


def shown(figure: Figure) -> dict[str, float | None]:
    """Returns a figure with its error and the AR source's."""
    return {"value": figure.value, "error": figure.error, "source": figure.source, "kept": figure.kept}


def written(records: list[Evaluation]) -> dict[str, Any]:
    """Returns agreement with the AR model's answers, tokens per forward, and how the texts look."""
    found = next(record.figures for record in records if record.kind == "texts")
    look, model = found["model"]["look"], found["model"]
    return {
        "agreement": found["agreement"],
        "same text": found["same_texts"],
        "tokens per forward": model["tokens_per_forward"],
        "ended": model["num_ended"] / look["num_texts"],
        "repetition": look["repetition"],
        "entropy": look["entropy"],
        "perplexity under the AR model": model["perplexity"],
    }


def as_markdown(found: dict[str, Any]) -> str:
    """Returns the table, a column for each method and seed."""
    rows = found["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("method", "seed", "rate")))
    heads = (f" {row['method']}, rate {row['rate']:g}, seed {row['seed']} |" for row in rows)
    lines = ["| |" + "".join(heads) + " AR |"]
    lines.append("|---|" + "---|" * (len(rows) + 1))
    for name in names:
        cells = [cell(row.get(name)) for row in rows]
        source = next((row[name]["source"] for row in rows if isinstance(row.get(name), dict)), None)
        lines.append(f"| {name} | {' | '.join(cells)} | {cell(source)} |")
    hardware = found["hardware"]
    return (
        "\n".join(lines)
        + f"\n\n`{found['command']}`, commit {found['commit']}, {found['date']}, {hardware['processor']}, "
        f"{hardware['torch_threads']} threads\n"
    )


def cell(value: Any) -> str:
    """Returns a figure as a cell."""
    if isinstance(value, dict):
        return cell(value["value"]) + ("" if value["error"] is None else f" ± {value['error']:.3f}")
    return "" if value is None else f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS), help="with commas (all)")
    made.add_argument("--rates", type=decimals, help="compare these learning rates instead of the methods' own")
    flags = made.parse_args()
    steps = steps_of(flags)
    if not run_or_print(steps, flags):
        return
    found = table(flags)
    shown = [*runs_of(steps), flags.work / "evals"]
    points: dict[str, list[tuple[float, float]]] = {}
    for row in found["rows"]:
        points.setdefault(row["method"], []).append((row["tokens per forward"], row["agreement"]))
    draw_points(flags.work / "distillation.png", points, "tokens per forward", "agreement with the AR model's answers")
    publish(flags.work, "distillation", "Distillation", found, as_markdown(found), shown)


if __name__ == "__main__":
    main()
