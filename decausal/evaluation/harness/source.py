"""The AR source in the harness's own `hf` model."""

from __future__ import annotations

import sys
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

CHUNK = 64


class SourceLM(HFLM):
    """The harness's `hf`. For requests to fill a hole, which it cannot do, it continues the text before the hole.

    Texts are requested in parts, so that the cache has those of an interrupted run.
    """

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `hf`. Progress bars only appear in a terminal."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `hf`."""
        texts: list[str] = []
        for start in range(0, len(requests), CHUNK):
            part = requests[start : start + CHUNK]
            written = self._continue([request.args for request in part], disable_tqdm or not sys.stderr.isatty())
            for request, text in zip(part, written, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, text)
            texts += written
        return texts

    def _continue(self, asked: list[tuple[str, dict[str, Any]]], disable_tqdm: bool) -> list[str]:
        """Calls `hf` once per seed, because it draws from the global generator."""
        texts = [""] * len(asked)
        for seed in dict.fromkeys(how.get("seed", 0) for _, how in asked):
            members = [index for index, (_, how) in enumerate(asked) if how.get("seed", 0) == seed]
            plain = [
                Instance("generate_until", {}, (text, {k: v for k, v in how.items() if k not in ("seed", "infill")}), 0)
                for text, how in (asked[index] for index in members)
            ]
            hook, self.cache_hook = self.cache_hook, type(self.cache_hook)(None)  # these answer another request
            torch.manual_seed(seed)
            try:
                written = super().generate_until(plain, disable_tqdm=disable_tqdm)
            finally:
                self.cache_hook = hook
            for index, text in zip(members, written, strict=True):
                texts[index] = text
        return texts
