"""The embedded models are what their cards say: small, stock, good at Python or at tasks, and ready to be converted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import decausal
from decausal.cli import main
from decausal.data.corpus import split_of, stdlib_documents
from decausal.data.rows import load_rows
from decausal.data.tasks import examples
from decausal.data.tokenizer import character_tokenizer
from decausal.evaluation.likelihood import evaluate_ar_nll
from decausal.evaluation.tasks import evaluate_tasks
from decausal.models.adapt import adapt, load_source
from decausal.models.embedded import EMBEDDED_MODELS, embedded_model_path, tiny_model_path

SOURCE = "def area(width, height):\n    return width * height\n" * 8


def test_it_takes_at_most_16_megabytes() -> None:
    assert sum(path.stat().st_size for path in tiny_model_path().iterdir()) <= 16_000_000


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_its_card_says_how_it_was_made(name: str) -> None:
    card = (embedded_model_path(name) / "README.md").read_text(encoding="utf-8")
    for stated in ("decausal pretrain", "bits per byte", "tokens in", "commit:", "processor:"):
        assert stated in card


def test_it_writes_held_out_python_at_less_than_one_bit_per_byte() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
    rows = load_rows("stdlib-heldout", tokenizer, 512)
    measured = evaluate_ar_nll(model, rows, tokenizer, num_rows=24)
    assert measured.bits_per_byte is not None
    assert measured.bits_per_byte < 1.0


def test_the_model_of_tasks_is_as_good_as_its_card_says() -> None:
    card = (embedded_model_path("tiny-tasks") / "README.md").read_text(encoding="utf-8")
    stated = float(re.search(r"\| mean \| (\d\.\d+) \|", card)[1])
    measured = evaluate_tasks(load_source("tiny-tasks"), list(islice(examples(split="heldout"), 70)))
    assert stated > 0.9
    assert measured.accuracy > stated - 0.07  # three standard errors of 70 examples


def test_the_model_of_tasks_is_small_and_has_a_row_for_the_mask_token() -> None:
    assert sum(path.stat().st_size for path in embedded_model_path("tiny-tasks").iterdir()) <= 4_000_000
    model, tokenizer = load_source("tiny-tasks")
    assert tokenizer.get_vocab() == character_tokenizer(256).get_vocab()
    num_rows = len(model.get_input_embeddings().weight)
    assert adapt(model, tokenizer) == tokenizer.mask_token_id < num_rows == len(model.get_input_embeddings().weight)


def test_splits_share_no_file_and_depend_on_the_path_alone() -> None:
    held_out = [path for path, _ in stdlib_documents("heldout")]
    assert held_out
    assert all(split_of(path) == "heldout" for path in held_out)
    assert split_of("traceback.py") == "heldout"
    assert split_of("argparse.py") == "train"


def _lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(SOURCE)
    return path


def _source_directory(folder: Path) -> Path:
    (folder / "package").mkdir()
    for name in ("one.py", "two.py"):
        (folder / "package" / name).write_text(SOURCE)
    return folder / "package"


def _glob(folder: Path) -> str:
    return f"{_source_directory(folder)}/*.py"


def _texts(folder: Path) -> Path:
    path = folder / "texts.jsonl"
    path.write_text(_lines([{"text": SOURCE}] * 3))
    return path


def _messages(folder: Path) -> Path:
    path = folder / "messages.jsonl"
    turns = [{"role": "user", "content": "Write area."}, {"role": "assistant", "content": SOURCE[:100]}]
    path.write_text(_lines([{"messages": turns}] * 3))
    return path


def _completions(folder: Path) -> Path:
    path = folder / "completions.jsonl"
    path.write_text(_lines([{"prompt": "def area(", "completion": "width, height): ..."}] * 3))
    return path


def _parquet(folder: Path) -> Path:
    path = folder / "texts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [SOURCE] * 3}), path)
    return path


@pytest.mark.parametrize(
    "written",
    [_text_file, _source_directory, _glob, _texts, _messages, _completions, _parquet],
    ids=lambda f: f.__name__,
)
def test_it_converts_on_text_of_every_format(written: Callable[[Path], Path | str], tmp_path: Path) -> None:
    output_dir = tmp_path / "converted"
    flags = {
        "data": written(tmp_path),
        "output_dir": output_dir,
        "max_steps": 1,
        "max_length": 64,
        "save_strategy": "no",
    }
    assert main(["convert", "tiny", *(f"--{name}={value}" for name, value in flags.items())]) == 0
    generation = decausal.load(output_dir).generate("def area(", max_new_tokens=4)
    assert not isinstance(generation, list)
    assert len(generation.ids) >= 1
