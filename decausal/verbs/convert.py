"""The command `decausal convert`."""

from __future__ import annotations

from decausal.verbs.flags import (
    is_first_process,
    leading_positional,
    print_settings,
    print_training_arguments,
    recipe_help,
    slow_imports,
    wants_help,
)


def run(arguments: list[str]) -> int:
    from decausal.config import as_yaml, read_recipe, resolve, take_flag
    from decausal.training.argument_values import DEFAULTS
    from decausal.training.settings import ConversionSettings

    if wants_help(arguments):
        print_settings("convert [MODEL]", ConversionSettings, recipe_help())
        print_training_arguments(DEFAULTS)
        return 0
    positional, flags = leading_positional(arguments)
    flags, recipe_name = take_flag(flags, "recipe", "repr-align")
    flags, print_config = take_flag(flags, "print_config", "false")
    recipe = read_recipe(recipe_name)
    if positional is not None:
        flags = ["--model_name_or_path", positional, *flags]
    settings, training = resolve(ConversionSettings, recipe, flags, where=f"recipe {recipe_name}")
    if print_config == "true":
        print(as_yaml(settings, training), end="")
        return 0
    from decausal.training.inputs import check_conversion

    check_conversion(settings, training)  # convert checks this too, but only after its slow imports
    with slow_imports():
        from decausal.training.convert import convert

    conversion = convert(settings, training)
    if is_first_process():
        print(f"converted model: {conversion.output_dir}")
        print(f'next: decausal generate {conversion.output_dir} "your text"')
    return 0
