"""Small tasks in the form of YAML files, and small models to score on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from decausal.models.adapt import adapt
from decausal.models.checkpoint import ConversionFacts, save_converted
from tests.families import FAMILIES, tiny_tokenizer

SOURCE: dict[str, Any] = {"max_position_embeddings": 64}
WORDS = ["the rain", "a hat", "one heron", "in spain", "the inn", "another one", "it stays", "he saw"]

CHOICES = """
task: small_choices
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/choices.jsonl}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}:"
doc_to_target: label
doc_to_choice: "{{{{[first, second]}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WORD = """
task: small_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{first}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
TEXT = """
task: small_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
ANSWER = """
task: small_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl, train: {folder}/choices.jsonl}}}}
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}:"
doc_to_target: " {{{{first}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def write_tasks(folder: Path, num_examples: int = 8) -> Path:
    """Writes four tasks and their data."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "question": WORDS[i % len(WORDS)],
            "first": WORDS[(i + 1) % len(WORDS)],
            "second": WORDS[(i + 3) % len(WORDS)],
            "label": i % 2,
        }
        for i in range(num_examples)
    ]
    _write(folder / "choices.jsonl", rows)
    _write(folder / "texts.jsonl", [{"text": " ".join(WORDS[i:] * (1 + 2 * i))} for i in range(3)])
    for text in (CHOICES, WORD, TEXT, ANSWER):
        name = text.split()[1]
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder


def write_models(folder: Path) -> dict[str, Path]:
    """An AR model, and three conversions with its very weights, by name."""
    FAMILIES["llama"](**SOURCE).save_pretrained(folder / "source")
    tiny_tokenizer(chat=True).save_pretrained(folder / "source")
    kinds: dict[str, dict[str, Any]] = {
        "one": {"layout": "block", "block_size": 1, "shift": 1},
        "block": {"layout": "block", "block_size": 4, "shift": 1},
        "whole": {"layout": "bidirectional", "shift": 1},
    }
    for name, kind in kinds.items():
        model, tokenizer = FAMILIES["llama"](**SOURCE), tiny_tokenizer(chat=True)
        mask_token_id = adapt(model, tokenizer)
        facts = ConversionFacts(source=str(folder / "source"), mask_token_id=mask_token_id, **kind)
        save_converted(folder / name, model, tokenizer, facts)
    return {name: folder / name for name in ("source", *kinds)}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
