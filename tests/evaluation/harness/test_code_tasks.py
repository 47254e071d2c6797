"""Tasks of code: what is asked, what is run, what is counted; and nothing is run without leave."""

from __future__ import annotations

import gzip
import json
import runpy
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from decausal.cli import main
from decausal.errors import UserError
from decausal.evaluation.harness.code_tasks import pass_at_k, prepare, similarity
from decausal.evaluation.harness.model import DecausalLM
from decausal.evaluation.harness.run import HarnessSettings, evaluate_harness
from decausal.evaluation.harness.tasks_by_name import load_tasks, tasks_of
from decausal.sampling.filling.infilling import infill
from tests.runs import ROOT

write_tasks = runpy.run_path(str(ROOT / "benchmarks" / "local_tasks.py"))["write_tasks"]

ADD = {
    "task_id": "T/0",
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
}
HOLE = ADD | {"prompt": "def add(a, b):\n    c = ", "canonical_solution": "a + b\n", "suffix": "    return c\n"}
SPAN = ADD | {"prompt": "def add(a, b):\n    re", "canonical_solution": "turn a ", "suffix": "+ b\n"}
SQUARE = {
    "text": "Square a number.",
    "code": "def square(x):\n    return x * x",
    "test_list": ["assert square(3) == 9", "assert square(0) == 0"],
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All tasks of code, from files in their public forms."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("tasks")
    files = {
        "HumanEval": [ADD, ADD | {"task_id": "T/1"}],
        "HumanEval-SingleLineInfilling": [HOLE],
        "HumanEval-RandomSpanInfillingLight": [SPAN],
        "mbpp": [SQUARE | {"task_id": number} for number in (*range(1, 11), 11)],
    }
    for name, rows in files.items():
        with gzip.open(data / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    names, left_out = write_tasks(data, out)
    assert len(left_out) == 5
    return {"folder": out, **tasks_of(load_tasks(names, out))}


def answered(task: Any, answers: list[str]) -> dict[str, float]:
    """The figures of a task's first problem, of which each answer is one."""
    task.build_all_requests(limit=1)
    assert len(task.instances) == len(answers)
    for instance, answer in zip(task.instances, answers, strict=True):
        instance.resps.append(answer)
    task.apply_filters()
    filtered = [instance.filtered_resps["none"] for instance in task.instances]
    return task.process_results(task.instances[0].doc, filtered)


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_answer() -> None:
    for num_answers, num_right, k in ((5, 2, 1), (5, 2, 3), (6, 1, 6), (4, 0, 2), (4, 4, 2), (5, 3, 3)):
        draws = list(combinations(range(num_answers), k))
        share = sum(any(answer < num_right for answer in draw) for draw in draws) / len(draws)
        assert pass_at_k(num_answers, num_right, k) == pytest.approx(share)


def test_likeness_is_one_less_edits_over_the_longer_text() -> None:
    assert similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert similarity("", "abc") == 0
    assert similarity("", "") == similarity("abc", "abc") == 1


def test_problems_are_run_against_their_tests(tasks: dict[str, Any]) -> None:
    task = tasks["humaneval_local"]
    prepare([task], may_run=True, num_answers=4, ks=(1, 2))
    answers = ["    return a + b", "    return a - b", "    return (", "    return b + a  # \n"]
    assert answered(task, answers) == {"pass@1": 0.5, "pass@2": pytest.approx(1 - 1 / 6)}
    assert {json.dumps(instance.args[1]["seed"]) for instance in task.instances} == {"0", "1", "2", "3"}
    prepare([task], may_run=True)


def test_a_task_described_in_a_sentence_is_run_against_its_tests(tasks: dict[str, Any]) -> None:
    task = tasks["mbpp_local"]
    prepare([task], may_run=True)
    assert answered(task, [SQUARE["code"] + "\n"]) == {"pass@1": 1}
    assert answered(task, ["def square(x):\n    return x + 6\n"]) == {"pass@1": 0}
    text = task.instances[0].args[0]
    assert text.count("[BEGIN]") == 4
    assert text.count("[DONE]") == 3
    assert "assert square(3) == 9\nassert square(0) == 0\n[BEGIN]\n" in text


@pytest.mark.parametrize(
    ("name", "doc", "after", "hole"),
    [
        ("humaneval_single_line_infilling", HOLE, "\n    return c\n", "a + b"),
        ("humaneval_random_span_light_infilling", SPAN, "+ b\n", "turn a "),
    ],
)
def test_a_hole_is_asked_for_with_what_is_behind_it(
    name: str, doc: dict[str, str], after: str, hole: str, tasks: dict[str, Any]
) -> None:
    for length, expected in (("", None), ("_length_given", hole)):
        task = tasks[f"{name}{length}_local"]
        prepare([task], may_run=True)
        assert answered(task, [hole]) == {"exact_match": 1, "edit_similarity": 1, "pass@1": 1}
        text, how = task.instances[0].args
        assert text == doc["prompt"]
        assert how["infill"] == {"suffix": after, "as_long_as": expected}
        other = answered(task, [hole[:-1] + "*"])
        assert (other["exact_match"], other["pass@1"]) == (0, 0)
        assert other["edit_similarity"] == pytest.approx(1 - 1 / len(hole))


def test_nothing_is_run_without_leave(tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        raise AssertionError("a program was run")

    monkeypatch.setattr("decausal.evaluation.harness.code_tasks.run_all", run)
    with pytest.raises(UserError, match="allow it with --allow_code_execution"):
        prepare([tasks["humaneval_local"]], may_run=False)
    task = tasks["humaneval_single_line_infilling_local"]
    prepare([task], may_run=False)
    assert answered(task, ["a + b"]) == {"exact_match": 1, "edit_similarity": 1}
    assert set(task.aggregation()) == {"exact_match", "edit_similarity"}


def test_the_command_refuses_without_leave(
    tasks: dict[str, Any], models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "harness", str(models["one"]), "--include_path", str(tasks["folder"]), "--tasks"]
    assert main([*command, "humaneval_local"]) == 2
    error = capsys.readouterr().err
    assert "--allow_code_execution" in error
    assert error.count("\n") == 1
    assert main([*command, "humaneval_local", "--allow_code_execution", "--k", "1,3"]) == 2
    assert "give --num_answers 3" in capsys.readouterr().err


def test_the_harness_own_tasks_of_code_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("task: other\nunsafe_code: true\ndataset_path: json\n")
    with pytest.raises(UserError, match="'other' runs programs in this process"):
        load_tasks(["other"], tmp_path)


def test_a_bidirectional_model_fills_holes_and_the_source_continues(
    tasks: dict[str, Any], models: dict[str, Path]
) -> None:
    names = ["humaneval_single_line_infilling_length_given_local", "humaneval_single_line_infilling_local"]
    found = evaluate_harness(
        models["whole"],
        names,
        HarnessSettings(with_source=True, gen_kwargs={"max_gen_toks": 8}, sampler={"num_steps": 2}),
        include_path=tasks["folder"],
        device="cpu",
    )
    assert {(score.task, score.metric) for score in found.scores} == {
        (name, metric) for name in names for metric in ("exact_match", "edit_similarity")
    }
    assert all(score.source is not None for score in found.scores)


def test_holes_are_filled_as_infill_does(models: dict[str, Path]) -> None:
    ours = DecausalLM(str(models["whole"]), device="cpu", num_steps=2)
    hole, after = "a + b", "\n    return c\n"
    asked = [
        (HOLE["prompt"], {"max_gen_toks": 8, "infill": {"suffix": after, "as_long_as": length}})
        for length in (hole, None)
    ]
    found = ours.generate_until([Instance("generate_until", {}, one, 0) for one in asked])
    length = len(ours.tokenizer(hole)["input_ids"])
    for text, given in zip(found, (length, None), strict=True):
        expected = infill(ours.converted, HOLE["prompt"], after, given, max_gap=8, num_steps=2).text
        assert text == expected


def test_a_model_that_cannot_see_behind_a_hole_says_so(models: dict[str, Path]) -> None:
    ours = DecausalLM(str(models["block"]), device="cpu")
    asked = (HOLE["prompt"], {"infill": {"suffix": "\n", "as_long_as": "a"}})
    with pytest.raises(UserError, match="layout"):
        ours.generate_until([Instance("generate_until", {}, asked, 0)])


def test_data_without_a_field_are_reported_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps(ADD) + "\n" + json.dumps({"prompt": "x"}) + "\n")
    with pytest.raises(UserError, match=r"line 2: no 'entry_point'; it has prompt"):
        write_tasks(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="holds none of the files"):
        write_tasks(tmp_path / "out", tmp_path / "out")


def test_the_tasks_that_come_with_the_package_are_whole() -> None:
    from lm_eval.tasks import TaskManager

    from decausal.evaluation.harness.tasks_by_name import OURS

    manager = TaskManager(include_path=[OURS], include_defaults=False)
    assert {"humaneval", "mbpp", "humaneval_single_line_infilling"} <= set(manager.all_subtasks)
    assert len(manager.all_subtasks) == len(list(OURS.glob("*.yaml")))
