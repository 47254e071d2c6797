"""Finds what a model's directory holds and lacks, by file names, JSON and headers, before anything heavy is
imported."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from decausal.errors import UserError, first_line
from decausal.files import parsed_json
from decausal.models.facts import DRAFT, FACTS_FILE, MASK_ROW_FILE, read_facts

ADAPTER_FILE = "adapter_config.json"
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")
# Methods of quantization that transformers can undo on any machine, and the package that it needs for each.
DEQUANTIZED = {"fp8": None, "mxfp4": None, "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors"}
_LAST_BYTES = 4096  # of a table, white space after it included
_UNMERGEABLE = ("ADAPTION_PROMPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "CPT")
_METHODS = {"awq": "AWQ", "gptq": "GPTQ", "bitsandbytes": "bitsandbytes"}


class Adapter(NamedTuple):
    """What a PEFT adapter was trained on: a model's name, and its revision on the hub."""

    base: str
    revision: str | None


def adapter_of(directory: Path) -> Adapter | None:
    """Returns what the adapter in `directory` was trained on; None if it holds a whole model or no model.

    Raises:
        UserError: The adapter's file cannot be read, or is of a kind that cannot be merged.
    """
    path = directory / ADAPTER_FILE
    if not path.is_file() or (directory / "config.json").is_file():
        return None
    _refuse_draft(directory)
    settings = read_table(path)
    kind = settings.get("peft_type", "LORA")
    if kind in _UNMERGEABLE:
        raise UserError(f"{directory} is a PEFT adapter of type {kind}, which has no merged form; give a whole model")
    if (directory / FACTS_FILE).is_file():  # one of our runs wrote it: its recipe holds the name as it was given
        recipe = read_facts(directory).recipe
        if isinstance(recipe.get("model_name_or_path"), str):
            return Adapter(recipe["model_name_or_path"], recipe.get("revision"))
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path} names no base model; write its name there, as base_model_name_or_path")
    return Adapter(base, settings.get("revision"))


def _refuse_draft(directory: Path) -> None:
    """Refuses the adapter of a gated conversion by itself, wherever it lies."""
    whole = directory.resolve().parent
    is_inside = directory.resolve().name == DRAFT and (whole / FACTS_FILE).is_file() and read_facts(whole).is_gated
    is_copy = (directory / MASK_ROW_FILE).is_file() and not (directory / FACTS_FILE).is_file()  # no run's checkpoint
    if is_inside or is_copy:
        raise UserError(
            f"{directory} is the draft of a gated conversion: it acts at masks alone and is never merged; give "
            f"{whole if is_inside else 'the whole conversion, with its decausal.json'}"
        )


def refuse_adapter(name: str, directory: Path) -> None:
    """Raises UserError for a PEFT adapter, and says what to do. Checkpoints of our own runs have facts, and are
    models."""
    if (directory / FACTS_FILE).is_file():
        return
    adapter = adapter_of(directory)
    if adapter is not None:
        raise UserError(
            f"{name} is a PEFT adapter on {adapter.base} and not a whole model: decausal convert {name} "
            "--merge_adapter true merges it into its base; elsewhere give a model that it was merged into"
        )


def quantization(directory: Path) -> str | None:
    """Returns the quantization method that a model's config.json names, or None."""
    path = directory / "config.json"
    settings = read_table(path).get("quantization_config") if path.is_file() else None
    if not settings:
        return None
    if not isinstance(settings, dict):
        return "unknown"
    is_old = settings.get("load_in_8bit") or settings.get("load_in_4bit")  # of bitsandbytes, without its name
    return str(settings.get("quant_method", "bitsandbytes" if is_old else "unknown"))


def refuse_quantized(name: str, directory: Path) -> None:
    """Raises UserError for weights that transformers cannot turn back into plain numbers here."""
    method = quantization(directory)
    if method is None:
        return
    reason = f"the weights of {name} are quantized ({_METHODS.get(method, method)}), and training needs plain ones"
    if method not in DEQUANTIZED:
        raise UserError(f"{reason}: give the model from which they were made")
    package = DEQUANTIZED[method]
    if package is not None and find_spec(package) is None:
        raise UserError(
            f"{reason}: pip install 'decausal[quantized]' turns them back, or give what they were made from"
        )


def refuse_no_model(directory: Path) -> None:
    """Refuses a directory that is not a model's, or whose weights are quantized.

    Raises:
        UserError: One line that says what to do.
    """
    if adapter_of(directory) is not None:
        return
    if not (directory / "config.json").is_file():
        gguf = min(directory.glob("*.gguf"), default=None)
        hint = f"give the file: {gguf}" if gguf else "give a model's directory"
        raise UserError(f"{directory} holds no model that transformers can read: it has no config.json; {hint}")
    refuse_quantized(str(directory), directory)


def refuse_incomplete(directory: Path, *, may_lack_weights: bool = False) -> None:
    """Refuses a model's directory in which a file is missing or cut off.

    Args:
        directory: A directory with a config.json or a PEFT adapter.
        may_lack_weights: Whether a directory without any weights passes, since its architecture may be wrong in the
            first place.

    Raises:
        UserError: One line that names the file and says what to do.
    """
    if adapter_of(directory) is not None:
        _refuse_cut_off(directory / "adapter_model.safetensors")
        return
    if (directory / DRAFT).is_dir():
        refuse_incomplete_draft(directory)
    files = list(weight_files(directory))
    if not files and (shard := next(directory.glob("*-00001-of-*"), None)):
        index = f"{shard.name.partition('-00001-of-')[0]}{shard.suffix}.index.json"
        raise UserError(f"{directory} lacks {index}, which names the files of weights; fetch it again")
    if not files and may_lack_weights:
        return
    if not files:
        raise UserError(f"{directory} holds no weights ({_SINGLE[0]}); fetch them, or give another directory")
    for path in files:
        _refuse_cut_off(path)
    if not has_tokenizer(directory):
        raise UserError(f"{directory} holds no tokenizer (tokenizer.json); copy it there from the model's source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            _refuse_cut_off_table(directory / name)


def refuse_incomplete_draft(directory: Path) -> None:
    """Refuses a gated conversion whose adapter is missing or cut off.

    Raises:
        UserError: One line that names the file and says what to do.
    """
    path = directory / DRAFT / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is missing, which drafts for this model; fetch it again")
    _refuse_cut_off(path)


def has_tokenizer(directory: Path) -> bool:
    return any(next(directory.glob(name), None) for name in _TOKENIZERS)


def weight_files(directory: Path) -> Iterator[Path]:
    """The files that hold the weights, in the order in which transformers looks for them."""
    for name in _SINGLE:
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            yield directory / name
            return
        if index.is_file():
            for shard in sorted(set(_shards(index))):
                if not (directory / shard).is_file():
                    raise UserError(f"{directory} lacks {shard}, which {index.name} names; fetch it again")
                yield directory / shard
            return


def _shards(index: Path) -> list[str]:
    names = read_table(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} has no weight_map; fetch it again")
    return list(names.values())


def _refuse_cut_off(path: Path) -> None:
    """Refuses a file that is shorter than its header says, or that is a pointer of Git LFS."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise UserError(f"{path} is a pointer of Git LFS and holds no weights; fetch them with git lfs pull")
            if path.suffix != ".safetensors":
                return
            length = int.from_bytes(start, "little")
            header = parsed_json(file.read(length)) if 8 + length <= size else None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is broken: its header is not JSON; fetch it again") from error
    if header is None:
        raise UserError(f"{path} is cut off or broken: its header ends beyond its {size} bytes; fetch it again")
    needed = 8 + length + max(_ends(header), default=0)
    if size < needed:
        raise UserError(f"{path} is cut off: it has {size} bytes, and needs {needed}; fetch it again")


def _refuse_cut_off_table(path: Path) -> None:
    """Refuses a JSON file without its end, or that is a pointer of Git LFS. Of a large file only both ends are read."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            file.seek(max(0, path.stat().st_size - _LAST_BYTES))
            end = file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if start == b"version ":
        raise UserError(f"{path} is a pointer of Git LFS and holds no tokenizer; fetch it with git lfs pull")
    if not end.rstrip().endswith(b"}"):
        raise UserError(f"{path} is cut off: it ends within its table; fetch it again")


def _ends(header: Any) -> Iterator[int]:
    for name, entry in header.items() if isinstance(header, dict) else ():
        if name != "__metadata__" and isinstance(entry, dict):
            yield int((entry.get("data_offsets") or (0, 0))[1])


def read_table(path: Path) -> dict[str, Any]:
    """Returns the table that a JSON file of a model's directory holds.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    try:
        found = parsed_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}; fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no table; fetch it again")
    return found
