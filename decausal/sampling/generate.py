"""Text to text: continue a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from decausal.models.checkpoint import Converted
from decausal.sampling.defaults import settings_for
from decausal.sampling.engines import write
from decausal.sampling.jobs import BATCH_SIZE, Ended, Job, OnStep, refuse_batch_size
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.stopping import end_token_ids, text_before_stop
from decausal.sampling.texts import named, prompt_ids


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
        on_step: Called with every step of every row, see `jobs.OnStep`.
        **options: `SamplerSettings` by name, or by the names other samplers use.

    Returns:
        One Generation for one string, a list for a list.

    Raises:
        UserError: A bad setting, a prompt that does not fit or holds the mask token, no chat template, no start token.
    """
    refuse_batch_size(batch_size)
    settings = settings_for(converted.facts, **options)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    ends = end_token_ids(converted)
    jobs = [
        continuing(converted, text, settings.updated(seed=settings.seed + index), ends, chat=chat, name=name)
        for index, (text, name) in enumerate(zip(texts, named("prompt", texts), strict=True))
    ]
    ended = write(converted, jobs, batch_size=batch_size, on_step=on_step)
    generations = [continuation(converted, *each) for each in zip(texts, jobs, ended, strict=True)]
    return generations[0] if isinstance(prompts, str) else generations


def continuing(
    converted: Converted, prompt: str, settings: SamplerSettings, ends: tuple[int, ...], *, chat: bool, name: str
) -> Job:
    """The job that continues a prompt.

    Args:
        converted: Model, tokenizer and facts.
        prompt: Text.
        settings: How it is continued; its `seed` is the row's own.
        ends: Tokens that end the answer, see `stopping.end_token_ids`.
        chat: Put the prompt through the tokenizer's chat template.
        name: What error messages call it.

    Raises:
        UserError: As `texts.prompt_ids`; a prompt that the model cannot read.
    """
    row = Row((prompt_ids(converted, prompt, chat), []), (settings.max_new_tokens,), name)
    row.check(converted)
    return Job(row, settings, settings.seed, ends)


def continuation(converted: Converted, prompt: str, job: Job, ended: Ended) -> Generation:
    """Returns what an engine made of a prompt, as text."""
    text = text_before_stop(converted.tokenizer, job.row.given[0], ended.ids, job.settings)
    return Generation(
        text=text,
        full_text=prompt + text,
        ids=ended.ids,
        step_of_token=ended.step_of_token,
        num_forwards=ended.num_forwards,
        tokens_per_forward=ended.tokens_per_forward,
        finish_reason=ended.reason,
        block_of_token=None if ended.blocks is None else ended.blocks.of_token,
    )
