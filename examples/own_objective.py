"""Train on an objective of your own, without a change to the package.

    python examples/own_objective.py [MODEL] [DATA] [OUT]

The objective here is the z-loss: the squared log of the softmax's normaliser at masked tokens, which keeps logits from
drifting. It is added to the usual token loss. docs/extend.md adds an objective to the package instead, with settings,
a schedule and a name on the command line.
"""

import sys
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from decausal.data.counts import Count
from decausal.data.rows import load_rows
from decausal.data.stream import Collator, Noising, TrainingStream
from decausal.diffusion.layout import Layout
from decausal.models.adapt import adapt, load_source
from decausal.models.checkpoint import save_converted
from decausal.models.facts import ConversionFacts
from decausal.objectives.head import logits
from decausal.training.losses import Supervision, Weighted
from decausal.training.questions import Answers
from decausal.training.run import run_length, training_arguments
from decausal.training.schedule import WeightSchedule
from decausal.training.terms import Reading, Term, TokenTerm
from decausal.training.trainer import ConversionTrainer

SHIFT = 1


class NormaliserTerm(Term):
    """The squared log of the normaliser, summed over masked tokens."""

    log_name = "z_loss"
    setting = "z"
    count = Count.TOKENS  # what the sum is divided by: the targets of the whole global batch

    def sum(self, reading: Reading, answers: Answers) -> Float[Tensor, ""]:
        states = reading.states_at("target_index")
        return logits(states, reading.head).logsumexp(dim=-1).square().sum()


def main(
    source: str = "tiny", data: str = "stdlib", output_dir: str = "own-objective", max_steps: int = 100
) -> list[dict[str, float]]:
    """Returns the log, which has a `z_loss` beside the `token_loss`."""
    model, tokenizer = load_source(source)
    mask_token_id = adapt(model, tokenizer)
    args = training_arguments(
        {
            "output_dir": output_dir,
            "max_steps": max_steps,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": max(max_steps // 10, 1),
            "save_strategy": "no",
        }
    )
    rows = load_rows(data, tokenizer, min(256, model.config.max_position_embeddings))
    losses = (Weighted(TokenTerm(), WeightSchedule(1.0)), Weighted(NormaliserTerm(), WeightSchedule(1e-3)))
    trainer = ConversionTrainer(
        model,
        args,
        stream=TrainingStream(rows, run_length(args, len(rows)), seed=args.seed, shift=SHIFT, noising=Noising()),
        collator=Collator(mask_token_id, SHIFT),
        supervision=Supervision(Layout("bidirectional"), mask_token_id, losses),
    )
    trainer.train()
    facts = ConversionFacts(source=source, layout="bidirectional", shift=SHIFT, mask_token_id=mask_token_id)
    save_converted(Path(output_dir), model, tokenizer, facts)
    return trainer.state.log_history


if __name__ == "__main__":
    for entry in main(*sys.argv[1:]):
        print(entry)
