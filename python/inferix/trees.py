"""Values made of tensors, numbers and text, in tuples, lists, mappings and dataclasses: conditionings, for one."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from torch import Tensor


def branches_of(value: Any) -> list[tuple[Any, Any]] | None:
    """What a value is made of, by name; None: it is one thing."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def parts_of(value: Any) -> tuple[Hashable, list[Tensor]]:
    """The form of a value, which is all of it but the numbers in its tensors; and its tensors, in order.

    Raises:
        TypeError: it is not made of tensors, numbers and text, in tuples, lists, mappings and dataclasses.
    """
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device), [value]
    inner = branches_of(value)
    if inner is None:
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise TypeError(f"value must be made of tensors, numbers and text, got {value!r:.80}")
        return value, []
    forms, tensors = [], []
    for name, each in inner:
        form, found = parts_of(each)
        forms.append((name, form))
        tensors += found
    return (type(value), *forms), tensors


def rebuilt(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same value with other tensors, in the order of `parts_of`."""
    if isinstance(value, Tensor):
        return next(tensors)
    inner = branches_of(value)
    if inner is None:
        return value
    made = {name: rebuilt(each, tensors) for name, each in inner}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **made)
    if isinstance(value, Mapping):
        return made
    return type(value)(*made.values()) if hasattr(value, "_fields") else type(value)(made.values())
