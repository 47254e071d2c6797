"""Rollouts: answers of the model in training to prompts, written by the engine that also serves models.

A rollout is kept as token ids, on the block grid that starts with its prompt. Text could come back as other tokens.
Blocks are kept whole, since the student saw whole blocks while it wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decausal.devices import choices
from decausal.models.backbone import stock_model
from decausal.models.block_cache import decoding
from decausal.models.checkpoint import Converted
from decausal.models.facts import ConversionFacts
from decausal.sampling.blocks.engine import BlockEngine
from decausal.sampling.blocks.recording import PATIENCE, CudaGraphs, PassRecorder
from decausal.sampling.blocks.speculative import SpeculativeEngine
from decausal.sampling.jobs import Ended, Job, run
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings

NEVER = torch.iinfo(torch.int64).max
"""Step of a position that was never unmasked, because it is after the end."""


@dataclass(frozen=True)
class Rollout:
    """A prompt and what the student wrote after it.

    Attributes:
        ids: Tokens from the prompt's first to the end of the last block, which may be after the answer's end.
        prompt_length: Tokens of the prompt.
        end: Position after the answer's last token, which is the end token unless the answer was truncated.
        step_of_token: The step of its block in which each position was unmasked; -1 for the prompt, `NEVER` if the
            rollout ended before.
        num_forwards: Model calls that the row took part in.
        has_ended: Whether the answer has an end token; else it was truncated.
    """

    ids: Int[Tensor, " T"]
    prompt_length: int
    end: int
    step_of_token: Int[Tensor, " T"]
    num_forwards: int
    has_ended: bool

    @property
    def is_answer(self) -> Bool[Tensor, " T"]:
        """The tokens to train on: the written ones, up to and including the end token."""
        position = torch.arange(len(self.ids))
        return (position >= self.prompt_length) & (position < self.end)

    def as_dict(self) -> dict[str, Any]:
        """Returns only tensors and numbers, for a checkpoint."""
        return dict(vars(self))


@dataclass(frozen=True)
class Task:
    """One rollout to make."""

    prompt_ids: Int[Tensor, " P"]
    num_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Decoding:
    """Decodes rollouts.

    Attributes:
        facts: Layout, block size, shift and mask token of the model.
        settings: Temperature, threshold and truncation.
        end_token_ids: Tokens that end an answer.
        max_rows: Rows decoded together.
    """

    facts: ConversionFacts
    settings: SamplerSettings
    end_token_ids: tuple[int, ...]
    max_rows: int

    def roll_out(self, model: nn.Module, tasks: Sequence[Task]) -> list[Rollout]:
        """Returns a rollout for each task, in order. The model's mode is restored.

        The engine and its cache are freed after the call, since the training step needs their memory.
        """
        if not tasks:
            return []
        options: dict[str, Any] = {
            "max_rows": min(self.max_rows, len(tasks)),
            "max_length": max(len(task.prompt_ids) + task.num_new_tokens for task in tasks),
            "record": _recorder(model),
        }
        jobs = [
            Job(
                Row((task.prompt_ids.tolist(), []), (task.num_new_tokens,), "the prompt"),
                self.settings,
                task.seed,
                self.end_token_ids,
            )
            for task in tasks
        ]
        with decoding(model):  # once for all passes: leaving training mode takes time, module by module
            if self.settings.speculative:
                verifying = SpeculativeEngine(_without_tokenizer(model, self.facts), **options)
                verified = dict(run(verifying, jobs))
                return [verified_rollout(task.prompt_ids, verified[index]) for index, task in enumerate(tasks)]
            engine = BlockEngine(model, self.facts, **options)
            ended = dict(run(engine, jobs))
        return [as_rollout(task.prompt_ids, ended[index], engine.block_size) for index, task in enumerate(tasks)]


def _recorder(model: nn.Module) -> PassRecorder | None:
    """Returns what records passes on a GPU, unless weights are sharded, which then do not stay at their addresses."""
    is_sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    return CudaGraphs(PATIENCE) if choices(stock_model(model).device).records and not is_sharded else None


def _without_tokenizer(model: nn.Module, facts: ConversionFacts) -> Converted:
    """Returns a model for the engine. Rollouts have no stop texts, so no tokenizer is needed."""
    return Converted(cast(PreTrainedModel, model), cast(PreTrainedTokenizerBase, None), facts)


def verified_rollout(prompt_ids: Int[Tensor, " P"], row: Ended) -> Rollout:
    """Puts the prompt before the text of verified decoding, which is the causal model's own text."""
    ids = torch.cat([prompt_ids, torch.tensor(row.ids, dtype=torch.int64)])
    return Rollout(
        ids=ids,
        prompt_length=len(prompt_ids),
        end=len(ids),
        step_of_token=torch.cat([torch.full_like(prompt_ids, -1), torch.tensor(row.step_of_token, dtype=torch.int64)]),
        num_forwards=row.num_forwards,
        has_ended=row.reason == "end",
    )


def as_rollout(prompt_ids: Int[Tensor, " P"], row: Ended, block_size: int) -> Rollout:
    """Puts the prompt before the blocks that were written.

    Positions after the end that were never kept get the end token, since a clean row holds no masks.
    """
    first = row.blocks.first * block_size
    ids = torch.cat([prompt_ids[:first], torch.tensor(row.blocks.ids, dtype=torch.int64)])
    steps = torch.cat([torch.full((first,), -1), torch.tensor(row.blocks.steps, dtype=torch.int64)])
    is_never = (steps < 0) & (torch.arange(len(ids)) >= len(prompt_ids))
    return Rollout(
        ids=torch.where(is_never, row.ids[-1], ids),
        prompt_length=len(prompt_ids),
        end=len(prompt_ids) + len(row.ids),
        step_of_token=torch.where(is_never, NEVER, steps),
        num_forwards=row.num_forwards,
        has_ended=row.reason == "end",
    )
