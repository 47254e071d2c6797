"""What a comparison from the embedded model of the tasks sets where its user says nothing: small enough for a laptop.

Recipes hold what suits large models and long texts; these are for 2 million parameters and answers of 40 characters.
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
"""For every recipe with a block layout. A step reads about a thousand clean tokens, or rolls out half as many."""

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
"""For single recipes, over those for all."""


def default_settings(model_name_or_path: str, recipe: str) -> dict[str, str]:
    """Returns settings of one arm that its user's own win over; none for any other model."""
    if model_name_or_path != EMBEDDED:
        return {}
    return SHARED | BY_RECIPE.get(recipe, {})
