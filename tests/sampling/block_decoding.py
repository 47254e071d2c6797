"""Block decoding spelled out: one row, one position at a time, every state from a pass over the whole row."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decausal.diffusion.layout import visible
from decausal.models.backbone import head_of
from decausal.models.facts import ConversionFacts
from decausal.objectives.head import logits
from decausal.sampling.confidence import confidence
from decausal.sampling.drawing import choose, uniform_numbers
from decausal.sampling.jobs import Job
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from tests.families import FAMILIES
from tests.sampling.stand_ins import conversion_facts

VOCAB_SIZE = 24
MASK = VOCAB_SIZE - 1


def sharp_model(family: str = "qwen3", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in fp64 with well separated logits: rounding decides no comparison."""
    model = FAMILIES[family](vocab_size=VOCAB_SIZE, eos_token_id=None, seed=seed, **changes).double()
    model.get_output_embeddings().weight.data *= 4
    return model


def block_facts(block_size: int, shift: int = 1, causal_context: bool = False, **changes: Any) -> ConversionFacts:
    return conversion_facts(
        MASK, layout="block", block_size=block_size, shift=shift, causal_context=causal_context, **changes
    )


def job_of(
    prompt_ids: list[int],
    settings: SamplerSettings | None = None,
    seed: int = 0,
    name: str = "the prompt",
    ends: tuple[int, ...] = (),
) -> Job:
    """The job that continues a prompt by the settings' `max_new_tokens`."""
    settings = settings or SamplerSettings()
    return Job(Row((list(prompt_ids), []), (settings.max_new_tokens,), name), settings, seed, ends)


@dataclass
class Decoded:
    """A row, and how it came about."""

    ids: list[int]
    blocks: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    num_steps: int = 0
    reason: str = "length"


def whole_row_states(
    model: PreTrainedModel, facts: ConversionFacts, ids: list[int], start: int, window: int | None = None
) -> Tensor:
    """States of finished tokens before `start` and of the block after them, by the definition of the layout."""
    position, document = torch.arange(len(ids)), torch.zeros(1, dtype=torch.long)
    stream = (position >= start).long()
    masks = {
        kind: visible(facts.attention, position[:, None], position, document, document, reach, stream[:, None], stream)
        for kind, reach in (("full_attention", None), ("sliding_attention", window))
    }
    if model.config._attn_implementation == "eager":
        masks = {
            kind: torch.zeros(mask.shape, dtype=torch.double).masked_fill(~mask, -1e300) for kind, mask in masks.items()
        }
    masks = {kind: mask[None, None] for kind, mask in masks.items()}
    layer_types = getattr(model.config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    is_mixed = len(set(layer_types)) > 1
    body = model.base_model(
        input_ids=torch.tensor([ids]),
        position_ids=position[None],
        attention_mask=masks if is_mixed else masks[layer_types[0]],
        use_cache=False,
    )
    return body.last_hidden_state[0]


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    facts: ConversionFacts,
    prompt: list[int],
    settings: SamplerSettings,
    seed: int,
    ends: tuple[int, ...] = (),
    window: int | None = None,
) -> Decoded:
    """Writes one row. `window`: of the model's sliding layers."""
    size, limit = facts.block_size, len(prompt) + settings.max_new_tokens
    head = head_of(model)._replace(banned=MASK)
    ids, row = list(prompt), Decoded([])
    steps: dict[int, int] = {}
    start = len(prompt) // size * size
    while True:
        stop = start + size
        masked = list(range(len(ids), stop))
        ids += [MASK] * len(masked)
        num_open = len(masked)
        step = 0
        while True:
            ended_at = next((p for p in range(start, stop) if p in steps and ids[p] in ends), stop)
            allowed = [p for p in masked if p < ended_at]
            if settings.first_token_from_clean and len(masked) == size:
                allowed = [start]
            if not any(p < limit for p in allowed):
                break
            states = whole_row_states(model, facts, ids, start, window)
            row.num_steps += 1
            found = {p: _candidate(states[p - facts.shift], head, settings, seed, step, p) for p in allowed}
            for position in _kept(found, settings, step, num_open, num_open - len(masked)):
                ids[position] = found[position][0]
                steps[position] = step
                masked.remove(position)
            step += 1
        if ended_at < limit and ended_at < stop:
            end, row.reason = ended_at + 1, "end"
        elif stop >= limit:
            end = limit
        else:
            start = stop
            continue
        places = range(len(prompt), end)
        row.ids = [ids[p] for p in places]
        row.blocks = [p // size for p in places]
        row.steps = [steps[p] for p in places]
        return row


def _candidate(state: Tensor, head: Any, settings: SamplerSettings, seed: int, step: int, position: int) -> Any:
    values = logits(state[None], head)
    numbers = uniform_numbers(torch.tensor([seed]), step, torch.tensor([position]))
    token = choose(values, numbers, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
    probabilities = values[0].softmax(-1).tolist()
    entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
    return int(token), float(confidence(values, token, settings.confidence)), entropy


def _kept(found: dict[int, Any], settings: SamplerSettings, step: int, num_open: int, num_kept: int) -> list[int]:
    if settings.entropy_bound is not None:
        kept, total = [], 0.0
        for position in sorted(found, key=lambda p: found[p][2]):
            if kept and total > settings.entropy_bound:
                break
            kept.append(position)
            total += found[position][2]
        return kept
    ordered = sorted(found, key=lambda p: -found[p][1])
    if settings.threshold is not None:
        sure = [p for p in ordered if found[p][1] >= settings.threshold]
        return sure or ordered[:1]
    num_steps = min(settings.num_steps, num_open)
    return ordered[: math.ceil((step + 1) * num_open / num_steps) - num_kept]
