"""How keys and values lie in memory: pages, lists of pages, and the plan that an attention call follows.

Plain tuples of tensors, so that they pass through torch.compile and cost nothing to build.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

# How a page stores K and V. int8 keeps two float32 scales beside the codes, see KVPages.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
FORMATS = tuple(DTYPES)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class KVPages(NamedTuple):
    """A pool of P pages, each with room for page_size tokens of H KV heads.

    One (page, head) tile is contiguous: it is what a kernel loads at once. int8 holds
    key = code * k_scales (one scale per token and head) and value = code * v_scales (one per page, head and channel).
    """

    k: Tensor  # [P, H, page_size, D] float32, bfloat16 or int8
    v: Tensor  # [P, H, page_size, D] same dtype
    k_scales: Tensor | None = None  # [P, H, page_size] float32, int8 only
    v_scales: Tensor | None = None  # [P, H, D] float32, int8 only

    @classmethod
    def empty(
        cls, format: str, pages: int, heads: int, page_size: int, head_dim: int, device: torch.device | str = "cpu"
    ) -> KVPages:
        """Allocate a pool. Its contents are undefined: a slot means something once an op has written its page."""
        if format not in DTYPES:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
        for name, size in (("pages", pages), ("heads", heads), ("page_size", page_size), ("head_dim", head_dim)):
            if size <= 0:
                raise ValueError(f"{name} must be positive, got {size}")
        shape = (pages, heads, page_size, head_dim)
        k, v = (torch.empty(shape, dtype=DTYPES[format], device=device) for _ in range(2))
        if format != "int8":
            return cls(k, v)
        return cls(
            k,
            v,
            torch.empty(shape[:3], dtype=torch.float32, device=device),
            torch.empty(pages, heads, head_dim, dtype=torch.float32, device=device),
        )

    @property
    def format(self) -> str:
        return _NAMES[self.k.dtype]

    @property
    def pages(self) -> int:
        return self.k.shape[0]

    @property
    def heads(self) -> int:
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes held, scales included."""
        return sum(tensor.nbytes for tensor in self if tensor is not None)


class PageList(NamedTuple):
    """Tokens fill, or are read from, these pages in order: lens[i] tokens in the first slots of page ids[i]."""

    ids: Tensor  # [n] int32
    lens: Tensor  # [n] int32, each in [0, page_size]

    @classmethod
    def of(cls, ids: Sequence[int], lens: Sequence[int], device: torch.device | str = "cpu") -> PageList:
        _check_list("ids", ids, lens)
        return cls(_int32(ids, device), _int32(lens, device))


class Plan(NamedTuple):
    """Which pages each query attends to. One plan serves all layers and all passes over a block.

    Segment s is the queries q_indptr[s] : q_indptr[s+1]; all of them attend to every valid token of the pages
    page_indptr[s] : page_indptr[s+1] and to nothing else. The page list is the mask.
    """

    q_indptr: Tensor  # [S+1] int32, from 0 to T
    page_indptr: Tensor  # [S+1] int32, from 0 to N
    page_ids: Tensor  # [N] int32, counted through the pools in the order a call gives them
    page_lens: Tensor  # [N] int32, valid tokens of each page


def make_plan(segments: Sequence[tuple[int, Sequence[int], Sequence[int]]], device: torch.device | str = "cpu") -> Plan:
    """Build a plan from (number of queries, page ids, valid tokens of each page) per segment, in query order.

    An empty page list is allowed: its queries get out = 0 and lse = -inf.

    Raises:
        ValueError: a negative count, id or length, or as many ids as lengths not given. Ids and lengths are held
            against the pools when the plan is used, since one plan may serve pools of several layers.
    """
    for s, (queries, ids, lens) in enumerate(segments):
        if queries < 0:
            raise ValueError(f"segments[{s}]: the number of queries must not be negative, got {queries}")
        _check_list(f"segments[{s}]: page ids", ids, lens)
    q_indptr = accumulate((queries for queries, _, _ in segments), initial=0)
    page_indptr = accumulate((len(ids) for _, ids, _ in segments), initial=0)
    return Plan(
        _int32(list(q_indptr), device),
        _int32(list(page_indptr), device),
        _int32([page for _, ids, _ in segments for page in ids], device),
        _int32([length for _, _, lens in segments for length in lens], device),
    )


def _check_list(name: str, ids: Sequence[int], lens: Sequence[int]) -> None:
    if len(ids) != len(lens):
        raise ValueError(f"{name} must be as many as their lens, got {len(ids)} ids and {len(lens)} lens")
    for i, (page, length) in enumerate(zip(ids, lens, strict=True)):
        if page < 0 or length < 0:
            raise ValueError(f"{name}[{i}] and its len must not be negative, got page {page} with {length} tokens")


def _int32(values: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
