"""Runs command lines one after the other in each of the launched processes, whose start takes longer than all of them.

    LAUNCHER -m tests.exact.launched LINES.json

FSDP is let run on CPUs, where accelerate would take DDP for it without a word: of its kinds of processes only those
with accelerators become FSDP (`accelerate.state.AcceleratorState`). FSDP2 itself runs on CPUs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

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


if __name__ == "__main__":
    _shard_on_cpus()
    for line in json.loads(Path(sys.argv[1]).read_text()):
        if status := main(line):
            sys.exit(status)
