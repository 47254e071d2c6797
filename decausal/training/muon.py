"""Muon for weight matrices and AdamW for the rest, as one optimiser for transformers.Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps `torch.optim.Muon` on the matrices inside the layers and `torch.optim.AdamW` on everything else.

    Embeddings and head stay with AdamW, as Muon's authors advise. Both are torch's own. This class joins their groups,
    so that one scheduler drives both and one state dict holds both. Source: Jordan et al., "Muon", 2024; rates made
    comparable by matching AdamW's update RMS (arXiv 2502.16982).
    """

    def __init__(self, model: nn.Module, muon_learning_rate: float, learning_rate: float, weight_decay: float) -> None:
        embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        head = model.get_output_embeddings()
        embeddings |= {id(p) for p in head.parameters()} if head is not None else set()
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim == 2 and id(p) not in embeddings]
        rest = [p for p in trained if p.ndim != 2 or id(p) in embeddings]
        muon = torch.optim.Muon(
            matrices, lr=muon_learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        adamw = torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self._parts = (muon, adamw)
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            for group in part.param_groups:
                for parameter in group["params"]:
                    if parameter in self.state:
                        part.state[parameter] = self.state[parameter]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for part in self._parts:
            part.step()
            self.state.update(part.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share_groups()
