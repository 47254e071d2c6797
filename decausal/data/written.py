"""Turns answers that a model wrote into records of training data, which train exactly the tokens that it wrote.

A record holds text, which may encode to other tokens than those that were written: a tokenizer joins what the model
wrote as two tokens, or a template strips spaces. So each record is encoded again when it is made. If only the beginning
of an answer encodes to the same tokens, only that part is kept, marked as cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from decausal.data.answers import OPENED
from decausal.data.asked import VERBATIM
from decausal.data.encode import encode_batch
from decausal.data.forms import FINISH_REASON, Record
from decausal.data.prompts import Prompt
from decausal.errors import UserError

TRIES = 8  # lengths at which an answer may be cut
REACH = 16  # tokens of the prompt that say how an answer begins


@dataclass(frozen=True)
class Written:
    """One answer as training data.

    Attributes:
        record: Its fields: "messages" or "prompt" and "completion", what stood beside them, and "finish_reason".
        num_tokens: Tokens of the answer that are trained.
        is_whole: Whether they are everything that the model wrote.
    """

    record: dict[str, Any]
    num_tokens: int
    is_whole: bool

    @property
    def is_cut(self) -> bool:
        """Whether the answer is trained on without an end."""
        return self.record[FINISH_REASON] == "length"


def as_training_data(
    prompt: Prompt, ids: Sequence[int], has_end: bool, tokenizer: PreTrainedTokenizerBase
) -> Written | None:
    """Makes a record of an answer; None if no token of it would be trained as it was written.

    Args:
        prompt: What the model read.
        ids: What it wrote after that.
        has_end: Whether the last of `ids` ends the answer.
        tokenizer: The model's tokenizer.
    """
    ids, before = list(ids), prompt.ids.tolist()
    if has_end:
        for record in _records(prompt, ids[:-1], tokenizer, "end"):
            if _trained(record, before, tokenizer) == ids:
                return Written(_fields(record), len(ids), True)
    length = len(ids) - has_end
    for _ in range(TRIES):
        num_alike = 0
        for record in _records(prompt, ids[:length], tokenizer, "length"):
            trained = _trained(record, before, tokenizer)
            if length and trained == ids[:length]:
                return Written(_fields(record), length, length == len(ids))
            num_alike = max(num_alike, _num_alike(trained, ids))
        length = min(length - 1, num_alike or length)
        if length < 1:
            return None
    return None


def _records(
    prompt: Prompt, ids: list[int], tokenizer: PreTrainedTokenizerBase, finish_reason: str
) -> Iterator[Record]:
    """Yields the records that are tried: the text as it is, without what a template adds, or with what it leaves
    out."""
    start = prompt.ids.tolist()[-REACH:]
    before, whole = tokenizer.decode(start, **VERBATIM), tokenizer.decode(start + ids, **VERBATIM)
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids, **VERBATIM)
    record = prompt.record | {"is_end": finish_reason == "end", FINISH_REASON: finish_reason}
    if "messages" not in prompt.record:
        yield record | {"completion": text}
        return
    given = [message | {"weight": 0} if message["role"] == "assistant" else message for message in record["messages"]]
    opened = OPENED.search(before)  # a thought, which some templates render only where the content opens it
    for content in dict.fromkeys(((opened.group() if opened else "") + text, text, text.strip())):
        yield record | {"messages": [*given, {"role": "assistant", "content": content}]}


def _fields(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("origin", "is_end", "task")}


def _trained(record: Record, before: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens of a record that are trained; none if they do not follow the prompt in one piece."""
    try:
        documents = encode_batch([record], tokenizer)
    except UserError:  # such as a template in which no answer is found
        return []
    if len(documents) != 1:
        return []
    ids, is_trained = documents[0].ids.tolist(), documents[0].is_maskable.tolist()
    if ids[: len(before)] != before or any(is_trained[: len(before)]):
        return []
    after = zip(ids[len(before) :], is_trained[len(before) :], strict=True)
    trained = [token for token, _ in takewhile(lambda pair: pair[1], after)]
    return trained if len(trained) == sum(is_trained) else []


def _num_alike(trained: list[int], ids: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(trained, ids, strict=False)))
