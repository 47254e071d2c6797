"""What a user can set for pretraining, apart from transformers' own training arguments.

This file is light: the command line reads the class to print its help.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from decausal.data.reading import Reading
from decausal.errors import UserError
from decausal.training.settings.data import RecordSettings
from decausal.training.settings.field import at_least, setting


@dataclass(frozen=True)
class PretrainSettings(RecordSettings):
    """A small AR model from nothing: its tokenizer, its shape and its text."""

    data: str | tuple[str, ...] = setting("stdlib", "as for convert")
    eval_data: str | tuple[str, ...] | None = setting("stdlib-heldout", "text for the closing measurement")
    max_length: int = setting(1024, "tokens in a packed row")
    max_position_embeddings: int | None = setting(None, "the model's context, if not max_length")
    tokenizer: Literal["bpe", "characters"] = setting(
        "bpe", "bpe: byte-level, trained on the same data; characters: printable ASCII, one token each"
    )
    vocab_size: int = setting(4096, "entries of the BPE tokenizer")
    hidden_size: int = setting(320, "width")
    intermediate_size: int = setting(832, "width of the feed-forward layers")
    num_hidden_layers: int = setting(6, "layers")
    num_attention_heads: int = setting(5, "query heads")
    num_key_value_heads: int = setting(1, "key and value heads")
    attn_implementation: Literal["sdpa", "eager"] = setting("sdpa", "eager is the faster in short rows on a CPU")
    muon_learning_rate: float = setting(5e-3, "peak rate of the weight matrices; learning_rate is for all the rest")
    compile_layers: bool = setting(False, "compile the decoder layers: the first step is slow, later ones are faster")
    overwrite: bool = setting(False, "start again in an output_dir that an earlier run made")

    @property
    def reading(self) -> Reading:
        """How records are read."""
        return replace(super().reading, takes_conversations=False)

    @property
    def context(self) -> int:
        """Tokens that the model reads."""
        return self.max_position_embeddings or self.max_length

    def __post_init__(self) -> None:
        self.check()
        at_least(self, vocab_size=258, num_hidden_layers=1, num_attention_heads=1, hidden_size=1)
        at_least(self, num_key_value_heads=1, intermediate_size=1, max_position_embeddings=self.max_length)
        for whole, part in (("num_attention_heads", "num_key_value_heads"), ("hidden_size", "num_attention_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise UserError(f"--{whole} {getattr(self, whole)} is not a multiple of --{part} {getattr(self, part)}")
        if self.hidden_size // self.num_attention_heads % 2:
            raise UserError(f"--hidden_size {self.hidden_size}: a head's width must be even, for rotary positions")
