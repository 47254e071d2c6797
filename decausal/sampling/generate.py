"""Continues prompts, from text to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decausal.models.checkpoint import Converted
from decausal.sampling.engines import write
from decausal.sampling.generation import Generation, Wanted, continuation, continuing
from decausal.sampling.jobs import BATCH_SIZE, OnStep, refuse_batch_size
from decausal.sampling.settings.of_model import settings_for
from decausal.sampling.stopping import end_token_ids
from decausal.sampling.texts import named


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
        chat: Whether each prompt is a user's message for the tokenizer's chat template.
        batch_size: Rows denoised together; it does not change the results.
        on_step: Called with every step of every row, see `jobs.OnStep`.
        **options: `SamplerSettings` by name, or by the names other samplers use.

    Returns:
        One Generation for one string, a list for a list.

    Raises:
        UserError: A bad setting, a prompt that does not fit or holds the mask token, or a missing chat template or
            start token.
    """
    refuse_batch_size(batch_size)
    settings = settings_for(converted.facts, **options)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    ends = end_token_ids(converted)
    jobs = [
        continuing(converted, Wanted(text, settings.updated(seed=settings.seed + index), chat, name), ends)
        for index, (text, name) in enumerate(zip(texts, named("prompt", texts), strict=True))
    ]
    ended = write(converted, jobs, batch_size=batch_size, on_step=on_step)
    generations = [continuation(converted, *each) for each in zip(texts, jobs, ended, strict=True)]
    return generations[0] if isinstance(prompts, str) else generations
