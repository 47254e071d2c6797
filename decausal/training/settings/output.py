"""Settings for the directory that a run writes."""

from __future__ import annotations

from dataclasses import dataclass

from decausal.errors import UserError
from decausal.sampling.settings import SamplerSettings
from decausal.training.settings.field import setting
from decausal.training.settings.layout import LayoutSettings


@dataclass(frozen=True)
class OutputSettings(LayoutSettings):
    """Output."""

    sampler: dict | None = setting(
        None, "default sampler settings to store with the model, for example {window: 32, threshold: 0.8}"
    )
    overwrite: bool = setting(False, "start again in an output_dir that an earlier run made")

    def check(self) -> None:
        self._sampler()

    def check_facts(self) -> None:
        sampler = self._sampler()
        try:
            sampler.refuse_layout(self.layout, self.shift)
        except UserError as error:
            raise UserError(f"--sampler: {error}") from error

    def _sampler(self) -> SamplerSettings:
        unnamed = [name for name in self.sampler or {} if not isinstance(name, str)]
        if unnamed:
            raise UserError(f"--sampler: {unnamed[0]!r} is not the name of a setting; write {{name: value}}")
        try:
            return SamplerSettings().updated(**self.sampler or {})
        except UserError as error:
            raise UserError(f"--sampler: {error}") from error
