"""Options of a command: the fields of a dataclass, each declared once, with its help, default and range.

The command line (cli.py) is built from the fields; a program makes the same dataclass itself. It is checked when it is
made, so that there is none with a value out of range. Needs no torch, for which `inferix --help` would have to wait.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import os
import types
import typing
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

MOST_THREADS = max(64, 4 * (os.cpu_count() or 1))
T = TypeVar("T", bound="Options")


class Rule(NamedTuple):
    """What the value of an option must be, besides its type."""

    holds: Callable[[Any], bool]
    text: str  # after "must be"


NOT_EMPTY = Rule(lambda value: len(value) > 0, "at least one")
POSITIVE = Rule(lambda value: value > 0, "a positive number")


def at_least(least: int) -> Rule:
    return Rule(lambda value: value >= least, f"at least {least}")


def at_most(most: int, meaning: str) -> Rule:
    return Rule(lambda value: value <= most, f"at most {most}, {meaning}")


def between(least: int, most: int, text: str | None = None) -> Rule:
    return Rule(lambda value: least <= value <= most, text or f"from {least} to {most}")


def one_of(*choices: str) -> Rule:
    return Rule(lambda value: value in choices, f"one of {', '.join(choices)}")


class Kind(NamedTuple):
    """A type that an option may have."""

    holds: Callable[[Any], bool]
    text: str  # after "must be"
    parse: Callable[[str], Any] | None  # of a word on the command line; None: a flag
    keep: Callable[[Any], Any] = lambda value: value  # as what a value is kept: NumPy's numbers as Python's


def height_and_width(text: str) -> tuple[int, int]:
    """ "480x832" -> (480, 832)."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise ValueError(f"must be HEIGHTxWIDTH, got {text!r}")
    return int(height), int(width)


def comma_separated(text: str) -> tuple[str, ...]:
    """ "a,b" -> ("a", "b")."""
    return tuple(word for word in text.split(",") if word)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def _is_sequence(value: object, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(holds, value))


KINDS: dict[Any, Kind] = {
    bool: Kind(lambda value: isinstance(value, bool), "True or False", None),
    int: Kind(_is_whole, "a whole number", int, int),
    float: Kind(_is_finite, "a finite number", float, float),
    str: Kind(lambda value: isinstance(value, str), "text", str),
    str | Path: Kind(lambda value: isinstance(value, (str, os.PathLike)), "a path", str),
    Sequence[str]: Kind(
        lambda value: _is_sequence(value, lambda one: isinstance(one, str)), "a list of texts", str, tuple
    ),
    tuple[int, int]: Kind(
        lambda value: _is_sequence(value, _is_whole) and len(value) == 2, "(height, width)", height_and_width, tuple
    ),
}


@dataclasses.dataclass(frozen=True)
class Option:
    """What the declaration of an option says besides its name, type and default.

    Attributes:
        help: for `--help`, which adds the default if there is one.
        must: rules for its value.
        choices: texts that it may be; empty: any.
        instead_of: another option, with which it must not be given.
        to: who is handed it as an argument of the same name: "model" (its loader), "world" or "server".
        metavar: what its value is called in `--help`.
        parse: of a word on the command line, where its type's own does not do.
        positional: given by its place on the command line, without a name.
        other_names: that it has on the command line.
        page_only: of `play`: means nothing in a terminal.
    """

    help: str
    must: tuple[Rule, ...] = ()
    choices: tuple[str, ...] = ()
    instead_of: str = ""
    to: str = ""
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    positional: bool = False
    other_names: tuple[str, ...] = ()
    page_only: bool = False


def option(help: str, default: Any = dataclasses.MISSING, **details: Any) -> Any:
    """A field of Options; `details` are fields of Option. Without a default it must be given."""
    return dataclasses.field(default=default, metadata={"option": Option(help, **details)})


class Declared(NamedTuple):
    """An option as a class declares it."""

    name: str
    type: Any  # a key of KINDS
    optional: bool  # may it be None?
    default: Any
    option: Option


def declared(options: type[Options]) -> tuple[Declared, ...]:
    """The options of a class, those of its bases first."""
    hints = typing.get_type_hints(options)
    return tuple(_declared(field, hints[field.name]) for field in dataclasses.fields(options))


def _declared(field: dataclasses.Field[Any], hint: Any) -> Declared:
    optional = types.NoneType in typing.get_args(hint)
    if optional:
        hint = functools.reduce(operator.or_, (one for one in typing.get_args(hint) if one is not types.NoneType))
    return Declared(field.name, hint, optional, field.default, field.metadata["option"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a command, checked; lists are kept as tuples, numbers as Python's own.

    Raises:
        ValueError: an option is not what it must be; names it.
    """

    def __post_init__(self) -> None:
        for each in declared(type(self)):
            value = getattr(self, each.name)
            if value is None and each.optional:
                continue
            _check(each, value)
            object.__setattr__(self, each.name, KINDS[each.type].keep(value))
            other = each.option.instead_of
            if other and getattr(self, other) is not None:
                raise ValueError(f"{each.name} must not be given together with `{other}`")

    def arguments(self, to: str) -> dict[str, Any]:
        """The options that are handed to this one, see Option.to, by name; paths as text."""
        values = {each.name: getattr(self, each.name) for each in declared(type(self)) if each.option.to == to}
        return {name: os.fspath(value) if isinstance(value, Path) else value for name, value in values.items()}


def _check(each: Declared, value: object) -> None:
    for text in value if isinstance(value, list | tuple) else (value,):
        _check_text(each.name, text)
    choices = [one_of(*each.option.choices)] if each.option.choices else []
    for rule in (Rule(KINDS[each.type].holds, KINDS[each.type].text), *choices, *each.option.must):
        if not rule.holds(value):
            got = f"{value:g}" if isinstance(value, float) else repr(value)
            raise ValueError(f"{each.name} must be {rule.text}, got {got}")


def _check_text(name: str, text: object) -> None:
    """No file and no tokenizer takes what is no text."""
    if isinstance(text, str | Path):
        try:
            str(text).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} must be text in UTF-8, got {str(text)!r}") from None
        if "\0" in str(text):
            raise ValueError(f"{name} must have no NUL character, got {str(text)!r}")


def configured(options: type[T], config: T | None, given: dict[str, Any]) -> T:
    """The options of a call `command(config, **given)`: those of `config`, if there is one, but for what is given."""
    if config is not None and not isinstance(config, options):
        raise TypeError(f"config must be a {options.__name__}, got {config!r:.80}")
    return options(**given) if config is None else dataclasses.replace(config, **given)
