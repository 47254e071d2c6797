"""The unchanged files of a source model: copied byte for byte, and identified by their hashes.

Imports nothing heavy.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path

from decausal.errors import UserError
from decausal.models.directories import read_table, weight_files
from decausal.privacy import secret_in

_SETTINGS = ("config.json", "generation_config.json")
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)
_TERMS = ("LICENSE*", "NOTICE*")
_PIECE = 1 << 22


def base_files(directory: Path) -> list[Path]:
    """Returns the files of a source model: configuration, weights, tokenizer, chat template and licence."""
    weights = list(weight_files(directory))
    indices = [directory / f"{name}.index.json" for name in sorted(_single(weights))]
    others = [path for pattern in (*_SETTINGS, *_TOKENIZER, *_TERMS) for path in sorted(directory.glob(pattern))]
    return list(dict.fromkeys(path for path in (*weights, *indices, *others) if path.is_file()))


def _single(weights: list[Path]) -> set[str]:
    """Returns the name of a shard's single file, after which its index is named."""
    return {f"{path.name.partition('-')[0]}{path.suffix}" for path in weights}


def copy_base(directory: Path, target: Path) -> None:
    """Copies a source model's files into `target`, byte for byte. Links, see `refuse_links_out`, become files."""
    for path in base_files(directory):
        shutil.copyfile(path, target / path.name)


def refuse_links_out(directory: Path, files: Iterable[Path] | None = None) -> None:
    """Raises UserError for a link to a file elsewhere, which would be handed on under the link's name.

    Weights may be links, since other files are refused when they are opened. The hub's cache consists of links to the
    blobs beside it.

    Args:
        directory: A model's.
        files: Those that are handed on; None: all.
    """
    inside = [directory.resolve()]
    if directory.resolve().parent.name == "snapshots":
        inside.append(directory.resolve().parent.parent / "blobs")
    for path in directory.rglob("*") if files is None else files:
        if not path.is_symlink() or path.suffix == ".safetensors":
            continue
        if not any(path.resolve().is_relative_to(root) for root in inside):
            raise UserError(
                f"{path} is a link to a file outside {directory}, which is not handed on: replace it by a copy, or "
                "remove it"
            )


def refuse_secrets(directory: Path) -> None:
    """Raises UserError for a secret in settings that came with the source and would be handed on with them."""
    for name in (*_SETTINGS, "tokenizer_config.json", "special_tokens_map.json"):
        path = directory / name
        if path.is_file() and (secret := secret_in(read_table(path))) is not None:
            raise UserError(f"{path} holds a secret, '{secret}', which is not handed on: remove it from the file")


def base_hashes(directory: Path) -> dict[str, str]:
    """Returns the SHA-256 of each of a source model's files by name, as the hub shows it."""
    return {path.name: _hash(path) for path in base_files(directory)}


def refuse_other_base(directory: Path, expected: Mapping[str, str], name: str) -> None:
    """Compares a base's files with those that a draft was trained on.

    Raises:
        UserError: A file is missing, or holds something else. The message names both hashes.
    """
    for file, saved in expected.items():
        path = directory / file
        if not path.is_file():
            raise UserError(f"{name} was trained on a base with {file}, which {directory} lacks; fetch it again")
        found = _hash(path)
        if found != saved:
            raise UserError(
                f"{path} is not the file that {name} was trained on: its SHA-256 is {found}, expected {saved}; give "
                "the base that it was converted from"
            )


def _hash(path: Path) -> str:
    found = sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()
