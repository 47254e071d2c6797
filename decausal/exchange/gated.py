"""Exports a gated conversion: the source's unchanged files, the draft, and a model card."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoConfig

from decausal.errors import UserError
from decausal.exchange.card import CARD, ModelCard
from decausal.exchange.converted_files import facts_to_hand_on
from decausal.exchange.staging import Exported, staged
from decausal.models.base_files import copy_base, refuse_links_out, refuse_other_base, refuse_secrets
from decausal.models.facts import DRAFT, ConversionFacts, write_facts
from decausal.models.gated_checkpoint import base_of


def export_gated(
    directory: Path, facts: ConversionFacts, output_dir: Path, card: ModelCard, notes: list[str]
) -> Exported:
    """Copies the draft, and the source unless the facts refer to it on the hub.

    Args:
        directory: What `decausal convert` wrote.
        facts: Its facts.
        output_dir: A new or empty directory.
        card: What the card says apart from the facts.
        notes: What the user should know.

    Raises:
        UserError: The source is missing or another one, or `directory` holds what must not be exported.
    """
    draft = directory / DRAFT
    if not draft.is_dir():
        raise UserError(f"{directory} is a checkpoint of a run; give the run's output directory")
    base = base_of(directory, facts)
    for place in (directory, base):
        refuse_links_out(place)
        refuse_secrets(place)
    refuse_other_base(base, facts.base, str(directory))
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    with staged(output_dir) as staging:
        if facts.base_reference is None:
            copy_base(base, staging)
        shutil.copytree(draft, staging / DRAFT)
        (staging / CARD).write_text(card.text(facts, config), encoding="utf-8")
        write_facts(staging, facts_to_hand_on(facts))  # last: a directory with facts is complete
    return Exported(output_dir, facts, {}, notes)
