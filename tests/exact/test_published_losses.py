"""Identity 14: the loss of a recipe's first step is the number of its paper's formula, on inputs written by hand.

Each row of `TABLE` names a recipe, what is set besides, the formula in plain numpy and its recorded value. The formula
reads tokens, masks, noise levels and the two models' states by name and place; decausal gets the same through its
settings, collators and terms. What both know of each other is the hand-written inputs alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from decausal.config import read_recipe, resolve
from decausal.models.checkpoint import ConversionFacts
from decausal.objectives.head import Head
from decausal.objectives.logits import States, top_k_log_probs
from decausal.training.questions import HiddenStates
from decausal.training.run_rows import collator_of
from decausal.training.settings import ConversionSettings
from decausal.training.student import supervision_of
from decausal.training.terms import Reading

VOCABULARY, MASK, BLOCK, NUM_LAYERS = 7, 6, 2, 2
IDS = np.array([[0, 3, 5, 1, 4, 2], [2, 2, 0, 5, 0, 0]])
LENGTHS = (6, 4)
IS_MASKED = np.array([[[0, 1, 1, 0, 1, 1]], [[0, 0, 1, 1, 0, 0]]], dtype=bool)
LEVEL = {"document": (0.6, 0.45), "block": (0.3, 0.5, 0.9)}
CLEAN = 0


def student(row: int, view: int, place: int, layer: int = NUM_LAYERS) -> np.ndarray:
    """A state of the student: `CLEAN`, or of noised view 1, 2. The last layer's are the logits."""
    return np.sin(1.3 * row + 2.1 * view + 0.7 * place + 1.9 * layer + np.arange(VOCABULARY) ** 2)


def teacher(row: int, place: int, layer: int = NUM_LAYERS) -> np.ndarray:
    """The same of the frozen AR model, which reads the clean row."""
    return 1.5 * np.cos(0.4 * row + 1.1 * place + 0.8 * layer + 1.7 * np.arange(VOCABULARY))


# Formulas


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Of all tokens but the mask token, which is never a prediction."""
    return logits[:MASK] - np.log(np.exp(logits[:MASK]).sum())


def targets(num_views: int, first: int) -> list[tuple[int, int, int]]:
    """Row, view (from 1) and place of each masked token; the second view masks what the first leaves."""
    return [
        (row, view, place)
        for row, length in enumerate(LENGTHS)
        for view in range(1, num_views + 1)
        for place in range(first, length)
        if IS_MASKED[row, 0, place] == (view == 1)
    ]


def cross_entropy(row: int, view: int, place: int, *, shift: int, in_blocks: bool = False) -> float:
    if shift == 1 and in_blocks and place % BLOCK == 0:
        logits = student(row, CLEAN, place - 1)
    else:
        logits = student(row, view, place - shift)
    return -log_probabilities(logits)[IDS[row, place]]


def mean_over_masked(*, shift: int = 1, num_views: int = 1, in_blocks: bool = False) -> float:
    """Mean of -log p over masked tokens."""
    found = targets(num_views, shift)
    return sum(cross_entropy(*target, shift=shift, in_blocks=in_blocks) for target in found) / len(found)


def weighted_by_level(*, shift: int, noise_per: str, in_blocks: bool = False) -> float:
    """Sum over masked tokens of -log p / t, by the number of tokens: the NELBO."""
    total = 0.0
    for row, view, place in targets(1, shift):
        level = LEVEL["document"][row] if noise_per == "document" else LEVEL["block"][place // BLOCK]
        total += cross_entropy(row, view, place, shift=shift, in_blocks=in_blocks) / level
    return total / sum(length - shift for length in LENGTHS)


def planned(*, shift: int = 1) -> float:
    """Mean of (1 + p) * -log p, as REPR-ALIGN's code adds PAPL's term."""
    losses = np.array([cross_entropy(*target, shift=shift) for target in targets(1, shift)])
    return float(((1 + np.exp(-losses)) * losses).mean())


def misalignment(*, shift: int = 1) -> float:
    """1 - cosine between student and AR model, mean over the states that predict masked tokens and over all layers."""
    distances = []
    for row, view, place in targets(1, shift):
        for layer in range(NUM_LAYERS + 1):
            ours, theirs = student(row, view, place - shift, layer), teacher(row, place - shift, layer)
            distances.append(1 - ours @ theirs / np.sqrt((ours @ ours) * (theirs @ theirs)))
    return float(np.mean(distances))


def distilled(top_k: int | None = None) -> float:
    """KL(AR model | student) at masked tokens, the AR model's next token; mean per sequence, then over sequences."""
    per_sequence: dict[int, list[float]] = {}
    for row, view, place in targets(1, first=1):
        log_p = log_probabilities(teacher(row, place - 1))
        log_q = log_probabilities(student(row, view, place))
        kept = np.argsort(-log_p)[:top_k]
        per_sequence.setdefault(row, []).append(float((np.exp(log_p) * (log_p - log_q))[kept].sum()))
    return float(np.mean([np.mean(sequence) for sequence in per_sequence.values()]))


TABLE: dict[str, tuple[str, dict[str, Any], float, float]] = {
    "MDLM, LLaDA": (
        "mdm",
        {"weighting": "inverse_t", "shift": 0},
        weighted_by_level(shift=0, noise_per="document"),
        1.7640331,
    ),
    "our mdm": ("mdm", {}, mean_over_masked(), 1.6884624),
    "DiffuLLaMA": ("diffullama", {}, weighted_by_level(shift=1, noise_per="document"), 2.2693998),
    "BD3-LM": ("bd3lm", {}, weighted_by_level(shift=0, noise_per="block"), 1.8616617),
    "SDAR": ("sdar", {}, weighted_by_level(shift=0, noise_per="document"), 1.7640331),
    "Fast-dLLM v2, first tokens from the clean state": (
        "fast-dllm-v2",
        {},
        mean_over_masked(num_views=2, in_blocks=True),
        1.9294363,
    ),
    "REPR-ALIGN": ("repr-align-paper", {}, planned() + 10 * misalignment(), 11.6739463),
    "REPR-ALIGN's baseline": ("repr-align-paper", {"align_weight": 0.0}, planned(), 1.9934429),
    "our repr-align": ("repr-align", {}, mean_over_masked() + 3 * misalignment(), 4.5926135),
    "OPDLM": ("opdlm-paper", {}, distilled(), 0.6076439),
    "OPDLM, its code's sparse divergence": ("opdlm-paper", {"kl_top_k": 3}, distilled(top_k=3), 0.7430804),
    "our opdlm, without the shift": ("opdlm", {"shift": 0, "causal_context": False}, distilled(), 0.6076439),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_recipes_loss_is_the_recorded_value_of_its_papers_formula(name: str) -> None:
    recipe, changes, formula, recorded = TABLE[name]
    settings = resolve(ConversionSettings, read_recipe(recipe), [])[0].with_facts()
    settings = replace(settings, **({"block_size": BLOCK} if settings.layout == "block" else {}) | changes)
    assert formula == pytest.approx(recorded, abs=1e-6)
    assert loss_of(settings) == pytest.approx(recorded, abs=1e-6)


# The same by decausal


def loss_of(settings: ConversionSettings) -> float:
    """The weighted loss of the first step on the hand-written batch, by the settings' own collator and terms."""
    batch = collator_of(settings, facts_of(settings), context=None, row_multiple=1)(items_of(settings))
    supervision = supervision_of(settings, facts_of(settings).attention, MASK, NUM_LAYERS, num_steps=100)
    head = Head(torch.eye(VOCABULARY, dtype=torch.float64), banned=MASK)
    states = student_states(batch, settings)
    reading = Reading(batch, states[-1].flatten(0, 1), states, head)
    total = 0.0
    for term, weight in supervision.weights(0).items():
        answers = {question: answer_to(question, batch, head) for question in term.questions}
        total += weight * float(term.sum(reading, answers)) / float(batch["counts"][term.count])
    return total


def facts_of(settings: ConversionSettings) -> ConversionFacts:
    names = ("layout", "block_size", "causal_context", "shift")
    return ConversionFacts("hand-written", mask_token_id=MASK, **{name: getattr(settings, name) for name in names})


def items_of(settings: ConversionSettings) -> list[dict[str, torch.Tensor]]:
    items = []
    for row, length in enumerate(LENGTHS):
        place = torch.arange(IDS.shape[1])
        is_predictable = (place < length) & (place >= settings.shift)
        first = torch.tensor(IS_MASKED[row])
        masks = torch.cat([first, ~first]) if settings.complementary_masks else first
        level = torch.full((len(masks), len(place)), LEVEL["document"][row])
        if settings.noise_per == "block":
            level = torch.tensor(LEVEL["block"])[place // BLOCK].expand(len(masks), -1)
        items.append(
            {
                "clean_ids": torch.tensor(IDS[row]),
                "document_ids": torch.where(place < length, 0, -1),
                "is_predictable": is_predictable,
                "is_masked": masks & is_predictable,
                "level": level,
            }
        )
    return items


def student_states(batch: dict[str, Any], settings: ConversionSettings) -> tuple[torch.Tensor, ...]:
    if settings.layout == "block":
        views, places = batch["stream_ids"], batch["student_position_ids"]
        rows = torch.arange(len(views))[:, None].expand_as(views)
    else:
        num_views = len(batch["noised_ids"]) // len(IDS)
        shape = batch["noised_ids"].shape
        rows = (torch.arange(shape[0]) // num_views)[:, None].expand(shape)
        views = (torch.arange(shape[0]) % num_views + 1)[:, None].expand(shape)
        places = torch.arange(shape[1]).expand(shape)
    named = torch.stack([rows, views, places], -1).tolist()
    return tuple(
        torch.tensor(np.array([[student(*place, layer) for place in row] for row in named]))
        for layer in range(NUM_LAYERS + 1)
    )


def answer_to(question: Any, batch: dict[str, Any], head: Head) -> Any:
    def rows(layer: int) -> torch.Tensor:
        places = [divmod(index, IDS.shape[1]) for index in batch[question.index].tolist()]
        return torch.tensor(np.array([teacher(*place, layer) for place in places]))

    if isinstance(question, HiddenStates):
        return [rows(layer) for layer in question.layers]
    states = rows(NUM_LAYERS)
    return States(states, head) if question.top_k is None else top_k_log_probs(states, head, question.top_k)
