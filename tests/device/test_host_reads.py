"""How often an engine's pass makes the host wait for the device: on a GPU each time costs what the pass could hide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting import HostReads, OneDevice

from decausal.models.backbone import stock_model
from decausal.models.block_cache import decoding
from decausal.models.checkpoint import Converted
from decausal.models.facts import ConversionFacts
from decausal.models.gated import install_gate
from decausal.sampling.bidirectional.row_engine import RowEngine
from decausal.sampling.blocks.draft_shapes import DraftShape, autoregressive, linear, quadratic, strided
from decausal.sampling.blocks.draft_tables import Drafting, DraftTables
from decausal.sampling.blocks.engine import BlockEngine
from decausal.sampling.blocks.extent import Extent
from decausal.sampling.blocks.speculative import SpeculativeEngine
from decausal.sampling.blocks.speculative_rows import SpeculativeRows
from decausal.sampling.jobs import Job, run
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from decausal.training.settings import ConversionSettings
from decausal.training.student import with_adapters
from tests.sampling.block_decoding import block_facts, job_of, sharp_model
from tests.sampling.tiny_models import converted

KINDS: dict[str, dict[str, Any]] = {
    "static": {"num_steps": 4},
    "threshold": {"threshold": 0.9, "temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
    "remasking": {"num_steps": 4, "remask": "remdm"},
}


def test_settings_of_rows_reach_the_device_in_one_copy() -> None:
    settings = [SamplerSettings(**kind) for kind in KINDS.values()]
    copies = []

    class Copies(OneDevice):
        def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.device.type == "meta" and args:
                copies.extend(part for part in args if isinstance(part, torch.Tensor) and part.device.type == "cpu")
            return found

    with Copies(torch.device("meta")):
        RowSettings.of(settings, torch.device("meta"))
    assert len(copies) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_of_whole_rows_asks_the_device_twice(kind: str) -> None:
    """Which positions are scored, and what was kept."""
    model = converted()
    engine = RowEngine(model, max_rows=2, max_length=16)
    for seed in (0, 1):
        engine.submit(Job(Row(([5, 7], []), (8,), "row"), SamplerSettings(max_new_tokens=8, **KINDS[kind]), seed))
    engine.step()
    with HostReads() as seen:
        engine.step()
    assert seen.reads.total() <= 2, seen.reads


def test_denoising_asks_the_device_twice_a_pass_and_once_when_a_row_ends() -> None:
    engine = RowEngine(converted(), max_rows=2, max_length=12)
    settings = SamplerSettings(num_steps=8)
    jobs = [Job(Row(([5] * given, []), (12 - given,), "row"), settings, 0) for given in (4, 8)]
    passes = []
    with HostReads() as seen:
        ended = dict(run(engine, jobs, passes.append))
    assert [ended[index].num_forwards for index in (0, 1)] == [8, 4]
    assert seen.reads.total() <= 2 * max(8, 4) + len(jobs), seen.reads


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_pass_of_blocks_asks_the_device_once(block_size: int) -> None:
    engine = BlockEngine(sharp_model(), block_facts(block_size), max_rows=2, max_length=32)
    for seed in (0, 1):
        engine.submit(job_of([5, 7, 9, 11], SamplerSettings(max_new_tokens=16, num_steps=2), seed))
    for _ in range(3):
        engine.step()
    with HostReads() as seen:
        engine.step()
    assert seen.reads == {"tolist": 1}


@pytest.mark.parametrize("draft", ["auto", "quadratic", "strided", "linear"])
@pytest.mark.parametrize("kind", [{}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.01}], ids=str)
def test_a_pass_of_verified_decoding_asks_the_device_once(draft: str, kind: dict[str, Any]) -> None:
    model = Converted(sharp_model(), None, block_facts(4))
    engine = SpeculativeEngine(model, max_rows=2, max_length=48)
    settings = SamplerSettings(max_new_tokens=40, speculative=True, draft=draft, **kind)
    for seed in (0, 1):
        engine.submit(job_of([5, 7, 9, 11], settings, seed))
    for _ in range(3):
        engine.step()
    for _ in range(4):
        with HostReads() as seen:
            engine.step()
        assert seen.reads == {"tolist": 1}


@pytest.mark.parametrize("kind", [{}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.01}], ids=str)
@pytest.mark.parametrize("shape", [quadratic(3), strided(3), linear(3), autoregressive()], ids=lambda shape: shape.name)
@pytest.mark.parametrize("facts", [block_facts(4), block_facts(4, shift=0)], ids=["shift 1", "shift 0"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_a_pass_of_verified_decoding_is_computed_on_one_device_alone(
    kind: dict[str, Any], shape: DraftShape, facts: ConversionFacts, family: str
) -> None:
    """On the device of no numbers every look at one, and every tensor from elsewhere, is an error."""
    device, by_masks = torch.device("meta"), facts.shift == 0
    model = sharp_model(family).float().to(device).eval()
    rows = SpeculativeRows(
        model,
        facts,
        tables=DraftTables([Drafting(shape, by_masks)], facts.shift, False, device),
        max_rows=4,
        num_slots=64,
    )
    settings = RowSettings.of([SamplerSettings(**kind)] * 3, device)
    masks = rows.tables.most_masks
    for num_given in (1, 6):
        extent = Extent(num_given, shape.most_pending, masks, shape.longest_group, 40)
        with decoding(model):
            rows.read(slice(0, 3), extent, settings)  # takes memory
            with OneDevice(device):
                read = rows.read(slice(0, 3), extent, settings)
        assert read.outcome.shape == (3, shape.most_pending + 2)


@pytest.mark.parametrize("shape", [quadratic(3), autoregressive()], ids=lambda shape: shape.name)
def test_a_pass_of_a_gated_model_is_computed_on_one_device_alone(shape: DraftShape) -> None:
    device = torch.device("meta")
    model = with_adapters(ConversionSettings(lora_r=2), sharp_model("qwen3").float())
    num_tokens, width = stock_model(model).get_input_embeddings().weight.shape
    install_gate(model, num_tokens, torch.zeros(width))
    model = model.to(device).eval()
    tables = DraftTables([Drafting(shape, False)], 1, False, device)
    rows = SpeculativeRows(model, block_facts(4), tables=tables, max_rows=4, num_slots=64)
    settings = RowSettings.of([SamplerSettings()] * 3, device)
    extent = Extent(6, shape.most_pending, tables.most_masks, shape.longest_group, 40)
    with decoding(model):
        rows.read(slice(0, 3), extent, settings)  # takes memory
        with OneDevice(device) as seen:
            rows.read(slice(0, 3), extent, settings)
    assert seen.operators.total() > 0
