"""The doctor's questions: short forward passes whose outcome is known from the mathematics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from decausal.diffusion.layout import Layout
from decausal.models.architecture import configured, reach, sliding_windows
from decausal.models.backbone import body_forward, decoder_layers, head_of, logits, stock_model
from decausal.models.block_cache import decoding, is_same_cached
from decausal.models.rounding import PROBE_LENGTH, Ask, Resolution, distance, relative_change
from decausal.objectives import head as output_head

CAUSAL, BIDIRECTIONAL, BLOCKWISE = Layout("causal"), Layout("bidirectional"), Layout("block", 4)
SPLIT = 5  # the packed row holds two documents, of 5 and 7 tokens
SHRUNK_WINDOW = 4


@dataclass(frozen=True)
class Question:
    """One question to a model.

    Attributes:
        name: The property that should hold.
        ask: Returns whether it does at a resolution, and what was measured.
        explanation: What it means if the property does not hold.
        required: Whether the model is then unusable.
        of_all_layers: Whether the answer concerns every layer, not only how each kind of layer reads.
    """

    name: str
    ask: Ask
    explanation: str
    required: bool = True
    of_all_layers: bool = False


def _head_is_read(model: nn.Module, resolution: Resolution) -> tuple[bool, float]:
    ids, bodies = _row(model), []
    body = stock_model(model).base_model
    hook = body.register_forward_hook(lambda _, args, output: bodies.append(output))
    try:
        expected = _stock_logits(model, ids)
        if not bodies:  # OPT calls a part of its body by this name
            with configured(stock_model(model).config, is_causal=True):
                body(input_ids=ids, use_cache=False, return_dict=True)
    finally:
        hook.remove()
    found = output_head.logits(bodies[0].last_hidden_state.flatten(0, 1), head_of(model))
    return _agree(found.unflatten(0, ids.shape), expected, resolution)


def _causal_is_the_source(model: nn.Module, resolution: Resolution) -> tuple[bool, float]:
    ids = _row(model)
    return _agree(logits(model, ids, CAUSAL), _stock_logits(model, ids), resolution)


def _stock_logits(model: nn.Module, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
    stock = stock_model(model)
    with configured(stock.config, is_causal=True):
        return stock(input_ids=ids, use_cache=False, return_dict=True).logits


def _masks_are_honoured(model: nn.Module, resolution: Resolution) -> tuple[bool, float]:
    stock, ids = stock_model(model), _row(model)
    is_windowed = any(window is not None for window in sliding_windows(stock.config).values())
    changes = {"is_causal": True} | ({"sliding_window": SHRUNK_WINDOW} if is_windowed else {})
    with configured(stock.config, **changes):
        expected = stock.base_model(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
        found = body_forward(model, ids, CAUSAL, document_ids=torch.zeros_like(ids)).last_hidden_state
    return _agree(found, expected, resolution)


def _states_are_complete(model: nn.Module, _: Resolution) -> tuple[bool, float | str]:
    layers, seen = decoder_layers(model), []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        output = body_forward(model, _row(model), CAUSAL, output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
    # These must be the same tensor: no rounding comes between them.
    furthest = max(distance(found, expected) for found, expected in zip(output.hidden_states, seen, strict=False))
    return len(seen) == len(layers) and furthest == 0, furthest


def _both_ways_is_seen(model: nn.Module, resolution: Resolution) -> tuple[bool, str]:
    return _influence_is(model, resolution, BIDIRECTIONAL, lambda query, key: torch.ones_like(query == key))


def _block_is_seen(model: nn.Module, resolution: Resolution) -> tuple[bool, str]:
    size = BLOCKWISE.block_size
    return _influence_is(model, resolution, BLOCKWISE, lambda query, key: key // size <= query // size)


def _documents_are_isolated(model: nn.Module, resolution: Resolution) -> tuple[bool, float]:
    ids, document_ids = _row(model), _documents(model)
    first, second = slice(None, SPLIT), slice(SPLIT, None)
    changed_first, changed_second = ids.clone(), ids.clone()
    changed_first[:, first] = _other(model, ids)[:, first]
    changed_second[:, second] = _other(model, ids)[:, second]
    rows = torch.cat([ids, changed_first, changed_second])
    states = body_forward(
        model, rows, BIDIRECTIONAL, document_ids=document_ids.expand_as(rows).contiguous()
    ).last_hidden_state
    leak = max(distance(states[2, first], states[0, first]), distance(states[1, second], states[0, second]))
    return leak <= resolution.equal, leak


def _documents_are_whole(model: nn.Module, resolution: Resolution) -> tuple[bool, float]:
    ids, document_ids = _row(model), _documents(model)
    packed = body_forward(model, ids, BIDIRECTIONAL, document_ids=document_ids).last_hidden_state
    alone = [body_forward(model, part, BIDIRECTIONAL).last_hidden_state for part in (ids[:, :SPLIT], ids[:, SPLIT:])]
    return _agree(packed, torch.cat(alone, dim=1), resolution)


def _plain_class_agrees(model: nn.Module, resolution: Resolution) -> tuple[bool, float]:
    stock = stock_model(model)
    windows = [window for window in sliding_windows(stock.config).values() if window is not None]
    ids = _row(model)[:, : min(windows, default=PROBE_LENGTH)]  # beyond a window, transformers defines the width
    expected = body_forward(model, ids, BIDIRECTIONAL).last_hidden_state
    with configured(stock.config, is_causal=False):
        found = stock.base_model(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
    return _agree(found, expected, resolution)


def _cache_is_exact(model: nn.Module, resolution: Resolution) -> tuple[bool, float]:
    with decoding(model):
        return is_same_cached(model, resolution)


QUESTIONS = (
    Question(
        "output head is understood",
        _head_is_read,
        "its head is more than a matrix, a scale and a soft cap, so losses would be computed on wrong logits",
    ),
    Question(
        "causal layout reproduces the source model",
        _causal_is_the_source,
        "under the causal layout it does not compute what the stock model computes, so what it learned would be lost",
    ),
    Question(
        "explicit attention masks are honoured",
        _masks_are_honoured,
        "it ignores or alters the attention mask that it is given",
    ),
    Question(
        "hidden states are complete",
        _states_are_complete,
        "its hidden states are not its layers' inputs and the state after the final norm, so they cannot be aligned",
        of_all_layers=True,
    ),
    Question(
        "bidirectional layout: every token changes every state",
        _both_ways_is_seen,
        "a later token does not change an earlier state: some part of it stays causal whatever its arguments",
    ),
    Question(
        "block layout: a state reads its block and earlier ones only",
        _block_is_seen,
        "states read other tokens than the block layout allows",
    ),
    Question(
        "packed documents do not leak into each other",
        _documents_are_isolated,
        "a document's states change with its neighbour in the row",
    ),
    Question(
        "a packed document equals the same document alone",
        _documents_are_whole,
        "it does not restart positions with each document, so packing would change what it reads",
    ),
    Question(
        "the plain transformers class reads both ways",
        _plain_class_agrees,
        "the plain class stays causal whatever its configuration says: load the converted model by decausal only",
        required=False,
    ),
    Question(
        "states are the same with a key/value cache",
        _cache_is_exact,
        "its attention does not take the key/value cache, so it cannot be decoded in blocks",
        required=False,
    ),
)


def _row(model: nn.Module) -> Int[Tensor, "1 T"]:
    embedding = stock_model(model).get_input_embeddings().weight
    return (torch.arange(PROBE_LENGTH, device=embedding.device)[None] * 37 + 7) % len(embedding)


def _other(model: nn.Module, ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    return (ids + 11) % len(stock_model(model).get_input_embeddings().weight)


def _documents(model: nn.Module) -> Int[Tensor, "1 T"]:
    return (torch.arange(PROBE_LENGTH, device=_row(model).device)[None] >= SPLIT).long()


def _influence_is(
    model: nn.Module, resolution: Resolution, layout: Layout, is_visible: Callable[[Tensor, Tensor], Tensor]
) -> tuple[bool, str]:
    """Returns whether changing a token changes exactly the states that see it, within sliding windows.

    A change that is seen only has to exceed rounding, however faint it is after many layers. A state that does not see
    it may still differ by rounding, since kernels sum in another order and experts group differently.
    """
    ids = _row(model)
    changed = torch.where(torch.eye(PROBE_LENGTH, dtype=torch.bool, device=ids.device), _other(model, ids), ids)
    states = body_forward(model, torch.cat([ids, ids, changed]), layout).last_hidden_state
    change: Float[Tensor, "T T"] = relative_change(states[2:], states[0].expand_as(states[2:])).T
    chance = relative_change(states[1], states[0]).max()
    position = torch.arange(PROBE_LENGTH, device=ids.device)
    query, key = position[:, None], position[None, :]
    width = reach(stock_model(model).config)
    is_expected = is_visible(query, key) & ((query - key).abs() <= (PROBE_LENGTH if width is None else width))
    is_right = torch.where(is_expected, change > chance.clamp_min(resolution.seen), change <= resolution.equal)
    wrong = int((~is_right).sum())
    return wrong == 0, f"{wrong} of {is_right.numel()} pairs wrong"


def _agree(
    found: Float[Tensor, "*rows D"], expected: Float[Tensor, "*rows D"], resolution: Resolution
) -> tuple[bool, float]:
    measured = distance(found, expected)
    return measured <= resolution.equal, measured
