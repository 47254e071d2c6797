"""The harness's command line, `lm_eval`, with converted models: python -m decausal.evaluation.harness."""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
