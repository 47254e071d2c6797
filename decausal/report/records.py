"""Records of evaluations: figures, and all that they depend on, in one JSON file each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from decausal.errors import UserError
from decausal.files import parsed_json, write_whole
from decausal.privacy import without_secrets

FORMAT = 1
MARK = "decausal_evaluation"
_MOST_BYTES = 1 << 26


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one model.

    Attributes:
        kind: "nll", "tasks", "harness", "texts" or "sweep".
        arguments: The command's arguments after `decausal`, without the flags that say where figures go.
        model: Name as given, "fingerprint" of its files, and "facts" of the conversion (none for an AR model).
        figures: What was measured, in the form that the command prints with `--json`.
        manifest: Date, commit, hardware, versions, "data_hash", "seeds" and "sampler".
        path: The file; None if it is not written yet.
    """

    kind: str
    arguments: list[str]
    model: dict[str, Any]
    figures: dict[str, Any]
    manifest: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def name(self) -> str:
        """The last part of the model's name."""
        return Path(self.model["name"]).name or self.model["name"]

    def as_dict(self) -> dict[str, Any]:
        """Returns the record as JSON holds it, without secrets."""
        values = {name: value for name, value in asdict(self).items() if name != "path"}
        return {MARK: FORMAT} | without_secrets(json.loads(json.dumps(values, default=str)))


def write_record(path: Path, record: Evaluation) -> None:
    """Writes a record in one step.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(record.as_dict(), indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}; name another file") from error


def read_record(path: Path) -> Evaluation | None:
    """Returns the record that a file holds; None for any other file.

    Raises:
        UserError: It is a record of a later version, or lacks a part.
    """
    try:
        with path.open("rb") as file:
            head = file.read(200)
            if MARK.encode() not in head or path.stat().st_size > _MOST_BYTES:
                return None
        values = parsed_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return evaluation_of(values, path)


def evaluation_of(values: Any, path: Path) -> Evaluation | None:
    """Returns the evaluation that a JSON object describes; None for any other.

    Raises:
        UserError: As `read_record`.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get(MARK), int):
        return None
    if values[MARK] > FORMAT:
        raise UserError(f"{path} is a record of form {values[MARK]}, and this decausal reads {FORMAT}: upgrade it")
    kinds: dict[str, type] = {"kind": str, "arguments": list, "model": dict, "figures": dict, "manifest": dict}
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            raise UserError(f"{path} is the record of an evaluation without its '{name}'; evaluate again")
    if not isinstance(values["model"].get("name"), str):
        raise UserError(f"{path} is the record of an evaluation without its model's name; evaluate again")
    return Evaluation(**{name: values[name] for name in kinds}, path=path)


def without_flags(arguments: Sequence[str], *names: str, switches: Sequence[str] = ()) -> list[str]:
    """Returns a command's arguments without some flags and their values.

    Args:
        arguments: The arguments.
        *names: Flags with a value, such as `--output`.
        switches: Flags without one.
    """
    kept: list[str] = []
    is_value = False
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if is_value or flag in switches:
            is_value = False
        elif flag in names:
            is_value = not equals
        else:
            kept.append(argument)
    return kept
