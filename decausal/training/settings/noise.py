"""Settings for the masks of training rows: noise levels, or groups that are all masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from decausal.diffusion.grouping import Grouping
from decausal.errors import UserError
from decausal.training.settings.field import at_least, setting, whole_numbers
from decausal.training.settings.layout import LayoutSettings


@dataclass(frozen=True)
class NoiseSettings(LayoutSettings):
    """Noise levels."""

    noise: Literal["level", "all"] = setting(
        "level",
        "level: each token is masked with a chance that is drawn; all: groups of block_size masks, which draft in one "
        "step the tokens that verified decoding tests (layout block, causal_context, shift 1)",
    )
    views: int = setting(1, "noised views of a clean row in one step; they share one teacher pass")
    complementary_masks: bool = setting(False, "with 2 views, the second masks exactly what the first leaves")
    stratified_noise: bool = setting(
        True, "spread noise levels evenly over neighbouring rows; false: draw them independently"
    )
    noise_per: Literal["document", "block"] = setting(
        "document", "what has its own noise level; block is for layout block"
    )

    def check(self) -> None:
        at_least(self, views=1)
        if self.complementary_masks and self.views != 2:
            raise UserError(f"--complementary_masks needs --views 2, not {self.views}: the two masks share one row")

    def check_facts(self) -> None:
        if self.noise_per == "block" and self.layout != "block":
            raise UserError(f"--noise_per block is for --layout block, not {self.layout}; give document")
        self.refuse_for_groups(views=1, noise_per="document", eval_samples=8)

    def refuse_for_groups(self, **unset: object) -> None:
        """Refuses settings of noise levels under `noise all`, unless they have these values."""
        for name, value in unset.items():
            if self.noise == "all" and getattr(self, name) != value:
                raise UserError(f"--{name} {getattr(self, name)} is not for --noise all, which has no noise level")


@dataclass(frozen=True)
class GroupSettings(NoiseSettings):
    """Groups of masks, with noise all."""

    anchors: str | int = setting(
        "grid",
        "noise all: the tokens after which groups stand; grid: every block_size-th; all: every one; a number: so many "
        "at random in each row",
    )
    block_size_schedule: str | int | tuple[int, ...] | None = setting(
        None, "noise all: masks of a group in equal shares of the run, with commas, up to block_size: 1,2,3"
    )
    offset_gamma: float | None = setting(
        None, "noise all: the k-th draft of a group weighs exp(-(k-1)/offset_gamma); unset: all weigh the same"
    )

    def check_facts(self) -> None:
        if self.noise == "level":
            for name, unset in (("anchors", "grid"), ("block_size_schedule", None), ("offset_gamma", None)):
                if getattr(self, name) != unset:
                    raise UserError(f"--{name} {getattr(self, name)} is for --noise all: only there groups are drafts")
            return
        if self.layout != "block" or not self.causal_context or self.shift == 0:
            raise UserError(
                "--noise all needs --layout block, --causal_context true and --shift 1: its masks draft what the "
                "causal model verifies"
            )
        longest = self.grouping.lengths[-1]
        if longest != self.block_size:
            raise UserError(
                f"--block_size_schedule {self.block_size_schedule} ends with {longest}, and --block_size "
                f"is {self.block_size}; end with that"
            )
        if self.offset_gamma is not None and not self.offset_gamma > 0:
            raise UserError(f"--offset_gamma {self.offset_gamma}: must be above 0")

    @property
    def grouping(self) -> Grouping:
        """The groups of `noise all`."""
        schedule = self.block_size_schedule
        lengths = (self.block_size,) if schedule is None else whole_numbers("block_size_schedule", schedule)
        anchors = int(self.anchors) if str(self.anchors).isdigit() else self.anchors
        try:
            return Grouping(lengths, anchors)
        except UserError as error:
            raise UserError(f"--anchors, --block_size_schedule: {error}") from error
