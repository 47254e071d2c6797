"""Reads the tokenizer of a public checkpoint without its code."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from decausal.errors import UserError, first_line
from decausal.files import parsed_json
from decausal.models.adapt import LOADING_ERRORS, forget_private

_SETTINGS = "tokenizer_config.json"
_READ = ("tokenizer.json", _SETTINGS, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
_READ += ("chat_template.jinja", "chat_template.json", "tokenizer.model")


def read_tokenizer(directory: Path, stock: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Reads a tokenizer from its files only. With code in config.json, transformers would ask whether to run it.

    If the tokenizer has its own code, its tokenizer.json is read. Forms of the Qwen family have copies of Qwen2's
    tokenizer, of which vocabulary and merges are read.

    Args:
        directory: The checkpoint.
        stock: Configuration of the stock model.

    Raises:
        UserError: There is no tokenizer, or its files are broken.
    """
    with tempfile.TemporaryDirectory() as bare:
        for name in _READ:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, Path(bare) / name)
        has_code = without_code(Path(bare) / _SETTINGS, "tokenizer_class")
        try:
            if not has_code:
                tokenizer = AutoTokenizer.from_pretrained(bare, config=stock, trust_remote_code=False)
            elif (Path(bare) / "tokenizer.json").is_file() or stock.model_type == "llama":
                tokenizer = PreTrainedTokenizerFast.from_pretrained(bare)
            else:
                tokenizer = Qwen2Tokenizer.from_pretrained(bare)
        except LOADING_ERRORS as error:
            raise UserError(f"cannot load the tokenizer of {directory}: {first_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"cannot load the tokenizer of {directory}: its vocabulary is missing (tokenizer.json)")
    forget_private(directory, tokenizer)
    return tokenizer


def without_code(settings: Path, *others: str) -> bool:
    """Removes the names of a source's code from a file of settings. Returns whether there were any.

    Args:
        settings: The file, which may be missing.
        others: Keys to remove together with them.
    """
    values = read_json(settings) if settings.is_file() else {}
    if "auto_map" not in values:
        return False
    kept = {name: value for name, value in values.items() if name not in ("auto_map", *others)}
    settings.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return True


def read_json(path: Path) -> dict[str, Any]:
    """Reads a table from a file.

    Raises:
        UserError: It does not exist, or holds something else.
    """
    try:
        values = parsed_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no table of settings")
    return values
