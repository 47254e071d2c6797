"""One pass over clean rows and their groups of masks: first the clean tokens, causally, then the masks.

Masks read the keys and values of the clean tokens, which never read masks. So the clean half is the causal model's own
pass, whatever the groups. Without gradients it stores nothing for a backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from decausal.diffusion.groups import Groups, visible_to_groups
from decausal.diffusion.layout import Layout, positions_in_documents
from decausal.models.attention_plans import without_plans
from decausal.models.backbone import body_forward, masked_forward, stock_model
from decausal.models.draft_head import drafting_states
from decausal.models.gated import without_masks
from decausal.models.row_attention import FLEX

CAUSAL = Layout("causal")


class GroupedStates(NamedTuple):
    """States of all clean tokens, row after row, and then of all masks: N = B*T + B*G.

    Attributes:
        last: The states after the final norm; those of masks also after the draft head, if the model has one.
        layers: The states of all layers, if they were asked for, see `body_forward`.
    """

    last: Float[Tensor, "N D"]
    layers: tuple[Float[Tensor, "N D"], ...] | None


def grouped_forward(
    model: nn.Module,
    clean_ids: Int[Tensor, "B T"],
    groups: Groups,
    mask_token_id: int,
    *,
    document_ids: Int[Tensor, "B T"] | None = None,
    position_ids: Int[Tensor, "B T"] | None = None,
    causal_groups: bool = False,
    clean_gradient: bool = True,
    output_hidden_states: bool = False,
) -> GroupedStates:
    """Runs the model's body, without its head, over clean rows and their groups.

    Args:
        model: Any stock causal LM, or a PEFT wrapper around one.
        clean_ids: The clean rows.
        groups: The masks.
        mask_token_id: What the masks are.
        document_ids, position_ids: Those of the clean rows, see `body_forward`.
        causal_groups: Masks read no later ones of their group.
        clean_gradient: Whether gradients flow through the clean half. Without them, a gated model's adapters, which
            would add zeros there, are not run.
        output_hidden_states: Also return the states of all layers.
    """
    cache = _CleanKeys(stock_model(model).base_model.config.num_hidden_layers)
    with nullcontext() if clean_gradient else _frozen(model):
        clean = body_forward(
            model,
            clean_ids,
            CAUSAL,
            document_ids=document_ids,
            position_ids=position_ids,
            output_hidden_states=output_hidden_states,
            cache=cache,
        )
    cache.is_read = True
    documents = torch.zeros_like(clean_ids) if document_ids is None else document_ids
    positions = positions_in_documents(documents) if position_ids is None else position_ids
    is_visible = partial(visible_to_groups, groups, documents, positions, causal=causal_groups)
    with _dense_attention(model):
        masks = masked_forward(
            model,
            torch.full_like(groups.position_ids, mask_token_id),
            groups.position_ids,
            is_visible,
            cache,
            output_hidden_states=output_hidden_states,
        )
    layers = None
    if output_hidden_states:
        layers = tuple(_joined(*pair) for pair in zip(clean.hidden_states, masks.hidden_states, strict=True))
    last = clean.last_hidden_state.flatten(0, 1), masks.last_hidden_state.flatten(0, 1)
    return GroupedStates(torch.cat([last[0], drafting_states(model, clean_ids, groups, *last)]), layers)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    with torch.no_grad(), without_masks(model):
        yield


@contextmanager
def _dense_attention(model: nn.Module) -> Iterator[None]:
    """Uses attention with any mask and without plans, since the number of masks differs between batches."""
    config = stock_model(model).base_model.config
    implementation = config._attn_implementation
    if implementation == FLEX:
        config._attn_implementation = "sdpa"
    try:
        with without_plans():
            yield
    finally:
        config._attn_implementation = implementation


def _joined(clean: Float[Tensor, "B T D"], masks: Float[Tensor, "B G D"]) -> Float[Tensor, "N D"]:
    return torch.cat([clean.flatten(0, 1), masks.flatten(0, 1)])


class _CleanKeys(Cache):
    """Keys and values of the clean tokens, which the masks read in front of their own.

    Attributes:
        is_read: False while the clean tokens are written.
    """

    def __init__(self, num_layers: int) -> None:
        self.is_read = False
        super().__init__(layers=[_CleanLayer(self) for _ in range(num_layers)])


class _CleanLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, cache: _CleanKeys) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self._cache.is_read:
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        return torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)

    def get_seq_length(self) -> int:
        return 0  # positions are always given

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length + (self.keys.shape[2] if self._cache.is_read else 0), 0
