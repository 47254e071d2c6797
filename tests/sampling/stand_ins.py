"""Facts, and models whose distributions are written by hand."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decausal.models.facts import ConversionFacts
from decausal.objectives.head import Head
from decausal.sampling.bidirectional import denoiser, row_engine, window_cache


def conversion_facts(mask_token_id: int, **changes: Any) -> ConversionFacts:
    """Facts of a bidirectional model without shift, unless changed."""
    facts = {
        "source": "tiny",
        "source_revision": None,
        "layout": "bidirectional",
        "block_size": None,
        "shift": 0,
        "mask_token_id": mask_token_id,
        "noise_schedule": "linear",
        "recipe": {},
        "decausal_version": "0",
        "sampler": {},
    }
    return ConversionFacts(**{**facts, **changes})


class WrittenModel(nn.Module):
    """A model without weights: states are logits, written by a function of the ids. Records the shapes it is given."""

    def __init__(self, logits_of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.logits_of = logits_of
        self.device_marker = nn.Parameter(torch.zeros(1))
        self.shapes: list[tuple[int, ...]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch, vocab_size: int) -> WrittenModel:
        monkeypatch.setattr(window_cache, "body_forward", self._body_forward)
        head = Head(torch.eye(vocab_size))
        monkeypatch.setattr(denoiser, "denoising_head", lambda model, token_id: head._replace(banned=token_id))
        monkeypatch.setattr(row_engine, "decoding", lambda model: torch.no_grad())
        return self

    @staticmethod
    def _body_forward(model: WrittenModel, ids: Tensor, layout: Any, document_ids: Any = None) -> SimpleNamespace:
        model.shapes.append(tuple(ids.shape))
        return SimpleNamespace(last_hidden_state=model.logits_of(ids))


def written(monkeypatch: pytest.MonkeyPatch, probabilities: list[list[float]]) -> WrittenModel:
    """A model that says the same of each position whatever it reads.

    The vocabulary's last token is the mask token, and the model is sure of it everywhere: only the ban keeps it out.
    """
    table = torch.tensor(probabilities).log()
    table = torch.cat([table, torch.full((len(table), 1), 50.0)], dim=1)
    model = WrittenModel(lambda ids: table[: ids.shape[1]].expand(len(ids), -1, -1))
    return model.install(monkeypatch, table.shape[1])


def sure_of(token: int, probability: float, vocab_size: int) -> list[float]:
    """A distribution with `probability` at one token, the rest spread evenly."""
    rest = (1 - probability) / (vocab_size - 1)
    return [probability if index == token else rest for index in range(vocab_size)]
