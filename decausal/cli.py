"""The verbs, nothing else."""

from __future__ import annotations

import sys


def main() -> int:
    from decausal.config import resolve
    from decausal.training.pretrain import pretrain
    from decausal.training.settings import PretrainSettings

    settings, training = resolve(PretrainSettings, {}, sys.argv[2:])
    pretrain(settings, training)
    return 0
