"""Gated adapters act only at masks, so that everything else is the source, bit for bit.

A gated conversion does not change the autoregressive model. The input of LoRA layers is multiplied by whether a token
is a mask, so their product is exactly 0 elsewhere. They have no bias. The mask token's input row is a separate
parameter, and its id lies beyond the embedding, so tokenizer and matrix do not change. Such an adapter can never be
merged.

Source: gated LoRA, Your LLM knows the future (arXiv 2507.11851); residual I-DLM, I-DLM (arXiv 2604.11035).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decausal.errors import UserError
from decausal.models.backbone import stock_model
from decausal.models.mask_row import MASK_ROW, scaled_as_embeddings

_GATE = "decausal_gate"


@dataclass
class Gate:
    """Where a gated model's adapters act in the pass that runs.

    Attributes:
        mask_token_id: What a mask is.
        is_mask: Tokens of the pass that are masks.
        is_open: Whether any token of the pass is a mask. If not, adapters are not run at all.
    """

    mask_token_id: int
    is_mask: Bool[Tensor, "b q"] | None = None
    is_open: bool = True

    def read(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Finds the masks before the embedding, which may lack a row for their id."""
        input_ids = args[0]
        if not self.is_open:
            return args
        self.is_mask = input_ids == self.mask_token_id
        return (torch.where(self.is_mask, 0, input_ids), *args[1:])

    def put_row(self, embedding: nn.Module, _: tuple[Any, ...], output: Float[Tensor, "b q D"]) -> Tensor:
        """Gives the masks their row after the embedding."""
        if not self.is_open:
            return output
        assert self.is_mask is not None
        return torch.where(self.is_mask[..., None], scaled_as_embeddings(embedding.mask_row, embedding, output), output)

    def close(self, _: nn.Module, args: Any) -> Any:
        """Sets everything except masks to 0 before an adapter's first matrix."""
        (states,) = args
        assert self.is_mask is not None
        if states.shape[:-1] != self.is_mask.shape:
            raise UserError(
                "a gated adapter is on a layer that does not read one state per token "
                f"(states {tuple(states.shape)}, tokens {tuple(self.is_mask.shape)}); name others with "
                "--lora_target_modules"
            )
        return (states * self.is_mask[..., None].to(states.dtype),)


def install_gate(model: nn.Module, mask_token_id: int, row: Float[Tensor, " D"]) -> None:
    """Makes the LoRA layers of a model act only at masks, and gives masks a separate, trainable row.

    Args:
        model: A PEFT wrapper around a stock causal LM, or the stock model with adapters in it; changed in place.
        mask_token_id: Id of the mask token; the embedding need not have it.
        row: The initial row of the mask token.

    Raises:
        UserError: There are no adapters, or they have a bias.
    """
    from peft.tuners.lora import LoraLayer

    gate = Gate(mask_token_id)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise UserError("gated weights need LoRA adapters; give --lora_r a rank")
    for layer in layers:
        for name, first in layer.lora_A.items():
            if getattr(layer.lora_B[name], "bias", None) is not None:
                raise UserError("gated weights need LoRA adapters without a bias: it would be added at every token")
            first.register_forward_pre_hook(gate.close)
        _skip_while_closed(layer, gate)
    embedding = stock_model(model).get_input_embeddings()
    embedding.mask_token_id = mask_token_id
    embedding.register_parameter(MASK_ROW, nn.Parameter(row.detach().clone()))
    embedding.register_forward_pre_hook(gate.read)
    embedding.register_forward_hook(gate.put_row)
    setattr(stock_model(model), _GATE, gate)


def is_gated(model: nn.Module) -> bool:
    """Returns whether `install_gate` was called on a model."""
    return _gate_of(model) is not None


@contextmanager
def without_masks(model: nn.Module) -> Iterator[None]:
    """Skips a gated model's adapters, which would add zeros, in passes without masks.

    Inside, a gated model is the source, and as fast. Other models are not changed.
    """
    gate = _gate_of(model)
    if gate is None:
        yield
        return
    was_open, gate.is_open = gate.is_open, False
    try:
        yield
    finally:
        gate.is_open = was_open


def gated_mask_token_id(model: PreTrainedModel) -> int:
    """Returns the mask token's id in a gated model: the first one beyond the embedding, so that no text can hold it."""
    return len(model.get_input_embeddings().weight)


def initial_row(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Float[Tensor, " D"]:
    """Returns the initial row of a gated mask token: the mean of the rows that the tokenizer uses."""
    weight = model.get_input_embeddings().weight.detach()
    used = torch.tensor(sorted(index for index in set(tokenizer.get_vocab().values()) if index < len(weight)))
    return weight[used.to(weight.device)].mean(dim=0, dtype=torch.float32).to(weight.dtype)


def _gate_of(model: nn.Module) -> Gate | None:
    return getattr(stock_model(model), _GATE, None)


def _skip_while_closed(layer: nn.Module, gate: Gate) -> None:
    with_adapter = layer.forward

    def forward(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if gate.is_open:
            return with_adapter(states, *args, **kwargs)
        return layer.base_layer(states, *args, **kwargs)

    layer.forward = forward
