"""Requests and tokens per second, and time to the first token, by the number of clients that ask at once.

The server runs in a process of its own, as `decausal serve` starts it; clients are coroutines here. Beside it, one
after the other, a loop over `transformers.generate` with the AR source of the same model, on the same machine with as
many threads, prompts and new tokens.

    python benchmarks/serve.py                                        # the embedded model's weights
    python benchmarks/serve.py --model DIR --concurrency 1,4,16,64
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from report import circumstances, console, print_header
from rich.table import Table

from decausal.diffusion.layout import Layout
from decausal.models.adapt import adapt, load_source
from decausal.models.checkpoint import load_converted, save_converted
from decausal.models.facts import ConversionFacts

PROMPT = "class Point:\n    def __init__(self, x, y):\n        self.x = x\n"
TARGET = 4.0
"""Tokens per second at 16 clients over those at 1, on a CPU."""


@dataclass(frozen=True)
class Load:
    """What a number of clients got.

    Attributes:
        concurrency: Clients that each ask again as soon as they are answered.
        seconds: From the first request to the last answer.
        requests_per_second, tokens_per_second: Of answers and their tokens.
        first_token_p50, first_token_p95: Seconds to the first text that nothing can change any more.
        answer_p50, answer_p95: Seconds to the end of an answer.
        tokens_per_forward: Tokens over forward passes, of all rows.
        tokens_per_processor_second: Tokens over the processor time of the server, which other processes do not take.
    """

    concurrency: int
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    first_token_p50: float
    first_token_p95: float
    answer_p50: float
    answer_p95: float
    tokens_per_forward: float
    tokens_per_processor_second: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_arguments(parser, "block")
    parser.add_argument("--block_size", type=int, default=4, help="without --model")
    parser.add_argument("--concurrency", default="1,4,16,64")
    parser.add_argument("--max_rows", type=int, default=16)
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--num_steps", type=int, help="denoising steps; none: half as many as tokens are written")
    parser.add_argument("--seconds", type=float, default=20, help="at least as long for each number of clients")
    flags = parser.parse_args()
    outcome: dict[str, Any] = circumstances()
    print_header(outcome)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(flags.model) if flags.model else made(Path(scratch) / "model", flags.layout, flags.block_size)
        body = request_body(directory, flags.max_tokens, flags.num_steps)
        options = ["--max_rows", str(flags.max_rows), "--max_queue", "4096"]
        with serving(directory, options, flags.threads) as server:
            asyncio.run(measured(server, 4, 2.0, body))  # warm
            loads = [
                asyncio.run(measured(server, int(count), flags.seconds, body)) for count in flags.concurrency.split(",")
            ]
        torch.set_num_threads(flags.threads)
        loop = transformers_loop(directory, flags.max_tokens, flags.seconds)
    outcome |= {"request": body, "loads": [asdict(load) for load in loads], "transformers": loop}
    print_loads(loads, loop, body)
    if flags.json:
        flags.json.write_text(json.dumps(outcome, indent=2) + "\n")


def add_server_arguments(parser: argparse.ArgumentParser, layout: str) -> None:
    """Adds what is served, in how many threads, and where figures go."""
    parser.add_argument("--model", help="a converted directory; none: the embedded model as --layout, not trained")
    parser.add_argument("--layout", choices=("block", "bidirectional"), default=layout, help="without --model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)


def made(directory: Path, layout: str, block_size: int) -> Path:
    """Saves the embedded AR model as if it had been converted: its speed does not depend on its weights."""
    model, tokenizer = load_source("tiny")
    size = block_size if layout == "block" else None
    mask_token_id = adapt(model, tokenizer, layout=Layout(layout, size))
    facts = ConversionFacts("tiny", layout, 1, mask_token_id, block_size=size)
    save_converted(directory, model, tokenizer, facts)
    return directory


def request_body(directory: Path, max_tokens: int, num_steps: int | None) -> dict[str, Any]:
    """A request whose row never ends early: a fixed number of steps, and a temperature that spreads the tokens."""
    facts = json.loads((directory / "decausal.json").read_text())
    size = facts.get("block_size") or max_tokens
    steps = num_steps or max(1, size // 2)
    return {"prompt": PROMPT, "max_tokens": max_tokens, "num_steps": steps, "temperature": 1.0, "stream": True}


@dataclass(frozen=True)
class Server:
    """A server in a process of its own."""

    url: str
    process: psutil.Process

    def processor_seconds(self) -> float:
        """Of all its threads, since it began."""
        times = self.process.cpu_times()
        return times.user + times.system


@contextmanager
def serving(directory: Path, options: list[str], threads: int) -> Iterator[Server]:
    """Starts `decausal serve` on a free port."""
    command = [sys.executable, "-m", "decausal", "serve", str(directory), "--port", "0", *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as server:
        try:
            line = server.stdout.readline() if server.stdout else ""
            url = next((word for word in line.split() if word.startswith("http")), "")
            if not url:
                raise SystemExit(f"the server did not start: {shlex.join(command)}")
            yield Server(url, psutil.Process(server.pid))
        finally:
            server.terminate()
            server.wait(timeout=30)


async def measured(server: Server, concurrency: int, seconds: float, body: dict[str, Any]) -> Load:
    """Lets clients ask until the time is over, and waits for what they have asked."""
    answers: list[tuple[float, float, int, int]] = []
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        start, processor_start = time.perf_counter(), server.processor_seconds()

        async def ask_on(number: int) -> None:
            seed = number
            while time.perf_counter() - start < seconds:
                answers.append(await answer(client, {**body, "seed": seed}))
                seed += concurrency

        await asyncio.gather(*(ask_on(number) for number in range(concurrency)))
        took, busy = time.perf_counter() - start, server.processor_seconds() - processor_start
    first, whole, tokens, passes = (list(column) for column in zip(*answers, strict=True))
    return Load(
        concurrency=concurrency,
        seconds=took,
        requests_per_second=len(answers) / took,
        tokens_per_second=sum(tokens) / took,
        first_token_p50=statistics.median(first),
        first_token_p95=quantile(first, 0.95),
        answer_p50=statistics.median(whole),
        answer_p95=quantile(whole, 0.95),
        tokens_per_forward=sum(tokens) / sum(passes),
        tokens_per_processor_second=sum(tokens) / busy,
    )


async def answer(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[float, float, int, int]:
    """Asks once. Returns seconds to the first text and to the end, tokens, forward passes."""
    start = time.perf_counter()
    first, tokens, passes = None, 0, 0
    async with client.stream("POST", "/v1/completions", json=body) as stream:
        async for line in stream.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            if choice["text"] and first is None:
                first = time.perf_counter() - start
            if choice["finish_reason"]:
                passes, tokens = choice["decausal"]["num_forwards"], len(choice["decausal"]["step_of_token"])
    took = time.perf_counter() - start
    return first if first is not None else took, took, tokens, passes


def quantile(values: list[float], share: float) -> float:
    """Returns the value that this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def transformers_loop(directory: Path, max_tokens: int, seconds: float) -> dict[str, float]:
    """One request after the other through `transformers.generate`, with the AR source and its cache."""
    source = load_converted(directory, dtype=torch.float32, device=torch.device("cpu")).facts.source
    model, tokenizer = load_source(source)
    model.eval()
    ids = tokenizer(PROMPT, return_tensors="pt")
    options = {"max_new_tokens": max_tokens, "min_new_tokens": max_tokens, "do_sample": True, "temperature": 1.0}
    model.generate(**ids, **options, pad_token_id=0)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        model.generate(**ids, **options, pad_token_id=0)
        count += 1
    took = time.perf_counter() - start
    return {"requests_per_second": count / took, "tokens_per_second": count * max_tokens / took}


def print_loads(loads: list[Load], loop: dict[str, float], body: dict[str, Any]) -> None:
    """Prints a table, and whether the target is met."""
    table = Table(title=f"{body['max_tokens']} new tokens, num_steps {body['num_steps']}", title_justify="left")
    for heading in ("clients", "req/s", "tok/s", "tok/cpu s", "first p50", "p95", "answer p50", "p95", "tok/pass"):
        table.add_column(heading, justify="right")
    one, sixteen = (next((load for load in loads if load.concurrency == count), None) for count in (1, 16))
    for load in loads:
        table.add_row(
            str(load.concurrency),
            f"{load.requests_per_second:.2f}",
            f"{load.tokens_per_second:.0f}",
            f"{load.tokens_per_processor_second:.0f}",
            f"{load.first_token_p50 * 1e3:.0f} ms",
            f"{load.first_token_p95 * 1e3:.0f} ms",
            f"{load.answer_p50 * 1e3:.0f} ms",
            f"{load.answer_p95 * 1e3:.0f} ms",
            f"{load.tokens_per_forward:.2f}",
        )
    console.print(table)
    console.print(
        f"transformers.generate, AR source, one after the other: {loop['requests_per_second']:.2f} req/s, "
        f"{loop['tokens_per_second']:.0f} tok/s"
    )
    if one and sixteen:
        ratio = sixteen.tokens_per_second / one.tokens_per_second
        of_processor = sixteen.tokens_per_processor_second / one.tokens_per_processor_second
        verdict = "met" if ratio >= TARGET else "missed"
        console.print(
            f"16 clients over 1: {ratio:.2f} times the tokens per second, target {TARGET:.0f}: {verdict}; "
            f"{of_processor:.2f} times per second of processor time"
        )


if __name__ == "__main__":
    main()
