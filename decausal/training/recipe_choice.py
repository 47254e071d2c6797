"""Chooses a recipe by what a user has and wants to do. This file is light: the command line reads it before anything
slow."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple

from decausal.data.documents import read_documents
from decausal.data.files import File
from decausal.data.reading import Reading
from decausal.data.sources import find_sources
from decausal.errors import UserError, nearest
from decausal.models.embedded import EMBEDDED_MODELS
from decausal.models.names import is_converted, is_left_to_the_hub

GOALS = {
    "infill": ("repr-align", "fills gaps and writes in any order"),
    "speed": ("opdlm", "writes several tokens at once, block by block"),
    "exact": ("lossless", "writes what the AR model writes, faster"),
}
"""The goals of a user, the recipe for each, and what the model then does."""
EMBEDDED_LEARNING_RATE = 1e-3
"""For the embedded models, of 2 and 8 million parameters. Recipes have rates for real pretrained ones."""
_LOOKED_AT = 16


class Choice(NamedTuple):
    """A recipe, and why."""

    recipe: str
    why: str

    @property
    def line(self) -> str:
        """What the user should know about the choice."""
        others = [f"--goal {goal} ({recipe})" for goal, (recipe, _) in GOALS.items() if recipe != self.recipe]
        return f"recipe {self.recipe}: {self.why}; for something else give {', '.join(others)}, or --recipe"


def choose_recipe(flags: Mapping[str, Any], goal: str | None = None) -> Choice:
    """Returns a recipe for a run.

    Args:
        flags: The given settings, by name.
        goal: What the user wants, in `GOALS`; None: not said.

    Raises:
        UserError: There is no such goal.
    """
    if goal is not None:
        if goal not in GOALS:
            raise UserError(f"--goal {goal} is not known{nearest(goal, GOALS)}; accepted: {', '.join(GOALS)}")
        recipe, does = GOALS[goal]
        return Choice(recipe, f"the model {does}, as --goal {goal} asks for")
    if flags.get("weights") == "gated":
        return Choice("lossless", "--weights gated leaves the AR model as it is")
    if flags.get("rows") == "rollout":
        return Choice("opdlm", "--rows rollout lets the model learn from its own answers")
    if _is_converted(flags.get("model_name_or_path")):
        return Choice("fine-tune", "the model is converted already, and keeps its layout, block size and shift")
    if "block_size" in flags or flags.get("layout") == "block":
        return Choice("bd3lm", "blocks are asked for, and the data are denoised in them")
    if _lacks_answers(flags):
        return Choice("opdlm", "the data are prompts without answers, which the model answers itself")
    return Choice("repr-align", f"the model {GOALS['infill'][1]}, and is kept close to the AR model")


def embedded_defaults(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that come with embedded models, except those that are given."""
    if model not in EMBEDDED_MODELS or "learning_rate" in given:
        return {}
    return {"learning_rate": EMBEDDED_LEARNING_RATE}


def gated_rows(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings with which gated weights learn from prompts without answers: the AR model writes them."""
    settings = {**recipe, **given}
    if settings.get("weights") != "gated" or "rows" in settings or not _lacks_answers(settings):
        return {}
    return {"rows": "rollout"}


def _is_converted(model: Any) -> bool:
    """Returns whether a model here is a converted one; the hub is not asked."""
    return isinstance(model, str) and model not in EMBEDDED_MODELS and not is_left_to_the_hub(model) and _here(model)


def _here(model: str) -> bool:
    try:
        return is_converted(model)
    except UserError:  # the model's own check reports it
        return False


def _lacks_answers(flags: Mapping[str, Any]) -> bool:
    """Returns whether the first records of a file here are prompts, all without an answer."""
    data = flags.get("data")
    if not isinstance(data, str):
        return False
    fields = {name: str(flags[name]) for name in ("text_field", "prompt_field", "completion_field") if name in flags}
    try:
        first = find_sources(data, str(flags.get("dataset_split", "train")))[0]
        if not isinstance(first, File) or first.format not in ("jsonl", "json", "csv"):
            return False
        reading = Reading(needs_answers=False, on_bad_record="skip", **fields)
        records = list(islice(read_documents(data, reading), _LOOKED_AT))
    except UserError:  # the check of the data reports it
        return False
    return bool(records) and all(_is_prompt(record) for record in records)


def _is_prompt(record: Mapping[str, Any]) -> bool:
    if "messages" in record:
        return record["messages"][-1]["role"] != "assistant"
    return "prompt" in record and not record["completion"].strip()
