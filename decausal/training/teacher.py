"""The frozen AR model: reads clean rows causally and gives its hidden states where the student is compared with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from decausal.diffusion.layout import Layout
from decausal.models.backbone import body_forward, decoder_layers

CAUSAL = Layout("causal")


class Teacher:
    """Runs the body only (no head, and no layer beyond the last that is asked for), once per clean batch.

    State l is the embedding output for l = 0, the output of layer l for 0 < l < L, and the state after the final
    norm for l = L. Each layer's full state is dropped as soon as the rows that are asked for are gathered, so memory
    beyond the model is len(layers) * m * D elements, never L * B * T * D.
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
            if len(gathered) == len(set(layers)):
                raise _AllGathered

        blocks = decoder_layers(self.model)
        hooks = [
            blocks[layer].register_forward_pre_hook(_gather_input(gather, layer), with_kwargs=True)
            for layer in set(layers)
            if layer < len(blocks)
        ]
        try:
            with torch.no_grad():
                output = body_forward(
                    self.model, clean_ids, CAUSAL, document_ids=document_ids, position_ids=position_ids
                )
            gather(len(blocks), output.last_hidden_state)
        except _AllGathered:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return [gathered[layer] for layer in layers]


class _AllGathered(Exception):  # noqa: N818
    """Ends the teacher's pass before the first layer that nobody is compared with."""


def _gather_input(gather: Callable[[int, Tensor], None], layer: int) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        gather(layer, args[0] if args else kwargs["hidden_states"])

    return hook
