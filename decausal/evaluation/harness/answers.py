"""Figures for tasks with answers of any length."""

from __future__ import annotations

from typing import Any


def bits_of_answer(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """Returns an answer's log-likelihood and bytes, from which the harness computes bits per byte over all answers."""
    ((log_likelihood, _),) = results
    return {"bits_per_byte": (log_likelihood, len(doc["answer"].encode()))}
