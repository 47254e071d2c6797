"""Tokenizers for models that are trained from scratch: byte-level BPE from a user's text, and single characters."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
PADDING = "<|pad|>"
UNKNOWN = "<|unknown|>"
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
# Turns are comments in ordinary tokens, which is enough for a small model. An answer ends like a document.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '# ' + message['role'] + ':\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '# assistant:\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Trains a tokenizer that can write any text: its alphabet is the 256 bytes.

    It has an end-of-text token (id 0, also padding), a mask token (id 1) and a plain chat template. With the mask token
    a conversion needs no new row.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=MASK,
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def character_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token for each printable ASCII character and the line break.

    Texts may be cut and joined freely. Its 100 entries are an end-of-text token (id 0), a mask token (1), padding (2),
    a token for any other character (3), and the 96 characters.
    """
    special = [END_OF_TEXT, MASK, PADDING, UNKNOWN]
    vocabulary = {token: token_id for token_id, token in enumerate([*special, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        mask_token=MASK,
        pad_token=PADDING,
        unk_token=UNKNOWN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
