"""Probes that decide whether a model can be used: short forward passes whose outcome the mathematics fixes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from decausal.diffusion.layout import Layout
from decausal.errors import UserError, first_line
from decausal.models.architecture import layer_windows, reach, refusal
from decausal.models.backbone import body_forward, decoder_layers, head_of, logits, stock_model
from decausal.models.facts import ConversionFacts
from decausal.objectives import head as output_head

CAUSAL, BIDIRECTIONAL, BLOCKWISE = Layout("causal"), Layout("bidirectional"), Layout("block", 4)
PROBE_LENGTH = 12
SPLIT = 5  # the packed row is two documents, of 5 and 7 tokens
SHRUNK_WINDOW = 4
# Largest relative distance at which two ways to compute one state count as equal. Leaks are orders of magnitude larger.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Probe:
    """One question put to a model.

    Attributes:
        name: the property that should hold.
        passed: whether it does.
        measured: what was found: a relative distance, a count, or the error that the model raised.
        explanation: what it means when the property does not hold.
        required: whether the model is unusable without it; a note otherwise.
    """

    name: str
    passed: bool
    measured: float | str
    explanation: str
    required: bool = True


def examine(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, facts: ConversionFacts | None = None
) -> list[Probe]:
    """Puts every probe to a model: an autoregressive one, or, with `facts`, a converted one.

    Costs about 45 rows of 12 tokens, in the model's own dtype and on its device. Deterministic. The model is left as it
    was.

    Args:
        model: a stock causal LM, or a PEFT wrapper around one.
        tokenizer: its tokenizer, to check a converted model's mask token.
        facts: the facts of a converted model.
    """
    stock = stock_model(model)
    probes = [architecture_probe(stock.config)]
    if not probes[0].passed:
        return probes
    was_training = stock.training
    stock.eval()
    try:
        with torch.no_grad():
            probes += [_run(question, model) for question in QUESTIONS]
            if facts is not None:
                probes.append(_mask_token_probe(model, tokenizer, facts))
    finally:
        stock.train(was_training)
    return probes


def architecture_probe(config: PretrainedConfig) -> Probe:
    """Whether models of this configuration can be converted at all, from the configuration alone."""
    reason = refusal(config)
    return Probe("architecture is accepted", reason is None, reason or config.model_type, reason or "it is refused")


def usable(probes: list[Probe]) -> bool:
    """Whether every required probe passed."""
    return all(probe.passed or not probe.required for probe in probes)


def probes_as_dict(probes: list[Probe]) -> dict[str, Any]:
    """The findings as plain values: ``{"usable": bool, "probes": [{"name", "passed", "measured", ...}, ...]}``."""
    return {"usable": usable(probes), "probes": [asdict(probe) for probe in probes]}


def refuse_if_unusable(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, facts: ConversionFacts | None = None
) -> None:
    """Raises UserError with the first required probe that fails, and what that means."""
    for probe in examine(model, tokenizer, facts):
        if probe.required and not probe.passed:
            kind = stock_model(model).config.model_type
            raise UserError(
                f"a model of type '{kind}' cannot be used: {probe.explanation} "
                f"(probe '{probe.name}' measured {_shown(probe.measured)}); see decausal doctor"
            )


def _shown(measured: float | str) -> str:
    return measured if isinstance(measured, str) else f"{measured:.3g}"


@dataclass(frozen=True)
class Question:
    """A probe before it is put: `ask` returns whether the property holds, and what was measured."""

    name: str
    ask: Callable[[nn.Module], tuple[bool, float | str]]
    explanation: str
    required: bool = True


def _run(question: Question, model: nn.Module) -> Probe:
    try:
        passed, measured = question.ask(model)
    except Exception as error:  # a model may fail in any way under a mask that its authors never tried
        passed, measured = False, f"{type(error).__name__}: {first_line(error)}"
    return Probe(question.name, passed, measured, question.explanation, question.required)


def _head_is_read(model: nn.Module) -> tuple[bool, float]:
    stock, ids = stock_model(model), _row(model)
    with _configured(stock, is_causal=True):
        states = stock.base_model(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
        expected = stock(input_ids=ids, use_cache=False, return_dict=True).logits
    return _agree(
        output_head.logits(states.flatten(0, 1), head_of(model)).unflatten(0, ids.shape), expected, stock.dtype
    )


def _causal_is_the_source(model: nn.Module) -> tuple[bool, float]:
    stock, ids = stock_model(model), _row(model)
    with _configured(stock, is_causal=True):
        expected = stock(input_ids=ids, use_cache=False, return_dict=True).logits
    return _agree(logits(model, ids, CAUSAL), expected, stock.dtype)


def _masks_are_honoured(model: nn.Module) -> tuple[bool, float]:
    stock, ids = stock_model(model), _row(model)
    is_windowed = any(window is not None for window in layer_windows(stock.config).values())
    changes = {"is_causal": True} | ({"sliding_window": SHRUNK_WINDOW} if is_windowed else {})
    with _configured(stock, **changes):
        expected = stock.base_model(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
        found = body_forward(model, ids, CAUSAL, document_ids=torch.zeros_like(ids)).last_hidden_state
    return _agree(found, expected, stock.dtype)


def _states_are_complete(model: nn.Module) -> tuple[bool, float | str]:
    layers, seen = decoder_layers(model), []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        output = body_forward(model, _row(model), CAUSAL, output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
    distances = [_distance(found, expected) for found, expected in zip(output.hidden_states, seen, strict=False)]
    return len(seen) == len(layers) and max(distances) == 0, max(distances)


def _both_ways_is_seen(model: nn.Module) -> tuple[bool, str]:
    return _influence_is(model, BIDIRECTIONAL, lambda query, key: torch.ones_like(query == key))


def _block_is_seen(model: nn.Module) -> tuple[bool, str]:
    size = BLOCKWISE.block_size
    return _influence_is(model, BLOCKWISE, lambda query, key: key // size <= query // size)


def _documents_are_isolated(model: nn.Module) -> tuple[bool, float]:
    ids, document_ids = _row(model), _documents(model)
    first, second = slice(None, SPLIT), slice(SPLIT, None)
    changed_first, changed_second = ids.clone(), ids.clone()
    changed_first[:, first] = _other(model, ids)[:, first]
    changed_second[:, second] = _other(model, ids)[:, second]
    rows = torch.cat([ids, changed_first, changed_second])
    states = body_forward(
        model, rows, BIDIRECTIONAL, document_ids=document_ids.expand_as(rows).contiguous()
    ).last_hidden_state
    leak = max(_distance(states[2, first], states[0, first]), _distance(states[1, second], states[0, second]))
    return leak <= _tolerance(states.dtype), leak


def _documents_are_whole(model: nn.Module) -> tuple[bool, float]:
    ids, document_ids = _row(model), _documents(model)
    packed = body_forward(model, ids, BIDIRECTIONAL, document_ids=document_ids).last_hidden_state
    alone = [body_forward(model, part, BIDIRECTIONAL).last_hidden_state for part in (ids[:, :SPLIT], ids[:, SPLIT:])]
    distance = _distance(packed, torch.cat(alone, dim=1))
    return distance <= _tolerance(packed.dtype), distance


def _plain_class_agrees(model: nn.Module) -> tuple[bool, float]:
    stock = stock_model(model)
    windows = [window for window in layer_windows(stock.config).values() if window is not None]
    ids = _row(model)[:, : min(windows, default=PROBE_LENGTH)]  # beyond a window its width is transformers' own
    expected = body_forward(model, ids, BIDIRECTIONAL).last_hidden_state
    with _configured(stock, is_causal=False):
        found = stock.base_model(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
    return _agree(found, expected, stock.dtype)


QUESTIONS = (
    Question(
        "output head is understood",
        _head_is_read,
        "its head is more than a matrix, a scale and a soft cap, so losses would be computed on wrong logits",
    ),
    Question(
        "causal layout reproduces the source model",
        _causal_is_the_source,
        "under the causal layout it does not compute what the stock model computes, so what it learned would be lost",
    ),
    Question(
        "explicit attention masks are honoured",
        _masks_are_honoured,
        "it ignores or alters the attention mask that it is given",
    ),
    Question(
        "hidden states are complete",
        _states_are_complete,
        "its hidden states are not its layers' inputs and the state after the final norm, so they cannot be aligned",
    ),
    Question(
        "bidirectional layout: every token changes every state",
        _both_ways_is_seen,
        "a later token does not change an earlier state: some part of it stays causal whatever it is told",
    ),
    Question(
        "block layout: a state reads its block and earlier ones only",
        _block_is_seen,
        "states read other tokens than the block layout allows",
    ),
    Question(
        "packed documents do not leak into each other",
        _documents_are_isolated,
        "a document's states change with its neighbour in the row",
    ),
    Question(
        "a packed document equals the same document alone",
        _documents_are_whole,
        "it does not restart positions with each document, so packing would change what it reads",
    ),
    Question(
        "the plain transformers class reads both ways",
        _plain_class_agrees,
        "the plain class stays causal whatever its configuration says: load the converted model by decausal only",
        required=False,
    ),
)


def _mask_token_probe(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, facts: ConversionFacts) -> Probe:
    matrix = stock_model(model).get_input_embeddings().weight
    token_id = facts.mask_token_id
    is_named = tokenizer is None or tokenizer.mask_token_id == token_id
    exists = 0 <= token_id < len(matrix)
    norm = matrix[token_id].float().norm().item() if exists else 0.0
    return Probe(
        "mask token has a row of its own",
        is_named and exists and 0.0 < norm < float("inf"),
        f"id {token_id}, norm {norm:.3g}",
        "the tokenizer's mask token, the facts and the embedding do not agree, or the row is empty",
    )


def _row(model: nn.Module) -> Int[Tensor, "1 T"]:
    embedding = stock_model(model).get_input_embeddings().weight
    return (torch.arange(PROBE_LENGTH, device=embedding.device)[None] * 37 + 7) % len(embedding)


def _other(model: nn.Module, ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    return (ids + 11) % len(stock_model(model).get_input_embeddings().weight)


def _documents(model: nn.Module) -> Int[Tensor, "1 T"]:
    return (torch.arange(PROBE_LENGTH, device=_row(model).device)[None] >= SPLIT).long()


def _influence_is(model: nn.Module, layout: Layout, is_visible: Callable[[Tensor, Tensor], Tensor]) -> tuple[bool, str]:
    """Whether changing a token changes exactly the states that see it, windows considered.

    A seen change need only rise above chance, however faint it is after many layers. An unseen one may differ by
    rounding: kernels sum in another order in another row, experts in another grouping.
    """
    ids = _row(model)
    changed = torch.where(torch.eye(PROBE_LENGTH, dtype=torch.bool, device=ids.device), _other(model, ids), ids)
    states = body_forward(model, torch.cat([ids, ids, changed]), layout).last_hidden_state.double()
    change: Float[Tensor, "T T"] = ((states[2:] - states[0]).norm(dim=-1) / states[0].norm(dim=-1)).T
    chance = ((states[1] - states[0]).norm(dim=-1) / states[0].norm(dim=-1)).max()
    position = torch.arange(PROBE_LENGTH, device=ids.device)
    query, key = position[:, None], position[None, :]
    distance = reach(stock_model(model).config)
    is_expected = is_visible(query, key) & ((query - key).abs() <= (PROBE_LENGTH if distance is None else distance))
    is_right = torch.where(is_expected, change > chance, change <= _tolerance(stock_model(model).dtype))
    wrong = int((~is_right).sum())
    return wrong == 0, f"{wrong} of {is_right.numel()} pairs wrong"


def _distance(found: Float[Tensor, "*rows D"], expected: Float[Tensor, "*rows D"]) -> float:
    """Largest relative L2 distance over positions: one large coordinate elsewhere cannot hide a difference here."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)).max().item()


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE.get(dtype, 5e-2)


def _agree(
    found: Float[Tensor, "*rows D"], expected: Float[Tensor, "*rows D"], dtype: torch.dtype
) -> tuple[bool, float]:
    distance = _distance(found, expected)
    return distance <= _tolerance(dtype), distance


@contextmanager
def _configured(stock: nn.Module, **changes: Any) -> Iterator[None]:
    """Changes the model's configuration for a few forward passes."""
    missing = object()
    before = {name: getattr(stock.config, name, missing) for name in changes}
    try:
        for name, value in changes.items():
            setattr(stock.config, name, value)
        yield
    finally:
        for name, value in before.items():
            if value is missing:
                delattr(stock.config, name)
            else:
                setattr(stock.config, name, value)
