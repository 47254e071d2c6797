"""The frozen AR model: reads clean rows causally and gives its hidden states where the student is compared with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from decausal.diffusion.layout import Layout
from decausal.models.backbone import body_forward, decoder_layers

CAUSAL = Layout("causal")


class Teacher:
    """Runs the body only (no head), once per clean batch, and keeps only the rows that are asked for.

    State l is the embedding output for l = 0, the output of layer l for 0 < l < L, and the state after the final
    norm for l = L. Each layer's full state is dropped as soon as its rows are gathered, so memory beyond the model
    is len(layers) * m * D elements, never L * B * T * D.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    def states(
        self,
        clean_ids: Int[Tensor, "B T"],
        index: Int[Tensor, " m"],
        layers: Sequence[int],
        document_ids: Int[Tensor, "B T"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
    ) -> list[Float[Tensor, "m D"]]:
        """Returns the states of `layers` at the flat positions `index` of the clean rows, in the order of `layers`."""
        gathered: dict[int, Tensor] = {}

        def gather(layer: int, hidden: Tensor) -> None:
            gathered[layer] = hidden.flatten(0, 1).index_select(0, index)

        blocks = decoder_layers(self.model)
        hooks = [
            blocks[layer].register_forward_pre_hook(_gather_input(gather, layer), with_kwargs=True)
            for layer in layers
            if layer < len(blocks)
        ]
        try:
            with torch.no_grad():
                output = body_forward(
                    self.model, clean_ids, CAUSAL, document_ids=document_ids, position_ids=position_ids
                )
        finally:
            for hook in hooks:
                hook.remove()
        if len(blocks) in layers:
            gather(len(blocks), output.last_hidden_state)
        return [gathered[layer] for layer in layers]


def _gather_input(gather, layer: int):
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        gather(layer, args[0] if args else kwargs["hidden_states"])

    return hook
