"""Training tokens, counted from the batches that the student reads and the rollouts that it writes, for any recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from decausal.training.losses import StepLoss


class TokenCounts(NamedTuple):
    """Tokens that a run has trained on so far. A token that is trained on twice counts twice.

    Attributes:
        clean: tokens of the clean rows that training forwards read, prompts included, padding not.
        supervised: targets of the loss: positions whose prediction is compared with something.
        generated: tokens that rollouts have written, whether or not they were trained on.
    """

    clean: int = 0
    supervised: int = 0
    generated: int = 0

    @property
    def total(self) -> int:
        """Clean tokens and generated ones."""
        return self.clean + self.generated


def counts_of(batch: Mapping[str, Any]) -> TokenCounts:
    """Returns the clean and supervised tokens of one training batch."""
    clean_ids: Tensor = batch["clean_ids"]
    document_ids = batch.get("document_ids")  # absent where every row is one whole document
    num_clean = clean_ids.numel() if document_ids is None else int((document_ids >= 0).sum())
    return TokenCounts(clean=num_clean, supervised=len(batch["target_ids"]))


@dataclass
class TokenMeter:
    """Counts what a student is trained on, by a hook on its forward pass.

    Attributes:
        counts: so far.
    """

    counts: TokenCounts = field(default_factory=TokenCounts)

    def attach(self, model: nn.Module) -> torch.utils.hooks.RemovableHandle:
        """Counts every training batch that `model` reads from now on; other calls of it count nothing."""
        return model.register_forward_pre_hook(self._count, with_kwargs=True)

    def attach_to_rollouts(self, dataset: Any) -> None:
        """Counts what rollouts write from now on, where the training rows are rollouts."""
        rows = getattr(dataset, "on_policy", None)
        if rows is None:
            return
        roll_out = rows.roll_out

        def counted(tasks: Any) -> Any:
            rollouts = roll_out(tasks)
            self.add(TokenCounts(generated=sum(rollout.end - rollout.prompt_length for rollout in rollouts)))
            return rollouts

        rows.roll_out = counted

    def add(self, counts: TokenCounts) -> None:
        self.counts = TokenCounts(*(before + more for before, more in zip(self.counts, counts, strict=True)))

    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(kwargs.get("inside"), StepLoss):
            self.add(counts_of(kwargs["inside"].batch))
