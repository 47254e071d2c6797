"""PEFT adapters on a model: merged into it, they leave a stock one."""

from __future__ import annotations

import warnings
from pathlib import Path

from transformers import PreTrainedModel

from decausal.errors import UserError, first_line


def merged(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Merges the adapter in `directory` into the model that it was trained on, which is changed in place.

    Raises:
        UserError: PEFT is missing, or the adapter does not fit the model.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(f"the adapter in {directory} needs peft: pip install 'decausal[lora]'") from error
    try:
        with warnings.catch_warnings():
            # Of keys that are missing PEFT only warns; the model would be the base.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            whole = PeftModel.from_pretrained(model, str(directory)).merge_and_unload()
    except Exception as error:  # PEFT raises what each of its parts does
        raise UserError(f"the adapter in {directory} does not fit its base model: {first_line(error)}") from error
    return whole.requires_grad_(True).eval()  # PEFT froze it
