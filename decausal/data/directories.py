"""Finds what a directory holds: a saved data set, a copy of a hub data set with splits, or documents."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from decausal.data.files import BROKEN, File
from decausal.data.reading import Account
from decausal.data.tables import SavedDataset
from decausal.errors import UserError, nearest
from decausal.files import JOB_SETTINGS, parsed_json, parsed_yaml

if TYPE_CHECKING:
    from datasets.utils.metadata import MetadataConfigs

Splits = dict[str, set[Path]]

SAVED_SPLITS = "dataset_dict.json"
SAVED_STATE = "state.json"
DATASET_INFO = "dataset_info.json"
CARD = "README.md"
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
DOCUMENTATION = re.compile(
    r"(readme|licen[sc]e|copying|notice|citation|changelog|dataset_infos?)(\.\w+)?", re.IGNORECASE
)
CACHED_TABLE = re.compile(r"cache-.*\.arrow")
CACHES = ("__pycache__",)


def directory_sources(root: Path, config: str | None, split: str, account: Account) -> list[File | SavedDataset]:
    """Returns what to read in a directory, in sorted order. The rest goes into `account`.

    Args:
        root: The directory.
        config: Which configuration on its card to use; None: the default one.
        split: Which split, where the directory has splits.
        account: Takes what is left out, and why.

    Raises:
        UserError: There is no such split or configuration, or nothing to read.
    """
    if saved := saved_sources(root, split):
        return list[File | SavedDataset](saved)
    readable = list(documents_below(root, account))
    _refuse_none(root, readable)
    configs = _card_configs(root)
    tables = [file for file in readable if file.format != "text"]
    if configs or config is not None:
        return _of_split(readable, _splits_on_card(root, configs, config), split, root, account)
    splits = _splits_by_name(root, _telling(readable, tables))
    if splits:
        return _of_split(readable, splits, split, root, account)
    _refuse_split(root, split)
    return _without_documentation(readable, tables, root, account)


def saved_sources(root: Path, split: str) -> list[SavedDataset]:
    """Returns the data set that `save_to_disk` made of this directory, or none.

    Raises:
        UserError: It has no such split.
    """
    if (root / SAVED_SPLITS).is_file():
        return [SavedDataset(root / _one_of(_saved_splits(root), split, root))]
    if not _is_saved(root):
        return []
    _refuse_split(root, split)
    return [SavedDataset(root)]


def _is_saved(root: Path) -> bool:
    return (root / SAVED_STATE).is_file() and (root / DATASET_INFO).is_file()


def refuse_unreadable(root: Path) -> None:
    """Raises UserError for a directory that holds nothing to read. Does not check its splits."""
    if not any((root / name).is_file() for name in (SAVED_SPLITS, SAVED_STATE)):
        _refuse_none(root, islice(documents_below(root, Account()), 1))


def _refuse_none(root: Path, readable: Iterable[File]) -> None:
    if not any(True for _ in readable):
        raise UserError(f"directory {root} holds no text file (hidden and binary files are not read)")


def documents_below(root: Path, account: Account) -> Iterator[File]:
    """Yields the readable files under a directory, sorted, without hidden ones and `__pycache__`."""
    for path in sorted(_visible_paths(root)):
        file = File(path, is_named=False)
        if _is_readable(file, root, account):
            yield file


def _saved_splits(root: Path) -> list[str]:
    try:
        return list(parsed_json((root / SAVED_SPLITS).read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{root / SAVED_SPLITS} does not list the splits; save the data set again") from None


def _one_of(splits: list[str], split: str, root: Path) -> str:
    if split not in splits:
        choice = f"--dataset_split {' or '.join(splits)} (--eval_split for --eval_data)"
        raise UserError(f"{root} has no split '{split}'; give {choice}")
    return split


def _refuse_split(root: Path, split: str) -> None:
    if split != "train":
        raise UserError(
            f"{root} has no splits, by its files' names or a card, so --dataset_split {split} names none; leave it "
            "out (for --eval_data: --eval_split train)"
        )


def _visible_paths(root: Path) -> Iterator[Path]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".") and name not in CACHES]
        paths = (Path(directory, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())  # not sockets, pipes or dangling links


def _is_readable(file: File, root: Path, account: Account) -> bool:
    if file.path.name.endswith(JOB_SETTINGS) and Path(str(file.path).removesuffix(JOB_SETTINGS)).is_file():
        account.leave_out(_name(file, root), "a job's settings")
        return False
    if _describes_saved(file.path):
        account.leave_out(_name(file, root), "about a saved data set")
        return False
    if file.format != "binary":
        return True
    is_broken = file.compression is not None and file.head == BROKEN
    account.leave_out(_name(file, root), "cannot be decompressed" if is_broken else "not text")
    return False


def _describes_saved(path: Path) -> bool:
    """Returns whether a file stands beside the tables of a saved data set: its descriptions, and `map`'s caches."""
    if path.name == SAVED_SPLITS:
        return True
    is_beside = path.name in (SAVED_STATE, DATASET_INFO) or CACHED_TABLE.fullmatch(path.name) is not None
    return is_beside and _is_saved(path.parent)


def _name(file: File, root: Path) -> str:
    return str(file.path.relative_to(root))


# Splits


def _card_configs(root: Path) -> MetadataConfigs | dict[str, Any]:
    """Returns the configurations that the card names, by the rules of `datasets`; empty without a card."""
    try:
        card = FRONT_MATTER.match((root / CARD).read_text(encoding="utf-8"))
        facts = parsed_yaml(card.group(1)) if card else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    if not isinstance(facts, dict):
        return {}
    from datasets.utils.metadata import MetadataConfigs  # imported here, so that a wrong path is reported before

    try:
        return MetadataConfigs.from_dataset_card_data(facts)
    except ValueError as error:
        raise UserError(f"{root / CARD}: its 'configs' cannot be read ({' '.join(str(error).split())[:200]})") from None


def _splits_on_card(root: Path, configs: MetadataConfigs | dict[str, Any], config: str | None) -> Splits:
    from datasets.data_files import sanitize_patterns

    if config is not None and config not in configs:
        named = f"there is {', '.join(configs)}" if configs else "its card names none"
        raise UserError(f"{root} has no configuration '{config}'; {named}{nearest(config, configs)}")
    try:
        chosen = config or configs.get_default_config_name()
    except ValueError as error:
        raise UserError(f"{root / CARD}: {error}") from None
    if chosen is None:
        raise UserError(f"{root} has several configurations; write {root}:NAME, of {', '.join(configs)}")
    given = configs[chosen].get("data_files")
    if given is None:
        return _resolved(root / configs[chosen].get("data_dir", ""))
    return _files_by_split(root, sanitize_patterns(given))


def _files_by_split(root: Path, patterns: Mapping[Any, list[str]]) -> Splits:
    from datasets.data_files import DataFilesDict, EmptyDatasetError

    try:
        found = DataFilesDict.from_patterns(patterns, base_path=str(root.absolute()))
    except (FileNotFoundError, EmptyDatasetError) as error:
        raise UserError(f"{root / CARD} names files that are not there ({' '.join(str(error).split())})") from None
    return {str(split): {Path(path) for path in paths} for split, paths in found.items()}


def _resolved(root: Path) -> Splits:
    from datasets.data_files import EmptyDatasetError, get_data_patterns

    try:
        return _files_by_split(root, get_data_patterns(str(root.absolute())))
    except (FileNotFoundError, EmptyDatasetError):
        return {}


def _splits_by_name(root: Path, telling: list[File]) -> Splits:
    """Returns the files of each split by `datasets`' rules on names; empty if no name says its split."""
    if not telling:
        return {}
    splits = _resolved(root)
    paths = {file.path.absolute() for file in telling}
    splits = {split: found & paths for split, found in splits.items() if found & paths}
    if list(splits) == ["train"] and splits["train"] == paths and not any(_says_train(path, root) for path in paths):
        return {}  # no name says its split: `datasets` calls everything "train"
    unnamed = paths.difference(*splits.values())
    if splits and "train" not in splits and unnamed:
        splits["train"] = unnamed
    return splits


def _says_train(path: Path, root: Path) -> bool:
    return "train" in str(path.relative_to(root.absolute())).lower()


def _telling(files: list[File], tables: list[File]) -> list[File]:
    """Returns the files whose names may say their split. Source code has no splits, though it has a test directory."""
    documents = [file for file in files if file not in tables and not DOCUMENTATION.fullmatch(file.path.name)]
    if tables:
        return tables if len(documents) <= len(tables) else []
    return documents if all(file.suffix == ".txt" for file in documents) else []


def _of_split(files: list[File], splits: Splits, split: str, root: Path, account: Account) -> list[File]:
    _one_of(list(splits), split, root)
    kept: list[File] = []
    for file in files:
        path = file.path.absolute()
        of = [name for name, paths in splits.items() if path in paths]
        if split in of:
            kept.append(file)
        elif DOCUMENTATION.fullmatch(file.path.name):
            account.leave_out(_name(file, root), "documentation")
        elif of:
            account.leave_out(_name(file, root), f"split {of[0]}")
        else:
            account.leave_out(_name(file, root), "in no split")
    if not kept:
        raise UserError(f"{root}: split '{split}' has no file that can be read")
    return kept


def _without_documentation(files: list[File], tables: list[File], root: Path, account: Account) -> list[File]:
    """Leaves out the documentation of a data set that otherwise holds only tables."""
    described = [file for file in files if DOCUMENTATION.fullmatch(file.path.name) and file not in tables]
    if not tables or len(described) + len(tables) < len(files):
        return files
    for file in described:
        account.leave_out(_name(file, root), "documentation")
    return tables
