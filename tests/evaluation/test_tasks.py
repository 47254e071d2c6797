"""Accuracy is counted on what is written up to the end; models write as they generate, whatever the batch."""

from __future__ import annotations

import json
import math
import statistics
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from decausal.cli import main
from decausal.data.tasks import TASKS, Example, examples
from decausal.data.tokenizer import character_tokenizer
from decausal.errors import UserError
from decausal.evaluation.tasks import (
    TaskScore,
    TaskScores,
    Written,
    ends_of,
    evaluate_tasks,
    evaluate_tasks_of,
    longest_completion,
    score,
    write_greedily,
)
from decausal.models.checkpoint import Converted, save_converted
from decausal.models.facts import ConversionFacts
from decausal.sampling.generate import generate
from tests.families import FAMILIES

TOKENIZER = character_tokenizer(256)
END = 0


def problems(count: int, *names: str) -> list[Example]:
    return list(islice(examples(names, "heldout"), count))


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def written(examples: list[Example], change: str = "", num_forwards: int = 1) -> list[Written]:
    return [Written([*ids_of(change + each.completion), END], num_forwards) for each in examples]


def model(**changes: Any) -> PreTrainedModel:
    changes = {"vocab_size": len(TOKENIZER), "eos_token_id": END, "max_position_embeddings": 256} | changes
    return FAMILIES["qwen3"](**changes)


def converted(layout: str = "bidirectional") -> Converted:
    student = model()
    student.config.is_causal = False
    return Converted(student, TOKENIZER, ConversionFacts("tiny-tasks", layout, 1, TOKENIZER.mask_token_id))


# Counting


def test_right_completions_count_and_wrong_ones_do_not() -> None:
    asked = problems(8, "sorting", "reversing")
    answers = written(asked[:4]) + written(asked[4:], "x")
    scores = score(asked, answers, TOKENIZER, [END])
    assert [each.task for each in scores.tasks] == ["sorting", "reversing"]
    assert [each.is_right for each in scores.tasks] == [(True, True, False, False)] * 2
    assert scores.accuracy == 0.5


@pytest.mark.parametrize("behind_end", [[], [END] * 3, [END, 70, 71]])
def test_what_stands_behind_the_end_token_does_not_count(behind_end: list[int]) -> None:
    asked = problems(1, "lookup")
    assert score(asked, [Written(ids_of(asked[0].completion) + behind_end, 1)], TOKENIZER, [END]).accuracy == 1


def test_any_end_of_the_models_ends_an_answer() -> None:
    asked = problems(1, "lookup")
    answer = [Written([*ids_of(asked[0].completion), 70, END], 1)]
    assert score(asked, answer, TOKENIZER, [END, 70]).accuracy == 1
    assert score(asked, answer, TOKENIZER, [END]).accuracy == 0


@pytest.mark.parametrize("kind", ["converted", "ar"])
def test_writing_stops_at_every_end_that_the_model_has(kind: str) -> None:
    """Each token of the AR model's answer is made an end in turn."""
    asked = problems(1, "sorting")
    measured = (model(), TOKENIZER) if kind == "ar" else converted()
    whole = evaluate_tasks(measured, asked, max_new_tokens=8).tasks[0].num_tokens
    ends = range(len(TOKENIZER))
    measured[0].generation_config.eos_token_id = list(ends)
    assert set(ends_of(measured)) == set(ends)
    found = evaluate_tasks(measured, asked, max_new_tokens=8).tasks[0]
    assert found.num_tokens == 1 < whole


def test_a_special_token_amid_a_right_answer_makes_it_wrong() -> None:
    asked = problems(1, "lookup")
    ids = ids_of(asked[0].completion)
    assert score(asked, [Written([*ids[:2], TOKENIZER.pad_token_id, *ids[2:], END], 1)], TOKENIZER, [END]).accuracy == 0


def test_the_standard_error_is_that_of_a_mean_of_zeros_and_ones() -> None:
    is_right = (True, False, True, True, False)
    expected = statistics.stdev(map(float, is_right)) / math.sqrt(5)
    assert TaskScore("x", is_right, 5, 5).standard_error == pytest.approx(expected)
    assert TaskScore("x", (True,), 1, 1).standard_error is None


def test_tasks_weigh_the_same_in_the_mean_and_tokens_the_same_in_tokens_per_forward() -> None:
    small, large = TaskScore("a", (True, False), 4, 4), TaskScore("b", (True,) * 8, 40, 10)
    scores = TaskScores((small, large))
    assert scores.accuracy == 0.75
    assert scores.tokens_per_forward == 44 / 14
    assert scores.standard_error == pytest.approx(small.standard_error / 2)
    figures = scores.as_dict()
    assert json.loads(json.dumps(figures)) == figures
    assert figures["tasks"]["b"] == {
        "accuracy": 1.0,
        "standard_error": 0.0,
        "tokens_per_forward": 4.0,
        "num_examples": 8,
    }
    assert scores.as_table().row_count == 3


# Writing


def one_by_one(ar: PreTrainedModel, prompt: str, max_new_tokens: int, end: int) -> list[int]:
    """Greedy without cache, batch or padding."""
    ids = ids_of(prompt)
    start = len(ids)
    while len(ids) < start + max_new_tokens and ids[-1] != end:
        with torch.no_grad():
            ids.append(int(ar(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_an_ar_model_writes_what_it_would_write_alone(batch_size: int) -> None:
    ar, prompts = model(), [each.prompt for each in problems(7)]
    ending = one_by_one(ar, prompts[0], 6, END)[3]  # a token that is written soon serves as the end
    tokenizer = character_tokenizer(256)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ending)
    found = write_greedily(ar, tokenizer, prompts, batch_size=batch_size, max_new_tokens=12)
    assert [each.ids for each in found] == [one_by_one(ar, prompt, 12, ending) for prompt in prompts]
    assert [each.num_forwards for each in found] == [len(each.ids) for each in found]
    assert len(found[0].ids) < 12


def test_an_ar_model_has_one_token_per_forward() -> None:
    assert evaluate_tasks((model(), TOKENIZER), problems(7), max_new_tokens=5).tokens_per_forward == 1


@pytest.mark.parametrize("options", [{"num_steps": 2}, {"threshold": 0.5}, {"num_steps": 4, "temperature": 1.0}])
def test_a_converted_model_is_scored_on_what_it_generates(options: dict[str, Any]) -> None:
    asked, student = problems(9, "sorting", "words", "lookup"), converted()
    found = evaluate_tasks(student, asked, batch_size=4, max_new_tokens=6, **options)
    generations = generate(student, [each.prompt for each in asked], max_new_tokens=6, **options)
    expected = score(asked, [Written(each.ids, each.num_forwards) for each in generations], TOKENIZER, [END])
    assert found == expected
    assert found.tokens_per_forward == sum(len(each.ids) for each in generations) / sum(
        each.num_forwards for each in generations
    )


def test_there_is_room_for_the_longest_completion_and_its_end() -> None:
    asked = problems(14)
    assert longest_completion(asked, TOKENIZER) == max(len(each.completion) for each in asked) + 1
    found = evaluate_tasks((model(eos_token_id=None), TOKENIZER), asked[:2])
    assert {each.num_tokens for each in found.tasks} == {longest_completion(asked[:2], TOKENIZER)}


# Names, flags and bad input


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An AR model and a converted one, as directories."""
    folder = tmp_path_factory.mktemp("models")
    model().save_pretrained(folder / "ar")
    TOKENIZER.save_pretrained(folder / "ar")
    save_converted(folder / "converted", *converted())
    return {"ar": folder / "ar", "converted": folder / "converted"}


@pytest.mark.parametrize("kind", ["ar", "converted"])
def test_the_command_prints_what_the_function_measures(
    kind: str, directories: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = {} if kind == "ar" else {"num_steps": 2}
    flags = [f"--{name}={value}" for name, value in options.items()]
    arguments = ["eval", "tasks", str(directories[kind]), "--tasks", "lookup+words", "--num_examples", "2", *flags]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = evaluate_tasks_of(directories[kind], ["lookup", "words"], 2, **options)
    assert printed.pop("tokens_per_second") > 0
    assert printed == {name: value for name, value in expected.as_dict().items() if name != "tokens_per_second"}
    assert main(arguments) == 0
    assert "lookup" in capsys.readouterr().out


def test_all_tasks_are_measured_where_none_is_named(directories: dict[str, Path]) -> None:
    found = evaluate_tasks_of(directories["converted"], num_examples=1, num_steps=1)
    assert [each.task for each in found.tasks] == list(TASKS)


@pytest.mark.parametrize(
    ("flags", "reported"),
    [
        (["--tasks", "sorted"], "unknown task 'sorted'; did you mean 'sorting'"),
        (["--num_examples", "0"], "--num_examples: 0 is not accepted: it must be at least 1"),
        (["--batch_size", "0"], "--batch_size: 0 is not accepted: it must be at least 1"),
        (["--threshold", "0.9"], "threshold: for converted models only"),
        (["--max_new_tokens", "0"], "max_new_tokens"),
    ],
)
def test_bad_flags_are_reported_in_one_line(
    flags: list[str], reported: str, directories: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "tasks", str(directories["ar"]), "--num_examples", "1", *flags]) == 2
    error = capsys.readouterr().err
    assert reported in error
    assert error.count("\n") == 1


def test_a_measure_that_there_is_not_is_answered_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["accuracy"]):
        assert main(["eval", *arguments]) == 2
        assert "decausal eval tasks MODEL" in capsys.readouterr().err


def test_no_problems_are_refused() -> None:
    with pytest.raises(UserError, match="no examples to measure on"):
        evaluate_tasks((model(), TOKENIZER), [])


@pytest.mark.parametrize("kind", ["converted", "source"])
def test_a_model_runs_where_the_machine_is_fast_unless_a_flag_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, kind: str
):
    """Stops at the load: the device and type asked for are all that is looked at."""
    loaded: list[tuple[Any, Any]] = []

    class LoadedError(Exception):
        pass

    class Model:
        def to(self, device: torch.device) -> None:
            loaded[-1] = (device, loaded[-1][1])
            raise LoadedError

    def load_converted(_: str, dtype: torch.dtype, device: torch.device) -> None:
        loaded.append((device, dtype))
        raise LoadedError

    def load_source(_: str, dtype: torch.dtype) -> tuple[Model, None]:
        loaded.append((None, dtype))
        return Model(), None

    monkeypatch.setattr("decausal.evaluation.tasks.is_converted", lambda _: kind == "converted")
    monkeypatch.setattr("decausal.evaluation.tasks.load_converted", load_converted)
    monkeypatch.setattr("decausal.evaluation.tasks.load_source", load_source)
    for has_gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        with pytest.raises(LoadedError):
            evaluate_tasks_of("MODEL", num_examples=1)
    assert loaded == [
        (torch.device("cuda"), torch.bfloat16),
        (torch.device("cpu"), torch.float32),
    ]
