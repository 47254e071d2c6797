"""What the name of a model stands for: an embedded one, a directory here, or a repository on the hub.

Imports nothing heavy: what can be said of a wrong name is said before torch is imported.
"""

from __future__ import annotations

from pathlib import Path

from decausal.data.corpus import EMBEDDED_MODELS, embedded_model_path
from decausal.errors import UserError
from decausal.models.facts import FACTS_FILE, ConversionFacts, not_converted, read_facts

ACCEPTED_EMBEDDED = " or ".join(f"'{name}'" for name in EMBEDDED_MODELS)


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path here may be one on the hub: owner/name."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def located(
    model_name_or_path: str | Path, revision: str | None = None, *, may_be_converted: bool = False
) -> tuple[str, str | None]:
    """Returns a directory and no commit, or an id on the hub and its commit, so that all files are of one commit.

    Raises:
        UserError: there is no such model, or it is converted and may not be.
    """
    name = str(model_name_or_path)
    if name in EMBEDDED_MODELS:
        return str(embedded_model_path(name)), None
    path = Path(name).expanduser()
    if path.is_dir():
        if not may_be_converted:
            _refuse_converted(name, path)
        return str(path), None
    if path.exists():
        raise UserError(f"{name} is a file; give the model's directory, a hub id, or {ACCEPTED_EMBEDDED}")
    if "/" in name and not is_hub_id(name):
        raise UserError(f"model directory {name} does not exist; give a directory, a hub id, or {ACCEPTED_EMBEDDED}")
    path, commit = _described_on_hub(name, revision)
    if not may_be_converted:
        _refuse_converted(name, path)
    return name, commit


def is_converted(model_name_or_path: str | Path, revision: str | None = None) -> bool:
    """Whether a directory, or a repository on the hub, holds the facts of a conversion.

    Raises:
        UserError: the hub does not give what has the form of its ids.
    """
    return (_described(model_name_or_path, revision) / FACTS_FILE).is_file()


def facts_of(model_name_or_path: str | Path, revision: str | None = None) -> ConversionFacts | None:
    """Reads the facts of a converted model, a directory or a repository on the hub; None where it is not converted.

    Raises:
        UserError: as `read_facts`, and when the hub does not give what has the form of its ids.
    """
    path = _described(model_name_or_path, revision)
    return read_facts(path) if (path / FACTS_FILE).is_file() else None


def converted_directory(model_name_or_path: str | Path, revision: str | None = None) -> Path:
    """Returns where the files of a converted model are, once those on the hub are here.

    A path that does not exist is returned as it is: `read_facts` refuses it.

    Raises:
        UserError: the hub does not give it, or it is not converted.
    """
    name = str(model_name_or_path)
    path = Path(name).expanduser()
    if path.exists() or not is_hub_id(name):
        return path
    if not is_converted(name, revision):
        raise UserError(not_converted(f"{name} on the hub"))
    from decausal.hub import fetch

    return fetch(name, revision)[0]


def is_left_to_the_hub(name: str) -> bool:
    """Whether a name is one for the hub, and begins with no directory here: then it is hardly a mistyped path."""
    path = Path(name).expanduser()
    return is_hub_id(name) and not path.exists() and not path.parent.is_dir()


def check_source(
    model_name_or_path: str | Path, revision: str | None = None, *, may_be_converted: bool = False
) -> None:
    """Refuses a wrong name of a model that is to be converted, before anything is imported to load it.

    The hub is asked here only for what may be a mistyped path: a name that begins with a directory that is here.

    Raises:
        UserError: as `located`.
    """
    if not is_left_to_the_hub(str(model_name_or_path)):
        located(model_name_or_path, revision, may_be_converted=may_be_converted)


def check_converted(model_name_or_path: str | Path, *, may_be_source: bool = False) -> ConversionFacts | None:
    """Refuses a wrong name of a converted model, as `check_source` does, and returns the facts of one that is here.

    Args:
        model_name_or_path: a directory or a hub id.
        may_be_source: an AR model, which has no facts, will do.

    Raises:
        UserError: as `read_facts`, `is_converted` and `located`.
    """
    name = str(model_name_or_path)
    if may_be_source:
        check_source(name, may_be_converted=True)
        return None if is_hub_id(name) and not Path(name).expanduser().exists() else facts_of(name)
    path = Path(name).expanduser()
    if path.exists() or not is_hub_id(name):
        return read_facts(path)
    if not is_left_to_the_hub(name) and not is_converted(name):
        raise UserError(not_converted(f"{name} on the hub"))
    return None


def _refuse_converted(name: str, path: Path) -> None:
    if (path / FACTS_FILE).exists():
        raise UserError(f"{name} is already converted (it holds {FACTS_FILE}); give the autoregressive model")


def _described(model_name_or_path: str | Path, revision: str | None) -> Path:
    """A directory that holds what is told of a model, though not always its weights."""
    name = str(model_name_or_path)
    if name in EMBEDDED_MODELS:
        return embedded_model_path(name)
    path = Path(name).expanduser()
    return path if path.exists() or not is_hub_id(name) else _described_on_hub(name, revision)[0]


def _described_on_hub(name: str, revision: str | None) -> tuple[Path, str]:
    from decausal.hub import fetch  # which imports the hub's client

    return fetch(name, revision, ("config.json", FACTS_FILE), is_shown=False)
