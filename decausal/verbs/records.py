"""Records what a verb measured, with everything that it depends on, for `decausal report` and `reproduce`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from decausal.errors import UserError

OUTPUT, JSON = "--output", "--json"


def add_output_flag(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that `keep_record` reads."""
    parser.add_argument(OUTPUT, metavar="FILE", help="keep the figures and what they depend on, for `decausal report`")


def check_output(output: str | None) -> None:
    """Refuses a file that cannot be written, or that something else wrote, before anything is loaded."""
    from decausal.report.records import read_record

    path = None if output is None else Path(output).expanduser()
    if path is None or not path.exists():
        return
    if path.is_dir():
        raise UserError(f"{OUTPUT} {output} is a directory; name a file in it, such as {output}/nll.json")
    if read_record(path) is None:
        raise UserError(f"{OUTPUT} {output} is there and no record of an evaluation; name another file")


def keep_record(
    output: str | None, verb: Sequence[str], arguments: Sequence[str], model: str, figures: dict[str, Any], **more: Any
) -> None:
    """Writes the record of an evaluation.

    Args:
        output: The file; None: nothing is written.
        verb: The verb and, of `eval`, the measure.
        arguments: The command's arguments after the verb.
        model: The model's name as given.
        figures: What was measured.
        **more: Seeds and sampler settings for the manifest.
    """
    if output is None:
        return
    from decausal.privacy import arguments_without_secrets
    from decausal.provenance import provenance
    from decausal.report.records import Evaluation, without_flags, write_record

    given = arguments_without_secrets(without_flags(arguments, OUTPUT, switches=[JSON]))
    manifest = provenance() | {"data_hash": figures.get("data_hash")} | more
    record = Evaluation(verb[-1], [*verb, *given], described(model), figures, manifest)
    write_record(Path(output).expanduser(), record)


def described(name: str) -> dict[str, Any]:
    """Returns a model's name, the hash of its files and its facts."""
    from decausal.files import content_hash
    from decausal.models.names import converted_directory, is_converted

    found: dict[str, Any] = {"name": name, "fingerprint": {}, "facts": None}
    directory = Path(name).expanduser()
    if is_converted(name):
        from decausal.models.facts import read_facts

        directory = Path(converted_directory(name))
        found["facts"] = asdict(read_facts(directory))
    if directory.is_dir():
        weights = [
            path for pattern in ("*.safetensors", "*.bin", "*/*.safetensors") for path in directory.glob(pattern)
        ]
        files = [path for path in weights if not path.relative_to(directory).parts[0].startswith("checkpoint-")]
        found["fingerprint"] = {str(path.relative_to(directory)): content_hash(path) for path in sorted(files)}
    return found
