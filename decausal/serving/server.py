"""From a directory to a listening server."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from decausal.data.template import set_template
from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling.model import load
from decausal.serving.app import create_app
from decausal.serving.connection import MAX_HEAD_BYTES, connection_class
from decausal.serving.metrics import Metrics
from decausal.serving.served import Served, served, source_of
from decausal.serving.settings import ServeSettings

GRACE_SECONDS = 5
"""How many seconds clients have, after the time to drain, to read how their answers ended."""

KEEP_ALIVE_SECONDS = 75
"""How many seconds a connection may be idle. Longer than clients keep theirs (5 s in OpenAI's client), because the
client must close first. Otherwise it may send a request into a connection that is being closed."""


def models_of(
    directory: str | Path, settings: ServeSettings, metrics: Metrics, *, with_source: bool = False
) -> list[Served]:
    """Loads a checkpoint, and on request the autoregressive model that it was made from.

    Raises:
        UserError: No such checkpoint or source.
    """
    loaded = load(directory, chat_template=settings.chat_template, chat_template_kwargs=settings.chat_template_kwargs)
    converted = Converted(loaded.model, loaded.tokenizer, loaded.facts)
    name = settings.model_name or Path(directory).resolve().name
    models = [served(name, converted, settings, metrics)]
    if with_source:
        source = source_of(converted)
        set_template(source.tokenizer, settings.chat_template, settings.chat_template_kwargs)
        models.append(served(f"{name}-source", source, settings, metrics, is_source=True))
    return models


def serve(
    directory: str | Path,
    settings: ServeSettings,
    *,
    with_source: bool = False,
    on_listening: Callable[[str, list[str]], None] | None = None,
) -> None:
    """Loads a model and answers requests until a signal ends it.

    Args:
        directory: What `decausal convert` wrote.
        settings: Address, key and limits.
        with_source: Whether to serve the autoregressive model that it was made from too, as NAME-source.
        on_listening: Called with the address and the models' names once requests are accepted.

    Raises:
        UserError: The model cannot be loaded, or the address is taken.
    """
    listener = _listener(settings)
    try:
        metrics = Metrics()
        models = models_of(directory, settings, metrics, with_source=with_source)
        app = create_app(models, settings, metrics)
        _raise_file_limit()
        gc.freeze()  # these objects stay: garbage collection, which stops every thread, can skip them
        if on_listening:
            host, port = listener.getsockname()[:2]
            on_listening(f"http://{f'[{host}]' if ':' in host else host}:{port}", [model.name for model in models])
        DrainingServer(app, models, settings).run(sockets=[listener])
    finally:
        listener.close()


class DrainingServer(uvicorn.Server):
    """Lets answers continue for a while after a signal to end, then ends them with an error that clients can read."""

    def __init__(self, app: object, models: Sequence[Served], settings: ServeSettings) -> None:
        super().__init__(uvicorn_config(app, settings))
        self._models, self._drain = models, settings.drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts no more requests, and returns once all answers have ended."""
        ending = asyncio.create_task(self._end_answers())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_answers(self) -> None:
        await asyncio.sleep(self._drain)
        for model in self._models:
            await asyncio.to_thread(model.worker.stop)


def uvicorn_config(app: object, settings: ServeSettings) -> uvicorn.Config:
    """Returns uvicorn's configuration: quiet, and without waiting forever for streams at the end."""
    logging.getLogger("decausal.serving").setLevel(logging.INFO)
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(settings.drain) + GRACE_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        server_header=False,
        ws="none",
        http=connection_class(settings.timeout),
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )


def _listener(settings: ServeSettings) -> socket.socket:
    """Binds the address before the model is loaded, so that a taken address is reported at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {settings.host}: {error.strerror or error}; give an address of this machine") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; give another --port (0 takes a "
            "free one)"
        ) from None
    return listener


def _raise_file_limit() -> None:
    """Raises the limit of open files to what the system allows. Every client is one, and the usual limit is only
    1024."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
