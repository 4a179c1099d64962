"""Options of an agent's ``[agents.NAME]`` table, checked against what its kind takes.

A built-in kind declares its options as a frozen attrs class whose validators are made here. What an application wrote
declares them by its signature: keyword arguments of the function or the class.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import attrs

from gateway.errors import ConfigError

_T = TypeVar("_T")
_Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def suggest(word: str, known: Iterable[str]) -> str:
    """``did you mean 'x'? `` if something alike is known, then what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}{'it takes: ' + ', '.join(names) if names else 'it takes no options'}"


def number(low: float, high: float, *, whole: bool = True, optional: bool = False) -> _Validator:
    """A validator: a number within `low` and `high` inclusive; `optional` allows None."""

    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value is None and optional:
            return
        if type(value) is not int and (whole or type(value) is not float):
            kind = "an integer" if whole else "a number"
            raise ConfigError(attribute.name, f"expected {kind} from {low:,} to {high:,}, got {value!r}")
        if not low <= value <= high:
            raise ConfigError(attribute.name, f"must be from {low:,} to {high:,}, got {value:,}")

    return check


def flag(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if type(value) is not bool:
        raise ConfigError(attribute.name, f"expected true or false, got {value!r}")


def text(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if type(value) is not str or not value.strip():
        raise ConfigError(attribute.name, f"expected text, got {value!r}")


def optional_text(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None:
        text(instance, attribute, value)


def table(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, Mapping) or not all(type(key) is str for key in value):
        raise ConfigError(attribute.name, f"expected a table, got {value!r}")


def text_table(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    table(instance, attribute, value)
    for key, item in value.items():
        if type(item) is not str:
            # The value may be a secret, so it is not shown.
            raise ConfigError(f"{attribute.name}.{key}", f"expected text, got {type(item).__name__}")


def make_options(cls: type[_T], key: str, options: Mapping[str, Any]) -> _T:
    """Make a kind's options object.

    Args:
        key: what stands before an option's name in messages: ``agents.NAME``.

    Raises:
        ConfigError: an option is unknown, missing or of the wrong kind.
    """
    fields = {item.name: item for item in attrs.fields(cls)}  # type: ignore[arg-type]
    for name in options:
        if name not in fields:
            raise ConfigError(f"{key}.{name}", f"unknown option; {suggest(name, fields)}")
    for name, item in fields.items():
        if item.default is attrs.NOTHING and name not in options:
            raise ConfigError(f"{key}.{name}", "is required")
    try:
        return cls(**options)
    except ConfigError as exc:
        raise ConfigError(f"{key}.{exc.key}", str(exc).removeprefix(f"{exc.key}: ")) from None


def check_keywords(target: Callable[..., Any], key: str, options: Mapping[str, Any], *, after: int) -> None:
    """Check `options` against the keyword arguments of `target`, `after` its leading arguments that are not options.

    Raises:
        ConfigError: `target` takes no argument of that name.
    """
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (ValueError, TypeError):
        return  # written in C, or hides it
    if any(item.kind is item.VAR_KEYWORD for item in parameters):
        return
    known = [item.name for item in parameters[after:] if item.kind in (item.KEYWORD_ONLY, item.POSITIONAL_OR_KEYWORD)]
    for name in options:
        if name not in known:
            raise ConfigError(f"{key}.{name}", f"unknown option; {suggest(name, known)}")
