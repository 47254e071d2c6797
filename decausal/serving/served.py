"""The models of a server, and their workers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from decausal.errors import UserError, nearest
from decausal.models.architecture import context_length
from decausal.models.checkpoint import Converted, load_causal
from decausal.privacy import without_paths
from decausal.sampling.borders import Vocabulary
from decausal.sampling.engines import engine_for
from decausal.sampling.filling.searching import SearchingEngine
from decausal.sampling.jobs import Engine
from decausal.serving.errors import ApiError
from decausal.serving.metrics import Metrics
from decausal.serving.settings import ServeSettings
from decausal.serving.worker import Worker

DEFAULT_MAX_TOTAL_TOKENS = 4096


@dataclass
class Served:
    """One model with the thread that runs it.

    Attributes:
        name: What clients call it.
        converted: Model, tokenizer, facts.
        max_total_tokens: Longest row.
        worker: Its engine's thread.
        is_source: Whether it is the autoregressive model that another one was made from.
    """

    name: str
    converted: Converted
    max_total_tokens: int
    worker: Worker
    is_source: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def card(self) -> dict[str, Any]:
        """Returns the model's entry in /v1/models."""
        facts = self.converted.facts
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "decausal",
            "max_model_len": self.max_total_tokens,
            "decausal": {
                "layout": facts.layout,
                "block_size": facts.block_size,
                "shift": facts.shift,
                "source": without_paths(facts.source),
                "sampler": facts.sampler,
                "is_source": self.is_source,
                "has_chat": bool(self.converted.tokenizer.chat_template),
                "has_infill": facts.layout == "bidirectional",
            },
        }


def served(
    name: str, converted: Converted, settings: ServeSettings, metrics: Metrics, is_source: bool = False
) -> Served:
    """Returns a model ready to be started.

    Raises:
        UserError: `max_total_tokens` exceeds the model's context.
    """
    context = context_length(converted.model.config)
    longest = settings.max_total_tokens or min(context or DEFAULT_MAX_TOTAL_TOKENS, DEFAULT_MAX_TOTAL_TOKENS)
    longest = min(longest, context or longest)
    longest -= longest % (converted.facts.block_size or 1)
    if longest < 2:
        raise UserError(
            f"--max_total_tokens {settings.max_total_tokens} leaves no room for a block of {converted.facts.block_size}"
        )

    def make_engine() -> Engine:
        engine = engine_for(
            converted,
            max_rows=settings.max_rows,
            max_length=longest,
            is_autoregressive=is_source,
            cuda_graphs=settings.cuda_graphs,
            compile_layers=settings.compile_layers and not is_source,
            prefix_cache_tokens=settings.prefix_cache_tokens,
        )
        if converted.facts.layout != "bidirectional":
            return engine
        return SearchingEngine(engine, converted, settings.max_rows)

    if converted.facts.layout == "bidirectional":
        Vocabulary.of(converted.tokenizer)  # otherwise the first request with a gap would wait for it
    worker = Worker(
        make_engine,
        name=name,
        max_rows=settings.max_rows,
        max_queue=settings.max_queue,
        metrics=metrics,
    )
    return Served(name, converted, longest, worker, is_source)


def source_of(converted: Converted) -> Converted:
    """Loads the autoregressive model that a converted one was made from.

    Raises:
        UserError: The source is no longer there.
    """
    facts, model = converted.facts, converted.model
    return load_causal(facts.source, model.dtype, model.device, facts.source_revision)


def find(models: Sequence[Served], name: str | None) -> Served:
    """Returns the model of that name, or the first one without a name.

    Raises:
        ApiError: 404.
    """
    if name is None:
        return models[0]
    for model in models:
        if model.name == name:
            return model
    names = [model.name for model in models]
    hint = nearest(name, names) or f"; there is: {', '.join(names)}"
    raise ApiError(404, f"model '{name}' is not served here{hint}", param="model", code="model_not_found")
