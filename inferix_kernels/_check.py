"""Argument checks. Every message names the argument, what it must be, and what it is."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from .layout import FORMATS, PRECISIONS, KVPages, PageList, Quantized, Side
from .plans import Plan

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODES = (torch.int8, torch.float8_e4m3fn)  # of an 8-bit matrix
ACTIVATIONS = ("gelu", "gelu_tanh")
# A plan's optional int32 tensors.
PLAN_NUMBERS = dict(page_variants="N", page_starts="N", page_positions="N", windows="S 2", arrivals="N 2", counters="C")


def is_whole(number: object) -> TypeGuard[int]:
    """Python's or NumPy's, but no bool."""
    return isinstance(number, numbers.Integral) and not isinstance(number, bool)


def whole(name: str, number: object) -> int:
    """A whole number as Python's, whoever's it was: state and files hold no others."""
    if type(number) is int:  # most are, and asking an abstract class takes its time
        return number
    if not is_whole(number):
        raise ValueError(f"{name} must be a whole number, got {number!r}")
    return int(number)


def check_index(name: str, number: object, count: int) -> int:
    """One of `count` things, counted from 0, as Python's number."""
    if type(number) is int and 0 <= number < count:
        return number
    index = whole(name, number)
    if not 0 <= index < count:
        raise ValueError(f"{name} must be from 0 to {count - 1}, got {index}")
    return index


def check_device(name: str, device: object) -> torch.device:
    """A device that this torch, on this machine, can put tensors on."""
    try:
        found = torch.device(device)  # type: ignore[call-overload]  # which raises TypeError for what is none
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} must be a device that is there, got {str(device)!r}: {reason}") from None
    return found


def check_counts(counts: Mapping[str, object], least: int = 1) -> None:
    """Each by its name: a whole number, and not less than `least`."""
    for name, count in counts.items():
        if whole(name, count) < least:
            raise ValueError(f"{name} must be at least {least}, got {count}")


def check_page_size(page_size: int) -> None:
    if not is_whole(page_size) or page_size < 8 or page_size % 8:
        raise ValueError(f"page_size must be a positive multiple of 8, got {page_size!r}")


def check_shape(name: str, tensor: Tensor, layout: str, sizes: dict[str, int]) -> None:
    """check_shape("k", k, "T H D", sizes): a letter stands for one size everywhere; new letters are added to sizes.

    A number stands for itself: "T half 2".
    """
    dims, shape, known = layout.split(), tensor.shape, len(sizes)
    if len(dims) == len(shape):
        for dim, size in zip(dims, shape, strict=True):
            if (int(dim) if dim.isdigit() else sizes.setdefault(dim, size)) != size:
                break
        else:
            return
    before = dict(list(sizes.items())[:known])  # what an earlier argument has settled, not this one
    want = ", ".join(f"{dim}={before[dim]}" if dim in before else dim for dim in dims)
    raise ValueError(f"{name} must be [{want}], got {list(shape)}")


def check_tensor(
    name: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    layout: str,
    sizes: dict[str, int],
    device: torch.device,
) -> None:
    device_of(name, tensor)
    check_dtype(name, tensor.dtype, dtypes)
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the op's first argument, got {tensor.device}")
    if not torch.compiler.is_compiling():  # where tensors stand for what will be
        _check_memory(name, tensor)
    if tensor.requires_grad and torch.is_grad_enabled():
        # A gradient that silently stops here would be worse than an error.
        raise RuntimeError(
            f"{name} requires a gradient, and there is no backward: call it under torch.no_grad(), or detach {name}"
        )
    check_shape(name, tensor, layout, sizes)


def check_dtype(name: str, dtype: torch.dtype, dtypes: Sequence[torch.dtype]) -> None:
    if dtype not in dtypes:
        raise TypeError(
            f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)},"
            f" got {str(dtype).removeprefix('torch.')}"
        )


def _check_memory(name: str, tensor: Tensor) -> None:
    """Kernels take addresses: numbers must lie there, each in its place, as they are."""
    try:
        # A subclass with a dispatch of its own may keep its numbers anywhere. Of an emptied storage a view's address is
        # its offset; asking for the storage itself costs as much as all the rest.
        there = (type(tensor) is Tensor or type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__) and (
            (tensor.data_ptr() != 0 and (tensor.storage_offset() == 0 or tensor.untyped_storage().nbytes() != 0))
            or tensor.numel() == 0
        )
    except RuntimeError:  # sparse, or of another library
        there = False
    if not there:
        kind = f"{type(tensor).__name__} ({tensor.layout}, {tensor.device})"
        raise ValueError(f"{name} must be a dense tensor in memory, got a {kind} that has none of its own")
    if tensor.is_neg():
        raise ValueError(f"{name} must hold its numbers themselves, got a view that negates: call resolve_neg()")


def check_optional(
    name: str,
    tensor: Tensor | None,
    dtypes: Sequence[torch.dtype],
    layout: str,
    sizes: dict[str, int],
    device: torch.device,
) -> None:
    if tensor is not None:
        check_tensor(name, tensor, dtypes, layout, sizes, device)


def device_of(name: str, tensor: Tensor) -> torch.device:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    return tensor.device


def shown(x: object) -> str:
    """For a message: what x is, short where it is a tensor."""
    return f"a {type(x).__name__}" if isinstance(x, Tensor) else repr(x)


def check_is(name: str, x: object, kind: type) -> None:
    """Raise TypeError unless x is one of layout's tuples, say."""
    if not isinstance(x, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(x).__name__}")


def check_pages(name: str, pages: KVPages, sizes: dict[str, int], device: torch.device) -> None:
    """Shapes, dtypes and scales of one pool. Sets sizes H, page_size, D and Dv, or checks the pool's."""
    check_is(name, pages, KVPages)
    if not isinstance(pages.format, str) or pages.format not in FORMATS:
        raise ValueError(f"{name}.format must be one of {', '.join(FORMATS)}, got {shown(pages.format)}")
    sizes.pop("P", None)  # each pool has its own
    for letter, width, side in (("k", "D", pages.sides[0]), ("v", "Dv", pages.sides[1])):
        _check_side(f"{name}.{letter}", width, side, pages.format, sizes, device)


def _check_side(name: str, width: str, side: Side, format: str, sizes: dict[str, int], device: torch.device) -> None:
    codec = side.codec
    stored = f"{width}/2" if codec.packed else width
    if codec.packed and width in sizes:
        sizes[stored] = sizes[width] // 2
    rows = f"{stored} page_size" if codec.transposed else f"page_size {stored}"
    check_tensor(name, side.codes, (codec.dtype,), f"P H {rows}", sizes, device)
    if codec.packed:
        sizes[width] = 2 * sizes.pop(stored)
    row = "page_size" if codec.scaled_by == "token" else width
    for field, tensor, present in (
        ("scales", side.scales, codec.scaled_by is not None),
        ("offsets", side.offsets, codec.packed),
    ):
        if (tensor is not None) != present:
            raise ValueError(
                f"{name}_{field} must be {'given' if present else 'None'} for {format} pages,"
                f" got {'None' if tensor is None else 'a tensor'}"
            )
        if tensor is not None:
            check_tensor(f"{name}_{field}", tensor, (codec.scale_dtype,), f"P H {row}", sizes, device)
    if codec.scaled_by is None:  # floats may lie in another's cache
        if side.codes.stride(3) != 1 and side.codes.shape[3] != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {side.codes.stride()}")
        return
    for field, tensor in ((name, side.codes), (f"{name}_scales", side.scales), (f"{name}_offsets", side.offsets)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{field} must be contiguous for {format} pages, got strides {tensor.stride()}")


def check_apart(name: str, pages: KVPages) -> None:
    """Whether what is written to one place stays there: an expanded tensor has it in several."""
    for letter, codes in (("k", pages.k), ("v", pages.v)):
        if any(stride == 0 and size > 1 for stride, size in zip(codes.stride(), codes.shape, strict=True)):
            raise ValueError(f"{name}.{letter} must have a place for each number, got strides {codes.stride()}")


def check_same_width(name: str, sizes: dict[str, int]) -> None:
    if sizes["D"] != sizes["Dv"]:
        raise ValueError(f"{name} must have values as wide as keys here, got D={sizes['D']} and Dv={sizes['Dv']}")


def check_pools(pools: Sequence[KVPages], sizes: dict[str, int], device: torch.device) -> None:
    # A KVPages is itself a tuple: without this line a lone pool would be read as a list of its fields.
    if isinstance(pools, KVPages) or not isinstance(pools, Sequence) or not pools:
        got = "an empty list" if isinstance(pools, Sequence) and not pools else f"a single {type(pools).__name__}"
        raise ValueError(f"pools must be a list of one or more KVPages, got {got}")
    for i, pages in enumerate(pools):
        check_pages(f"pools[{i}]", pages, sizes, device)


def check_page_list(
    name: str, where: PageList, sizes: dict[str, int], device: torch.device, *, starts: bool = False
) -> None:
    """Shapes and dtypes. What the numbers say is checked by the backend, where it costs no host sync.

    starts: may tokens begin within a page?
    """
    check_is(name, where, PageList)
    for field, tensor in (("ids", where.ids), ("lens", where.lens)):
        check_tensor(f"{name}.{field}", tensor, (torch.int32,), f"len({name})", sizes, device)
    if where.starts is not None and not starts:
        raise ValueError(f"{name}.starts must be None here: only kv_append to pages of floats begins within a page")
    check_optional(f"{name}.starts", where.starts, (torch.int32,), f"len({name})", sizes, device)


def check_plan(plan: Plan, heads: int, q: Tensor) -> None:
    check_is("plan", plan, Plan)
    sizes: dict[str, int] = {}
    for field, layout in (("q_indptr", "S+1"), ("page_indptr", "L+1"), ("page_ids", "N"), ("page_lens", "N")):
        check_tensor(f"plan.{field}", getattr(plan, field), (torch.int32,), layout, sizes, q.device)
    if sizes["S+1"] == 0:
        raise ValueError("plan.q_indptr must hold at least its leading 0, got an empty tensor")
    segments, lists = sizes["S+1"] - 1, sizes["L+1"] - 1
    if lists not in (segments, segments * heads):
        raise ValueError(
            f"plan.page_indptr must be [{segments + 1}] (a list per segment) or [{segments * heads + 1}] (one for each"
            f" of its KV heads), got [{lists + 1}]"
        )
    check_optional("plan.page_bias", plan.page_bias, (torch.float32,), "N", sizes, q.device)
    sizes["S"] = segments
    for field, layout in PLAN_NUMBERS.items():
        check_optional(f"plan.{field}", getattr(plan, field), (torch.int32,), layout, sizes, q.device)
    for one, other in (("windows", "page_positions"), ("arrivals", "counters")):
        if (getattr(plan, one) is None) != (getattr(plan, other) is None):
            raise ValueError(f"plan.{one} and plan.{other} must be given together, or neither, got one of them")
    check_optional("plan.prepared", plan.prepared, (torch.uint8,), "bytes", sizes, q.device)
    if (plan.page_variants is None) != (q.ndim == 3):
        raise ValueError(
            f"plan.page_variants must be given for q [V, T, Hq, D] and None for q [T, Hq, D],"
            f" got {'None' if plan.page_variants is None else 'a tensor'} for q {list(q.shape)}"
        )


def check_attention(
    q: Tensor, width: str, pools: Sequence[KVPages], plan: Plan, sizes: dict[str, int], *, same_width: bool
) -> None:
    """What both attention ops take. width: of q, D or D+Dv; same_width: must values be as wide as keys?"""
    check_pools(pools, sizes, device_of("q", q))
    if same_width:
        check_same_width("pools", sizes)
    sizes["D+Dv"] = sizes["D"] + sizes["Dv"]
    check_tensor("q", q, FLOATS, f"T Hq {width}" if q.ndim == 3 else f"V T Hq {width}", sizes, q.device)
    check_plan(plan, sizes["H"], q)
    if sizes["Hq"] % sizes["H"]:
        raise ValueError(f"q must have a multiple of the pools' H={sizes['H']} heads, got {sizes['Hq']}")


def check_given(why: str, **outputs: Tensor | None) -> None:
    """why: "with accumulate=True: they are what is added to"."""
    if any(tensor is None for tensor in outputs.values()):
        raise ValueError(f"{' and '.join(outputs)} must be given {why}, got None")


def attention_outputs(
    q: Tensor, out: Tensor | None, lse: Tensor | None, sizes: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] and lse [T, Hq]: as given, or new."""
    T, heads, device = sizes["T"], sizes["Hq"], q.device
    if out is None:
        out = torch.empty(T, heads, sizes["D"], dtype=q.dtype, device=device)
    if lse is None:
        lse = torch.empty(T, heads, dtype=torch.float32, device=device)
    return out, lse


def check_norm(
    name: str, weight: Tensor | None, bias: Tensor | None, heads: int, sizes: dict[str, int], device: torch.device
) -> None:
    """The weight of a norm over all of `heads` heads, or over each, and the bias that makes it a layer norm."""
    D, size = sizes["D"], f"len({name})"
    if weight is None:
        if bias is not None:
            raise ValueError(f"{name}_bias must be None without {name}, got a tensor")
        return
    check_tensor(name, weight, FLOATS, size, sizes, device)
    if len(weight) not in (D, heads * D):
        raise ValueError(
            f"{name} must be [{heads * D}] (all heads together) or [{D}] (each head), got {list(weight.shape)}"
        )
    check_optional(f"{name}_bias", bias, FLOATS, size, sizes, device)


def check_softcap(softcap: float) -> None:
    if not isinstance(softcap, numbers.Real) or not 0 <= softcap < 1e38:
        raise ValueError(f"softcap must be 0, for none, or a positive number, got {softcap!r}")


def check_scale(name: str, scale: float | None) -> None:
    """None, or a number that float32 holds."""
    if scale is not None and not (isinstance(scale, numbers.Real) and abs(scale) < 1e38):
        raise ValueError(f"{name} must be a number, got {scale!r:.80}")


def check_number(name: str, number: float) -> None:
    if not isinstance(number, numbers.Real):
        raise TypeError(f"{name} must be a number, got {shown(number)}")
    if not abs(number) < 1e38:  # which float32 holds
        raise ValueError(f"{name} must be a finite number, got {number!r:.80}")


def check_alibi(slopes: Tensor | None, plan: Plan, sizes: dict[str, int], device: torch.device) -> None:
    if slopes is None:
        return
    if plan.page_positions is None:
        raise ValueError(
            "plan.page_positions must be given with alibi_slopes: make_plan makes them where it has windows"
        )
    known = {"S": len(plan.q_indptr) - 1, "Hq": sizes["Hq"]}
    layout = "S Hq" if isinstance(slopes, Tensor) and slopes.ndim == 2 else "Hq"
    check_tensor("alibi_slopes", slopes, (torch.float32,), layout, known, device)


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def check_word(name: str, word: str | None, words: Sequence[str]) -> None:
    if word is not None and word not in words:
        raise ValueError(f"{name} must be {', '.join(map(repr, words))} or None, got {word!r}")


def check_rows(name: str, x: Tensor, sizes: dict[str, int], device: torch.device, ndim: int) -> None:
    """[..., K] of floats, of so many dimensions, whose M rows lie evenly apart."""
    check_tensor(name, x, FLOATS, rows_layout(ndim), sizes, device)
    if ndim != 2:
        sizes["M"] = x.shape[:-1].numel()
    if ndim > 2 and not torch.compiler.is_compiling():
        try:
            x.view(sizes["M"], x.shape[-1])
        except RuntimeError:
            raise ValueError(f"{name} must have rows that lie evenly apart, got strides {x.stride()}") from None


def rows_layout(ndim: int) -> str:
    """ "M K", and for more dimensions "M0 M1 K"."""
    return " ".join([*(["M"] if ndim == 2 else [f"M{i}" for i in range(ndim - 1)]), "K"])


def check_groups(
    name: str,
    groups: Tensor | None,
    width: str,
    sizes: dict[str, int],
    device: torch.device,
    ndim: int = 2,
) -> None:
    """[G, width], each row for M / G rows in turn; of no rows there may be no groups. Where the rows are those of
    [..., n, width] of `ndim` dimensions, it may be [..., 1, width] too."""
    if ndim > 2 and isinstance(groups, Tensor) and groups.ndim != 2:
        check_tensor(name, groups, FLOATS, " ".join([*rows_layout(ndim).split()[:-2], "1", width]), sizes, device)
        return
    sizes.pop("G", None)  # each has its own
    check_optional(name, groups, FLOATS, f"G {width}", sizes, device)
    if groups is not None and sizes["M"] % (len(groups) or sizes["M"] + 1):
        raise ValueError(f"{name} must have a number of rows that divides M={sizes['M']}, got {len(groups)}")


def check_quantized(
    name: str, x: Quantized, dtypes: Sequence[torch.dtype], layout: str, sizes: dict[str, int], device: torch.device
) -> None:
    check_is(name, x, Quantized)
    check_tensor(f"{name}.codes", x.codes, dtypes, layout, sizes, device)
    check_tensor(f"{name}.scales", x.scales, (torch.float32,), layout.split()[0], sizes, device)
    for field, tensor in (("codes", x.codes), ("scales", x.scales)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}.{field} must be contiguous, got strides {tensor.stride()}")
