"""Tensors written in any number of shards are read back bit for bit, by us and by transformers."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from decausal.exchange.stock import STOCK_MODEL_TYPES, expected_tensors
from decausal.exchange.tensor_files import Stored, TensorFiles, write_tensor_files
from tests.families import FAMILIES


def stored(tensor: torch.Tensor) -> Stored:
    return Stored(tensor.nbytes, lambda: tensor)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    max_shard_bytes=st.integers(1, 400),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_tensors_survive_any_division_into_shards(tmp_path_factory, sizes, max_shard_bytes, dtype):
    directory = tmp_path_factory.mktemp("shards")
    tensors = {f"tensor.{number}": torch.randn(size).to(dtype) for number, size in enumerate(sizes)}
    write_tensor_files(
        directory,
        {name: stored(tensor) for name, tensor in tensors.items()},
        max_shard_bytes=max_shard_bytes,
    )
    found = TensorFiles(directory)
    assert found.names() == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found.load(name), tensor)
        assert (found.dtype(name), found.shapes()[name]) == (dtype, tuple(tensor.shape))
        assert found.stored(name).num_bytes == tensor.nbytes
    for path in directory.glob("*.safetensors"):  # a tensor larger than a shard is alone in one
        in_file = [tensors[name].nbytes for name in tensors if found._file_of[name] == path]
        assert sum(in_file) <= max_shard_bytes or len(in_file) == 1


def test_transformers_loads_what_is_written_in_shards(tmp_path):
    model = FAMILIES["qwen3"]()
    model.save_pretrained(tmp_path / "whole")
    whole = TensorFiles(tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    write_tensor_files(tmp_path / "parts", {name: whole.stored(name) for name in whole.names()}, max_shard_bytes=9000)
    model.config.save_pretrained(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "parts").state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_the_tensors_expected_of_an_architecture_are_those_that_transformers_saves(tmp_path):
    for family in STOCK_MODEL_TYPES:
        for changes in ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"attention_bias": True}):
            if family == "qwen2" and "attention_bias" in changes:
                continue  # always biased
            model = FAMILIES[family](**changes)
            directory = tmp_path / f"{family}-{'-'.join(map(str, changes.items()))}"
            model.save_pretrained(directory)
            assert TensorFiles(directory).shapes() == expected_tensors(model.config)
