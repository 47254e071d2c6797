"""Prompts with the data's own record of each, for writing answers down. They are read again each time, in bounded
memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from itertools import islice

from transformers import PreTrainedTokenizerBase

from decausal.data.answers import Warn
from decausal.data.documents import read_sources
from decausal.data.encode import BATCH_RECORDS, encode_batch, encode_each, good
from decausal.data.forms import Record
from decausal.data.prompts import Prompt, given, pieces, report_dropped
from decausal.data.reading import Account, Reading, say
from decausal.data.sources import Data, find_sources
from decausal.errors import UserError

# Exactly as the tokens read: with special tokens, and with all spaces.
VERBATIM = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


class AskedPrompts:
    """The prompts of `data`, in the order of its documents.

    A plain text gives the beginning of each of its stretches of tokens, as a prompt of its own. A line on standard
    error says what was read, and a warning which prompts leave no room.

    Args:
        data, reading: See `decausal.data.rows.load_rows`.
        tokenizer: Of the model that will read them.
        max_length: Tokens of a prompt and its answer together.
        num_new_tokens: Those of them that are left for an answer.
        prompt_fraction: Share of a plain text's stretch that becomes the prompt: at least one token, never all.
        num_prompts: How many prompts, from the first; None: all.

    Attributes:
        longest: Tokens of the longest prompt.
        has_conversations: Whether they are conversations, which go through the chat template.
        fingerprint: A hash that changes when the data do.

    Raises:
        UserError: As `load_prompts`; or conversations stand beside other prompts.
    """

    def __init__(
        self,
        data: Data,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        num_new_tokens: int,
        prompt_fraction: float = 0.5,
        num_prompts: int | None = None,
        reading: Reading | None = None,
    ) -> None:
        self._tokenizer, self._max_length, self._room = tokenizer, max_length, max_length - num_new_tokens
        self._fraction, self._num_prompts = prompt_fraction, num_prompts
        self._reading, account = replace(reading or Reading(), needs_answers=False), Account()
        self._sources = find_sources(data, self._reading.split, account)
        described = "\n".join(source.fingerprint() for source in self._sources)
        self.fingerprint = sha256(described.encode()).hexdigest()[:16]
        lengths, dropped_lengths, kinds = list[int](), list[int](), set[bool]()
        for prompt in self._read(account, dropped_lengths):
            lengths.append(len(prompt.ids))
            kinds.add("messages" in prompt.record)
        if not lengths and not dropped_lengths:
            account.refuse_if_all_bad()
        if len(kinds) > 1:
            raise UserError("some of the prompts are conversations and some are not: give one kind at a time")
        say(account.line(sum(lengths)))
        report_dropped(len(lengths), dropped_lengths, f"--max_length {max_length} less {num_new_tokens} new tokens")
        self._count, self.longest, self.has_conversations = len(lengths), max(lengths), kinds == {True}

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Prompt]:
        return self._read(Account(), [])

    def _read(self, account: Account, dropped_lengths: list[int]) -> Iterator[Prompt]:
        on_bad = partial(account.take_unencodable, on_bad_record=self._reading.on_bad_record)
        some = partial(
            _prompts_of_each,
            tokenizer=self._tokenizer,
            max_length=self._max_length,
            longest=self._room,
            prompt_fraction=self._fraction,
        )
        records = read_sources(self._sources, self._reading, account)
        at_once = min(BATCH_RECORDS, self._num_prompts or BATCH_RECORDS)  # so that hardly more are read than wanted
        prompts = good(encode_each(records, some, self._reading.num_proc, at_once), on_bad)
        return islice(self._fitting(prompts, dropped_lengths), self._num_prompts)

    def _fitting(self, prompts: Iterable[Prompt], dropped_lengths: list[int]) -> Iterator[Prompt]:
        for prompt in prompts:
            if 1 <= len(prompt.ids) <= self._room:
                yield prompt
            else:
                dropped_lengths.append(len(prompt.ids))


def _prompts_of_each(
    records: Sequence[Record],
    warn: Warn,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    longest: int,
    prompt_fraction: float,
) -> list[list[Prompt]]:
    """Returns the prompts of each record. Those of plain texts become texts first, and then prompts like others."""
    asked: list[list[Record]] = [[record] for record in records]
    texts = [index for index, record in enumerate(records) if "text" in record]
    for index, document in zip(texts, encode_batch([records[index] for index in texts], tokenizer), strict=True):
        asked[index] = []
        for piece in pieces(document, max_length, longest, prompt_fraction):
            # A prompt gets what comes before a text again.
            text = tokenizer.decode(piece[document.num_before :], **VERBATIM)
            whole = text.rstrip("\ufffd")  # half a character
            asked[index].append({"origin": document.origin, "prompt": whole, "completion": ""})
    prompts = iter(given([record for several in asked for record in several], tokenizer, warn))
    return [list(islice(prompts, len(several))) for several in asked]
