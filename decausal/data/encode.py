"""From records to token ids, and which of them may be masked: text, answers and completions, never a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int32
from transformers import PreTrainedTokenizerBase

from decausal.data.answers import Warn
from decausal.data.chat import encode_conversations
from decausal.data.forms import Record
from decausal.data.reading import say
from decausal.data.workers import in_order
from decausal.errors import UserError

Ids = Int32[np.ndarray, " n"]
Flags = Bool[np.ndarray, " n"]

BATCH_RECORDS = 1024
BATCH_CHARACTERS = 1 << 21


@dataclass(frozen=True)
class Encoded:
    """One document as tokens.

    Attributes:
        ids: Token ids, special tokens included.
        is_maskable: Which tokens noise may mask, and thereby train. The others stay clean and visible.
        origin: Where the document was read.
        splittable: Whether a row may end within it (plain text) or must hold all of it (a prompt and its answer).
        num_before: How many of the first tokens the tokenizer puts before a text (its BOS). Each piece of a document
            that is split is read by itself, so it begins with them too: without BOS, Gemma 3 hardly predicts text.
    """

    ids: Ids
    is_maskable: Flags
    origin: str
    splittable: bool
    num_before: int = 0


Made = TypeVar("Made")
EncodeSome = Callable[[Sequence[Record], Warn], Sequence[Made]]
"""Encodes records together, and calls its second argument with what the user should know."""
OnBad = Callable[[UserError], None]


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens that a tokenizer puts around a text, looked up once per batch."""

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def prefix(self) -> list[int]:
        """The ids that the tokenizer itself puts before a text: its BOS, or none."""
        probe = self.tokenizer("a", return_special_tokens_mask=True)
        flags = [*probe["special_tokens_mask"], 0]
        return list(probe["input_ids"][: flags.index(0)])

    @cached_property
    def end(self) -> int:
        """The end-of-text token's id."""
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-text token; set its eos_token")
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def ids(self) -> Ids:
        """The ids of all special tokens."""
        added = (index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special)
        return np.array(sorted({*self.tokenizer.all_special_ids, *added}), dtype=np.int32)


def encode(record: Record, tokenizer: PreTrainedTokenizerBase, *, append_eos: bool = True) -> Encoded:
    """Returns the tokens of a record that makes one document; see `encode_batch`."""
    (document,) = encode_batch([record], tokenizer, append_eos=append_eos)
    return document


def encode_stream(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    append_eos: bool = True,
    on_bad: OnBad | None = None,
    num_proc: int = 1,
) -> Iterator[Encoded]:
    """Yields each record's tokens in order, encoding a bounded number of records at a time; see `encode_batch`.

    `on_bad` is called with what is wrong with a record that cannot be encoded. It raises, or the record is skipped.
    """
    encode_some = partial(encode_records, tokenizer=tokenizer, append_eos=append_eos)
    yield from good(encode_each(records, encode_some, num_proc), on_bad)


def good(found: Iterable[tuple[Record, list[Made] | UserError]], on_bad: OnBad | None) -> Iterator[Made]:
    """Yields what `encode_each` made of the records. Errors go to `on_bad`, or are raised."""
    for _, made in found:
        if not isinstance(made, UserError):
            yield from made
        elif on_bad is None:
            raise made
        else:
            on_bad(made)


def encode_each(
    records: Iterable[Record], encode_some: EncodeSome[Made], num_proc: int, at_once: int | None = None
) -> Iterator[tuple[Record, Made | UserError]]:
    """Yields each record with what is made of it, or with the error that says why it cannot be encoded.

    Args:
        records: Read in batches of bounded size.
        encode_some: Encodes a batch.
        num_proc: Processes that encode.
        at_once: Records in a batch; None: `BATCH_RECORDS`.

    Raises:
        UserError: The tokenizer is at fault, not a record; or a process ended early.
    """
    work = partial(_encode_with_notes, encode_some=encode_some)
    for batch, (made, notes) in in_order(work, _batches(records, at_once or BATCH_RECORDS), num_proc):
        for line in notes:
            say(line)
        yield from zip(batch, made, strict=True)


def _batches(records: Iterable[Record], at_once: int) -> Iterator[list[Record]]:
    batch: list[Record] = []
    num_characters = 0
    for record in records:
        batch.append(record)
        num_characters += _num_characters(record)
        if len(batch) == at_once or num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _num_characters(record: Record) -> int:
    texts = [record.get(name, "") for name in ("text", "prompt", "completion")]
    return sum(map(len, texts)) + sum(len(message["content"] or "") for message in record.get("messages", ()))


def _encode_with_notes(
    records: Sequence[Record], encode_some: EncodeSome[Made]
) -> tuple[list[Made | UserError], list[str]]:
    notes: dict[str, None] = {}
    return _encode_good(records, encode_some, lambda line: notes.update({line: None})), list(notes)


def _encode_good(records: Sequence[Record], encode_some: EncodeSome[Made], warn: Warn) -> list[Made | UserError]:
    """Encodes records together. If one of them fails, each half is encoded separately, down to the bad record."""
    try:
        return list(encode_some(records, warn))
    except UserError as error:
        plain = UserError(str(error))  # others of its kind cannot be sent to another process
        if len(records) == 1:
            if not str(error).startswith(records[0]["origin"]):
                raise plain from None  # the tokenizer's fault, not the record's
            return [plain]
    middle = len(records) // 2
    halves = (records[:middle], records[middle:])
    return [each for half in halves for each in _encode_good(half, encode_some, warn)]


def encode_batch(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, append_eos: bool = True
) -> list[Encoded]:
    """Returns the tokens of records, as `decausal.data.documents` makes them, in their order.

    A text, or a piece of a long one, becomes the tokenizer's BOS (if it has one), the text, and EOS at its end.
    Everything except BOS may be masked, and rows may cut it anywhere. Of a prompt and its completion, the completion
    and EOS may be masked. A conversation is rendered by the tokenizer's chat template; the assistant's answers and
    their end-of-turn tokens may be masked. It becomes several documents if the template renders earlier turns
    differently once others follow. A record that was cut off ends where it was cut, without an end token.

    Args:
        records: Any mix of texts, completions and conversations.
        tokenizer: The tokenizer of the model that will read the tokens.
        append_eos: Whether texts and completions end with EOS. Conversations end as the template says.

    Raises:
        UserError: A record holds nothing but special tokens, or the mask token; or the tokenizer has no EOS, or no chat
            template that fits. Names the record's origin.
    """
    return [document for each in encode_records(records, say, tokenizer, append_eos) for document in each]


def encode_records(
    records: Sequence[Record], warn: Warn, tokenizer: PreTrainedTokenizerBase, append_eos: bool = True
) -> list[list[Encoded]]:
    """Returns the documents of each record; see `encode_batch`. `warn` is called with what the user should know."""
    special = SpecialTokens(tokenizer)
    encoders = {"text": _encode_texts, "prompt": _encode_completions, "messages": partial(_encode_messages, warn=warn)}
    encoded: list[list[Encoded]] = [[] for _ in records]
    for content, encoder in encoders.items():
        indices = [index for index, record in enumerate(records) if content in record]
        if indices:
            documents = encoder([records[index] for index in indices], special, append_eos)
            for index, made in zip(indices, documents, strict=True):
                encoded[index] = made
    for made in encoded:
        for document in made:
            _check(document, special)
    return encoded


def _encode_texts(records: Sequence[Record], special: SpecialTokens, append_eos: bool) -> Iterator[list[Encoded]]:
    for record, text_ids in zip(records, _tokenize([record["text"] for record in records], special), strict=True):
        suffix = [special.end] if append_eos and record.get("is_end", True) else []
        yield [_encoded(record, special.prefix, text_ids + suffix, splittable=True, num_before=len(special.prefix))]


def _encode_completions(records: Sequence[Record], special: SpecialTokens, append_eos: bool) -> Iterator[list[Encoded]]:
    """Tokenises prompt and completion as one text, unless a token would then span their border.

    The prompt's ids are always those of the prompt alone, which the model reads when it has to complete it.
    """
    prompts = _tokenize([record["prompt"] for record in records], special)
    wholes = _tokenize([record["prompt"] + record["completion"] for record in records], special)
    for record, prompt, whole in zip(records, prompts, wholes, strict=True):
        is_prefix = whole[: len(prompt)] == prompt
        completion = whole[len(prompt) :] if is_prefix else _tokenize([record["completion"]], special)[0]
        suffix = [special.end] if append_eos and record.get("is_end", True) else []
        yield [_encoded(record, special.prefix + prompt, completion + suffix, splittable=False)]


def _encode_messages(
    records: Sequence[Record], special: SpecialTokens, append_eos: bool, warn: Warn
) -> Iterator[list[Encoded]]:
    conversations = encode_conversations(records, special.tokenizer, special.ids, warn)
    for record, documents in zip(records, conversations, strict=True):
        yield [Encoded(ids, is_answer, record["origin"], splittable=False) for ids, is_answer in documents]


def _tokenize(texts: list[str], special: SpecialTokens) -> list[list[int]]:
    # verbose=False: documents longer than the model's context are cut into rows later, so no warning is needed.
    return special.tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]


def _encoded(record: Record, visible: list[int], maskable: list[int], splittable: bool, num_before: int = 0) -> Encoded:
    ids = np.array(visible + maskable, dtype=np.int32)
    return Encoded(ids, np.arange(len(ids)) >= len(visible), record["origin"], splittable, num_before)


def refuse_mask_token(ids: Ids, origin: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError if a text holds the mask token."""
    if tokenizer.mask_token_id is not None and (ids == tokenizer.mask_token_id).any():
        raise UserError(
            f"{origin}: the text holds the mask token {tokenizer.mask_token!r}, which only noise may write; remove it "
            "from the text, or choose another with --mask_token"
        )


def _check(document: Encoded, special: SpecialTokens) -> None:
    refuse_mask_token(document.ids, document.origin, special.tokenizer)
    if np.isin(document.ids[document.is_maskable], special.ids).all():
        raise UserError(f"{document.origin}: nothing but special tokens; remove this document")
