"""Packed rows in a file: records of a fixed size, so that reading a row is one contiguous read without decoding."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from decausal.data.packing import Row

CHUNK_ROWS = 256


class RowFile:
    """A memory-mapped file of rows: row i holds clean_ids, document_ids (-1 is padding) and is_maskable, each [T]."""

    def __init__(self, path: Path, sequence_length: int, num_rows: int) -> None:
        self.records = np.memmap(path, dtype=record_type(sequence_length), mode="r", shape=(num_rows,))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        record = self.records[index]
        return {
            "clean_ids": torch.from_numpy(record["clean_ids"].astype(np.int64)),
            "document_ids": torch.from_numpy(record["document_ids"].astype(np.int64)),
            "is_maskable": torch.from_numpy(record["is_maskable"].copy()),
        }


def record_type(sequence_length: int) -> np.dtype:
    """Returns the type of a record."""
    return np.dtype(
        [
            ("clean_ids", "<i4", (sequence_length,)),
            ("document_ids", "<i4", (sequence_length,)),
            ("is_maskable", "?", (sequence_length,)),
        ]
    )


def records_of(rows: Sequence[Row], sequence_length: int) -> np.ndarray:
    """Returns rows as records."""
    records = np.empty(len(rows), dtype=record_type(sequence_length))
    for name in records.dtype.names or ():
        records[name] = np.array([getattr(row, name) for row in rows]).reshape(records[name].shape)
    return records


def rows_of(records: np.ndarray) -> list[Row]:
    """Returns copies of the rows that records hold."""
    return [Row(*(record[name].copy() for name in records.dtype.names or ())) for record in records]


def write_rows(path: Path, rows: Iterable[Row], sequence_length: int) -> None:
    """Writes rows to the disk, some at a time."""
    left: Iterator[Row] = iter(rows)
    with path.open("wb") as file:
        while chunk := list(islice(left, CHUNK_ROWS)):
            file.write(records_of(chunk, sequence_length).tobytes())
        file.flush()
        os.fsync(file.fileno())


def is_whole(path: Path, sequence_length: int, num_rows: int) -> bool:
    """Returns whether a file holds so many rows."""
    try:
        return path.stat().st_size == num_rows * record_type(sequence_length).itemsize
    except OSError:
        return False
