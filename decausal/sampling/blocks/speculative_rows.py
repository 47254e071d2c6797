"""The rows that self-speculation writes together, as tensors: what is known of them, their drafts, and one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PretrainedConfig

from decausal.models.architecture import context_length, layer_windows
from decausal.models.backbone import head_of, stock_model
from decausal.models.block_cache import BlockCache, cached_forward
from decausal.models.facts import ConversionFacts
from decausal.objectives.head import Head, logits
from decausal.sampling.candidates import above, choose, truncate, uniform_numbers
from decausal.sampling.row_settings import RowSettings

_DRAFT, _ACCEPT, _OWN, _NUM_PURPOSES = range(4)


class Read(NamedTuple):
    """What a pass brought its rows.

    Attributes:
        tokens: Of each row, at least one.
        states: Those that predict them under causal attention, and others behind.
    """

    tokens: list[list[int]]
    states: Float[Tensor, "b p D"]


class SpeculativeRows:
    """State of rows 0 to R - 1, of which the first `num_rows` are in use.

    Attributes:
        ids: What is known and, behind it, the drafts, [R S].
        num_known: Tokens that are known, [R].
        num_read: Passes so far, [R].
        seeds: Of random numbers, [R].
        draft_probabilities: What drafts were drawn from where they were drawn, [R m V]; None before any was.
    """

    def __init__(
        self, model: Any, facts: ConversionFacts, *, draft_length: int, max_rows: int, max_length: int
    ) -> None:
        self.model, self.facts, self.draft_length = model, facts, draft_length
        device = stock_model(model).get_input_embeddings().weight.device
        group = draft_length + 1 - facts.shift
        num_slots = max_length + 2 * draft_length + 1 + (draft_length + 1) * group
        self.cache = BlockCache(stock_model(model).base_model.config, max_rows, num_slots)
        self.num_rows = 0
        self.ids = torch.zeros(max_rows, num_slots, dtype=torch.long, device=device)
        self.num_known, self.num_read, self.seeds = torch.zeros(3, max_rows, dtype=torch.long, device=device)
        self.draft_probabilities: Float[Tensor, "R m V"] | None = None

    @property
    def head(self) -> Head:
        """The model's, the mask token banned."""
        return head_of(self.model)._replace(banned=self.facts.mask_token_id)

    def admit(self, prompt: Sequence[int], seed: int) -> None:
        """Puts a prompt behind the rows in use."""
        row, self.num_rows = self.num_rows, self.num_rows + 1
        self.ids[row, : len(prompt)] = torch.tensor(list(prompt))
        self.num_known[row], self.num_read[row], self.seeds[row] = len(prompt), 0, seed

    def drop(self, row: int) -> None:
        """Moves the last row in use into the place of one that is over."""
        self.num_rows = last = self.num_rows - 1
        if row == last:
            return
        self.cache.move_row(last, row)
        for tensor in (self.ids, self.num_known, self.num_read, self.seeds, self.draft_probabilities):
            if tensor is not None:
                tensor[row] = tensor[last]

    def read(self, rows: slice, lengths: Sequence[int], settings: RowSettings, *, is_new: bool) -> Read:
        """Takes some rows one pass further.

        Args:
            rows: From one to another.
            lengths: How many tokens of each are known.
            settings: Of each.
            is_new: They have no drafts yet: the pass reads whole prompts and one group of masks.
        """
        num_drafts = 0 if is_new else self.draft_length
        context = max(lengths) if is_new else 1
        num_keys = max(lengths) + num_drafts + (num_drafts + 1) * (self.draft_length + 1 - self.facts.shift)
        verify_states, group_states = self._states(rows, context, num_drafts, num_keys)
        head = self.head
        verifying = logits(verify_states.flatten(0, 1), head).unflatten(0, verify_states.shape[:2])
        num_right, own = self._verified(rows, verifying, settings)
        tokens = self._extended(rows, num_right, own)

        here = torch.arange(len(num_right), device=num_right.device)
        self._draft(rows, logits(group_states[here, num_right].flatten(0, 1), head), settings)
        return Read(tokens, verify_states)

    def _states(
        self, rows: slice, context: int, num_drafts: int, num_keys: int
    ) -> tuple[Float[Tensor, "b p D"], Float[Tensor, "b p m D"]]:
        """The causal states behind the known tokens and each draft, and those of every group of masks that draft."""
        known, device = self.num_known[rows], self.ids.device
        group = self.draft_length + 1 - self.facts.shift
        start = known - context if num_drafts else torch.zeros_like(known)
        position = start[:, None] + torch.arange(context + num_drafts, device=device)
        is_real = position < (known + num_drafts)[:, None]
        base = known + num_drafts
        member = torch.arange((num_drafts + 1) * group, device=device)
        mask_position = known[:, None] + member // group + member % group
        mask_slot = base[:, None] + member

        input_ids = torch.cat(
            [self.ids[rows].gather(1, position), torch.full_like(mask_slot, self.facts.mask_token_id)], dim=1
        )
        is_visible = _visible(
            stock_model(self.model).base_model.config, position, mask_position, known, base, group, num_keys
        )
        longest = context_length(stock_model(self.model).config)
        hidden = cached_forward(
            self.model,
            input_ids,
            torch.cat([position, mask_position], dim=1).clamp(max=None if longest is None else longest - 1),
            torch.cat([torch.where(is_real, position, self.cache.scratch_slot), mask_slot], dim=1),
            is_visible,
            self.cache,
            rows,
        )
        last = (known - 1 - start)[:, None] + torch.arange(num_drafts + 1, device=device)
        width = position.shape[1]
        verify_states = hidden[:, :width].gather(1, last[..., None].expand(-1, -1, hidden.shape[-1]))
        groups = hidden[:, width:].unflatten(1, (num_drafts + 1, group))
        return verify_states, groups[:, :, 1 - self.facts.shift :]

    def _verified(
        self, rows: slice, verifying: Float[Tensor, "b p V"], settings: RowSettings
    ) -> tuple[Int[Tensor, "b"], Int[Tensor, "b"]]:
        """How many drafts are right, and the token that the causal model itself puts behind them."""
        num_drafts = verifying.shape[1] - 1
        known = self.num_known[rows]
        place = known[:, None] + torch.arange(num_drafts, device=known.device)
        drafts = self.ids[rows].gather(1, place)
        if settings.is_greedy:
            best = verifying.argmax(-1)
            num_right = (best[:, :-1] == drafts).long().cumprod(1).sum(1)
            return num_right, best.gather(1, num_right[:, None])[:, 0]
        row = torch.arange(len(known), device=known.device)
        wanted = probabilities(verifying.flatten(0, 1), settings.rows(row.repeat_interleave(num_drafts + 1)))
        wanted = wanted.unflatten(0, verifying.shape[:2])
        num_right = torch.zeros_like(known)
        if num_drafts:
            chance = self._numbers(rows, _ACCEPT, place)
            drafted = self._drafted(rows, drafts, settings)
            asked, given = (mass.gather(2, drafts[..., None])[..., 0] for mass in (wanted[:, :-1], drafted))
            num_right = (chance * given < asked).long().cumprod(1).sum(1)
            wanted = torch.cat([_missing(wanted[:, :-1], drafted), wanted[:, -1:]], dim=1)
        own = wanted[row, num_right]
        chance = self._numbers(rows, _OWN, (known + num_right)[:, None])[:, 0]
        return num_right, choose(own.log(), chance, temperature=1.0)

    def _extended(self, rows: slice, num_right: Int[Tensor, "b"], own: Int[Tensor, "b"]) -> list[list[int]]:
        """Makes the right drafts and the token behind them known."""
        known = self.num_known[rows]
        self.ids[rows] = self.ids[rows].scatter(1, (known + num_right)[:, None], own[:, None])
        width = torch.arange(self.draft_length + 1, device=known.device)
        tokens = self.ids[rows].gather(1, known[:, None] + width)
        self.num_known[rows] += num_right + 1
        self.num_read[rows] += 1
        return [row[: count + 1] for row, count in zip(tokens.tolist(), num_right.tolist(), strict=True)]

    def _draft(self, rows: slice, drafting: Float[Tensor, "n V"], settings: RowSettings) -> None:
        """Draws the next drafts and puts them behind what is known."""
        known = self.num_known[rows]
        place = known[:, None] + torch.arange(self.draft_length, device=known.device)
        if settings.is_greedy:
            tokens = drafting.argmax(-1)
        else:
            row = torch.arange(len(known), device=known.device).repeat_interleave(self.draft_length)
            drafted = probabilities(drafting, settings.rows(row))
            if self.draft_probabilities is None:
                self.draft_probabilities = drafted.new_zeros(len(self.ids), self.draft_length, drafted.shape[1])
            self.draft_probabilities[rows] = drafted.unflatten(0, place.shape)
            tokens = choose(drafted.log(), self._numbers(rows, _DRAFT, place).flatten(), temperature=1.0)
        self.ids[rows] = self.ids[rows].scatter(1, place, tokens.view_as(place))

    def _drafted(self, rows: slice, drafts: Int[Tensor, "b m"], settings: RowSettings) -> Float[Tensor, "b m V"]:
        """What drafts were drawn from: all on the draft itself where none was drawn."""
        assert self.draft_probabilities is not None  # some row draws, and it drafted before
        drawn = self.draft_probabilities[rows]
        certain = torch.zeros_like(drawn).scatter_(2, drafts[..., None], 1.0)
        return torch.where((settings.temperature > 0)[:, None, None], drawn, certain)

    def _numbers(self, rows: slice, purpose: int, place: Int[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        """Uniform numbers of their own for every pass of a row, position and purpose."""
        seed, step = (
            column[rows][:, None].expand_as(place).flatten()
            for column in (self.seeds, self.num_read * _NUM_PURPOSES + purpose)
        )
        return uniform_numbers(seed, step, place.flatten()).view_as(place)


def _missing(wanted: Float[Tensor, "b m V"], drafted: Float[Tensor, "b m V"]) -> Float[Tensor, "b m V"]:
    """What a refused draft's place is drawn from: the mass that drafts did not bring, up to a factor."""
    missing = (wanted - drafted).clamp(min=0)
    # Nothing is missing only where both agree, and there no draft is refused, but for rounding.
    return torch.where(missing.sum(-1, keepdim=True) > 0, missing, wanted)


def probabilities(values: Float[Tensor, "n V"], settings: RowSettings) -> Float[Tensor, "n V"]:
    """What a position's token is drawn from: tempered and truncated, or all on the likeliest where temperature is 0."""
    is_drawn = settings.temperature > 0
    kept = above(values, settings.min_p if settings.has_min_p else None)
    tempered = kept / torch.where(is_drawn, settings.temperature, 1.0)[:, None].to(values.dtype)
    drawn = truncate(
        tempered,
        top_k=settings.top_k if settings.most_top_k else None,
        top_p=settings.top_p if settings.is_nucleus else None,
        most=settings.most_top_k,
    ).softmax(-1)
    certain = torch.zeros_like(drawn).scatter_(1, values.argmax(-1, keepdim=True), 1.0)
    return torch.where(is_drawn[:, None], drawn, certain)


def _visible(
    config: PretrainedConfig,
    position: Int[Tensor, "b q"],
    mask_position: Int[Tensor, "b g"],
    known: Int[Tensor, "b"],
    base: Int[Tensor, "b"],
    group: int,
    num_keys: int,
) -> Bool[Tensor, "b p n"] | dict[str, Bool[Tensor, "b p n"]]:
    """Which slots each query reads, by layer type where layers have windows.

    Known tokens and drafts read what stands before them; the masks of group j what stands before position known + j,
    and each other. Slots from `base` on hold the groups, one after the other.
    """
    slot = torch.arange(num_keys, device=position.device)
    member = torch.arange(mask_position.shape[1], device=position.device)
    first = base[:, None, None] + (member // group * group)[:, None]
    of_group = (slot >= first) & (slot < first + group)
    before = slot < known[:, None, None] + (member // group)[:, None]
    in_order = torch.cat([slot <= position[..., None], of_group | before], dim=1)
    beyond = (slot - base[:, None]).clamp(min=0)
    key_position = torch.where(slot < base[:, None], slot, known[:, None] + beyond // group + beyond % group)
    query_position = torch.cat([position, mask_position], dim=1)

    def seen(window: int | None) -> Bool[Tensor, "b p n"]:
        if window is None or window >= num_keys:
            return in_order
        return in_order & ((query_position[..., None] - key_position[:, None]).abs() < window)

    by_layer = {kind: seen(window) for kind, window in layer_windows(config).items()}
    return by_layer if len(by_layer) > 1 else next(iter(by_layer.values()))
