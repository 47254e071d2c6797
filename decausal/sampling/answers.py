"""A model's own answers to prompts, as training data: what it wrote, token for token, after what it read."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from decausal.data.asked import AskedPrompts
from decausal.data.chat import answer_end_ids
from decausal.data.encode import SpecialTokens
from decausal.data.prompts import Prompt
from decausal.data.reading import Reading
from decausal.data.sources import Data
from decausal.data.template import set_template
from decausal.data.written import Written, as_training_data
from decausal.devices import best_device, decoding_dtype
from decausal.errors import UserError
from decausal.models.checkpoint import Converted, load_causal, load_converted
from decausal.models.names import is_converted
from decausal.sampling.answering import MAX_NEW_TOKENS, STOPS, TRUNCATED, check_options
from decausal.sampling.batch import longest_row
from decausal.sampling.batch_files import model_facts
from decausal.sampling.engines import engine_for
from decausal.sampling.job_files import JobFile, OnProgress, check_target, continued
from decausal.sampling.jobs import BATCH_SIZE, Ended, Engine, Job
from decausal.sampling.ordered import in_order
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.settings.of_model import settings_for
from decausal.sampling.stopping import end_token_ids


@dataclass
class AnswersResult:
    """What a job of answers did.

    Attributes:
        num_wanted: Answers to all prompts.
        num_resumed: Of these, those that an earlier run had finished.
        num_written: Lines that this run added.
        num_cut: Of these, answers that reached the most new tokens, trained without an end.
        num_shortened: Of these, answers that are kept only as far as their text encodes to the tokens that were
            written.
        num_dropped: Answers that reached the most new tokens and were left out.
        num_lost: Answers left out because their text encodes to other tokens from the first one on, or because they are
            empty.
        num_refused: Number of prompts that the engine refused.
        refusal: Why the first of them was refused.
        num_tokens: Tokens that this run wrote, including those of answers that were left out.
        seconds: Time that the run took.
    """

    num_wanted: int
    num_resumed: int
    num_written: int = 0
    num_cut: int = 0
    num_shortened: int = 0
    num_dropped: int = 0
    num_lost: int = 0
    num_refused: int = 0
    refusal: str = ""
    num_tokens: int = 0
    seconds: float = 0.0

    def take(self, ended: Ended | UserError, written: Written | None, is_dropped: bool) -> None:
        """Counts one answer."""
        if isinstance(ended, UserError):
            self.num_refused += 1
            self.refusal = self.refusal or str(ended)
            return
        self.num_tokens += len(ended.ids)
        self.num_lost += written is None
        if written is None:
            return
        self.num_dropped += is_dropped
        if not is_dropped:
            self.num_written += 1
            self.num_shortened += not written.is_whole
            self.num_cut += written.is_cut and written.is_whole


def load_writer(
    model_name_or_path: str | Path,
    chat_template: str | Path | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Converted:
    """Loads a converted model, or an AR model as one that writes from left to right.

    Args:
        model_name_or_path: As `load_converted` and `load_causal` take it.
        chat_template, chat_template_kwargs: See `decausal.data.template.set_template`.

    Raises:
        UserError: There is no such model or template.
    """
    device = best_device()
    read = load_converted if is_converted(model_name_or_path) else load_causal
    converted = read(model_name_or_path, decoding_dtype(device), device)
    set_template(converted.tokenizer, chat_template, chat_template_kwargs)
    return converted


def write_answers(
    converted: Converted,
    data: Data,
    output: str | Path,
    *,
    reading: Reading | None = None,
    num_prompts: int | None = None,
    num_answers: int = 1,
    truncated: str = "keep",
    max_rows: int = BATCH_SIZE,
    max_length: int | None = None,
    prompt_fraction: float = 0.5,
    cuda_graphs: bool | None = None,
    prefix_cache_tokens: int = 0,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> AnswersResult:
    """Writes answers to the prompts of `data` to a jsonl file, which every recipe takes as data.

    A line is the record of the prompt with the answer after it, "finish_reason" ("end", or "length" if it was cut off),
    "num_tokens" and "id". The id is the number of the answer, from 0; prompt i has the answers from i * `num_answers`
    on. Answer i draws from `seed` + i. A job that was killed is continued by the same call.

    Args:
        converted: As `load_writer` gives it.
        data, reading: The prompts; completions and last answers are not read. See `AskedPrompts`.
        output: The file to write.
        num_prompts: How many prompts to answer, from the first. None: all.
        num_answers: Answers to each prompt.
        truncated: What to do with answers that reach `max_new_tokens`: "keep" trains them without an end, "drop" leaves
            them out.
        max_rows: Rows in one forward pass.
        max_length: Longest row, prompt and answer together. None: the model's context, at most 4096.
        prompt_fraction: Share of a plain text that serves as its prompt.
        cuda_graphs, prefix_cache_tokens: See `engine_for`.
        on_progress: See `OnProgress`.
        **options: `SamplerSettings` by name, without stops.

    Raises:
        UserError: A bad setting; data without prompts; a file that cannot be written, or is another job's.
    """
    target = check_target(output, makes_directory=True)
    settings = _settings(converted, options, num_answers, truncated)
    longest = longest_row(converted, max_length)
    if settings.max_new_tokens >= longest:
        raise UserError(f"max_new_tokens={settings.max_new_tokens} leaves no room for a prompt in {longest} tokens")
    reading = reading or Reading()
    prompts = AskedPrompts(
        data,
        converted.tokenizer,
        max_length=longest,
        num_new_tokens=settings.max_new_tokens,
        prompt_fraction=prompt_fraction,
        num_prompts=num_prompts,
        reading=reading,
    )
    facts = {
        "verb": "answers",
        **model_facts(converted, prompts.has_conversations),
        "settings": asdict(settings),
        "data": prompts.fingerprint,
        "num_answers": num_answers,
        "truncated": truncated,
        "max_length": longest,
        **asdict(replace(reading, num_proc=1)),  # any number of processes reads the same
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with continued(target, json.loads(json.dumps(facts))) as file:
        needed = min(prompts.longest + settings.max_new_tokens, longest)
        engine = _engine(converted, max_rows, needed, cuda_graphs, prefix_cache_tokens)
        asked = _Asked(converted, prompts, settings, num_answers, first=_num_done(file))
        return _write(file, asked, engine, max_rows, truncated == "drop", on_progress)


def _settings(converted: Converted, options: dict[str, Any], num_answers: int, truncated: str) -> SamplerSettings:
    if truncated not in TRUNCATED:
        raise UserError(f"truncated={truncated!r} is not accepted: it must be one of {', '.join(TRUNCATED)}")
    check_options(converted.facts, options, num_answers)
    settings = settings_for(converted.facts, **{"max_new_tokens": MAX_NEW_TOKENS, **options})
    if settings.has_stops:
        raise UserError(f"{' and '.join(STOPS)} would end answers that are not whole: leave them out")
    return settings


def _engine(
    converted: Converted, max_rows: int, needed: int, cuda_graphs: bool | None, prefix_cache_tokens: int
) -> Engine:
    """Returns an engine with room for these prompts and no more."""
    block_size = converted.facts.block_size or 1
    return engine_for(
        converted,
        max_rows=max_rows,
        max_length=-(-needed // block_size) * block_size,
        is_autoregressive=converted.facts.layout == "causal",
        cuda_graphs=cuda_graphs,
        prefix_cache_tokens=prefix_cache_tokens,
    )


def _num_done(file: JobFile) -> int:
    """Returns how many answers an earlier run has finished. Those that it left out after the last line are written
    again."""
    return 0 if file.last is None else json.loads(file.last)["id"] + 1


@dataclass(frozen=True)
class _Asked:
    """The answers that are wanted, from the first missing one on."""

    converted: Converted
    prompts: AskedPrompts
    settings: SamplerSettings
    num_answers: int
    first: int

    @property
    def num_wanted(self) -> int:
        return len(self.prompts) * self.num_answers

    def __iter__(self) -> Iterator[tuple[tuple[int, Prompt], Job | UserError]]:
        ends = self._ends()
        numbered = ((i, prompt) for i, prompt in enumerate(self.prompts) for _ in range(self.num_answers))
        for number, (index, prompt) in islice(enumerate(numbered), self.first, None):
            row = Row((prompt.ids.tolist(), []), (self.settings.max_new_tokens,), f"prompt {index + 1}")
            try:
                row.check(self.converted)
            except UserError as error:
                yield (number, prompt), error
                continue
            seed = self.settings.seed + number
            yield (number, prompt), Job(row, self.settings.updated(seed=seed), seed, ends)

    def _ends(self) -> tuple[int, ...]:
        ends, tokenizer = end_token_ids(self.converted), self.converted.tokenizer
        if self.prompts.has_conversations:
            ends += tuple(answer_end_ids(tokenizer, SpecialTokens(tokenizer).ids))
        return tuple(dict.fromkeys(ends))


def _write(
    file: JobFile, asked: _Asked, engine: Engine, max_rows: int, drops_cut: bool, on_progress: OnProgress | None
) -> AnswersResult:
    result = AnswersResult(asked.num_wanted, min(asked.first, asked.num_wanted))
    report = on_progress or (lambda done, total: None)
    report(result.num_resumed, result.num_wanted)
    start = time.perf_counter()
    with closing(in_order(engine, asked, max_rows)) as found:
        for (number, prompt), ended in found:
            written = None
            if isinstance(ended, Ended):
                written = as_training_data(prompt, ended.ids, ended.reason == "end", asked.converted.tokenizer)
            is_dropped = written is not None and written.is_cut and drops_cut
            if written is not None and not is_dropped:
                record = written.record | {"num_tokens": written.num_tokens, "id": number}
                file.write(json.dumps(record, ensure_ascii=False).encode())
            result.take(ended, written, is_dropped)
            report(number + 1, result.num_wanted)
    result.seconds = time.perf_counter() - start
    return result
