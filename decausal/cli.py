"""The verbs, nothing else: each reads its flags and calls one function of the library."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any, NoReturn

from decausal.errors import UserError, nearest

DESCRIPTION = """\
Turn an autoregressive language model into a diffusion language model.

  decausal demo                        watch it happen on the model that comes with decausal, in minutes
  decausal convert MODEL --data DATA --output_dir OUT [--recipe repr-align]
                                       convert your own; `decausal convert --help` lists the settings
  decausal generate DIR PROMPT         continue a text with a converted model
  decausal infill DIR --prefix A --suffix B --length N
                                       fill a gap in a text
  decausal eval nll DIR --data DATA    NELBO, bits per byte, masked cross-entropy by noise level
  decausal doctor MODEL                can this model be converted, or used? every check, as a table
  decausal pretrain --output_dir OUT   train a small AR model from nothing
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0, or 2 for bad input, which is told in one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _keep_bars_out_of_files()
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"decausal: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("decausal: interrupted", file=sys.stderr)
        return 130


def _keep_bars_out_of_files() -> None:
    """Without a terminal, an error is the only line on stderr: the libraries' progress bars stay away."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(DESCRIPTION, end="")
        return 0
    if arguments[0] == "--version":
        print(f"decausal {_version()}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise UserError(f"unknown verb '{verb}'{nearest(verb, VERBS)} Verbs: {', '.join(VERBS)}")
    return VERBS[verb](rest)


def _convert(arguments: list[str]) -> int:
    from decausal.config import as_yaml, read_recipe, resolve, take_flag
    from decausal.training.settings import ConversionSettings

    if _wants_help(arguments):
        _print_settings("convert [MODEL]", ConversionSettings, _recipe_help())
        return 0
    positional, flags = _leading_positional(arguments)
    flags, recipe_name = take_flag(flags, "recipe", "repr-align")
    flags, print_config = take_flag(flags, "print_config", "false")
    recipe = read_recipe(recipe_name)
    if positional is not None:
        flags = ["--model_name_or_path", positional, *flags]
    settings, training = resolve(ConversionSettings, recipe, flags, where=f"recipe {recipe_name}")
    if print_config == "true":
        print(as_yaml(settings, training), end="")
        return 0
    from decausal.training.convert import convert

    conversion = convert(settings, training)
    if _is_first_process():
        print(f"converted model: {conversion.output_dir}")
        print(f'next: decausal generate {conversion.output_dir} "your text"')
    return 0


def _pretrain(arguments: list[str]) -> int:
    from decausal.config import as_yaml, resolve, take_flag
    from decausal.training.settings import PretrainSettings

    if _wants_help(arguments):
        _print_settings("pretrain", PretrainSettings)
        return 0
    flags, print_config = take_flag(arguments, "print_config", "false")
    settings, training = resolve(PretrainSettings, {}, flags)
    if print_config == "true":
        print(as_yaml(settings, training), end="")
        return 0
    from decausal.training.pretrain import pretrain

    trained = pretrain(settings, training)
    if _is_first_process():
        print(f"model: {trained.output_dir}")
        if trained.heldout is not None:
            print(f"held out: {trained.heldout.bits_per_byte:.3f} bits per byte")
    return 0


def _demo(arguments: list[str]) -> int:
    from decausal.demo.settings import DemoSettings

    if _wants_help(arguments):
        _print_settings("demo", DemoSettings, takes_training=False)
        return 0
    from decausal.config import resolve_own

    settings = resolve_own(DemoSettings, arguments)
    from decausal.demo.run import run_demo

    run_demo(settings)
    return 0


def _generate(arguments: list[str]) -> int:
    parser = _Parser("generate", "Continue one prompt or several with a converted model.")
    parser.add_argument("directory", help="what `decausal convert` wrote")
    parser.add_argument("prompts", nargs="*", help="texts to continue; none: one from standard input")
    parser.add_argument("--chat", action="store_true", help="put each prompt through the chat template")
    parser.add_argument("--max_new_tokens", "--gen_length", type=int, help="tokens to write (128)")
    _add_sampler_flags(parser)
    flags = parser.parse_args(arguments)
    prompts = flags.prompts or [sys.stdin.read()]
    from decausal.sampling.model import load

    model = load(flags.directory)
    options = _sampler_options(flags) | _given(flags, "max_new_tokens")
    with _watching(model, flags.watch and len(prompts) == 1) as on_step:
        found = model.generate(prompts, chat=flags.chat, batch_size=flags.batch_size, on_step=on_step, **options)
    _print_generations(found, as_json=flags.json)
    return 0


def _infill(arguments: list[str]) -> int:
    parser = _Parser("infill", "Write the missing middle of a text.")
    parser.add_argument("directory", help="what `decausal convert` wrote")
    parser.add_argument("--prefix", required=True, help="text before the gap")
    parser.add_argument("--suffix", required=True, help="text after the gap")
    parser.add_argument("--length", type=int, required=True, help="tokens in the gap")
    _add_sampler_flags(parser)
    flags = parser.parse_args(arguments)
    from decausal.sampling.model import load

    model = load(flags.directory)
    with _watching(model, flags.watch) as on_step:
        found = model.infill(flags.prefix, flags.suffix, flags.length, on_step=on_step, **_sampler_options(flags))
    _print_generations([found], as_json=flags.json)
    return 0


def _eval(arguments: list[str]) -> int:
    if not arguments or arguments[0] != "nll":
        asked = f"'{arguments[0]}' is not known" if arguments and not _wants_help(arguments) else "name what to measure"
        raise UserError(f"eval: {asked}; there is: decausal eval nll DIR --data DATA")
    parser = _Parser("eval nll", "Likelihood of held-out text under a converted model, beside its AR source.")
    parser.add_argument("directory", help="what `decausal convert` wrote")
    parser.add_argument("--data", required=True, help="text, as for convert; 'stdlib-heldout' is at hand everywhere")
    parser.add_argument("--text_field", default="text")
    parser.add_argument("--max_length", type=int, default=512, help="tokens in a row (512)")
    parser.add_argument("--num_rows", type=int, default=64, help="rows to measure on (64)")
    parser.add_argument("--samples_per_row", type=int, default=8, help="mask patterns per row (8)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_source", action="store_true", help="leave out the AR source's own likelihood")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args(arguments[1:])
    from decausal.evaluation.likelihood import evaluate_checkpoint

    likelihood = evaluate_checkpoint(
        flags.directory,
        flags.data,
        text_field=flags.text_field,
        max_length=flags.max_length,
        num_rows=flags.num_rows,
        samples_per_row=flags.samples_per_row,
        batch_size=flags.batch_size,
        seed=flags.seed,
        with_source=not flags.no_source,
    )
    if flags.json:
        print(json.dumps(likelihood.as_dict(), indent=2))
    else:
        from rich.console import Console

        Console().print(likelihood.as_table())
    return 0


def _doctor(arguments: list[str]) -> int:
    parser = _Parser("doctor", "Check whether an AR model can be converted, or a converted one used.")
    parser.add_argument("model", help="a directory, a hub id, or 'tiny'")
    parser.add_argument("--revision")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args(arguments)
    from decausal.models.doctor import probes_as_dict, usable
    from decausal.models.examination import examine_path, probes_as_table

    probes = examine_path(flags.model, revision=flags.revision)
    if flags.json:
        print(json.dumps(probes_as_dict(probes), indent=2))
    else:
        from rich.console import Console

        Console().print(probes_as_table(flags.model, probes))
    return 0 if usable(probes) else 1


VERBS: dict[str, Callable[[list[str]], int]] = {
    "demo": _demo,
    "convert": _convert,
    "generate": _generate,
    "infill": _infill,
    "eval": _eval,
    "doctor": _doctor,
    "pretrain": _pretrain,
}


class _Parser(argparse.ArgumentParser):
    """argparse, but a bad flag is told in one line like every other error."""

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(prog=f"decausal {verb}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('decausal ')}: {message}; see {self.prog} --help")


def _add_sampler_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_steps", "--steps", "--denoising_steps", type=int, help="denoising steps, spread evenly")
    parser.add_argument("--threshold", "--confidence_threshold", type=float, help="keep all that is as sure (0.9)")
    parser.add_argument("--confidence", choices=("probability", "margin", "entropy"), help="what 'sure' means")
    parser.add_argument("--temperature", type=float, help="0 takes the most probable token (0)")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--remask", action="store_true", default=None, help="let kept tokens be reconsidered")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--watch", action="store_true", help="show tokens as they are committed (one prompt)")
    parser.add_argument("--json", action="store_true", help="print JSON: text, ids, tokens per forward")


def _sampler_options(flags: argparse.Namespace) -> dict[str, Any]:
    return _given(flags, "num_steps", "threshold", "confidence", "temperature", "top_k", "top_p", "seed", "remask")


def _given(flags: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}


def _watching(model: Any, is_wanted: bool) -> AbstractContextManager[Any]:
    if not is_wanted:
        return nullcontext()
    from decausal.sampling.watch import Watch

    return Watch(model.tokenizer)


def _print_generations(found: list[Any], as_json: bool) -> None:
    for generation in found:
        if as_json:
            print(json.dumps(vars(generation), ensure_ascii=False))
        else:
            print(generation.full_text)
            note = f"[{len(generation.ids)} tokens in {generation.num_forwards} forward passes]"
            print(note, file=sys.stderr)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("decausal")
    except PackageNotFoundError:
        return "(run from its source, not installed)"


def _wants_help(arguments: list[str]) -> bool:
    return any(argument in ("-h", "--help") for argument in arguments)


def _leading_positional(arguments: list[str]) -> tuple[str | None, list[str]]:
    if arguments and not arguments[0].startswith("--"):
        return arguments[0], arguments[1:]
    return None, arguments


def _recipe_help() -> str:
    from decausal.config import recipe_names

    return (
        f"  --recipe {'|'.join(recipe_names())}, or a YAML file (default repr-align)\n"
        "  --print_config                print all settings as resolved, and stop\n"
    )


def _print_settings(usage: str, settings_type: type, extra: str = "", takes_training: bool = True) -> None:
    print(f"usage: decausal {usage} [--key value ...]\n")
    print(extra, end="")
    for field in fields(settings_type):
        print(f"  --{field.name} (default {field.default})\n      {field.metadata['help']}")
    if takes_training:
        print(
            "\nand every field of transformers.TrainingArguments: --output_dir, --learning_rate, --max_steps,\n"
            "--per_device_train_batch_size, --gradient_accumulation_steps, --bf16, --report_to, --save_steps,\n"
            "--resume_from_checkpoint, --gradient_checkpointing, --fsdp, --deepspeed, ..."
        )


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
