"""Which checks of types a function gets while tests run: those of shapes are slow, and few functions need them.

jaxtyping binds the arguments of every call and keeps a record of its shapes, for functions without any, too. Those get
the checks of beartype alone, which are the same for all other types, at a fraction of the time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, get_args, get_type_hints

import jaxtyping

_with_shapes = jaxtyping.jaxtyped


def install() -> None:
    """Has every function and dataclass of the package checked, from its import on."""
    jaxtyping.jaxtyped = _jaxtyped
    jaxtyping.install_import_hook("decausal", "beartype.beartype")


def _jaxtyped(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What the import hook writes above everything that is defined in the package."""
    return partial(_checked, typechecker=typechecker)


def _checked(checked: Any, typechecker: Callable[[Any], Any]) -> Any:
    if inspect.isclass(checked):
        own = vars(checked).get("__init__")
        if not (hasattr(checked, "__dataclass_fields__") and inspect.isfunction(own) and _plain_hints(own) is not None):
            return _with_shapes(checked, typechecker=typechecker)
        checked.__init__ = _checked(own, typechecker)
        return checked
    hints = _plain_hints(checked) if inspect.isfunction(checked) else None
    if hints is None:
        return _with_shapes(checked, typechecker=typechecker)
    written = checked.__annotations__
    checked.__annotations__ = hints
    found = typechecker(checked)
    for each in (checked, found):  # the reference shows them as they stand in the code
        each.__annotations__ = written
    return found


def _plain_hints(function: Callable[..., Any]) -> dict[str, Any] | None:
    """The types that a function names; None where there are shapes among them, or a name that is not known yet."""
    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception:  # whatever an annotation raises: jaxtyping leaves it unchecked
        return None
    return None if any(map(_has_shapes, hints.values())) else hints


def _has_shapes(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_has_shapes(part) for part in (*get_args(hint), *(hint if isinstance(hint, list) else ())))
