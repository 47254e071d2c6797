"""Finds an assistant's answers in what the chat template renders, each after the prompt that it answers.

An answer is what a model has to write after the prompt: the messages before it, rendered with the generation prompt.
Templates may render a message differently once others follow (for example, without its thoughts). So an answer is
looked for in the rendering that ends with it. It is trained in a longer rendering only if that begins in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from decausal.data.messages import Message
from decausal.data.template import ADVICE, render
from decausal.errors import UserError

Span = tuple[int, int]  # the first character, and the one after the last
Warn = Callable[[str], None]

MARKER = "\uf8f0"  # a private-use character that no template and no text contains
THOUGHT = re.compile(r"</?think>")
OPENED = re.compile(r"<think>\s*$")
CLOSED = re.compile(r"</think>\s*$")
REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Document:
    """A text to train on, and the answers in it."""

    text: str
    answers: list[Span]


class Closings:
    """The texts of special tokens, which may end a turn."""

    def __init__(self, special: Sequence[str]) -> None:
        self._special = tuple(special)
        longest_first = sorted(map(re.escape, special), key=len, reverse=True)
        self._first = re.compile(r"\s*(?:" + ("|".join(longest_first) or "(?!)") + ")")

    def end(self, text: str, place: int) -> int:
        """Returns where a special token at `place`, perhaps after spaces, ends; `place` itself if there is none."""
        found = self._first.match(text, place)
        return found.end() if found else place

    def boundary(self, text: str) -> int:
        """Returns where the last special token or space of a text ends."""
        ends = [place + len(each) for each in self._special if (place := text.rfind(each)) >= 0]
        return max([0, *ends, *(found.end() for found in re.finditer(r"\s", text))])

    def is_in(self, text: str) -> bool:
        """Returns whether there is a special token."""
        return bool(self._first.search(text))

    def last_word(self, text: str) -> int:
        """Returns where the special tokens and spaces at the end of a text begin."""
        while True:
            text = text.rstrip()
            if not text.endswith(self._special):
                return len(text)
            text = text[: -max(len(each) for each in self._special if text.endswith(each))]


def is_trained(messages: Sequence[Message], index: int) -> bool:
    """Returns whether a message is an answer to train on. The first message of a conversation is not an answer."""
    return index > 0 and messages[index]["role"] == "assistant" and bool(messages[index].get("weight", 1))


def documents_of(
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]],
    values: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    origin: str,
    closings: Closings,
    warn: Warn,
    *,
    is_cut: bool = False,
) -> list[Document]:
    """Returns the texts to train on, with the answers in each: one text where the template never changes earlier turns.

    Args:
        messages, tools, tokenizer, origin: See `decausal.data.template.render`.
        values: Further values that the template reads.
        closings: The tokenizer's special tokens.
        warn: Called with what the user should know about the template.
        is_cut: Whether the last message is an answer that was cut off. The last text then ends with its content.

    Raises:
        UserError: The template refuses the messages, or changes an answer so that it cannot be separated from its
            prompt.
    """
    renderings = _Renderings(messages, tools, values, tokenizer, origin, warn)
    answers = [_answer(renderings, index, closings) for index in range(len(messages)) if is_trained(messages, index)]
    if is_cut:
        answers[-1] = answers[-1].cut()
    waiting = list(answers)
    found = []
    whole = answers[-1].text if is_cut else renderings.of(len(messages))
    for text in [whole, *(answer.text for answer in reversed(answers))]:
        if found and text not in (answer.text for answer in waiting):
            continue
        spans = {id(answer): span for answer in waiting if (span := answer.span_in(text, closings))}
        if spans:
            found.append(Document(text, list(spans.values())))
            waiting = [answer for answer in waiting if id(answer) not in spans]
    return found[::-1]


@dataclass(frozen=True)
class _Answer:
    """An answer in the rendering that ends with it: where it begins, where its content ends, and where its turn ends.

    `is_ended` is False if the template does not mark the end of its turn.
    """

    text: str
    start: int
    content_end: int
    end: int
    is_ended: bool

    def cut(self) -> _Answer:
        """Returns the answer without what ends its turn."""
        return replace(self, text=self.text[: self.content_end], end=self.content_end, is_ended=False)

    def span_in(self, text: str, closings: Closings) -> Span | None:
        """Returns where the answer stands in a text that begins in the same way, or None for other texts."""
        if self.is_ended and text.startswith(self.text[: self.end]):
            return self.start, self.end
        if not text.startswith(self.text[: self.content_end]):
            return None
        return self.start, closings.end(text, self.content_end)


@dataclass
class _Renderings:
    """Renderings of the first messages of a conversation, each made once."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]]
    values: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase
    origin: str
    warn: Warn
    _made: dict[tuple[int, bool], str] = field(default_factory=dict)

    def of(self, number: int, *, prompt: bool = False) -> str:
        """Returns the first `number` messages rendered, with the generation prompt if asked for."""
        if (number, prompt) not in self._made:
            self._made[number, prompt] = self._render(self.messages[:number], prompt)
        return self._made[number, prompt]

    def around(self, index: int) -> tuple[str, str] | None:
        """Returns what stands before and after the content of a message that ends a rendering, or None."""
        message = {key: part for key, part in self.messages[index].items() if key != "tool_calls"}
        parts = self.with_last(index, message | {"content": MARKER}).split(MARKER)
        return (parts[0], parts[1]) if len(parts) == 2 else None

    def with_last(self, index: int, message: Message) -> str:
        """Returns the renderings of the messages before `index`, and of these with message `index`."""
        return self._render([*self.messages[:index], message])

    def refusal(self, index: int, why: str) -> UserError:
        return UserError(
            f"{self.origin}: cannot find the answer in message {index + 1}, because the chat template {why}"
        )

    def _render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        return render(
            messages, self.tokenizer, self.origin, tools=self.tools, add_generation_prompt=prompt, **self.values
        )


def _answer(renderings: _Renderings, index: int, closings: Closings) -> _Answer:
    message = renderings.messages[index]
    text, prompt = renderings.of(index + 1), renderings.of(index, prompt=True)
    if CLOSED.search(prompt) and _has_thoughts(message):  # the prompt asks for an answer without thoughts
        renderings.warn(
            "the chat template has answers begin after '</think>', so the thoughts in them are left out; "
            "--chat_template_kwargs may let it think"
        )
        message = _without_thoughts(message)
        text = renderings.with_last(index, message)
    start = len(prompt)
    if not text.startswith(prompt):
        text, start = _found_after_another_prompt(renderings, index, text, prompt, closings)
    if not _holds(text[start:], message.get("content") or ""):
        text, start = _written_out(renderings, index, prompt)
    for name in REASONING:
        if isinstance(message.get(name), str) and not _holds(text[start:], message[name]):
            why = f"leaves '{name}' out: drop the field, write it into the content as <think>...</think>, or {ADVICE}"
            raise renderings.refusal(index, why)
    return _Answer(text, start, *_ends(text, start, message, closings))


def _has_thoughts(message: Message) -> bool:
    return bool(THOUGHT.search(message.get("content") or "")) or any(message.get(name) for name in REASONING)


def _without_thoughts(message: Message) -> Message:
    kept = {key: part for key, part in message.items() if key not in REASONING}
    return kept | ({"content": kept["content"].rpartition("</think>")[2].strip()} if kept.get("content") else {})


def _holds(answer: str, content: str) -> bool:
    """Returns whether a rendering holds the whole content, ignoring spaces and the marks of thoughts."""
    if content.strip() in answer:
        return True
    rendered = "".join(answer.split())
    return all("".join(part.split()) in rendered for part in THOUGHT.split(content))


def _ends(text: str, start: int, message: Message, closings: Closings) -> tuple[int, int, bool]:
    """Returns where the last answer's content and turn end, and whether anything marks the end of the turn.

    A tool call may itself end in special tokens. After other content, the first special token ends the turn. A template
    may write more of them to end the document.
    """
    content_end = max(start, closings.last_word(text))
    content = (message.get("content") or "").strip()
    if message.get("tool_calls"):
        whole = len(text.rstrip())
        return whole, whole, content_end < whole
    if content:  # which may also end in special tokens
        place = text.find(content, max(start, content_end - len(content)))
        after = place + len(content)
        if place >= 0 and closings.last_word(text[after:]) == 0:
            content_end = after
    end = closings.end(text, content_end)
    return content_end, end, end > content_end


def _written_out(renderings: _Renderings, index: int, prompt: str) -> tuple[str, int]:
    """Puts an answer whose thoughts the template cuts out after its prompt, as the model should write it."""
    message = renderings.messages[index]
    content, around = message.get("content") or "", renderings.around(index)
    if around is None or not THOUGHT.search(content) or message.get("tool_calls"):
        raise renderings.refusal(index, f"rewrites its content; {ADVICE}")
    if OPENED.search(prompt):
        content = re.sub(r"^\s*<think>\s*", "", content)
    return prompt + content + around[1], len(prompt)


def _found_after_another_prompt(
    renderings: _Renderings, index: int, text: str, prompt: str, closings: Closings
) -> tuple[str, int]:
    """Returns a text with the answer, and where the answer begins, if the rendering does not begin with the prompt.

    Either earlier messages are rendered differently once the answer follows: the answer is then put after the prompt
    that it will have. Or the generation prompt holds more than rendered answers begin with.
    """
    base, around = renderings.of(index), renderings.around(index)
    before = around[0] if around else ""
    opening = prompt.removeprefix(base) if prompt.startswith(base) else ""
    place = before.rfind(opening) + len(opening) if opening.strip() and opening in before else -1
    if place >= 0 and text.startswith(before[:place]) and not closings.is_in(THOUGHT.sub("", before[place:])):
        return prompt + text[place:], len(prompt)
    alike = takewhile(lambda each: len(set(each)) == 1, zip(prompt, before, text, strict=False))
    num_alike = sum(1 for _ in alike)
    common = prompt[: num_alike if num_alike == len(before) else closings.boundary(before[:num_alike])]
    if len(common) < len(base.rstrip()):
        raise renderings.refusal(index, f"renders earlier messages differently once the answer follows; {ADVICE}")
    if not (OPENED.search(prompt) and _has_thoughts(renderings.messages[index])):
        renderings.warn(
            f"the chat template begins an answer that is to be written with {prompt[len(common) :]!r}, and renders "
            "answers without it: they are trained without it; to sample as trained, give a template without it by "
            "--chat_template FILE"
        )
    return text, len(common)
