"""What a user can set for a conversion or a pretraining, beside transformers' own training arguments.

Light on purpose: the command line reads these classes to print its help.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from decausal.data.reading import Reading
from decausal.errors import UserError
from decausal.sampling.settings import SamplerSettings


def _setting(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


def _reading(settings: ConversionSettings | PretrainSettings) -> Reading:
    return Reading(
        text_field=settings.text_field,
        prompt_field=settings.prompt_field,
        completion_field=settings.completion_field,
        split=settings.dataset_split,
        on_bad_record=settings.on_bad_record,
    )


def _at_least(settings: Any, **least: int) -> None:
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and not value >= bound:  # nan is not at least anything
            raise UserError(f"--{name} {value}: must be at least {bound}")


def _inside_unit(settings: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(settings, name) < 1:
            raise UserError(f"--{name} {getattr(settings, name)}: must lie between 0 and 1")


def _check_steps(settings: Any, start_name: str, stop_name: str) -> None:
    """Both are whole numbers or shares below 1; where they can be compared, the stop comes after the start."""
    start, stop = getattr(settings, start_name), getattr(settings, stop_name)
    _check_step(start_name, start)
    _check_step(stop_name, stop)
    if stop and start >= stop and (start < 1) == (stop < 1):
        raise UserError(f"--{stop_name} {stop} is not after --{start_name} {start}")


def _check_step(name: str, value: int | float | None) -> None:
    if value is not None and not (0 <= value < 1 or (value >= 1 and float(value).is_integer())):
        raise UserError(f"--{name} {value}: give a number of steps, or a share of the run below 1")


@dataclass(frozen=True)
class ConversionSettings:
    """One conversion: a point on the grid of layout, shift, rows and supervision, and the data it is trained on."""

    model_name_or_path: str = _setting(
        "tiny", "AR model, or a converted one to train on: a directory, a hub id, or 'tiny', the embedded one"
    )
    revision: str | None = _setting(None, "the hub model's revision")
    attn_implementation: str | None = _setting(
        None, "sdpa, eager or, on a GPU, flex_attention; unset: what the model needs"
    )
    data: str | tuple[str, ...] | None = _setting(
        None, "a file, directory, glob or hub data set, or 'stdlib'; several with commas"
    )
    eval_data: str | tuple[str, ...] | None = _setting(
        None, "held-out data; its NELBO is logged every eval_steps and at the end"
    )
    eval_rows: int = _setting(64, "rows of eval_data to measure on")
    sample_prompts: str | None = _setting(
        None, "a file of prompts, one a line; what the model makes of them is shown and kept at each evaluation"
    )
    sample_tokens: int = _setting(64, "new tokens of each of these samples")
    text_field: str = _setting("text", "the field of a record that holds its text")
    prompt_field: str = _setting("prompt", "the field of a record that holds its prompt, with completion_field")
    completion_field: str = _setting("completion", "the field of a record that holds the answer to its prompt")
    dataset_split: str = _setting("train", "the split of a data set: on the hub, or a directory that has splits")
    on_bad_record: Literal["error", "skip"] = _setting("error", "what a record that cannot be used does")
    data_fraction: float = _setting(1.0, "share of the documents to train on, a stable choice for a seed")
    max_length: int = _setting(512, "tokens in a packed row")

    layout: Literal["causal", "bidirectional", "block"] | None = _setting(
        None,
        "who attends to whom after conversion; block: both ways inside blocks, causal over them; unset: as a converted "
        "model has it, else bidirectional",
    )
    block_size: int | None = _setting(None, "tokens per block, for layout block; unset: as a converted model has it")
    causal_context: bool | None = _setting(
        None,
        "layout block: finished tokens read each other causally, as the AR model did; unset: as a converted model has "
        "it, else false",
    )
    shift: Literal[0, 1] | None = _setting(
        None,
        "1: the state before a token predicts it, as in the AR model; 0: its own does; unset: as a converted model has "
        "it, else 1",
    )
    mask_token: str | None = _setting(None, "mask token; unset: the tokenizer's, else a spare or added row")
    anneal_steps: int = _setting(0, "steps over which attention opens from causal to the layout; 0 starts open")

    views: int = _setting(1, "noised views of one clean row; one teacher pass serves them all")
    complementary_masks: bool = _setting(False, "with 2 views, the second masks what the first leaves visible")
    stratified_noise: bool = _setting(True, "spread noise levels evenly over neighbouring rows")
    noise_per: Literal["document", "block"] = _setting("document", "what has a noise level of its own")
    weighting: Literal["none", "inverse_t"] = _setting("none", "weight of a masked token: 1, or 1/t (the NELBO)")
    token_weight: float = _setting(1.0, "weight of the token loss")
    token_schedule: Literal["constant", "linear", "cosine"] = _setting("constant", "how that weight falls over the run")
    token_start_step: int | float = _setting(0, "step from which it counts: a number, or a share of the run below 1")
    token_stop_step: int | float | None = _setting(None, "step from which it is off")
    papl: float = _setting(0.0, "weight of a second token term, mean of stop_gradient(p) * CE; 0 is off")

    align_weight: float = _setting(0.0, "weight of the hidden-state alignment to the frozen AR model; 0 is off")
    align_schedule: Literal["constant", "linear", "cosine"] = _setting("constant", "how that weight falls over the run")
    align_start_step: int | float = _setting(0, "step from which it counts: a number, or a share of the run below 1")
    align_stop_step: int | float | None = _setting(None, "step from which it is off and the teacher out of memory")
    align_layers: str | tuple[int, ...] = _setting(
        "all", "all, lower, middle or upper (thirds), or state indices with commas: 0 embeddings ... L after final norm"
    )
    align_positions: Literal["targets", "visible", "all"] = _setting("targets", "which states are aligned")
    align_distance: Literal["cosine", "l2"] = _setting("cosine", "1 - cosine, or mean squared difference")

    teacher_model_name_or_path: str | None = _setting(
        None, "AR model to compare with, of the same tokenizer; unset: the one that is, or was, converted"
    )
    kl_weight: float = _setting(0.0, "weight of the divergence from the AR model's next-token distribution; 0 is off")
    kl_schedule: Literal["constant", "linear", "cosine"] = _setting("constant", "how that weight falls over the run")
    kl_start_step: int | float = _setting(0, "step from which it counts: a number, or a share of the run below 1")
    kl_stop_step: int | float | None = _setting(None, "step from which it is off")
    kl_divergence: Literal["forward_kl", "reverse_kl", "jsd"] = _setting(
        "forward_kl", "KL(teacher || student), KL(student || teacher), or the generalised Jensen-Shannon divergence"
    )
    jsd_beta: float = _setting(0.5, "the teacher's share of the mixture in jsd")
    kl_top_k: int | None = _setting(None, "the teacher's most probable tokens to compare on; unset: all")
    kl_tail_bucket: bool = _setting(False, "with kl_top_k, count all other tokens as one")
    kl_mean: Literal["sequence", "token"] = _setting("sequence", "mean per sequence and then over them, or over tokens")
    causal_kl_weight: float = _setting(
        0.0, "weight of the same divergence at finished tokens, which keeps the model autoregressive too; 0 is off"
    )
    causal_kl_schedule: Literal["constant", "linear", "cosine"] = _setting("constant", "how that weight falls")
    causal_kl_start_step: int | float = _setting(0, "step from which it counts")
    causal_kl_stop_step: int | float | None = _setting(None, "step from which it is off")

    tv_weight: float = _setting(
        0.0,
        "weight of the total variation distance (half the L1) to the AR model's next-token distribution, which is the "
        "share of drafts that it would reject; 0 is off",
    )
    tv_schedule: Literal["constant", "linear", "cosine"] = _setting("constant", "how that weight falls over the run")
    tv_start_step: int | float = _setting(0, "step from which it counts: a number, or a share of the run below 1")
    tv_stop_step: int | float | None = _setting(None, "step from which it is off")

    rows: Literal["corpus", "rollout"] = _setting(
        "corpus", "what is trained on: the data, noised, or what the model itself writes after the data's prompts"
    )
    warm_start_steps: int | float = _setting(0, "steps on rows of the corpus before rollouts begin; below 1: a share")
    prompt_fraction: float = _setting(0.5, "share of each plain text that is given as a prompt")
    rollout_prompts: int | None = _setting(
        None, "prompts that are rolled out at a time; unset: the rows of one optimizer step, so all is fresh"
    )
    rollout_updates: int = _setting(1, "times that each rollout is trained on, in other states each time")
    states_per_rollout: int = _setting(1, "states of a rollout in one training row")
    state_choice: Literal["block", "sequence"] = _setting(
        "block", "what a step of denoising is drawn for: each block, or all blocks of a sequence together"
    )
    rollout_tokens: int = _setting(128, "new tokens of a rollout; its last block is always whole")
    rollout_tokens_start: int | None = _setting(None, "the same in the first rollout batch; unset: no growth")
    rollout_curriculum: int = _setting(0, "rollout batches over which the number of new tokens grows")
    rollout_temperature: float = _setting(1.0, "temperature of rollouts")
    rollout_threshold: float = _setting(0.9, "confidence from which several tokens are kept in one step")
    rollout_top_k: int | None = _setting(None, "rollouts sample among this many tokens")
    rollout_top_p: float | None = _setting(None, "rollouts sample among the fewest tokens of this probability")
    rollout_batch_size: int = _setting(32, "rows decoded together; changes no rollout")

    freeze_embeddings: bool = _setting(False, "freeze embeddings and head; the mask token's row is trained still")
    lora_r: int = _setting(0, "rank of LoRA adapters, merged at the end; 0 trains all weights (needs peft)")
    lora_alpha: int = _setting(32, "LoRA scale")
    lora_dropout: float = _setting(0.0, "LoRA dropout")
    lora_target_modules: str | tuple[str, ...] = _setting("all-linear", "modules that get adapters, with commas")
    sampler: dict | None = _setting(  # noqa: RUF009
        None, "the model's own sampler settings, stored with it: {window: 32, threshold: 0.8}"
    )
    save_dtype: Literal["source", "float32", "bfloat16"] = _setting(
        "source", "type of the final weights; checkpoints for resuming keep the master weights"
    )
    compile_layers: bool = _setting(False, "compile the decoder layers: slow first step, faster later ones")
    overwrite: bool = _setting(False, "start anew in an output_dir that an earlier run made")

    def __post_init__(self) -> None:
        _at_least(self, max_length=2, eval_rows=1, views=1, anneal_steps=0, papl=0, lora_r=0, lora_alpha=1)
        _at_least(self, lora_dropout=0, kl_top_k=1, sample_tokens=1)
        for loss in losses():
            _at_least(self, **{f"{loss}_weight": 0})
            _check_steps(self, f"{loss}_start_step", f"{loss}_stop_step")
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
        return _reading(self)

    def with_facts(
        self,
        layout: str = "bidirectional",
        block_size: int | None = None,
        causal_context: bool = False,
        shift: int = 1,
        sampler: dict | None = None,
    ) -> ConversionSettings:
        """Returns the settings with each fact that they leave open as given here: by default, as for an AR model.

        What belongs to a layout goes only to settings of the same layout.

        Raises:
            UserError: the settings do not go with these facts.
        """
        if self.layout not in (None, layout):
            layout, block_size, causal_context, sampler = self.layout, None, False, None
        facts = {"layout": layout, "block_size": block_size, "causal_context": causal_context, "shift": shift}
        facts["sampler"] = sampler or None
        return replace(self, **{name: value for name, value in facts.items() if getattr(self, name) is None})

    def _check_distillation(self) -> None:
        _inside_unit(self, "jsd_beta")
        if self.kl_tail_bucket and self.kl_top_k is None:
            raise UserError("--kl_tail_bucket needs --kl_top_k: over all tokens there is no tail")

    def _check_rollouts(self) -> None:
        _at_least(self, rollout_prompts=1, rollout_updates=1, states_per_rollout=1)
        _at_least(self, rollout_tokens=1, rollout_tokens_start=1, rollout_curriculum=0, rollout_temperature=0)
        _at_least(self, rollout_top_k=1, rollout_batch_size=1)
        _inside_unit(self, "prompt_fraction")
        for name in ("rollout_threshold", "rollout_top_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"--{name} {value}: must be above 0 and at most 1")
        _check_step("warm_start_steps", self.warm_start_steps)
        if self.rows == "corpus" and self.warm_start_steps:
            raise UserError("--warm_start_steps is for --rows rollout: it says when rollouts begin")

    def _check_layout(self) -> None:
        self._check_blocks()
        if self.causal_kl_weight and self.layout != "block":
            raise UserError(
                f"--causal_kl_weight is for --layout block, not {self.layout}: only its rows hold finished tokens"
            )
        if self.rows == "rollout" and self.layout != "block":
            raise UserError(f"--rows rollout needs --layout block, not {self.layout}: they are written block by block")

    def _check_sampler(self) -> None:
        if self.sampler is None:
            return
        unnamed = [name for name in self.sampler if not isinstance(name, str)]
        if unnamed:
            raise UserError(f"--sampler: {unnamed[0]!r} is no name of a setting; write {{name: value}}")
        try:
            sampler = SamplerSettings().updated(**self.sampler)
            if self.layout is not None:
                sampler.refuse_layout(self.layout)
        except UserError as error:
            raise UserError(f"--sampler: {error}") from error

    def _check_blocks(self) -> None:
        if self.layout == "block":
            if self.block_size is None:
                raise UserError("--layout block needs --block_size: tokens per block, for example 4")
            _at_least(self, block_size=1)
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


@dataclass(frozen=True)
class PretrainSettings:
    """A small AR model from nothing: its tokenizer, its shape and its text."""

    data: str | tuple[str, ...] = _setting("stdlib", "as for convert")
    eval_data: str | tuple[str, ...] | None = _setting("stdlib-heldout", "text for the closing measurement")
    text_field: str = _setting("text", "the field of a record that holds its text")
    prompt_field: str = _setting("prompt", "the field of a record that holds its prompt, with completion_field")
    completion_field: str = _setting("completion", "the field of a record that holds the answer to its prompt")
    dataset_split: str = _setting("train", "the split of a data set: on the hub, or a directory that has splits")
    on_bad_record: Literal["error", "skip"] = _setting("error", "what a record that cannot be used does")
    max_length: int = _setting(1024, "tokens in a packed row")
    max_position_embeddings: int | None = _setting(None, "the model's context, if not max_length")
    tokenizer: Literal["bpe", "characters"] = _setting(
        "bpe", "bpe: byte-level, trained on the same data; characters: printable ASCII, one token each"
    )
    vocab_size: int = _setting(4096, "entries of the BPE tokenizer")
    hidden_size: int = _setting(320, "width")
    intermediate_size: int = _setting(832, "width of the feed-forward layers")
    num_hidden_layers: int = _setting(6, "layers")
    num_attention_heads: int = _setting(5, "query heads")
    num_key_value_heads: int = _setting(1, "key and value heads")
    attn_implementation: Literal["sdpa", "eager"] = _setting("sdpa", "eager is the faster in short rows on a CPU")
    muon_learning_rate: float = _setting(5e-3, "peak rate of the weight matrices; learning_rate is for all the rest")
    compile_layers: bool = _setting(False, "compile the decoder layers: slow first step, faster later ones")
    overwrite: bool = _setting(False, "start anew in an output_dir that an earlier run made")

    @property
    def reading(self) -> Reading:
        """How records are read."""
        return _reading(self)

    @property
    def context(self) -> int:
        """Tokens that the model reads."""
        return self.max_position_embeddings or self.max_length

    def __post_init__(self) -> None:
        _at_least(self, max_length=2, vocab_size=258, num_hidden_layers=1, num_attention_heads=1, hidden_size=1)
        _at_least(self, num_key_value_heads=1, intermediate_size=1, max_position_embeddings=self.max_length)
        for whole, part in (("num_attention_heads", "num_key_value_heads"), ("hidden_size", "num_attention_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise UserError(f"--{whole} {getattr(self, whole)} is no multiple of --{part} {getattr(self, part)}")
        if self.hidden_size // self.num_attention_heads % 2:
            raise UserError(f"--hidden_size {self.hidden_size}: a head's width must be even, for rotary positions")
