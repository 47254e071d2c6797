"""Tells rounding from a fault where two ways to compute one thing differ, whatever a model's depth, width and type.

Rounding grows with depth and with the size of the activations, so no fixed tolerance tells it from a small leak. What
differs at the first look is computed again in float64: rounding then shrinks by nine orders of magnitude, a fault does
not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decausal.diffusion.layout import Layout
from decausal.models.backbone import body_forward, decoder_layers, stock_model
from decausal.models.float64 import in_float64

CLOSE = 1e-4  # a difference that no sampler and no loss would notice: for who starts a run and does not want to wait
SAME = 1e-7  # one in the last place of fp32: for who asks
IN_FLOAT64 = 1e-8
# How many times the floor rounding may be: the floor counts one rounding in each layer, which rounds a few dozen times.
ROUNDINGS = 30
# Changes beyond these, relative, are no rounding in any model that works; those that tell less are told in float64.
_SURELY_SEEN = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PROBE_LENGTH = 12


class StatesNotFiniteError(ArithmeticError):
    """A model's states overflow, or its weights hold what is no number."""


@dataclass(frozen=True)
class Resolution:
    """What counts as a difference.

    Attributes:
        equal: largest relative distance at which two ways to compute one state count as equal.
        seen: smallest relative change of a state that counts as one.
    """

    equal: float
    seen: float


Ask = Callable[[nn.Module, Resolution], tuple[bool, float | str]]
"""Puts a question to a model: whether the property holds, and what was measured."""


@dataclass(frozen=True)
class Verdict:
    """How a question was decided.

    Attributes:
        passed: whether the property holds.
        measured: what was found, in the look that decided.
        threshold: largest relative distance that counted as equal there.
        decided_in: the type that this look computed in.
        noise_floor: how far rounding moves the model's states in float64; None where the first look decided.
    """

    passed: bool
    measured: float | str
    threshold: float
    decided_in: str
    noise_floor: float | None = None


class Judge:
    """Decides questions about one model: in its own type, then in float64 where that look finds a fault.

    Args:
        model: a stock causal LM, or a PEFT wrapper around one.
        first_look: largest relative distance that the first look lets pass.
    """

    def __init__(self, model: nn.Module, first_look: float = SAME) -> None:
        self.model, self.stock, self.first_look = model, stock_model(model), first_look

    def decide(self, ask: Ask) -> Verdict:
        """Puts a question. What it raises at the first look is raised; gradients must be off."""
        dtype = self.stock.dtype
        seen = _SURELY_SEEN.get(dtype, 5e-2)
        passed, measured = ask(self.model, Resolution(self.first_look, seen))
        if passed:
            return Verdict(passed, measured, self.first_look, _name(dtype))
        try:
            with in_float64(self.stock.config):
                resolution = Resolution(self._threshold, max(ROUNDINGS * self._noise_floor, 1e-13))
                passed, measured = ask(self.model, resolution)
        except StatesNotFiniteError:
            raise
        except Exception:  # this device, or an operator of this model, has no float64: as far as its own type tells
            passed, measured = ask(self.model, Resolution(seen, seen))
            return Verdict(passed, measured, seen, _name(dtype))
        return Verdict(passed, measured, resolution.equal, "float64", self._noise_floor)

    @torch.no_grad()
    def passes_at_once(self, ask: Ask) -> bool:
        """Whether the first look finds nothing; False where it raises."""
        try:
            return ask(self.model, Resolution(self.first_look, _SURELY_SEEN.get(self.stock.dtype, 5e-2)))[0]
        except Exception:  # whatever it is, `decide` meets it again
            return False

    @property
    def _threshold(self) -> float:
        # A model that amplifies rounding beyond the cap computes nothing that its other types would repeat.
        return min(max(IN_FLOAT64, ROUNDINGS * self._noise_floor), CLOSE)

    @cached_property
    def _noise_floor(self) -> float:
        return noise_floor(self.model)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def noise_floor(model: nn.Module) -> float:
    """How far one rounding in each layer moves the model's states, as a relative distance, in the type in force.

    Each layer's input is changed by one unit in the last place, up or down, by a fixed pattern. No attention mask has a
    part in it: a leak cannot raise it.
    """
    embedding = stock_model(model).get_input_embeddings().weight
    row = (torch.arange(PROBE_LENGTH, device=embedding.device) * 37 + 7) % len(embedding)
    hooks = [layer.register_forward_pre_hook(_rounded_once, with_kwargs=True) for layer in decoder_layers(model)]
    try:
        states = body_forward(model, row.expand(2, -1), Layout("bidirectional")).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return distance(states[1], states[0])


def _rounded_once(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Changes the states of the second row in their last place."""
    states = args[0] if args else kwargs["hidden_states"]
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, states.shape[1:], generator=generator).to(states.device) * 2 - 1
    changed = states.clone()
    changed[1] = states[1] * (1 + signs * torch.finfo(states.dtype).eps)
    return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})


def distance(found: Float[Tensor, "*rows D"], expected: Float[Tensor, "*rows D"]) -> float:
    """Largest relative L2 distance over positions: one large coordinate elsewhere cannot hide a difference here.

    Raises:
        StatesNotFiniteError: either holds what is no number.
    """
    return relative_change(found, expected).max().item()


def relative_change(found: Float[Tensor, "*rows D"], expected: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows"]:
    """Relative L2 distance at each position; raises as `distance`."""
    found, expected = found.double(), expected.double()
    change = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)
    if not torch.isfinite(change).all():
        raise StatesNotFiniteError
    return change
