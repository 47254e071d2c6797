"""Answers any number of prompts through one engine, from Python or from a file, in order and in bounded memory."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decausal.errors import UserError
from decausal.models.architecture import context_length
from decausal.models.checkpoint import Converted
from decausal.sampling.batch_files import Lines, encoded, job_facts, look_through
from decausal.sampling.engines import engine_for
from decausal.sampling.generation import Generation, Wanted, continuation, continuing
from decausal.sampling.job_files import OnProgress, check_job_files, continued
from decausal.sampling.jobs import BATCH_SIZE, Drafts, Ended, Job
from decausal.sampling.ordered import in_order
from decausal.sampling.settings import MOST_ROWS
from decausal.sampling.settings.of_model import settings_for
from decausal.sampling.stopping import end_token_ids
from decausal.wording import quantity

LONGEST = 4096
"""Longest row in tokens, if neither the model nor the caller sets a limit."""
ON_ERROR = ("stop", "record")


class BatchEngine:
    """Continues prompts `max_rows` at a time. When a row ends, the next one takes its place.

    Answers are those of `generate` with the same seed and settings.

    Example:
        >>> engine = model.engine(max_rows=64)
        >>> for answer in engine.run(prompts, max_new_tokens=64):
        ...     print(answer.text)

    Args:
        converted: Model, tokenizer and facts. The facts' sampler settings are the defaults.
        max_rows: Rows in one forward pass.
        max_length: Longest row, prompt and answer together. None: the model's context, at most 4096. A block model
            allocates memory for `max_rows` such rows.
        cuda_graphs: See `engine_for`.
        prefix_cache_tokens: See `engine_for`.

    Raises:
        UserError: No row fits, or `max_length` exceeds the model's context.
    """

    def __init__(
        self,
        converted: Converted,
        *,
        max_rows: int = BATCH_SIZE,
        max_length: int | None = None,
        cuda_graphs: bool | None = None,
        prefix_cache_tokens: int = 0,
    ) -> None:
        if not 1 <= max_rows <= MOST_ROWS:
            raise UserError(f"max_rows={max_rows} is not accepted: it must be from 1 to {MOST_ROWS}")
        self.converted, self.max_rows = converted, max_rows
        self.defaults = settings_for(converted.facts)
        self._ends = end_token_ids(converted)
        self._engine = engine_for(
            converted,
            max_rows=max_rows,
            max_length=longest_row(converted, max_length),
            cuda_graphs=cuda_graphs,
            prefix_cache_tokens=prefix_cache_tokens,
        )

    def run(self, prompts: Iterable[str], *, chat: bool = False, **options: Any) -> Iterator[Generation]:
        """Continues prompts and yields the answers in their order. Prompts are read as places become free.

        Args:
            prompts: Texts. Row i draws from `seed` + i. An engine runs one iterator at a time: finish or close it
                before the next one.
            chat: See `generate`.
            **options: `SamplerSettings` by name.

        Raises:
            UserError: As `generate`, when that prompt is reached.
        """
        settings = self.defaults.updated(**options)
        wanted = (
            Wanted(text, settings.updated(seed=settings.seed + index), chat, f"prompt {index + 1}")
            for index, text in enumerate(prompts)
        )
        with closing(self.answers(wanted)) as answers:
            for answer in answers:
                if isinstance(answer, UserError):
                    raise answer
                yield answer

    def answers(self, wanted: Iterable[Wanted | UserError]) -> Generator[Generation | UserError, None, None]:
        """Does what `run` does, with settings for each prompt. A refused prompt yields its error in its place.

        Errors in `wanted` are passed on in their places.
        """
        with closing(in_order(self._engine, map(self._asked, wanted), self.max_rows)) as ended:
            for asked, end in ended:
                yield end if asked is None or isinstance(end, UserError) else self._answer(*asked, end)

    def _asked(self, wanted: Wanted | UserError) -> tuple[tuple[Wanted, Job] | None, Job | UserError]:
        if isinstance(wanted, UserError):
            return None, wanted
        try:
            job = continuing(self.converted, wanted, self._ends)
            job.row.check(self.converted)
        except UserError as error:
            return None, error
        return (wanted, job), job

    def _answer(self, wanted: Wanted, job: Job, ended: Ended) -> Generation:
        return continuation(self.converted, wanted.text, job, ended)


@dataclass(frozen=True)
class BatchResult:
    """What a batch job did.

    Attributes:
        num_lines: Prompts in the file.
        num_resumed: Those of them that an earlier run had answered.
        num_errors: Lines of this run that hold an error.
        num_tokens: Tokens that this run wrote.
        drafts: Figures of the lines that self-speculation wrote. None if there are none.
    """

    num_lines: int
    num_resumed: int
    num_errors: int
    num_tokens: int
    drafts: Drafts | None = None


def run_file(
    converted: Converted,
    prompts: str | Path,
    answers: str | Path,
    *,
    chat: bool = False,
    max_rows: int = BATCH_SIZE,
    cuda_graphs: bool | None = None,
    prefix_cache_tokens: int = 0,
    max_length: int | None = None,
    on_error: str = "stop",
    on_progress: OnProgress | None = None,
    **options: Any,
) -> BatchResult:
    """Answers every line of a jsonl file with a line in another file, in the same order.

    A line is {"prompt": text}, or {"messages": [...]} that go through the chat template, with "tools" and
    "chat_template_kwargs" where wanted; a last answer in them is not read. It may have an "id" and sampler settings.
    The answer is {"id", "text", "finish_reason", "num_tokens", "num_forwards"}, with "drafts" under self-speculation.
    Without an id, it has the number of the line, from 0. Line i draws from `seed` + i, as in `generate`, unless it has
    its own seed.

    The same call continues a job that was killed: whole lines stay, and a torn last line is written again. A file
    OUT.settings.json beside the answers holds the settings. A run with other settings is refused.

    Args:
        converted: Model, tokenizer and facts.
        prompts: The file to read, in UTF-8. Empty lines are skipped.
        answers: The file to write.
        chat: See `generate`.
        max_rows: Rows in one forward pass.
        cuda_graphs: See `engine_for`.
        prefix_cache_tokens: See `engine_for`.
        max_length: Longest row; see `BatchEngine`.
        on_error: What happens for a line that cannot be answered. "stop": the answers before it are written, and it
            raises. "record": its answer is {"id", "error"}.
        on_progress: See `OnProgress`.
        **options: `SamplerSettings` by name.

    Raises:
        UserError: A bad setting, a bad line (with its number), a file that cannot be read or written, or answers of
            another job.
    """
    if on_error not in ON_ERROR:
        raise UserError(f"on_error={on_error!r} is not accepted: it must be one of {', '.join(ON_ERROR)}")
    source, target = check_job_files(prompts, answers)
    defaults = settings_for(converted.facts, **options)
    num_lines, has_messages = look_through(source)
    engine = BatchEngine(
        converted,
        max_rows=max_rows,
        max_length=max_length,
        cuda_graphs=cuda_graphs,
        prefix_cache_tokens=prefix_cache_tokens,
    )
    num_errors = num_tokens = 0
    drafts: Drafts | None = None
    facts = job_facts(converted, defaults, chat, has_template=chat or has_messages)
    with continued(target, facts) as file:
        num_resumed = file.num_lines
        if num_resumed > num_lines:
            raise UserError(
                f"{target} has {quantity(num_resumed, 'line')} and {source} only {num_lines}: not answers to it"
            )
        lines = Lines(source, defaults, chat, num_resumed)
        _tell(on_progress, num_resumed, num_lines)
        with closing(engine.answers(lines)) as found:
            for answer in found:
                label, number = lines.labels.pop(file.num_lines)
                if isinstance(answer, UserError) and on_error == "stop":
                    raise UserError(
                        f"{source} line {number}: {answer}; written before it: {quantity(file.num_lines, 'answer')}; "
                        "fix it and run again, or give --on_error record"
                    )
                file.write(encoded(label, answer))
                num_errors += isinstance(answer, UserError)
                if isinstance(answer, Generation):
                    num_tokens += len(answer.ids)
                    drafts = Drafts.sum([drafts, answer.drafts])
                _tell(on_progress, file.num_lines, num_lines)
    return BatchResult(num_lines, num_resumed, num_errors, num_tokens, drafts)


def longest_row(converted: Converted, max_length: int | None) -> int:
    """Returns the length of the longest row for an engine of this model, in whole blocks if it has blocks.

    Raises:
        UserError: `max_length` is over the model's context, or leaves no room for a block.
    """
    context, block_size = context_length(converted.model.config), converted.facts.block_size or 1
    if max_length is not None and context is not None and max_length > context:
        raise UserError(f"max_length={max_length} is over the model's context of {context} tokens; lower it")
    longest = min(context or LONGEST, LONGEST) if max_length is None else max_length
    longest -= longest % block_size
    if longest < 2:
        raise UserError(f"max_length={max_length} leaves no room for a prompt and {block_size} tokens after it")
    return longest


def _tell(on_progress: OnProgress | None, num_written: int, num_lines: int) -> None:
    if on_progress is not None:
        on_progress(num_written, num_lines)
