"""Two checkouts of this project in turn: is any step of decoding, on-policy training or serving slower than it was?

    git worktree add /tmp/before d6d75dc
    OMP_NUM_THREADS=1 python benchmarks/paired.py /tmp/before --rounds 9

Each checkout runs its own benchmarks in a process of its own, with the same interpreter and libraries. In each round
both run every case, one right after the other, in a new order each time, so that what slows the machine slows both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parents[1]
Cases = dict[str, Callable[[], dict[str, float]]]


def decode_cases(scratch: Path) -> Cases:
    """Decoding: seconds of the passes after the prompt's, by the block engine, and by transformers as a control."""
    import decode

    work = decode.workload(decode._arguments(["--model", "embedded", "--batch_sizes", "1", "8"]), "embedded")
    cases: Cases = {}
    for size in (1, 8):
        for name in work.cases:
            cases[f"{name}, batch {size}"] = lambda name=name, size=size: {"": work.engine(name, size).seconds}
        cases[f"control: transformers, batch {size}"] = lambda size=size: {"": work.transformers(size).seconds}
    return cases


def opd_step_cases(scratch: Path) -> Cases:
    """An on-policy step: seconds of its parts, and of a plain step."""
    import opd_step

    sys.argv[1:] = ["--new_tokens", "64"]
    work = opd_step.Workload.of("embedded", opd_step._arguments())
    numbers = iter(range(2**30))

    def step() -> dict[str, float]:
        number = next(numbers)
        rollout, batch = work.seconds(lambda: work.batch(number))
        teacher, answers = work.seconds(lambda: work.ask(batch))
        student, _ = work.seconds(lambda: work.train(batch, work.term, answers))
        plain, _ = work.seconds(lambda: work.train(batch, opd_step.TokenTerm(), {}))
        return {"rollout": rollout, "teacher": teacher, "student": student, "plain step": plain}

    return {"": step}


def serve_cases(scratch: Path, layout: str) -> Cases:
    """Serving: processor seconds of the server per token, by the number of clients."""
    import asyncio

    import serve

    servers = ExitStack()
    directory = serve.made(scratch / layout, layout, 4)
    body = serve.request_body(directory, 32, None)
    server = servers.enter_context(serve.serving(directory, ["--max_rows", "16"], 1))

    def load(clients: int) -> dict[str, float]:
        figures = asyncio.run(serve.measured(server, clients, 1.0, body))
        return {"": 1 / figures.tokens_per_processor_second}

    cases: Cases = {f"{clients} client(s)": partial(load, clients) for clients in (1, 8)}
    return cases | {"end": lambda: servers.close() or {}}


BENCHMARKS = {
    "decode": decode_cases,
    "opd_step": opd_step_cases,
    "serve": partial(serve_cases, layout="block"),
    "serve_rows": partial(serve_cases, layout="bidirectional"),
}


def work(benchmark: str, root: Path) -> None:
    """Runs cases of one checkout as the other end of a pipe asks for them."""
    sys.path[:1] = [str(root / "benchmarks"), str(root)]
    import torch

    torch.manual_seed(0)
    answers, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as scratch:
        cases = BENCHMARKS[benchmark](Path(scratch))
        print(json.dumps(list(cases)), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(cases[json.loads(line)]()), file=answers, flush=True)


class Side:
    """A checkout's process."""

    def __init__(self, benchmark: str, root: Path) -> None:
        command = [sys.executable, __file__, "--work", benchmark, str(root)]
        paths = [str(root / "benchmarks"), str(root)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=environment
        )

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.process.args[-1]} ended: what it said is above")
        return json.loads(line)

    def run(self, case: str) -> dict[str, float]:
        print(json.dumps(case), file=self.process.stdin, flush=True)
        return self.answer()


@contextmanager
def sides(benchmark: str, roots: Sequence[Path]) -> Iterator[list[Side]]:
    """Starts a process for each checkout, and ends them."""
    started = [Side(benchmark, root) for root in roots]
    try:
        yield started
    finally:
        for side in started:
            side.process.stdin.close()
            side.process.wait(timeout=60)


def measure(benchmark: str, before: Path, rounds: int, seed: int) -> dict[str, list[list[float]]]:
    """Returns pairs of figures, (now, before), by the name of what was measured. The first round warms up."""
    pairs: dict[str, list[list[float]]] = {}
    order = random.Random(seed)
    with sides(benchmark, (HERE, before)) as (now, then):
        names, others = now.answer(), then.answer()
        if names != others:
            raise SystemExit(f"{benchmark}: the checkouts have other cases: {names} and {others}")
        cases = [name for name in names if name != "end"]
        for turn in range(1 + rounds):
            for case in order.sample(cases, len(cases)):
                figures = [{}, {}]
                for side in order.sample((0, 1), 2):
                    figures[side] = (now, then)[side].run(case)
                for part in figures[0] if turn else ():
                    name = ", ".join(filter(None, (benchmark, case, part)))
                    pairs.setdefault(name, []).append([figures[0][part], figures[1][part]])
        if "end" in names:
            now.run("end"), then.run("end")
    return pairs


def summary(pairs: Sequence[Sequence[float]]) -> dict[str, float]:
    """Returns the median and quartiles of the ratios now / before, and the medians of both figures."""
    ratios = sorted(now / before for now, before in pairs)
    last = len(ratios) - 1
    return {
        "ratio": median(ratios),
        "lower_quartile": ratios[round(last / 4)],
        "upper_quartile": ratios[round(3 * last / 4)],
        "now": median(now for now, _ in pairs),
        "before": median(before for _, before in pairs),
        "pairs": len(pairs),
    }


def commit_of(root: Path) -> str:
    result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout of another commit")
    parser.add_argument("--benchmarks", nargs="+", default=list(BENCHMARKS), choices=BENCHMARKS)
    parser.add_argument("--rounds", type=int, default=9, help="pairs of each case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args(argv)
    from report import circumstances, console, print_header
    from rich.table import Table

    before = args.before.resolve()
    outcome: dict[str, Any] = circumstances()
    outcome["commit"] = f"{commit_of(HERE)} over {commit_of(before)}"
    print_header(outcome)
    table = Table(title="time now / time before: median over pairs, and their quartiles", title_justify="left")
    for heading in ("case", "ratio", "quartiles", "now", "before", "pairs"):
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
    outcome["pairs"] = {}
    for benchmark in args.benchmarks:
        outcome["pairs"] |= measure(benchmark, before, args.rounds, args.seed)
    for name, pairs in outcome["pairs"].items():
        found = summary(pairs)
        spread = f"{found['lower_quartile']:.2f} to {found['upper_quartile']:.2f}"
        figures = [f"{found[key] * 1e3:.2f} ms" for key in ("now", "before")]
        table.add_row(name, f"{found['ratio']:.3f}", spread, *figures, str(found["pairs"]))
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps(outcome, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
