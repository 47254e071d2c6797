"""What a run starts from: an AR model, or a converted one, whose facts are the defaults of a later stage."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decausal.errors import UserError
from decausal.models.adapt import load_source, source_commit
from decausal.models.checkpoint import load_converted
from decausal.models.embedded import EMBEDDED_MODELS
from decausal.models.facts import ConversionFacts, read_facts
from decausal.models.names import facts_of
from decausal.training.resuming import refuse_other_settings
from decausal.training.settings import ConversionSettings

FACTS = ("layout", "block_size", "causal_context", "shift", "causal_groups", "weights")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The model that a run starts from.

    Attributes:
        name: Directory, hub id, or an embedded model's name.
        commit: Its commit on the hub, if it is there.
        facts: The facts of a converted model; None for an AR model.
    """

    name: str
    commit: str | None = None
    facts: ConversionFacts | None = None

    @property
    def source(self) -> str:
        """The AR model at the beginning of all stages."""
        return self.name if self.facts is None else self.facts.source

    def load(
        self, attn_implementation: str | None = None, mask_token: str | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Loads the model in fp32.

        Raises:
            UserError: It cannot be loaded, or it is converted with another mask token than the one asked for.
        """
        if self.facts is None:
            return load_source(
                self.name, revision=self.commit, attn_implementation=attn_implementation, merge_adapter=True
            )
        model, tokenizer, _ = load_converted(self.name, revision=self.commit, attn_implementation=attn_implementation)
        if mask_token not in (None, tokenizer.mask_token):
            raise UserError(
                f"--mask_token {mask_token}: {self.name} was trained with {tokenizer.mask_token}; leave the flag out"
            )
        return model, tokenizer

    def load_ar_source(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Loads the AR model that a converted one was made from, which teaches its later stages.

        Raises:
            UserError: It is not available.
        """
        assert self.facts is not None
        try:
            return load_source(self.source, revision=self.facts.source_revision, merge_adapter=True)
        except UserError as error:
            raise UserError(
                f"{self.name} was made from {self.source}, which cannot be loaded to be the teacher ({error}): "
                "name an AR model with --teacher_model_name_or_path, or train without one (--recipe fine-tune)"
            ) from error

    def history(self) -> dict[str, Any]:
        """Returns where the run's weights come from, as fields of its `ConversionFacts`."""
        if self.facts is None:
            return {"source": self.source, "source_revision": self.commit}
        return {
            "source": self.source,
            "source_revision": self.facts.source_revision,
            "earlier_stages": [*self.facts.earlier_stages, self.facts.recipe],
            "end_token_ids": self.facts.end_token_ids,
        }


def find_start(
    settings: ConversionSettings, output_dir: Path, checkpoint: Path | None
) -> tuple[ConversionSettings, Start]:
    """Finds the model that a run starts from, and settings that follow from it.

    Args:
        settings: The given settings.
        output_dir: The run's directory.
        checkpoint: The checkpoint to resume from. The model then has the commit of the run's start.

    Returns:
        The settings with all facts, and the model.

    Raises:
        UserError: There is no such model, or the settings fit neither it nor `checkpoint`.
    """
    name, revision = settings.model_name_or_path, settings.revision
    if checkpoint is not None:
        resumed = read_facts(checkpoint)
        settings = _completed(settings, resumed)
        refuse_other_settings(checkpoint, asdict(settings))
        revision = resumed.recipe.get("revision") or revision
    commit = source_commit(name, revision, merge_adapter=settings.merge_adapter)
    start = Start(name, commit, facts_of(name, commit))
    if start.facts is not None and start.facts.is_gated:
        raise UserError(
            f"{name} is a gated conversion, whose weights are {start.facts.source}'s: convert that, or continue the "
            "run of this one with --resume_from_checkpoint true"
        )
    path = Path(name).expanduser()
    if name not in EMBEDDED_MODELS and path.resolve().is_relative_to(output_dir.resolve()):
        raise UserError(f"output_dir {output_dir} holds the model {name} that the run begins with; name another")
    if start.facts is None:
        return settings.with_facts(), start
    if settings.anneal_steps and start.facts.layout != "causal":
        raise UserError(
            f"--anneal_steps {settings.anneal_steps} opens attention from causal, and that of {name} is open "
            f"({start.facts.layout}); give --anneal_steps 0"
        )
    settings = _completed(settings, start.facts)
    _warn_of_changes(settings, start)
    return settings, start


def _completed(settings: ConversionSettings, facts: ConversionFacts) -> ConversionSettings:
    return settings.with_facts(*(getattr(facts, name) for name in FACTS), sampler=facts.sampler)


def _warn_of_changes(settings: ConversionSettings, start: Start) -> None:
    """Warns about facts that a recipe changes, since no flag says so."""
    pairs = {name: (getattr(start.facts, name), getattr(settings, name)) for name in FACTS}
    changes = [f"{name} {before} -> {after}" for name, (before, after) in pairs.items() if before != after]
    if changes and os.environ.get("RANK", "0") == "0":
        logger.warning("this stage changes what %s was trained for: %s", start.name, ", ".join(changes))
