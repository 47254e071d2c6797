"""What would break, wait or be slow on a GPU, seen without one: on tensors of no device, by counting, by pretending.

They share their way of counting with `benchmarks/`.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
