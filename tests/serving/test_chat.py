"""`decausal chat`: driven line by line, on models of both layouts."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from decausal.errors import UserError
from decausal.models.adapt import adapt
from decausal.models.checkpoint import Converted
from decausal.sampling.generate import generate
from decausal.serving.conversation import Conversation
from decausal.serving.terminal_chat import TerminalChat
from tests.families import CHAT_TEMPLATE, FAMILIES, tiny_tokenizer
from tests.sampling.stand_ins import conversion_facts

LAYOUTS: dict[str, dict[str, Any]] = {"bidirectional": {}, "block": {"layout": "block", "block_size": 4, "shift": 0}}
SHORT = {"max_new_tokens": 8, "num_steps": 4}
CONTEXT = 256


@pytest.fixture(scope="module", params=LAYOUTS)
def model(request: pytest.FixtureRequest) -> Converted:
    network, tokenizer = FAMILIES["qwen3"](max_position_embeddings=CONTEXT), tiny_tokenizer(chat=True)
    mask_token_id = adapt(network, tokenizer)
    network.get_output_embeddings().weight.data *= 4  # sharper: rounding then decides no comparison
    return Converted(network, tokenizer, conversion_facts(mask_token_id, **{"shift": 1, **LAYOUTS[request.param]}))


def talk(
    conversation: Conversation,
    lines: list[str | type[BaseException]],
    on_write: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Types lines until they end; returns all that was written, piece by piece."""
    written: list[str] = []
    left: Iterator[str | type[BaseException]] = iter([*lines, EOFError])

    def read() -> str:
        line = next(left)
        if isinstance(line, str):
            return line
        raise line

    def write(text: str) -> None:
        written.append(text)
        on_write(text)

    TerminalChat(conversation, read, write).run()
    return written


def notes(written: list[str]) -> list[str]:
    return [text.strip()[1:-1] for text in written if text.strip().startswith("[")]


def test_the_first_answer_is_that_of_generate_and_comes_in_pieces(model: Converted) -> None:
    wanted = generate(model, "hi", chat=True, seed=3, **SHORT, temperature=1.0)
    conversation = Conversation(model, **SHORT, temperature=1.0, seed=3)
    pieces = list(conversation.ask("hi"))
    assert "".join(pieces) == wanted.text
    if model.facts.layout == "block":
        assert len(pieces) > 1
    assert conversation.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": wanted.text}]


def test_an_answer_can_be_speculated(model: Converted) -> None:
    options = {"max_new_tokens": 8, "seed": 3, "temperature": 1.0}
    conversation = Conversation(model, **options)
    talk(conversation, ["hi", "/undo", "/speculative true", "hi"])
    assert conversation.messages[1]["content"] == generate(model, "hi", chat=True, speculative=True, **options).text


def test_later_turns_see_earlier_ones_and_undo_and_clear_forget_them(model: Converted) -> None:
    conversation = Conversation(model, **SHORT)
    talk(conversation, ["a", "b"])
    first, second = (message["content"] for message in conversation.messages[1::2])
    template = [{"role": "user", "content": "a"}, {"role": "assistant", "content": first}]
    prompt = model.tokenizer.apply_chat_template(
        [*template, {"role": "user", "content": "b"}], tokenize=False, add_generation_prompt=True
    )
    assert second == generate(model, prompt, **SHORT).text
    before = list(conversation.messages)
    talk(conversation, ["/undo", "b"])
    assert conversation.messages == before
    assert notes(talk(conversation, ["/undo", "/undo", "/undo"]))[-1] == "there is no turn to take back"
    talk(conversation, ["a", "/clear"])
    assert not conversation.messages


def test_commands_change_the_settings_of_the_next_answer(model: Converted) -> None:
    conversation = Conversation(model, max_new_tokens=8)
    reported = talk(conversation, ["/seed 7", "/steps 2", "/temperature 1.5", "hi", "/threshold 0.5", "/threshold"])
    assert notes(reported)[:3] == ["seed 7", "num_steps 2", "temperature 1.5"]
    assert notes(reported)[-2:] == ["threshold 0.5", "threshold 0.5"]
    wanted = generate(model, "hi", chat=True, max_new_tokens=8, seed=7, num_steps=2, temperature=1.5)
    assert conversation.messages[1]["content"] == wanted.text
    assert conversation.settings.num_steps is None


def test_mistakes_are_reported_and_the_program_goes_on(model: Converted) -> None:
    conversation = Conversation(model, **SHORT)
    mask = model.tokenizer.convert_ids_to_tokens(model.facts.mask_token_id)
    lines = ["/sed 3", "/bye", "/temperature -1", "/seed x", "x" * CONTEXT, mask, "", "hi", "/history", "/settings"]
    reported = notes(talk(conversation, lines))
    for says in (
        "did you mean 'seed'",
        "unknown command '/bye'",
        "temperature=-1",
        "seed='x'",
        "shorten it",
        "mask token",
    ):
        assert any(says in note for note in reported), says
    assert len(conversation.messages) == 2
    assert "/undo" in "".join(talk(conversation, ["/help"]))
    assert "user: hi\n" in talk(conversation, ["/history"])
    if model.facts.layout == "block":
        assert any("remask is not possible" in note for note in notes(talk(conversation, ["/remask true"])))
    talk(conversation, ["/undo", "//hi"])
    assert conversation.messages[0]["content"] == "/hi"


def test_quit_and_the_end_of_the_input_leave_and_an_interrupt_at_the_prompt_does_not(model: Converted) -> None:
    conversation = Conversation(model, **SHORT)
    assert talk(conversation, ["/quit", "hi"]) == []
    assert talk(conversation, []) == ["\n"]
    talk(conversation, [KeyboardInterrupt, "hi"])
    assert len(conversation.messages) == 2


@pytest.mark.parametrize("is_signal", [True, False], ids=["signal", "exception"])
def test_an_interrupt_stops_the_answer_and_frees_the_row(model: Converted, is_signal: bool) -> None:
    before = signal.getsignal(signal.SIGINT)
    is_whole = model.facts.layout == "bidirectional"
    order = {"num_steps": 24, "order": "left_to_right"} if is_whole else {"num_steps": 4}
    conversation = Conversation(model, max_new_tokens=24, temperature=1.0, **order)
    for seed in range(20):  # until one is no mere row of broken characters, which come at the end
        conversation.set(seed=seed)
        pieces = list(conversation.ask("hi"))
        conversation.clear()
        if len(pieces) > 2:
            break
    whole = "".join(pieces)
    has_interrupted = False

    def interrupt(text: str) -> None:
        nonlocal has_interrupted
        if not has_interrupted:
            has_interrupted = True
            if not is_signal:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)

    reported = talk(conversation, ["hi"], interrupt)
    assert "stopped; /undo takes the turn back" in notes(reported)
    partial = conversation.messages[1]["content"]
    assert partial
    assert whole.startswith(partial)
    assert len(partial) < len(whole)
    assert conversation._engine.num_running == conversation._engine.num_waiting == 0
    assert signal.getsignal(signal.SIGINT) is before
    talk(conversation, ["/undo", "hi"])
    assert conversation.messages[1]["content"] == whole


def test_when_the_context_is_full_the_oldest_turns_are_left_out_and_that_is_reported(model: Converted) -> None:
    conversation = Conversation(model, system="s", max_length=64, **SHORT)
    reported = notes(talk(conversation, ["a", "b", "c", "d"]))
    assert any("the oldest" in note and "left out" in note for note in reported)
    assert len(conversation.messages) == 8
    seen = [{"role": "system", "content": "s"}, *conversation.messages[conversation.num_left_out : -1]]
    prompt = model.tokenizer.apply_chat_template(seen, tokenize=False, add_generation_prompt=True)
    assert conversation.messages[-1]["content"] == generate(model, prompt, **SHORT).text


def test_what_a_terminal_would_obey_is_not_written(model: Converted) -> None:
    conversation = Conversation(model, **SHORT)
    conversation.ask = lambda text: (piece for piece in ["a\x1b[2J", "\x9bb\n"])  # type: ignore[method-assign]
    assert "".join(talk(conversation, ["hi"])).startswith("a[2Jb\n")


def test_without_a_template_or_with_one_that_refuses_the_error_says_so(model: Converted) -> None:
    tokenizer = model.tokenizer
    try:
        tokenizer.chat_template = None
        with pytest.raises(UserError, match="none: continue texts with `decausal generate"):
            Conversation(model)
        tokenizer.chat_template = "{{ raise_exception('only in French') }}"
        reported = notes(talk(Conversation(model, **SHORT), ["hi"]))
        assert reported == ["the conversation: the chat template refuses these messages (only in French)"]
    finally:
        tokenizer.chat_template = CHAT_TEMPLATE
