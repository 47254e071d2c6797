"""The floating-point operations that a training step cannot do without, per token that the student reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from decausal.models.backbone import stock_model


@dataclass(frozen=True)
class ModelShape:
    """What decides a step's operations.

    Attributes:
        body_weights: entries of the body's matrices, N (embeddings, norms and head apart).
        attention_width: heads times head size, over all layers.
        width: d.
        vocab_size: V.
    """

    body_weights: int
    attention_width: int
    width: int
    vocab_size: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelShape:
        """Reads the shape of a dense transformer."""
        config, body = model.config, stock_model(model).base_model
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            body_weights=sum(module.weight.numel() for module in body.modules() if isinstance(module, nn.Linear)),
            attention_width=config.num_hidden_layers * config.num_attention_heads * head_dim,
            width=config.hidden_size,
            vocab_size=config.vocab_size,
        )

    def body(self, length: int, *, is_causal: bool) -> float:
        """One forward pass of the body: 2N, and 4 T H of attention (scores and values), half of it where causal.

        T is the length of a document: tokens read no other.
        """
        attention = 4 * length * self.attention_width
        return 2 * self.body_weights + (attention / 2 if is_causal else attention)

    def plain_step(self, length: int, target_share: float) -> float:
        """Forward and backward of a bidirectional student, head and loss on targets only: 3(2N + A) + 6dVr."""
        return 3 * self.body(length, is_causal=False) + 6 * self.width * self.vocab_size * target_share

    def aligned_step(self, length: int, target_share: float, views: int) -> float:
        """And the teacher's body, causal, once for all views of a clean row: + (2N + A/2) / K."""
        return self.plain_step(length, target_share) + self.body(length, is_causal=True) / views
