"""From a prompt to a job for an engine, and from its result to text."""

from __future__ import annotations

from dataclasses import dataclass

from decausal.data.forms import Record
from decausal.data.prompts import conversation_prompt
from decausal.models.checkpoint import Converted
from decausal.sampling.jobs import Drafts, Ended, Job
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.stopping import text_before_stop
from decausal.sampling.texts import prompt_ids, text_ids


@dataclass(frozen=True)
class Wanted:
    """A prompt to continue.

    Attributes:
        text: The prompt.
        settings: How it is continued. Its `seed` is the row's.
        chat: Whether it goes through the tokenizer's chat template.
        name: What error messages call it.
        conversation: In place of the text: a record with "messages", and maybe "tools" and "chat_template_kwargs".
    """

    text: str
    settings: SamplerSettings
    chat: bool = False
    name: str = "the prompt"
    conversation: Record | None = None


@dataclass(frozen=True)
class Generation:
    """What the model wrote.

    Attributes:
        text: The new text alone, special tokens left out.
        full_text: The prompt or prefix, the new text, and the suffix.
        ids: The new tokens, including an end token.
        step_of_token: The step, from 0, in which each of `ids` was kept.
        num_forwards: Forward passes that this row took part in.
        tokens_per_forward: New tokens divided by `num_forwards`.
        finish_reason: "end" (an end token), "stop" (one of `stop`) or "length".
        block_of_token: The block of each of `ids`, for block models. Steps are counted over the whole row.
        drafts: Only for self-speculation: which drafts were right, and the passes by shape.
    """

    text: str
    full_text: str
    ids: list[int]
    step_of_token: list[int]
    num_forwards: int
    tokens_per_forward: float
    finish_reason: str = "length"
    block_of_token: list[int] | None = None
    drafts: Drafts | None = None


def continuing(converted: Converted, wanted: Wanted, ends: tuple[int, ...]) -> Job:
    """Returns the job that continues a prompt. Its row still has to be checked.

    Args:
        converted: Model, tokenizer and facts.
        wanted: The prompt.
        ends: Tokens that end the answer, see `stopping.end_token_ids`.

    Raises:
        UserError: As `texts.prompt_ids`, or the chat template refuses the conversation.
    """
    settings = wanted.settings
    if wanted.conversation is None:
        ids = prompt_ids(converted, wanted.text, wanted.chat)
    else:
        ids = text_ids(converted.tokenizer, conversation_prompt(wanted.conversation, converted.tokenizer))
    row = Row((ids, []), (settings.max_new_tokens,), wanted.name)
    return Job(row, settings, settings.seed, ends)


def continuation(converted: Converted, prompt: str, job: Job, ended: Ended) -> Generation:
    """Returns the result of an engine for a prompt, as text."""
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
        drafts=ended.drafts,
    )
