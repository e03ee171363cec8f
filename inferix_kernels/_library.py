"""The ops as torch.library sees them: flat tensors in, outputs passed in and mutated, the backend's name last.

An op's flat form follows from its signature in ops.py and from which arguments it writes; nothing about a single op
stands here. torch.compile and opcheck need this form; `call` takes it only there, since outside a graph a call through
torch.library costs microseconds that buy nothing.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from string import ascii_lowercase
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ._dispatch import Unsupported, run, runs_compiled, type_of
from ._remembered import Accepted, Call, recording
from .layout import KVPages

Function = TypeVar("Function", bound=Callable[..., Any])
SCALARS = {bool: "bool", int: "int", float: "float", str: "str", torch.dtype: "ScalarType"}
_WIDTH = len(KVPages._fields) - 1  # a pool's tensors
# inferix_kernels; another one for an exported copy, which is a package of another name (integrations/hf_kernel.py).
NAMESPACE = re.sub(r"\W", "_", __package__ or "")


class Argument(NamedTuple):
    """An argument of an op and the values that stand for it in the flat form."""

    name: str
    keyword: bool
    schemas: list[str]  # of each flat value, "Tensor(a!) out"
    flatten: Callable[[Any], list[Any]]
    unflatten: Callable[..., Any]


class Op(NamedTuple):
    name: str
    arguments: list[Argument]

    @property
    def schema(self) -> str:
        return f"({', '.join([x for a in self.arguments for x in a.schemas])}, str backend) -> ()"

    def flatten(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        given = [*args, *(kwargs[a.name] for a in self.arguments[len(args) :])]
        return [x for a, value in zip(self.arguments, given) for x in a.flatten(value)]

    def body(self, *flat: Any) -> None:
        """What torch.library calls: the op's own arguments again, and the backend."""
        values, args, kwargs = iter(flat), [], {}
        for a in self.arguments:
            value = a.unflatten(*(next(values) for _ in a.schemas))
            if a.keyword:
                kwargs[a.name] = value
            else:
                args.append(value)
        first = next(x for x in flat if isinstance(x, Tensor) or (isinstance(x, list) and x))
        run(self.name, next(values), (first if isinstance(first, Tensor) else first[0]).device, args, kwargs)


OPS: dict[str, Op] = {}


def op(*, writes: Sequence[str], optional: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Register the decorated function's op as inferix_kernels::<name>; `writes` names the arguments that it mutates.

    A written argument is one that the backends are always given, whatever the public function makes when it is None;
    but for those in `optional`, of which None is written nowhere.
    """

    def register(function: Function) -> Function:
        kinds, letters = typing.get_type_hints(function), iter(ascii_lowercase)
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "backend"]
        if unknown := set(writes) - {p.name for p in parameters}:
            raise ValueError(f"writes must name arguments of {function.__name__}, got {', '.join(unknown)}")
        arguments = []
        for p in parameters:
            written, absent = p.name in writes, p.name not in writes or p.name in optional
            flat = _flat(p.name, kinds[p.name], letters, written, absent)
            arguments.append(Argument(p.name, p.kind is p.KEYWORD_ONLY, *flat))
        new = OPS[function.__name__] = Op(function.__name__, arguments)
        name = f"{NAMESPACE}::{new.name}"
        torch.library.define(name, new.schema)
        torch.library.impl(name, "CompositeExplicitAutograd", new.body)
        schemas = [schema for a in new.arguments for schema in a.schemas]
        torch.library.register_fake(name, _faked(schemas, lambda *args: None))  # every output is an argument
        return function

    return register


def opaque(
    schema: str, body: Callable[..., Any], fake: Callable[..., Any] = lambda *_: None, tags: Sequence[torch.Tag] = ()
) -> Callable[..., Any]:
    """A function of flat arguments that a graph of torch.compile calls as one op and does not look into.

    Args:
        schema: as torch.library has it, "append(Tensor k, Tensor(a!) cache) -> ()".
        body: the function.
        fake: what stands for it while a graph is made: makes its results.

    Returns:
        What to call, with positional arguments: the op in a graph, else `body` itself.
    """
    name = f"{NAMESPACE}::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :], tags=tuple(tags))
    torch.library.impl(name, "CompositeExplicitAutograd", body)
    torch.library.register_fake(name, _faked(schema[schema.index("(") :].partition("->")[0].split(","), fake))
    recorded = getattr(getattr(torch.ops, NAMESPACE), schema.partition("(")[0]).default
    return lambda *arguments: (recorded if torch.compiler.is_compiling() else body)(*arguments)


def _faked(schemas: Sequence[str], fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, which looks first at where the written arguments lie."""
    written = [i for i, schema in enumerate(schemas) if "!" in schema]

    def checked(*args: Any) -> Any:
        for i in written:
            for x in args[i] if isinstance(args[i], (list, tuple)) else [args[i]]:
                if x is not None:
                    _check_place(x)
        return fake(*args)

    return checked


def _check_place(x: Tensor) -> None:
    """torch.compile (2.13, inductor) writes elsewhere, and says nothing, if what an op writes to is a view that is made
    in the graph, at an offset made of sizes that vary. A view from outside has an offset that is a number of its own.
    """
    offset = x.storage_offset()
    if isinstance(offset, torch.SymInt) and x._is_view() and not offset.node.expr.is_Symbol:
        raise Unsupported(
            "what is written to must not be a view that is made in the graph, at a place that depends on sizes which "
            f"vary, got one at {offset}: torch would write elsewhere. Make the view outside of the graph"
        )


def call(op: str, accepted: Accepted | None, backend: str, device: torch.device, *args: Any, **kwargs: Any) -> None:
    """Run an op now, or record it when torch.compile is tracing.

    accepted: what the check of its arguments made; None for an op whose calls are not remembered.
    """
    if torch.compiler.is_compiling() if accepted is None else accepted.traced:
        getattr(getattr(torch.ops, NAMESPACE), op).default(*OPS[op].flatten(args, kwargs), backend)
    elif torch._C._is_tracing():  # a trace would hold the outputs' allocation, and not the op
        raise RuntimeError(f"{op} must not be called under torch.jit.trace, which does not see it: use torch.export")
    elif accepted is None or accepted.elsewhere:
        run(op, backend, device, args, kwargs, accepted)
    elif not runs_compiled(op, backend, device):
        accepted.elsewhere = type_of(device) != "cpu"
        run(op, backend, device, args, kwargs, accepted)
    elif accepted.replay is not None:
        if not accepted.replay((*args, *kwargs.values())):
            run(op, backend, device, args, kwargs)
    elif accepted.wanted:
        recording.call = Call(op, accepted, (*args, *kwargs.values()))
        try:
            run(op, backend, device, args, kwargs)
        finally:
            recording.call = None
    else:
        run(op, backend, device, args, kwargs)


def _flat(
    name: str, kind: Any, letters: Iterator[str], written: bool, absent: bool
) -> tuple[list[str], Callable[[Any], list[Any]], Callable[..., Any]]:
    """Of an argument, or a field of one, by its annotation: Argument's last three fields. Of a union the first counts,
    and, if it may be absent, whether None is in it."""
    union = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    kind, mark = union[0], lambda: f"({next(letters)}!)" if written else ""
    none = "?" if types.NoneType in union and absent else ""
    if kind is KVPages:
        return _pools(name, mark()), lambda pages: flat_pools(pages), lambda *flat: pools_of(*flat)[0]
    if typing.get_origin(kind) is not None and typing.get_args(kind) == (KVPages,):
        return _pools(name, mark()), lambda pools: flat_pools(*pools), pools_of
    if kind is Tensor or kind in SCALARS:
        return [f"{SCALARS.get(kind, 'Tensor')}{mark()}{none} {name}"], lambda x: [x], lambda x: x
    if hasattr(kind, "_fields"):  # a tuple of tensors: PageList, Plan, Quantized
        fields, make = typing.get_type_hints(kind), kind
    elif typing.get_origin(kind) is tuple:
        fields, make = {str(i): field for i, field in enumerate(typing.get_args(kind))}, lambda *parts: parts
    else:
        raise TypeError(f"{name} must be of a type that torch.library knows or of layout's, got {kind}")
    parts = [_flat(f"{name}_{field}", hint, letters, written, True) for field, hint in fields.items()]
    return [schema for part in parts for schema in part[0]], list, make


def _pools(name: str, mark: str) -> list[str]:
    return [f"Tensor{mark}[] {name}", f"str[] {name}_formats"]


def flat_pools(*pools: KVPages) -> list[Any]:
    """The tensors of one pool after the other, empty where a pool has None; and the pools' formats."""
    # A new tensor for each None: a mutated argument must not alias another.
    tensors = [pages.k.new_empty(0, dtype=torch.float32) if x is None else x for pages in pools for x in pages[1:]]
    return [tensors, [pages.format for pages in pools]]


def pools_of(tensors: list[Tensor], formats: list[str]) -> list[KVPages]:
    optional = [x if x.ndim > 1 else None for x in tensors]
    return [KVPages(format, *optional[i * _WIDTH : (i + 1) * _WIDTH]) for i, format in enumerate(formats)]  # type: ignore[arg-type]
