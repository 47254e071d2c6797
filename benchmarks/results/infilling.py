"""What context after a gap is worth: a bidirectional conversion against the AR model that continues the text before it.

    python benchmarks/results/infilling.py SMOLLM2 --data DIR --work WORK [--minutes 100]

The AR model is converted by `repr-align` on the standard library. Then both fill the single lines of
HumanEval-Infilling, with the length given and without: pass@1, exact match, edit similarity. Programs run in contained
processes. WORK/infilling.md is the table, WORK/report.html the page.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from results.steps import Step, conversion, evaluation, limited, parser, publish, run_or_print, runs_of

from decausal.report.records import Evaluation, read_record

STEPS, ROWS, LENGTH = 400, 4, 256
TASKS = "humaneval_single_line_infilling_local,humaneval_single_line_infilling_length_given_local"


def steps_of(flags: argparse.Namespace) -> list[Step]:
    """Returns the run and the evaluation of each seed."""
    tasks = flags.work / "tasks"
    local = str(Path(__file__).parent.parent / "local_tasks.py")
    found = [Step([local, "--data", str(flags.data), "--output_dir", str(tasks)], tasks / "piqa_local.yaml")]
    for seed in flags.seeds:
        model = flags.work / f"repr-align-seed{seed}"
        sizes = ("--max_length", str(LENGTH), "--per_device_train_batch_size", str(ROWS))
        rate = ("--learning_rate", str(flags.learning_rate), "--eval_data", "stdlib-heldout", "--eval_rows", "8")
        measured = ("--eval_samples", "2", "--eval_steps", "0.25")
        found.append(
            conversion(flags, model, "repr-align", "stdlib", flags.steps or STEPS, seed, *sizes, *rate, *measured)
        )
        found.append(
            evaluation(
                flags.work / "evals" / f"seed{seed}.json",
                *("eval", "harness", str(model), "--include_path", str(tasks), "--tasks", TASKS, "--with_source"),
                *("--allow_code_execution", "--use_cache", str(flags.work / "cache"), *limited(flags, "--limit", 200)),
            )
        )
    return found


def as_markdown(records: list[Evaluation]) -> str:
    """Returns the scores of each seed beside the AR model's."""
    lines = ["| seed | task | score | model | AR, prefix alone | kept, % |", "|---|---|---|---|---|---|"]
    for record in records:
        for score in record.figures["scores"]:
            cells = [
                " ± ".join("" if value is None else f"{value:.3f}" for value in pair)
                for pair in (
                    (score["value"], score["standard_error"]),
                    (score["source"], score["source_standard_error"]),
                    (score["retention"], score["retention_standard_error"]),
                )
            ]
            seed = record.name.rpartition("seed")[2]
            lines.append(f"| {seed} | {score['task']} | {score['metric']} | {' | '.join(cells)} |")
    made = records[-1].manifest
    command = f"`python {' '.join(sys.argv)}`, commit {made['commit']}, {made['date']}"
    return "\n".join([*lines, "", f"{command}, {made['hardware']['processor']}", ""])


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--learning_rate", type=float, default=1e-4, help="of the run (1e-4)")
    flags = made.parse_args()
    steps = steps_of(flags)
    if not run_or_print(steps, flags):
        return
    records = [read_record(path) for path in sorted((flags.work / "evals").glob("*.json"))]
    found = [record for record in records if record is not None]
    shown = [*runs_of(steps), flags.work / "evals"]
    publish(flags.work, "infilling", "Infilling", [record.as_dict() for record in found], as_markdown(found), shown)


if __name__ == "__main__":
    main()
