"""Settings and limits of `decausal serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from decausal.errors import UserError
from decausal.sampling.settings import COUNTS_BELOW, MOST_ROWS

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_UNKNOWN_GAPS = 8
MAX_GAPS = 256
MAX_STOP_LENGTH = 1024
MAX_MESSAGES = 16384
MAX_PROMPTS = 16384
MAX_TOOL_CALLS = 128
MAX_TOOLS = 128
MAX_FIELDS = 256
MAX_BRACKETS = 2**18
"""The most lists and objects of a body, and brackets in its texts. Reading a million stops every thread for a
second."""
SHARE_OF_OTHERS = 32
"""One part in so many of the queue is kept from each client, so that others find a place."""
LARGE = 2**16
"""Bytes of a body, or characters of its texts, from which it counts as large and takes its turn."""


@dataclass(frozen=True)
class ServeSettings:
    """Where to listen, and limits.

    Attributes:
        host: Address to listen on. The default can only be reached from this machine.
        port: Port to listen on; 0 takes a free one.
        max_rows: Rows denoised together. A request has one row for each prompt times `n`.
        max_queue: Rows that may wait. Requests beyond them are refused with status 429.
        max_total_tokens: Longest row, given and written tokens together. None: the model's context, at most 4096.
        timeout: Seconds that one request may take, including the wait.
        drain: Seconds that answers may continue after a signal to end. Then streams end with an error event.
        api_key: What clients must send as `Authorization: Bearer KEY`. None: no key is needed.
        allowed_hosts: Further names under which the server may be called, for example through a proxy; `*` allows every
            name.
        model_name: The model's name for clients. None: the name of its directory.
        chat_template: A file with another chat template than the model's own, or its text.
        chat_template_kwargs: Values that the chat template reads, unless a request gives others.
        cuda_graphs: Whether to record the passes of a block model as CUDA graphs. None: on a GPU, if possible.
        compile_layers: Whether to compile the decoder layers of a block model for recorded passes. The server starts
            minutes later, and passes of few rows are faster.
        prefix_cache_tokens: Under self-speculation, tokens of shared beginnings to hold, so that a system prompt is
            read once. 0: none.
        max_body_bytes: Longest body of a request.

    Raises:
        UserError: A value is outside its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_rows: int = 16
    max_queue: int = 1024
    max_total_tokens: int | None = None
    timeout: float = 300.0
    drain: float = 5.0
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    model_name: str | None = None
    cuda_graphs: bool | None = None
    compile_layers: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prefix_cache_tokens: int = 0
    max_body_bytes: int = 4 * 2**20

    def __post_init__(self) -> None:
        rules = {
            "port": (0 <= self.port < 2**16, "from 0 to 65535"),
            "max_rows": (1 <= self.max_rows <= MOST_ROWS, f"from 1 to {MOST_ROWS}"),
            "max_queue": (0 <= self.max_queue < COUNTS_BELOW, "at least 0 and below 2**31"),
            "max_total_tokens": (
                self.max_total_tokens is None or 2 <= self.max_total_tokens < COUNTS_BELOW,
                "at least 2 and below 2**31",
            ),
            "timeout": (0 < self.timeout < float("inf"), "seconds above 0"),
            "drain": (0 <= self.drain < float("inf"), "seconds of at least 0"),
            "api_key": (self.api_key is None or self.api_key.strip() == self.api_key != "", "a word without spaces"),
            "allowed_hosts": (
                all(host and not set(host) & set("/:@ ") for host in self.allowed_hosts),
                "names without scheme and port, such as llm.example.com, or * for every one",
            ),
            "prefix_cache_tokens": (0 <= self.prefix_cache_tokens < COUNTS_BELOW, "at least 0 and below 2**31"),
            "model_name": (self.model_name != "", "not empty"),
        }
        for name, (is_accepted, accepted) in rules.items():
            if not is_accepted:
                raise UserError(f"--{name}={getattr(self, name)!r} is not accepted: it must be {accepted}")
