"""Which tokens of a conversation are the assistant's, as the chat template marks them or as found in its rendering."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, Int32
from transformers import PreTrainedTokenizerBase

from decausal.data.answers import Closings, Document, Span, Warn, documents_of, is_trained
from decausal.data.forms import Record
from decausal.data.reading import say
from decausal.data.template import (
    ADVICE,
    TemplateRefusalError,
    marks_answers,
    readable,
    refuse_without_template,
    render,
    template_values,
)
from decausal.errors import UserError

Ids = Int32[np.ndarray, " n"]
SpecialIds = Int32[np.ndarray, " special"]
Tokens = tuple[Ids, Bool[np.ndarray, " n"]]  # ids, and which of them are the assistant's
Characters = Int[np.ndarray, "n 2"]  # the first character of each token, and the one after its last
Located = tuple[Ids, Characters]

# Every way to end a turn: templates may end a tool call and the last turn differently.
TURNS = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
CALL = {"type": "function", "function": {"name": "a", "arguments": {"a": "a"}}}
CALLING_TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": "a23456789"}]},
    {"role": "tool", "name": "a", "tool_call_id": "a23456789", "content": "a"},
    {"role": "assistant", "content": "a"},
]


def encode_conversations(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, special_ids: SpecialIds, warn: Warn = say
) -> list[list[Tokens]]:
    """Returns, for each conversation, the ids of its documents and which of them belong to answers or their ends of
    turn.

    Answers are what the template marks as `{% generation %}`. In a template without such marks, an answer is what
    follows the messages before it, rendered with the generation prompt. A conversation is one document if the template
    renders earlier turns the same way once others follow. Otherwise it becomes several, so that each answer stands
    after the prompt that it will have. The first message of a conversation is not an answer, and neither is a message
    of weight 0. An answer at a document's end gets EOS if the template does not end it. An answer that was cut off ends
    its document without any end token.

    Args:
        records: Records with "messages", perhaps "tools", "chat_template_kwargs" and "is_end", and an origin for
            errors.
        tokenizer: A fast tokenizer with a chat template.
        special_ids: Ids of the special tokens.
        warn: Called with what the user should know about the template.

    Raises:
        UserError: The tokenizer has no template, the template refuses the messages, or answers cannot be found in it.
    """
    refuse_without_template(tokenizer, records[0]["origin"])
    if not tokenizer.is_fast:
        raise UserError(f"{records[0]['origin']}: 'messages' need a fast tokenizer, to find the answers' tokens")
    encoder = _Encoder(tokenizer, special_ids, warn)
    found = []
    for record, documents in zip(records, encoder.encode(records), strict=True):
        num_ended = len(documents) - _is_cut(record)
        found.append([*map(encoder.with_end, documents[:num_ended]), *documents[num_ended:]])
    return found


def answer_end_ids(tokenizer: PreTrainedTokenizerBase, special_ids: SpecialIds) -> list[int]:
    """Returns the special tokens that answers end with in training on conversations.

    A template may end a turn in several ways. GLM's writes the next role's token, and nothing at the very end. A line
    is printed if the template refuses an ordinary conversation.
    """
    if not tokenizer.chat_template or not tokenizer.is_fast:
        return []
    encoder, ends = _Encoder(tokenizer, special_ids, lambda line: None), list[int]()
    for turns in (TURNS, CALLING_TURNS):
        try:
            [documents] = encode_conversations(
                [{"origin": "an example", "messages": turns}], tokenizer, special_ids, lambda line: None
            )
        except UserError as error:
            if turns is TURNS:
                say(f"which tokens end an answer is not known beside EOS, because of the chat template: {error}")
            continue
        ends += [end for tokens in documents for end in encoder.ends(tokens)]
    return list(dict.fromkeys(ends))


class _Encoder:
    """Turns conversations into tokens with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_ids: SpecialIds, warn: Warn) -> None:
        self._tokenizer, self._special_ids, self._warn = tokenizer, special_ids, warn
        self._closings = Closings(tokenizer.convert_ids_to_tokens(special_ids.tolist()))

    def encode(self, records: Sequence[Record]) -> list[list[Tokens]]:
        found: list[list[Tokens]] = [[] for _ in records]
        waiting: list[tuple[int, Document]] = []
        for number, record in enumerate(records):
            origin, tools = record["origin"], record.get("tools", ())
            values = template_values(record, self._tokenizer, self._warn)
            messages = readable(record["messages"], self._tokenizer, origin, tools=tools, **values)
            is_cut = _is_cut(record)
            record = {"origin": origin, "messages": messages, "tools": tools, "values": values}
            if not any(is_trained(messages, index) for index in range(len(messages))):
                raise UserError(f"{origin}: no message of the assistant's answers another one and is to be trained on")
            if marks_answers(self._tokenizer, tools):
                tokens = self._marked_by_template(record)
                found[number].append(self._without_end(tokens) if is_cut else tokens)
            else:
                documents = documents_of(
                    messages, tools, values, self._tokenizer, origin, self._closings, self._warn, is_cut=is_cut
                )
                waiting += [(number, document) for document in documents]
        for (number, _), tokens in zip(waiting, self._tokens([each for _, each in waiting]), strict=True):
            found[number].append(tokens)
        return found

    def _tokens(self, documents: Sequence[Document]) -> list[Tokens]:
        if not documents:
            return []
        texts = [document.text for document in documents]
        tokens: list[Tokens] = []
        for document, (ids, characters) in zip(documents, self._located(texts), strict=True):
            if borders := _borders_inside_tokens([start for start, _ in document.answers], characters):
                ids, characters = self._in_pieces(document.text, borders)
            tokens.append((ids, _tokens_within(document.answers, characters)))
        return tokens

    def _located(self, texts: Sequence[str]) -> list[Located]:
        """Returns the tokens of texts, and where each token stands."""
        batch = self._tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [
            (np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int64).reshape(-1, 2))
            for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True)
        ]

    def _in_pieces(self, text: str, borders: Sequence[int]) -> Located:
        """Returns the tokens of the pieces between some borders, so that none stands on both sides of one."""
        starts = [0, *borders]
        pieces = self._located([text[start:stop] for start, stop in zip(starts, [*borders, len(text)], strict=True)])
        moved = [characters + start for start, (_, characters) in zip(starts, pieces, strict=True)]
        return np.concatenate([ids for ids, _ in pieces]), np.concatenate(moved)

    def _marked_by_template(self, record: Record) -> Tokens:
        messages, origin = record["messages"], record["origin"]
        ids, is_answer = self._after_prompts(record, *self._marks(record, len(messages)))
        is_special = np.isin(ids, self._special_ids)
        for first, stop in _runs(is_answer):
            if not self._is_end(ids[self._last(ids, first, stop)]) and stop < len(ids):
                is_answer[stop] = is_special[stop]
        if not is_answer.any():
            raise UserError(f"{origin}: the chat template's generation block marks no token of the answers")
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and not is_trained(messages, index):
                self._clear(record, index, is_answer)
        return ids, is_answer

    def _after_prompts(
        self, record: Record, ids: Ids, is_answer: Bool[np.ndarray, " n"]
    ) -> tuple[Int32[np.ndarray, " m"], Bool[np.ndarray, " m"]]:
        """Returns marked tokens without any that joins a prompt's end to the answer after it."""
        messages = record["messages"]
        text = self._text(record, len(messages)) or ""
        prompts = [
            self._text(record, index, add_generation_prompt=True)
            for index in range(len(messages))
            if is_trained(messages, index)
        ]
        [(_, characters)] = self._located([text])
        starts = [len(prompt) for prompt in prompts if prompt is not None and text.startswith(prompt)]
        borders = _borders_inside_tokens(starts, characters)
        if not borders:
            return ids, is_answer
        spans = []
        for first, stop in _runs(is_answer):
            start, after = characters[first].tolist()
            start = next((border for border in borders if start < border < after), start)
            spans.append((start, int(characters[stop - 1, 1])))
        ids, characters = self._in_pieces(text, borders)
        return ids, _tokens_within(spans, characters)

    def _text(self, record: Record, number: int, *, add_generation_prompt: bool = False) -> str | None:
        """Returns the rendering of the first messages; None if the template refuses them alone."""
        options = {"tools": record["tools"], "add_generation_prompt": add_generation_prompt, **record["values"]}
        try:
            return render(record["messages"][:number], self._tokenizer, record["origin"], **options)
        except TemplateRefusalError:
            return None

    def _marks(self, record: Record, number: int) -> Tokens:
        rendered = render(
            record["messages"][:number],
            self._tokenizer,
            record["origin"],
            tools=record["tools"],
            **record["values"],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        ids = np.array(rendered["input_ids"], dtype=np.int32)
        return ids, np.array(rendered["assistant_masks"], dtype=bool)

    def _clear(self, record: Record, index: int, is_answer: Bool[np.ndarray, " n"]) -> None:
        """Removes the marks of a message: the runs that appear when it is rendered."""
        before, with_it = (len(_runs(self._marks(record, number)[1])) if number else 0 for number in (index, index + 1))
        runs = _runs(is_answer)
        if with_it > len(runs):
            raise UserError(
                f"{record['origin']}: cannot leave message {index + 1} untrained, because the chat template marks "
                f"earlier answers differently once others follow; {ADVICE}"
            )
        for first, stop in runs[before:with_it]:
            is_answer[first:stop] = False

    def with_end(self, tokens: Tokens) -> tuple[Int32[np.ndarray, " m"], Bool[np.ndarray, " m"]]:
        """Ends the last answer with EOS if the template does not end it. Otherwise the model would not learn to
        stop."""
        ids, is_answer = tokens
        if not is_answer.any() or self._tokenizer.eos_token_id is None:
            return tokens
        first, stop = _runs(is_answer)[-1]
        after = ids[stop:]
        is_followed = np.isin(after, self._special_ids).any() or self._tokenizer.decode(after).strip()
        if self._is_end(ids[self._last(ids, first, stop)]) or is_followed:
            return tokens
        eos_token_id = np.int32(self._tokenizer.eos_token_id)
        return np.append(ids[:stop], eos_token_id), np.append(is_answer[:stop], True)

    def _without_end(self, tokens: Tokens) -> Tokens:
        """Cuts off what ends the last answer, the spaces before it, and what follows it."""
        ids, is_answer = tokens
        first, stop = _runs(is_answer)[-1]
        while stop > first and (self._is_end(ids[stop - 1]) or self._is_blank(ids[stop - 1])):
            stop -= 1
        return ids[:stop], is_answer[:stop]

    def ends(self, tokens: Tokens) -> list[int]:
        """Returns the special tokens that the answers end with, ignoring spaces after them."""
        ids, is_answer = tokens
        lasts = [int(ids[self._last(ids, first, stop)]) for first, stop in _runs(is_answer)]
        return [last for last in lasts if self._is_end(last)]

    def _is_end(self, token_id: int | np.integer) -> bool:
        return bool(np.isin(token_id, self._special_ids))

    def _last(self, ids: Ids, first: int, stop: int) -> int:
        """Returns the place of the last token of a run that is not only spaces."""
        for place in range(stop - 1, first, -1):
            if not self._is_blank(ids[place]):
                return place
        return first

    def _is_blank(self, token_id: int | np.integer) -> bool:
        return not self._tokenizer.decode([int(token_id)]).strip()


def _is_cut(record: Record) -> bool:
    messages = record["messages"]
    return not record.get("is_end", True) and is_trained(messages, len(messages) - 1)


def _runs(flags: Bool[np.ndarray, " n"]) -> list[Span]:
    """Returns the stretches where a flag is set."""
    bounds = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(first), int(stop)) for first, stop in bounds.reshape(-1, 2)]


def _borders_inside_tokens(starts: Sequence[int], characters: Characters) -> list[int]:
    """Returns the beginnings of answers where no token begins, because one joins the prompt's end to the answer.

    The model will be given the prompt alone, and has to write all of the answer after it.
    """
    first, last = characters[:, 0], characters[:, 1]
    return [start for start in starts if ((first < start) & (start < last)).any()]


def _tokens_within(spans: Sequence[Span], characters: Characters) -> Bool[np.ndarray, " n"]:
    """Returns which tokens hold a character of one of the spans.

    A token of spaces can have an empty range of characters at
    its end, since some tokenizers trim spaces.
    """
    first, last = characters[:, 0], characters[:, 1]
    is_within = np.zeros(len(characters), dtype=bool)
    for start, stop in spans:
        is_overlapping = (first < stop) & (last > start)
        is_trimmed = (first == last) & (last > start) & (last <= stop)
        is_within |= is_overlapping | is_trimmed
    return is_within
