"""Text to text: continue a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling.bidirectional.sampler import OnStep
from decausal.sampling.blocks.continuing import continue_in_blocks, continue_speculatively
from decausal.sampling.blocks.engine import Finished
from decausal.sampling.defaults import settings_for
from decausal.sampling.jobs import Ended
from decausal.sampling.rows import BATCH_SIZE, Filled, Row, fill_rows, named, prompt_ids, text_after
from decausal.sampling.stopping import refuse_stop_token_ids, text_before_stop, tokens_to_stop


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
        finish_reason: "end" (an end token), "stop" (one of `stop`) or "length".
        block_of_token: For block models, for each of `ids` its block; steps are counted over the whole row.
    """

    text: str
    full_text: str
    ids: list[int]
    step_of_token: list[int]
    num_forwards: int
    tokens_per_forward: float
    finish_reason: str = "length"
    block_of_token: list[int] | None = None


def generate(
    converted: Converted,
    prompts: str | Sequence[str],
    *,
    chat: bool = False,
    batch_size: int = BATCH_SIZE,
    on_step: OnStep | None = None,
    **options: Any,
) -> Generation | list[Generation]:
    """Continues one prompt, or each of several: block by block where the model's layout is "block".

    Args:
        converted: Model, tokenizer and facts. The facts' sampler settings are the defaults.
        prompts: Text. An empty prompt starts from the tokenizer's BOS or EOS token.
        chat: Treat each prompt as a user's message and put it through the tokenizer's chat template.
        batch_size: Rows denoised together; it does not change what they become.
        on_step: See `sampler.OnStep`; called for each batch in turn. With a block model all prompts are one batch.
        **options: `SamplerSettings` by name, or by the names other samplers use.

    Returns:
        One Generation for one string, a list for a list.

    Raises:
        UserError: A bad setting, a prompt that does not fit or holds the mask token, no chat template, no start token.
    """
    settings = settings_for(converted.facts, **options)
    refuse_stop_token_ids(settings, converted.model.config.get_text_config().vocab_size)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    names = named("prompt", texts)
    ids = [prompt_ids(converted, text, chat) for text in texts]
    ends = end_token_ids(converted)
    if settings.speculative:
        if on_step is not None:
            raise UserError("speculative decoding has no steps of denoising to show; leave it out, or do not watch")
        written = continue_speculatively(converted, ids, names, settings, end_token_ids=ends, batch_size=batch_size)
        generations = [continuation(converted, *each, settings) for each in zip(texts, ids, written, strict=True)]
    elif converted.facts.layout == "block":
        finished = continue_in_blocks(
            converted, ids, names, settings, end_token_ids=ends, batch_size=batch_size, on_step=on_step
        )
        generations = [_of_blocks(converted, *each, settings) for each in zip(texts, ids, finished, strict=True)]
    else:
        rows = [Row((given, []), (settings.max_new_tokens,), name) for given, name in zip(ids, names, strict=True)]
        filled = fill_rows(converted, rows, settings, end_token_ids=ends, batch_size=batch_size, on_step=on_step)
        generations = [
            _ended(converted, generation(converted, text, "", row, done), row, text, ends, settings)
            for text, row, done in zip(texts, rows, filled, strict=True)
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


def continuation(
    converted: Converted, prompt: str, given: list[int], ended: Ended, settings: SamplerSettings
) -> Generation:
    """Returns what an engine made of a prompt, as text."""
    text = text_before_stop(converted.tokenizer, given, ended.ids, settings)
    return Generation(
        text=text,
        full_text=prompt + text,
        ids=ended.ids,
        step_of_token=ended.step_of_token,
        num_forwards=ended.num_forwards,
        tokens_per_forward=len(ended.ids) / ended.num_forwards,
        finish_reason=ended.reason,
    )


def _of_blocks(
    converted: Converted, prompt: str, given: list[int], row: Finished, settings: SamplerSettings
) -> Generation:
    written = continuation(converted, prompt, given, row.ended, settings)
    return replace(written, block_of_token=row.block_of_token)


def _ended(
    converted: Converted, whole: Generation, row: Row, prompt: str, ends: Sequence[int], settings: SamplerSettings
) -> Generation:
    """A bidirectional row with the reason why it ended, cut where a stop text is complete."""
    num_new = tokens_to_stop(converted.tokenizer, row.given[0], whole.ids, 0, settings)
    if num_new is None:
        return replace(whole, finish_reason="end" if whole.ids and whole.ids[-1] in ends else "length")
    text = text_before_stop(converted.tokenizer, row.given[0], whole.ids, settings)
    return replace(
        whole,
        text=text,
        full_text=prompt + text,
        ids=whole.ids[:num_new],
        step_of_token=whole.step_of_token[:num_new],
        tokens_per_forward=num_new / whole.num_forwards,
        finish_reason="stop",
    )


def end_token_ids(converted: Converted) -> tuple[int, ...]:
    """The tokenizer's EOS first, then what else the model's generation settings and its facts count as an end."""
    generation_config = getattr(converted.model, "generation_config", None)
    listed = getattr(generation_config, "eos_token_id", None)
    ends = [converted.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    ends += converted.facts.end_token_ids
    return tuple(dict.fromkeys(end for end in ends if end is not None))
