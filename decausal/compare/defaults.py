"""Default settings of a comparison from the embedded model of tasks, small enough for a laptop.

Recipes suit large models and long texts. These are for 2 million parameters and answers of 40 characters.
"""

from __future__ import annotations

EMBEDDED = "tiny-tasks"

SHARED: dict[str, str] = {
    "block_size": "4",
    "shift": "1",
    "causal_context": "true",
    "max_length": "128",
    "per_device_train_batch_size": "8",
    "learning_rate": "1e-3",
}
"""Settings for every recipe with a block layout. A step reads about a thousand clean tokens, or rolls out half as
many."""

BY_RECIPE: dict[str, dict[str, str]] = {
    "opdlm": {
        "per_device_train_batch_size": "16",
        "learning_rate": "7e-4",
        "rollout_prompts": "16",
        "rollout_tokens": "48",
        "rollout_tokens_start": "48",
        "rollout_curriculum": "0",
    },
    "align-distill": {
        "per_device_train_batch_size": "16",
        "learning_rate": "7e-4",
        "rollout_prompts": "16",
        "rollout_tokens": "48",
    },
}
"""Settings for single recipes, which override those for all."""


def default_settings(model_name_or_path: str, recipe: str) -> dict[str, str]:
    """Returns default settings of an arm, which a user's own override; none for other models."""
    if model_name_or_path != EMBEDDED:
        return {}
    return SHARED | BY_RECIPE.get(recipe, {})
