"""What the command line and a look at the disk show is reported before anything slow is imported."""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys

import pytest

from decausal.cli import VERBS, main
from decausal.models.facts import ConversionFacts, write_facts
from decausal.verbs.flags import slow_imports
from tests.runs import environment

SLOW = ("torch", "transformers", "datasets", "pyarrow", "matplotlib")
SCRIPT = f"""
import contextlib, io, json, sys
for name in {SLOW}:
    sys.modules[name] = None  # an import of it fails
from decausal.cli import main
ended = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as left:
            code = left.code
        except ImportError as error:
            code = repr(error)
    ended.append([code, out.getvalue(), err.getvalue()])
json.dump(ended, sys.stdout)
"""

ANSWERED = [
    [],
    ["--help"],
    ["--version"],
    *([verb, "--help"] for verb in VERBS),
    ["eval", "nll", "--help"],
    ["eval", "tasks", "--help"],
    ["eval", "harness", "--help"],
    ["eval", "texts", "--help"],
    ["convert", "m", "--print_config"],
    ["convert", "--recipe", "opdlm", "--learning_rate", "1e-4", "--print_config"],
    ["pretrain", "--print_config"],
]
MODEL = "does not exist; give the directory of a converted model"
GGUF = "typo.gguf does not exist; give a file here, or owner/name/file.gguf on the hub"
SOURCE = "model directory nowhere/at/all does not exist"
DATA = "no such file or directory: nowhere.txt"
REFUSED = [
    (["convrt"], "did you mean 'convert'?"),
    (["convert", "tiny", "--lerning_rate", "1"], "did you mean 'learning_rate'?"),
    (["convert", "tiny", "--max_steps", "many"], "'many' is not accepted; give a whole number"),
    (["convert", "tiny", "--optim", "adam-nonsense"], "--optim: 'adam-nonsense' is not accepted; give one of"),
    (["convert", "tiny", "--views", "0"], "--views 0: must be at least 1"),
    (["convert", "tiny", "--recipe", "mmd"], "did you mean 'mdm'?"),
    (["convert", "tiny", "--recipe", "nowhere.yaml"], "nowhere.yaml: No such file"),
    (["convert", "tiny", "--output_dir", "new"], "--data is missing"),
    (["convert", "tiny", "--data", "text.txt"], "--output_dir is missing"),
    (["convert", "tiny", "--data", "text.txt", "--output_dir", "new", "--learning_rate", "-1"], "--learning_rate -1.0"),
    (["convert", "nowhere/at/all", "--data", "text.txt", "--output_dir", "new"], SOURCE),
    (["convert", "full/typo", "--data", "text.txt", "--output_dir", "new"], "full/typo is neither a directory nor"),
    (["convert", "text.txt", "--data", "text.txt", "--output_dir", "new"], "text.txt is a file"),
    (["convert", "full/typo.gguf", "--data", "text.txt", "--output_dir", "new"], GGUF),
    (["doctor", "nowhere/typo.gguf"], GGUF),
    (["generate", "text.txt", "x"], "text.txt is a file; give the directory of a converted model"),
    (["generate", "nowhere/typo.gguf", "x"], MODEL),
    (["convert", "tiny", "--data", "nowhere.txt", "--output_dir", "new"], DATA),
    (["convert", "tiny", "--data", "empty", "--output_dir", "new"], "directory empty holds no text file"),
    (["convert", "tiny", "--data", "*.nothing", "--output_dir", "new"], "no file matches '*.nothing'"),
    (["convert", "tiny", "--data", "tasks:additon", "--output_dir", "new"], "did you mean 'addition'?"),
    (["convert", "tiny", "--data", "text.txt", "--eval_data", "nowhere.txt", "--output_dir", "new"], DATA),
    (
        ["convert", "tiny", "--data", "text.txt", "--sample_prompts", "nowhere", "--output_dir", "new"],
        "nowhere: No such",
    ),
    (["convert", "tiny", "--data", "text.txt", "--output_dir", "full"], "output_dir full is not empty"),
    (["convert", "tiny", "--data", "text.txt", "--output_dir", "text.txt"], "output_dir text.txt is a file"),
    (
        ["convert", "tiny", "--teacher_model_name_or_path", "nowhere/at/all", "--data=text.txt", "--output_dir=new"],
        SOURCE,
    ),
    (["plan", "nowhere/at/all"], SOURCE),
    (["plan", "tiny", "--data", "nowhere.txt"], DATA),
    (["plan", "tiny", "--recipe", "mmd"], "did you mean 'mdm'?"),
    (["plan", "tiny", "--gpu", "h10"], "--gpu h10; did you mean 'h100'?"),
    (["plan", "tiny", "--json", "maybe"], "--json maybe: give true or false"),
    (["plan", "tiny", "--max_steps", "0"], "--max_steps 0: give at least 1"),
    (["pretrain"], "--output_dir is missing"),
    (["pretrain", "--data", "nowhere.txt", "--output_dir", "new"], DATA),
    (["pretrain", "--output_dir", "full"], "output_dir full is not empty"),
    (["generate"], "the following arguments are required: directory"),
    (["generate", "nowhere/at/all", "x"], MODEL),
    (["generate", "full", "x"], "full is not a decausal checkpoint"),
    (["generate", "full/typo", "x"], "full/typo is neither a directory nor"),
    (["generate", "model", "x", "--temperature", "-1"], "temperature=-1"),
    (["generate", "model", "x", "--max_new_tokens", "0"], "max_new_tokens=0"),
    (["generate", "model", "x", "--record", "a.mp4"], "neither: give it one of these suffixes"),
    (["generate", "model", "x", "--batch_size", "0"], "--batch_size: 0 is not accepted: it must be at least 1"),
    (["infill", "nowhere/at/all", "--text", "a {gap}"], MODEL),
    (["infill", "model", "--prefix", "a", "--suffix", "b", "--length", "0"], "--length: 0 is not accepted"),
    (["edit", "nowhere/at/all", "x"], MODEL),
    (["edit", "model", "x", "--order", "backwards"], "invalid choice: 'backwards'"),
    (["chat", "nowhere/at/all"], MODEL),
    (["batch", "nowhere/at/all", "in.jsonl", "out.jsonl"], MODEL),
    (["batch", "model", "nowhere.jsonl", "out.jsonl"], "cannot read nowhere.jsonl: No such file"),
    (["batch", "model", "text.txt", "full"], "cannot write full: it is a directory"),
    (["batch", "model", "text.txt", "full/a.txt"], "full/a.txt exists and is not of a job"),
    (["answers", "nowhere/at/all", "--data", "text.txt", "--output", "new.jsonl"], SOURCE),
    (["answers", "full/typo", "--data", "text.txt", "--output", "new.jsonl"], "full/typo is neither a directory nor"),
    (["answers", "tiny", "--data", "nowhere.txt", "--output", "new.jsonl"], DATA),
    (["answers", "tiny", "--data", "text.txt"], "one of the arguments --output --output_dir is required"),
    (["answers", "tiny", "--data", "text.txt", "--output", "full"], "cannot write full: it is a directory"),
    (["answers", "tiny", "--data", "text.txt", "--output", "text.txt"], "text.txt exists and is not of a job"),
    (["answers", "tiny", "--data", "text.txt", "--output_dir", "text.txt"], "there is no directory text.txt"),
    (["answers", "tiny", "--data", "text.txt", "--output", "a", "--threshold", "0.5"], "threshold is for converted"),
    (["answers", "tiny", "--data", "text.txt", "--output", "a", "--num_answers", "2"], "the same answer 2 times"),
    (["answers", "model", "--data", "text.txt", "--output", "a", "--top_p", "2"], "top_p=2"),
    (["answers", "tiny", "--data", "text.txt", "--output", "a", "--top_p", "2"], "top_p=2"),
    (["serve", "nowhere/at/all"], MODEL),
    (["serve", "model", "--port", "-1"], "--port=-1"),
    (["eval", "nll", "nowhere/at/all", "--data", "text.txt"], MODEL),
    (["eval", "nll", "model", "--data", "nowhere.txt"], DATA),
    (["eval", "nll", "model", "--data", "text.txt", "--num_rows", "0"], "--num_rows: 0 is not accepted"),
    (["eval", "tasks", "nowhere/at/all"], SOURCE),
    (["eval", "tasks", "tiny-tasks", "--tasks", "additon"], "did you mean 'addition'?"),
    (["eval", "tasks", "model", "--top_p", "2"], "top_p=2"),
    (["eval", "nll", "model", "--data", "text.txt", "--output", "full"], "--output full is a directory"),
    (["eval", "tasks", "model", "--output", "text.txt"], "--output text.txt is there and no record of an evaluation"),
    (["eval", "texts", "model", "--data", "nowhere.txt"], DATA),
    (["sweep", "nowhere/at/all"], MODEL),
    (["sweep", "model", "--over", "treshold=1"], "did you mean 'threshold'?"),
    (["sweep", "model", "--tasks", "addition", "--limit", "3"], "--limit is for tasks of lm-evaluation-harness"),
    (["report", "nowhere"], "nowhere does not exist"),
    (["report", "full"], "full holds neither a run nor an evaluation"),
    (["report", "full", "--output", "a.pdf"], "name a file that ends with .html"),
    (["reproduce", "nowhere.json"], "nowhere.json does not exist"),
    (["reproduce", "model/decausal.json"], "neither a report nor the record of an evaluation"),
    (["eval", "losses"], "is not known; did you mean"),
    (["compare", "nowhere/at/all", "--recipes", "mdm"], SOURCE),
    (["compare", "tiny", "--recipes", "mdm,mmd"], "did you mean 'mdm'?"),
    (["compare", "tiny", "--recipes", "mdm", "--lerning_rate", "1"], "did you mean 'learning_rate'?"),
    (["compare", "tiny", "--recipes", "mdm", "--data", "nowhere.txt"], DATA),
    (["compare", "tiny", "--recipes", "mdm", "--eval", "nll", "--eval_data", "nowhere.txt"], DATA),
    (["compare", "tiny", "--recipes", "mdm", "--eval_data", "text.txt"], "--eval tasks measures exact answers"),
    (["compare", "tiny", "--recipes", "mdm,bd3lm"], "they decode in different ways"),
    (["compare", "tiny", "--recipes", "mdm", "--reference", "bd3lm"], "there is no such arm; arms: mdm"),
    (["compare", "tiny", "--recipes", "mdm", "--output_dir", "full"], "no run of decausal made it"),
    (["export", "nowhere", "--format", "hf", "--output_dir", "new"], MODEL),
    *(
        ([*verb, "adapter", *flags], "adapter is a PEFT adapter on base/model and not a whole model: decausal convert")
        for verb, *flags in (
            (["export"], "--format", "hf", "--output_dir", "new"),
            (["generate"], "x"),
            (["eval", "nll"], "--data", "text.txt"),
            (["eval", "tasks"],),
            (["convert"], "--data", "text.txt", "--output_dir", "new"),
        )
    ),
    (["export", "model", "--format", "hf", "--output_dir", "full"], "output_dir full is not empty"),
    (["export", "model", "--format", "hf", "--output_dir", "new", "--evaluation", "nowhere.json"], "No such file"),
    (["import", "nowhere/at/all", "--output_dir", "new"], "directory nowhere/at/all does not exist"),
    (["import", "model", "--output_dir", "new"], "model is in decausal's form already"),
    (["doctor", "nowhere/at/all"], SOURCE),
    (["demo", "--model_name_or_path", "nowhere/at/all"], SOURCE),
    (["demo", "--data", "nowhere.txt"], DATA),
    (["demo", "--output_dir", "text.txt"], "output_dir text.txt is a file"),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("startup")
    for name in ("empty", "full", "model", "adapter"):
        (root / name).mkdir()
    (root / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "base/model"}')
    (root / "text.txt").write_text("to be or not to be\n")
    (root / "full" / "a.txt").write_text("years of work\n")
    (root / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    (root / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # no tensors
    (root / "model" / "tokenizer.json").write_text("{}")
    write_facts(root / "model", ConversionFacts(source="tiny", layout="bidirectional", shift=1, mask_token_id=3))
    return root


@pytest.fixture(scope="module")
def ended(directory):
    """Runs all command lines in one process that cannot import what is slow."""
    before = sorted(directory.rglob("*"))
    commands = [*ANSWERED, *(arguments for arguments, _ in REFUSED)]
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=directory,
        env=environment(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1"),
        input=json.dumps(commands),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert sorted(directory.rglob("*")) == before
    return {tuple(arguments): found for arguments, found in zip(commands, json.loads(process.stdout), strict=True)}


@pytest.mark.parametrize("arguments", ANSWERED, ids=" ".join)
def test_help_and_settings_are_printed_without_slow_imports(ended, arguments):
    code, out, err = ended[tuple(arguments)]
    assert (code, err) == (0, "")
    assert len(out) > 10


@pytest.mark.parametrize(("arguments", "reported"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_a_wrong_path_or_flag_is_reported_without_slow_imports(ended, arguments, reported):
    code, out, err = ended[tuple(arguments)]
    assert (code, out) == (2, "")
    assert err.startswith("decausal: error: ")
    assert err.count("\n") == 1
    assert reported in err


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_garbage_collector_rests_for_imports_alone(was_enabled, monkeypatch):
    monkeypatch.setattr(gc, "isenabled", lambda: was_enabled)
    calls = []
    monkeypatch.setattr(gc, "disable", lambda: calls.append("disable"))
    monkeypatch.setattr(gc, "enable", lambda: calls.append("enable"))
    with contextlib.suppress(ImportError), slow_imports():
        calls.append("import")
        raise ImportError
    assert calls == ["disable", "import", *(["enable"] if was_enabled else [])]


def test_what_the_first_imports_leave_is_skipped_by_later_collections():
    """Once: what a long-lived process made before a second verb may be collected."""
    script = """
import gc, sys
from decausal.verbs.flags import slow_imports
for name in ("first", "second"):
    with slow_imports():
        sys.modules["torch"] = sys
    print(gc.get_freeze_count())
"""
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True
    )
    first, second = map(int, process.stdout.split())
    assert first > 1000
    assert second == first


def test_adapters_without_peft_are_refused_before_the_imports(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["convert", "tiny", "--data", "stdlib", "--lora_r", "4", "--output_dir", "nowhere"]) == 2
    assert capsys.readouterr().err == "decausal: error: --lora_r needs peft: pip install 'decausal[lora]'\n"


def test_what_is_good_goes_on_to_the_imports(directory):
    """The script does refuse: good input gets as far as what it cannot import."""
    good = [["convert", "tiny", "--data", "text.txt", "--output_dir", "new"], ["generate", "model", "x"]]
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=directory,
        env=environment(),
        input=json.dumps(good),
        capture_output=True,
        text=True,
    )
    assert [code for code, _, _ in json.loads(process.stdout)] == [
        "ModuleNotFoundError('import of torch halted; None in sys.modules')"
    ] * len(good)
