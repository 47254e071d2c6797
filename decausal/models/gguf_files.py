"""Names and headers of GGUF files, which hold model, configuration and tokenizer in one file.

Reading the header here takes a fraction of a second; the gguf package takes several for a vocabulary.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from decausal.errors import UserError

SUFFIX = ".gguf"
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class Header(NamedTuple):
    """What a GGUF file's header says.

    Attributes:
        architecture: The model's architecture as llama.cpp calls it.
        num_bytes: Bytes that the file must have.
    """

    architecture: str
    num_bytes: int


def is_gguf(name: str) -> bool:
    """Returns whether a model's name means a GGUF file, here or on the hub (owner/name/file.gguf)."""
    return name.lower().endswith(SUFFIX)


def repository_and_file(name: str) -> tuple[str, str] | None:
    """Splits owner/name/file.gguf; None for other names."""
    parts = name.split("/")
    if len(parts) < 3 or name.startswith((".", "/", "~")) or not all(parts):
        return None
    return "/".join(parts[:2]), "/".join(parts[2:])


def check_gguf(path: Path) -> Header:
    """Reads the header.

    Raises:
        UserError: It is not a GGUF file, it is cut off, or the gguf package is missing.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise UserError(f"reading {path} needs the gguf package: pip install 'decausal[gguf]'") from error
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                raise UserError(f"{path} is not a GGUF file: it does not begin with GGUF; fetch it again")
            header = _read(_Cursor(data), {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()})
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError, KeyError) as error:
        raise UserError(f"{path} is cut off or broken: its header ends too soon; fetch it again") from error
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise UserError(f"{path} cannot be read: {error}; fetch it again") from error
    size = path.stat().st_size
    if size < header.num_bytes:
        raise UserError(f"{path} is cut off: it has {size} bytes, and needs {header.num_bytes}; fetch it again")
    return header


class _Cursor:
    """Reads values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 4

    def number(self, format: str) -> Any:
        (value,) = struct.unpack_from(f"<{format}", self.data, self.place)
        self.place += struct.calcsize(f"<{format}")
        return value

    def text(self) -> str:
        return self.skip(self.number("Q")).decode("utf-8")

    def skip(self, length: int) -> bytes:
        start, self.place = self.place, self.place + length
        if self.place > len(self.data):
            raise IndexError(self.place)
        return self.data[start : self.place] if length < 4096 else b""

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_FORMATS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner in _FORMATS:
            self.skip(struct.calcsize(_FORMATS[inner]) * count)
        else:
            for _ in range(count):
                self.value(inner)
        return None


def _read(cursor: _Cursor, sizes: dict[int, tuple[int, int]]) -> Header:
    _, num_tensors, num_values = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    values = {cursor.text(): cursor.value(cursor.number("I")) for _ in range(num_values)}
    end = 0
    for _ in range(num_tensors):
        cursor.text()
        shape = [cursor.number("Q") for _ in range(cursor.number("I"))]
        per_block, num_bytes = sizes[cursor.number("I")]
        end = max(end, cursor.number("Q") + math.prod(shape) // per_block * num_bytes)
    alignment = values.get("general.alignment") or 32
    start = -(-cursor.place // alignment) * alignment
    return Header(str(values.get("general.architecture", "unknown")), start + end)
