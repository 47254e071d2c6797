"""Configuration of an SDAR checkpoint that decausal has exported.

This file lies beside the weights because transformers has no model type "sdar". It only holds numbers: engines that
serve SDAR (SGLang, LMDeploy) bring the model's code.
"""

from transformers import PretrainedConfig


class SDARConfig(PretrainedConfig):
    """The keys of `config.json`, as attributes."""

    model_type = "sdar"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, **keys):
        super().__init__(**keys)
        # Versions of transformers move one into the other, and engines look for both.
        for name in ("rope_parameters", "rope_theta"):
            if name in keys:
                setattr(self, name, keys[name])
        if not hasattr(self, "use_cache"):  # transformers 5 keeps it elsewhere, but SDAR's own model reads it here
            self.use_cache = keys.get("use_cache", True)
        if not hasattr(self, "rope_scaling"):  # for transformers 4; in version 5 it is another name of rope_parameters
            self.rope_scaling = None


class SDARMoeConfig(SDARConfig):
    """The same for a mixture of experts."""

    model_type = "sdar_moe"

    def __init__(self, **keys):  # transformers 5 would give a class without its own another one
        super().__init__(**keys)
