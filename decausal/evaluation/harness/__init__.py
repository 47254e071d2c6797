"""Scores converted models on public benchmarks with lm-evaluation-harness.

Importing this package registers the model with the harness as ``decausal``. It needs the extra `eval`.
"""

from __future__ import annotations

from decausal.errors import UserError

MODEL_NAME = "decausal"

try:
    import lm_eval.models  # noqa: F401 - its own models, which it registers only where none is
    from lm_eval.api.registry import model_registry
except ImportError:
    raise UserError(
        "lm-evaluation-harness is not installed; it comes with the extra: pip install 'decausal[eval]'"
    ) from None

if MODEL_NAME not in model_registry:
    model_registry.register(MODEL_NAME, target="decausal.evaluation.harness.model:DecausalLM")
