"""Text and prompts for the results, as files of records: WikiText by articles, instructions in two parts."""

from __future__ import annotations

import gzip
import json
import re
from itertools import pairwise
from pathlib import Path

from decausal.files import write_whole

HEADING = re.compile(r"^ = [^=].* = $", re.MULTILINE)
NUM_HELD_OUT = 255


def opened(data: Path, name: str) -> str:
    """Returns the text of a file, which may be packed."""
    packed = data / f"{name}.gz"
    if packed.exists():
        return gzip.decompress(packed.read_bytes()).decode()
    return (data / name).read_text(encoding="utf-8")


def articles(data: Path, name: str, output: Path) -> Path:
    """Writes the articles of a WikiText file, one record each: so a share of the data is a share of articles."""
    text = opened(data, name)
    places = [found.start() for found in HEADING.finditer(text)] + [len(text)]
    parts = [text[start:end].strip() for start, end in pairwise(places)]
    return records(output, [{"text": part} for part in parts if part])


def instructions(data: Path, train: Path, held_out: Path) -> tuple[Path, Path]:
    """Writes the conversations to train on, and the last ones, which are held out."""
    lines = [json.loads(line) for line in opened(data, "instructions.jsonl").split("\n") if line.strip()]
    return records(train, lines[:-NUM_HELD_OUT]), records(held_out, lines[-NUM_HELD_OUT:])


def records(path: Path, found: list[dict[str, object]]) -> Path:
    """Writes records, one a line, unless the file is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found))
    return path
