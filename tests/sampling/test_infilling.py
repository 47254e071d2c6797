"""Gaps of known and of unknown length: identities, scores against brute force, and every refusal."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from decausal.errors import UserError
from decausal.models import backbone
from decausal.models.checkpoint import Converted
from decausal.sampling.filling.gaps import Piece, parse_gaps, split_gaps
from decausal.sampling.filling.infilling import fill, infill
from decausal.sampling.filling.lengths import CONTEXT_TOKENS, SCORING_GROUPS, coarse_lengths
from decausal.sampling.rows import Row
from decausal.sampling.scoring import score_tokens
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.texts import ids_after, prompt_ids, text_ids
from tests.families import MAX_LENGTH
from tests.sampling.denoising import denoise
from tests.sampling.tiny_models import converted

MODEL = converted()


@pytest.fixture
def qwen() -> Converted:
    return MODEL


SETTINGS = {
    "greedy": {"threshold": 0.6},
    "static": {"num_steps": 3},
    "sampled": {"num_steps": 3, "temperature": 1.0, "seed": 7},
}
TEXT: list[Piece] = ["def f(", 3, "):\n    return ", 2, "\n"]


@pytest.mark.parametrize("sampler", SETTINGS.values(), ids=SETTINGS.keys())
def test_filling_one_gap_is_infilling(qwen: Converted, sampler: dict[str, Any]) -> None:
    filling = fill(qwen, ["def f(", 4, "):\n"], **sampler)
    generation = infill(qwen, "def f(", "):\n", 4, **sampler)
    assert (filling.texts, filling.ids, filling.step_of_token) == (
        [generation.text],
        [generation.ids],
        [generation.step_of_token],
    )
    assert (filling.full_text, filling.num_forwards) == (generation.full_text, generation.num_forwards)
    assert filling.tokens_per_forward == generation.tokens_per_forward
    assert filling.trials == []


@pytest.mark.parametrize("sampler", SETTINGS.values(), ids=SETTINGS.keys())
def test_many_gaps_are_denoised_as_the_open_positions_of_one_row(qwen: Converted, sampler: dict[str, Any]) -> None:
    filling = fill(qwen, ["def f(", 3, "):\n    return", 2, "\n"], **sampler)
    pieces = [text_ids(qwen.tokenizer, text) for text in ("def f(", "):\n    return", "\n")]
    ids = [*pieces[0], *[0] * 3, *pieces[1], *[0] * 2, *pieces[2]]
    starts = [len(pieces[0]), len(pieces[0]) + 3 + len(pieces[1])]
    opened = [*range(starts[0], starts[0] + 3), *range(starts[1], starts[1] + 2)]
    is_open = torch.zeros(1, len(ids), dtype=torch.bool)
    is_open[0, opened] = True
    denoised = denoise(qwen.model, qwen.facts, torch.tensor([ids]), is_open, SamplerSettings(**sampler))
    assert [*filling.ids[0], *filling.ids[1]] == denoised.ids[0, opened].tolist()
    assert [*filling.step_of_token[0], *filling.step_of_token[1]] == denoised.step_of_token[0, opened].tolist()
    assert filling.num_forwards == int(denoised.num_forwards)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=5), min_size=2, max_size=4), st.data())
def test_what_is_given_stays_as_it_is_and_gaps_have_their_lengths(texts: list[str], data: st.DataObject) -> None:
    texts[1:-1] = [text or "-" for text in texts[1:-1]]
    lengths = [data.draw(st.integers(1, 3)) for _ in texts[1:]]
    pieces: list[Piece] = [texts[0]]
    for length, text in zip(lengths, texts[1:], strict=True):
        pieces += [length, text]
    filling = fill(MODEL, pieces, num_steps=1)
    assert [len(ids) for ids in filling.ids] == filling.lengths == lengths
    rest = filling.full_text
    for text, written in zip(texts, [*filling.texts, ""], strict=True):
        assert rest.startswith(text + written)
        rest = rest[len(text + written) :]
    assert rest == ""


MANY: list[list[Piece]] = [TEXT, ["", None, " is ", 2], ["x", None, " + ", None, "\n", 1, "!"]]


@pytest.mark.parametrize("search", ["candidates", "grow"])
@pytest.mark.parametrize("sampler", [SETTINGS["greedy"], SETTINGS["sampled"]], ids=["greedy", "sampled"])
def test_a_text_does_not_depend_on_its_batch_mates(qwen: Converted, sampler: dict[str, Any], search: str) -> None:
    options = {"max_gap": 3, "length_search": search, **sampler}
    seed = options.pop("seed", 0)
    together = fill(qwen, MANY, seed=seed, **options)
    in_fours = fill(qwen, MANY, seed=seed, batch_size=4, **options)
    alone = [fill(qwen, text, seed=seed + index, **options) for index, text in enumerate(MANY)]
    for one, other in ((together, in_fours), (together, alone)):
        assert [replace(each, trials=[]) for each in one] == [replace(each, trials=[]) for each in other]
        for a, b in zip(one, other, strict=True):
            assert [trial.lengths for trial in a.trials] == [trial.lengths for trial in b.trials]
            scores = [[trial.score for trial in each.trials] for each in (a, b)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-3)


@pytest.mark.parametrize("search", ["candidates", "grow"])
def test_an_unknown_length_gives_what_that_length_gives_when_it_is_known(qwen: Converted, search: str) -> None:
    found = fill(qwen, ["x = [", None, "]\ny = ", None, "\n"], max_gap=6, length_search=search, seed=3)
    known = fill(qwen, ["x = [", found.lengths[0], "]\ny = ", found.lengths[1], "\n"], seed=3)
    assert (found.texts, found.ids, found.full_text) == (known.texts, known.ids, known.full_text)
    assert found.num_forwards > known.num_forwards


def brute_force_score(model: Converted, row: Row, ids: list[int]) -> float:
    """One copy of the row at a time, full logits, as docs/sampling.md puts it in words."""
    gaps = row.spans()
    in_gaps = [position for span in gaps for position in span]
    scored = [
        position
        for position in range(1, len(ids))
        if any(span.start - CONTEXT_TOKENS <= position < span.stop + CONTEXT_TOKENS for span in gaps)
    ]
    log_prob = {}
    for group in range(SCORING_GROUPS):
        masked = scored[group::SCORING_GROUPS]
        copy = torch.tensor([ids])
        copy[0, masked] = model.facts.mask_token_id
        logits = backbone.logits(model.model, copy, model.facts.attention)[0].detach().double()
        logits[:, model.facts.mask_token_id] = -torch.inf
        for position in masked:
            log_prob[position] = float(logits[position - 1].log_softmax(-1)[ids[position]])
    beside = sum(value for position, value in log_prob.items() if position not in in_gaps)
    return beside + sum(sum(log_prob[position] for position in span) / len(span) ** 0.5 for span in gaps)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_candidates_are_ranked_by_their_brute_force_likelihood(family: str) -> None:
    model = converted(family)
    prefix, suffix = "def area(width):", "\n    return width"
    found = fill(model, [prefix, None, suffix], max_gap=7, threshold=0.6)
    before, after = prompt_ids(model, prefix), text_ids(model.tokenizer, suffix)
    expected = {}
    for length in range(1, 8):
        ids = infill(model, prefix, suffix, length, threshold=0.6).ids
        row = Row((before, after), (length,), "")
        expected[length] = brute_force_score(model, row, [*before, *ids, *after])
    assert {1, 2, 3, 4, 6, 7} <= {trial.lengths[0] for trial in found.trials}
    for trial in found.trials:
        assert trial.score == pytest.approx(expected[trial.lengths[0]], abs=1e-3)
    assert found.lengths[0] == max(found.trials, key=lambda trial: trial.score).lengths[0]


def test_as_many_groups_as_positions_give_each_token_all_the_others(qwen: Converted) -> None:
    rows = [text_ids(qwen.tokenizer, "the rain in the area"), text_ids(qwen.tokenizer, "import")]
    positions = [list(range(1, len(ids))) for ids in rows]
    found = score_tokens(qwen, rows, positions, groups=100, batch_size=3)
    for ids, places, scores in zip(rows, positions, found, strict=True):
        for place, log_prob, best in zip(places, *(part.tolist() for part in scores), strict=True):
            copy = torch.tensor([ids])
            copy[0, place] = qwen.facts.mask_token_id
            logits = backbone.logits(qwen.model, copy, qwen.facts.attention)[0, place - 1].detach()
            logits[qwen.facts.mask_token_id] = -torch.inf
            expected = logits.log_softmax(-1)
            assert log_prob == pytest.approx(float(expected[ids[place]]), abs=1e-4)
            assert best == pytest.approx(float(expected.max()), abs=1e-4)


@pytest.mark.parametrize("search", ["candidates", "grow"])
@pytest.mark.parametrize("max_gap", [1, 3, 9])
def test_no_gap_is_longer_than_asked_or_than_the_context(qwen: Converted, search: str, max_gap: int) -> None:
    options = {"max_gap": max_gap, "length_search": search, "num_steps": 1}
    short = fill(qwen, ["ab", None, "cd"], **options)
    assert max(trial.lengths[0] for trial in short.trials) <= max_gap
    tight = fill(qwen, ["a" * (MAX_LENGTH - 12), None, "b" * 5, None, "ccc"], **options)
    assert all(sum(trial.lengths) <= 4 for trial in tight.trials)


def test_the_order_of_the_trials_is_the_grid_and_then_around_the_best(qwen: Converted) -> None:
    tried = [trial.lengths[0] for trial in fill(qwen, ["ab", None, "cd"], max_gap=20, num_steps=1).trials]
    assert tried[:9] == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert len(tried) == len(set(tried))


@given(st.integers(1, 3000))
def test_coarse_lengths_reach_from_one_to_the_most_and_never_more_than_double(most: int) -> None:
    lengths = coarse_lengths(most)
    assert (lengths[0], lengths[-1]) == (1, most)
    assert all(short < long <= 2 * short for short, long in pairwise(lengths))
    assert len(lengths) <= 3 + 2 * most.bit_length()


def escaped(text: str, is_before_gap: bool) -> str:
    text = re.sub(r"(\\*)(\{gap(:[^{}\n]*)?\})", lambda match: match[1] * 2 + "\\" + match[2], text)
    return re.sub(r"(\\+)\Z", lambda match: match[1] * 2, text) if is_before_gap else text


FRAGMENTS = st.lists(st.sampled_from(["{gap}", "{gap:4}", "\\", "{", "}", "a", "\n", "{{gap}}", "{gap:"]), max_size=6)


@given(st.lists(FRAGMENTS, min_size=2, max_size=4), st.data())
def test_any_text_can_be_written_with_gaps_in_it(fragments: list[list[str]], data: st.DataObject) -> None:
    texts = ["".join(parts) for parts in fragments]
    # A text may not end in what the gap after it would complete to a mark.
    texts = [text + "." if re.search(r"\{(gap)?:?[^{}\n]*\Z", text) else text for text in texts]
    lengths = [data.draw(st.none() | st.integers(1, 99)) for _ in texts[1:]]
    template, pieces = "", []
    for index, text in enumerate(texts):
        template += escaped(text, is_before_gap=index < len(lengths))
        pieces.append(text)
        if index < len(lengths):
            template += "{gap}" if lengths[index] is None else f"{{gap:{lengths[index]}}}"
            pieces.append(lengths[index])
    assert parse_gaps(template) == [piece for piece in pieces if piece != ""]


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        ("def f(x): {gap} return {gap:4}", ["def f(x): ", None, " return ", 4]),
        ("{gap}{x}{{y}} {gap:12}", [None, "{x}{{y}} ", 12]),
        (r"\{gap} {gap} \\{gap:1}", ["{gap} ", None, " \\", 1]),
    ],
)
def test_gaps_are_read(template: str, pieces: list[Piece]) -> None:
    assert parse_gaps(template) == pieces


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no gap", "has no gap"),
        (r"\{gap}", "has no gap"),
        ("a {gap:0} b", "the gap {gap:0} is not accepted"),
        ("a {gap:} b", "the gap {gap:} is not accepted"),
        ("a {gap:x} b", "the gap {gap:x} is not accepted"),
        ("a {gap:-1} b", "the gap {gap:-1} is not accepted"),
        ("a {gap:9999999999} b", "is not accepted"),
    ],
)
def test_bad_templates_are_refused(template: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse_gaps(template)


@given(st.lists(st.text(max_size=3) | st.integers(1, 9) | st.none(), min_size=1, max_size=6))
def test_pieces_are_split_into_texts_and_gaps_or_refused(pieces: list[Piece]) -> None:
    gaps = [piece for piece in pieces if not isinstance(piece, str)]
    marks = "".join("G" if not isinstance(piece, str) else "t" if piece else "" for piece in pieces)
    if not gaps or "GG" in marks:
        with pytest.raises(UserError, match="without text between" if gaps else "no gap"):
            split_gaps(pieces, "the text")
        return
    texts, lengths = split_gaps(pieces, "the text")
    assert lengths == gaps
    assert "".join(texts) == "".join(piece for piece in pieces if isinstance(piece, str))
    assert all(texts[1:-1])


@pytest.mark.parametrize(
    ("pieces", "options", "message"),
    [
        (["a", 0, "b"], {}, "holds the gap 0, which is not accepted"),
        (["a", -2, "b"], {}, "holds the gap -2"),
        (["a", True, "b"], {}, "holds the gap True"),
        (["a", "b"], {}, "the text has no gap"),
        ([], {}, "the text has no gap"),
        (["a", 2, None, "b"], {}, "two gaps without text between them"),
        (["a", None], {}, "ends with a gap of unknown length"),
        (["a" * 40, 5, "b" * 20], {}, f"65 exceed the model's context of {MAX_LENGTH}; write at most 4"),
        (["a" * 40, None, "b" * 24], {}, f"exceed the model's context of {MAX_LENGTH}; write at most 0"),
        (["a" * 40, None, "b" * 25], {}, f"has 65 tokens, the model's context {MAX_LENGTH}"),
        (["a", 3, "<|mask|>"], {}, "holds the mask token"),
        (["a", None, "<|mask|>"], {}, "holds the mask token"),
        (["a", None, "b"], {"max_gap": 0}, "max_gap=0 is not accepted"),
        (["a", None, "b"], {"length_search": "growing"}, "did you mean 'grow'"),
        (["a", 3, "b"], {"max_gap": True}, "max_gap=True is not accepted"),
        (["a", None, "b"], {"batch_size": 0}, "batch_size=0 is not accepted"),
        ([["a", 3, "b"], ["c"]], {}, "text 2 has no gap"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    qwen: Converted, pieces: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        fill(qwen, pieces, **options)
    assert "\n" not in str(refused.value)


def test_the_gap_is_conditioned_on_both_sides(qwen: Converted) -> None:
    options = {"length": 12, "num_steps": 1, "temperature": 1.0}
    base = infill(qwen, "def f(", "):\n    return 1\n", **options)
    assert infill(qwen, "def f(", "):\n    return 1\n", **options) == base
    assert infill(qwen, "def g(", "):\n    return 1\n", **options).ids != base.ids
    assert infill(qwen, "def f(", "):\n    return 2.5\n", **options).ids != base.ids


def test_infill_writes_exactly_its_length_and_gives_the_whole_text(qwen: Converted) -> None:
    filled = infill(qwen, ["a = ", ""], ["\nprint(a)", "b"], 5, threshold=0.5)
    for row, prefix, suffix in zip(filled, ["a = ", ""], ["\nprint(a)", "b"], strict=True):
        assert len(row.ids) == len(row.step_of_token) == 5
        assert row.full_text == prefix + row.text + suffix


@pytest.mark.parametrize(
    ("prefix", "suffix", "length", "message"),
    [
        ("a", "b", 0, "length=0 is not accepted"),
        ("a", "b", -3, "length=-3 is not accepted"),
        ("a" * 40, "b" * 20, 5, f"65 exceed the model's context of {MAX_LENGTH}; write at most 4"),
        ("a", "<|mask|>", 5, "holds the mask token"),
        (["a"], ["b", "c"], 5, "1 prefixes and 2 suffixes"),
        (["a"], "b", 5, "both as lists"),
    ],
)
def test_bad_input_to_infill_is_refused(qwen: Converted, prefix: Any, suffix: Any, length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        infill(qwen, prefix, suffix, length)


def test_infill_under_a_causal_layout_is_refused() -> None:
    with pytest.raises(UserError, match="cannot see the suffix"):
        infill(converted(layout="causal"), "a", "b", 3)


def test_a_block_model_is_refused_with_its_block_size_and_who_can() -> None:
    with pytest.raises(UserError, match=r"layout 'block' with block_size 4.*repr-align"):
        infill(converted(layout="block", block_size=4), "a", "b", 3)


def test_text_behind_a_gap_gets_no_space_that_its_tokenizer_puts_before_a_text() -> None:
    from transformers import PreTrainedTokenizerFast

    pieces = ["▁", "a", "b", "\n", "▁a", "<unk>"]
    backend = Tokenizer(
        models.BPE({piece: index for index, piece in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer.convert_ids_to_tokens(text_ids(tokenizer, "ab")) == ["▁a", "b"]
    assert tokenizer.convert_ids_to_tokens(ids_after(tokenizer, "ab")) == ["a", "b"]
    assert tokenizer.convert_ids_to_tokens(ids_after(tokenizer, " ab")) == ["▁a", "b"]
    assert ids_after(tokenizer, "") == []
