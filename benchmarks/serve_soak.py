"""Many clients for minutes, some of whom leave mid-stream or send nonsense; every answer is compared with generate's.

The server runs in a process of its own. What each seed must give is computed before by `generate`, here. Sums of
floating-point numbers depend a little on who shares a batch, and a token on the brink may then fall to the other side:
seeds for which that happens in batches here are left out, and what remains of it is counted as `differing`. An answer
that is another request's is counted as `mixed up`. It fails if anything is lost or mixed up, if more than one answer in
a thousand differs, if a bad request gets another status than it must, if rows are left at the end, or if memory grew by
more than a tenth from the second quarter to the last.

    python benchmarks/serve_soak.py --clients 1000 --minutes 10
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from report import circumstances, console, print_header
from serve import Server, add_server_arguments, made, quantile, serving

from decausal.models.checkpoint import load_converted
from decausal.sampling.engines import engine_for
from decausal.sampling.generate import generate
from decausal.sampling.jobs import Job, run
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.stopping import end_token_ids
from decausal.sampling.texts import prompt_ids, text_after

PROMPTS = ["class Point:\n", "import ", "def read(path):\n", "    try:\n        return ", "for i in range("]
BAD: list[tuple[bytes, int]] = [
    (b'{"prompt": ', 400),
    (b'{"prompt": "\xff"}', 400),
    (b'{"prompt": 3}', 400),
    (b'{"prompt": "a", "temperature": -1}', 400),
    (b'{"prompt": "a", "max_tokens": 1000000000}', 400),
    (b'{"prompt": "a", "wrong_field": 1}', 400),
    (b'{"prompt": "<|mask|>"}', 400),
    (b'{"prompt": "a", "model": "none"}', 404),
    (b'{"prompt": "' + b"a " * 5 * 2**20 + b'"}', 413),
]


@dataclass
class Tally:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_arguments(parser, "block")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--max_tokens", type=int, default=12)
    parser.add_argument("--max_rows", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=40, help="different requests")
    flags = parser.parse_args()
    outcome: dict[str, Any] = circumstances()
    print_header(outcome)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(flags.model) if flags.model else made(Path(scratch) / "model", flags.layout, 4)
        expected = expected_answers(directory, flags.seeds, flags.max_tokens)
        tally = Tally()
        options = ["--max_rows", str(flags.max_rows), "--max_queue", str(flags.clients), "--timeout", "600"]
        with serving(directory, options, flags.threads) as server:
            asyncio.run(soaked(server, flags.clients, 60 * flags.minutes, expected, tally))
    report = summary(tally)
    outcome |= {"clients": flags.clients, "minutes": flags.minutes, **report}
    for name, value in report.items():
        console.print(f"{name:>24}  {value}")
    if flags.json:
        flags.json.write_text(json.dumps(outcome, indent=2) + "\n")
    return 1 if report["faults"] else 0


def expected_answers(directory: Path, seeds: int, max_tokens: int) -> list[tuple[dict[str, Any], str]]:
    """Requests, and the text that each must get: `generate`'s, where a full batch here comes to the same text."""
    converted = load_converted(directory, dtype=torch.float32, device=torch.device("cpu"))
    ends = end_token_ids(converted)
    requests, texts, jobs = [], [], []
    for seed in range(seeds):
        options = {"temperature": 1.0, "num_steps": 2 + seed % 3}
        prompt, length = PROMPTS[seed % len(PROMPTS)], max_tokens - seed % 5
        texts.append(generate(converted, prompt, max_new_tokens=length, seed=seed, **options).text)
        requests.append({"prompt": prompt, "max_tokens": length, "seed": seed, **options})
        row = Row((prompt_ids(converted, prompt), []), (length,), "the prompt")
        jobs.append(Job(row, SamplerSettings(**options), seed, ends))
    is_firm = [True] * seeds
    for max_rows in (5, 16, 32):
        for index, ended in run(engine_for(converted, max_rows=max_rows, max_length=128), jobs):
            given = jobs[index].row.given[0]
            is_firm[index] &= text_after(converted.tokenizer, given, ended.ids) == texts[index]
    return [(request, text) for request, text, firm in zip(requests, texts, is_firm, strict=True) if firm]


async def soaked(
    server: Server, clients: int, seconds: float, expected: list[tuple[dict[str, Any], str]], tally: Tally
) -> None:
    """Lets clients do what clients do, and watches the server's memory."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=900, limits=limits) as client:
        deadline = time.perf_counter() + seconds
        watcher = asyncio.create_task(watch_memory(server, tally))
        await asyncio.gather(*(behave(client, number, deadline, expected, tally) for number in range(clients)))
        watcher.cancel()
        await asyncio.sleep(1)
        text = (await client.get("/metrics")).text
        left = [
            line for line in text.splitlines() if line.startswith(("decausal_rows_running{", "decausal_rows_waiting{"))
        ]
        if any(not line.endswith(" 0.0") for line in left):
            tally.faults.append(f"rows are left: {left}")
        if (await client.get("/health")).status_code != 200:
            tally.faults.append("the server is not healthy")


async def behave(
    client: httpx.AsyncClient,
    number: int,
    deadline: float,
    expected: list[tuple[dict[str, Any], str]],
    tally: Tally,
) -> None:
    """One client: asks, and asks again; now and then it leaves in the middle or sends nonsense."""
    chance = random.Random(number)
    await asyncio.sleep(chance.random() * 2)
    while time.perf_counter() < deadline:
        kind = chance.choices(("ask", "stream", "leave", "bad"), (40, 45, 10, 5))[0]
        body, text = expected[chance.randrange(len(expected))]
        tally.counts[f"{kind}: sent"] += 1
        try:
            if kind == "bad":
                await send_nonsense(client, *chance.choice(BAD), tally)
            else:
                await ask(client, kind, body, text, {other for _, other in expected}, tally)
        except httpx.HTTPError as error:
            tally.counts["lost"] += 1
            tally.faults.append(f"lost: {type(error).__name__} {error}")


async def send_nonsense(client: httpx.AsyncClient, raw: bytes, status: int, tally: Tally) -> None:
    answer = await client.post("/v1/completions", content=raw, headers={"Content-Type": "application/json"})
    if answer.status_code != status or "error" not in answer.json():
        tally.faults.append(f"{raw[:40]!r} got {answer.status_code}, not {status}")
    tally.counts["bad: refused"] += 1


async def ask(
    client: httpx.AsyncClient, kind: str, body: dict[str, Any], text: str, all_texts: set[str], tally: Tally
) -> None:
    start = time.perf_counter()
    if kind == "ask":
        answer = await client.post("/v1/completions", json=body)
        if answer.status_code == 429:
            tally.counts["asked to wait"] += 1
            await asyncio.sleep(float(answer.headers["Retry-After"]))
            return
        found = answer.json()["choices"][0]["text"]
    else:
        pieces: list[str] = []
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            if stream.status_code == 429:
                tally.counts["asked to wait"] += 1
                await asyncio.sleep(float(stream.headers["Retry-After"]))
                return
            async for line in stream.aiter_lines():
                if line.startswith("data: {"):
                    pieces.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
                    if kind == "leave":
                        tally.counts["leave: left"] += 1
                        return
        found = "".join(pieces)
    tally.seconds.append(time.perf_counter() - start)
    tally.counts["answered"] += 1
    if found != text:
        is_anothers = found in all_texts
        tally.counts["mixed up" if is_anothers else "differing"] += 1


async def watch_memory(server: Server, tally: Tally) -> None:
    """Samples the server's resident memory."""
    while True:
        tally.memory.append(server.process.memory_info().rss / 2**20)
        await asyncio.sleep(1)


def summary(tally: Tally) -> dict[str, Any]:
    """Returns what happened by name, and what must not have."""
    counts = dict(sorted(tally.counts.items()))
    answered = max(1, counts.get("answered", 0))
    quarter = max(1, len(tally.memory) // 4)
    # The first quarter is where threads, buffers and caches come to be.
    early = statistics.median(tally.memory[quarter : 2 * quarter] or [0.0])
    late = statistics.median(tally.memory[-quarter:] or [0.0])
    faults = Counter(tally.faults)
    if counts.get("mixed up"):
        faults["answers that are another request's"] = counts["mixed up"]
    if counts.get("differing", 0) > answered / 1000:
        faults["answers that differ from generate's"] = counts["differing"]
    if late > 1.1 * early:
        faults[f"memory grew from {early:.0f} to {late:.0f} MiB"] = 1
    return {
        **counts,
        "answer p50 (s)": round(statistics.median(tally.seconds), 3) if tally.seconds else None,
        "answer p99 (s)": round(quantile(tally.seconds, 0.99), 3) if tally.seconds else None,
        "answer longest (s)": round(max(tally.seconds, default=0.0), 3),
        "memory (MiB)": {"second quarter": round(early), "last quarter": round(late), "most": round(max(tally.memory))},
        "faults": dict(faults.most_common(20)),
    }


if __name__ == "__main__":
    sys.exit(main())
