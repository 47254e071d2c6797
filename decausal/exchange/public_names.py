"""Finds the public checkpoint to be imported."""

from __future__ import annotations

from pathlib import Path

from decausal.errors import UserError
from decausal.models.facts import FACTS_FILE
from decausal.models.names import is_converted, is_hub_id, is_left_to_the_hub


def refuse_wrong_name(name: str, revision: str | None = None) -> None:
    """Refuses early what `located` would refuse. The hub is asked in the same cases as in `check_source`.

    Raises:
        UserError: As `located`.
    """
    if not is_left_to_the_hub(name):
        _refuse(name, revision)


def located(name: str, revision: str | None) -> tuple[Path, str | None]:
    """Returns the directory of a checkpoint, and its commit if it is from the hub.

    Raises:
        UserError: There is no such checkpoint, or it is converted already.
    """
    _refuse(name, revision)
    path = Path(name).expanduser()
    if path.exists():
        return path, None
    from decausal.hub import fetch

    return fetch(name, revision)


def _refuse(name: str, revision: str | None) -> None:
    path = Path(name).expanduser()
    if path.is_file():
        raise UserError(f"{name} is a file; give a checkpoint's directory or a hub id")
    if not path.exists() and not is_hub_id(name):
        raise UserError(f"directory {name} does not exist; give a checkpoint's directory or a hub id")
    if is_converted(name, revision):
        raise UserError(f"{name} is in decausal's form already (it holds {FACTS_FILE}); use it as it is")
