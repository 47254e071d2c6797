"""How to start the engines that serve SDAR, with the flags of their own tests and documentation.

Sources: SGLang, docs "Diffusion language models", `srt/dllm/config.py` and `test/registered/dllm/test_sdar.py`;
LMDeploy 0.16, `lmdeploy serve api_server` and `autotest/configs/JetLM`.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from decausal.models.facts import ConversionFacts
from decausal.sampling.settings import DEFAULT_THRESHOLD

SGLANG_SETTINGS = "sglang.yaml"
MAX_RUNNING_REQUESTS = 64  # SGLang's default for diffusion models is 1


def sglang_settings(facts: ConversionFacts) -> dict[str, Any]:
    """Returns what SGLang's algorithm LowConfidence reads; without it a block has 4 tokens, whatever config.json
    says."""
    return {"block_size": facts.block_size, "threshold": _threshold(facts)}


def launch_commands(directory: Path, facts: ConversionFacts) -> dict[str, str]:
    """Returns the command that serves an exported directory, by the engine's name."""
    path, settings = shlex.quote(str(directory)), shlex.quote(str(directory / SGLANG_SETTINGS))
    return {
        "SGLang": (
            f"python3 -m sglang.launch_server --model-path {path} --trust-remote-code "
            f"--dllm-algorithm LowConfidence --dllm-algorithm-config {settings} "
            f"--attention-backend flashinfer --max-running-requests {MAX_RUNNING_REQUESTS}"
        ),
        "LMDeploy": (
            f"lmdeploy serve api_server {path} --backend pytorch --trust-remote-code "
            f"--dllm-block-length {facts.block_size} {_lmdeploy_schedule(facts)}"
        ),
    }


def _threshold(facts: ConversionFacts) -> float:
    """Returns the threshold. It is 1.0 if the default is a number of steps: one token a step, SGLang's only static
    schedule."""
    if facts.sampler.get("num_steps") is not None:
        return 1.0
    return float(facts.sampler.get("threshold") or DEFAULT_THRESHOLD)


def _lmdeploy_schedule(facts: ConversionFacts) -> str:
    num_steps = facts.sampler.get("num_steps")
    if num_steps is not None:
        steps = min(num_steps, facts.block_size or num_steps)
        return f"--dllm-unmasking-strategy low_confidence_static --dllm-denoising-steps {steps}"
    return (
        "--dllm-unmasking-strategy low_confidence_dynamic "
        f"--dllm-denoising-steps {facts.block_size} --dllm-confidence-threshold {_threshold(facts)}"
    )
