"""The rows that a run trains on: rows of the corpus, rollouts, or first one and then the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from decausal.data.block_collator import BlockCollator
from decausal.data.chat import answer_end_ids
from decausal.data.encode import SpecialTokens
from decausal.data.group_collator import GroupCollator
from decausal.data.prompts import Prompts, load_prompts
from decausal.data.stream import Batch, Collator, Noising, Rows, TrainingStream
from decausal.data.streamed_rows import StreamedRows
from decausal.devices import choices
from decausal.errors import UserError
from decausal.models.architecture import context_length
from decausal.models.checkpoint import Converted
from decausal.models.facts import ConversionFacts
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.stopping import end_token_ids
from decausal.training.corpus_rows import corpus_of_run, corpus_rows
from decausal.training.on_policy import OnPolicyCollator, OnPolicyRows, OnPolicyStream, RolloutPlan
from decausal.training.rollouts import Decoding
from decausal.training.run import rows_per_step
from decausal.training.schedule import steps
from decausal.training.settings import ConversionSettings
from decausal.wording import quantity


@dataclass(frozen=True)
class RunRows:
    """The rows of a run, for the trainer.

    Attributes:
        stream: The run's rows.
        collator: Makes batches of them.
        facts: The run's facts, with the tokens that end answers in conversations, if there are any.
        decoding: How rollouts are made; None without rollouts.
    """

    stream: TrainingStream | OnPolicyStream
    collator: Callable[[Sequence[dict[str, Any]]], Batch]
    facts: ConversionFacts
    decoding: Decoding | None = None


def rows_of_run(
    settings: ConversionSettings,
    args: TrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: ConversionFacts,
) -> RunRows:
    """Returns the rows of a run, and sets `args.max_steps` if its length is given in epochs.

    Raises:
        UserError: The data cannot be read or has nothing to train on, or settings of rollouts contradict each other.
    """
    collator = collator_of(settings, facts, context_length(model.config), choices(args.device).row_multiple)
    if settings.rows == "corpus":
        rows, num_rows = corpus_of_run(settings, args, tokenizer, settings.data_fraction)
        facts = _with_ends(facts, tokenizer, rows.has_conversations)
        return RunRows(stream_of(settings, rows, num_rows, args.seed), collator, facts)
    prompts = _prompts(settings, tokenizer, args.seed)
    first_row, end_row = _course(args, settings, len(prompts))
    on_policy = _on_policy_rows(settings, args, prompts, collator, first_row, end_row)
    corpus = None
    if first_row:
        rows = corpus_rows(settings, settings.data, settings.reading, tokenizer, args.seed, settings.data_fraction)
        corpus = stream_of(settings, rows, first_row, args.seed)
    facts = _with_ends(facts, tokenizer, prompts.has_conversations)
    decoding = _decoding(settings, model, tokenizer, facts)
    return RunRows(OnPolicyStream(on_policy, corpus), OnPolicyCollator(collator), facts, decoding)


def _with_ends(facts: ConversionFacts, tokenizer: PreTrainedTokenizerBase, has_conversations: bool) -> ConversionFacts:
    """Adds the chat template's ends of answers, if a run trains on conversations or answers them."""
    if not has_conversations:
        return facts
    ends = answer_end_ids(tokenizer, SpecialTokens(tokenizer).ids)
    return replace(facts, end_token_ids=list(dict.fromkeys([*facts.end_token_ids, *ends])))


def stream_of(settings: ConversionSettings, rows: Rows | StreamedRows, num_samples: int, seed: int) -> TrainingStream:
    """Returns the training rows of a run, noised as its settings say."""
    noising = settings.grouping if settings.noise == "all" else _noising(settings)
    return TrainingStream(rows, num_samples, seed=seed, shift=settings.shift, noising=noising)


def _noising(settings: ConversionSettings) -> Noising:
    return Noising(
        views=settings.views,
        complementary=settings.complementary_masks,
        stratified=settings.stratified_noise,
        block_size=settings.block_size if settings.noise_per == "block" else None,
    )


def collator_of(
    settings: ConversionSettings, facts: ConversionFacts, context: int | None, row_multiple: int
) -> Collator | BlockCollator | GroupCollator:
    """Returns what makes batches of a run's rows.

    Args:
        settings: The run's settings.
        facts: Its facts.
        context: Positions that the model has, None for no limit.
        row_multiple: Rows of varying length are padded to a multiple of this.
    """
    if settings.noise == "all":
        return GroupCollator(context, settings.offset_gamma, settings.kl_mean, row_multiple)
    common = {
        "weighting": settings.weighting,
        "aligned_positions": settings.align_positions,
        "kl_mean": settings.kl_mean,
    }
    if facts.layout == "block":
        common |= {"context_length": context, "row_multiple": row_multiple}
        return BlockCollator(facts.mask_token_id, facts.shift, facts.attention, **common)
    return Collator(facts.mask_token_id, facts.shift, **common)


# Rollouts


def _prompts(settings: ConversionSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> Prompts:
    return load_prompts(
        settings.data,
        tokenizer,
        settings.max_length,
        1 if settings.noise == "all" else settings.block_size,
        prompt_fraction=settings.prompt_fraction,
        reading=settings.reading,
        data_fraction=settings.data_fraction,
        seed=seed,
    )


def _course(args: TrainingArguments, settings: ConversionSettings, num_prompts: int) -> tuple[int, int]:
    """Returns the rows at which rollouts begin and the run ends. Epochs count passes over the prompts."""
    share = settings.warm_start_steps
    if args.max_steps < 0:
        rollouts = max(
            1, math.ceil(args.num_train_epochs * num_prompts * settings.rollout_updates / rows_per_step(args))
        )
        args.max_steps = round(rollouts / (1 - share)) if share < 1 else int(share) + rollouts
    warm = steps(share, args.max_steps) or 0
    if warm >= args.max_steps:
        raise UserError(
            f"--warm_start_steps {share}: the whole run of {quantity(args.max_steps, 'step')} is "
            f"warm start; raise --max_steps, or "
            "give --rows corpus"
        )
    return warm * rows_per_step(args), args.max_steps * rows_per_step(args)


def _on_policy_rows(
    settings: ConversionSettings,
    args: TrainingArguments,
    prompts: Prompts,
    collator: BlockCollator | GroupCollator,
    first_row: int,
    end_row: int,
) -> OnPolicyRows:
    per_step = rows_per_step(args)
    num_prompts = settings.rollout_prompts or per_step
    if num_prompts % per_step:
        raise UserError(
            f"--rollout_prompts {num_prompts} is not a multiple of the {per_step} rows of an optimizer step "
            "(per_device_train_batch_size x gradient_accumulation_steps x processes)"
        )
    start_tokens = settings.rollout_tokens_start
    plan = RolloutPlan(
        prompts=num_prompts,
        updates=settings.rollout_updates,
        states=settings.states_per_rollout,
        state_choice=settings.state_choice,
        tokens=settings.rollout_tokens,
        start_tokens=settings.rollout_tokens if start_tokens is None else start_tokens,
        curriculum=settings.rollout_curriculum,
        max_length=settings.max_length,
        block_size=1 if settings.noise == "all" else settings.block_size,  # verified decoding has no blocks
        grouping=settings.grouping if settings.noise == "all" else None,
    )
    return OnPolicyRows(
        prompts=prompts,
        plan=plan,
        # A visited state has no noise level.
        collator=replace(collator, weighting="none") if isinstance(collator, BlockCollator) else collator,
        seed=args.seed,
        first_row=first_row,
        end_row=end_row,
        rows_per_batch=args.per_device_train_batch_size,
        process=args.process_index,
        num_processes=args.world_size,
    )


def _decoding(
    settings: ConversionSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: ConversionFacts
) -> Decoding:
    return Decoding(
        facts=facts,
        settings=SamplerSettings(
            temperature=settings.rollout_temperature,
            top_k=settings.rollout_top_k,
            top_p=settings.rollout_top_p,
            **({"speculative": True} if settings.noise == "all" else {"threshold": settings.rollout_threshold}),
        ),
        end_token_ids=end_token_ids(Converted(model, tokenizer, facts)),
        max_rows=settings.rollout_batch_size,
    )
