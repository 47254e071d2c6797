"""The command line: quick to answer, the same however it is called, and what it prints can be used again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from decausal.cli import VERBS, main
from decausal.training.run import argument_errors
from decausal.training.settings import ConversionSettings
from tests.hangs import PATIENCE
from tests.runs import call, environment, save_source, write_text

HEAVY = ("torch", "transformers", "datasets", "numpy", "accelerate")
SCRIPT = f"""
import sys
from decausal.cli import main
assert main(sys.argv[1:]) == 0
found = [name for name in {HEAVY} if name in sys.modules]
assert not found, found
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["convert", "--help"], ["pretrain", "-h"], ["--version"], []], ids=str
)
def test_help_answers_at_once_and_imports_nothing_heavy(arguments):
    before = os.times()
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], env=environment(), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    after = os.times()  # of the processor, so that a busy machine changes nothing
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1
    assert ended.stdout.startswith(("Turn an autoregressive", "usage: decausal", "decausal "))
    assert not ended.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["generate", "--help"]], ids=str)
def test_a_reader_that_leaves_early_is_not_complained_of(arguments):
    script = "import sys; from decausal.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, *arguments]
    writing = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    writing.stdout.close()
    _, errors = writing.communicate(timeout=PATIENCE)
    assert errors == b""


def test_a_warning_of_ours_is_one_line_without_its_place_in_the_code(tmp_path):
    text = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": "the hat", "completion": "a"}, {"prompt": "the hat " * 40, "completion": "a"}]
    text.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    arguments = ["convert", save_source(tmp_path / "source"), "--data", text, "--output_dir", tmp_path / "out"]
    ended = call(*arguments, "--recipe", "mdm", "--max_length", "32", "--max_steps", "1", "--save_strategy", "no")
    assert ended.returncode == 0, ended.stderr
    (reported,) = [line for line in ended.stderr.splitlines() if "left out" in line]
    assert reported.startswith("decausal: warning: left out 1 document longer than a row of 32 tokens: ")
    assert ".py" not in ended.stderr


def test_help_names_every_verb_and_every_setting_with_its_default(capsys):
    main(["--help"])
    overview = capsys.readouterr().out
    assert all(f"decausal {verb}" in overview for verb in VERBS)
    main(["convert", "--help"])
    page = capsys.readouterr().out
    for name, field in ConversionSettings.__dataclass_fields__.items():
        assert f"--{name} (default {field.default})" in page
        assert field.metadata["help"] in page
    assert "--recipe" in page
    assert "--logging_steps (default 10)\n      a number" in page
    main(["pretrain", "--help"])
    assert "--learning_rate (default 0.005)\n      a number" in capsys.readouterr().out


def test_the_printed_configuration_is_a_recipe_that_means_the_same(tmp_path, capsys):
    flags = ["--views", "2", "--complementary_masks", "true", "--data", "a.txt,b.txt", "--learning_rate", "1e-5"]
    assert main(["convert", "my-model", "--recipe", "repr-align", *flags, "--print_config"]) == 0
    printed = capsys.readouterr().out
    values = yaml.safe_load(printed)
    assert (values["model_name_or_path"], values["views"], values["learning_rate"]) == ("my-model", 2, 1e-5)
    assert values["align_weight"] > 0
    (tmp_path / "mine.yaml").write_text(printed)
    assert main(["convert", "--recipe", str(tmp_path / "mine.yaml"), "--print_config", "true"]) == 0
    assert capsys.readouterr().out == printed


def test_printing_the_configuration_writes_nothing(tmp_path, capsys):
    assert main(["convert", "m", "--data", "d", "--output_dir", str(tmp_path / "out"), "--print_config"]) == 0
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    source, text = save_source(root / "model"), write_text(root / "text.jsonl")
    flags = ["--max_length", "24", "--max_steps", "2", "--use_cpu", "true"]
    assert main(["convert", str(source), "--data", str(text), "--output_dir", str(root / "out"), *flags]) == 0
    return root


def test_a_conversion_from_the_command_line_says_where_it_is_and_what_comes_next(converted, capsys):
    arguments = ["convert", str(converted / "model"), "--recipe", "mdm", "--data", str(converted / "text.jsonl")]
    arguments += ["--output_dir", str(converted / "mdm"), "--max_length", "24", "--max_steps", "1", "--use_cpu"]
    assert main(arguments) == 0
    reported = capsys.readouterr()
    assert f"converted model: {converted / 'mdm'}" in reported.out
    assert f"decausal generate {converted / 'mdm'}" in reported.out
    assert not reported.err
    facts = json.loads((converted / "mdm" / "decausal.json").read_text())
    assert facts["recipe"]["align_weight"] == 0


def test_a_model_with_a_chat_template_is_to_be_talked_to_next(tmp_path, capsys):
    source, text = save_source(tmp_path / "model", chat=True), write_text(tmp_path / "text.jsonl")
    arguments = ["convert", str(source), "--recipe", "mdm", "--data", str(text), "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, "--max_length", "24", "--max_steps", "1", "--use_cpu"]) == 0
    assert f"next: decausal chat {tmp_path / 'out'}, or decausal generate {tmp_path / 'out'}" in capsys.readouterr().out


def test_the_run_writes_down_its_configuration_which_is_a_recipe_too(converted, capsys):
    assert main(["convert", "--recipe", str(converted / "out" / "run.yaml"), "--print_config"]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert (values["max_length"], values["max_steps"]) == (24, 2)
    assert values["model_name_or_path"] == str(converted / "model")


def test_what_was_converted_generates_and_infills(converted, capsys):
    assert main(["generate", str(converted / "out"), "the rain", "--max_new_tokens", "4", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ids"]) <= 4
    flags = ["--prefix", "the ", "--suffix", " ran", "--length", "3", "--json"]
    assert main(["infill", str(converted / "out"), *flags]) == 0
    assert len(json.loads(capsys.readouterr().out)["ids"]) == 3


def test_pretraining_from_the_command_line_makes_a_model_that_converts(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 200)
    shape = ["--vocab_size", "270", "--hidden_size", "32", "--intermediate_size", "48", "--num_hidden_layers", "2"]
    shape += ["--num_attention_heads", "4", "--num_key_value_heads", "2", "--max_length", "32", "--max_steps", "3"]
    shape += ["--data", str(tmp_path / "text.txt"), "--eval_data", str(tmp_path / "text.txt"), "--bf16", "false"]
    schedule = ["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", "{}", "--warmup_steps", "1"]
    assert main(["pretrain", "--output_dir", str(tmp_path / "ar"), *shape, *schedule]) == 0
    reported = capsys.readouterr().out
    assert f"model: {tmp_path / 'ar'}" in reported
    assert "bits per byte" in reported
    assert "bits per byte" in (tmp_path / "ar" / "README.md").read_text()
    flags = ["--data", str(tmp_path / "text.txt"), "--max_length", "32", "--max_steps", "1", "--use_cpu"]
    assert main(["convert", str(tmp_path / "ar"), "--output_dir", str(tmp_path / "out"), *flags]) == 0


def test_an_unknown_verb_names_the_nearest(capsys):
    assert main(["convrt"]) == 2
    assert capsys.readouterr().err == (
        f"decausal: error: unknown verb 'convrt'; did you mean 'convert'? Verbs: {', '.join(VERBS)}\n"
    )


def test_an_interrupt_is_reported_in_one_line(capsys, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("decausal.verbs.convert.run", interrupt)
    assert main(["convert"]) == 130
    assert capsys.readouterr().err == "decausal: interrupted\n"


def test_progress_bars_are_for_terminals(tmp_path, monkeypatch):
    from decausal.training.run import training_arguments

    for is_terminal in (True, False):
        monkeypatch.setattr("sys.stderr.isatty", lambda is_terminal=is_terminal: is_terminal)
        assert training_arguments({"output_dir": str(tmp_path)}).disable_tqdm is not is_terminal
    assert training_arguments({"output_dir": str(tmp_path), "disable_tqdm": False}).disable_tqdm is False


def test_a_traceback_is_printed_where_it_is_asked_for(monkeypatch, capsys):
    assert main(["nothing"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("DECAUSAL_TRACEBACK", "1")
    assert main(["nothing"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback")
    assert errors.splitlines()[-1].startswith("decausal: error: unknown verb")


@pytest.mark.parametrize("error", [TypeError, KeyError, RuntimeError, AttributeError])
def test_an_error_that_is_about_no_argument_keeps_its_traceback(error):
    with pytest.raises(error), argument_errors():
        raise error("a fault of ours")


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["gsm8k", "DIR"], r"no measure 'gsm8k' here.*decausal eval harness DIR --tasks gsm8k.*--data DATA.*--tasks"),
        (["benchmark", "DIR"], "did you mean 'decausal eval harness DIR --tasks TASKS'"),
        (["task", "DIR"], "did you mean 'decausal eval tasks MODEL'"),
        (["perplexity", "DIR"], "did you mean 'decausal eval nll DIR --data DATA'"),
        (["words", "DIR"], "decausal eval tasks MODEL --tasks words"),
        (["."], "name the measure before the model: decausal eval nll . --data DATA"),
        ([], "name what to measure: decausal eval nll DIR"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_measure_that_there_is_not_is_answered_by_what_to_type_instead(arguments, answer, capsys):
    assert main(["eval", *arguments]) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert re.search(answer, errors)


def test_help_for_eval_names_its_measures(capsys):
    assert main(["eval", "--help"]) == 0
    assert "decausal eval nll DIR --data DATA" in capsys.readouterr().out
