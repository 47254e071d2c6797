"""Tasks of lm-evaluation-harness for data files that are here: `decausal eval harness DIR --include_path TASKS`.

    python benchmarks/local_tasks.py --data DIR --output_dir TASKS

What a task asks and how it is scored is the harness's own, from the task's file in the installed package; the data are
files in DIR, and the names end in _local:

    lambada_local       lambada_test.jsonl: text
    piqa_local          piqa_valid.jsonl: goal, sol1, sol2; and piqa_valid_labels.lst, 0 or 1 a line
    wikitext2_local     wikitext2_test.txt, in the tokenised form with <unk>: another text than that of `wikitext`
    gsm8k_local         gsm8k_test.jsonl and gsm8k_train.jsonl: question, answer
    instructions_local  instructions.jsonl: messages; the last 255 rows, bits per byte of their answers
    humaneval_local     HumanEval.jsonl: prompt, entry_point, canonical_solution, test
    mbpp_local          mbpp.jsonl: task_id, text, code, test_list; ids 1 to 10 are the examples before a question
    humaneval_single_line_infilling_local          HumanEval-SingleLineInfilling.jsonl: as HumanEval, and suffix
    humaneval_random_span_light_infilling_local    HumanEval-RandomSpanInfillingLight.jsonl: the same
    ..._length_given_local                         both with the length of the hole given

Files may be packed (.gz). A file that is missing leaves its tasks out, and a line says so.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from decausal.errors import UserError

NUM_HELD_OUT = 255
INFILLING = {
    "humaneval_single_line_infilling": "HumanEval-SingleLineInfilling.jsonl",
    "humaneval_random_span_light_infilling": "HumanEval-RandomSpanInfillingLight.jsonl",
}
CODE = "decausal.evaluation.harness.code_tasks"
PROBLEM = ("prompt", "entry_point", "canonical_solution", "test")


class _MissingError(Exception):
    """A data file that is not there."""


def write_tasks(data: Path, output_dir: Path) -> tuple[list[str], list[str]]:
    """Writes the tasks that there are data for.

    Args:
        data: Directory of data files.
        output_dir: Made if it does not exist; files of the same names are replaced.

    Returns:
        The names of the tasks, and a line for each that is left out.

    Raises:
        UserError: There are no data at all, or a file lacks a field.
    """
    if not data.is_dir():
        raise UserError(f"--data {data} is no directory")
    output_dir.mkdir(parents=True, exist_ok=True)
    written, left_out = [], []
    for write in (_lambada, _piqa, _wikitext2, _gsm8k, _instructions, _humaneval, _mbpp, _infilling):
        try:
            written += write(data, output_dir.resolve())
        except _MissingError as missing:
            left_out.append(f"{write.__name__[1:]}: left out, {missing} is not in {data}")
    if not written:
        raise UserError(f"--data {data} holds none of the files; see {sys.argv[0]} --help")
    return written, left_out


def _lambada(data: Path, out: Path) -> list[str]:
    _write_rows(out / "lambada.jsonl", _rows(data, "lambada_test.jsonl", ("text",)))
    return [_write(out, "lambada_local", "lambada/lambada_openai.yaml", test=out / "lambada.jsonl")]


def _piqa(data: Path, out: Path) -> list[str]:
    rows = _rows(data, "piqa_valid.jsonl", ("goal", "sol1", "sol2"))
    labels = _file(data, "piqa_valid_labels.lst").read_text().split()
    if len(labels) != len(rows) or set(labels) - {"0", "1"}:
        raise UserError(f"piqa_valid_labels.lst has {len(labels)} labels for {len(rows)} rows; one a line, 0 or 1")
    _write_rows(out / "piqa.jsonl", [row | {"label": int(label)} for row, label in zip(rows, labels, strict=True)])
    return [_write(out, "piqa_local", "piqa/piqa.yaml", validation=out / "piqa.jsonl")]


def _wikitext2(data: Path, out: Path) -> list[str]:
    text = _file(data, "wikitext2_test.txt").read_text(encoding="utf-8")
    pages = re.split(r"(?m)^(?= = [^=].* = \s*$)", text)  # a page begins with its title; sections have more signs
    _write_rows(out / "wikitext2.jsonl", [{"page": page} for page in pages if page.strip()])
    return [_write(out, "wikitext2_local", "wikitext/wikitext.yaml", test=out / "wikitext2.jsonl")]


def _gsm8k(data: Path, out: Path) -> list[str]:
    for split in ("train", "test"):
        _write_rows(out / f"gsm8k_{split}.jsonl", _rows(data, f"gsm8k_{split}.jsonl", ("question", "answer")))
    files = {split: out / f"gsm8k_{split}.jsonl" for split in ("train", "test")}
    return [_write(out, "gsm8k_local", "gsm8k/gsm8k.yaml", **files)]


def _instructions(data: Path, out: Path) -> list[str]:
    rows = _rows(data, "instructions.jsonl", ("messages",))[-NUM_HELD_OUT:]
    pairs = [{"prompt": row["messages"][0]["content"], "answer": row["messages"][-1]["content"]} for row in rows]
    _write_rows(out / "instructions.jsonl", pairs)
    lines = [
        "output_type: loglikelihood",
        "test_split: test",
        'doc_to_text: "{{prompt}}"',
        'doc_to_target: "{{answer}}"',
        'target_delimiter: "\\n"',
        "process_results: !function decausal.evaluation.harness.answers.bits_of_answer",
        "metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]",
        "metadata: {version: 1.0}",
    ]
    return [_write(out, "instructions_local", lines, test=out / "instructions.jsonl")]


def _humaneval(data: Path, out: Path) -> list[str]:
    _write_rows(out / "humaneval.jsonl", _rows(data, "HumanEval.jsonl", PROBLEM))
    return [_write(out, "humaneval_local", _code("HumanEval"), test=out / "humaneval.jsonl")]


def _mbpp(data: Path, out: Path) -> list[str]:
    rows = _rows(data, "mbpp.jsonl", ("task_id", "text", "code", "test_list"))
    _write_rows(out / "mbpp_prompt.jsonl", [row for row in rows if int(row["task_id"]) <= 10])
    _write_rows(out / "mbpp_test.jsonl", [row for row in rows if 10 < int(row["task_id"]) <= 510])
    lines = [*_code("MBPP"), "fewshot_split: prompt"]
    return [_write(out, "mbpp_local", lines, test=out / "mbpp_test.jsonl", prompt=out / "mbpp_prompt.jsonl")]


def _infilling(data: Path, out: Path) -> list[str]:
    written = []
    for name, file in INFILLING.items():
        path = out / f"{name}.jsonl"
        _write_rows(path, _rows(data, file, (*PROBLEM, "suffix")))
        written.append(_write(out, f"{name}_local", _code("Infilling", "unknown"), test=path))
        written.append(_write(out, f"{name}_length_given_local", _code("Infilling", "given"), test=path))
    return written


def _code(kind: str, length: str | None = None) -> list[str]:
    length_field = "" if length is None else f", length: {length}"
    return [f"class: !function {CODE}.{kind}", f"metadata: {{version: 1.0{length_field}}}"]


def _write(out: Path, name: str, of: str | Sequence[str], **splits: Path) -> str:
    """Writes a task's file: on top of the harness's own of that path, or of these lines."""
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise UserError("lm-evaluation-harness is not installed; it comes with the extra: pip install 'decausal[eval]'")
    own = [f"include: {Path(spec.origin).parent / 'tasks' / of}", "dataset_name: null"] if isinstance(of, str) else of
    unused = [] if not isinstance(of, str) else [f"{kind}_split: null" for kind in _unused(splits)]
    files = [f"    {split}: {json.dumps(str(path))}" for split, path in splits.items()]
    lines = [*own, *unused, f"task: {name}", "dataset_path: json", "dataset_kwargs:", "  data_files:", *files]
    (out / f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def _unused(splits: Iterable[str]) -> list[str]:
    """The splits that the harness's own file names and these data do not have."""
    names = {"training": "train", "validation": "validation", "test": "test"}
    return [kind for kind, split in names.items() if split not in splits]


def _rows(data: Path, name: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    path = _file(data, name)
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    rows = []
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: no JSON ({error})") from None
            if missing := [field for field in fields if field not in row]:
                raise UserError(f"{path}, line {number}: no '{missing[0]}'; it has {', '.join(row)}")
            rows.append(row)
    return rows


def _file(data: Path, name: str) -> Path:
    """The file, packed or not."""
    for path in (data / name, data / f"{name}.gz"):
        if path.exists():
            return path
    raise _MissingError(name)


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of data files")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the tasks go")
    flags = parser.parse_args()
    try:
        written, left_out = write_tasks(flags.data, flags.output_dir)
    except UserError as error:
        print(f"local_tasks: error: {error}", file=sys.stderr)
        return 2
    for line in left_out:
        print(line, file=sys.stderr)
    print(f"decausal eval harness DIR --include_path {flags.output_dir} --tasks {','.join(written)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
