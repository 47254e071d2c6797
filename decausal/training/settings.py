"""What a user can set for a conversion, apart from transformers' own training arguments.

This file is light: the command line reads the class to print its help.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from decausal.data.reading import Reading
from decausal.diffusion.grouping import Grouping
from decausal.errors import UserError
from decausal.sampling.settings import BLOCKS, SamplerSettings, names_for
from decausal.training.setting_fields import (
    at_least,
    check_step,
    check_steps,
    inside_unit,
    reading_of,
    setting,
    whole_numbers,
)


@dataclass(frozen=True)
class ConversionSettings:
    """One conversion: a point on the grid of layout, shift, rows and supervision, and the data it is trained on."""

    model_name_or_path: str = setting(
        "tiny",
        "the AR model to convert, or a converted model to train further: a directory, a hub id, a GGUF file here or on "
        "the hub (owner/name/file.gguf), or an embedded model (tiny, tiny-tasks)",
    )
    merge_adapter: bool = setting(
        False, "where the model is a PEFT adapter: merge it into the model that it was trained on, and convert that"
    )
    revision: str | None = setting(None, "branch, tag or commit of a hub model")
    attn_implementation: str | None = setting(
        None,
        "sdpa, eager or, on a GPU, flex_attention, which skips what no token reads; unset: what the architecture needs",
    )
    data: str | tuple[str, ...] | None = setting(
        None, "what to train on: a file, directory, glob, hub data set, stdlib or tasks; several with commas"
    )
    eval_data: str | tuple[str, ...] | None = setting(
        None,
        "held-out data of the same kinds; its NELBO per token, bits per byte and masked cross-entropy (noise all: the "
        "drafts' accuracy and tokens per pass) are logged every eval_steps (a tenth of the run) and at the end",
    )
    eval_rows: int = setting(64, "rows of eval_data to measure on")
    sample_prompts: str | None = setting(
        None, "a file of prompts, one per line; at each evaluation the run shows and keeps how the model continues them"
    )
    sample_tokens: int = setting(64, "new tokens of each sample")
    text_field: str = setting("text", "the field of a record that holds its text")
    prompt_field: str = setting("prompt", "the field of a record that holds its prompt; used with completion_field")
    completion_field: str = setting("completion", "the field of a record that holds the answer to its prompt")
    dataset_split: str = setting("train", "the split of a hub data set, or of a directory that has splits")
    on_bad_record: Literal["error", "skip"] = setting(
        "error", "a record that cannot be used ends the run (error), or is counted and left out (skip)"
    )
    chat_template: str | None = setting(
        None, "a file with the chat template for conversations, saved with the model; unset: the tokenizer's own"
    )
    chat_template_kwargs: dict | None = setting(  # noqa: RUF009
        None, "values that the template reads, saved with it as defaults: '{\"enable_thinking\": false}'"
    )
    data_fraction: float = setting(1.0, "share of the documents to train on; the same seed chooses the same documents")
    max_length: int = setting(512, "tokens in a packed row; at most the model's context")

    layout: Literal["causal", "bidirectional", "block"] | None = setting(
        None,
        "who attends to whom after the conversion; block: in both directions inside a block, causal over blocks; "
        "unset: that of a converted model, else bidirectional",
    )
    block_size: int | None = setting(None, "tokens per block, for layout block; unset: that of a converted model")
    causal_context: bool | None = setting(
        None,
        "layout block: finished tokens read each other causally, as in the AR model, instead of in both directions "
        "inside their block; unset: that of a converted model, else false",
    )
    causal_groups: bool | None = setting(
        None,
        "layout block: masks read no later masks of their block, so that its first drafts do not depend on its length; "
        "such a model drafts for verified decoding alone; unset: that of a converted model, else false",
    )
    weights: Literal["shared", "gated"] | None = setting(
        None,
        "shared: one set of weights reads text and masks; gated: LoRA adapters and the mask token's row act at masks "
        "alone, so that the AR model stays as it is, byte for byte, and verifies the drafts (needs noise all); unset: "
        "that of a converted model, else shared",
    )
    reference_base: bool = setting(
        False, "gated weights: leave the AR model's files out of output_dir, which then names its hub id and commit"
    )
    shift: Literal[0, 1] | None = setting(
        None,
        "1: the state before a token predicts it, as in the AR model; 0: the state at its own place does; unset: that "
        "of a converted model, else 1",
    )
    mask_token: str | None = setting(
        None, "text of the mask token; unset: the tokenizer's own, else <|mask|> on a spare or an added row"
    )
    anneal_steps: int = setting(0, "steps over which attention opens from causal to the layout; 0: open from the start")

    noise: Literal["level", "all"] = setting(
        "level",
        "level: each token is masked with a chance that is drawn; all: groups of block_size masks, which draft in one "
        "step the tokens that verified decoding tests (layout block, causal_context, shift 1)",
    )
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
    views: int = setting(1, "noised views of a clean row in one step; they share one teacher pass")
    complementary_masks: bool = setting(False, "with 2 views, the second masks exactly what the first leaves")
    stratified_noise: bool = setting(
        True, "spread noise levels evenly over neighbouring rows; false: draw them independently"
    )
    noise_per: Literal["document", "block"] = setting(
        "document", "what has its own noise level; block is for layout block"
    )
    weighting: Literal["none", "inverse_t"] = setting(
        "none", "none: mean over masked tokens; inverse_t: weight 1/t, mean over predictable tokens (the NELBO)"
    )
    token_weight: float = setting(1.0, "weight of the token loss")
    token_schedule: Literal["constant", "linear", "cosine"] = setting("constant", "how the weight falls over the run")
    token_start_step: int | float = setting(0, "first step with this loss: a number, or a share of the run below 1")
    token_stop_step: int | float | None = setting(
        None, "first step without this loss: a number, or a share of the run below 1"
    )
    papl: float = setting(
        0.0, "weight of a second token term, mean of stop_gradient(p) * CE, 1 in REPR-ALIGN's code; 0: off"
    )

    clean_weight: float = setting(
        0.0,
        "layout block: weight of the cross-entropy at finished tokens, which keeps shared weights autoregressive; 0: "
        "off",
    )
    clean_schedule: Literal["constant", "linear", "cosine"] = setting("constant", "how the weight falls over the run")
    clean_start_step: int | float = setting(0, "first step with this loss: a number, or a share of the run below 1")
    clean_stop_step: int | float | None = setting(
        None, "first step without this loss: a number, or a share of the run below 1"
    )
    clean_balanced: bool = setting(
        False, "scale that loss to the token loss's value in each step, so that clean_weight is the ratio of the two"
    )

    align_weight: float = setting(0.0, "weight of the distance to the frozen AR model's hidden states; 0: off")
    align_schedule: Literal["constant", "linear", "cosine"] = setting("constant", "how the weight falls over the run")
    align_start_step: int | float = setting(0, "first step with this loss: a number, or a share of the run below 1")
    align_stop_step: int | float | None = setting(
        None, "first step without this loss; the teacher, no longer needed, then leaves memory"
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

    teacher_model_name_or_path: str | None = setting(
        None, "another AR model to learn from, with the same tokenizer; unset: the one that is, or was, converted"
    )
    kl_weight: float = setting(
        0.0, "weight of the divergence from the AR model's next-token distribution at masked tokens; 0: off"
    )
    kl_schedule: Literal["constant", "linear", "cosine"] = setting("constant", "how the weight falls over the run")
    kl_start_step: int | float = setting(0, "first step with this loss: a number, or a share of the run below 1")
    kl_stop_step: int | float | None = setting(
        None, "first step without this loss: a number, or a share of the run below 1"
    )
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
    causal_kl_weight: float = setting(
        0.0,
        "layout block: weight of the same divergence at finished tokens, which keeps the model autoregressive, as "
        "self-speculation needs; 0: off",
    )
    causal_kl_schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "how the weight falls over the run"
    )
    causal_kl_start_step: int | float = setting(0, "first step with this loss: a number, or a share of the run below 1")
    causal_kl_stop_step: int | float | None = setting(
        None, "first step without this loss: a number, or a share of the run below 1"
    )

    tv_weight: float = setting(
        0.0,
        "weight of the total variation distance to the AR model's next-token distribution at masked tokens, which is "
        "the share of drafts that it would reject; 0: off",
    )
    tv_schedule: Literal["constant", "linear", "cosine"] = setting("constant", "how the weight falls over the run")
    tv_start_step: int | float = setting(0, "first step with this loss: a number, or a share of the run below 1")
    tv_stop_step: int | float | None = setting(
        None, "first step without this loss: a number, or a share of the run below 1"
    )

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

    freeze_embeddings: bool = setting(False, "freeze embeddings and head, except the mask token's row")
    lora_r: int = setting(0, "rank of LoRA adapters, merged at the end (needs the extra lora); 0: train all weights")
    lora_alpha: int = setting(32, "scale of LoRA, as in PEFT")
    lora_dropout: float = setting(0.0, "dropout of LoRA, as in PEFT")
    lora_target_modules: str | tuple[str, ...] = setting(
        "all-linear", "modules that get adapters, with commas; all-linear: all but the head"
    )
    sampler: dict | None = setting(  # noqa: RUF009
        None, "default sampler settings to store with the model, for example {window: 32, threshold: 0.8}"
    )
    save_dtype: Literal["source", "float32", "bfloat16"] = setting(
        "source", "type of the final weights; checkpoints for resuming keep the fp32 master weights"
    )
    compile_layers: bool | None = setting(
        None,
        "compile the decoder layers: the first step is slow, later ones are faster; unset: on a GPU, where a run is "
        "long enough to repay it",
    )
    overwrite: bool = setting(False, "start again in an output_dir that an earlier run made")

    def __post_init__(self) -> None:
        at_least(self, max_length=2, eval_rows=1, views=1, anneal_steps=0, papl=0, lora_r=0, lora_alpha=1)
        at_least(self, lora_dropout=0, kl_top_k=1, sample_tokens=1)
        for loss in losses():
            at_least(self, **{f"{loss}_weight": 0})
            check_steps(self, f"{loss}_start_step", f"{loss}_stop_step")
        if not any(getattr(self, f"{loss}_weight") for loss in losses()):
            raise UserError("--token_weight 0 leaves nothing to train on; give another loss a weight")
        if not 0 < self.data_fraction <= 1:
            raise UserError(f"--data_fraction {self.data_fraction}: must be above 0 and at most 1")
        if not self.lora_dropout < 1:
            raise UserError(f"--lora_dropout {self.lora_dropout}: must be below 1")
        if self.complementary_masks and self.views != 2:
            raise UserError(f"--complementary_masks needs --views 2, not {self.views}: the two masks share one row")
        self._check_distillation()
        self._check_rollouts()
        self._check_sampler()
        if self.layout is not None:  # else it is MODEL's to say, and `with_facts` checks
            self._check_layout()

    @property
    def reading(self) -> Reading:
        """How records are read."""
        return reading_of(self)

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

    def _check_distillation(self) -> None:
        inside_unit(self, "jsd_beta")
        if self.kl_tail_bucket and self.kl_top_k is None:
            raise UserError("--kl_tail_bucket needs --kl_top_k: over all tokens there is no tail")

    def _check_rollouts(self) -> None:
        at_least(self, rollout_prompts=1, rollout_updates=1, states_per_rollout=1)
        at_least(self, rollout_tokens=1, rollout_tokens_start=1, rollout_curriculum=0, rollout_temperature=0)
        at_least(self, rollout_top_k=1, rollout_batch_size=1)
        inside_unit(self, "prompt_fraction")
        for name in ("rollout_threshold", "rollout_top_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"--{name} {value}: must be above 0 and at most 1")
        check_step("warm_start_steps", self.warm_start_steps)
        if self.rows == "corpus" and self.warm_start_steps:
            raise UserError("--warm_start_steps is for --rows rollout: it says when rollouts begin")

    def _check_layout(self) -> None:
        self._check_blocks()
        if self.causal_kl_weight and self.layout != "block":
            raise UserError(
                f"--causal_kl_weight is for --layout block, not {self.layout}: only its rows hold finished tokens"
            )
        if self.clean_weight and self.layout != "block":
            raise UserError(
                f"--clean_weight is for --layout block, not {self.layout}: only its rows hold finished tokens"
            )
        if self.rows == "rollout" and self.layout != "block":
            raise UserError(f"--rows rollout needs --layout block, not {self.layout}: they are written block by block")
        self._check_groups()

    def _check_groups(self) -> None:
        """What goes with `noise all`, and what does not."""
        if self.noise == "level":
            for name, unset in (("anchors", "grid"), ("block_size_schedule", None), ("offset_gamma", None)):
                if getattr(self, name) != unset:
                    raise UserError(f"--{name} {getattr(self, name)} is for --noise all: only there groups are drafts")
            if self.weights == "gated":
                raise UserError("--weights gated needs --noise all: the adapters learn drafts, which are all masks")
            return
        if self.layout != "block" or not self.causal_context or self.shift == 0:
            raise UserError(
                "--noise all needs --layout block, --causal_context true and --shift 1: its masks draft what the "
                "causal model verifies"
            )
        for name, unset in (("views", 1), ("weighting", "none"), ("noise_per", "document"), ("states_per_rollout", 1)):
            if getattr(self, name) != unset:
                raise UserError(f"--{name} {getattr(self, name)} is not for --noise all, which has no noise level")
        if self.align_weight and self.align_positions != "targets":
            raise UserError(f"--align_positions {self.align_positions} is not for --noise all; give targets")
        grouping = self.grouping
        if grouping.lengths[-1] != self.block_size:
            raise UserError(
                f"--block_size_schedule {self.block_size_schedule} ends with {grouping.lengths[-1]}, and --block_size "
                f"is {self.block_size}; end with that"
            )
        if self.offset_gamma is not None and not self.offset_gamma > 0:
            raise UserError(f"--offset_gamma {self.offset_gamma}: must be above 0")
        self._check_gated()

    def _check_gated(self) -> None:
        if self.weights != "gated":
            if self.reference_base:
                raise UserError(
                    "--reference_base is for --weights gated: other weights are changed, and must be written"
                )
            return
        if not self.lora_r:
            raise UserError("--weights gated needs --lora_r: the adapters that act at masks, for example 64")
        for name in ("clean_weight", "causal_kl_weight"):
            if getattr(self, name):
                raise UserError(
                    f"--{name} {getattr(self, name)} is for --weights shared: gated ones leave finished tokens as they "
                    "are, and its gradient would be 0"
                )
        if self.teacher_model_name_or_path is not None:
            raise UserError("--teacher_model_name_or_path is for --weights shared: gated ones have the source in them")
        if self.save_dtype != "source":
            raise UserError(
                f"--save_dtype {self.save_dtype} is for --weights shared: gated ones keep the source's files"
            )
        for name in ("freeze_embeddings", "mask_token"):
            if getattr(self, name):
                raise UserError(
                    f"--{name} is for --weights shared: gated ones leave the source's embeddings as they are"
                )

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

    def _check_sampler(self) -> None:
        if self.sampler is None:
            return
        unnamed = [name for name in self.sampler if not isinstance(name, str)]
        if unnamed:
            raise UserError(f"--sampler: {unnamed[0]!r} is not the name of a setting; write {{name: value}}")
        try:
            sampler = SamplerSettings().updated(**self.sampler)
            if self.layout is not None:
                sampler.refuse_layout(self.layout, self.shift)
        except UserError as error:
            raise UserError(f"--sampler: {error}") from error

    def _check_blocks(self) -> None:
        if self.layout == "block":
            if self.block_size is None:
                raise UserError("--layout block needs --block_size: tokens per block, for example 4")
            at_least(self, block_size=1)
            if self.block_size > self.max_length:
                raise UserError(
                    f"--block_size {self.block_size} is over --max_length {self.max_length}: a block must fit in a row"
                )
            if self.anneal_steps:
                raise UserError(f"--anneal_steps {self.anneal_steps} is not for --layout block; leave it out")
            return
        if self.block_size is not None:
            raise UserError(f"--block_size {self.block_size} is for --layout block, not {self.layout}; give none")
        if self.causal_context:
            raise UserError(f"--causal_context is for --layout block, not {self.layout}; leave it out")
        if self.noise_per == "block":
            raise UserError(f"--noise_per block is for --layout block, not {self.layout}; give document")


def losses() -> tuple[str, ...]:
    """Returns the prefixes of the losses' settings: those that have a weight."""
    names = ConversionSettings.__dataclass_fields__
    return tuple(name.removesuffix("_weight") for name in names if name.endswith("_weight"))
