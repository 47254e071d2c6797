"""What a directory is or lacks is said in one line of ours, before anything heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from decausal.errors import UserError
from decausal.models.adapt import load_source
from decausal.models.checkpoint import load_converted, save_converted
from decausal.models.facts import ConversionFacts
from decausal.models.names import check_converted, check_source
from tests.runs import assert_same, run_python, save_source


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
    "no weights": (drop("model.safetensors"), r"holds no weights \(model.safetensors\)"),
    "no tokenizer": (drop("tokenizer.json", "tokenizer_config.json"), r"holds no tokenizer \(tokenizer.json\)"),
    "no configuration": (drop("config.json"), "it has no config.json"),
    "a GGUF file": (only_gguf, r"it has no config.json; give the file: .*model-q4.gguf"),
    "a broken configuration": (lambda path: (path / "config.json").write_text("{"), "config.json cannot be read"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_directory_is_one_line(kind: str, directory: Path) -> None:
    spoil, message = BROKEN[kind]
    spoil(directory)
    for refuse in (load_source,) if kind == "no weights" else (check_source, load_source):
        with pytest.raises(UserError, match=message) as caught:
            refuse(directory)
        assert "\n" not in str(caught.value)
        assert str(directory) in str(caught.value)


@pytest.mark.parametrize("kind", ["a shard missing", "cut off", "no weights", "no tokenizer", "GPTQ"])
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


def assert_saved_as_plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Asserts that a model is written as plain numbers, as any model of its family is."""
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}
    save_converted(directory, model, tokenizer, ConversionFacts("x", "causal", 1, 0))
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    found, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert_same(found.state_dict(), model.state_dict())


def test_fp8_weights_come_back_as_plain_numbers(tmp_path: Path) -> None:
    """Each matrix of the layers in float8 with a scale for each block of 128 by 128, as DeepSeek-V3 is published."""
    directory = save_source(tmp_path / "model")
    tensors, expected = load_file(directory / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj.weight" in name]:
        scale = tensors[name].abs().max() / 448
        packed = (tensors[name] / scale).to(torch.float8_e4m3fn)
        expected[name] = packed.float() * scale
        tensors |= {name: packed, f"{name}_scale_inv": scale.reshape(1, 1)}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    stored = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    configure(quantization_config=stored)(directory)
    model, tokenizer = load_source(directory)
    for name, tensor in expected.items():
        torch.testing.assert_close(model.state_dict()[name], tensor)
    assert_saved_as_plain(model, tokenizer, tmp_path / "out")


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])  # a family whose weights stand the other way round, too
def test_weights_of_bitsandbytes_come_back_as_plain_numbers(family: str, num_bits: int, tmp_path: Path) -> None:
    directory, stored = save_source(tmp_path / "model", family), BitsAndBytesConfig(**{f"load_in_{num_bits}bit": True})
    plain = load_source(directory)[0]
    packed = AutoModelForCausalLM.from_pretrained(directory, quantization_config=stored, device_map={"": "cpu"})
    ids = torch.arange(12)[None]
    packed.save_pretrained(directory)
    assert load_file(directory / "model.safetensors").keys() != plain.state_dict().keys()
    model, tokenizer = load_source(directory)
    for name, tensor in plain.state_dict().items():
        assert (model.state_dict()[name] - tensor).norm() <= (0.5 if num_bits == 4 else 0.02) * tensor.norm()
    with torch.no_grad():
        expected = packed.dequantize(torch.float32)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_saved_as_plain(model, tokenizer, tmp_path / "out")


@pytest.mark.parametrize("num_bits", [4, 8])
def test_weights_of_compressed_tensors_come_back_as_plain_numbers(num_bits: int, tmp_path: Path) -> None:
    """Each matrix of the layers as whole numbers with a scale for each row; those of 4 bits packed by eights."""
    directory = save_source(tmp_path / "model")
    tensors, expected = load_file(directory / "model.safetensors"), {}
    largest = 2 ** (num_bits - 1) - 1
    for name in [name for name in tensors if "_proj.weight" in name]:
        scale = tensors[name].abs().amax(dim=1, keepdim=True) / largest
        whole = (tensors[name] / scale).round().to(torch.int8)
        expected[name] = whole.float() * scale
        tensors[f"{name}_scale"] = scale
        if num_bits == 8:
            tensors[name] = whole
        else:
            tensors[f"{name}_shape"] = torch.tensor(tensors.pop(name).shape)
            unsigned = (whole.int() + 8).unflatten(1, (-1, 8))
            tensors[f"{name}_packed"] = (unsigned << torch.arange(0, 32, 4)).sum(dim=2, dtype=torch.int32)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": num_bits, "type": "int", "symmetric": True, "strategy": "channel"}
    stored = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}
    stored |= {"format": "int-quantized" if num_bits == 8 else "pack-quantized"}
    stored |= {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    configure(quantization_config=stored)(directory)
    model, tokenizer = load_source(directory)
    for name, tensor in expected.items():
        torch.testing.assert_close(model.state_dict()[name], tensor)
    assert_saved_as_plain(model, tokenizer, tmp_path / "out")


@pytest.mark.parametrize("method", ["bitsandbytes", "compressed-tensors"])
def test_what_turns_them_back_is_named_where_it_is_missing(
    method: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(method)(directory)
    check_source(directory)
    monkeypatch.setattr("decausal.models.directories.find_spec", lambda name: None)
    for refuse in (check_source, load_source):
        with pytest.raises(UserError, match=rf"are quantized \({method}\).*pip install 'decausal\[quantized\]'"):
            refuse(directory)


def test_what_is_no_model_is_told_before_torch_is_imported(directory: Path) -> None:
    cut(directory)
    code = (
        "import sys; from decausal.errors import UserError; from decausal.models.names import check_source\n"
        f"try: check_source({str(directory)!r})\n"
        "except UserError as error: print(error, 'torch' in sys.modules)"
    )
    said = run_python("-c", code).stdout
    assert "is cut off" in said
    assert said.strip().endswith("False")
