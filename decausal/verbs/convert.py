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
    if positional is not None:
        flags = ["--model_name_or_path", positional, *flags]
    flags, print_config = take_flag(flags, "print_config", "false")
    recipe_name, flags, lines = chosen_recipe(flags)
    recipe = read_recipe(recipe_name)
    settings, training = resolve(ConversionSettings, recipe, flags, where=f"recipe {recipe_name}")
    if print_config == "true":
        print("".join(f"# {line}\n" for line in lines) + as_yaml(settings, training), end="")
        return 0
    from decausal.training.inputs import check_conversion

    check_conversion(settings, training)  # convert checks this too, but only after its slow imports
    with slow_imports():
        from decausal.training.convert import convert
        from decausal.training.progress import SayFirst

    conversion = convert(settings, training, callbacks=[SayFirst(lines)])
    if is_first_process():
        print(f"converted model: {conversion.output_dir}")
        chat = f"decausal chat {conversion.output_dir}, or " if conversion.tokenizer.chat_template else ""
        print(f'next: {chat}decausal generate {conversion.output_dir} "your text"')
    return 0


def chosen_recipe(flags: list[str]) -> tuple[str, list[str], list[str]]:
    """Returns a recipe's name, the flags that remain, and lines about a choice that was not the user's."""
    from decausal.config import ALIASES, parse_flags, read_recipe, recipe_names, take_flag
    from decausal.errors import UserError
    from decausal.training.recipe_choice import choose_recipe, embedded_defaults, gated_rows

    flags, goal = take_flag(flags, "goal", "")
    flags, name = take_flag(flags, "recipe", "")
    given = {ALIASES.get(key, key): value for key, value in parse_flags(flags).items()}
    if name and goal:
        raise UserError(f"--goal {goal} chooses a recipe, and --recipe {name} names one: give one of them")
    lines = []
    if not name:
        choice = choose_recipe(given, goal or None)
        name, lines = choice.recipe, [choice.line]
    defaults = embedded_defaults(given.get("model_name_or_path"), given) if name in recipe_names() else {}
    for key, value in defaults.items():
        flags = [*flags, f"--{key}", str(value)]
        lines.append(f"{key} {value}, as small a model as this one learns with")
    recipe = read_recipe(name) if name in recipe_names() else {}
    for key, value in gated_rows(recipe, given).items():
        flags = [*flags, f"--{key}", str(value)]
        lines.append(f"{key} {value}: the data are prompts without answers, which the AR model writes during training")
    return name, flags, lines
