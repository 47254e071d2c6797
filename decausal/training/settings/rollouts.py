"""Settings for the rows that a run trains on: the corpus's, or the student's own answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from decausal.errors import UserError
from decausal.training.settings.data import DataSettings
from decausal.training.settings.field import at_least, check_step, inside_unit, setting, share
from decausal.training.settings.noise import NoiseSettings


@dataclass(frozen=True)
class RolloutSettings(NoiseSettings, DataSettings):
    """On-policy rows."""

    rows: Literal["corpus", "rollout"] = setting(
        "corpus", "corpus: the data, noised; rollout: what the student writes after the data's prompts (layout block)"
    )
    warm_start_steps: int | float = setting(
        0, "steps on corpus rows before rollouts begin; below 1: a share of the run"
    )
    prompt_fraction: float = setting(0.5, "share of each plain text that serves as its prompt")
    rollout_prompts: int | None = setting(
        None,
        "prompts rolled out at a time, over all processes: a multiple of the rows of an optimizer step; unset: those "
        "of one step",
    )
    rollout_updates: int = setting(1, "times each rollout is trained on, in other states each time")
    states_per_rollout: int = setting(1, "states of a rollout in one training row; they share its clean tokens")
    state_choice: Literal["block", "sequence"] = setting(
        "block", "block: a denoising step is drawn for each block; sequence: one for all blocks together"
    )
    rollout_tokens: int = setting(
        128, "new tokens of a rollout, up to the end of a block and at most what max_length leaves"
    )
    rollout_tokens_start: int | None = setting(
        None, "new tokens in the first rollout batch; unset: rollout_tokens from the start"
    )
    rollout_curriculum: int = setting(0, "rollout batches over which new tokens grow to rollout_tokens")
    rollout_temperature: float = setting(1.0, "temperature of rollouts")
    rollout_threshold: float = setting(0.9, "a step keeps every token at least this probable")
    rollout_top_k: int | None = setting(None, "rollouts sample among this many tokens; unset: all")
    rollout_top_p: float | None = setting(
        None, "rollouts sample among the fewest tokens with this probability; unset: all"
    )
    rollout_batch_size: int = setting(32, "rows decoded together; changes memory and speed, not the rollouts")

    def check(self) -> None:
        at_least(self, rollout_prompts=1, rollout_updates=1, states_per_rollout=1)
        at_least(self, rollout_tokens=1, rollout_tokens_start=1, rollout_curriculum=0, rollout_temperature=0)
        at_least(self, rollout_top_k=1, rollout_batch_size=1)
        inside_unit(self, "prompt_fraction")
        share(self, "rollout_threshold", "rollout_top_p")
        check_step("warm_start_steps", self.warm_start_steps)
        if self.rows == "corpus" and self.warm_start_steps:
            raise UserError("--warm_start_steps is for --rows rollout: it says when rollouts begin")
        if self.rows == "rollout" and self.streaming:
            raise UserError(
                "--streaming true is for --rows corpus: rollouts draw their prompts from all of the data, which "
                "are read before; leave it out"
            )

    def check_facts(self) -> None:
        if self.rows == "rollout" and self.layout != "block":
            raise UserError(f"--rows rollout needs --layout block, not {self.layout}: they are written block by block")
        self.refuse_for_groups(states_per_rollout=1)
