"""Text to text: continue a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from decausal.models.checkpoint import Converted
from decausal.sampling.rows import BATCH_SIZE, Filled, Row, fill_rows, named, prompt_ids, text_after
from decausal.sampling.sampler import OnStep
from decausal.sampling.settings import SamplerSettings


@dataclass(frozen=True)
class Generation:
    """What the model wrote.

    Attributes:
        text: The new text alone, special tokens left out.
        full_text: The prompt or prefix, the new text, and the suffix.
        ids: The new tokens, the end token included where the row ended.
        step_of_token: For each of `ids` the step, from 0, in which it was kept.
        num_forwards: Forward passes that this row took part in.
        tokens_per_forward: len(ids) / num_forwards.
    """

    text: str
    full_text: str
    ids: list[int]
    step_of_token: list[int]
    num_forwards: int
    tokens_per_forward: float


def generate(
    converted: Converted,
    prompts: str | Sequence[str],
    *,
    chat: bool = False,
    batch_size: int = BATCH_SIZE,
    on_step: OnStep | None = None,
    **options: Any,
) -> Generation | list[Generation]:
    """Continues one prompt, or each of several.

    Args:
        converted: Model, tokenizer and facts. The facts' sampler settings are the defaults.
        prompts: Text. An empty prompt starts from the tokenizer's BOS or EOS token.
        chat: Treat each prompt as a user's message and put it through the tokenizer's chat template.
        batch_size: Rows denoised together; it does not change what they become.
        on_step: See `sampler.OnStep`; called for each batch in turn.
        **options: `SamplerSettings` by name, or by the names other samplers use.

    Returns:
        One Generation for one string, a list for a list.

    Raises:
        UserError: A bad setting, a prompt that does not fit or holds the mask token, no chat template, no start token.
    """
    settings = SamplerSettings().updated(**converted.facts.sampler).updated(**options)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    names = named("prompt", texts)
    rows = [
        Row((prompt_ids(converted, text, chat), []), (settings.max_new_tokens,), name)
        for name, text in zip(names, texts, strict=True)
    ]
    filled = fill_rows(
        converted, rows, settings, end_token_ids=_end_token_ids(converted), batch_size=batch_size, on_step=on_step
    )
    generations = [
        generation(converted, text, "", row, done) for text, row, done in zip(texts, rows, filled, strict=True)
    ]
    return generations[0] if isinstance(prompts, str) else generations


def generation(converted: Converted, prefix: str, suffix: str, row: Row, filled: Filled) -> Generation:
    """Returns what a row with one gap became, as text."""
    (gap,) = row.spans()
    written = [position for position in gap if filled.step_of_token[position] >= 0]
    new_ids = [filled.ids[position] for position in written]
    text = text_after(converted.tokenizer, row.given[0], new_ids)
    return Generation(
        text=text,
        full_text=prefix + text + suffix,
        ids=new_ids,
        step_of_token=[filled.step_of_token[position] for position in written],
        num_forwards=filled.num_forwards,
        tokens_per_forward=filled.tokens_per_forward,
    )


def _end_token_ids(converted: Converted) -> tuple[int, ...]:
    """The tokenizer's EOS first, then what else the model's generation settings count as an end."""
    generation_config = getattr(converted.model, "generation_config", None)
    listed = getattr(generation_config, "eos_token_id", None)
    ends = [converted.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    return tuple(dict.fromkeys(end for end in ends if end is not None))
