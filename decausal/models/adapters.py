"""PEFT adapters on a model, and merging them into it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from decausal.errors import UserError, first_line
from decausal.models.casting import cast_weights

CHATTY = ("bitsandbytes", "transformers.integrations.bitsandbytes")


@contextmanager
def hushed() -> Iterator[None]:
    """Hides warnings of PEFT and bitsandbytes on which users cannot act."""
    logs = [logging.getLogger(name) for name in CHATTY]
    levels = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def merged(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Merges the adapter in `directory` into the model that it was trained on, which is changed in place.

    Raises:
        UserError: PEFT is missing, or the adapter does not fit the model.
    """
    whole = _wrapped(model, directory).merge_and_unload()
    return whole.requires_grad_(True).eval()  # PEFT froze it


def with_adapter(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Puts the adapter in `directory` on the model that it was trained on, which keeps its class.

    Raises:
        UserError: PEFT is missing, or the adapter does not fit the model.
    """
    wrapped = _wrapped(model, directory, autocast_adapter_dtype=False)
    return cast_weights(wrapped, model.dtype).get_base_model().eval()


def _wrapped(model: PreTrainedModel, directory: Path, **options: Any) -> Any:
    try:
        with hushed():  # it imports bitsandbytes if that is installed
            from peft import PeftModel
    except ImportError as error:
        raise UserError(f"the adapter in {directory} needs peft: pip install 'decausal[lora]'") from error
    try:
        with hushed():
            # PEFT only warns about missing keys, and the model would stay the base.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT reads it
            return PeftModel.from_pretrained(model, str(directory), **options)
    except Exception as error:  # PEFT raises many types of errors
        raise UserError(f"the adapter in {directory} does not fit its base model: {first_line(error)}") from error
