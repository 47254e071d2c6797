"""Reads the prompts of `--sample_prompts` before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decausal.errors import UserError
from decausal.files import parsed_json, read_given
from decausal.wording import quantity

MAX_PROMPTS = 32


@dataclass(frozen=True)
class SamplePrompt:
    """A text to continue, or a user's message to answer (`chat`)."""

    text: str
    chat: bool = False


def read_sample_prompts(path: str | Path) -> list[SamplePrompt]:
    """Reads prompts: one per line, or a jsonl file with records of `prompt`, or of `messages` with one user's message.

    Raises:
        UserError: The file cannot be read, holds no prompts or too many, or has a record of another form.
    """
    path = Path(path).expanduser()
    try:
        lines = read_given(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"--sample_prompts {path}: {reason}") from error
    is_jsonl = path.suffix.lower() == ".jsonl"
    prompts = list(_records(path, lines) if is_jsonl else (SamplePrompt(line) for line in lines if line.strip()))
    if not prompts:
        raise UserError(f"--sample_prompts {path}: it holds no prompt; write one per line")
    if len(prompts) > MAX_PROMPTS:
        raise UserError(
            f"--sample_prompts {path}: it holds {quantity(len(prompts), 'prompt')}, "
            f"and each is continued at each evaluation; give "
            f"at most {MAX_PROMPTS}, and more to decausal batch"
        )
    return prompts


def _records(path: Path, lines: Sequence[str]) -> Iterator[SamplePrompt]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield _parsed(parsed_json(line))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'--sample_prompts {path}: line {number} is neither {{"prompt": text}} nor '
                '{"messages": [{"role": "user", "content": text}]}'
            ) from error


def _parsed(record: Any) -> SamplePrompt:
    if "messages" not in record:
        return SamplePrompt(_text(record["prompt"]))
    (message,) = record["messages"]
    if message["role"] != "user":
        raise ValueError("the message is not the user's")
    return SamplePrompt(_text(message["content"]), chat=True)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value
