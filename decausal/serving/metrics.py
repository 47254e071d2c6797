"""The metrics that Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from decausal.sampling.jobs import Drafts, Progress

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server. They have their own registry, so that several servers in one process do not add up."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._made(Counter, "requests", "Answered requests", ("endpoint", "status"))
        self._seconds = self._made(Histogram, "request_seconds", "Time to the end of an answer", ("endpoint",))
        self._first = self._made(
            Histogram, "time_to_first_token_seconds", "Time to the first final text", ("endpoint",)
        )
        self._running = self._made(Gauge, "rows_running", "Rows in the engine", ("model",))
        self._waiting = self._made(Gauge, "rows_waiting", "Rows that wait for a place", ("model",))
        self._prompt_tokens = self._made(Counter, "prompt_tokens", "Given tokens", ("model",))
        self._tokens = self._made(Counter, "generated_tokens", "Tokens of rows that ended", ("model",))
        self._forwards = self._made(Counter, "row_forwards", "Forward passes of rows that ended", ("model",))
        self._from_cache = self._made(Counter, "prefix_cache_tokens", "Given tokens that were held already", ("model",))
        self._drafted = self._made(Counter, "drafts_verified", "Drafts after right ones", ("model", "position"))
        self._right = self._made(Counter, "drafts_right", "Of these, the right ones", ("model", "position"))
        self._shapes = self._made(Counter, "draft_passes", "Passes of rows that ended, by shape", ("model", "shape"))
        self._draft_tokens = self._made(Counter, "draft_pass_tokens", "Tokens that these brought", ("model",))
        self._steps = self._made(Counter, "engine_steps", "Steps of the engine", ("model",))
        self._step_seconds = self._made(Counter, "engine_step_seconds", "Time spent in steps", ("model",))
        self._cancelled = self._made(Counter, "cancelled_requests", "Clients that left before the end", ("endpoint",))

    def _made(self, kind: type, name: str, text: str, labels: tuple[str, ...]) -> Counter | Gauge | Histogram:
        extra = {"buckets": SECONDS} if kind is Histogram else {}
        return kind(f"decausal_{name}", text, labels, registry=self.registry, **extra)

    def request(self, endpoint: str, status: int) -> None:
        """Counts an answer by its status."""
        self._requests.labels(endpoint, str(status)).inc()

    def answered(self, endpoint: str, seconds: float) -> None:
        """Counts the time of an answer that ended."""
        self._seconds.labels(endpoint).observe(seconds)

    def first_text(self, endpoint: str, seconds: float) -> None:
        """Counts the time to the first final text."""
        self._first.labels(endpoint).observe(seconds)

    def cancelled(self, endpoint: str) -> None:
        """Counts a client that left."""
        self._cancelled.labels(endpoint).inc()

    def taken(self, model: str, num_prompt_tokens: int) -> None:
        """Counts the given tokens of a request."""
        self._prompt_tokens.labels(model).inc(num_prompt_tokens)

    def rows(self, model: str, num_running: int, num_waiting: int) -> None:
        """Sets how many rows run and wait."""
        self._running.labels(model).set(num_running)
        self._waiting.labels(model).set(num_waiting)

    def step(self, model: str, steps: Sequence[Progress], seconds: float) -> None:
        """Counts one step of the engine."""
        self._steps.labels(model).inc()
        self._step_seconds.labels(model).inc(seconds)
        ended = [progress.ended for progress in steps if progress.ended]
        self._forwards.labels(model).inc(sum(row.num_forwards for row in ended))
        self._tokens.labels(model).inc(sum(len(row.ids) for row in ended))
        self._from_cache.labels(model).inc(sum(row.num_prefix_tokens for row in ended))
        drafts = Drafts.sum(row.drafts for row in ended)
        if drafts is not None:
            self._speculated(model, drafts)

    def _speculated(self, model: str, drafts: Drafts) -> None:
        """Counts what became of drafts, by their position from 1."""
        for position, (verified, right) in enumerate(zip(drafts.num_verified, drafts.num_right, strict=True), 1):
            self._drafted.labels(model, str(position)).inc(verified)
            self._right.labels(model, str(position)).inc(right)
        for shape, count in drafts.passes.items():
            self._shapes.labels(model, shape).inc(count)
        self._draft_tokens.labels(model).inc(drafts.num_tokens)

    def text(self) -> bytes:
        """Returns the page that Prometheus reads."""
        return generate_latest(self.registry)
