"""What DATA names: files, directories, globs, data sets of the Hugging Face hub, the embedded corpus, tasks."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

from decausal.data.corpus import Split, stdlib_documents
from decausal.data.directories import directory_sources, documents_below, refuse_unreadable, saved_sources
from decausal.data.files import File
from decausal.data.reading import Account
from decausal.data.tables import HubDataset, SavedDataset
from decausal.data.tasks.example import Example
from decausal.data.tasks.stream import examples, named
from decausal.errors import UserError, nearest
from decausal.files import DATA_SUFFIX

Data = str | Path | Sequence[str | Path]

ACCEPTED = "a file, a directory, a glob, a hub data set such as owner/name, stdlib, or tasks"
STDLIB: dict[str, Split] = {"stdlib": "train", "stdlib-heldout": "heldout"}
TASK_DATA: dict[str, Split] = {"tasks": "train", "tasks-heldout": "heldout"}
NUM_EXAMPLES: dict[Split, int] = {"train": 100_000, "heldout": 1_000}
TASK_NAME = re.compile(r"(?P<data>tasks|tasks-heldout)(:(?P<names>[^:@\d][^:@]*))?(:(?P<count>\d+))?(@(?P<seed>\d+))?")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
FINGERPRINTED_EXAMPLES = 1000


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
    """Examples of tasks with exact answers, drawn from a seed. Without `names`, of all tasks."""

    split: Split
    names: tuple[str, ...]
    count: int
    seed: int

    def __str__(self) -> str:
        data = next(name for name, split in TASK_DATA.items() if split == self.split)
        return ":".join([data, *(["+".join(self.names)] if self.names else []), f"{self.count}@{self.seed}"])

    def examples(self) -> Iterator[Example]:
        """Returns the examples, the tasks in turn."""
        return islice(examples(self.names, self.split, self.seed), self.count)

    def fingerprint(self) -> str:
        """Returns a hash of the first examples, so that it changes when a task does."""
        digest = sha256()
        for example in islice(self.examples(), FINGERPRINTED_EXAMPLES):
            digest.update(f"{example.prompt}{example.completion}\n".encode())
        return f"{self} {digest.hexdigest()}"


Source = File | HubDataset | SavedDataset | Stdlib | Tasks


def find_sources(data: Data, split: str = "train", account: Account | None = None) -> list[Source]:
    """Returns what `data` names, files of a directory or glob in sorted order.

    Args:
        data: A path, a glob, a hub data set ("name" or "name:config"), "stdlib", "stdlib-heldout", examples of tasks
            ("tasks", "tasks-heldout", "tasks:sorting+lookup:5000@7"), several of these with commas, or a list of them.
        split: Which split of a data set: on the hub, written by `save_to_disk`, or a directory whose card or file names
            define splits.
        account: Takes the names of files that are left out, and why.

    Raises:
        UserError: A path is missing, there is no such task or split, or a glob or a directory holds no file that can be
            read.
    """
    account = Account() if account is None else account
    names = names_of(data)
    if split != "train" and not have_splits(names):
        raise UserError(
            f"{', '.join(names)}: only directories and hub data sets have splits, so --dataset_split {split} names "
            "none; leave it out (--eval_split for --eval_data)"
        )
    return [source for name in names for source in _find(name, split, account)]


def have_splits(data: Data) -> bool:
    """Returns whether any of the data may have splits: files, the standard library and tasks have none."""
    return not all(
        name in STDLIB or re.split("[:@]", name)[0] in TASK_DATA or Path(name).expanduser().is_file()
        for name in names_of(data)
    )


def refuse_missing(data: Data) -> None:
    """Refuses names that stand for no data, before anything is imported to read it.

    Splits in directories and names on the hub are left to `find_sources`. But the hub is asked about what may be a
    mistyped path.

    Raises:
        UserError: As `find_sources`.
    """
    for name in names_of(data):
        if (directory := _directory(name)) is not None:
            refuse_unreadable(directory[0])
            continue
        for source in _find(name, "train", Account()):
            if isinstance(source, HubDataset) and _may_be_mistyped(source):
                source.refuse_unknown()


def _may_be_mistyped(source: HubDataset) -> bool:
    return ("/" in source.name and Path(source.name).parent.is_dir()) or bool(nearest(source.name, source.siblings))


def names_of(data: Data) -> list[str]:
    """Returns the single names that data consist of. Raises UserError if there are none."""
    given = [data] if isinstance(data, str | Path) else list(data)
    names = [part for name in given for part in _parts(str(name))]
    if not names:
        raise UserError(f"no data given; name {ACCEPTED}")
    return names


def _parts(name: str) -> list[str]:
    """Splits names at commas, but not inside the name of a file that exists."""
    pieces, parts = name.split(","), list[str]()
    while pieces:
        joined = (",".join(pieces[:count]).strip() for count in range(len(pieces), 1, -1))
        part = next((longest for longest in joined if Path(longest).expanduser().exists()), pieces[0].strip())
        del pieces[: part.count(",") + 1]
        parts += [part] if part else []
    return parts


def _find(name: str, split: str, account: Account) -> list[Source]:
    if name in STDLIB:
        return [Stdlib(STDLIB[name])]
    if re.split("[:@]", name)[0] in TASK_DATA:
        return [task_source(name)]
    if (directory := _directory(name)) is not None:
        return list(directory_sources(*directory, split, account))
    path = Path(name).expanduser()
    if path.exists():
        return [_named_file(path)]
    if glob.has_magic(name):
        return _matches(str(path), split, account)
    if not HUB_ID.fullmatch(name) or DATA_SUFFIX.search(name) or name.startswith("."):
        hint = nearest(path.name, _siblings(path))
        raise UserError(f"no such file or directory: {name}{hint or f'; DATA is {ACCEPTED}'}")
    hub_name, _, config = name.partition(":")
    return [HubDataset(hub_name, config or None, split, tuple(_siblings(hub_name)))]


def _directory(name: str) -> tuple[Path, str | None] | None:
    """Returns the directory that a name stands for and the configuration after its colon; None for anything else."""
    if name in STDLIB or re.split("[:@]", name)[0] in TASK_DATA:
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        return path, None
    directory, _, config = name.rpartition(":")
    if directory and Path(directory).expanduser().is_dir() and not path.exists():
        return Path(directory).expanduser(), config
    return None


def _named_file(path: Path) -> File:
    if not path.is_file():  # a device never ends, and a pipe can be read only once
        raise UserError(f"{path} is not a regular file; write its content to a file, and name that")
    return File(path, is_named=True)


def task_source(name: str) -> Tasks:
    """Reads "tasks" or "tasks-heldout", each optionally followed by ":NAME+NAME", ":COUNT" and "@SEED".

    Raises:
        UserError: It has another form, or names an unknown task.
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


def _matches(pattern: str, split: str, account: Account) -> list[Source]:
    found: dict[Path, Source] = {}
    for match in sorted(glob.glob(pattern, recursive=True)):
        path = Path(match)
        sources = _in_match(path, split, account) if path.is_dir() else [File(path, is_named=True)]
        for source in sources:
            if "__pycache__" not in source.path.parts and path.exists():
                found.setdefault(source.path, source)
    if not found:
        raise UserError(f"no file matches '{pattern}'; check the pattern, ** stands for any depth of directories")
    return list(found.values())


def _in_match(directory: Path, split: str, account: Account) -> Iterable[File | SavedDataset]:
    return saved_sources(directory, split) or documents_below(directory, account)


def _siblings(path: str | Path) -> list[str]:
    parent = Path(path).parent
    return [*(os.listdir(parent) if parent.is_dir() else ()), *STDLIB, *TASK_DATA]
