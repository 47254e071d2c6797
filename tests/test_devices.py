"""What is chosen on a device, by pretending to be on it."""

from __future__ import annotations

import pytest
import torch

from decausal.devices import choices, decoding_dtype, free_operations, repays_compilation
from decausal.diffusion.layout import Layout
from decausal.models.block_cache import BlockCache
from decausal.sampling.blocks.reader import Reader
from decausal.sampling.blocks.rows import BlockRows
from tests.families import FAMILIES

CUDA = torch.device("cuda")
CPU = torch.device("cpu")
WEIGHTS, LAYERS = 440_000_000, 28  # Qwen3-0.6B's body


def test_other_devices_are_treated_like_a_cpu() -> None:
    assert choices("mps") == choices(CPU) != choices(CUDA)


def test_models_that_only_decode_are_bf16_on_a_gpu() -> None:
    assert (decoding_dtype(CUDA), decoding_dtype(CPU)) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("num_steps", "is_compiled"), [(20, False), (2000, True)])
def test_long_runs_compile_their_layers_on_a_gpu_and_short_ones_do_not(num_steps: int, is_compiled: bool) -> None:
    operations = 6.0 * WEIGHTS * 8 * 4096 * num_steps
    assert repays_compilation(CUDA, operations) is is_compiled
    assert not repays_compilation(CPU, operations)


def test_128_prompts_take_few_passes_on_a_gpu() -> None:
    model = FAMILIES["qwen3"](num_hidden_layers=1).to("meta")
    rows = BlockRows(2, 8, 4, 0, torch.device("meta"))
    reader = Reader(model, Layout("block", 4), 0, BlockCache(model.config, 2, 8), rows)
    widths = [16 + 8 * (row % 32) for row in range(128)]
    passes = {}
    for device in (CPU, CUDA):
        reader.free_padding = int(free_operations(device, LAYERS, WEIGHTS) / (2 * WEIGHTS))
        passes[device] = len(reader._batches(widths))
    assert passes[CUDA] <= 2 < passes[CPU]
