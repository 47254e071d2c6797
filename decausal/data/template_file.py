"""Reads a chat template that a user names. This file is light: verbs use it before torch is imported."""

from __future__ import annotations

import re
from pathlib import Path

from decausal.errors import UserError
from decausal.files import read_given


def read_template(template: str | Path) -> str:
    """Returns the text of a template, from a file or as given.

    Raises:
        UserError: There is no such file, or no template in it.
    """
    given = str(template)
    if "{{" in given or "{%" in given:
        return given
    try:
        text = read_given(given)
    except OSError as error:
        raise UserError(f"--chat_template {given}: {error.strerror}; give a file with a Jinja template") from None
    except UnicodeDecodeError:
        raise UserError(f"--chat_template {given} is not text in UTF-8; give a file with a Jinja template") from None
    if not re.search(r"\bmessages\b", text) or ("{{" not in text and "{%" not in text):
        raise UserError(f"--chat_template {given} is not a chat template: it is not a Jinja text that reads 'messages'")
    return text
