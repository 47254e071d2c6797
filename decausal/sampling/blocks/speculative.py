"""Self-speculative decoding: masks draft several tokens, the same weights verify them causally, one pass does both.

A pass reads, for each row, the last known token and the m tokens that the pass before has drafted for the positions
after it, all under causal attention; and for each number of drafts that may turn out right, a group of masks behind
that many drafts. The causal states say how many drafts are right and add one token of their own; of the groups, the one
that stands behind exactly the right drafts has made the next ones. So no pass only drafts and none only verifies, and a
pass brings between 1 and m + 1 tokens, for (m + 1) (m + 1) more queries than one token costs.

What is written is the causal model's own: greedily its greedy text, token for token; with temperature a sample from its
distribution. The quality of drafts decides the speed alone.

Source: rejection sampling, Leviathan et al., Fast inference from transformers via speculative decoding (arXiv
2211.17192); masks as the drafter as in OPDLM (arXiv 2606.06712). One group per number of right drafts is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PretrainedConfig

from decausal.errors import UserError
from decausal.models.architecture import context_length, layer_windows
from decausal.models.backbone import head_of, stock_model
from decausal.models.block_cache import BlockCache, cached_forward, decoding, refuse_uncacheable
from decausal.models.checkpoint import ConversionFacts
from decausal.objectives.tokens import logits
from decausal.sampling.candidates import choose, truncate, uniform_numbers
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.settings import SamplerSettings

DRAFT_LENGTH = 4
"""Tokens drafted at once where the model has no blocks."""

_DRAFT, _ACCEPT, _OWN, _NUM_PURPOSES = range(4)


@dataclass
class Speculated:
    """One row's new tokens.

    Attributes:
        ids: The new tokens, the end token included where the row ended.
        pass_of_token: For each of `ids` the row's forward pass, from 0, that brought it.
        num_forwards: Forward passes that the row took part in, the one that read the prompt included.
        finish_reason: "end" (an end token), "stop" (`is_stopped`) or "length".
    """

    ids: list[int] = field(default_factory=list)
    pass_of_token: list[int] = field(default_factory=list)
    num_forwards: int = 0
    finish_reason: str = "length"


def speculate(
    model: Any,
    facts: ConversionFacts,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[SamplerSettings],
    seeds: Sequence[int],
    *,
    end_token_ids: Sequence[int] = (),
    is_stopped: Callable[[int, list[int]], bool] = lambda row, ids: False,
    draft_length: int | None = None,
    max_rows: int = 16,
) -> list[Speculated]:
    """Continues prompts as the weights under causal attention would, several tokens per pass.

    Rows that end leave, and prompts that wait take their places. What a row becomes does not depend on the others.

    Args:
        model: The converted model; put into eval mode for the call.
        facts: Says shift, mask token and block size. Any layout but "causal", under which masks draft nothing.
        prompts: Token ids, at least one each.
        settings: One per prompt: `max_new_tokens`, `temperature`, `top_k`, `top_p`; schedules play no part here.
        seeds: One per prompt.
        end_token_ids: A row ends with the first of these.
        is_stopped: Called with a prompt's index and its new tokens after each pass; True ends the row.
        draft_length: m; by default the block size, or `DRAFT_LENGTH`.
        max_rows: Rows that run at once.

    Raises:
        UserError: A causal layout, an empty prompt, a row longer than the context, or a draft length below 1.
    """
    draft_length = facts.block_size or DRAFT_LENGTH if draft_length is None else draft_length
    _refuse(model, facts, prompts, settings, draft_length)
    max_length = max(len(prompt) + own.max_new_tokens for prompt, own in zip(prompts, settings, strict=True))
    done = [Speculated() for _ in prompts]
    ends = frozenset(end_token_ids)
    waiting = list(range(len(prompts)))[::-1]
    with decoding(model):
        refuse_uncacheable(model)
        rows = _Rows.of(model, facts, draft_length, min(max_rows, len(prompts)), max_length)
        if any(own.temperature > 0 for own in settings):
            rows.keep_probabilities()
        while waiting or rows.jobs:
            free = min(len(waiting), rows.capacity - len(rows.jobs))
            if free:
                first = len(rows.jobs)
                rows.admit([(job, prompts[job], settings[job], seeds[job]) for job in _taken(waiting, free)])
                brought = rows.read(slice(first, first + free), is_new=True)
            else:
                first = 0
                brought = rows.read(slice(0, len(rows.jobs)), is_new=False)
            for row in reversed(range(first, first + len(brought))):
                job = rows.jobs[row]
                if _add(done[job], brought[row - first], settings[job].max_new_tokens, ends) or is_stopped(
                    job, done[job].ids
                ):
                    rows.drop(row)
    for row, own in zip(done, settings, strict=True):
        if row.ids and row.ids[-1] in ends:
            row.finish_reason = "end"
        elif len(row.ids) < own.max_new_tokens:
            row.finish_reason = "stop"
    return done


def _taken(waiting: list[int], count: int) -> list[int]:
    return [waiting.pop() for _ in range(count)]


def _add(row: Speculated, tokens: list[int], limit: int, ends: frozenset[int]) -> bool:
    """Adds what a pass brought, up to an end token or the limit; returns whether the row is over."""
    row.num_forwards += 1
    for token in tokens[: limit - len(row.ids)]:
        row.ids.append(token)
        row.pass_of_token.append(row.num_forwards - 1)
        if token in ends:
            return True
    return len(row.ids) >= limit


def _refuse(
    model: Any,
    facts: ConversionFacts,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[SamplerSettings],
    draft_length: int,
) -> None:
    if facts.layout == "causal":
        raise UserError("speculative decoding drafts with masks, and a model of layout 'causal' has learnt none")
    if draft_length < 1:
        raise UserError(f"draft_length={draft_length} is not accepted: it must be at least 1")
    context = context_length(stock_model(model).config)
    for number, (prompt, own) in enumerate(zip(prompts, settings, strict=True), start=1):
        if not len(prompt):
            raise UserError(f"prompt {number} is empty: speculative decoding needs at least one token to start from")
        if context is not None and len(prompt) + own.max_new_tokens > context:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens and {own.max_new_tokens} are to be written: together more "
                f"than the model's context of {context}; write at most {max(0, context - len(prompt))}"
            )


@dataclass
class _Rows:
    """The rows that run, always the first of the cache's. `ids` holds what is known and, behind it, the drafts."""

    model: Any
    facts: ConversionFacts
    draft_length: int
    capacity: int
    cache: BlockCache
    ids: Int[Tensor, "R S"]
    num_known: Int[Tensor, "R"]
    num_read: Int[Tensor, "R"]
    seeds: Int[Tensor, "R"]
    draft_probabilities: Float[Tensor, "R m V"] | None = None
    jobs: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    settings: list[SamplerSettings] = field(default_factory=list)

    @classmethod
    def of(cls, model: Any, facts: ConversionFacts, draft_length: int, capacity: int, max_length: int) -> _Rows:
        device = stock_model(model).get_input_embeddings().weight.device
        group = draft_length + 1 - facts.shift
        num_slots = max_length + 2 * draft_length + 1 + (draft_length + 1) * group
        whole = {"dtype": torch.long, "device": device}
        return cls(
            model,
            facts,
            draft_length,
            capacity,
            BlockCache(stock_model(model).base_model.config, capacity, num_slots),
            ids=torch.zeros(capacity, num_slots, **whole),
            num_known=torch.zeros(capacity, **whole),
            num_read=torch.zeros(capacity, **whole),
            seeds=torch.zeros(capacity, **whole),
        )

    def keep_probabilities(self) -> None:
        """From here on drafts are drawn, and what they were drawn from is kept for their verification."""
        shape = (self.capacity, self.draft_length, len(head_of(self.model).weight))
        self.draft_probabilities = torch.zeros(shape, device=self.ids.device)

    def admit(self, jobs: list[tuple[int, Sequence[int], SamplerSettings, int]]) -> None:
        """Puts prompts behind the rows that run."""
        for job, prompt, settings, seed in jobs:
            row = len(self.jobs)
            self.ids[row, : len(prompt)] = torch.tensor(list(prompt))
            self.num_known[row], self.num_read[row], self.seeds[row] = len(prompt), 0, seed
            self.jobs.append(job)
            self.lengths.append(len(prompt))
            self.settings.append(settings)

    def drop(self, row: int) -> None:
        """Moves the last row into the place of one that is over."""
        last = len(self.jobs) - 1
        if row != last:
            self.cache.move_row(last, row)
            for tensor in (self.ids, self.num_known, self.num_read, self.seeds, self.draft_probabilities):
                if tensor is not None:
                    tensor[row] = tensor[last]
        for column in (self.jobs, self.lengths, self.settings):
            column[row] = column[last]
            column.pop()

    def read(self, rows: slice, *, is_new: bool) -> list[list[int]]:
        """One pass over some rows; returns the tokens that it brought each of them.

        New rows have no drafts yet: their pass reads the whole prompt and one group of masks.
        """
        settings = RowSettings.of(self.settings[rows], self.ids.device)
        num_drafts = 0 if is_new else self.draft_length
        context = max(self.lengths[rows]) if is_new else 1
        verify_states, group_states = self._states(rows, context, num_drafts)
        head = head_of(self.model)._replace(banned=self.facts.mask_token_id)
        verifying = logits(verify_states.flatten(0, 1), head).unflatten(0, verify_states.shape[:2])
        num_right, own = self._verified(rows, verifying, settings)
        brought = self._extended(rows, num_right, own)

        here = torch.arange(len(num_right), device=num_right.device)
        drafting = logits(group_states[here, num_right].flatten(0, 1), head)
        self._draft(rows, drafting, settings)
        for row, tokens in enumerate(brought, start=rows.start):
            self.lengths[row] += len(tokens)
        return brought

    def _states(
        self, rows: slice, context: int, num_drafts: int
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

        num_keys = max(self.lengths[rows]) + num_drafts + len(member)
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
        if self.draft_probabilities is None:
            best = verifying.argmax(-1)
            num_right = (best[:, :-1] == drafts).long().cumprod(1).sum(1)
            return num_right, best.gather(1, num_right[:, None])[:, 0]
        row = torch.arange(len(known), device=known.device)
        wanted = probabilities(verifying.flatten(0, 1), settings.rows(row.repeat_interleave(num_drafts + 1)))
        wanted = wanted.unflatten(0, verifying.shape[:2])
        num_right = torch.zeros_like(known)
        if num_drafts:
            chance = self._numbers(rows, _ACCEPT, place)
            drafted = self.draft_probabilities[rows]
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
        if self.draft_probabilities is None:
            tokens = drafting.argmax(-1)
        else:
            row = torch.arange(len(known), device=known.device).repeat_interleave(self.draft_length)
            drafted = probabilities(drafting, settings.rows(row))
            self.draft_probabilities[rows] = drafted.unflatten(0, place.shape)
            tokens = choose(drafted.log(), self._numbers(rows, _DRAFT, place).flatten(), temperature=1.0)
        self.ids[rows] = self.ids[rows].scatter(1, place, tokens.view_as(place))

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
    tempered = values / torch.where(is_drawn, settings.temperature, 1.0)[:, None].to(values.dtype)
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
