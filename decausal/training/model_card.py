"""The card of a pretrained model: what it is, how it was made and how good it is."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from typing import Any

import yaml

from decausal.evaluation.results import ArLikelihood
from decausal.evaluation.tasks import TaskScores
from decausal.privacy import without_paths, without_secrets
from decausal.provenance import provenance
from decausal.training.settings.pretraining import PretrainSettings
from decausal.wording import quantity


def model_card(
    settings: PretrainSettings,
    training: dict[str, Any],
    num_parameters: int,
    num_tokens: int,
    num_steps: int,
    heldout: ArLikelihood | None,
    tasks: TaskScores | None,
) -> str:
    """Returns the model's card: what it is, how it was made and how good it is, in Markdown."""
    flags = {
        name: without_paths(value)
        for name, value in asdict(settings).items()
        if value != getattr(PretrainSettings(), name) and name != "overwrite"
    } | {name: value for name, value in training.items() if name not in ("output_dir", "resume_from_checkpoint")}
    flags = without_secrets(flags)
    command = shlex.join(
        ["decausal", "pretrain", "--output_dir", "OUT"]
        + [word for name, value in flags.items() for word in (f"--{name}", _as_flag(value))]
    )
    made_with = yaml.safe_dump(provenance(), sort_keys=False)
    return f"""\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# A small autoregressive model, made by decausal

{num_parameters:,} parameters: {quantity(settings.num_hidden_layers, "layer")} of width {settings.hidden_size},
{_vocabulary(settings)}, a context of {settings.context} tokens. Stock Qwen3
architecture, bfloat16 weights. Trained on `{without_paths(settings.data)}`. It exists to be converted
into a diffusion model, in demonstrations and tests.

## Held-out likelihood

{_likelihood(settings, heldout)}
{_accuracy(settings, tasks)}
## How it was made

```
{command}
```

{quantity(num_tokens, "token")} in {quantity(num_steps, "step")}, padding included. The same command makes it again.

```yaml
{made_with}```
"""


def _vocabulary(settings: PretrainSettings) -> str:
    if settings.tokenizer == "characters":
        return "a vocabulary of single characters"
    return f"a byte-level BPE vocabulary of {settings.vocab_size}"


def _likelihood(settings: PretrainSettings, heldout: ArLikelihood | None) -> str:
    if heldout is None:
        return "Not measured."
    return (
        f"{heldout.bits_per_byte:.4f} bits per byte (standard error over rows "
        f"{heldout.bits_per_byte_standard_error or 0:.4f}), {heldout.nll_per_token:.4f} nats per token, on "
        f"{heldout.num_tokens:,} tokens ({heldout.num_bytes:,} bytes) of `{without_paths(settings.eval_data)}`, "
        f"documents isolated, rows of {settings.max_length}."
    )


def _accuracy(settings: PretrainSettings, tasks: TaskScores | None) -> str:
    if tasks is None:
        return ""
    rows = [
        f"| {name} | {figures['accuracy']:.3f} | {figures['standard_error'] or 0:.3f} | {figures['num_examples']} |"
        for name, figures in (*tasks.as_dict()["tasks"].items(), ("mean", tasks.as_dict()))
    ]
    table = "\n".join(["| task | accuracy | standard error | examples |", "|---|---|---|---|", *rows])
    return f"""
## Right answers

Greedy, on the examples of `{without_paths(settings.eval_data)}`.

{table}
"""


def _as_flag(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)
