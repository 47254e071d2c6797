"""Text that is handed out piece by piece is the whole text."""

from __future__ import annotations

from itertools import permutations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from decausal.sampling.borders import Border
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.stopping import cut_at_stop
from decausal.sampling.texts import text_after
from decausal.serving.text import TextStream, possible_stop
from tests.families import EOS_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = st.text(alphabet="ab \né€😀the", max_size=20)


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS, st.data(), st.lists(st.text(alphabet="ab t", min_size=1, max_size=3), max_size=2))
def test_the_pieces_of_a_stream_are_the_text_up_to_the_stop(before: str, text: str, data, stops: list[str]) -> None:
    assume(not any(one in other for one, other in permutations(stops, 2)))  # a row ends at the first that is whole
    start, ids = ids_of(before), ids_of(text)
    stream, pieces, place = TextStream(TOKENIZER, start, SamplerSettings(stop=tuple(stops))), [], 0
    while place < len(ids):
        step = data.draw(st.integers(1, 4))
        pieces.append(stream.push(ids[place : place + step]))
        place += step
        assert cut_at_stop(text, stops).startswith("".join(pieces))
    pieces.append(stream.finish(ids))
    assert "".join(pieces) == cut_at_stop(text, stops) == stream.sent


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, EOS_ID), max_size=30), st.data())
def test_bytes_that_are_no_text_stream_to_what_they_decode_to(ids: list[int], data) -> None:
    before = ids_of("x = ")
    stream, pieces, place = TextStream(TOKENIZER, before, SamplerSettings()), [], 0
    while place < len(ids):
        step = data.draw(st.integers(1, 4))
        pieces.append(stream.push(ids[place : place + step]))
        place += step
    pieces.append(stream.finish(ids))
    assert "".join(pieces) == text_after(TOKENIZER, before, ids)


def test_a_character_is_never_sent_in_halves() -> None:
    ids = ids_of("a😀b")
    stream = TextStream(TOKENIZER, [], SamplerSettings())
    assert [stream.push([token]) for token in ids] == ["a", "", "", "", "😀", "b"]


def test_what_may_become_a_stop_string_waits() -> None:
    stream = TextStream(TOKENIZER, [], SamplerSettings(stop=("stop",)))
    assert [stream.push([token]) for token in ids_of("a strsto")] == ["a", " ", "", "str", "", "", ""]
    assert stream.finish(ids_of("a strsto")) == "sto"


def test_the_first_of_several_stop_strings_ends_the_text() -> None:
    assert cut_at_stop("abcdef", ["ef", "cd", "x"]) == "ab"
    assert cut_at_stop("abc", []) == "abc"
    assert possible_stop("abc", ["cde", "bcx"]) == 2
    assert possible_stop("abc", []) == 0


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.data())
def test_a_stream_leaves_out_given_characters_inside_of_its_tokens(text: str, data: st.DataObject) -> None:
    border = Border("\n", "  ")
    ids = ids_of(border.start + text + border.end)
    stream, pieces, place = TextStream(TOKENIZER, ids_of("a"), SamplerSettings(), border), [], 0
    while place < len(ids):
        step = data.draw(st.integers(1, 4))
        pieces.append(stream.push(ids[place : place + step]))
        place += step
        assert text.startswith("".join(pieces))
    pieces.append(stream.finish(ids))
    assert "".join(pieces) == text == stream.sent
