"""Keys and values of tokens already read, for decoding in blocks with any stock model.

A slot is a token's position in its row. Rows of different lengths all start at slot 0 without padding on the left. A
block that is denoised again overwrites itself. Memory is allocated once, written in place and returned as slices.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from decausal.diffusion.layout import Layout
from decausal.errors import UserError, first_line
from decausal.models.architecture import sliding_windows
from decausal.models.attention_plans import without_plans
from decausal.models.backbone import HONOURS_IS_CAUSAL, as_the_attention_takes_it, body_forward, stock_model
from decausal.models.rounding import CLOSE, Judge, Resolution, StatesNotFiniteError, distance
from decausal.models.visible_slots import VisibleSlots, visible_by_layer

_PROBED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class BlockCache(Cache):
    """Preallocated keys and values of `num_rows` rows of at most `max_length` tokens, and one scratch slot per row.

    Which rows and slots a pass reads and writes is set by `cached_forward`. Memory is allocated by the first pass, in
    the shape, dtype and device of the model's own keys and values (they differ between families). On a CPU, slots take
    memory once they are written.

    Attributes:
        num_rows: Rows that it holds.
        max_length: Slots of each row. Slot `max_length` is the scratch slot, to which padding queries write.

    Raises:
        UserError: The model's layers do not all attend to keys by position.
    """

    def __init__(self, config: PretrainedConfig, num_rows: int, max_length: int) -> None:
        try:
            sliding_windows(config)
        except ValueError as error:
            raise UserError(f"a model of type '{config.model_type}' cannot be decoded in blocks: {error}") from error
        self.num_rows, self.max_length = num_rows, max_length
        self.access = _Access()
        self._first_slots: Int[Tensor, "B 1"] | None = None
        super().__init__(layers=[_BlockLayer(self) for _ in range(config.num_hidden_layers)])

    @property
    def scratch_slot(self) -> int:
        """The slot for padding queries, which is written but never read."""
        return self.max_length

    def first_slots(self, device: torch.device) -> Int[Tensor, "B 1"]:
        """Returns where each row begins if all slots are numbered consecutively."""
        if self._first_slots is None:
            self._first_slots = torch.arange(self.num_rows, device=device)[:, None] * (self.max_length + 1)
        return self._first_slots

    def move_row(self, source: int, target: int) -> None:
        """Copies a row over another one."""
        for layer in self.layers:
            layer.move_row(source, target, self.access.most_keys)

    def swap_rows(self, one: int, other: int) -> None:
        """Has two rows change places."""
        for layer in self.layers:
            layer.swap_rows(one, other, self.access.most_keys)

    def grow(self, max_length: int) -> None:
        """Makes room for rows of `max_length` tokens and keeps what is stored."""
        for layer in self.layers:
            layer.grow(max_length, self.access.most_keys)
        self.max_length, self._first_slots = max_length, None


class _Access:
    """What one pass reads and writes; shared by all layers of a cache.

    Attributes:
        most_keys: The most slots that a pass has read. None after them has ever been written.
    """

    rows: slice | Int[Tensor, " b"]
    flat_slots: Int[Tensor, " b*q"]
    num_keys: int = 0
    most_keys: int = 0


class _BlockLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, slots, heads, width]. A token's are contiguous and written by one copy."""

    is_sliding = False

    def __init__(self, cache: BlockCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros: slots without a token are hidden, but hidden values are still multiplied by zero.
        self.keys, self.values = (
            zeros(states, self._cache.num_rows, self._cache.max_length + 1, states.shape[1], states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        access = self._cache.access
        _write(self.keys, key_states, access)
        _write(self.values, value_states, access)
        return _read(self.keys, access), _read(self.values, access)

    def move_row(self, source: int, target: int, num_slots: int) -> None:
        if self.is_initialized:
            for held in (self.keys, self.values):
                held[target, :num_slots] = held[source, :num_slots]

    def swap_rows(self, one: int, other: int, num_slots: int) -> None:
        if self.is_initialized:
            for held in (self.keys, self.values):
                before = held[one, :num_slots].clone()
                held[one, :num_slots], held[other, :num_slots] = held[other, :num_slots], before

    def grow(self, max_length: int, num_slots: int) -> None:
        if self.is_initialized:
            self.keys, self.values = (_longer(held, max_length + 1, num_slots) for held in (self.keys, self.values))

    def get_seq_length(self) -> int:
        return 0  # positions are always given

    def get_max_length(self) -> int:
        return self._cache.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.access.num_keys, 0


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Returns zeros of the dtype and device of a tensor. On a CPU, the system gives the memory where it is first
    written: a server's rows are mostly shorter and fewer than those for which it makes room."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    of_its_own = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, math.prod(shape) * like.element_size(), **of_its_own)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def _longer(held: Tensor, num_slots: int, num_kept: int) -> Tensor:
    longer = zeros(held, held.shape[0], num_slots, *held.shape[2:])
    longer[:, :num_kept] = held[:, :num_kept]
    return longer


def _write(held: Float[Tensor, "B S H d"], states: Float[Tensor, "b H q d"], access: _Access) -> None:
    """Writes the states of a pass into the slots, those of all rows on one axis.

    Each pass makes its own view, because the compiler would copy all of a memory that has two views.
    """
    slots = held.view(-1, *held.shape[2:])
    by_token = states if states.shape[2] == 1 else states.transpose(1, 2)
    slots.index_copy_(0, access.flat_slots, by_token.reshape(-1, *slots.shape[1:]).to(slots.dtype))


def _read(held: Float[Tensor, "B S H d"], access: _Access) -> Float[Tensor, "b H n d"]:
    """Returns what the rows of a pass store in the first `num_keys` slots."""
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
    is_visible: VisibleSlots | dict[str, VisibleSlots] | int,
    cache: BlockCache,
    rows: slice | Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b q D"]:
    """Runs the model's body on some tokens of some rows, with the other tokens in the cache.

    Args:
        model: Any stock causal LM that passes `refuse_uncacheable`, or a PEFT wrapper around one.
        input_ids: The tokens to read.
        position_ids: Their positions in their rows.
        slots: Where their keys and values go: their positions, or `cache.scratch_slot` for padding queries. They are
            written before they are read, so queries of this pass can see each other.
        is_visible: Which of the first n slots each query reads, at least one; by layer type if layers have different
            sliding windows (`visible_by_layer`). A number n means that every query reads all of the first n slots.
        cache: Read and written in place.
        rows: The rows of the cache: a slice (read without a copy) or indices (keys and values are copied for the pass).
            None: the first b rows.

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
    access.most_keys = max(access.most_keys, access.num_keys)
    output = body(
        input_ids=input_ids,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
        **attention,
    )
    return output.last_hidden_state


@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """Prepares a model for decoding and restores it: eval mode, no gradients, attention with masks and without plans.

    A model that trains with FlexAttention decodes with SDPA, since the masks of a few queries change in every pass.
    """
    stock = stock_model(model)
    config, in_training = stock.base_model.config, [module for module in stock.modules() if module.training]
    implementation = config._attn_implementation
    for module in in_training:  # often empty: this runs for every step of an engine
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
    """Compares cached with uncached states on a few tokens, once per model. Call it inside `decoding`.

    Raises:
        UserError: They differ, or the model does not take the cache.
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
    """Compares states with and without the cache, for two rows of different lengths whose last blocks are read
    again."""
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
    """Returns keywords with which every query reads all keys, without a mask if the stock body supports that."""
    if body.config.model_type in HONOURS_IS_CAUSAL:
        return {"is_causal": False, "attention_mask": None}
    everything = torch.ones(*input_ids.shape, num_keys, dtype=torch.bool, device=input_ids.device)
    return {"attention_mask": _as_taken(everything, body)}


def _as_taken(is_visible: VisibleSlots, body: nn.Module) -> Tensor | BlockMask:
    """Returns the mask in the form that the attention takes, whatever the device."""
    if isinstance(is_visible, BlockMask):
        return is_visible
    if body.config._attn_implementation == "sdpa" and is_visible.device.type == "cpu":
        return is_visible[:, None]
    return as_the_attention_takes_it(is_visible[:, None], body)
