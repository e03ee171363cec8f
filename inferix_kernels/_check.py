"""Argument checks. Every message names the argument, what it must be, and what it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import FORMATS, KVPages, PageList, Plan

FLOATS = (torch.float32, torch.bfloat16)
_PAGE_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


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
    if tensor.dtype not in dtypes:
        raise TypeError(
            f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)},"
            f" got {str(tensor.dtype).removeprefix('torch.')}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the op's first argument, got {tensor.device}")
    check_shape(name, tensor, layout, sizes)


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


def check_inference(op: str, *tensors: Tensor) -> None:
    """Our ops have no backward: a gradient that silently stops here would be worse than an error."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                raise RuntimeError(f"{op} has no backward: call it under torch.no_grad(), or detach its inputs")


def check_pages(name: str, pages: KVPages, sizes: dict[str, int], device: torch.device) -> None:
    """Shapes, dtypes and scales of one pool. Sets sizes H, page_size and D, or holds the pool against them."""
    if not isinstance(pages, KVPages):
        raise TypeError(f"{name} must be a KVPages, got {type(pages).__name__}")
    sizes.pop("P", None)  # each pool has its own
    check_tensor(f"{name}.k", pages.k, _PAGE_DTYPES, "P H page_size D", sizes, device)
    check_tensor(f"{name}.v", pages.v, (pages.k.dtype,), "P H page_size D", sizes, device)
    if not (pages.k.is_contiguous() and pages.v.is_contiguous()):
        raise ValueError(
            f"{name}.k and {name}.v must be contiguous, got strides {pages.k.stride()} and {pages.v.stride()}"
        )
    scales = {"k_scales": (pages.k_scales, "P H page_size"), "v_scales": (pages.v_scales, "P H D")}
    for field, (tensor, layout) in scales.items():
        if (tensor is None) != (pages.k.dtype != torch.int8):
            raise ValueError(
                f"{name}.{field} must be given for int8 pages and None for {' and '.join(FORMATS[:2])},"
                f" got {'None' if tensor is None else 'a tensor'} with {pages.format} pages"
            )
        if tensor is not None:
            check_tensor(f"{name}.{field}", tensor, (torch.float32,), layout, sizes, device)
            if not tensor.is_contiguous():
                raise ValueError(f"{name}.{field} must be contiguous, got strides {tensor.stride()}")


def check_pools(pools: Sequence[KVPages], sizes: dict[str, int], device: torch.device) -> None:
    # A KVPages is itself a tuple: without this line a lone pool would be read as a list of four strange ones.
    if isinstance(pools, KVPages) or not pools:
        raise ValueError(
            f"pools must be a list of one or more KVPages, got "
            f"{'a single KVPages' if isinstance(pools, KVPages) else 'an empty list'}"
        )
    for i, pages in enumerate(pools):
        check_pages(f"pools[{i}]", pages, sizes, device)


def check_page_list(name: str, where: PageList, sizes: dict[str, int], device: torch.device) -> None:
    """Shapes and dtypes. What the numbers say is checked by the backend, where it costs no host sync."""
    for field, tensor in (("ids", where.ids), ("lens", where.lens)):
        check_tensor(f"{name}.{field}", tensor, (torch.int32,), f"len({name})", sizes, device)


def check_plan(plan: Plan, device: torch.device) -> None:
    sizes: dict[str, int] = {}
    for field, layout in (("q_indptr", "S+1"), ("page_indptr", "S+1"), ("page_ids", "N"), ("page_lens", "N")):
        tensor = getattr(plan, field)
        check_tensor(f"plan.{field}", tensor, (torch.int32,), layout, sizes, device)
    if sizes["S+1"] == 0:
        raise ValueError("plan.q_indptr must hold at least its leading 0, got an empty tensor")
