"""Convert an autoregressive model in Python, measure it, and write with it.

    python examples/convert.py [MODEL] [DATA] [OUT]

The defaults are the embedded model and Python's own library. 200 steps take some minutes on a CPU.
"""

import sys

import decausal
from decausal.evaluation.checkpoint import evaluate_checkpoint


def main(model: str = "tiny", data: str = "stdlib", output_dir: str = "converted", max_steps: int = 200) -> None:
    settings = decausal.ConversionSettings(
        model_name_or_path=model,
        data=data,
        max_length=256,
        align_weight=3.0,
        align_schedule="linear",
    )
    training = {
        "output_dir": output_dir,
        "max_steps": max_steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # below 1: a share of the run
        "logging_steps": max(max_steps // 10, 1),
    }
    conversion = decausal.convert(settings, training)
    losses = [entry["token_loss"] for entry in conversion.history if "token_loss" in entry]
    print(f"token loss: {losses[0]:.2f} at the first log, {losses[-1]:.2f} at the last")

    held_out = "stdlib-heldout" if data == "stdlib" else data
    found = evaluate_checkpoint(output_dir, held_out, max_length=256, num_rows=4, samples_per_row=2)
    print(f"NELBO {found.nelbo_per_token:.2f} nats per token, the AR model's NLL {found.ar_nll_per_token:.2f}")

    converted = decausal.load(output_dir)
    print(converted.generate("def add(a, b):", max_new_tokens=16).full_text)
    print(converted.infill("def area(width, height):", "\n    return area\n", length=8).full_text)


if __name__ == "__main__":
    main(*sys.argv[1:])
