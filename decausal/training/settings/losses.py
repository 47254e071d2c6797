"""Settings of the losses, a class for each: its weight, when it counts, how it compares, and what it goes with.

The losses themselves are in `decausal.training.terms`, which needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from decausal.errors import UserError
from decausal.training.settings.field import Family, at_least, check_steps, inside_unit, setting
from decausal.training.settings.noise import NoiseSettings

Shape = Literal["constant", "linear", "cosine"]


def shape() -> Any:
    """Returns the field `{loss}_schedule`."""
    return setting("constant", "how the weight falls over the run")


def start_step() -> Any:
    """Returns the field `{loss}_start_step`."""
    return setting(0, "first step with this loss: a number, or a share of the run below 1")


def stop_step(help_text: str = "first step without this loss: a number, or a share of the run below 1") -> Any:
    """Returns the field `{loss}_stop_step`."""
    return setting(None, help_text)


@dataclass(frozen=True)
class TokenSettings(NoiseSettings):
    """Cross-entropy at masked tokens."""

    token_weight: float = setting(1.0, "weight of the token loss")
    token_schedule: Shape = shape()
    token_start_step: int | float = start_step()
    token_stop_step: int | float | None = stop_step()
    weighting: Literal["none", "inverse_t"] = setting(
        "none", "none: mean over masked tokens; inverse_t: weight 1/t, mean over predictable tokens (the NELBO)"
    )
    papl: float = setting(
        0.0, "weight of a second token term, mean of stop_gradient(p) * CE, 1 in REPR-ALIGN's code; 0: off"
    )

    def check(self) -> None:
        at_least(self, papl=0)

    def check_facts(self) -> None:
        self.refuse_for_groups(weighting="none")


@dataclass(frozen=True)
class CleanTokenSettings(NoiseSettings):
    """Cross-entropy at finished tokens."""

    clean_weight: float = setting(
        0.0,
        "layout block: weight of the cross-entropy at finished tokens, which keeps shared weights autoregressive; 0: "
        "off",
    )
    clean_schedule: Shape = shape()
    clean_start_step: int | float = start_step()
    clean_stop_step: int | float | None = stop_step()
    clean_balanced: bool = setting(
        False, "scale that loss to the token loss's value in each step, so that clean_weight is the ratio of the two"
    )

    def check_facts(self) -> None:
        self.refuse_without_finished_tokens("clean")


@dataclass(frozen=True)
class AlignmentSettings(NoiseSettings):
    """Alignment of hidden states."""

    align_weight: float = setting(0.0, "weight of the distance to the frozen AR model's hidden states; 0: off")
    align_schedule: Shape = shape()
    align_start_step: int | float = start_step()
    align_stop_step: int | float | None = stop_step(
        "first step without this loss; the teacher, no longer needed, then leaves memory"
    )
    align_layers: str | tuple[int, ...] = setting(
        "all",
        "all, a third (lower, middle, upper), or state indices with commas (0 embeddings ... L after the final norm)",
    )
    align_positions: Literal["targets", "visible", "all"] = setting(
        "targets", "targets: the states that predict masked tokens; visible: those of unmasked tokens; all"
    )
    align_distance: Literal["cosine", "l2"] = setting(
        "cosine", "cosine: 1 - cosine; l2: squared difference, averaged over the width"
    )

    def check_facts(self) -> None:
        if self.noise == "all" and self.align_weight and self.align_positions != "targets":
            raise UserError(f"--align_positions {self.align_positions} is not for --noise all; give targets")


@dataclass(frozen=True)
class DivergenceSettings(Family):
    """Divergence from the AR model's next-token distributions."""

    teacher_model_name_or_path: str | None = setting(
        None, "another AR model to learn from, with the same tokenizer; unset: the one that is, or was, converted"
    )
    kl_weight: float = setting(
        0.0, "weight of the divergence from the AR model's next-token distribution at masked tokens; 0: off"
    )
    kl_schedule: Shape = shape()
    kl_start_step: int | float = start_step()
    kl_stop_step: int | float | None = stop_step()
    kl_divergence: Literal["forward_kl", "reverse_kl", "jsd"] = setting(
        "forward_kl", "KL(teacher || student), KL(student || teacher), or the generalised Jensen-Shannon divergence"
    )
    jsd_beta: float = setting(0.5, "the teacher's share of the mixture in jsd")
    kl_top_k: int | None = setting(
        None, "compare on this many of the teacher's most probable tokens, not renormalised; unset: on all of them"
    )
    kl_tail_bucket: bool = setting(
        False, "with kl_top_k, all other tokens count as one; reverse_kl and jsd need it there"
    )
    kl_mean: Literal["sequence", "token"] = setting(
        "sequence", "sequence: mean of the sequences' means; token: mean over all targets"
    )

    def check(self) -> None:
        at_least(self, kl_top_k=1)
        inside_unit(self, "jsd_beta")
        if self.kl_tail_bucket and self.kl_top_k is None:
            raise UserError("--kl_tail_bucket needs --kl_top_k: over all tokens there is no tail")


@dataclass(frozen=True)
class FinishedDivergenceSettings(NoiseSettings):
    """The same divergence at finished tokens."""

    causal_kl_weight: float = setting(
        0.0,
        "layout block: weight of the same divergence at finished tokens, which keeps the model autoregressive, as "
        "self-speculation needs; 0: off",
    )
    causal_kl_schedule: Shape = shape()
    causal_kl_start_step: int | float = start_step()
    causal_kl_stop_step: int | float | None = stop_step()

    def check_facts(self) -> None:
        self.refuse_without_finished_tokens("causal_kl")


@dataclass(frozen=True)
class TotalVariationSettings(Family):
    """Total variation distance to these distributions."""

    tv_weight: float = setting(
        0.0,
        "weight of the total variation distance to the AR model's next-token distribution at masked tokens, which is "
        "the share of drafts that it would reject; 0: off",
    )
    tv_schedule: Shape = shape()
    tv_start_step: int | float = start_step()
    tv_stop_step: int | float | None = stop_step()


# A dataclass collects the fields of its last base first, so the order is reversed.
@dataclass(frozen=True)
class LossSettings(
    TotalVariationSettings,
    FinishedDivergenceSettings,
    DivergenceSettings,
    AlignmentSettings,
    CleanTokenSettings,
    TokenSettings,
):
    """All losses. A new one is a class above, and a base here."""

    def check(self) -> None:
        for loss in self.losses():
            at_least(self, **{f"{loss}_weight": 0})
            check_steps(self, f"{loss}_start_step", f"{loss}_stop_step")
        if not any(getattr(self, f"{loss}_weight") for loss in self.losses()):
            raise UserError("--token_weight 0 leaves nothing to train on; give another loss a weight")

    @classmethod
    def losses(cls) -> tuple[str, ...]:
        """Returns the prefixes of the losses' settings: those that have a weight."""
        names = cls.__dataclass_fields__
        return tuple(name.removesuffix("_weight") for name in names if name.endswith("_weight"))
