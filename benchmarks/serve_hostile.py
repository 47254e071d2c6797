"""Bodies of 4 MiB, a head without end, and as many rows as one client may ask for: what they cost a server and others.

The server runs in a process of its own. While each body is sent, other clients ask for /health and for one token all
the time. It fails if a body is not refused, if the server's memory grows by more than --memory MiB over what it was, or
if somebody else waits longer than --wait seconds, in each of --tries tries: a busy machine makes anybody wait at times.
At last one client fills the queue with rows of 16 steps, and another one asks for 4 tokens: it fails if that takes
longer than --turn seconds.

    python benchmarks/serve_hostile.py --layout bidirectional
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from report import circumstances, console, print_header
from serve import Server, add_server_arguments, made, serving

SIZE = 4 * 2**20 - 200
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
ONE_TOKEN = {"prompt": "a", "max_tokens": 1, "seed": 0}
FEW = {"prompt": "a", "max_tokens": 4, "num_steps": 4, "seed": 0}
MOST_WAITING = 850  # of the rows of one client that asks for 8 times 128
MANY = {"prompt": "a", "max_tokens": 16, "num_steps": 16, "seed": 0, "n": 128, "stream": True}


def filled(before: str, piece: str, after: str) -> bytes:
    """A body of 4 MiB that repeats a piece."""
    return f"{before}{piece * ((SIZE - len(before) - len(after)) // len(piece.encode()))}{after}".encode()


BODIES: dict[str, tuple[str, bytes]] = {
    "60,000 prompts, n = 128": (TEXT, json.dumps({"prompt": ["a"] * 60_000, "n": 128}).encode()),
    "many prompts": (TEXT, filled('{"prompt":[', '"a",', '"a"]}')),
    "many lists of ids": (TEXT, filled('{"prompt":[', "[1],", "[1]]}")),
    "many ids": (TEXT, filled('{"prompt":[', "1,", "1]}")),
    "a long text": (TEXT, filled('{"prompt":"', "a word ", '"}')),
    "a text of few tokens": (TEXT, filled('{"prompt":"', " " * 64, '"}')),
    "many stops": (TEXT, filled('{"prompt":"a","stop":[', '"a",', '"a"]}')),
    "deep JSON": (TEXT, filled('{"prompt":', "[", "")),
    "many parts": (TEXT, filled('{"decausal":{"parts":[', '"a",1,', "1]}}")),
    "many texts before a gap": (TEXT, filled('{"decausal":{"parts":[', '"a",', "1]}}")),
    "many fields": (TEXT, ("{" + ",".join(f'"{i:x}":0' for i in range(SIZE // 11)) + "}").encode()),
    "many messages": (CHAT, filled('{"messages":[', '{"role":"user","content":""},', '{"role":"user"}]}')),
    "a long message": (CHAT, filled('{"messages":[{"role":"user","content":"', "a word ", '"}]}')),
    "many tools": (CHAT, filled('{"messages":[{"role":"user","content":"a"}],"tools":[', "{},", "{}]}")),
}


@dataclass
class Cost:
    """What others noticed while something was sent: memory in MiB, the longest waits in seconds."""

    memory: float = 0.0
    health: float = 0.0
    completion: float = 0.0


def joined(tries: Sequence[Cost]) -> Cost:
    """The most memory that a try took, since later ones find it taken, and the shortest of the longest waits."""
    return Cost(
        memory=max(cost.memory for cost in tries),
        health=min(cost.health for cost in tries),
        completion=min(cost.completion for cost in tries),
    )


@contextmanager
def watched(server: Server) -> Iterator[Cost]:
    """Measures memory, and how long two other clients wait, while something else goes on."""
    cost, is_over = Cost(), threading.Event()
    before = server.process.memory_info().rss

    def watch_memory() -> None:
        while not is_over.wait(0.01):
            cost.memory = max(cost.memory, (server.process.memory_info().rss - before) / 2**20)

    def ask(name: str, call: Callable[[httpx.Client], Any]) -> None:
        with httpx.Client(base_url=server.url, timeout=600) as client:
            while not is_over.is_set():
                start = time.perf_counter()
                call(client)
                setattr(cost, name, max(getattr(cost, name), time.perf_counter() - start))

    threads = [
        threading.Thread(target=watch_memory),
        threading.Thread(target=ask, args=("health", lambda client: client.get("/health"))),
        threading.Thread(target=ask, args=("completion", lambda client: client.post(TEXT, json=ONE_TOKEN))),
    ]
    for thread in threads:
        thread.start()
    try:
        yield cost
    finally:
        time.sleep(0.2)
        is_over.set()
        for thread in threads:
            thread.join()


def send_body(server: Server, path: str, body: bytes) -> int:
    """Returns the status that a body gets."""
    headers = {"Content-Type": "application/json"}
    return httpx.post(server.url + path, content=body, headers=headers, timeout=600).status_code


def send_head(server: Server) -> int:
    """Sends a head until the server has enough of it; returns the reported status, 0 if it takes everything."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
        try:
            for _ in range(64 * 2**20 // 2**16):
                client.sendall(b"x" * 2**16)
        except OSError:
            return 431
    return 0


def behind_a_full_queue(server: Server) -> tuple[int, float]:
    """Returns how many rows of one client wait, and the longest of three small requests of another client."""
    many = json.dumps(MANY).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(many)}"
    host, port = server.url.removeprefix("http://").split(":")
    other = httpx.HTTPTransport(local_address="127.0.0.2")
    with ExitStack() as stack, httpx.Client(base_url=server.url, timeout=600, transport=other) as client:
        for _ in range(8):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(f"{head}\r\n\r\n".encode() + many)
        num_waiting, give_up = 0, time.monotonic() + 60
        while num_waiting < MOST_WAITING and time.monotonic() < give_up:
            time.sleep(0.1)
            waiting = re.search(r"^decausal_rows_waiting.* (\S+)$", client.get("/metrics").text, re.MULTILINE)
            num_waiting = int(float(waiting.group(1))) if waiting else 0
        waits = []
        for _ in range(3):
            start = time.perf_counter()
            client.post(TEXT, json=FEW).raise_for_status()
            waits.append(time.perf_counter() - start)
    return num_waiting, max(waits)


def is_over(cost: Cost, flags: argparse.Namespace) -> bool:
    """Whether it is more than may be."""
    return cost.memory > flags.memory or max(cost.health, cost.completion) > flags.wait


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_arguments(parser, "bidirectional")
    parser.add_argument("--memory", type=float, default=300, help="MiB that one may cost")
    parser.add_argument("--wait", type=float, default=2, help="seconds that others may wait")
    parser.add_argument("--tries", type=int, default=3, help="how often what was over a limit is sent (3)")
    parser.add_argument("--turn", type=float, default=10, help="seconds that a small request may wait for its turn")
    flags = parser.parse_args()
    outcome: dict[str, Any] = circumstances() | {"costs": {}}
    print_header(outcome)
    faults = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(flags.model) if flags.model else made(Path(scratch) / "model", flags.layout, 4)
        with serving(directory, [], flags.threads) as server:
            httpx.post(server.url + TEXT, json=ONE_TOKEN, timeout=600)
            sent: dict[str, Callable[[], int]] = {
                name: lambda path=path, body=body: send_body(server, path, body)
                for name, (path, body) in BODIES.items()
            }
            for name, send in {**sent, "a head without end": lambda: send_head(server)}.items():
                tries: list[Cost] = []
                while not tries or (len(tries) < flags.tries and is_over(joined(tries), flags)):
                    with watched(server) as cost:
                        status = send()
                    tries.append(cost)
                cost = joined(tries)
                waits = f"/health {cost.health:.2f} s, one token {cost.completion:.2f} s"
                console.print(f"{name:>26}  {status}  +{cost.memory:.0f} MiB, {waits}")
                outcome["costs"][name] = {"status": status, **vars(cost)}
                if is_over(cost, flags) or not 400 <= status < 500:
                    faults.append(name)
            num_waiting, seconds = behind_a_full_queue(server)
            console.print(f"behind {num_waiting} rows of another client: 4 tokens {seconds:.2f} s")
            outcome["behind_a_full_queue"] = {"rows": num_waiting, "seconds": seconds}
            if seconds > flags.turn:
                faults.append("behind a full queue")
    if flags.json:
        flags.json.write_text(json.dumps(outcome, indent=2) + "\n")
    if faults:
        console.print(f"over the limits: {', '.join(faults)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
