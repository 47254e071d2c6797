"""The kinds of attention layout, without tensors, so that facts are checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from decausal.errors import UserError, nearest

LAYOUT_KINDS = ("causal", "bidirectional", "block")


@dataclass(frozen=True)
class Layout:
    """Who attends to whom inside one document.

    Attributes:
        kind: ``"causal"`` (a token reads itself and what precedes it), ``"bidirectional"`` (a token reads its whole
            document) or ``"block"`` (bidirectional inside a block, causal over blocks).
        block_size: Tokens per block, for ``"block"`` only. Blocks lie on a grid that starts with each document: the
            block of position p is ``p // block_size``.
        causal_context: Only for ``"block"``: finished tokens read each other causally, as the autoregressive model did,
            instead of in both directions inside their block.
        causal_groups: Only for ``"block"``: tokens of a noised block read no later ones of it, so that the block's
            first tokens do not depend on its length.

    Raises:
        UserError: For an unknown kind, or a block size, a context or groups that do not fit it.
    """

    kind: str
    block_size: int | None = None
    causal_context: bool = False
    causal_groups: bool = False

    def __post_init__(self) -> None:
        if self.kind not in LAYOUT_KINDS:
            accepted = ", ".join(LAYOUT_KINDS)
            hint = nearest(self.kind, LAYOUT_KINDS)
            raise UserError(f"layout '{self.kind}' is not known{hint}; accepted: {accepted}")
        if self.kind == "block" and (self.block_size is None or self.block_size < 1):
            raise UserError(f"layout 'block' has block_size {self.block_size}; give a number of tokens of at least 1")
        if self.kind != "block" and self.block_size is not None:
            raise UserError(
                f"layout '{self.kind}' has block_size {self.block_size}; leave it out, or use layout 'block'"
            )
        for name in ("causal_context", "causal_groups"):
            if self.kind != "block" and getattr(self, name):
                raise UserError(f"layout '{self.kind}' has {name}; leave it out, or use layout 'block'")
