"""Write with an unmasking order of your own.

    python examples/own_sampler.py [MODEL] [PROMPT]

MODEL is a converted model of layout "bidirectional", such as decausal-demo/aligned. The order here works from both
ends of the gap towards its middle: each step keeps the best token at the leftmost and the rightmost open position.
"""

import sys

import torch
from torch import Tensor

import decausal
from decausal.models.backbone import logits


@torch.no_grad()
def fill_from_both_ends(model: decausal.DiffusionModel, ids: Tensor, is_open: Tensor) -> Tensor:
    """Replaces the open positions of one row.

    Args:
        model: Layout "bidirectional".
        ids: Token ids [T]; what stands at open positions is ignored.
        is_open: Positions to write [T]. With shift 1 never the first: no state predicts it.

    Returns:
        The finished row [T].
    """
    mask = model.facts.mask_token_id
    ids, is_open = ids.masked_fill(is_open, mask), is_open.clone()
    while is_open.any():
        scores = logits(model.model, ids[None], model.facts.attention)[0]
        scores[:, mask] = -torch.inf  # the mask token is never a prediction
        places = is_open.nonzero().flatten()[[0, -1]].unique()
        predicting = places - model.facts.shift  # with shift 1, the state before a token predicts it
        ids[places] = scores[predicting].argmax(dim=-1)
        is_open[places] = False
    return ids


def main(directory: str = "decausal-demo/aligned", prefix: str = "def area(width, height):\n", length: int = 12) -> str:
    model = decausal.load(directory)
    tokens = model.tokenizer(prefix, return_tensors="pt")["input_ids"][0]
    end = model.tokenizer("\n    return area\n", return_tensors="pt")["input_ids"][0]
    gap = torch.full((length,), model.facts.mask_token_id)
    ids = torch.cat([tokens, gap, end]).to(model.model.device)
    is_open = ids == model.facts.mask_token_id
    return model.tokenizer.decode(fill_from_both_ends(model, ids, is_open))


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
