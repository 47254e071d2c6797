"""Configuration of an SDAR checkpoint that decausal has exported.

This file lies beside the weights, because transformers knows no model type "sdar". It computes nothing: engines that
serve SDAR (SGLang, LMDeploy) bring the model's code and read its numbers here.
"""

from transformers import PretrainedConfig


class SDARConfig(PretrainedConfig):
    """The keys of `config.json`, as attributes."""

    model_type = "sdar"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, **keys):
        super().__init__(**keys)
        # Versions of transformers move one into the other, and engines look for either.
        for name in ("rope_parameters", "rope_theta"):
            if name in keys:
                setattr(self, name, keys[name])
        if not hasattr(self, "use_cache"):  # transformers 5 keeps it elsewhere, and SDAR's own model reads it here
            self.use_cache = keys.get("use_cache", True)
        if not hasattr(self, "rope_scaling"):  # transformers 4; in 5 it is another name of rope_parameters
            self.rope_scaling = None


class SDARMoeConfig(SDARConfig):
    """The same for a mixture of experts."""

    model_type = "sdar_moe"

    def __init__(self, **keys):  # transformers 5 gives a class that has none of its own another one
        super().__init__(**keys)
