"""How many kernels a compiled decoder layer of a decoding pass has, by the compiler's own code.

    python benchmarks/compiled_kernels.py

The compiler fuses the same operators for a CPU as for a GPU in the main, so this counts its code for a CPU, of a small
layer of Qwen3's kind. Products and attention are kernels of libraries; the others are generated.
"""

from __future__ import annotations

import argparse
import re

import torch
from models import SHAPES, build
from paper_steps import block_pass
from report import print_header
from torch._inductor.utils import run_and_get_code

from decausal.models.backbone import decoder_layers
from decausal.provenance import provenance

_OF_LIBRARIES = re.compile(r"extern_kernels\.\w+\(|torch\.ops\.[\w.]+\(")
_GENERATED = re.compile(r"cpp_fused_\w+\(")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", choices=list(SHAPES))
    args = parser.parse_args()
    print_header(provenance() | {"command": f"python benchmarks/compiled_kernels.py --model {args.model}"})
    cpu = torch.device("cpu")
    model = build(args.model, cpu).eval()
    one_pass = block_pass(model, num_rows=1, num_keys=128, device=cpu)
    decoder_layers(model)[0].compile(dynamic=False)  # it stands for all
    _, programs = run_and_get_code(one_pass)
    calls = [program[program.index("def call(") :] for program in programs]
    of_libraries = sum(len(_OF_LIBRARIES.findall(call)) for call in calls)
    generated = sum(len(_GENERATED.findall(call)) for call in calls)
    print(f"a compiled layer: {of_libraries + generated} kernels, {of_libraries} of libraries, {generated} generated")
    print(f"programs: {len(programs)}")


if __name__ == "__main__":
    main()
