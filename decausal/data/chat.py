"""Which tokens of a conversation are the assistant's: found in the text that the chat template renders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int32
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from decausal.errors import UserError

Message = dict[str, Any]
Tokens = tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]  # ids, and which are the assistant's
Span = tuple[int, int]  # first character, and the one after the last

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
END_MARKER = "\uf8f0"  # a private-use character, which no template and no text writes


def encode_conversations(
    conversations: Sequence[tuple[str, list[Message]]],
    tokenizer: PreTrainedTokenizerBase,
    special_ids: Int32[np.ndarray, " special"],
) -> list[Tokens]:
    """Returns each conversation's token ids, and which of them are answers or the end-of-turn token of an answer.

    Answers are what the template marks as `{% generation %}`. In a template without such marks, an answer begins where
    the prompt before it, rendered with its generation prompt, ends; and it ends where its content ends. An assistant's
    message that opens the conversation is no answer. A last answer that the template does not end gets EOS.

    Args:
        conversations: pairs of an origin, for errors, and messages.
        tokenizer: a fast tokenizer with a chat template.
        special_ids: ids of the tokens that are no text.

    Raises:
        UserError: the tokenizer has no template, the template refuses the messages, or answers cannot be found in it.
    """
    refuse_without_template(tokenizer, conversations[0][0])
    if not tokenizer.is_fast:
        raise UserError(f"{conversations[0][0]}: 'messages' need a fast tokenizer, to find the answers' tokens")
    if GENERATION_BLOCK.search(tokenizer.get_chat_template()):
        found = [_marked_by_template(messages, tokenizer, special_ids, origin) for origin, messages in conversations]
    else:
        found = _found_in_text(conversations, tokenizer, special_ids)
    return [_with_end(tokens, special_ids, tokenizer) for tokens in found]


def answer_end_ids(tokenizer: PreTrainedTokenizerBase, special_ids: Int32[np.ndarray, " special"]) -> list[int]:
    """Returns the tokens that answers end with in training on conversations; none without a template that can be read.

    A template may end a turn in two ways: GLM's writes the next role's token, and nothing at the very end.
    """
    if tokenizer.chat_template is None or not tokenizer.is_fast:
        return []
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
    try:
        [(ids, is_answer)] = encode_conversations([("chat template", turns)], tokenizer, special_ids)
    except UserError:
        return []
    ends: list[int] = []
    for last in np.flatnonzero(is_answer & ~np.append(is_answer[1:], False)):
        run = ids[max(last - 1, 0) : last + 1]  # perhaps followed by a newline
        ends += run[np.isin(run, special_ids)][-1:].tolist()
    return list(dict.fromkeys(ends))


def _with_end(
    tokens: Tokens, special_ids: Int32[np.ndarray, " special"], tokenizer: PreTrainedTokenizerBase
) -> tuple[Int32[np.ndarray, " m"], Bool[np.ndarray, " m"]]:
    """Ends the last answer with EOS where the template ends it with nothing: else the model would learn no end."""
    ids, is_answer = tokens
    if not is_answer.any() or tokenizer.eos_token_id is None:
        return tokens
    last = int(np.flatnonzero(is_answer)[-1])
    has_end = np.isin(ids[max(last - 1, 0) : last + 1], special_ids).any()
    if has_end or np.isin(ids[last + 1 :], special_ids).any() or tokenizer.decode(ids[last + 1 :]).strip():
        return tokens
    kept = ids[: last + 1]
    return np.append(kept, np.int32(tokenizer.eos_token_id)), np.append(is_answer[: last + 1], True)


def refuse_without_template(tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
    """Raises UserError where a tokenizer cannot read the conversation of `origin`."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{origin}: 'messages' need a chat template and this tokenizer has none; "
            "set tokenizer.chat_template, or give 'prompt' and 'completion'"
        )


def _marked_by_template(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, special_ids: Int32[np.ndarray, " special"], origin: str
) -> Tokens:
    try:
        rendered = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise _refusal(origin, error) from None
    ids = np.array(rendered["input_ids"], dtype=np.int32)
    is_answer = np.array(rendered["assistant_masks"], dtype=bool)
    is_special = np.isin(ids, special_ids)
    for last in np.flatnonzero(is_answer & ~np.append(is_answer[1:], False)):
        has_end = is_special[max(last - 1, 0) : last + 1].any()  # perhaps followed by a newline
        if not has_end and last + 1 < len(ids):
            is_answer[last + 1] = is_special[last + 1]
    if not is_answer.any():
        raise UserError(f"{origin}: the chat template's generation block marks no token of the answers")
    return ids, is_answer


def _found_in_text(
    conversations: Sequence[tuple[str, list[Message]]],
    tokenizer: PreTrainedTokenizerBase,
    special_ids: Int32[np.ndarray, " special"],
) -> list[Tokens]:
    texts: list[str] = []
    spans: list[list[Span]] = []
    for origin, messages in conversations:
        text = render(messages, tokenizer, origin)
        texts.append(text)
        spans.append(_answer_spans(messages, text, tokenizer, origin))
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens: list[Tokens] = []
    for text, answers, token_ids, offsets in zip(
        texts, spans, batch["input_ids"], batch["offset_mapping"], strict=True
    ):
        ids = np.array(token_ids, dtype=np.int32)
        characters = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        is_answer = np.zeros(len(ids), dtype=bool)
        for span in answers:
            is_answer |= _tokens_within(span, characters)
            end = _end_of_turn(span[1], text, ids, characters, special_ids, tokenizer.eos_token_id)
            is_answer |= _tokens_within((span[1], end), characters)
        tokens.append((ids, is_answer))
    return tokens


def _answer_spans(messages: list[Message], text: str, tokenizer: PreTrainedTokenizerBase, origin: str) -> list[Span]:
    """Finds the assistant's answers in the rendered conversation, as spans of characters."""
    ends = _content_ends(messages, text, tokenizer, origin)
    spans: list[Span] = []
    for index, end in zip(_assistant_indices(messages), ends, strict=True):
        if index == 0:  # answers nothing, and there is no prompt to tell it from
            continue
        prompt = render(messages[:index], tokenizer, origin, add_generation_prompt=True)
        if not text.startswith(prompt):
            raise UserError(
                f"{origin}: cannot tell the answer in message {index + 1} from its prompt, because the chat template "
                "renders earlier messages differently once the answer follows; use a template with {% generation %}"
            )
        spans.append((len(prompt), end))
    return spans


def _assistant_indices(messages: list[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _content_ends(messages: list[Message], text: str, tokenizer: PreTrainedTokenizerBase, origin: str) -> list[int]:
    """Finds where each answer's content ends, by rendering the conversation again with a marker there.

    Rendering the conversation up to the answer would not do: many templates treat the last answer differently.
    """
    if not any(message.get("tool_calls") for message in messages):
        for keep in (str, str.rstrip):  # some templates strip the content
            marked = [
                message | {"content": keep(message["content"]) + END_MARKER}
                if message["role"] == "assistant"
                else message
                for message in messages
            ]
            parts = render(marked, tokenizer, origin).split(END_MARKER)
            if "".join(parts) == text:
                return np.cumsum([len(part) for part in parts[:-1]]).tolist()
    raise UserError(
        f"{origin}: cannot find the answers in what the chat template renders (it rewrites them, or they hold "
        "tool calls); use a template with {% generation %}"
    )


def render(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, origin: str, add_generation_prompt: bool = False
) -> str:
    """Returns the text that the chat template makes of messages.

    Raises:
        UserError: the template refuses them; names `origin`.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError, ValueError) as error:
        raise _refusal(origin, error) from None


def _refusal(origin: str, error: Exception) -> UserError:
    return UserError(f"{origin}: the chat template refuses these messages ({' '.join(str(error).split())})")


def _tokens_within(span: Span, characters: Int[np.ndarray, "n 2"]) -> Bool[np.ndarray, " n"]:
    """Returns which tokens hold a character of the span.

    A token of spaces alone can have an empty range of characters, at its end: some tokenizers trim spaces off.
    """
    first, last = characters[:, 0], characters[:, 1]
    is_overlapping = (first < span[1]) & (last > span[0])
    is_trimmed = (first == last) & (last > span[0]) & (last <= span[1])
    return is_overlapping | is_trimmed


def _end_of_turn(
    answer_end: int,
    text: str,
    ids: Int32[np.ndarray, " n"],
    characters: Int[np.ndarray, "n 2"],
    special_ids: Int32[np.ndarray, " special"],
    eos_token_id: int | None,
) -> int:
    """Returns where the end-of-turn token ends: a special token right behind the answer, or EOS behind spaces."""
    after_spaces = len(text) - len(text[answer_end:].lstrip())
    eos_ids = [] if eos_token_id is None else [eos_token_id]
    for start, ends_turn in ((answer_end, special_ids), (after_spaces, eos_ids)):
        found = np.flatnonzero((characters[:, 0] == start) & np.isin(ids, ends_turn))
        if len(found):
            return int(characters[found[0], 1])
    return answer_end
