"""Probes that decide whether a model can be used, and the findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from decausal.errors import UserError, first_line
from decausal.models.architecture import refusal
from decausal.models.backbone import decoder_layers, stock_model
from decausal.models.facts import ConversionFacts
from decausal.models.layer_kinds import first_layers, num_telling_layers
from decausal.models.questions import QUESTIONS, Question
from decausal.models.rounding import CLOSE, SAME, Judge, StatesNotFiniteError
from decausal.wording import quantity


@dataclass(frozen=True)
class Probe:
    """One question put to a model.

    Attributes:
        name: The property that should hold.
        passed: Whether it does.
        measured: What was found: a relative distance, a count, or the error that the model raised.
        explanation: What it means when the property does not hold.
        required: Whether the model is unusable without it; a note otherwise.
        threshold: Largest relative distance that counted as equal; None where nothing was compared.
        decided_in: The type of the computation that decided: the model's own, or float64 where that found a fault.
        noise_floor: How far rounding moves the model's states in float64; None where its own type decided.
    """

    name: str
    passed: bool
    measured: float | str
    explanation: str
    required: bool = True
    threshold: float | None = None
    decided_in: str | None = None
    noise_floor: float | None = None


def examine(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    facts: ConversionFacts | None = None,
    *,
    first_look: float = SAME,
) -> list[Probe]:
    """Runs every probe on a model: an autoregressive one, or, with `facts`, a converted one.

    Costs about 45 rows of 12 tokens, in the model's own dtype and on its device. A question whose first look finds more
    than `first_look` is asked again in float64, which tells rounding from a fault and takes several times as long. The
    result is deterministic. The model is left as it was.

    Args:
        model: A stock causal LM, or a PEFT wrapper around one.
        tokenizer: Its tokenizer, to check a converted model's mask token.
        facts: The facts of a converted model.
        first_look: Largest relative distance that passes without a second look.
    """
    return list(_findings(model, tokenizer, facts, Judge(model, first_look), QUESTIONS))


def _findings(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    facts: ConversionFacts | None,
    judge: Judge,
    questions: Iterable[Question],
) -> Iterator[Probe]:
    """Runs one probe after another, and stops at a refused architecture or at weights that are not numbers."""
    stock = judge.stock
    for first in (lambda: architecture_probe(stock.config), lambda: weights_probe(stock)):
        probe = first()
        yield probe
        if not probe.passed:
            return
    was_training = stock.training
    stock.eval()
    try:
        for question in questions:
            with torch.no_grad():
                probe = _put(question, judge)
            yield probe
        if facts is not None:
            yield _mask_token_probe(model, tokenizer, facts)
    finally:
        stock.train(was_training)


def architecture_probe(config: PretrainedConfig) -> Probe:
    """Returns whether models of this configuration can be converted at all, judging by the configuration only."""
    reason = refusal(config)
    return Probe("architecture is accepted", reason is None, reason or config.model_type, reason or "it is refused")


def weights_probe(model: nn.Module) -> Probe:
    """Returns whether all weights are numbers."""
    bad = [name for name, weight in model.named_parameters() if not _is_finite(weight)]
    name, count = "weights are finite", sum(1 for _ in model.parameters())
    if not bad:
        return Probe(name, True, quantity(count, "tensor"), "the weights hold NaN or infinity")
    what = "NaN" if torch.isnan(model.get_parameter(bad[0])).any() else "infinity"
    return Probe(name, False, f"{len(bad)} of {quantity(count, 'tensor')}", f"the weights of {bad[0]} hold {what}")


def _is_finite(weight: torch.Tensor) -> bool:
    if not weight.numel():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(weight.detach()))  # NaN comes out as both


def usable(probes: list[Probe]) -> bool:
    """Returns whether every required probe passed."""
    return all(probe.passed or not probe.required for probe in probes)


def probes_as_dict(probes: list[Probe]) -> dict[str, Any]:
    """Returns the findings as plain values: ``{"usable": bool, "probes": [{"name", "passed", "measured", ...},
    ...]}``."""
    return {"usable": usable(probes), "probes": [asdict(probe) for probe in probes]}


def refuse_if_unusable(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, facts: ConversionFacts | None = None
) -> None:
    """Raises UserError with the first required probe that fails, and what that means.

    A difference that no loss and no sampler would notice passes at once. Questions are asked of the first layers, as
    many as include every kind. The whole model is asked only if these do not pass. `examine` looks closer.
    """
    judge = Judge(model, CLOSE)
    for probe in _findings(model, tokenizer, facts, judge, _undecided(judge)):
        if not probe.passed:
            kind = judge.stock.config.model_type
            raise UserError(
                f"a model of type '{kind}' cannot be used: {probe.explanation} "
                f"(probe '{probe.name}' measured {shown(probe)}); see decausal doctor"
            )


def _undecided(judge: Judge) -> Iterator[Question]:
    """Yields the required questions that the first layers leave open. Each is asked only when it is needed."""
    count = num_telling_layers(judge.model)
    are_all = count == len(decoder_layers(judge.model))
    for question in (question for question in QUESTIONS if question.required):
        if not (are_all or question.of_all_layers):
            with first_layers(judge.model, count):
                if judge.passes_at_once(question.ask):
                    continue
        yield question


def shown(probe: Probe) -> str:
    """Returns what a probe measured, for people."""
    measured = probe.measured if isinstance(probe.measured, str) else f"{probe.measured:.3g}"
    return f"{measured} in float64" if probe.decided_in == "float64" else measured


def _put(question: Question, judge: Judge) -> Probe:
    explanation = question.explanation
    try:
        verdict = judge.decide(question.ask)
    except StatesNotFiniteError:
        dtype = str(judge.stock.dtype).removeprefix("torch.")
        explanation = f"its states are not finite in {dtype}: its activations overflow"
        return Probe(question.name, False, "not finite", explanation, question.required, decided_in=dtype)
    except Exception as error:  # a model may fail in any way under a mask that its authors never tried
        measured = f"{type(error).__name__}: {first_line(error)}"
        return Probe(question.name, False, measured, explanation, question.required)
    return Probe(question.name, explanation=explanation, required=question.required, **vars(verdict))


def _mask_token_probe(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, facts: ConversionFacts) -> Probe:
    embedding, token_id = stock_model(model).get_input_embeddings(), facts.mask_token_id
    if facts.is_gated:
        norm = embedding.mask_row.float().norm().item()
        return Probe(
            "mask token has a row of its own",
            0.0 < norm < float("inf"),
            f"id {token_id}, outside the embedding, norm {norm:.3g}",
            "the mask token's row is empty, or no number",
        )
    matrix = embedding.weight
    is_named = tokenizer is None or tokenizer.mask_token_id == token_id
    exists = 0 <= token_id < len(matrix)
    norm = matrix[token_id].float().norm().item() if exists else 0.0
    return Probe(
        "mask token has a row of its own",
        is_named and exists and 0.0 < norm < float("inf"),
        f"id {token_id}, norm {norm:.3g}",
        "the tokenizer's mask token, the facts and the embedding do not agree, or the row is empty",
    )
