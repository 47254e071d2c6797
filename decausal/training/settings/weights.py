"""Settings for what is trained: all weights, adapters that are merged, or adapters that act at masks alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from decausal.errors import UserError
from decausal.training.settings.field import Family, at_least, setting
from decausal.training.settings.losses import LossSettings

NEEDS_PEFT = "--lora_r needs peft: pip install 'decausal[lora]'"


@dataclass(frozen=True)
class AdapterSettings(Family):
    """What is trained, and in which type it is saved."""

    freeze_embeddings: bool = setting(False, "freeze embeddings and head, except the mask token's row")
    lora_r: int = setting(0, "rank of LoRA adapters, merged at the end (needs the extra lora); 0: train all weights")
    lora_alpha: int = setting(32, "scale of LoRA, as in PEFT")
    lora_dropout: float = setting(0.0, "dropout of LoRA, as in PEFT")
    lora_target_modules: str | tuple[str, ...] = setting(
        "all-linear", "modules that get adapters, with commas; all-linear: all but the head"
    )
    save_dtype: Literal["source", "float32", "bfloat16"] = setting(
        "source", "type of the final weights; checkpoints for resuming keep the fp32 master weights"
    )

    def check(self) -> None:
        at_least(self, lora_r=0, lora_alpha=1, lora_dropout=0)
        if not self.lora_dropout < 1:
            raise UserError(f"--lora_dropout {self.lora_dropout}: must be below 1")


@dataclass(frozen=True)
class GatedSettings(AdapterSettings, LossSettings):
    """Shared or gated weights."""

    weights: Literal["shared", "gated"] | None = setting(
        None,
        "shared: one set of weights reads text and masks; gated: LoRA adapters and the mask token's row act at masks "
        "alone, so that the AR model stays as it is, byte for byte, and verifies the drafts (needs noise all); unset: "
        "that of a converted model, else shared",
    )
    draft_head: bool = setting(
        False,
        "gated weights: a small head after the model tells each draft which token comes before it",
    )
    draft_vocabulary: int = setting(
        16384,
        "draft_head: tokens that can be drafted, the most frequent of the data; each draft costs a product with so "
        "many rows of the output head",
    )
    reference_base: bool = setting(
        False, "gated weights: leave the AR model's files out of output_dir, which then names its hub id and commit"
    )

    def check(self) -> None:
        at_least(self, draft_vocabulary=1)

    def check_facts(self) -> None:
        if self.weights != "gated":
            if self.reference_base:
                raise UserError(
                    "--reference_base is for --weights gated: other weights are changed, and must be written"
                )
            if self.draft_head:
                raise UserError("--draft_head is for --weights gated: it is saved beside their adapter")
            return
        if self.noise != "all":
            raise UserError("--weights gated needs --noise all: the adapters learn drafts, which are all masks")
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
