"""The length of a run in steps, tokens or minutes, and how much of it has been used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from decausal.compare.arms import ArmRun
from decausal.compare.settings import DEFAULT_TOKENS, CompareSettings
from decausal.data.prompts import Prompts, load_prompts
from decausal.data.rows import PackedRows, load_rows
from decausal.errors import UserError
from decausal.training.meters import TokenCounts

MEAN_NOISE_LEVEL = 0.5


@dataclass(frozen=True)
class Budget:
    """The budget of each run.

    Attributes:
        kind: The unit: "steps", "tokens" or "minutes".
        amount: How many of them.
        tokens: The tokens that count, for "tokens".
    """

    kind: Literal["steps", "tokens", "minutes"]
    amount: float
    tokens: str = "clean"

    @classmethod
    def of(cls, settings: CompareSettings) -> Budget:
        if settings.max_steps is not None:
            return cls("steps", float(settings.max_steps))
        if settings.budget_minutes is not None:
            return cls("minutes", settings.budget_minutes)
        return cls("tokens", float(settings.budget_tokens or DEFAULT_TOKENS), settings.tokens)

    def progress(self, step: int, counts: TokenCounts, seconds: float) -> float:
        """Returns the used share, which may exceed 1 by one step."""
        used = {"steps": step, "tokens": getattr(counts, self.tokens), "minutes": seconds / 60}
        return used[self.kind] / self.amount

    def sentence(self) -> str:
        words = {"steps": "steps", "tokens": f"{self.tokens} training tokens", "minutes": "minutes of training"}
        return f"{self.amount:,g} {words[self.kind]}"


def steps_for_tokens(budget: Budget, run: ArmRun, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the number of steps in which a run uses up its tokens. Schedules are laid out for it.

    A run ends when its tokens are used up. So an estimate that is too high cuts off its schedules, and one that is too
    low leaves tokens unused. Only the prompts of rollouts are known in advance. Rollouts are assumed to be as long as
    the answers in the data, or as long as possible if there are none.
    """
    rows = training_rows(run, tokenizer)
    if isinstance(rows, Prompts):
        return max(1, round(budget.amount / _counted_per_clean_token(budget, run) / _tokens_of_rollouts(rows, run)))
    rows_per_step = _rows_per_step(run)
    per_packed_step = rows_per_step * rows.num_tokens / len(rows)
    per_rollout_step = rows_per_step * rows.num_tokens / rows.num_documents
    share_on_corpus = 1.0 if _of(run, "rows", "corpus") == "corpus" else 0.0
    warm_start = _of(run, "warm_start_steps", 0) or 0
    per_step = per_packed_step if share_on_corpus else per_rollout_step
    amount = budget.amount / _counted_per_clean_token(budget, run)
    if share_on_corpus == 0.0 and warm_start:
        if warm_start < 1:
            per_step = warm_start * per_packed_step + (1 - warm_start) * per_rollout_step
        else:
            rest = max(0.0, amount - warm_start * per_packed_step)
            return max(1, round(min(warm_start, amount / per_packed_step) + rest / per_rollout_step))
    return max(1, round(amount / per_step))


def _rows_per_step(run: ArmRun) -> int:
    return run.training["per_device_train_batch_size"] * run.training.get("gradient_accumulation_steps", 1)


def _tokens_of_rollouts(prompts: Prompts, run: ArmRun) -> float:
    """Returns the tokens of an optimizer step on rollouts of the maximum length."""
    lengths = [len(prompts[index]) + run.conversion.rollout_tokens for index in range(len(prompts))]
    return _rows_per_step(run) * sum(min(each, run.conversion.max_length) for each in lengths) / len(lengths)


def training_rows(run: ArmRun, tokenizer: PreTrainedTokenizerBase) -> PackedRows | Prompts:
    """Returns the rows that `convert` will load. They are packed now, so that no run's clock waits for it.

    Returns the prompts if a run needs no answers and the data hold none.

    Raises:
        UserError: The data cannot be read.
    """
    conversion = run.conversion
    data = list(conversion.data) if isinstance(conversion.data, tuple) else conversion.data
    common = {"reading": conversion.reading, "data_fraction": conversion.data_fraction, "seed": run.seed}
    try:
        return load_rows(data, tokenizer, conversion.max_length, **common)
    except UserError:
        if conversion.rows == "corpus" or conversion.warm_start_steps:
            raise
    return load_prompts(
        data,
        tokenizer,
        conversion.max_length,
        conversion.block_size,
        prompt_fraction=conversion.prompt_fraction,
        **common,
    )


def steps_for_minutes(budget: Budget, steps_tried: int, seconds_tried: float) -> int:
    """Returns the number of steps in which a run uses up its minutes, from the time of a trial."""
    return max(1, math.floor(budget.amount * 60 * steps_tried / max(seconds_tried, 1e-9)))


def _counted_per_clean_token(budget: Budget, run: ArmRun) -> float:
    if budget.tokens == "supervised":
        return MEAN_NOISE_LEVEL * run.conversion.views
    if budget.tokens == "total" and _of(run, "rows", "corpus") != "corpus":
        return 2.0
    return 1.0


def _of(run: ArmRun, name: str, default: Any) -> Any:
    return getattr(run.conversion, name, default)
