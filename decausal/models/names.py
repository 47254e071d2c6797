"""Finds what a model's name stands for: an embedded model, a directory here, or a repository on the hub.

Imports nothing heavy, so that a wrong name is refused before torch is imported.
"""

from __future__ import annotations

from pathlib import Path

from decausal.errors import UserError
from decausal.models.directories import (
    ADAPTER_FILE,
    adapter_of,
    refuse_adapter,
    refuse_incomplete,
    refuse_incomplete_draft,
    refuse_no_model,
    refuse_quantized,
)
from decausal.models.embedded import EMBEDDED_MODELS, embedded_model_path
from decausal.models.facts import FACTS_FILE, ConversionFacts, not_converted, read_facts
from decausal.models.gguf_files import check_gguf, is_gguf, repository_and_file

ACCEPTED_EMBEDDED = " or ".join(f"'{name}'" for name in EMBEDDED_MODELS)


def is_hub_id(name: str) -> bool:
    """Returns whether a name that is not a path here may be on the hub: owner/name. One of a GGUF file is not."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not is_gguf(name)


def located(
    model_name_or_path: str | Path,
    revision: str | None = None,
    *,
    may_be_converted: bool = False,
    merge_adapter: bool = False,
) -> tuple[str, str | None]:
    """Returns a directory or GGUF file and no commit, or a name on the hub and the commit of all its files.

    Args:
        model_name_or_path: A directory, a GGUF file, an embedded model, owner/name or owner/name/file.gguf.
        revision: Branch, tag or commit on the hub.
        may_be_converted: Whether a converted model is accepted.
        merge_adapter: Whether a PEFT adapter is accepted.

    Raises:
        UserError: There is no such model, it is of a kind that is not accepted, or its files are incomplete.
    """
    name = str(model_name_or_path)
    if name in EMBEDDED_MODELS:
        return str(embedded_model_path(name)), None
    path = Path(name).expanduser()
    if is_gguf(name) and not path.is_dir():
        return _located_gguf(name, path, revision)
    if path.is_dir():
        if not may_be_converted:
            _refuse_converted(name, path)
        if not merge_adapter:
            refuse_adapter(name, path)
        refuse_no_model(path)
        return str(path), None
    if path.exists():
        raise UserError(f"{name} is a file; give the model's directory, a .gguf file, a hub id, or {ACCEPTED_EMBEDDED}")
    if "/" in name and not is_hub_id(name):
        raise UserError(f"model directory {name} does not exist; give a directory, a hub id, or {ACCEPTED_EMBEDDED}")
    path, commit = _described_on_hub(name, revision)
    if not may_be_converted:
        _refuse_converted(name, path)
    if not merge_adapter:
        refuse_adapter(name, path)
    refuse_quantized(name, path)
    return name, commit


def _located_gguf(name: str, path: Path, revision: str | None) -> tuple[str, str | None]:
    if path.exists():
        check_gguf(path)
        return str(path), None
    if repository_and_file(name) is None or path.parent.is_dir():
        raise UserError(f"GGUF file {name} does not exist; give a file here, or owner/name/file.gguf on the hub")
    path, commit = _gguf_from_hub(name, revision)
    check_gguf(path)
    return name, commit


def gguf_path(name: str, commit: str | None) -> Path:
    """Returns the path of the GGUF file that `located` found, and downloads it if needed."""
    return Path(name) if commit is None else _gguf_from_hub(name, commit)[0]


def _gguf_from_hub(name: str, revision: str | None) -> tuple[Path, str]:
    from decausal.hub import fetch

    repository, file = repository_and_file(name)
    directory, commit = fetch(repository, revision, (file,))
    return directory / file, commit


def adapter_directory(name: str, commit: str | None) -> Path | None:
    """Returns the path of the PEFT adapter that `located` found, downloaded if needed; None for a whole model."""
    path = Path(name) if commit is None else _described_on_hub(name, commit)[0]
    if adapter_of(path) is None:
        return None
    if commit is None:
        return path
    from decausal.hub import fetch

    return fetch(name, commit)[0]


def is_converted(model_name_or_path: str | Path, revision: str | None = None) -> bool:
    """Returns whether a directory, or a repository on the hub, holds the facts of a conversion.

    Raises:
        UserError: The hub refuses the name.
    """
    return (_described(model_name_or_path, revision) / FACTS_FILE).is_file()


def facts_of(model_name_or_path: str | Path, revision: str | None = None) -> ConversionFacts | None:
    """Reads the facts of a converted model from a directory or the hub; None if the model is not converted.

    Raises:
        UserError: As `read_facts`, or if the hub refuses the name.
    """
    path = _described(model_name_or_path, revision)
    return read_facts(path) if (path / FACTS_FILE).is_file() else None


def converted_directory(model_name_or_path: str | Path, revision: str | None = None) -> Path:
    """Returns the directory of a converted model, and downloads it if needed.

    A path that does not exist is returned unchanged: `read_facts` refuses it.

    Raises:
        UserError: The hub refuses the name, or the model is not converted.
    """
    name = str(model_name_or_path)
    path = Path(name).expanduser()
    if not path.exists() and is_hub_id(name):
        if not is_converted(name, revision):
            raise UserError(not_converted(f"{name} on the hub"))
        from decausal.hub import fetch

        path, _ = fetch(name, revision)
    _refuse_unusable_converted(path)
    return path


def _refuse_unusable_converted(path: Path) -> None:
    """Refuses what is not a converted model, or lacks files."""
    if path.is_dir() and (path / FACTS_FILE).is_file():
        facts = read_facts(path)
        if facts.base_reference is not None:  # its source is not here
            refuse_incomplete_draft(path)
            return
        refuse_no_model(path)
        refuse_incomplete(path)
    elif path.is_dir():
        refuse_adapter(str(path), path)


def refuse_as_base(model_name_or_path: str | Path, path: str, commit: str | None) -> None:
    """Raises UserError for a model without plain files of its own, which gated weights keep.

    Args:
        model_name_or_path: As the user wrote it.
        path, commit: As `located` found it.
    """
    if is_gguf(path):
        raise UserError(
            f"{model_name_or_path} cannot be converted with gated weights, which keep the source's own files: write "
            "it as a Hugging Face directory first, in a line of Python that docs/models.md shows, and give that"
        )
    if commit is None and adapter_of(Path(path)) is not None:
        raise UserError(
            f"{model_name_or_path} cannot be converted with gated weights, which keep the source's own files: save "
            "it merged, as a Hugging Face directory, and give that"
        )


def is_left_to_the_hub(name: str) -> bool:
    """Returns whether a name is a hub id and does not begin with a directory here, so that it is hardly a mistyped
    path."""
    path = Path(name).expanduser()
    return is_hub_id(name) and not path.exists() and not path.parent.is_dir()


def check_source(
    model_name_or_path: str | Path,
    revision: str | None = None,
    *,
    may_be_converted: bool = False,
    merge_adapter: bool = False,
) -> None:
    """Refuses a wrong name of a model to convert, before anything is imported to load it.

    The hub is asked here only for what may be a mistyped path: a name that begins with a directory that is here.

    Raises:
        UserError: As `located`.
    """
    if not is_left_to_the_hub(str(model_name_or_path)):
        path, commit = located(
            model_name_or_path, revision, may_be_converted=may_be_converted, merge_adapter=merge_adapter
        )
        if commit is None and not is_gguf(path):
            refuse_incomplete(Path(path), may_lack_weights=True)


def check_converted(model_name_or_path: str | Path, *, may_be_source: bool = False) -> ConversionFacts | None:
    """Refuses a wrong name of a converted model, like `check_source`. Returns the facts of a model that is here.

    Args:
        model_name_or_path: A directory or a hub id.
        may_be_source: Whether an AR model, which has no facts, is accepted.

    Raises:
        UserError: As `read_facts`, `is_converted` and `located`.
    """
    name = str(model_name_or_path)
    if may_be_source:
        check_source(name, may_be_converted=True)
        return None if is_hub_id(name) and not Path(name).expanduser().exists() else facts_of(name)
    path = Path(name).expanduser()
    if path.exists() or not is_hub_id(name):
        _refuse_unusable_converted(path)
        return read_facts(path)
    if not is_left_to_the_hub(name) and not is_converted(name):
        raise UserError(not_converted(f"{name} on the hub"))
    return None


def _refuse_converted(name: str, path: Path) -> None:
    if (path / FACTS_FILE).exists():
        raise UserError(f"{name} is already converted (it holds {FACTS_FILE}); give the autoregressive model")


def _described(model_name_or_path: str | Path, revision: str | None) -> Path:
    """Returns a directory that describes a model, though it may lack the weights."""
    name = str(model_name_or_path)
    if name in EMBEDDED_MODELS:
        return embedded_model_path(name)
    path = Path(name).expanduser()
    return path if path.exists() or not is_hub_id(name) else _described_on_hub(name, revision)[0]


def _described_on_hub(name: str, revision: str | None) -> tuple[Path, str]:
    from decausal.hub import fetch  # this imports the hub's client

    return fetch(name, revision, ("config.json", FACTS_FILE, ADAPTER_FILE), is_shown=False)
