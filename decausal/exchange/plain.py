"""Export as a plain Hugging Face directory with a model card."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from decausal.errors import UserError
from decausal.exchange.card import CARD, ModelCard, names_base_model
from decausal.exchange.converted_files import ConvertedFiles, facts_to_hand_on, open_converted, whole_directory
from decausal.exchange.gated import export_gated
from decausal.exchange.staging import Exported, refuse_filled, staged
from decausal.exchange.stock import EMBEDDINGS, HEAD
from decausal.exchange.tensor_files import write_tensor_files
from decausal.exchange.tokenizer_files import without_code
from decausal.models.facts import ConversionFacts, read_facts, write_facts

_CARRIED = ("config.json", "generation_config.json")
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")
_NAME_CODE = ("config.json", "tokenizer_config.json")


def export_plain(directory: str | Path, output_dir: str | Path, *, card: ModelCard | None = None) -> Exported:
    """Copies what makes a converted model, and nothing of its training, beside a model card.

    Args:
        directory: What `decausal convert` wrote.
        output_dir: A new or empty directory.
        card: What the card says apart from the facts.

    Raises:
        UserError: `directory` is not a complete converted model, or `output_dir` is not empty.
    """
    refuse_filled(Path(output_dir))
    facts = read_facts(directory)
    if facts.is_gated:
        card = card or ModelCard()
        return export_gated(Path(directory), facts, Path(output_dir), card, _notes(card, facts))
    with whole_directory(Path(directory)) as whole:
        return _export(whole, Path(output_dir), card or ModelCard())


def _export(directory: Path, output_dir: Path, card: ModelCard) -> Exported:
    source = open_converted(directory)
    with staged(output_dir) as staging:
        has_second_head = _has_second_head(source)
        if has_second_head:
            tensors = source.tensors
            names = [name for name in tensors.names() if name != HEAD]
            write_tensor_files(staging, {name: tensors.stored(name) for name in names})
        for pattern in (*_CARRIED, *_TOKENIZER, *(() if has_second_head else _WEIGHTS)):
            for path in sorted(directory.glob(pattern)):
                _copy(path, staging)
        for name in _NAME_CODE:
            without_code(staging / name)
        (staging / CARD).write_text(card.text(source.facts, source.config), encoding="utf-8")
        write_facts(staging, facts_to_hand_on(source.facts))  # last: a directory with facts is complete
    return Exported(output_dir, source.facts, {}, _notes(card, source.facts))


def _has_second_head(source: ConvertedFiles) -> bool:
    """Returns whether the weights hold a tied head twice. Earlier versions wrote it, and nothing reads it."""
    tensors = source.tensors
    return (
        source.config.tie_word_embeddings
        and {HEAD, EMBEDDINGS} <= set(tensors.names())
        and torch.equal(tensors.load(HEAD), tensors.load(EMBEDDINGS))
    )


def _copy(path: Path, directory: Path) -> None:
    try:
        if path.is_dir():
            shutil.copytree(path, directory / path.name)
        else:
            shutil.copyfile(path, directory / path.name)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _notes(card: ModelCard, facts: ConversionFacts) -> list[str]:
    notes = []
    if card.license is None:
        notes.append("the card states no license; give the source's with --license")
    if not names_base_model(facts):
        notes.append("the card names no base model: the source did not come from the hub")
    if not card.results:
        notes.append("the card has no evaluation; give one with --evaluation FILE (decausal eval ... --json)")
    return notes
