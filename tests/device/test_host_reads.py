"""How often an engine's pass makes the host wait for the device: on a GPU each time costs what the pass could hide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting import HostReads, OneDevice

from decausal.sampling.bidirectional.row_engine import RowEngine
from decausal.sampling.blocks.engine import BlockEngine
from decausal.sampling.jobs import Job, run
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
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
