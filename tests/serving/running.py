"""A tiny model after a real server, for tests of every part of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import torch

from decausal.models.adapt import adapt
from decausal.models.checkpoint import Converted
from decausal.models.gated import gated_mask_token_id
from decausal.serving.app import create_app
from decausal.serving.metrics import Metrics
from decausal.serving.served import Served, served
from decausal.serving.server import DrainingServer
from decausal.serving.settings import ServeSettings
from tests.families import FAMILIES, tiny_tokenizer
from tests.gated_models import gated
from tests.hangs import PATIENCE
from tests.sampling.stand_ins import conversion_facts


def converted(family: str = "qwen3", chat: bool = True, **facts: Any) -> Converted:
    """A random model whose distributions are sharp, so that rounding decides no comparison."""
    torch.manual_seed(0)
    model, tokenizer = FAMILIES[family](), tiny_tokenizer(chat)
    if facts.get("weights") == "gated":
        mask_token_id = gated_mask_token_id(model)
        model = gated(model.eval(), scale=0.1).get_base_model()
    else:
        mask_token_id = adapt(model, tokenizer)
    model.get_output_embeddings().weight.data *= 4
    return Converted(model, tokenizer, conversion_facts(mask_token_id, **{"shift": 1, **facts}))


class Running:
    """A server in a thread.

    Attributes:
        url: Its address.
        models: What it serves.
        metrics: What it counts.
        stop: Tells it to end, and returns at once.
    """

    def __init__(self, url: str, models: list[Served], metrics: Metrics, stop: Callable[[], None]) -> None:
        self.url, self.models, self.metrics, self.stop = url, models, metrics, stop

    @property
    def num_rows(self) -> int:
        """Rows that run or wait."""
        return sum(model.worker.num_rows for model in self.models)

    def client(self, **options: Any) -> httpx.Client:
        """A client of it."""
        return httpx.Client(base_url=self.url, timeout=PATIENCE, **options)

    def wait_for_rows(self, number: int, seconds: float = PATIENCE) -> None:
        """Returns once so many rows run or wait; fails where that takes longer."""
        deadline = time.monotonic() + seconds
        while self.num_rows != number:
            assert time.monotonic() < deadline, f"{self.num_rows} rows, not {number}"
            time.sleep(0.01)

    def wait_until_idle(self, seconds: float = PATIENCE) -> None:
        """Returns once no row is left; fails where that takes longer."""
        self.wait_for_rows(0, seconds)


@contextmanager
def running(
    models: list[Converted], is_source: tuple[bool, ...] = (), send_buffer: int | None = None, **settings: Any
) -> Iterator[Running]:
    """Serves models named tiny, tiny-2, ... on a free port; connections hold so many bytes that are not yet read."""
    limits, metrics = ServeSettings(**settings), Metrics()
    names = ["tiny", *(f"tiny-{number}" for number in range(2, len(models) + 1))]
    kinds = is_source or (False,) * len(models)
    found = [served(name, model, limits, metrics, kind) for name, model, kind in zip(names, models, kinds, strict=True)]
    listener = socket.create_server(("127.0.0.1", 0))
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = DrainingServer(create_app(found, limits, metrics), found, limits)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()

    def stop() -> None:
        server.should_exit = True

    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", found, metrics, stop)
    finally:
        stop()
        thread.join(timeout=PATIENCE)
        listener.close()
        assert not thread.is_alive()
