"""Tasks are the same everywhere, their splits share no prompt, and right answers are distinguished from wrong ones."""

from __future__ import annotations

import re
from hashlib import sha256
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import decausal
from decausal.data.documents import read_documents
from decausal.data.rows import load_rows
from decausal.data.sources import NUM_EXAMPLES, Tasks, find_sources
from decausal.data.tasks import TASKS, Example, examples, is_right, split_of
from decausal.data.tokenizer import character_tokenizer
from decausal.errors import UserError
from tests.runs import run, save_source

NUM_SAMPLES = 100
MAX_CHARACTERS = 80

tasks = pytest.mark.parametrize("name", TASKS)


def draw(names: list[str], count: int, split: str = "train", seed: int = 0) -> list[Example]:
    return list(islice(examples(names, split, seed), count))


# The supply


@tasks
def test_a_task_gives_the_same_examples_alone_and_among_others(name: str) -> None:
    among_others = [each for each in draw([], 10 * len(TASKS), seed=3) if each.task.name == name]
    assert draw([name], 10, seed=3) == among_others


def test_every_task_has_its_turn_in_the_order_named() -> None:
    names = ["sorting", "addition", "words"]
    assert [each.task.name for each in draw(names, 6)] == names * 2


def test_another_seed_gives_other_examples() -> None:
    assert not set(draw(["reversing"], NUM_SAMPLES)) & set(draw(["reversing"], NUM_SAMPLES, seed=1))


@tasks
def test_a_prompt_alone_decides_its_split(name: str) -> None:
    for split in ("train", "heldout"):
        assert {split_of(each.prompt) for each in draw([name], 20, split, seed=5)} == {split}


def test_no_prompt_is_in_both_splits_whatever_the_seeds() -> None:
    """Of a task with so few prompts that most of the held-out ones would else be among the others."""
    train, heldout = ({each.prompt for each in draw(["python"], *what)} for what in ((2000, "train"), (100, "heldout")))
    again = {each.prompt for each in draw(["python"], 2000, "train", seed=1)}
    assert len(train & again) > 100
    assert not (train | again) & heldout


def test_examples_are_the_same_on_every_machine() -> None:
    """What a model was trained on and what it has not seen must not change: a change of the tasks is a decision."""
    text = "\n".join(each.prompt + each.completion for each in draw([], 140) + draw([], 70, "heldout", 1))
    assert sha256(text.encode()).hexdigest()[:16] == "981bb81655988248"


def test_unknown_and_repeated_tasks_are_refused() -> None:
    with pytest.raises(UserError, match="unknown task 'adition'; did you mean 'addition'"):
        next(examples(["adition"]))
    with pytest.raises(UserError, match="'sorting' is named twice"):
        next(examples(["sorting", "lookup", "sorting"]))


# What is asked, and whether the answer is right: found again by other means


def test_sums_and_their_columns_add_up() -> None:
    for example in draw(["addition"], NUM_SAMPLES):
        first, second = map(int, re.findall(r"\d+", example.prompt))
        assert int(example.answer) == first + second
        *columns, _ = example.completion.split()
        assert len(columns) == len(str(first)) == len(str(second))
        assert all(eval(left) == int(right) for left, right in (column.split("=") for column in columns))
        digits = [column.partition("=")[2] for column in columns]
        assert example.answer == digits[-1] + "".join(digit[-1] for digit in reversed(digits[:-1]))


def test_sorted_and_reversed_letters_are_those_of_the_prompt() -> None:
    for name, expected in (("sorting", sorted), ("reversing", reversed)):
        for example in draw([name], NUM_SAMPLES):
            letters = example.prompt.split()[1].removesuffix(":")
            assert example.completion == "".join(expected(letters))


def test_a_looked_up_value_stands_beside_its_key_alone() -> None:
    for example in draw(["lookup"], NUM_SAMPLES):
        table, _, key = example.prompt.removeprefix("look up ").partition("; ")
        pairs = {pair[0]: pair[1:] for pair in table.split()}
        assert len(pairs) == len(table.split())
        assert pairs[key] == example.completion


def test_closed_brackets_vanish_pair_by_pair() -> None:
    for example in draw(["brackets"], NUM_SAMPLES):
        text = example.prompt.split()[1].removesuffix(":") + example.completion
        while text != (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", text)):
            text = shorter
        assert not text


def test_python_says_the_same_of_expressions_and_of_their_steps() -> None:
    for example in draw(["python"], NUM_SAMPLES):
        expression = example.prompt.removeprefix("python ").removesuffix(":")
        assert str(eval(expression)) == example.answer
        step, has_step, _ = example.completion.rpartition("=")
        assert not has_step or eval(step) == eval(expression)


def test_word_problems_are_solved_with_their_own_numbers() -> None:
    for example in draw(["words"], NUM_SAMPLES):
        step, _, answer = example.completion.partition("=")
        assert re.findall(r"\d+", example.prompt) == re.findall(r"\d+", step)
        assert eval(step) == int(answer) > 0


@given(data=st.data())
@tasks
def test_a_right_answer_is_accepted_and_a_changed_one_is_not(name: str, data: st.DataObject) -> None:
    example = draw([name], 1, seed=data.draw(st.integers(0, 10**6), label="seed"))[0]
    assert is_right(example, example.completion)
    before = len(example.completion) - len(example.answer)
    place = data.draw(st.integers(before, len(example.completion) - 1), label="place")
    letter = data.draw(st.characters(codec="ascii", exclude_characters="="), label="letter")
    kept, changed, rest = example.completion[:place], example.completion[place], example.completion[place + 1 :]
    if letter != changed:
        assert not is_right(example, kept + letter + rest)
    assert not is_right(example, kept + letter + changed + rest)
    assert not is_right(example, kept + rest)
    assert not is_right(example, example.completion + letter)


def test_of_written_steps_only_the_answer_counts() -> None:
    example = draw(["addition"], 1)[0]
    assert is_right(example, example.answer)
    assert is_right(example, f"0+0=1 ={example.answer}")
    assert not is_right(example, example.completion.rpartition("=")[0])


def test_where_there_are_no_steps_all_that_is_written_counts() -> None:
    for name in ("sorting", "reversing", "lookup", "brackets"):
        example = draw([name], 1)[0]
        assert not is_right(example, f"x={example.completion}")


# As text for a model


def test_all_characters_have_a_token_and_examples_are_short() -> None:
    tokenizer = character_tokenizer(MAX_CHARACTERS)
    for example in draw([], NUM_SAMPLES * len(TASKS)):
        prompt, completion, whole = (
            tokenizer(text)["input_ids"]
            for text in (example.prompt, example.completion, example.prompt + example.completion)
        )
        assert prompt + completion == whole
        assert tokenizer.unk_token_id not in whole
        assert tokenizer.decode(whole) == example.prompt + example.completion
        assert 10 <= len(whole) <= MAX_CHARACTERS


@given(text=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]) | st.just("\n")))
def test_printable_text_survives_the_character_tokenizer(text: str) -> None:
    tokenizer = character_tokenizer(64)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_other_characters_are_unknown_instead_of_lost(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(64)
    assert tokenizer("é\tö")["input_ids"] == [tokenizer.unk_token_id] * 3
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id}) == 4


# As data


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("tasks", Tasks("train", (), NUM_EXAMPLES["train"], 0)),
        ("tasks-heldout", Tasks("heldout", (), NUM_EXAMPLES["heldout"], 0)),
        ("tasks:addition+sorting:20000", Tasks("train", ("addition", "sorting"), 20000, 0)),
        ("tasks:500", Tasks("train", (), 500, 0)),
        ("tasks-heldout:words@7", Tasks("heldout", ("words",), NUM_EXAMPLES["heldout"], 7)),
        ("tasks:lookup:30@12", Tasks("train", ("lookup",), 30, 12)),
        ("tasks@3", Tasks("train", (), NUM_EXAMPLES["train"], 3)),
    ],
)
def test_a_name_of_tasks_says_which_how_many_and_from_which_seed(data: str, expected: Tasks) -> None:
    assert find_sources(data) == [expected]
    assert find_sources(str(expected)) == [expected]


@pytest.mark.parametrize(
    ("data", "reported"),
    [
        ("tasks:adition", "unknown task 'adition'; did you mean 'addition'"),
        ("tasks:sorting+sorting", "named twice"),
        ("tasks:0", "COUNT \\(at least 1\\)"),
        ("tasks:sorting:many", "COUNT"),
        ("tasks:", "is not accepted: write tasks"),
        ("tasks@x", "is not accepted: write tasks"),
        ("task", "did you mean 'tasks'"),
        ("tasks_heldout", "did you mean 'tasks-heldout'"),
    ],
)
def test_a_malformed_name_of_tasks_is_refused_with_what_to_write(data: str, reported: str) -> None:
    with pytest.raises(UserError, match=reported):
        list(read_documents(data))


def test_records_are_prompts_and_completions_of_their_task() -> None:
    records = list(read_documents(["tasks:words+sorting:4", "tasks-heldout:words:2"]))
    assert [record["task"] for record in records] == ["words", "sorting", "words", "sorting", "words", "words"]
    expected = draw(["words", "sorting"], 4) + draw(["words"], 2, "heldout")
    assert [(record["prompt"], record["completion"]) for record in records] == [
        (example.prompt, example.completion) for example in expected
    ]
    assert len({record["origin"] for record in records}) == 6


def test_rows_of_tasks_train_the_completions_and_are_kept_for_these_examples_alone(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(96)
    rows = load_rows("tasks:60", tokenizer, 96, cache_dir=tmp_path)
    learnt = [tokenizer.decode(row["clean_ids"][row["is_maskable"]]) for row in rows]
    written = sorted(text for row in learnt for text in row.split("<|endoftext|>") if text)
    assert written == sorted(example.completion for example in draw([], 60))
    assert load_rows("tasks:60", tokenizer, 96, cache_dir=tmp_path).directory == rows.directory
    others = [load_rows(data, tokenizer, 96, cache_dir=tmp_path) for data in ("tasks:60@1", "tasks-heldout:60")]
    assert len({each.directory for each in [rows, *others]}) == 3


def test_a_model_is_converted_on_tasks(tmp_path: Path) -> None:
    source = save_source(tmp_path / "ar")
    output_dir = tmp_path / "converted"
    run(source, "tasks:sorting:40", output_dir, max_length=64, max_steps=1, eval_data="tasks-heldout:sorting:8")
    generation = decausal.load(output_dir).generate(draw(["sorting"], 1)[0].prompt, max_new_tokens=4)
    assert not isinstance(generation, list)
    assert generation.num_forwards >= 1
