"""Runs command lines one after the other in each of the launched processes, whose start takes longer than all of them.

FSDP is let run on CPUs, where accelerate would take DDP for it without a word: of its kinds of processes only those
with accelerators become FSDP (`accelerate.state.AcceleratorState`). FSDP2 itself runs on CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from decausal.cli import main


def _shard_on_cpus() -> None:
    begin = AcceleratorState.__init__

    def begin_sharded(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            print("sharded")

    AcceleratorState.__init__ = begin_sharded


def run_lines(lines: list[list[str]]) -> None:
    """Runs them, in a process that ends afterwards.

    Raises:
        RuntimeError: One of them ends with an error.
    """
    torch.set_num_threads(1)  # those of the process that this one is a copy of are not here
    _shard_on_cpus()
    for line in lines:
        if status := main(line):
            raise RuntimeError(f"{line} ended with {status}")
