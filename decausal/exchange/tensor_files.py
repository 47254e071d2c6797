"""Safetensors on disk, read tensor by tensor and written shard by shard, so a model need not fit in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from decausal.errors import UserError, first_line
from decausal.files import parsed_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Stored(NamedTuple):
    """A tensor that has not been read yet, and its size in bytes."""

    num_bytes: int
    load: Callable[[], Tensor]


class TensorFiles:
    """The tensors of a checkpoint, in one file or in shards with an index. Only headers are read at first.

    Args:
        directory: A directory with `model.safetensors`, or `model.safetensors.index.json` and the shards that it names.

    Raises:
        UserError: Files are missing, broken or not safetensors, or hold numbers that are not floating point.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[Path, Any] = {}
        self._file_of = self._find()
        self._slices = {name: self._opened(path).get_slice(name) for name, path in self._file_of.items()}
        for name, found in self._slices.items():
            if found.get_dtype() not in _DTYPES:
                raise UserError(
                    f"{directory}: tensor {name} holds {found.get_dtype()}, not floating-point numbers; "
                    "give the checkpoint before it was quantized"
                )

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(found.get_shape()) for name, found in self._slices.items()}

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._slices[name].get_dtype()]

    def load(self, name: str) -> Tensor:
        try:
            return self._opened(self._file_of[name]).get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self._file_of[name]} cannot be read: {first_line(error)}") from error

    def stored(self, name: str) -> Stored:
        return Stored(math.prod(self.shapes()[name]) * self.dtype(name).itemsize, lambda: self.load(name))

    def _find(self) -> dict[str, Path]:
        index = self.directory / INDEX
        if index.is_file():
            return self._read_index(index)
        single = self.directory / WEIGHTS
        if single.is_file():
            return dict.fromkeys(self._opened(single).keys(), single)
        pickled = sorted(path.name for path in self.directory.glob("*.bin"))
        if pickled:
            raise UserError(
                f"{self.directory} holds {pickled[0]}, which only runs as code; give the checkpoint as safetensors"
            )
        raise UserError(f"{self.directory} holds neither {WEIGHTS} nor {INDEX}")

    def _read_index(self, index: Path) -> dict[str, Path]:
        try:
            names = parsed_json(index.read_text(encoding="utf-8"))["weight_map"]
            found = {name: self.directory / Path(file).name for name, file in names.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} cannot be read: {first_line(error)}") from error
        for name, path in found.items():
            if not path.is_file():
                raise UserError(f"{self.directory} lacks {path.name}, which {index.name} names; fetch it again")
            if name not in self._opened(path).keys():  # noqa: SIM118 - the opened file is no mapping
                raise UserError(f"{path} lacks tensor {name}, which {index.name} says it holds; fetch it again")
        return found

    def _opened(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} is broken: {first_line(error)}; fetch it again") from error
        return self._files[path]


def write_tensor_files(
    directory: Path, tensors: Mapping[str, Stored], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes tensors like transformers: one file, or shards of at most `max_shard_bytes` with an index."""
    shards = _shards(tensors, max_shard_bytes)
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name].load().contiguous() for name in names}, directory / file, {"format": "pt"})
        file_of |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(stored.num_bytes for stored in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, Stored], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, stored in tensors.items():
        if shards[-1] and filled + stored.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += stored.num_bytes
    return shards


def refuse_other_tensors(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: object
) -> None:
    """Raises UserError, with names, if tensors are missing, unexpected, or have another shape."""
    for problem, names in (("lacks", expected.keys() - found.keys()), ("also holds", found.keys() - expected.keys())):
        if names:
            raise UserError(f"{where} {problem} {_listed(names)}: it is not the model that its config.json describes")
    for name in sorted(expected):
        if found[name] != expected[name]:
            raise UserError(f"{where}: tensor {name} has shape {found[name]}, config.json says {expected[name]}")


def _listed(names: Iterable[str], at_most: int = 4) -> str:
    shown = sorted(names)
    rest = f" and {len(shown) - at_most} more" if len(shown) > at_most else ""
    return ", ".join(shown[:at_most]) + rest
