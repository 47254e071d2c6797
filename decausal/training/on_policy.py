"""On-policy rows: rollouts of the model in training, made in batches just before training on them.

Everything except the rollouts' tokens is a function of (seed, position in the run): the prompt of a row, the random
numbers of its rollout, and the states to train on. So a run resumes from its position and its current rollouts, which
checkpoints hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from decausal.data.block_collator import BlockCollator
from decausal.data.counts import counted
from decausal.data.group_collator import GroupCollator
from decausal.data.prompts import Prompts
from decausal.data.stream import Batch, TrainingStream, places_of_groups
from decausal.diffusion.grouping import Grouping
from decausal.errors import UserError
from decausal.training.rollout_states import StateChoice, relative_steps, rows_of, states_of
from decausal.training.rollouts import Rollout, Task

POSITIONS = "rollout_positions"
RollOut = Callable[[Sequence[Task]], list[Rollout]]
_ORDER, _SEEDS = 0x0DE2, 0x5EED


@dataclass(frozen=True)
class RolloutPlan:
    """How many rollouts are made at a time, how long they are, and how they are trained on.

    Attributes:
        prompts: Prompts in a rollout batch, over all processes: a multiple of the rows of an optimizer step.
        updates: Times each rollout is trained on, each time in newly drawn states.
        states: States of a rollout in one training row.
        state_choice: See `relative_steps`.
        tokens: New tokens of a rollout; the last block is always whole.
        start_tokens: The same in the first rollout batch.
        curriculum: Rollout batches over which the number grows.
        max_length: Tokens of prompt and rollout together.
        block_size: Tokens per block; 1 where rollouts know no blocks.
        grouping: Where drafts are trained, groups of masks instead of states that rollouts went through.
    """

    prompts: int
    updates: int
    states: int
    state_choice: StateChoice
    tokens: int
    start_tokens: int
    curriculum: int
    max_length: int
    block_size: int
    grouping: Grouping | None = None

    @property
    def rows(self) -> int:
        """Training rows of a rollout batch."""
        return self.prompts * self.updates

    def num_new_tokens(self, batch: int, prompt_length: int) -> int:
        """Returns how many tokens a rollout writes in a batch: up to the end of the block that its budget reaches."""
        grown = 1.0 if not self.curriculum else min(1.0, batch / self.curriculum)
        budget = round(self.start_tokens + (self.tokens - self.start_tokens) * grown)
        num_blocks = -(-(prompt_length + budget) // self.block_size)
        return min(num_blocks, self.max_length // self.block_size) * self.block_size - prompt_length


@dataclass
class Tally:
    """Figures of the rollouts since the last log line."""

    rollouts: int = 0
    tokens: int = 0
    forwards: int = 0
    ended: int = 0
    batches: int = 0
    staleness: int = 0


@dataclass
class OnPolicyRows:
    """Makes training batches of the rows at given positions, with new rollouts when a new rollout batch begins.

    Attributes:
        prompts: The prompts of rollouts, in a new order in every epoch.
        plan: The sizes of rollouts and batches.
        collator: Makes batches of packed rollouts.
        seed: The run's seed.
        first_row: Position of the first on-policy row, after the warm start's rows.
        end_row: Position after the last row of the run.
        rows_per_batch: Rows of a micro-batch.
        process: Index of this process, which rolls out the rows that it trains on.
        num_processes: Number of processes.
    """

    prompts: Prompts
    plan: RolloutPlan
    collator: BlockCollator | GroupCollator
    seed: int
    first_row: int
    end_row: int
    rows_per_batch: int
    process: int = 0
    num_processes: int = 1
    tally: Tally = field(default_factory=Tally)
    _batch: int = -1
    _made_at: int = 0
    _rollouts: dict[int, Rollout] = field(default_factory=dict)
    _epoch: int = -1
    _order: Any = None

    def batch(self, positions: Sequence[int], step: int, roll_out: RollOut) -> Batch:
        """Returns the training batch of the rows at `positions`, on the CPU.

        Args:
            positions: Training rows, counted from the start of the run, all from one rollout batch.
            step: The optimizer step in which they are trained on.
            roll_out: Makes rollouts with the current model.
        """
        generated_before = self.tally.tokens
        number = (positions[0] - self.first_row) // self.plan.rows
        indices = [(position - self.first_row) % self.plan.rows % self.plan.prompts for position in positions]
        if number != self._batch or not self._rollouts.keys() >= set(indices):
            self._roll_out_batch(number, step, roll_out)
        rollouts = [self._rollouts[index] for index in indices]
        self.tally.batches += 1
        self.tally.staleness += step - self._made_at
        batch = self.collator(self._items(rollouts, positions))
        generated = counted(generated=self.tally.tokens - generated_before)
        return batch | {"counts": batch["counts"] | generated}

    def _items(self, rollouts: Sequence[Rollout], positions: Sequence[int]) -> list[dict[str, Tensor]]:
        """Packs rollouts into rows, with the states or groups of masks to train on."""
        if self.plan.grouping is None:
            return rows_of(rollouts, [self._states(*pair) for pair in zip(rollouts, positions, strict=True)])
        unnoised = [torch.zeros(0, len(rollout.ids), dtype=torch.bool) for rollout in rollouts]
        at = {"position": positions[0], "seed": self.seed, "num_rows": self.end_row}
        return [item | places_of_groups(item, self.plan.grouping, **at) for item in rows_of(rollouts, unnoised)]

    def _states(self, rollout: Rollout, position: int) -> Tensor:
        num_blocks = -(-len(rollout.ids) // self.plan.block_size)
        relative = relative_steps(
            num_blocks, self.plan.states, self.plan.state_choice, position=position, seed=self.seed
        )
        return states_of(rollout, self.plan.block_size, relative)

    def _roll_out_batch(self, number: int, step: int, roll_out: RollOut) -> None:
        """Makes this process's rollouts of a rollout batch, without those after the end of the run.

        Completes the current batch: a run that is extended may lack some.
        """
        if number != self._batch:
            self._rollouts = {}  # frees their memory while the next ones are made
            self._batch, self._made_at = number, step
        left = self.end_row - self.first_row - number * self.plan.rows
        missing = [
            index
            for index in range(min(self.plan.prompts, left))
            if index // self.rows_per_batch % self.num_processes == self.process and index not in self._rollouts
        ]
        rollouts = roll_out([self._task(number, index) for index in missing])
        self._rollouts |= zip(missing, rollouts, strict=True)
        self.tally.rollouts += len(rollouts)
        self.tally.tokens += sum(rollout.end - rollout.prompt_length for rollout in rollouts)
        self.tally.forwards += sum(rollout.num_forwards for rollout in rollouts)
        self.tally.ended += sum(rollout.has_ended for rollout in rollouts)

    def _task(self, batch: int, index: int) -> Task:
        number = batch * self.plan.prompts + index
        prompt_ids = self.prompts[self.prompt_index(number)]
        drawn = np.random.default_rng([self.seed % 2**64, number, _SEEDS]).integers(2**62)
        return Task(prompt_ids, self.plan.num_new_tokens(batch, len(prompt_ids)), int(drawn))

    def prompt_index(self, number: int) -> int:
        """Returns the prompt of a rollout, by its number from the start of the run."""
        epoch, offset = divmod(number, len(self.prompts))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed % 2**64, epoch, _ORDER]).permutation(len(self.prompts))
            self._epoch = epoch
        return int(self._order[offset])

    # Checkpoints

    def save(self, directory: Path) -> None:
        """Writes the current rollouts into a checkpoint. Each process writes its own."""
        rollouts = {index: rollout.as_dict() for index, rollout in self._rollouts.items()}
        torch.save({"batch": self._batch, "made_at": self._made_at, "rollouts": rollouts}, self._file(directory))

    def load(self, directory: Path) -> None:
        """Restores the rollouts of a checkpoint.

        Raises:
            UserError: It was saved with another number of processes.
        """
        if not self._file(directory).is_file():
            raise UserError(
                f"{directory} holds no rollouts of process {self.process} of {self.num_processes}; "
                "resume with as many processes as the run was started with"
            )
        saved = torch.load(self._file(directory), weights_only=True)
        self._batch, self._made_at = saved["batch"], saved["made_at"]
        self._rollouts = {index: Rollout(**fields) for index, fields in saved["rollouts"].items()}

    def _file(self, directory: Path) -> Path:
        return directory / f"rollouts-{self.process}-of-{self.num_processes}.pt"

    # Logs

    def take_totals(self) -> list[float]:
        """Returns the tally's fields in order, to be summed over processes, and resets it."""
        totals = [float(value) for value in asdict(self.tally).values()]
        self.tally = Tally()
        return totals

    @staticmethod
    def means(totals: Sequence[float]) -> dict[str, float]:
        """Returns the logged values: means over rollouts, and the steps between a rollout and its training."""
        rollouts, tokens, forwards, ended, batches, staleness = totals
        logs = {}
        if rollouts:
            logs |= {"rollout_length": tokens / rollouts, "rollout_ended": ended / rollouts}
            logs |= {"rollout_tokens_per_forward": tokens / max(forwards, 1)}
        if batches:
            logs |= {"rollout_staleness": staleness / batches}
        return {name: round(value, 4) for name, value in logs.items()}


class OnPolicyStream(Dataset[dict[str, Any]]):
    """The run's rows: the warm start's from `corpus`, then positions, which the trainer turns into batches.

    A data loader reads ahead, so rollouts made here would be those of an older model.
    """

    def __init__(self, rows: OnPolicyRows, corpus: TrainingStream | None) -> None:
        self.on_policy = rows
        self.corpus = corpus

    def __len__(self) -> int:
        return self.on_policy.end_row

    def __getitem__(self, position: int) -> dict[str, Any]:
        if position < self.on_policy.first_row and self.corpus is not None:
            return self.corpus[position]
        return {POSITIONS: position}

    def epochs(self, position: int | float) -> float:
        """Returns how many times all rows, and then all prompts, have been read at a position of the run."""
        first_row, plan = self.on_policy.first_row, self.on_policy.plan
        on_policy = max(0, position - first_row) / plan.updates / len(self.on_policy.prompts)
        return on_policy + (self.corpus.epochs(min(position, first_row)) if self.corpus else 0.0)


def parts_of(stream: TrainingStream | OnPolicyStream) -> list[Any]:
    """Returns what a run reads: packed rows (of streamed ones the first), prompts, or both."""
    if not isinstance(stream, OnPolicyStream):
        return [stream.sample]
    return [stream.on_policy.prompts] + ([] if stream.corpus is None else [stream.corpus.rows])


@dataclass(frozen=True)
class OnPolicyCollator:
    """Collates rows of the warm start. For on-policy rows it only lists the positions."""

    corpus: Callable[[Sequence[dict[str, Tensor]]], Batch]

    def __call__(self, items: Sequence[dict[str, Any]]) -> Batch:
        if POSITIONS in items[0]:
            return {POSITIONS: torch.tensor([item[POSITIONS] for item in items])}
        return self.corpus(items)
