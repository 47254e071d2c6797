"""Distinguishes rounding from a fault if two ways to compute one thing differ, whatever a model's depth, width and
type.

Rounding grows with depth and with the size of the activations, so no fixed tolerance separates it from a small leak. If
the first look finds a difference, the computation is repeated in float64. Rounding then shrinks by nine orders of
magnitude, while a fault does not.
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

CLOSE = 1e-4  # no sampler and no loss would notice this difference: quick, for starting a run
SAME = 1e-7  # a difference in the last place of fp32: for `decausal doctor`
IN_FLOAT64 = 1e-8
# How many times the floor rounding may reach. The floor counts one rounding per layer; a layer rounds a few dozen
# times.
ROUNDINGS = 30
# Relative changes beyond these are not rounding in any working model. Smaller ones are decided in float64.
_SURELY_SEEN = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PROBE_LENGTH = 12


class StatesNotFiniteError(ArithmeticError):
    """A model's states overflow, or its weights are not finite."""


@dataclass(frozen=True)
class Resolution:
    """What counts as a difference between states.

    Attributes:
        equal: Largest relative distance at which two ways to compute one state count as equal.
        seen: Smallest relative change of a state that counts as a change.
    """

    equal: float
    seen: float


Ask = Callable[[nn.Module, Resolution], tuple[bool, float | str]]
"""Answers a question about a model: whether the property holds, and what was measured."""


@dataclass(frozen=True)
class Verdict:
    """How a question was decided.

    Attributes:
        passed: Whether the property holds.
        measured: What was measured in the look that decided.
        threshold: Largest relative distance that counted as equal in that look.
        decided_in: The dtype of that look.
        noise_floor: How far rounding moves the model's states in float64; None if the first look decided.
    """

    passed: bool
    measured: float | str
    threshold: float
    decided_in: str
    noise_floor: float | None = None


class Judge:
    """Decides questions about one model: first in its own dtype, then in float64 if that look finds a fault.

    Args:
        model: A stock causal LM, or a PEFT wrapper around one.
        first_look: Largest relative distance that passes the first look.
    """

    def __init__(self, model: nn.Module, first_look: float = SAME) -> None:
        self.model, self.stock, self.first_look = model, stock_model(model), first_look

    def decide(self, ask: Ask) -> Verdict:
        """Decides a question. Errors of the first look are raised. Gradients must be off."""
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
        except Exception:  # this device, or an operator of this model, has no float64: its own dtype has to decide
            passed, measured = ask(self.model, Resolution(seen, seen))
            return Verdict(passed, measured, seen, _name(dtype))
        return Verdict(passed, measured, resolution.equal, "float64", self._noise_floor)

    @torch.no_grad()
    def passes_at_once(self, ask: Ask) -> bool:
        """Returns whether the first look passes; False if it raises."""
        try:
            return ask(self.model, Resolution(self.first_look, _SURELY_SEEN.get(self.stock.dtype, 5e-2)))[0]
        except Exception:  # `decide` meets the same error again
            return False

    @property
    def _threshold(self) -> float:
        # The results of a model that amplifies rounding beyond the cap cannot be repeated in other dtypes.
        return min(max(IN_FLOAT64, ROUNDINGS * self._noise_floor), CLOSE)

    @cached_property
    def _noise_floor(self) -> float:
        return noise_floor(self.model)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def noise_floor(model: nn.Module) -> float:
    """Returns how far one rounding in each layer moves the model's states, as a relative distance, in the current
    dtype.

    Each layer's input is changed by one unit in the last place, up or down, in a fixed pattern. No attention mask is
    involved, so a leak cannot raise it.
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
    """Changes the last place of the second row's states."""
    states = args[0] if args else kwargs["hidden_states"]
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, states.shape[1:], generator=generator).to(states.device) * 2 - 1
    changed = states.clone()
    changed[1] = states[1] * (1 + signs * torch.finfo(states.dtype).eps)
    return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})


def distance(found: Float[Tensor, "*rows D"], expected: Float[Tensor, "*rows D"]) -> float:
    """Returns the largest relative L2 distance over positions, so that one large coordinate cannot hide a difference.

    Raises:
        StatesNotFiniteError: Either is not finite.
    """
    return relative_change(found, expected).max().item()


def relative_change(found: Float[Tensor, "*rows D"], expected: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows"]:
    """Returns the relative L2 distance at each position; raises as `distance`."""
    found, expected = found.double(), expected.double()
    change = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)
    if not torch.isfinite(change).all():
        raise StatesNotFiniteError
    return change
