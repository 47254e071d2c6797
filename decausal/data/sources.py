"""What DATA names: files, directories, globs, data sets of the Hugging Face hub, the embedded corpus, tasks."""

from __future__ import annotations

import glob
import gzip
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from io import BufferedReader
from itertools import islice
from pathlib import Path

import datasets

from decausal.data.corpus import Split, stdlib_documents
from decausal.data.tasks.example import Example
from decausal.data.tasks.stream import examples, named
from decausal.errors import UserError, nearest
from decausal.hub import LOG_IN, is_offline, refuse_unknown_dataset

Data = str | Path | Sequence[str | Path]

ACCEPTED = "a file, a directory, a glob, a hub data set such as owner/name, stdlib, or tasks"
STDLIB: dict[str, Split] = {"stdlib": "train", "stdlib-heldout": "heldout"}
TASK_DATA: dict[str, Split] = {"tasks": "train", "tasks-heldout": "heldout"}
NUM_EXAMPLES: dict[Split, int] = {"train": 100_000, "heldout": 1_000}
TASK_NAME = re.compile(r"(?P<data>tasks|tasks-heldout)(:(?P<names>[^:@\d][^:@]*))?(:(?P<count>\d+))?(@(?P<seed>\d+))?")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
FILE_SUFFIX = re.compile(r"\.(txt|md|py|jsonl?|parquet|gz)$")
SNIFFED_BYTES = 8192
FINGERPRINTED_EXAMPLES = 1000


@dataclass(frozen=True)
class File:
    """One file. `is_named`: its user named it, alone or by a glob, rather than a directory that holds it."""

    path: Path
    is_named: bool

    def __str__(self) -> str:
        return str(self.path)

    @property
    def kind(self) -> str:
        """The suffix that says how to read it, without a final `.gz`: ".jsonl", ".parquet", ..."""
        suffixes = self.path.suffixes
        return suffixes[-2].lower() if len(suffixes) > 1 and suffixes[-1] == ".gz" else self.path.suffix.lower()

    def open(self) -> BufferedReader | gzip.GzipFile:
        """Opens the file's (decompressed) bytes."""
        try:
            return gzip.open(self.path) if self.path.suffix == ".gz" else self.path.open("rb")
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None

    def head(self) -> bytes:
        """Returns the first (decompressed) bytes."""
        try:
            with self.open() as file:
                return file.read(SNIFFED_BYTES)
        except (gzip.BadGzipFile, EOFError, zlib.error):
            return b"\0"

    def fingerprint(self) -> str:
        """Returns a string that changes when the file does."""
        status = self.path.stat()
        return f"{self.path.absolute()} {status.st_size} {status.st_mtime_ns} {self.is_named}"


@dataclass(frozen=True)
class HubDataset:
    """One split of a data set on the hub, downloaded to (and afterwards read from) the hub's own local cache."""

    name: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"{self.name}:{self.config}[{self.split}]" if self.config else f"{self.name}[{self.split}]"

    @cached_property
    def table(self) -> datasets.Dataset:
        """The memory-mapped table of records."""
        if not _is_offline():
            self._refuse_unknown()
        with _quiet_unless_watched():
            try:
                return datasets.load_dataset(self.name, self.config, split=self.split)
            except Exception as error:  # the hub, the network and each builder fail in types of their own
                reason = " ".join(str(error).split()).partition(" Example of usage")[0][:300] or type(error).__name__
                raise UserError(f"cannot load data set '{self}' from the hub ({reason}){self._hint(reason)}") from None

    def _refuse_unknown(self) -> None:
        try:
            refuse_unknown_dataset(self.name)
        except UserError as error:
            raise UserError(f"{error}{nearest(self.name, _siblings(self.name))}") from None

    def _hint(self, reason: str) -> str:
        if _is_offline():
            return (
                "; HF_HUB_OFFLINE is set, so it must have been downloaded before; no file or directory has that name "
                f"either{nearest(self.name, _siblings(self.name))}"
            )
        if "gated" in reason:
            return f"; {LOG_IN}"
        return f"; write {self.name}:CONFIG" if "Config name is missing" in reason else ""

    def fingerprint(self) -> str:
        """Returns a string that changes when the data set does."""
        return f"{self} {self.table._fingerprint}"


@dataclass(frozen=True)
class Stdlib:
    """One part of the standard library of the running Python."""

    split: Split

    def __str__(self) -> str:
        return "stdlib" if self.split == "train" else "stdlib-heldout"

    def fingerprint(self) -> str:
        """Returns a hash of every file's path and text."""
        digest = sha256()
        for path, text in stdlib_documents(self.split):
            digest.update(f"{path} {len(text)} {text}".encode())
        return f"{self} {digest.hexdigest()}"


@dataclass(frozen=True)
class Tasks:
    """Examples of tasks with exact answers, drawn from a seed. `names` empty: of all tasks."""

    split: Split
    names: tuple[str, ...]
    count: int
    seed: int

    def __str__(self) -> str:
        data = next(name for name, split in TASK_DATA.items() if split == self.split)
        return ":".join([data, *(["+".join(self.names)] if self.names else []), f"{self.count}@{self.seed}"])

    def examples(self) -> Iterator[Example]:
        """Returns the examples, each task in turn."""
        return islice(examples(self.names, self.split, self.seed), self.count)

    def fingerprint(self) -> str:
        """Returns a hash of the first examples, so that it changes when a task does."""
        digest = sha256()
        for example in islice(self.examples(), FINGERPRINTED_EXAMPLES):
            digest.update(f"{example.prompt}{example.completion}\n".encode())
        return f"{self} {digest.hexdigest()}"


Source = File | HubDataset | Stdlib | Tasks


def find_sources(data: Data, split: str = "train") -> list[Source]:
    """Returns what `data` names, files of a directory or glob in sorted order.

    Args:
        data: a path, a glob, a hub data set ("name" or "name:config"), "stdlib", "stdlib-heldout", examples of tasks
            ("tasks", "tasks-heldout", "tasks:sorting+lookup:5000@7"), or a list of these.
        split: which split of a hub data set.

    Raises:
        UserError: a path is missing, there is no such task, or a glob or a directory holds no file that can be read.
    """
    names = [data] if isinstance(data, str | Path) else list(data)
    if not names:
        raise UserError(f"no data given; name {ACCEPTED}")
    return [source for name in names for source in _find(str(name), split)]


def _find(name: str, split: str) -> list[Source]:
    if name in STDLIB:
        return [Stdlib(STDLIB[name])]
    if re.split("[:@]", name)[0] in TASK_DATA:
        return [task_source(name)]
    path = Path(name).expanduser()
    if path.is_dir():
        files: list[Source] = list(_files_below(path))
        if not files:
            raise UserError(f"directory {name} holds no text file (hidden and binary files are not read)")
        return files
    if path.exists():
        return [File(path, is_named=True)]
    if glob.has_magic(name):
        return _matches(str(path))
    if not HUB_ID.fullmatch(name) or FILE_SUFFIX.search(name) or name.startswith("."):
        hint = nearest(path.name, _siblings(path))
        raise UserError(f"no such file or directory: {name}{hint or f'; DATA is {ACCEPTED}'}")
    hub_name, _, config = name.partition(":")
    return [HubDataset(hub_name, config or None, split)]


def task_source(name: str) -> Tasks:
    """Reads "tasks" or "tasks-heldout", each with ":NAME+NAME", ":COUNT" and "@SEED" behind it or without.

    Raises:
        UserError: it is written otherwise, or names a task that there is not.
    """
    parts = TASK_NAME.fullmatch(name)
    if parts is None or parts["count"] == "0":
        raise UserError(
            f"'{name}' is not accepted: write tasks or tasks-heldout, then :NAME+NAME, :COUNT (at least 1) and @SEED "
            "where you want them, such as tasks:addition+sorting:20000@7"
        )
    names = tuple(parts["names"].split("+")) if parts["names"] else ()
    named(names)
    split = TASK_DATA[parts["data"]]
    return Tasks(split, names, int(parts["count"] or NUM_EXAMPLES[split]), int(parts["seed"] or 0))


def _matches(pattern: str) -> list[Source]:
    found: dict[Path, File] = {}
    for match in sorted(glob.glob(pattern, recursive=True)):
        path = Path(match)
        files = _files_below(path) if path.is_dir() else [File(path, is_named=True)]
        for file in files:
            if "__pycache__" not in file.path.parts:
                found.setdefault(file.path, file)
    if not found:
        raise UserError(f"no file matches '{pattern}'; check the pattern, ** stands for any depth of directories")
    return list(found.values())


def _files_below(root: Path) -> Iterator[File]:
    """Yields the text files under a directory, sorted; hidden ones, `__pycache__` and binary ones left out."""
    for path in sorted(_visible_paths(root)):
        file = File(path, is_named=False)
        if file.kind == ".parquet" or b"\0" not in file.head():
            yield file


def _visible_paths(root: Path) -> Iterator[Path]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".") and name != "__pycache__"]
        paths = (Path(directory, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())  # not sockets, pipes or dangling links


def _siblings(path: str | Path) -> list[str]:
    parent = Path(path).parent
    return [*(os.listdir(parent) if parent.is_dir() else ()), *STDLIB, *TASK_DATA]


def _is_offline() -> bool:
    return is_offline() or datasets.config.HF_HUB_OFFLINE  # which HF_DATASETS_OFFLINE sets alone, too


@contextmanager
def _quiet_unless_watched() -> Iterator[None]:
    """Hides the progress bars of `datasets` where no terminal shows them."""
    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
