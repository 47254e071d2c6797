"""The command `decausal generate`."""

from __future__ import annotations

from decausal.verbs.flags import VerbParser, add_template_flags, given, slow_imports, template_options, text_from
from decausal.verbs.sampling import (
    add_sampler_flags,
    check_model,
    check_recording,
    print_generations,
    sampler_options,
    watching,
)


def run(arguments: list[str]) -> int:
    parser = VerbParser("generate", "Continue one prompt or several with a converted model.")
    parser.add_argument("directory", help="what `decausal convert` wrote, or its id on the hub")
    parser.add_argument("prompts", nargs="*", help="texts to continue; none: one from standard input")
    chat_help = "put each prompt through the chat template, and print the answer alone"
    parser.add_argument("--chat", action="store_true", help=chat_help)
    parser.add_argument("--max_new_tokens", "--gen_length", type=int, help="tokens to write (128)")
    add_sampler_flags(parser)
    add_template_flags(parser)
    flags = parser.parse_args(arguments)
    template = template_options(flags, lambda: flags.chat)
    check_recording(flags, len(flags.prompts))
    options = sampler_options(flags) | given(flags, "max_new_tokens")
    check_model(flags.directory, options)
    prompts = flags.prompts or [text_from(None, "generate")]
    with slow_imports():
        from decausal.sampling.model import load

    model = load(flags.directory, **template)
    with watching(model, flags.watch and len(prompts) == 1, flags.record) as on_step:
        found = model.generate(prompts, chat=flags.chat, batch_size=flags.batch_size, on_step=on_step, **options)
    print_generations(found, as_json=flags.json, only_new=flags.chat)
    return 0
