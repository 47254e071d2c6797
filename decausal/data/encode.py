"""From records to token ids, and which of them may be masked: text, answers and completions, never a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int32
from transformers import PreTrainedTokenizerBase

from decausal.data.chat import encode_conversations
from decausal.data.forms import Record
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
    """

    ids: Ids
    is_maskable: Flags
    origin: str
    splittable: bool


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
    on_bad: Callable[[UserError], None] | None = None,
) -> Iterator[Encoded]:
    """Yields each record's tokens in order, encoding a bounded number of records at a time; see `encode_batch`.

    `on_bad` is called with what is wrong with a record that cannot be encoded. It raises, or the record is skipped.
    """
    batch: list[Record] = []
    num_characters = 0
    for record in records:
        batch.append(record)
        num_characters += len(record.get("text", ""))
        if len(batch) == BATCH_RECORDS or num_characters >= BATCH_CHARACTERS:
            yield from _encode_good(batch, tokenizer, append_eos, on_bad)
            batch, num_characters = [], 0
    yield from _encode_good(batch, tokenizer, append_eos, on_bad)


def _encode_good(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    append_eos: bool,
    on_bad: Callable[[UserError], None] | None,
) -> list[Encoded]:
    """Encodes records together. If one of them fails, each half is encoded separately, down to the bad record."""
    try:
        return encode_batch(records, tokenizer, append_eos=append_eos)
    except UserError as error:
        if on_bad is None:
            raise
        if len(records) == 1:
            if not str(error).startswith(records[0]["origin"]):
                raise  # the tokenizer's fault, not the record's
            on_bad(error)
            return []
    middle = len(records) // 2
    halves = (records[:middle], records[middle:])
    return [document for half in halves for document in _encode_good(half, tokenizer, append_eos, on_bad)]


def encode_batch(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, append_eos: bool = True
) -> list[Encoded]:
    """Returns the tokens of records, as `decausal.data.documents` makes them, in their order.

    A text becomes the tokenizer's BOS (if it has one), the text and EOS. Everything except BOS may be masked, and rows
    may cut it anywhere. Of a prompt and its completion, the completion and EOS may be masked. A conversation is
    rendered by the tokenizer's chat template; the assistant's answers and their end-of-turn tokens may be masked. It
    becomes several documents if the template renders earlier turns differently once others follow. A record that was
    cut off ends where it was cut, without an end token.

    Args:
        records: Any mix of texts, completions and conversations.
        tokenizer: The tokenizer of the model that will read the tokens.
        append_eos: Whether texts and completions end with EOS. Conversations end as the template says.

    Raises:
        UserError: A record holds nothing but special tokens, or the mask token; or the tokenizer has no EOS, or no chat
            template that fits. Names the record's origin.
    """
    special = SpecialTokens(tokenizer)
    encoders = {"text": _encode_texts, "prompt": _encode_completions, "messages": _encode_messages}
    encoded: list[list[Encoded]] = [[] for _ in records]
    for content, encoder in encoders.items():
        indices = [index for index, record in enumerate(records) if content in record]
        if indices:
            documents = encoder([records[index] for index in indices], special, append_eos)
            for index, made in zip(indices, documents, strict=True):
                encoded[index] = made
    complete = [document for made in encoded for document in made]
    for document in complete:
        _check(document, special)
    return complete


def _encode_texts(records: Sequence[Record], special: SpecialTokens, append_eos: bool) -> Iterator[list[Encoded]]:
    for record, text_ids in zip(records, _tokenize([record["text"] for record in records], special), strict=True):
        prefix = special.prefix if record.get("is_start", True) else []
        suffix = [special.end] if append_eos and record.get("is_end", True) else []
        yield [_encoded(record, prefix, text_ids + suffix, splittable=True)]


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


def _encode_messages(records: Sequence[Record], special: SpecialTokens, append_eos: bool) -> Iterator[list[Encoded]]:
    conversations = encode_conversations(records, special.tokenizer, special.ids)
    for record, documents in zip(records, conversations, strict=True):
        yield [Encoded(ids, is_answer, record["origin"], splittable=False) for ids, is_answer in documents]


def _tokenize(texts: list[str], special: SpecialTokens) -> list[list[int]]:
    # verbose=False: documents longer than the model's context are cut into rows later, so no warning is needed.
    return special.tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]


def _encoded(record: Record, visible: list[int], maskable: list[int], splittable: bool) -> Encoded:
    ids = np.array(visible + maskable, dtype=np.int32)
    return Encoded(ids, np.arange(len(ids)) >= len(visible), record["origin"], splittable)


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
