"""Training arguments that are refused before transformers is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from decausal.errors import UserError
from decausal.trainer_fields import trainer_fields
from decausal.training.argument_values import ALWAYS, WITHOUT_EFFECT, check_values


def another(name: str) -> Any:
    """A value that is not the one that a run has."""
    held = ALWAYS.get(name, trainer_fields()[name].default)
    if isinstance(held, bool):
        return not held
    options = {float: 0.1, int: 3, list: ["other"], str: "other"}
    hint = trainer_fields()[name].hint
    return options[next(kind for kind in options if kind in (hint, *get_args(hint)))]


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_an_argument_that_would_have_no_effect_is_refused_with_the_reason(name: str):
    with pytest.raises(UserError, match=f"--{name} .* would have no effect: .*; leave it out"):
        check_values({"output_dir": "out", name: another(name)})
    check_values({"output_dir": "out", name: ALWAYS.get(name, trainer_fields()[name].default)})


def test_what_every_run_has_needs_a_reason():
    assert ALWAYS.keys() <= WITHOUT_EFFECT.keys()


@pytest.mark.parametrize("value", [{"more": [{"api_key": "x"}]}, ["a", {"password": "x"}], ["hf_" + 20 * "a"]], ids=str)
def test_a_secret_in_a_table_is_refused(tmp_path: Path, value: Any):
    with pytest.raises(UserError, match="--fsdp_config holds a secret, which would be recorded"):
        check_values({"output_dir": str(tmp_path), "fsdp_config": value})
    check_values({"output_dir": str(tmp_path), "fsdp_config": {"eos_token": "</s>", "xla": False}})
