"""Keys and values of tokens already read, for decoding in blocks with any stock model.

A slot is a token's position in its row: rows of different lengths start at slot 0, nothing is padded on the left, and a
block that is denoised again writes over itself. Memory is taken once, written in place and returned as slices.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from decausal.diffusion.layout import Layout
from decausal.errors import UserError, first_line
from decausal.models.architecture import layer_windows
from decausal.models.attention_plans import without_plans
from decausal.models.backbone import HONOURS_IS_CAUSAL, as_the_attention_takes_it, body_forward, stock_model
from decausal.models.rounding import CLOSE, Judge, Resolution, StatesNotFiniteError, distance

_PROBED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class BlockCache(Cache):
    """Preallocated keys and values of `num_rows` rows of at most `max_length` tokens, and one scratch slot per row.

    Which rows and slots a pass reads and writes is set by `cached_forward`. Memory is allocated by the first pass, in
    the shape, dtype and device of the model's own keys and values (they differ between families).

    Attributes:
        num_rows: rows that it holds.
        max_length: slots of each row; `max_length` itself is the scratch slot, where queries that are padding write.

    Raises:
        UserError: when the model's layers do not all attend to keys by position.
    """

    def __init__(self, config: PretrainedConfig, num_rows: int, max_length: int) -> None:
        try:
            layer_windows(config)
        except ValueError as error:
            raise UserError(f"a model of type '{config.model_type}' cannot be decoded in blocks: {error}") from error
        self.num_rows, self.max_length = num_rows, max_length
        self.access = _Access()
        self._first_slots: Int[Tensor, "B 1"] | None = None
        super().__init__(layers=[_BlockLayer(self) for _ in range(config.num_hidden_layers)])

    @property
    def scratch_slot(self) -> int:
        """The slot for queries that are padding: written, never read."""
        return self.max_length

    def first_slots(self, device: torch.device) -> Int[Tensor, "B 1"]:
        """Where rows begin if all slots are counted through."""
        if self._first_slots is None:
            self._first_slots = torch.arange(self.num_rows, device=device)[:, None] * (self.max_length + 1)
        return self._first_slots

    def move_row(self, source: int, target: int) -> None:
        """Copies a row over another one."""
        for layer in self.layers:
            layer.move_row(source, target)

    def swap_rows(self, one: int, other: int) -> None:
        """Has two rows change places."""
        for layer in self.layers:
            layer.swap_rows(one, other)

    def grow(self, max_length: int) -> None:
        """Makes room for rows of `max_length` tokens; what is held stays."""
        for layer in self.layers:
            layer.grow(self.max_length, max_length)
        self.max_length, self._first_slots = max_length, None


class _Access:
    """What one pass reads and writes; shared by all layers of a cache."""

    rows: slice | Int[Tensor, "b"]
    flat_slots: Int[Tensor, "b*q"]
    num_keys: int = 0


class _BlockLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, slots, heads, width]: a token's are one piece, written by one copy."""

    is_sliding = False

    def __init__(self, cache: BlockCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros: what no token has written is hidden, but a hidden value still is multiplied by zero.
        self.keys, self.values = (
            states.new_zeros(self._cache.num_rows, self._cache.max_length + 1, states.shape[1], states.shape[3])
            for states in (key_states, value_states)
        )
        self._count_through()
        self.is_initialized = True

    def _count_through(self) -> None:
        """Makes views in which the slots of all rows are one axis, once: every pass writes to them."""
        self._key_slots, self._value_slots = self.keys.flatten(0, 1), self.values.flatten(0, 1)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        access = self._cache.access
        _write(self._key_slots, key_states, access)
        _write(self._value_slots, value_states, access)
        return _read(self.keys, access), _read(self.values, access)

    def move_row(self, source: int, target: int) -> None:
        if self.is_initialized:
            self.keys[target] = self.keys[source]
            self.values[target] = self.values[source]

    def swap_rows(self, one: int, other: int) -> None:
        if self.is_initialized:
            for held in (self.keys, self.values):
                before = held[one].clone()
                held[one], held[other] = held[other], before

    def grow(self, old_length: int, new_length: int) -> None:
        if self.is_initialized:
            self.keys, self.values = (
                torch.cat([held[:, :old_length], held.new_zeros(_with_slots(held, new_length + 1 - old_length))], dim=1)
                for held in (self.keys, self.values)
            )
            self._count_through()

    def get_seq_length(self) -> int:
        return 0  # positions are always given

    def get_max_length(self) -> int:
        return self._cache.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.access.num_keys, 0


def _with_slots(held: Tensor, num_slots: int) -> tuple[int, ...]:
    return (held.shape[0], num_slots, *held.shape[2:])


def _write(slots: Float[Tensor, "slots H d"], states: Float[Tensor, "b H q d"], access: _Access) -> None:
    """Writes the states of a pass."""
    by_token = states if states.shape[2] == 1 else states.transpose(1, 2)
    slots.index_copy_(0, access.flat_slots, by_token.reshape(-1, *slots.shape[1:]).to(slots.dtype))


def _read(held: Float[Tensor, "B S H d"], access: _Access) -> Float[Tensor, "b H n d"]:
    """What the rows of a pass hold in the first `num_keys` slots."""
    rows, num_keys = access.rows, access.num_keys
    if isinstance(rows, slice):  # held[rows, :num_keys].transpose(1, 2), as one operator
        row, slot, head, one = held.stride()
        shape = (rows.stop - rows.start, held.shape[2], num_keys, held.shape[3])
        return held.as_strided(shape, (row, head, slot, one), rows.start * row)
    return held[rows, :num_keys].transpose(1, 2)


def cached_forward(
    model: nn.Module,
    input_ids: Int[Tensor, "b q"],
    position_ids: Int[Tensor, "b q"],
    slots: Int[Tensor, "b q"],
    is_visible: Bool[Tensor, "b q n"] | dict[str, Bool[Tensor, "b q n"]] | int,
    cache: BlockCache,
    rows: slice | Int[Tensor, "b"] | None = None,
) -> Float[Tensor, "b q D"]:
    """Runs the model's body on some tokens of some rows, against what the cache holds of the rest.

    Args:
        model: any stock causal LM that `refuse_uncacheable` lets pass, or a PEFT wrapper around one.
        input_ids: the tokens to read.
        position_ids: their positions in their rows.
        slots: where their keys and values go: their positions again, or `cache.scratch_slot` for queries that are
            padding. They are written before they are read: queries of this pass can see each other.
        is_visible: which of the first n slots each query reads, at least one; by layer type where layers have different
            sliding windows (`visible_by_layer`). A number n: every query reads all of the first n slots.
        cache: read and written in place.
        rows: the rows of the cache that are meant: a slice from one row to another (read without a copy) or indices
            (their keys and values are copied for the pass). None: its first b rows.

    Returns:
        The states after the final norm.
    """
    body = stock_model(model).base_model
    rows = slice(0, len(input_ids)) if rows is None else rows
    access = cache.access
    access.rows = rows
    access.flat_slots = (slots + cache.first_slots(input_ids.device)[rows]).view(-1)
    if isinstance(is_visible, int):
        access.num_keys = is_visible
        attention = _unmasked(body, input_ids, is_visible)
    elif isinstance(is_visible, dict):
        access.num_keys = next(iter(is_visible.values())).shape[-1]
        attention = {"attention_mask": {kind: _as_taken(seen, body) for kind, seen in is_visible.items()}}
    else:
        access.num_keys = is_visible.shape[-1]
        attention = {"attention_mask": _as_taken(is_visible, body)}
    output = body(
        input_ids=input_ids,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
        **attention,
    )
    return output.last_hidden_state


def visible_by_layer(
    config: PretrainedConfig,
    position_ids: Int[Tensor, "b q"],
    last_visible: Int[Tensor, "b q"],
    num_keys: int,
) -> Bool[Tensor, "b q n"] | dict[str, Bool[Tensor, "b q n"]]:
    """Which slots each query reads: all up to `last_visible`, in sliding-window layers no further away than the window.

    Block layouts need no more than that: a token of a block that is being denoised reads up to the end of its block, a
    finished one up to the end of its block or, under `causal_context`, up to itself.
    """
    key = torch.arange(num_keys, device=position_ids.device)
    in_order = key <= last_visible[..., None]
    windows = {
        kind: window if window is not None and window < num_keys else None
        for kind, window in layer_windows(config).items()
    }
    by_window = {
        window: in_order if window is None else in_order & ((position_ids[..., None] - key).abs() < window)
        for window in set(windows.values())
    }
    if len(by_window) == 1:
        return next(iter(by_window.values()))
    return {kind: by_window[window] for kind, window in windows.items()}


@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """Puts a model into the state in which it decodes, and back: eval mode, no gradients, attention that takes masks
    and plans nothing.

    A model that trains with FlexAttention decodes with SDPA: the masks of a few queries change in every pass.
    """
    stock = stock_model(model)
    config, in_training = stock.base_model.config, [module for module in stock.modules() if module.training]
    implementation = config._attn_implementation
    for module in in_training:  # often none: this runs for every step of an engine
        module.training = False
    if implementation == "flex_attention":
        config._attn_implementation = "sdpa"
    try:
        with torch.no_grad(), without_plans():
            yield
    finally:
        config._attn_implementation = implementation
        for module in in_training:
            module.training = True


def refuse_uncacheable(model: nn.Module) -> None:
    """Compares cached with uncached states on a few tokens, once per model; call it inside `decoding`.

    Raises:
        UserError: they differ, or the model takes no such cache.
    """
    stock = stock_model(model)
    if stock in _PROBED:
        return
    kind = stock.config.model_type
    explanation = (
        f"a model of type '{kind}' cannot be decoded in blocks: its attention does not take this key/value cache"
    )
    try:
        verdict = Judge(model, CLOSE).decide(is_same_cached)
    except UserError:
        raise
    except StatesNotFiniteError as error:
        raise UserError(f"{explanation} (its states are not finite in {stock.dtype})") from error
    except Exception as error:
        raise UserError(f"{explanation} ({type(error).__name__}: {first_line(error)})") from error
    if not verdict.passed:
        raise UserError(f"{explanation} (its states differ by {verdict.measured:.2g} from those without one)")
    _PROBED.add(stock)


def is_same_cached(model: nn.Module, resolution: Resolution) -> tuple[bool, float]:
    """Compares states with and without the cache, of two rows of different lengths whose last blocks are read again."""
    stock, size = stock_model(model), 3
    device = stock.get_input_embeddings().weight.device
    position = torch.arange(3 * size, device=device)
    ids = (7 + position * torch.tensor([[5], [3]], device=device)) % stock.get_input_embeddings().weight.shape[0]
    layout = Layout("block", size)
    whole = body_forward(model, ids, layout).last_hidden_state
    cache = BlockCache(stock.base_model.config, 2, 3 * size)

    def read(positions: Int[Tensor, "2 q"], num_keys: int) -> Float[Tensor, "2 q D"]:
        last_visible = (positions // size + 1) * size - 1
        is_visible = visible_by_layer(stock.base_model.config, positions, last_visible, num_keys)
        return cached_forward(model, ids.gather(1, positions), positions, positions, is_visible, cache)

    first = position[: 2 * size].expand(2, -1)
    second = torch.stack([position[2 * size :], position[size : 2 * size]])
    distances = []
    for positions, num_keys in ((first, 2 * size), (second, 3 * size)):
        expected = whole.gather(1, positions[..., None].expand(-1, -1, whole.shape[-1]))
        distances.append(distance(read(positions, num_keys), expected))
    return max(distances) <= resolution.equal, max(distances)


def _unmasked(body: nn.Module, input_ids: Int[Tensor, "b q"], num_keys: int) -> dict[str, Any]:
    """Keywords under which every query reads all keys: without a mask where the stock body honours that."""
    if body.config.model_type in HONOURS_IS_CAUSAL:
        return {"is_causal": False, "attention_mask": None}
    everything = torch.ones(*input_ids.shape, num_keys, dtype=torch.bool, device=input_ids.device)
    return {"attention_mask": _as_taken(everything, body)}


def _as_taken(is_visible: Bool[Tensor, "b q n"], body: nn.Module) -> Tensor:
    """The mask as the attention reads it: a dense one, whatever the device."""
    if body.config._attn_implementation == "sdpa" and is_visible.device.type == "cpu":
        return is_visible[:, None]
    return as_the_attention_takes_it(is_visible[:, None], body)
