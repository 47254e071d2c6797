"""Benchmarks of code: what a model writes is run against tests, in a contained process.

HumanEval, MBPP and HumanEval-Infilling as tasks of lm-evaluation-harness, for data from the hub or from files in their
form. The harness's own tasks of these names run code in its own process; these take their place.
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
    """A task whose answers are programs. What a subclass does not say is in its YAML file.

    Attributes:
        num_answers: Programs written for each problem.
        ks: For which k pass@k is told; at most `num_answers`.
        may_run: Whether programs are run; where not, nothing is told that needs it.
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
        """Returns what a model is asked: a text to continue, and how."""
        return context, dict(self.config.generation_kwargs or {})

    def program(self, doc: dict[str, Any], answer: str) -> str:
        """Returns the answer with what tests it."""
        raise NotImplementedError

    def text_scores(self, doc: dict[str, Any], answers: Sequence[str]) -> dict[str, float]:
        """Scores of answers as texts, beside those of running them."""
        return {}

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """One request for each answer, that differ by their seeds."""
        metadata = kwargs["metadata"]
        text, how = self.arguments(doc, ctx)
        if how.get("temperature"):
            how.pop("do_sample", None)  # with it the harness keeps no answers, as if all were drawn from one stream
        seeds = [{}] if self.num_answers == 1 else [{"seed": number} for number in range(self.num_answers)]
        return [
            Instance("generate_until", doc, (text, how | seed), number, metadata=metadata)
            for number, seed in enumerate(seeds)
        ]

    def apply_filters(self) -> None:
        """Takes the answers as they are, and runs all programs, side by side."""
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
        """Means of all figures."""
        return dict.fromkeys(self._figures(), _mean)

    def higher_is_better(self) -> dict[str, bool]:
        """So it is for all of them."""
        return dict.fromkeys(self._figures(), True)

    def _figures(self) -> list[str]:
        return [*self.text_scores({}, []), *(f"pass@{k}" for k in self.ks if self.may_run)]


class HumanEval(CodeTask):
    """A function is continued from its signature and docstring."""

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
    """A function is written for a task told in a sentence, with tests that it must pass."""

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
    """A hole in a function is filled, with sight of what is behind it.

    `length: given` in the task's metadata tells the model how many tokens the hole has; otherwise it finds out. A model
    that cannot see what is behind a hole, like the AR source, continues what is before it.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{canonical_solution}}",
        "generation_kwargs": {"max_gen_toks": 64, "do_sample": False},
    }

    def arguments(self, doc: dict[str, Any], context: str) -> tuple[str, dict[str, Any]]:
        """Returns the text before the hole; in `infill` the text behind it and, where it is given, what tells the
        length."""
        hole, behind = _hole(doc)
        is_given = (self.config.metadata or {}).get("length") == "given"
        infill = {"suffix": behind, "as_long_as": hole if is_given else None}
        until = ["\n"] if hole != doc["canonical_solution"] else []  # a line, and its end stands behind the hole
        return doc["prompt"], {**(self.config.generation_kwargs or {}), "until": until, "infill": infill}

    def program(self, doc: dict[str, Any], answer: str) -> str:
        """See `CodeTask`."""
        whole = doc["prompt"] + answer + _hole(doc)[1]
        return f"{whole}\n{doc['test']}\ncheck({doc['entry_point']})\n"

    def text_scores(self, doc: dict[str, Any], answers: Sequence[str]) -> dict[str, float]:
        """Returns how many are the solution, but for space around it, and how alike they are to it."""
        hole = _hole(doc)[0] if doc else ""
        same = [float(answer.strip() == hole.strip()) for answer in answers]
        return {"exact_match": _mean(same), "edit_similarity": _mean([similarity(each, hole) for each in answers])}


def _hole(doc: dict[str, Any]) -> tuple[str, str]:
    """Returns what stood in the hole, and what stands behind it: the end of a line belongs to the latter."""
    hole, behind = doc["canonical_solution"], doc["suffix"]
    return (hole[:-1], "\n" + behind) if hole.endswith("\n") else (hole, behind)


def pass_at_k(num_answers: int, num_right: int, k: int) -> float:
    """Chance that of k answers, drawn from those given without putting back, any is right.

    Source: the unbiased estimator of Chen et al., Evaluating large language models trained on code (arXiv 2107.03374).
    """
    return 1 - math.comb(num_answers - num_right, k) / math.comb(num_answers, k)


def similarity(first: str, second: str) -> float:
    """1 less the edits (characters put in, left out or exchanged) over the length of the longer text."""
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
    """Sets how many answers tasks of code have, and refuses to run any without leave.

    Raises:
        UserError: Programs would be run without leave, k is over `num_answers`, or answers would all be the same, since
            they are not drawn.
    """
    if max(ks) > num_answers or min(ks) < 1:
        raise UserError(f"--k {max(ks)}: pass@k needs at least k answers of a problem; give --num_answers {max(ks)}")
    if num_answers > 1 and not is_drawn:
        raise UserError(f"--num_answers {num_answers}: without --temperature all of them are the same; give it")
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
