"""Putting our attention and cache into a repository's module, and taking them out again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from ..._check import check_counts, check_page_size, check_precision
from ..._dispatch import BACKENDS, PEERS
from ...layout import KV_FORMATS
from . import functions
from .contract import ATTENTION, INFERENCE, MODEL, contract_of, parameters
from .forward import attention_forward, model_forward
from .world import Options

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "attention": functions.attention,
    "flash_attention": functions.flash_attention,
}


class Replaced(NamedTuple):
    owner: Any  # a class or a module
    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"


class Patched(NamedTuple):
    """What `patch` did.

    Attributes:
        module: its name.
        what: whose attention it was found to be, or "functions".
        replaced: each attribute, before and after.
    """

    module: str
    what: str
    replaced: tuple[Replaced, ...]

    def __str__(self) -> str:
        return f"{self.module} ({self.what}): " + ", ".join(map(str, self.replaced))


_patched: dict[ModuleType, Patched] = {}  # of this process, so that `unpatch` can undo it


def patch(
    module: ModuleType,
    format: str | None = None,
    *,
    worlds: int = 1,
    page_size: int = 64,
    backend: str = "auto",
    precision: str = "auto",
) -> Patched:
    """Replace the attention and the KV cache of a repository's causal Wan model; its pipelines run unchanged.

    The module is the one that defines CausalWanSelfAttention and CausalWanModel (wan/modules/causal_model.py); or one
    without them, whose functions `attention` and `flash_attention` are replaced (wan/modules/attention.py, and each
    module that imported them from there: wan/modules/model.py).

    Args:
        format: of the pages, see layout.FORMATS: "int8" is half of bfloat16. None: the dtype of the pipeline's cache,
            in which nothing is rounded.
        worlds: a cache and its forks, of as many of which there is to be room for the whole window.
        page_size, backend, precision: see KVStore.

    Returns:
        What was replaced; str() of it is a line to print.

    Raises:
        ValueError: the module is not what it must be, is patched already, or an option is not what it must be; nothing
            was changed.

    Example:
        >>> import types
        >>> module = types.ModuleType("wan.modules.model")
        >>> def flash_attention(q, k, v, q_lens=None, k_lens=None, dropout_p=0., softmax_scale=None, q_scale=None,
        ...     causal=False, window_size=(-1, -1), deterministic=False, dtype=torch.bfloat16, version=None): ...
        >>> module.flash_attention = flash_attention
        >>> print(patch(module))
        wan.modules.model (functions): wan.modules.model.flash_attention
        >>> unpatch(module)
        >>> module.flash_attention is flash_attention
        True
    """
    if not isinstance(module, ModuleType):
        raise ValueError(f"module must be a Python module, such as wan.modules.causal_model, got {module!r:.80}")
    if module in _patched:
        raise ValueError(f"module must not be patched already, got {_patched[module]}: call unpatch first")
    if format is not None and format not in KV_FORMATS:
        raise ValueError(f"format must be one of {', '.join(KV_FORMATS)}, got {format!r}")
    check_counts({"worlds": worlds})
    check_page_size(page_size)
    check_precision(precision)
    if backend != "auto" and backend not in BACKENDS | PEERS:
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS | PEERS)}, got {backend!r}")
    options = Options(format, worlds, page_size, backend, precision)
    what, replaced = _attention(module, options) if hasattr(module, ATTENTION) else _functions(module)
    ours = [each.after for other in _patched.values() for each in other.replaced]
    if again := [str(each) for each in replaced if any(each.before is after for after in ours)]:
        raise ValueError(f"module must not be patched already, got {again[0]} that another module's patch replaced")
    for each in replaced:
        setattr(each.owner, each.name, each.after)
    _patched[module] = Patched(module.__name__, what, replaced)
    return _patched[module]


def _attention(module: ModuleType, options: Options) -> tuple[str, tuple[Replaced, ...]]:
    contract = contract_of(module)
    attention, model = getattr(module, ATTENTION), getattr(module, MODEL)
    forward, inference = vars(attention)["forward"], vars(model)[INFERENCE]
    replaced = (
        Replaced(attention, "forward", forward, attention_forward(forward, contract, module)),
        Replaced(model, INFERENCE, inference, model_forward(inference, contract, options)),
    )
    return contract.repositories, replaced


def _functions(module: ModuleType) -> tuple[str, tuple[Replaced, ...]]:
    found = [name for name in FUNCTIONS if inspect.isfunction(getattr(module, name, None))]
    if not found:
        raise ValueError(
            f"module must have {ATTENTION}, or {' or '.join(FUNCTIONS)}, got module {module.__name__!r} without them"
        )
    for name in found:
        taken, wanted = parameters(getattr(module, name)), parameters(FUNCTIONS[name])
        if taken != wanted:
            raise ValueError(f"{module.__name__}.{name} must take {', '.join(wanted)}, got {', '.join(taken)}")
    return "functions", tuple(Replaced(module, name, getattr(module, name), FUNCTIONS[name]) for name in found)


def unpatch(module: ModuleType | None = None) -> None:
    """Undo `patch`: of this module, or of all. Caches that hold pages are to be made anew.

    Raises:
        ValueError: the module is not patched, or another tool has replaced something since; nothing was changed.

    Example:
        >>> unpatch()
    """
    if module is not None and module not in _patched:
        raise ValueError(f"module must be one that was patched, got {getattr(module, '__name__', module)!r:.80}")
    modules = list(_patched) if module is None else [module]
    replaced = [each for module in modules for each in _patched[module].replaced]
    for each in replaced:
        if vars(each.owner).get(each.name) is not each.after:
            raise ValueError(f"{each} must be as patch left it, got another one: undo first what replaced it since")
    for each in replaced:
        setattr(each.owner, each.name, each.before)
    for module in modules:
        del _patched[module]
