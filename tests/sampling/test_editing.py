"""Edits: what is not rewritten stays byte for byte, what fits least is found, and every refusal."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import processors

from decausal.errors import UserError
from decausal.models.checkpoint import Converted, save_converted
from decausal.sampling.editing.changes import Change, apply, coloured_diff, word_diff
from decausal.sampling.editing.edit import Edit, confidences, edit
from decausal.sampling.editing.encoded import encode_texts
from decausal.sampling.filling.infilling import fill
from decausal.verbs.edit import run
from tests.families import MAX_LENGTH
from tests.sampling.tiny_models import converted

MODEL = converted()
TEXT = "def area(width, height):\n    return the rain\n"


@pytest.fixture
def qwen() -> Converted:
    return MODEL


# Fits the context whatever its bytes, and the tokenizer's alphabet knows every byte.
TEXTS = st.text(min_size=1, max_size=14).filter(lambda text: "<|" not in text)


@settings(max_examples=30, deadline=None)
@given(TEXTS, st.sampled_from([{"num_tokens": 0}, {"fraction": 0.0}, {"num_tokens": 0, "span": (0, 1)}]))
def test_with_no_tokens_to_rewrite_a_text_comes_back_byte_for_byte(text: str, choice: dict[str, Any]) -> None:
    edited = edit(MODEL, text, rounds=3, **choice)
    assert edited == Edit(text, text, [], 0, 0, 0)


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.sampled_from([{"num_tokens": 1}, {"fraction": 0.3}, {"fraction": 1.0}]), st.integers(1, 2))
def test_everything_outside_of_the_changes_stays_as_it_was_given(
    text: str, choice: dict[str, Any], rounds: int
) -> None:
    edited = edit(MODEL, text, rounds=rounds, groups=3, num_steps=1, **choice)
    assert edited.text == apply(text, edited.changes)
    end = 0
    for change in edited.changes:
        assert end <= change.start < change.end <= len(text)
        assert change.before == text[change.start : change.end]
        end = change.end
    count = choice.get("num_tokens") or -(-choice["fraction"] * len(encode_texts(MODEL, [text])[0].editable()) // 1)
    # A character of up to four bytes is rewritten as a whole.
    assert edited.num_rewritten <= 4 * count * rounds
    assert edited.num_rounds <= rounds


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.data())
def test_only_tokens_that_touch_the_span_change(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    (encoded,) = encode_texts(MODEL, [text])
    touched = [encoded.offsets[position] for position in encoded.editable([(start, end)])]
    edited = edit(MODEL, text, span=(start, end), num_steps=2, temperature=1.0)
    assert edited.num_rewritten >= len(touched) > 0
    for change in edited.changes:
        assert min(first for first, _ in touched) <= change.start
        assert change.end <= max(last for _, last in touched)


def test_rewriting_a_whole_text_is_filling_one_gap_of_its_length(qwen: Converted) -> None:
    (encoded,) = encode_texts(qwen, [TEXT])
    edited = edit(qwen, TEXT, span=(0, len(TEXT)), temperature=1.0, seed=4)
    filled = fill(qwen, ["", len(encoded.editable())], temperature=1.0, seed=4)
    assert edited.text == filled.full_text
    assert edited.num_forwards == filled.num_forwards
    assert edit(qwen, TEXT, fraction=1.0, temperature=1.0, seed=4).text == edited.text


def test_rewriting_a_marked_part_is_filling_that_gap() -> None:
    model = converted(shift=0)  # under shift 1 an edited row begins with EOS, so that its first token can be rewritten
    start = TEXT.index("width")
    filled = fill(model, [TEXT[:start], len("width"), TEXT[start + len("width") :]], seed=4, num_steps=2)
    for choice in ({"find": "width"}, {"span": (start, start + 5)}):
        edited = edit(model, TEXT, seed=4, num_steps=2, **choice)
        assert edited.num_rewritten == 5
        assert edited.text == filled.full_text


def test_every_occurrence_of_what_is_to_be_found_is_rewritten(qwen: Converted) -> None:
    edited = edit(qwen, "x = 1; x = 2", find="x =", temperature=1.0)
    assert edited.num_rewritten == 6
    assert edited.text[3:7] == "1; " or " 1; " in edited.text


def test_the_token_that_fits_least_becomes_the_one_that_fits_best(qwen: Converted) -> None:
    tokens = confidences(qwen, TEXT, groups=1000)
    worst = min(tokens, key=lambda token: token.probability / token.best_probability)
    assert worst.probability < worst.best_probability
    edited = edit(qwen, TEXT, num_tokens=1, groups=1000)
    assert [(change.start, change.end) for change in edited.changes] == [(worst.start, worst.end)]
    assert edited.num_rewritten == 1
    (encoded,) = encode_texts(qwen, [edited.text])
    if len(encoded.ids) == len(encode_texts(qwen, [TEXT])[0].ids):
        now = confidences(qwen, edited.text, groups=1000)
        assert now[tokens.index(worst)].probability == pytest.approx(worst.best_probability, abs=1e-5)


def model_that_always_says(character: str) -> Converted:
    """One token at every position, whatever the model reads."""
    model = converted("gpt2")
    token = model.tokenizer.convert_tokens_to_ids(character)
    final_norm = model.model.transformer.ln_f
    final_norm.weight.data.zero_()
    final_norm.bias.data.copy_(10 * model.model.get_output_embeddings().weight.data[token])
    return model


def test_rounds_end_when_one_changes_nothing() -> None:
    model = model_that_always_says("a")
    edited = edit(model, "banana", num_tokens=2, rounds=9)
    assert edited.text == "aaaaaa"
    assert (edited.num_rounds, edited.num_rewritten) == (3, 6)
    assert edited.num_forwards > 0
    assert [(change.start, change.before, change.after) for change in edited.changes] == [
        (0, "b", "a"),
        (2, "n", "a"),
        (4, "n", "a"),
    ]
    assert edit(model, "banana", num_tokens=2).text.count("a") == 5
    assert edit(model, "aaa", rounds=9).num_rounds == 1


def test_a_text_does_not_depend_on_its_batch_mates(qwen: Converted) -> None:
    texts = [TEXT, "import", "x = [1, 2]\n"]
    options = {"num_tokens": 3, "rounds": 2, "temperature": 0.9, "num_steps": 2}
    together = edit(qwen, texts, seed=2, **options)
    assert together == edit(qwen, texts, seed=2, batch_size=1, **options)
    assert together == [edit(qwen, text, seed=2 + index, **options) for index, text in enumerate(texts)]
    scored = confidences(qwen, texts)
    for text, found in zip(texts, scored, strict=True):
        for one, other in zip(confidences(qwen, text, batch_size=2), found, strict=True):
            assert (one.text, one.start, one.end) == (other.text, other.start, other.end)
            assert one.probability == pytest.approx(other.probability, abs=1e-5)


def test_the_tokens_of_a_text_are_all_scored_and_cover_it(qwen: Converted) -> None:
    tokens = confidences(qwen, TEXT)
    assert "".join(token.text for token in tokens) == TEXT
    assert all(0 <= token.probability <= token.best_probability <= 1 for token in tokens)


def test_special_tokens_in_a_text_are_never_rewritten(qwen: Converted) -> None:
    text = "ab<|endoftext|>cd"
    assert [token.text for token in confidences(qwen, text)] == ["a", "b", "c", "d"]
    edited = edit(qwen, text, fraction=1.0, temperature=1.0, num_steps=1)
    assert "<|endoftext|>" in edited.text
    assert edited.num_rewritten == 4


def test_characters_of_several_tokens_are_rewritten_as_a_whole(qwen: Converted) -> None:
    edited = edit(qwen, "a 🙂 b", find="🙂", num_steps=1)
    assert edited.num_rewritten == 4
    assert edited.text.startswith("a ")
    assert edited.text.endswith(" b")
    one = edit(qwen, "a 🙂🙂 b", span=(2, 4), num_tokens=1, num_steps=1)
    assert one.num_rewritten == 4
    assert "🙂" in one.text


def test_spaces_that_a_tokenizer_leaves_out_of_its_offsets_are_kept() -> None:
    model = converted()
    model.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for choice in ({"find": "the"}, {"find": "rain"}, {"num_tokens": 3}, {"fraction": 1.0}):
        trimmed = edit(model, TEXT, seed=1, temperature=1.0, **choice)
        assert trimmed == edit(MODEL, TEXT, seed=1, temperature=1.0, **choice)
    assert confidences(model, TEXT)[5].start == confidences(MODEL, TEXT)[5].start


@pytest.mark.parametrize("shift", [0, 1])
def test_the_first_token_can_be_rewritten_under_either_shift(shift: int) -> None:
    edited = edit(converted(shift=shift), "abc", span=(0, 1), temperature=1.0)
    assert edited.num_rewritten == 1
    assert edited.text.endswith("bc")


CHANGES = [Change(0, 2, "ab", "x"), Change(2, 3, "c", ""), Change(5, 6, "f", "[red]")]


def test_a_difference_shows_old_and_new_and_holds_both_texts() -> None:
    diff = word_diff("abcdef", CHANGES)
    assert diff == "[-ab-]{+x+}[-c-]de[-f-]{+[red]+}"
    assert re.sub(r"\{\+.*?\+\}|\[-|-\]", "", diff) == "abcdef"
    shown = coloured_diff("abcdef", CHANGES)
    assert shown.plain == "abxcdef[red]"
    screen = io.StringIO()
    Console(force_terminal=True, color_system="standard", width=80, file=screen).print(shown)
    assert "\x1b[9;31mab\x1b" in screen.getvalue()
    assert apply("abcdef", CHANGES) == "xde[red]"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "the text is empty"),
        (["a", ""], {}, "text 2 is empty"),
        ("a <|mask|> b", {}, "holds the mask token"),
        ("a" * MAX_LENGTH, {}, f"has {MAX_LENGTH + 1} tokens, the model's context {MAX_LENGTH}"),
        ("abc", {"span": (1, 4)}, "span 1:4 is not in the text, which has 3 characters"),
        ("abc", {"span": (2, 2)}, "span 2:2 is not in the text"),
        ("abc", {"span": (-1, 2)}, "span -1:2 is not in the text"),
        ("abc", {"find": "d"}, "'d' is not in the text"),
        ("abc", {"find": ""}, "find='' is not accepted"),
        ("abc", {"find": "a", "span": (0, 1)}, "span and find exclude each other"),
        ("abc", {"num_tokens": 1, "fraction": 0.5}, "num_tokens and fraction exclude each other"),
        ("abc", {"num_tokens": -1}, "num_tokens=-1 is not accepted"),
        ("abc", {"fraction": 1.5}, "fraction=1.5 is not accepted"),
        ("abc", {"fraction": float("nan")}, "fraction=nan is not accepted"),
        ("abc", {"rounds": 0}, "rounds=0 is not accepted"),
        ("abc", {"groups": 0}, "groups=0 is not accepted"),
        ("abc", {"batch_size": 0}, "batch_size=0 is not accepted"),
        ("abc", {"stepz": 1}, "unknown sampler setting 'stepz'"),
    ],
)
def test_bad_input_is_refused_in_one_line(qwen: Converted, text: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        edit(qwen, text, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("layout", [{"layout": "causal"}, {"layout": "block", "block_size": 4}])
def test_layouts_that_cannot_see_what_is_behind_are_refused(layout: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"layout '{layout['layout']}'.*edit need"):
        edit(converted(**layout), "abc")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("edit")
    save_converted(directory / "model", *MODEL)
    (directory / "text.py").write_bytes(b"def f(x):\r\n    return the rain\n")
    return directory


def test_the_command_line_shows_the_difference_or_prints_json_or_the_text(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (saved / "text.py").read_bytes().decode()
    flags = [str(saved / "model"), "--file", str(saved / "text.py"), "--num_tokens", "3"]
    expected = edit(MODEL, text, num_tokens=3)
    assert expected.changes
    assert run(flags) == 0
    reported = capsys.readouterr()
    assert reported.out == word_diff(text, expected.changes) + "\n"
    assert "3 tokens rewritten" in reported.err
    assert run([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected.as_dict()
    assert run([*flags, "--text_only"]) == 0
    assert capsys.readouterr().out == expected.text
    assert (saved / "text.py").read_bytes().decode() == text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["text", "--file", "f"], "not both"),
        (["--file", "/nowhere"], "cannot read /nowhere"),
        (["text", "--span", "3"], "'3' is not START:END"),
        (["text", "--span", "a:b"], "'a:b' is not START:END"),
    ],
)
def test_bad_flags_are_refused(saved: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        run([str(saved / "model"), *flags])


def test_a_file_that_is_no_text_is_refused(saved: Path) -> None:
    (saved / "binary").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match="is not UTF-8 at byte 2"):
        run([str(saved / "model"), "--file", str(saved / "binary")])


def test_the_command_line_fills_a_text_with_gaps(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from decausal.verbs.infill import run as run_infill

    flags = [str(saved / "model"), "--text", "f(x): {gap} return {gap:4};", "--max_gap", "2", "--num_steps", "1"]
    expected = fill(MODEL, ["f(x): ", None, " return ", 4, ";"], max_gap=2, num_steps=1)
    assert run_infill(flags) == 0
    assert capsys.readouterr().out == expected.full_text + "\n"
    assert run_infill([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == expected.ids
    for wrong, message in (
        (["--text", "{gap}", "--prefix", "a"], "give --prefix and --suffix, or --text"),
        ([], "give --prefix and --suffix, or --text"),
        (["--prefix", "a"], "--suffix is missing"),
        (["--suffix", "a"], "--prefix is missing"),
        (["--text", "a {gap} b", "--length", "3"], "write {gap:N}"),
    ):
        with pytest.raises(UserError, match=message):
            run_infill([str(saved / "model"), *wrong])


def test_confidence_is_a_tokens_probability_given_the_others(qwen: Converted) -> None:
    from decausal.models import backbone

    (encoded,) = encode_texts(qwen, ["the rain"])
    for position, token in zip(encoded.editable(), confidences(qwen, "the rain", groups=99), strict=True):
        ids = torch.tensor([encoded.ids])
        ids[0, position] = qwen.facts.mask_token_id
        logits = backbone.logits(qwen.model, ids, qwen.facts.attention)[0, position - 1].detach()
        logits[qwen.facts.mask_token_id] = -torch.inf
        probability = logits.softmax(-1)
        assert token.probability == pytest.approx(float(probability[encoded.ids[position]]), abs=1e-5)
        assert token.best_probability == pytest.approx(float(probability.max()), abs=1e-5)


def test_the_examples_in_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    sections = page[page.index("## Infilling") :]
    examples = re.findall(r"```python\n(.*?)```", sections, re.DOTALL)
    assert len(examples) == 2
    save_converted(tmp_path / "DIR", *MODEL)
    monkeypatch.chdir(tmp_path)
    for example in examples:
        exec(compile(example, "docs/sampling.md", "exec"), {})
