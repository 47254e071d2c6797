"""Batch jobs from jsonl to jsonl: in order, in bounded memory, and continued where they were killed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from decausal.errors import UserError, nearest, refuse_broken_text
from decausal.models.checkpoint import Converted
from decausal.sampling.batch import BatchEngine, Wanted
from decausal.sampling.batch_paths import check_job_files, recorded_settings, settings_path
from decausal.sampling.defaults import settings_for
from decausal.sampling.generate import Generation
from decausal.sampling.jobs import BATCH_SIZE
from decausal.sampling.settings import ALIASES, SamplerSettings

ON_ERROR = ("stop", "record")
OnProgress = Callable[[int, int], None]
"""Called with the lines that are written, and all lines."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class BatchResult:
    """What a batch job did.

    Attributes:
        num_lines: Prompts in the file.
        num_resumed: Of these, lines that an earlier run had written.
        num_errors: Lines of this run that hold an error.
        num_tokens: Tokens that this run wrote.
    """

    num_lines: int
    num_resumed: int
    num_errors: int
    num_tokens: int


def run_file(
    converted: Converted,
    prompts: str | Path,
    answers: str | Path,
    *,
    chat: bool = False,
    max_rows: int = BATCH_SIZE,
    cuda_graphs: bool | None = None,
    max_length: int | None = None,
    on_error: str = "stop",
    on_progress: OnProgress | None = None,
    **options: Any,
) -> BatchResult:
    """Answers every line of a jsonl file by a line of another one, in the same order.

    A line is {"prompt": text}, with sampler settings of its own and an "id" where wanted. It is answered by {"id",
    "text", "finish_reason", "num_tokens", "num_forwards"}; where there is no id, by the number of the line, from 0.
    Line i draws from `seed` + i, as in `generate`, unless it has a seed of its own. A job that was killed is continued
    by the same call: whole lines stay, a torn last one is written anew. Beside the answers a file OUT.settings.json
    holds the settings, and a run with others is refused.

    Args:
        converted: Model, tokenizer and facts.
        prompts: The file to read, in UTF-8; empty lines are passed over.
        answers: The file to write.
        chat: See `generate`.
        max_rows: Rows in one forward pass.
        cuda_graphs: See `engine_for`.
        max_length: Longest row; see `BatchEngine`.
        on_error: A line that cannot be answered: "stop" writes what stands before it and raises, "record" answers it
            by {"id", "error"}.
        on_progress: See `OnProgress`.
        **options: `SamplerSettings` by name.

    Raises:
        UserError: A bad setting or line, with its number; files that cannot be read or written; answers of another job.
    """
    if on_error not in ON_ERROR:
        raise UserError(f"on_error={on_error!r} is not accepted: it must be one of {', '.join(ON_ERROR)}")
    source, target = check_job_files(prompts, answers)
    defaults = settings_for(converted.facts, **options)
    num_lines = _count_lines(source)
    engine = BatchEngine(converted, max_rows=max_rows, max_length=max_length, cuda_graphs=cuda_graphs)
    num_errors = num_tokens = 0
    with _continued(target, _job_facts(converted, defaults, chat)) as (file, num_written):
        if num_written > num_lines:
            raise UserError(f"{target} has {num_written} lines and {source} only {num_lines}: not answers to it")
        num_resumed = num_written
        lines = _Lines(source, defaults, chat, num_written)
        _tell(on_progress, num_written, num_lines)
        with closing(engine.answers(lines)) as found:
            for answer in found:
                label, number = lines.labels.pop(num_written)
                if isinstance(answer, UserError) and on_error == "stop":
                    raise UserError(
                        f"{source} line {number}: {answer}; the {num_written} answers before it are written: mend it "
                        "and run again, or give on_error 'record'"
                    )
                file.write(_encoded(label, answer))
                file.flush()
                num_written += 1
                num_errors += isinstance(answer, UserError)
                num_tokens += 0 if isinstance(answer, UserError) else len(answer.ids)
                _tell(on_progress, num_written, num_lines)
    return BatchResult(num_lines, num_resumed, num_errors, num_tokens)


class _Lines:
    """The lines that are left, read one at a time.

    Attributes:
        labels: By the number of a prompt, from 0: its id, and its line in the file, from 1; of those under way.
    """

    def __init__(self, path: Path, defaults: SamplerSettings, chat: bool, num_done: int) -> None:
        self._path, self._defaults, self._chat, self._num_done = path, defaults, chat, num_done
        self.labels: dict[int, tuple[Any, int]] = {}

    def __iter__(self) -> Iterator[Wanted | UserError]:
        for index, number, line in islice(_numbered(self._path), self._num_done, None):
            fields: dict[str, Any] | None = None
            try:
                fields = _parsed(line)
                self.labels[index] = fields.get("id", index), number
                yield self._wanted(fields, index)
            except UserError as error:
                self.labels.setdefault(index, (index, number))
                yield error

    def _wanted(self, fields: dict[str, Any], index: int) -> Wanted:
        options = {name: value for name, value in fields.items() if name not in ("prompt", "id")}
        settings = self._defaults.updated(**{"seed": self._defaults.seed + index, **options})
        return Wanted(fields["prompt"], settings, self._chat)


def _numbered(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yields the number of a prompt, from 0, that of its line, from 1, and the line."""
    index = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield index, number, line
                index += 1


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"this is no JSON: {error}") from None
    except RecursionError:
        raise UserError("this is no JSON of ours: it is nested too deeply") from None
    if not isinstance(fields, dict):
        raise UserError('a line must be an object, such as {"prompt": "def add(a, b):"}')
    if not isinstance(fields.get("prompt"), str):
        raise UserError(f"'prompt' must be a text, not {fields['prompt']!r}" if "prompt" in fields else "no 'prompt'")
    refuse_broken_text(fields["prompt"], "'prompt'")
    accepted = {"prompt", "id", *SamplerSettings.__dataclass_fields__, *ALIASES}
    for name in fields.keys() - accepted:
        raise UserError(f"unknown field '{name}'{nearest(name, accepted)}")
    return fields


def _encoded(label: Any, answer: Generation | UserError) -> bytes:
    if isinstance(answer, UserError):
        told = {"id": label, "error": str(answer)}
    else:
        told = {
            "id": label,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "num_tokens": len(answer.ids),
            "num_forwards": answer.num_forwards,
        }
    # ASCII: an id may hold half of a surrogate pair, which UTF-8 cannot.
    return json.dumps(told).encode() + b"\n"


def _count_lines(path: Path) -> int:
    try:
        return sum(1 for _ in _numbered(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _job_facts(converted: Converted, settings: SamplerSettings, chat: bool) -> dict[str, Any]:
    """What decides the answers, but for the prompts."""
    facts = {"source": converted.facts.source, "layout": converted.facts.layout, "shift": converted.facts.shift}
    told: dict[str, Any] = {"model": facts, "settings": asdict(settings), "chat": chat}
    if chat:
        template = json.dumps(converted.tokenizer.chat_template)
        told["chat_template"] = sha256(template.encode()).hexdigest()[:16]
    return json.loads(json.dumps(told))


@contextmanager
def _continued(path: Path, facts: dict[str, Any]) -> Iterator[tuple[BinaryIO, int]]:
    """Opens the answers behind their last whole line; yields the file and how many lines it has."""
    record = settings_path(path)
    try:
        file = path.open("r+b" if path.exists() else "x+b")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    with file:
        _lock(file, path)
        if file.seek(0, os.SEEK_END):
            _refuse_other_job(path, facts)
        else:
            record.write_text(json.dumps(facts, indent=2) + "\n")
        yield file, _repair(file)


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:  # Windows
        return
    try:
        flock(file, LOCK_EX | LOCK_NB)
    except OSError:
        raise UserError(f"another run is writing {path}: wait for it, or write elsewhere") from None


def _repair(file: BinaryIO) -> int:
    """Cuts a torn last line off and goes to the end; returns the number of whole lines."""
    num_lines = end = position = file.seek(0)
    while chunk := file.read(_CHUNK):
        num_lines += chunk.count(b"\n")
        last = chunk.rfind(b"\n")
        end = position + last + 1 if last >= 0 else end
        position += len(chunk)
    file.truncate(end)
    file.seek(0, os.SEEK_END)
    return num_lines


def _refuse_other_job(path: Path, facts: dict[str, Any]) -> None:
    found = recorded_settings(path)
    flat, wanted = ({**facts.pop("settings", {}), **facts} for facts in (dict(found), dict(facts)))
    changed = [
        f"{name} {flat.get(name)!r}, now {wanted.get(name)!r}" for name in wanted if flat.get(name) != wanted[name]
    ]
    if changed:
        raise UserError(
            f"{path} was begun with {', '.join(changed)}: give the same settings to continue, or write elsewhere"
        )


def _tell(on_progress: OnProgress | None, num_written: int, num_lines: int) -> None:
    if on_progress is not None:
        on_progress(num_written, num_lines)
