"""What a directory is or lacks is said in one line of ours, before anything heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pickle import dumps
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decausal.errors import UserError
from decausal.models.adapt import load_source
from decausal.models.checkpoint import load_converted, save_converted
from decausal.models.facts import ConversionFacts
from decausal.models.names import check_converted, check_source
from tests.runs import run_python, save_source


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_source(tmp_path / "model")


def shard(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_a_shard(directory: Path) -> None:
    shard(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


def lose_the_index(directory: Path) -> None:
    shard(directory)
    (directory / "model.safetensors.index.json").unlink()


def pickle(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin")


def cut(directory: Path, keep: float = 0.5) -> None:
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])


def configure(**changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def quantized(method: str) -> Callable[[Path], None]:
    return configure(quantization_config={"quant_method": method, "bits": 4})


def drop(*names: str) -> Callable[[Path], None]:
    return lambda directory: [(directory / name).unlink() for name in names]


def only_gguf(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    (directory / "model-q4.gguf").write_bytes(b"GGUF")


BROKEN = {
    "GPTQ": (quantized("gptq"), r"are quantized \(GPTQ\).*give the model from which they were made"),
    "AWQ": (quantized("awq"), r"are quantized \(AWQ\)"),
    "another method": (quantized("hqq"), r"are quantized \(hqq\)"),
    "a shard missing": (
        lose_a_shard,
        r"lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names",
    ),
    "cut off": (cut, r"model.safetensors is cut off: it has \d+ bytes, and needs \d+; fetch it again"),
    "cut off in its header": (lambda path: cut(path, 0.001), r"is cut off or broken: its header ends beyond"),
    "Git LFS": (
        lambda path: (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is a pointer of Git LFS and holds no weights; fetch them with git lfs pull",
    ),
    "an index missing": (lose_the_index, "lacks model.safetensors.index.json, which names the files of weights; fetch"),
    "a value of another type": (configure(hidden_size="wide"), "Field 'hidden_size' expected int, got str"),
    "values that disagree": (
        configure(model_type="llama", num_attention_heads=7),
        "not a multiple of the number of attention heads",
    ),
    "no weights": (drop("model.safetensors"), r"holds no weights \(model.safetensors\)"),
    "no tokenizer": (drop("tokenizer.json", "tokenizer_config.json"), r"holds no tokenizer \(tokenizer.json\)"),
    "a tokenizer cut off": (
        lambda path: (path / "tokenizer.json").write_bytes((path / "tokenizer.json").read_bytes()[:-9]),
        "tokenizer.json is cut off: it ends within its table; fetch it again",
    ),
    "Git LFS for the tokenizer": (
        lambda path: (path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "tokenizer.json is a pointer of Git LFS and holds no tokenizer; fetch it with git lfs pull",
    ),
    "no configuration": (drop("config.json"), "it has no config.json"),
    "a GGUF file": (only_gguf, r"it has no config.json; give the file: .*model-q4.gguf"),
    "a broken configuration": (lambda path: (path / "config.json").write_text("{"), "config.json cannot be read"),
}


# What only loading a model finds.
ONLY_BY_LOADING = ("no weights", "a value of another type", "values that disagree")


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_directory_is_one_line(kind: str, directory: Path) -> None:
    spoil, message = BROKEN[kind]
    spoil(directory)
    for refuse in (load_source,) if kind in ONLY_BY_LOADING else (check_source, load_source):
        with pytest.raises(UserError, match=message) as caught:
            refuse(directory)
        assert "\n" not in str(caught.value)
        assert str(directory) in str(caught.value)


@pytest.mark.parametrize(
    "kind", ["a shard missing", "cut off", "no weights", "no tokenizer", "a tokenizer cut off", "GPTQ"]
)
def test_so_is_a_converted_one(kind: str, tmp_path: Path) -> None:
    model, tokenizer = load_source("tiny-tasks")
    facts = ConversionFacts(source="tiny-tasks", layout="causal", shift=1, mask_token_id=tokenizer.mask_token_id or 0)
    save_converted(tmp_path, model, tokenizer, facts)
    spoil, message = BROKEN[kind]
    spoil(tmp_path)
    for refuse in (check_converted, load_converted):
        with pytest.raises(UserError, match=message):
            refuse(tmp_path)


@pytest.mark.parametrize("change", [shard, pickle])
def test_shards_and_pickled_weights_are_read(change: Callable[[Path], None], directory: Path) -> None:
    expected = load_source(directory)[0].state_dict()
    change(directory)
    found = load_source(directory)[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_shards_of_pickles_that_are_missing_are_named(directory: Path) -> None:
    pickle(directory)
    (directory / "pytorch_model.bin").rename(directory / "pytorch_model-00001-of-00002.bin")
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match=r"lacks pytorch_model-00002-of-00002.bin, which"):
        check_source(directory)


@pytest.mark.parametrize("method", ["bitsandbytes", "compressed-tensors"])
def test_what_turns_them_back_is_named_where_it_is_missing(
    method: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(method)(directory)
    monkeypatch.setattr("decausal.models.directories.find_spec", lambda name: name)
    check_source(directory)
    monkeypatch.setattr("decausal.models.directories.find_spec", lambda name: None)
    for refuse in (check_source, load_source):
        with pytest.raises(UserError, match=rf"are quantized \({method}\).*pip install 'decausal\[quantized\]'"):
            refuse(directory)


def test_what_is_no_model_is_reported_before_torch_is_imported(directory: Path) -> None:
    cut(directory)
    code = (
        "import sys; from decausal.errors import UserError; from decausal.models.names import check_source\n"
        f"try: check_source({str(directory)!r})\n"
        "except UserError as error: print(error, 'torch' in sys.modules)"
    )
    said = run_python("-c", code).stdout
    assert "is cut off" in said
    assert said.strip().endswith("False")


class RunsCode:
    """What would make a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_bin_file_is_not_run_and_no_advice_is_given_to_run_it(tmp_path: Path) -> None:
    source = save_source(tmp_path / "model")
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(dumps(RunsCode(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"a \.bin file does not hold plain tensors; code in one is never run"):
        load_source(source)
    assert not (tmp_path / "ran").exists()
