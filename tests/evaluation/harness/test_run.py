"""A converted model through lm-evaluation-harness: equal to `hf` where it is the AR model; resumed; bad input."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import decausal.evaluation.harness  # noqa: F401 - registers the model
from decausal.cli import main
from decausal.errors import UserError
from decausal.evaluation.continuations.scored import Continuation
from decausal.evaluation.harness.estimate import Estimate
from decausal.evaluation.harness.likelihood_kind import likelihood_kind
from decausal.evaluation.harness.model import DecausalLM
from decausal.evaluation.harness.run import HarnessSettings, evaluate_harness
from decausal.evaluation.harness.scores import retention
from decausal.evaluation.harness.tasks_by_name import load_tasks
from decausal.models.checkpoint import ConversionFacts, load_converted
from decausal.sampling.generate import generate
from tests.evaluation.harness.small_tasks import WORDS

ALL = ["small_choices", "small_word", "small_text", "small_answer"]


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


PAIRS = [(first + ":", " " + second) for first in WORDS for second in WORDS[:3]] + [("", "the rain in spain")]
LONG = "the rain in spain stays on the hat that a heron saw in the other inn " * 3


@pytest.fixture(scope="module")
def hf(models: dict[str, Path]) -> HFLM:
    return HFLM(pretrained=str(models["source"]), dtype="float32", device="cpu", batch_size=4)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_model_of_blocks_of_one_token_is_the_source_to_the_harness(
    batch_size: int, models: dict[str, Path], hf: HFLM
) -> None:
    ours = DecausalLM(str(models["one"]), batch_size=batch_size, device="cpu", dtype="float32")
    assert ours.likelihood == "causal"
    asked = [*PAIRS, (LONG, " in the end"), ("the rain", " " + LONG[:50])]
    for mine, theirs in zip(
        ours.loglikelihood(requests("loglikelihood", *asked)),
        hf.loglikelihood(requests("loglikelihood", *asked)),
        strict=True,
    ):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-4)
        assert mine[1] == theirs[1]
    texts = [("the rain",), (LONG,), (LONG * 2,)]
    rolling = [lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) for lm in (ours, hf)]
    assert rolling[0] == pytest.approx(rolling[1], abs=1e-4)
    written = [
        lm.generate_until(
            requests("generate_until", *[(text, {"until": ["e"], "max_gen_toks": 9}) for text, _ in asked if text])
        )
        for lm in (ours, hf)
    ]
    assert written[0] == written[1]


def test_the_harness_knows_the_model_by_its_name(models: dict[str, Path]) -> None:
    made = get_model("decausal").create_from_arg_string(
        f"pretrained={models['block']},num_samples=3,threshold=0.7", {"batch_size": 2, "device": "cpu"}
    )
    assert isinstance(made, DecausalLM)
    info = made.get_model_info()
    assert (info["likelihood"], info["likelihood_samples"], info["sampler"]) == ("nelbo", 3, {"threshold": 0.7})


def test_the_harness_own_command_runs_it(
    models: dict[str, Path], tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    command = ["lm_eval", "--model", "decausal", "--model_args", f"pretrained={models['one']}", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "--tasks", str(tasks / "small_choices.yaml"), "--limit", "2"])
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # it changes logging for the whole process
    cli_evaluate()
    assert "|small_choices|" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["block", "whole"])
def test_likelihoods_have_the_errors_of_their_masks_and_are_those_of_the_request(
    kind: str, models: dict[str, Path]
) -> None:
    ours = DecausalLM(str(models[kind]), batch_size=4, device="cpu", num_samples=4)
    together = ours.loglikelihood(requests("loglikelihood", *PAIRS))
    assert all(isinstance(score, Estimate) and score.standard_error > 0 for score, _ in together)
    alone = ours.loglikelihood(requests("loglikelihood", PAIRS[3]))[0]
    assert alone[0] == pytest.approx(together[3][0], abs=1e-4)
    (rolling,) = ours.loglikelihood_rolling(requests("loglikelihood_rolling", (LONG,)))
    assert rolling.standard_error > 0


def test_the_weights_of_any_model_have_a_causal_likelihood(models: dict[str, Path], hf: HFLM) -> None:
    ours = DecausalLM(str(models["whole"]), device="cpu", likelihood="causal")
    mine, theirs = (lm.loglikelihood(requests("loglikelihood", *PAIRS)) for lm in (ours, hf))
    assert [score for score, _ in mine] == pytest.approx([score for score, _ in theirs], abs=1e-4)


@pytest.mark.parametrize("kind", ["one", "block", "whole"])
def test_texts_are_what_the_sampler_writes(kind: str, models: dict[str, Path]) -> None:
    ours = DecausalLM(str(models[kind]), batch_size=2, device="cpu")
    found = ours.generate_until(requests("generate_until", *[(word, {"max_gen_toks": 8}) for word in WORDS]))
    assert found == [each.text for each in generate(load_converted(models[kind]), WORDS, max_new_tokens=8)]


def test_sampled_texts_differ_between_repeats_and_not_between_runs(models: dict[str, Path]) -> None:
    ours = DecausalLM(str(models["block"]), batch_size=3, device="cpu", seed=5)
    asked = [(WORDS[0], {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8})] * 3
    first = ours.generate_until(requests("generate_until", *asked))
    assert len(set(first)) == 3
    assert ours.generate_until(requests("generate_until", *asked)) == first


def evaluated(models: dict[str, Path], tasks: Path, kind: str, names: list[str] = ALL, **settings: Any) -> Any:
    return evaluate_harness(models[kind], names, HarnessSettings(**settings), include_path=tasks, device="cpu")


def test_scores_stand_beside_those_of_the_source_with_what_is_kept(models: dict[str, Path], tasks: Path) -> None:
    found = evaluated(models, tasks, "one", with_source=True, num_fewshot=1, dtype="float32")
    assert {score.task for score in found.scores} == set(ALL)
    for score in found.scores:
        assert score.value == pytest.approx(score.source, rel=1e-4)
        if score.source:
            assert score.retention == pytest.approx(100, rel=1e-4)
            assert score.retention_standard_error == pytest.approx(0, abs=1e-3)
    assert found.settings["num_shots"]["small_answer"] == 1
    printed = json.loads(json.dumps(found.as_dict(), default=str))
    assert printed["model"]["likelihood"] == "causal"
    assert found.as_table().row_count == len(found.scores)


def test_the_table_says_what_scores_are_made_of(models: dict[str, Path], tasks: Path) -> None:
    found = evaluated(models, tasks, "block", num_samples=2, limit=3)
    assert found.settings["made_of"] == {
        "small_choices": "NELBO, 2 masks",
        "small_word": "NELBO, 2 masks",
        "small_text": "NELBO, 2 masks",
        "small_answer": "texts",
    }
    assert set(found.mask_errors) == {"small_choices", "small_word", "small_text"}
    assert all(score.num_examples == 3 for score in found.scores)


def test_the_chat_template_reaches_the_model(models: dict[str, Path], tasks: Path, monkeypatch: Any) -> None:
    read: list[list[int]] = []
    original = DecausalLM._fitted

    def seen(self: DecausalLM, context: list[int], tokens: list[int]) -> Continuation:
        read.append(context)
        return original(self, context, tokens)

    monkeypatch.setattr(DecausalLM, "_fitted", seen)
    evaluated(models, tasks, "one", ["small_word"], limit=1, apply_chat_template=True)
    text = load_converted(models["one"]).tokenizer.decode(read[0])
    assert text.startswith("<|im_start|>user\nthe rain<|im_end|>")


def test_nothing_is_said_about_the_directory_that_a_run_starts_in(
    models: dict[str, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)  # no repository of git, which git reports as an error
    evaluated(models, tasks, "one", ["small_word"], limit=1)
    assert "git" not in capfd.readouterr().err


def test_an_interrupted_run_goes_on_from_its_cache(
    models: dict[str, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluated(models, tasks, "block", limit=5)
    asked: list[int] = []
    original = DecausalLM._scored

    def interrupted(self: DecausalLM, some: Any) -> Any:
        asked.append(len(some))
        for count, answer in enumerate(original(self, some)):
            if len(asked) == 1 and count == 6:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(DecausalLM, "_scored", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(models, tasks, "block", limit=5, use_cache=str(tmp_path / "answers"))
    resumed = evaluated(models, tasks, "block", limit=5, use_cache=str(tmp_path / "answers"))
    assert asked[1] == asked[0] - 6
    assert [score.value for score in resumed.scores] == pytest.approx([score.value for score in whole.scores])
    assert resumed.mask_errors == pytest.approx(whole.mask_errors)  # what is read from the cache has its error
    num_passes = len(asked)
    evaluated(models, tasks, "block", limit=5, use_cache=str(tmp_path / "answers"))
    assert asked[num_passes:] == []


def test_answers_of_another_model_or_other_masks_are_not_taken_for_ones_own(
    models: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    cache = str(tmp_path / "answers")
    runs: list[tuple[str, dict[str, Any]]] = [("one", {}), ("block", {}), ("block", {"num_samples": 1})]
    for kind, settings in runs:
        found = evaluated(models, tasks, kind, ["small_word"], limit=4, use_cache=cache, **settings)
        alone = evaluated(models, tasks, kind, ["small_word"], limit=4, **settings)
        assert [score.value for score in found.scores] == pytest.approx([score.value for score in alone.scores])
    assert len(list((tmp_path / "answers").iterdir())) == len(runs)


# What is kept, by hand


def test_what_is_kept_is_a_ratio_and_its_error_knows_that_examples_are_shared() -> None:
    ours, theirs = [1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0]
    kept = retention("acc", True, (0.5, 0.75), [ours, theirs])
    assert kept.value == pytest.approx(100 * 2 / 3)
    residuals = sum((a - 2 / 3 * b) ** 2 for a, b in zip(ours, theirs, strict=True))
    assert kept.standard_error == pytest.approx(100 * (4 / 3 * residuals) ** 0.5 / 3)
    assert retention("acc", True, (0.75, 0.75), [theirs, theirs]).standard_error == pytest.approx(0, abs=1e-12)


def test_where_lower_is_better_the_source_is_over_the_model() -> None:
    ours, theirs = [-3.0, -2.0, -4.0], [-1.0, -2.0, -3.0]
    kept = retention("perplexity", False, (2.0, 1.0), [ours, theirs])
    assert kept.value == 50
    assert kept.standard_error == pytest.approx(50 * (1 / 3) ** 0.5)  # of the mean of 2, 0, 1
    pairs = [[(score, 4) for score in scores] for scores in (ours, theirs)]
    assert retention("bits_per_byte", False, (9.0, 6.0), pairs).value == pytest.approx(100 * 6 / 9)
    assert retention("acc", None, (1.0, 1.0), [ours, theirs]).value is None
    assert retention("acc", True, (1.0, 0.0), [ours, theirs]).value is None


def test_sums_of_estimates_carry_their_errors() -> None:
    total = sum([Estimate(-1.0, 3.0), Estimate(-2.0, 4.0)])
    assert total == -3.0
    assert isinstance(total, Estimate)
    assert total.standard_error == 5.0


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"layout": "block", "block_size": 1, "shift": 1}, "causal"),
        ({"layout": "block", "block_size": 1, "shift": 0}, "nelbo"),
        ({"layout": "block", "block_size": 2, "shift": 1, "causal_context": True}, "nelbo"),
        ({"layout": "causal", "shift": 1}, "causal"),
        ({"layout": "bidirectional", "shift": 1}, "nelbo"),
    ],
)
def test_likelihood_is_causal_where_the_model_is(facts: dict[str, Any], expected: str) -> None:
    assert likelihood_kind(ConversionFacts(source="x", mask_token_id=1, **facts)) == expected


# Bad input


@pytest.mark.parametrize(
    ("flags", "reported"),
    [
        (["--tasks", "small_choice"], "unknown task 'small_choice'; did you mean 'small_choices'?"),
        (["--tasks", ","], "--tasks is empty"),
        (["--tasks", "nothing.yaml"], "there is no task file nothing.yaml"),
        (["--tasks", "small_word", "--likelihood", "elbo"], "did you mean 'nelbo'?"),
        (["--tasks", "small_word", "--limit", "0"], "--limit 0: must be above 0"),
        (["--tasks", "small_word", "--num_fewshot", "-1"], "-1 is not accepted"),
        (["--tasks", "small_word", "--batch_size", "0"], "0 is not accepted"),
        (["--tasks", "small_word", "--num_samples", "0"], "0 is not accepted"),
        (["--tasks", "small_word", "--dtype", "int8"], "dtype 'int8' is not known"),
        (["--tasks", "small_word", "--max_length", "3"], "and the model reads"),
        (["--tasks", "small_answer", "--gen_kwargs", "num_beams=2"], "gen_kwargs holds 'num_beams'"),
        (["--tasks", "small_answer", "--gen_kwargs", "until"], "--gen_kwargs holds 'until'; write NAME=VALUE"),
        (["--tasks", "small_answer", "--gen_kwargs", "max_gen_toks=64"], "give --gen_kwargs max_gen_toks=N"),
    ],
)
def test_bad_input_is_reported_in_one_line(
    flags: list[str],
    reported: str,
    models: dict[str, Path],
    tasks: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The harness's own tasks take seconds to look through: an unknown name is searched for among these alone.
    monkeypatch.setattr(
        "decausal.evaluation.harness.tasks_by_name.TaskManager", partial(TaskManager, include_defaults=False)
    )
    assert main(["eval", "harness", str(models["block"]), "--include_path", str(tasks), "--device", "cpu", *flags]) == 2
    *bars, error = capsys.readouterr().err.splitlines()  # the bars are those of libraries
    assert error.startswith("decausal: error: ")
    assert reported in error
    assert all("%|" in bar or "examples/s" in bar or not bar for bar in bars)


def test_data_without_the_fields_of_a_task_are_reported(models: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    text = (tasks / "small_word.yaml").read_text().replace("{{question}}", "{{goal}}")
    (tmp_path / "other.yaml").write_text(text)
    with pytest.raises(UserError, match="lack a field: 'goal' is undefined"):
        evaluate_harness(models["one"], [str(tmp_path / "other.yaml")], device="cpu")


def test_data_that_are_not_there_are_reported(tasks: Path, tmp_path: Path) -> None:
    text = (tasks / "small_word.yaml").read_text().replace("choices.jsonl", "gone.jsonl")
    (tmp_path / "other.yaml").write_text(text)
    with pytest.raises(UserError, match="the data cannot be loaded"):
        load_tasks([str(tmp_path / "other.yaml")])


def test_a_source_that_is_gone_leaves_the_rest(models: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    from shutil import copytree

    copytree(models["one"], tmp_path / "one")
    record = (tmp_path / "one" / "decausal.json").read_text()
    (tmp_path / "one" / "decausal.json").write_text(record.replace(str(models["source"]), str(tmp_path / "gone")))
    found = evaluate_harness(
        tmp_path / "one", ["small_word"], HarnessSettings(with_source=True, limit=2), include_path=tasks, device="cpu"
    )
    assert str(tmp_path / "gone") in found.source_missing
    assert all(score.source is None for score in found.scores)
