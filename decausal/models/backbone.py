"""The only way to a model's forward pass: any stock causal LM, under any layout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from decausal.devices import autocast_dtype
from decausal.diffusion.layout import Layout, positions_in_documents
from decausal.errors import UserError
from decausal.models.architecture import sliding_windows
from decausal.models.attention_plans import few_plans
from decausal.models.row_attention import FLEX, RowAttention
from decausal.models.sparse_mask import SparseMask
from decausal.objectives import head as output_head
from decausal.objectives.head import Head

# Families whose stock body becomes bidirectional with `is_causal=False` alone, as tests/models/test_doctor.py measures
# for each. All others get an explicit mask, which is slower but does not depend on the model.
HONOURS_IS_CAUSAL = frozenset(
    """
    apertus arcee cohere cohere2 deepseek_v3 ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode
    gpt_neox gpt_oss granite granitemoe helium llama ministral ministral3 mistral mixtral olmo olmo2 olmo3 olmoe opt phi
    phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 starcoder2
    """.split()  # noqa: SIM905
)


def stock_model(model: nn.Module) -> PreTrainedModel:
    """Returns the transformers model itself, without a PEFT wrapper. Its adapters stay active inside."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body_forward(
    model: nn.Module,
    input_ids: Int[Tensor, "B T"],
    layout: Layout,
    *,
    document_ids: Int[Tensor, "B T"] | None = None,
    position_ids: Int[Tensor, "B T"] | None = None,
    stream_ids: Int[Tensor, "B T"] | None = None,
    future: tuple[Float[Tensor, "S S"], float] | None = None,
    output_hidden_states: bool = False,
    cache: Cache | None = None,
) -> BaseModelOutput:
    """Runs the model's body, without its head, under `layout`.

    Args:
        model: Any stock causal LM, or a PEFT wrapper around one.
        input_ids: The rows.
        layout: Who attends to whom.
        document_ids: Document of each token, -1 for padding. None: every row is one whole document without padding;
            then the model's own attention is used without an explicit mask if it fits the layout.
        position_ids: Positions inside the documents; by default they restart at 0 with each document.
        stream_ids: Streams of a doubled row of block layout (`decausal.diffusion.doubled`); needs its `document_ids`
            and `position_ids`.
        future: (future_order, future_fraction) of `attention_mask`, to anneal attention from causal to `layout`.
        output_hidden_states: Also return L + 1 states: the embedding output, the outputs of layers 1 to L - 1, and the
            state after the final norm, which is `last_hidden_state` itself.
        cache: Empty; takes the keys and values of the rows.

    Raises:
        UserError: The model's attention implementation does not take such a mask.
    """
    body = stock_model(model).base_model
    attention = None
    if stream_ids is not None and (document_ids is None or position_ids is None):
        raise ValueError("stream_ids need document_ids and position_ids: a copy's positions are not those of its place")
    if document_ids is None and position_ids is None and future is None:
        attention = _stock_attention(body.config, layout, input_ids.shape[1])
        if attention is not None and layout.kind == "causal":
            attention |= {"past_key_values": _NO_CACHE if cache is None else cache}
    if attention is None:
        if document_ids is None:
            document_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = positions_in_documents(document_ids)
        masks = _masks(body, RowAttention(layout, document_ids, position_ids, stream_ids, future))
        attention = {"attention_mask": masks, "position_ids": position_ids, "past_key_values": cache}
    with few_plans(body, tuple(input_ids.shape)), _inputs_of_layers(model, output_hidden_states) as inputs:
        output = body(input_ids=input_ids, use_cache=False, return_dict=True, **attention)
    return _states(output, inputs, body.config)


def masked_forward(
    model: nn.Module,
    input_ids: Int[Tensor, "B q"],
    position_ids: Int[Tensor, "B q"],
    is_visible: Callable[[int | None], Bool[Tensor, "B q n"]],
    cache: Cache,
    *,
    output_hidden_states: bool = False,
) -> BaseModelOutput:
    """Runs the model's body on tokens that read keys of a cache, under any mask.

    Args:
        model: Any stock causal LM, or a PEFT wrapper around one.
        input_ids: The tokens.
        position_ids: Their positions.
        is_visible: Which of the n keys each token reads, in layers with a sliding window of so many tokens, or without
            one (None).
        cache: Gives the keys.
        output_hidden_states: See `body_forward`.
    """
    body = stock_model(model).base_model
    windows = sliding_windows(body.config)
    by_window = {
        window: as_the_attention_takes_it(is_visible(window)[:, None], body) for window in set(windows.values())
    }
    masks: Any = {kind: by_window[window] for kind, window in windows.items()}
    if len(by_window) == 1:
        (masks,) = by_window.values()
    with _inputs_of_layers(model, output_hidden_states) as inputs:
        output = body(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=masks,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
    return _states(output, inputs, body.config)


@contextmanager
def _inputs_of_layers(model: nn.Module, are_wanted: bool) -> Iterator[list[Tensor] | None]:
    """Collects the states that each layer reads.

    transformers would, too, by hooks that it never removes. Those on attention split each compiled layer in three.
    """
    if not are_wanted:
        yield None
        return
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in decoder_layers(model)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _states(output: ModelOutput, inputs: list[Tensor] | None, config: PretrainedConfig) -> BaseModelOutput:
    """Returns a body's states: the last, and what layers read if that was collected."""
    last = output.last_hidden_state
    hidden_states = None if inputs is None else _checked_states((*inputs, last), config)
    return BaseModelOutput(last_hidden_state=last, hidden_states=hidden_states)


class _NoCache:
    """A cache that stores nothing.

    Without a cache, transformers searches the position ids for packed rows on the host. On a GPU that waits for all
    earlier work, once per pass. Layers under gradient checkpointing ignore this cache, which changes nothing.
    """

    is_compileable = False

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0

    def get_query_offset(self, *_: Any, **__: Any) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, *_: Any, **__: Any) -> tuple[int, int]:
        return query_length, 0

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return keys, values


_NO_CACHE = _NoCache()
logging.getLogger("transformers.modeling_layers").addFilter(
    lambda record: "Caching is incompatible with gradient checkpointing" not in record.getMessage()
)


def _stock_attention(config: PretrainedConfig, layout: Layout, length: int) -> dict[str, bool] | None:
    """Returns keywords with which the stock body attends by `layout` without our mask; None if it cannot."""
    if config._attn_implementation == FLEX:
        return None
    honours_is_causal = config.model_type in HONOURS_IS_CAUSAL
    if layout.kind == "causal":
        if honours_is_causal:
            return {"is_causal": True}
        return {} if getattr(config, "is_causal", True) else None
    # A sliding window matters only on longer rows. There transformers' bidirectional window has another width.
    is_windowed = any(window is not None and window < length for window in sliding_windows(config).values())
    if layout.kind == "bidirectional" and honours_is_causal and not is_windowed:
        return {"is_causal": False}
    return None


def _masks(body: nn.Module, rows: RowAttention) -> Any:
    """Returns one mask for all layers, or one per layer type if their windows differ on rows of this length."""
    length = rows.document_ids.shape[1]
    windows = {
        layer_type: window if window is not None and window < length else None
        for layer_type, window in sliding_windows(body.config).items()
    }
    by_window = {window: _mask(rows, window, body) for window in set(windows.values())}
    if len(by_window) == 1:
        return next(iter(by_window.values()))
    return {layer_type: by_window[window] for layer_type, window in windows.items()}


def _mask(rows: RowAttention, window: int | None, body: nn.Module) -> Tensor | BlockMask:
    if body.config._attn_implementation == FLEX:
        return rows.block_mask(window)
    return as_the_attention_takes_it(rows.dense_mask(window), body)


def as_the_attention_takes_it(is_visible: Bool[Tensor, "B 1 q n"], body: nn.Module) -> Tensor:
    """Returns a mask of q queries and n keys in the form that the body's attention implementation takes."""
    implementation = body.config._attn_implementation
    if implementation == "sdpa":
        return sdpa_mask(is_visible, body)
    if implementation == "eager":
        # Eager attention adds the mask to the scores. A boolean mask would count as 0 and 1, and hide nothing.
        return _added(is_visible, body.dtype, torch.finfo(body.dtype).min)
    raise UserError(
        f"attention implementation '{implementation}' takes no layout masks; "
        "load the model with attn_implementation='sdpa' or 'eager'"
    )


def sdpa_mask(is_visible: Bool[Tensor, "B 1 q n"], body: nn.Module) -> Tensor:
    """Returns a mask for PyTorch's attention: on a CPU one that skips what no query reads, elsewhere an additive one.

    GPU kernels add their mask to the scores, and would convert a boolean mask in each layer.
    """
    device = is_visible.device.type
    if device == "cpu":
        return SparseMask.of(is_visible)
    return _added(is_visible, autocast_dtype(device) or body.dtype, -torch.inf)


def _added(is_visible: Bool[Tensor, "B 1 q n"], dtype: torch.dtype, hidden: float) -> Tensor:
    zero = torch.zeros((), dtype=dtype, device=is_visible.device)
    return torch.where(is_visible, zero, torch.full_like(zero, hidden))


def _checked_states(states: tuple[Tensor, ...], config: PretrainedConfig) -> tuple[Tensor, ...]:
    expected = config.num_hidden_layers + 1
    if len(states) != expected:
        raise UserError(
            f"model type '{config.model_type}' returns {len(states)} hidden states; expected {expected}: "
            "the embedding output, then one per layer"
        )
    return states


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Returns the model's L decoder layers, in order.

    Raises:
        UserError: Its body holds no list of `num_hidden_layers` modules.
    """
    body = stock_model(model).base_model
    for module in body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == body.config.num_hidden_layers:
            return module
    raise UserError(f"model type '{body.config.model_type}' keeps its layers in no list of modules; it cannot be used")


def head_of(model: nn.Module) -> Head:
    """Returns the model's output head as numbers: logits = softcap * tanh(scale * (h W^T + b) / softcap).

    The weights are the model's own parameters, so gradients reach them. `banned` stays None. The doctor verifies the
    head by comparing its logits with the stock model's.

    Raises:
        UserError: An adapter wraps the head.
    """
    stock = stock_model(model)
    linear = stock.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise UserError(
            f"the output head is a {type(linear).__name__}; it must be a plain linear layer "
            "(leave the head out of the adapter's target modules)"
        )
    softcap = getattr(stock.config, "final_logit_softcapping", None)
    return Head(
        weight=linear.weight, bias=linear.bias, scale=_logit_scale(stock.config), softcap=softcap and float(softcap)
    )


def denoising_head(model: nn.Module, mask_token_id: int) -> Head:
    """Returns the model's head, from which the mask token, never a prediction, is banned.

    A mask token without a row in the head is none of its predictions anyway.
    """
    head = head_of(model)
    return head._replace(banned=mask_token_id if mask_token_id < len(head.weight) else None)


def _logit_scale(config: PretrainedConfig) -> float:
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        return float(config.logit_scale)
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    return scaling if config.model_type.startswith("hyperclovax") else 1.0 / scaling  # Granite divides by this value


def logits(
    model: nn.Module,
    input_ids: Int[Tensor, "B T"],
    layout: Layout,
    *,
    document_ids: Int[Tensor, "B T"] | None = None,
    position_ids: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T V"]:
    """Returns logits at every position in fp32, from body and head. For tests and short rows; training never builds
    these."""
    hidden = body_forward(model, input_ids, layout, document_ids=document_ids, position_ids=position_ids)
    flat = output_head.logits(hidden.last_hidden_state.flatten(0, 1), head_of(model))
    return flat.unflatten(0, input_ids.shape)
