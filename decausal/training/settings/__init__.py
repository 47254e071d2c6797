"""What a user can set for a conversion, apart from transformers' own training arguments.

Each file holds families of settings: their fields with help, the values that they accept and what they contradict.
These files are light: the command line reads them to print its help.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from decausal.sampling.settings import BLOCKS, names_for
from decausal.training.settings.data import DataSettings
from decausal.training.settings.losses import LossSettings
from decausal.training.settings.model import ModelSettings
from decausal.training.settings.noise import GroupSettings
from decausal.training.settings.output import OutputSettings
from decausal.training.settings.rollouts import RolloutSettings
from decausal.training.settings.weights import GatedSettings


# A dataclass collects the fields of its last base first, so the order is reversed.
@dataclass(frozen=True)
class ConversionSettings(
    OutputSettings, GatedSettings, RolloutSettings, LossSettings, GroupSettings, DataSettings, ModelSettings
):
    """One conversion: a point on the grid of layout, shift, rows and supervision, and the data it is trained on.

    Raises:
        UserError: A value is outside its range, or settings contradict each other.
    """

    def __post_init__(self) -> None:
        self.check_all("check")
        if self.layout is not None:  # else it is MODEL's to say, and `with_facts` makes new settings
            self.check_all("check_facts")

    def with_facts(
        self,
        layout: str = "bidirectional",
        block_size: int | None = None,
        causal_context: bool = False,
        shift: int = 1,
        causal_groups: bool = False,
        weights: str = "shared",
        sampler: dict | None = None,
    ) -> ConversionSettings:
        """Returns the settings with each fact that they leave open as given here: by default, as for an AR model.

        What belongs to a layout, or to a shift, goes only to settings of the same one.

        Raises:
            UserError: The settings do not go with these facts.
        """
        if self.layout not in (None, layout):
            layout, block_size, causal_context, sampler = self.layout, None, False, None
            causal_groups, weights = False, "shared"
        if self.shift not in (None, shift):
            sampler = {name: value for name, value in (sampler or {}).items() if name not in names_for(BLOCKS)}
        facts = {"layout": layout, "block_size": block_size, "causal_context": causal_context, "shift": shift}
        facts |= {"causal_groups": causal_groups, "weights": weights}
        facts["sampler"] = sampler or None
        return replace(self, **{name: value for name, value in facts.items() if getattr(self, name) is None})
