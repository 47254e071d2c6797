"""Benchmarks of code: a model's programs are run against tests in a contained process.

HumanEval, MBPP and HumanEval-Infilling as tasks of lm-evaluation-harness, for data from the hub or from files in their
form. They replace the harness's tasks of these names, which run code in the harness's process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from decausal.errors import UserError
from decausal.evaluation.harness.contained import Ending, Limits, run_all


class CodeTask(ConfigurableTask):
    """A task whose answers are programs. Its YAML file holds what a subclass does not define.

    Attributes:
        num_answers: Number of programs for each problem.
        ks: The k for which pass@k is reported; at most `num_answers`.
        may_run: Whether programs are run. If not, figures that need it are not reported.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {}
    num_answers = 1
    ks: tuple[int, ...] = (1,)
    may_run = True

    def __init__(self, config: dict[str, Any]) -> None:
        common = {"output_type": "generate_until", "test_split": "test", "num_fewshot": 0, "unsafe_code": True}
        own = {key: value for key, value in config.items() if key != "class"}
        super().__init__(config={**common, **self.DEFAULTS, **own})
        self.limits = Limits()
        self._endings: dict[str, Ending] = {}

    def arguments(self, doc: dict[str, Any], context: str) -> tuple[str, dict[str, Any]]:
        """Returns the request to a model: a text to continue, and how."""
        return context, dict(self.config.generation_kwargs or {})

    def program(self, doc: dict[str, Any], answer: str) -> str:
        """Returns the answer with its tests."""
        raise NotImplementedError

    def text_scores(self, doc: dict[str, Any], answers: Sequence[str]) -> dict[str, float]:
        """Returns scores of the answers as texts, apart from running them."""
        return {}

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """Returns one request for each answer, with different seeds."""
        metadata = kwargs["metadata"]
        text, how = self.arguments(doc, ctx)
        if how.get("temperature"):
            how.pop("do_sample", None)  # with this set, the harness caches no answers, as if all came from one stream
        seeds = [{}] if self.num_answers == 1 else [{"seed": number} for number in range(self.num_answers)]
        return [
            Instance("generate_until", doc, (text, how | seed), number, metadata=metadata)
            for number, seed in enumerate(seeds)
        ]

    def apply_filters(self) -> None:
        """Takes the answers unchanged, and runs all programs in parallel."""
        super().apply_filters()
        if not self.may_run:
            return
        programs = [self.program(instance.doc, instance.resps[0]) for instance in self.instances]
        distinct = list(dict.fromkeys(programs))
        self._endings = dict(zip(distinct, run_all(distinct, self.limits), strict=True))

    def process_results(self, doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
        """Returns the figures of one problem."""
        scores = self.text_scores(doc, results)
        if self.may_run:
            num_right = sum(self._endings[self.program(doc, answer)].passed for answer in results)
            scores |= {f"pass@{k}": pass_at_k(len(results), num_right, k) for k in self.ks}
        return scores

    def aggregation(self) -> dict[str, Any]:
        """Returns that every figure is averaged."""
        return dict.fromkeys(self._figures(), _mean)

    def higher_is_better(self) -> dict[str, bool]:
        """Returns that a higher value is better for every figure."""
        return dict.fromkeys(self._figures(), True)

    def _figures(self) -> list[str]:
        return [*self.text_scores({}, []), *(f"pass@{k}" for k in self.ks if self.may_run)]


class HumanEval(CodeTask):
    """The model continues a function from its signature and docstring."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{canonical_solution}}",
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@"],
            "max_gen_toks": 384,
            "do_sample": False,
        },
    }

    def program(self, doc: dict[str, Any], answer: str) -> str:
        """See `CodeTask`."""
        return f"{doc['prompt']}{answer}\n{doc['test']}\ncheck({doc['entry_point']})\n"


class MBPP(CodeTask):
    """The model writes a function for a task in one sentence, with tests that it must pass."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "doc_to_text": (
            "You are an expert Python programmer, and here is your task: {{text}} Your code should pass these tests:"
            "\n\n{{test_list|join('\n')}}\n[BEGIN]\n"
        ),
        "doc_to_target": "{{code}}\n[DONE]",
        "target_delimiter": "",
        "num_fewshot": 3,
        "fewshot_config": {"sampler": "first_n"},
        "generation_kwargs": {"until": ["[DONE]"], "max_gen_toks": 384, "do_sample": False},
    }

    def program(self, doc: dict[str, Any], answer: str) -> str:
        """See `CodeTask`."""
        return "\n".join([answer, doc.get("test_setup_code") or "", *doc["test_list"], ""])


class Infilling(CodeTask):
    """The model fills a hole in a function and sees what comes after it.

    With `length: given` in the task's metadata, the model knows how many tokens the hole has; otherwise it has to find
    out. A model that cannot see what comes after a hole, like the AR source, continues what is before it.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{canonical_solution}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 64, "do_sample": False},
    }

    def arguments(self, doc: dict[str, Any], context: str) -> tuple[str, dict[str, Any]]:
        """Returns the text before the hole. `infill` holds the text after it and, if given, the hole's content for its
        length."""
        hole, after = _hole(doc)
        is_given = (self.config.metadata or {}).get("length") == "given"
        infill = {"suffix": after, "as_long_as": hole if is_given else None}
        until = ["\n"] if hole != doc["canonical_solution"] else []  # a line, whose end comes after the hole
        return doc["prompt"], {**(self.config.generation_kwargs or {}), "until": until, "infill": infill}

    def program(self, doc: dict[str, Any], answer: str) -> str:
        """See `CodeTask`."""
        whole = doc["prompt"] + answer + _hole(doc)[1]
        return f"{whole}\n{doc['test']}\ncheck({doc['entry_point']})\n"

    def text_scores(self, doc: dict[str, Any], answers: Sequence[str]) -> dict[str, float]:
        """Returns how many equal the solution, apart from surrounding space, and how similar they are to it."""
        hole = _hole(doc)[0] if doc else ""
        same = [float(answer.strip() == hole.strip()) for answer in answers]
        return {"exact_match": _mean(same), "edit_similarity": _mean([similarity(each, hole) for each in answers])}


def _hole(doc: dict[str, Any]) -> tuple[str, str]:
    """Returns the hole's content and what comes after it, including the end of a line."""
    hole, after = doc["canonical_solution"], doc["suffix"]
    return (hole[:-1], "\n" + after) if hole.endswith("\n") else (hole, after)


def pass_at_k(num_answers: int, num_right: int, k: int) -> float:
    """Returns the probability that at least one of k answers, drawn without replacement, is right.

    Source: the unbiased estimator of Chen et al., Evaluating large language models trained on code (arXiv 2107.03374).
    """
    return 1 - math.comb(num_answers - num_right, k) / math.comb(num_answers, k)


def similarity(first: str, second: str) -> float:
    """Returns 1 minus the edits (insertions, deletions, replacements of characters) over the length of the longer
    text."""
    if not first and not second:
        return 1.0
    row = list(range(len(second) + 1))
    for i, mine in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, theirs in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (mine != theirs))
    return 1 - row[-1] / max(len(first), len(second))


def prepare(
    tasks: Sequence[Any], *, may_run: bool, num_answers: int = 1, ks: Sequence[int] = (1,), is_drawn: bool = True
) -> None:
    """Sets how many answers code tasks have, and refuses to run programs without permission.

    Raises:
        UserError: Programs would be run without permission, k exceeds `num_answers`, or all answers would be the same
            without sampling.
    """
    if max(ks) > num_answers or min(ks) < 1:
        raise UserError(f"--k {max(ks)}: pass@k needs at least k answers of a problem; give --num_answers {max(ks)}")
    if num_answers > 1 and not is_drawn:
        raise UserError(f"--num_answers {num_answers}: without --temperature all answers are the same; give it")
    for task in tasks:
        if not isinstance(task, CodeTask):
            continue
        task.num_answers, task.ks = num_answers, tuple(ks)
        task.may_run = may_run
        if not may_run and not task._figures():
            raise UserError(
                f"task '{task.task_name}' runs programs that a model has written; allow it with "
                "--allow_code_execution (docs/evaluation.md says what they may do)"
            )
        task.UNSAFE_CODE = may_run


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
