"""Settings for the facts that are stored with the weights: who attends to whom, shift and mask token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from decausal.errors import UserError
from decausal.training.settings.data import RecordSettings
from decausal.training.settings.field import at_least, setting


@dataclass(frozen=True)
class LayoutSettings(RecordSettings):
    """Facts stored with the weights."""

    layout: Literal["causal", "bidirectional", "block"] | None = setting(
        None,
        "who attends to whom after the conversion; block: in both directions inside a block, causal over blocks; "
        "unset: that of a converted model, else bidirectional",
    )
    block_size: int | None = setting(None, "tokens per block, for layout block; unset: that of a converted model")
    causal_context: bool | None = setting(
        None,
        "layout block: finished tokens read each other causally, as in the AR model, instead of in both directions "
        "inside their block; unset: that of a converted model, else false",
    )
    causal_groups: bool | None = setting(
        None,
        "layout block: masks read no later masks of their block, so that its first drafts do not depend on its length; "
        "such a model drafts for verified decoding alone; unset: that of a converted model, else false",
    )
    shift: Literal[0, 1] | None = setting(
        None,
        "1: the state before a token predicts it, as in the AR model; 0: the state at its own place does; unset: that "
        "of a converted model, else 1",
    )
    mask_token: str | None = setting(
        None, "text of the mask token; unset: the tokenizer's own, else <|mask|> on a spare or an added row"
    )
    anneal_steps: int = setting(0, "steps over which attention opens from causal to the layout; 0: open from the start")

    def check(self) -> None:
        at_least(self, anneal_steps=0)

    def check_facts(self) -> None:
        if self.layout == "block":
            if self.block_size is None:
                raise UserError("--layout block needs --block_size: tokens per block, for example 4")
            at_least(self, block_size=1)
            if self.block_size > self.max_length:
                raise UserError(
                    f"--block_size {self.block_size} is over --max_length {self.max_length}: a block must fit in a row"
                )
            if self.anneal_steps:
                raise UserError(f"--anneal_steps {self.anneal_steps} is not for --layout block; leave it out")
            return
        if self.block_size is not None:
            raise UserError(f"--block_size {self.block_size} is for --layout block, not {self.layout}; give none")
        for name in ("causal_context", "causal_groups"):
            if getattr(self, name):
                raise UserError(f"--{name} is for --layout block, not {self.layout}; leave it out")

    def refuse_without_finished_tokens(self, loss: str) -> None:
        """Refuses the weight of a loss at finished tokens where no row holds any."""
        if getattr(self, f"{loss}_weight") and self.layout != "block":
            raise UserError(
                f"--{loss}_weight is for --layout block, not {self.layout}: only its rows hold finished tokens"
            )
