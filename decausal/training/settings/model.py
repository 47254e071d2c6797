"""Settings for the model that a conversion starts from."""

from __future__ import annotations

from dataclasses import dataclass

from decausal.training.settings.field import Family, setting


@dataclass(frozen=True)
class ModelSettings(Family):
    """Model."""

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
    compile_layers: bool | None = setting(
        None,
        "compile the decoder layers: the first step is slow, later ones are faster; unset: on a GPU, where a run is "
        "long enough to repay it",
    )
