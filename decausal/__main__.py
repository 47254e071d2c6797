"""`python -m decausal`, also under `accelerate launch -m` and `torchrun -m`."""

import sys

from decausal.cli import main

if __name__ == "__main__":
    sys.exit(main())
