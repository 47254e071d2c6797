"""What the compiler plans for a layer that decodes: few kernels, and none that copies the cache."""

from __future__ import annotations

import subprocess
import sys

from tests.runs import ROOT, environment

# In a process without type checking, which Dynamo cannot trace.
COUNT = """
from compiled_layers import decoding_layer

plan = decoding_layer("embedded", is_flex=True, is_merged=True)
print(plan.of_libraries, plan.generated)
"""


def test_a_compiled_layer_that_decodes_has_few_kernels() -> None:
    """The target is 16. A write to the cache that is a kernel of its own, or copies it, would be one more."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COUNT],
        cwd=ROOT / "benchmarks",
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    of_libraries, generated = map(int, run.stdout.split())
    assert of_libraries <= 6, "four products, and FlexAttention in two"
    assert generated <= 6
