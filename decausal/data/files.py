"""One file of data: how it is compressed, what format it has, and its bytes in bounded pieces."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal, cast

from decausal.errors import UserError
from decausal.files import parsed_json

Format = Literal["text", "binary", "jsonl", "json", "csv", "parquet", "arrow"]

SNIFFED_BYTES = 8192
BROKEN = b"\0"  # stands for the first bytes of what cannot be decompressed: no text begins like this
MAX_RECORD_BYTES = 1 << 26  # 64 MiB: the most that one record may take up
COMPRESSIONS = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ\0", "zstd": b"\x28\xb5\x2f\xfd"}
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
ARROW_STREAM = b"\xff\xff\xff\xff"
ARRAY_OF_OBJECTS = re.compile(rb"\s*\[\s*\{")


@dataclass(frozen=True)
class File:
    """One file. `is_named`: the user named it or a glob that matches it, rather than its directory."""

    path: Path
    is_named: bool

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def compression(self) -> str | None:
        """The file's compression, by its first bytes."""
        with reading(self), self.path.open("rb") as file:
            start = file.read(8)
        return next((name for name, magic in COMPRESSIONS.items() if start.startswith(magic)), None)

    @property
    def suffix(self) -> str:
        """The suffix in lower case, without that of the compression."""
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
            suffixes.pop()
        return suffixes[-1] if suffixes else ""

    @cached_property
    def format(self) -> Format:
        """The file's format: by its first bytes if they decide it, else by its suffix."""
        head = self.head
        if head.startswith(b"PAR1") or self.suffix == ".parquet":
            return "parquet"
        if head.startswith((b"ARROW1", ARROW_STREAM)) or self.suffix == ".arrow":
            return "arrow"
        if b"\0" in head:
            return "binary"
        found = FORMATS.get(self.suffix, "text")
        if found in ("json", "jsonl"):
            return self._kind_of_json(head, found)
        if self.is_named and self.suffix in ("", ".txt") and head.lstrip().startswith(b"{"):
            return "jsonl" if self._begins_with_objects() else "text"
        return found

    def _kind_of_json(self, head: bytes, by_suffix: Format) -> Format:
        """Distinguishes an array from JSON Lines. In a directory, a .json file without records is a document."""
        if ARRAY_OF_OBJECTS.match(head):
            return "json"
        if by_suffix == "jsonl" or self._begins_with_objects():
            return "jsonl"
        return "json" if self.is_named else "text"

    def _begins_with_objects(self) -> bool:
        """Returns whether the first line is a whole object and another one begins after it."""
        lines = (line.strip() for line in self.lines(MAX_RECORD_BYTES))
        some = islice((line for line in lines if line), 2)
        try:
            record = parsed_json(next(some, b""))
            second = next(some, b"")
        except (ValueError, UserError):
            return False
        return isinstance(record, dict) and second.startswith(b"{")

    @cached_property
    def head(self) -> bytes:
        """The first (decompressed) bytes. In a directory, a zero byte if they cannot be read, so that the file is no
        text."""
        try:
            with self.open() as file:
                return file.read(SNIFFED_BYTES)
        except UserError:
            if self.is_named:
                raise
            return BROKEN

    @contextmanager
    def open(self) -> Iterator[io.BufferedIOBase]:
        """Opens the file's (decompressed) bytes.

        Raises:
            UserError: It cannot be read or decompressed, now or later.
        """
        with reading(self), self._opened() as opened:
            yield opened

    def _opened(self) -> io.BufferedIOBase:
        if self.compression == "zstd":
            import pyarrow  # imported here, so that a wrong path is reported before

            return io.BufferedReader(pyarrow.input_stream(str(self.path), compression="zstd"))
        openers = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
        return cast(io.BufferedIOBase, openers.get(self.compression or "", open)(self.path, "rb"))

    def lines(self, limit: int) -> Iterator[bytes]:
        """Yields lines, in pieces if they are longer than `limit` bytes."""
        with self.open() as opened:
            while line := opened.readline(limit):
                yield line

    def fingerprint(self) -> str:
        """Returns a string that changes when the file does."""
        status = self.path.stat()
        return f"{self.path.absolute()} {status.st_size} {status.st_mtime_ns} {self.is_named}"


@contextmanager
def reading(file: File) -> Iterator[None]:
    """Turns errors of reading a file into one line."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{file} is not a whole {file.compression} file ({error})") from None
    except OSError as error:
        if error.strerror is None:  # how bz2 and pyarrow report bad content
            raise UserError(f"{file} is not a whole {file.compression} file ({error})") from None
        raise UserError(f"cannot read {file}: {error.strerror}") from None
