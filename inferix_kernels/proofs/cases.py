"""Small cases of the kernels of pages, attention and 8-bit layers: what is wrong on a device shows here, in a second or
so each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import ops, reference, testing
from ..layout import FORMATS, KV_FORMATS, KVPages, PageList, Quantized
from ..plans import Plan
from .stored import kernel

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RUNS = 3  # of each attention case: a race gives other bits sooner or later
HEADS, PAGE = 2, 64
ROWS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
EIGHT_BIT = tuple(name for name in KV_FORMATS if FORMATS[name].eight_bit)


def tolerance(format: str, eight_bit: bool) -> float:
    """Of an attention result to its largest |number|.

    Weights and widened values are bfloat16, 4-bit keys are rounded to it too. In 8 bits q and the weights are rounded
    as well: rounding q is in the result that is compared with, the weights' three bits of mantissa are not.
    """
    return 1e-5 if format == "fp32" else 4e-2 if eight_bit else 2e-2 if FORMATS[format].k.packed else 1e-2


class Wrong(Exception):
    """A result is not the reference's."""


def kernels_of(format: str) -> dict[str, Callable[[str, str], None]]:
    """name -> case(backend, device) of what reads or writes pages of a format; raises Wrong or Unsupported."""
    cases: dict[str, Callable[[str, str], None]] = {
        kernel("kv_append", format): lambda backend, device: _append(format, backend, device),
        kernel("kv_commit", format): lambda backend, device: _commit(format, backend, device),
        kernel("kv_gather", format): lambda backend, device: _gather(format, backend, device),
    }
    if format in FLOATS:
        cases[kernel("qkv_prologue", format)] = lambda backend, device: _prologue(format, backend, device)
        cases[kernel("merge_attention", format)] = lambda backend, device: _merge(format, backend, device)
        cases[kernel("add_norm", format)] = lambda backend, device: _add_norm(format, backend, device)
    if format in ROWS:
        cases[kernel("quantize_rows", format)] = lambda backend, device: _quantize(format, backend, device)
        cases[kernel("linear", format)] = lambda backend, device: _linear(format, backend, device)
    cases[kernel("paged_attention", format)] = lambda backend, device: _attention(format, False, backend, device)
    if format in EIGHT_BIT:
        name = kernel("paged_attention", format, eight_bit=True)
        cases[name] = lambda backend, device: _attention(format, True, backend, device)
    return cases


def require_close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Within a share of the largest |number|; NaN where there should be none is wrong."""
    got, want = got.float().cpu(), want.float().cpu()
    finite = want.isfinite()
    if not torch.equal(got[~finite], want[~finite]):
        raise Wrong(f"{name} is not what it should be where that is -inf")
    off = float((got - want)[finite].abs().max() / want[finite].abs().max().clamp(min=1e-3)) if finite.any() else 0.0
    if not off <= tolerance:
        raise Wrong(f"{name} is off by {off:.2g} of its largest number, allowed {tolerance:.2g}")


def require_same(name: str, got: KVPages, want: KVPages) -> None:
    for field, a in got.tensors.items():
        if not torch.equal(a.cpu().view(torch.uint8), want.tensors[field].view(torch.uint8)):
            raise Wrong(f"{name}: {field} is not, bit for bit, the reference's")


def _zeros(format: str, pages: int, width: int, device: str) -> KVPages:
    pool = KVPages.empty(format, pages, HEADS, PAGE, width, device)
    for tensor in pool.tensors.values():
        tensor.view(torch.uint8).zero_()
    return pool


LENS = (PAGE, PAGE, 17, 0, 1)


def _append(format: str, backend: str, device: str) -> None:
    for width in (64, 128):
        k, v = (torch.randn(sum(LENS), HEADS, width, generator=_random(width + i)).bfloat16() for i in range(2))
        got, want = (_zeros(format, len(LENS) + 2, width, place) for place in (device, "cpu"))
        ids = [3, 0, 5, 1, 6]
        ops.kv_append(k.to(device), v.to(device), got, PageList.of(ids, LENS, device), backend=backend)
        reference.kv_append(k, v, want, PageList.of(ids, LENS))
        require_same(f"head_dim {width}", got, want)


def _commit(format: str, backend: str, device: str) -> None:
    source, where = testing.filled_pool("bf16", LENS, HEADS, PAGE, 128)
    mean = torch.randn(HEADS, 128, generator=_random(3))
    got, want = (_zeros(format, len(LENS) + 2, 128, place) for place in (device, "cpu"))
    target = PageList.of([6, 2, 0, 4, 3], LENS)
    reference.kv_commit(source, where, want, target, mean)
    ops.kv_commit(
        *(_pool(source, device), _list(where, device), got, _list(target, device), mean.to(device)),
        backend=backend,
    )
    require_same("committed pages", got, want)


def _gather(format: str, backend: str, device: str) -> None:
    pool, where = testing.filled_pool(format, LENS, HEADS, PAGE, 128)
    want = ops.kv_gather([pool], where, backend="reference")
    got = ops.kv_gather([_pool(pool, device)], _list(where, device), backend=backend)
    for name, a, b in zip("kv", got, want):
        require_close(name, a, b, 1e-6)


def _prologue(format: str, backend: str, device: str) -> None:
    tokens, width, dtype = sum(LENS), 128, FLOATS[format]
    qkv = torch.randn(tokens, 3 * HEADS * width, generator=_random(5)).to(dtype)
    norms = [torch.rand(HEADS * width, generator=_random(6 + i)) + 0.5 for i in range(2)]
    rope, mean = testing.rope_table(tokens, width), torch.randn(HEADS, width, generator=_random(8))
    found = []
    for place, which in ((device, backend), ("cpu", "reference")):
        pool, where = _zeros(format, len(LENS) + 2, width, place), PageList.of([3, 0, 5, 1, 6], LENS, place)
        x, norm_q, norm_k, angles = (tensor.to(place) for tensor in (qkv, *norms, rope))
        q = ops.qkv_prologue(x, norm_q, norm_k, angles, pool, where, k_mean=mean.to(place), backend=which)
        keys = ops.kv_gather([_pool(pool, "cpu")], _list(where, "cpu"), backend="reference")
        found.append((q, *keys))
    for name, a, b in zip(("q", "k", "v"), *found):
        require_close(name, a, b, 1e-5 if format == "fp32" else 2 * torch.finfo(dtype).eps)


def _quantize(format: str, backend: str, device: str) -> None:
    """Bare, where every bit is the reference's; and after a norm, whose sums may be taken in another order."""
    x, scale = torch.randn(70, 257, generator=_random(1)), torch.randn(2, 257, generator=_random(2))
    step = 1 / 127 if format == "int8" else 1 / 8
    for norm, factor, activation, off in ((None, None, None, 0.0), ("layer", scale, "gelu_tanh", step)):
        got, want = (
            ops.quantize_rows(
                x.to(place),
                ROWS[format],
                norm=norm,
                scale=None if factor is None else factor.to(place),
                activation=activation,
                backend=which,
            )
            for place, which in ((device, backend), ("cpu", "reference"))
        )
        require_close("scales", got.scales, want.scales, 1e-5)
        require_close("codes", got.codes, want.codes, off)


def _add_norm(format: str, backend: str, device: str) -> None:
    """All of it, and the sum alone, which is rounded as the reference rounds it."""
    dtype = FLOATS[format]
    x, residual = (torch.randn(70, 257, generator=_random(i)).to(dtype) for i in range(2))
    gate, scale, shift = torch.randn(3, 2, 257, generator=_random(2))
    found = []
    for place, which in ((device, backend), ("cpu", "reference")):
        rows, added_to, factor, *modulation = _to((x, residual, gate, scale, shift), place)
        kept = torch.empty_like(rows)
        steps = {"norm": "layer", **dict(zip(("scale", "shift"), modulation)), "activation": "gelu_tanh"}
        y = ops.add_norm(rows, gate=factor, residual=added_to, **steps, summed=kept, backend=which)  # type: ignore[arg-type]
        found.append((kept, y))
    for name, a, b, off in zip(
        ("summed", "out"), *found, (0.0, 1e-5 if format == "fp32" else 2 * torch.finfo(dtype).eps)
    ):
        require_close(name, a, b, off)


def _linear(format: str, backend: str, device: str) -> None:
    for m, n, k in ((1, 48, 64), (130, 96, 257), (192, 384, 128)):
        x, weight = (
            ops.quantize_rows(torch.randn(size, k, generator=_random(size)), ROWS[format], backend="reference")
            for size in (m, n)
        )
        bias, gate, residual = (torch.randn(*size, n, generator=_random(9)) for size in ((), (1,), (m,)))
        got, want = (
            ops.linear(
                Quantized(*_to(x, place)),
                Quantized(*_to(weight, place)),
                bias=bias.to(place),
                activation="gelu",
                gate=gate.to(place),
                residual=residual.to(place),
                dtype=torch.float32,
                backend=which,
            )
            for place, which in ((device, backend), ("cpu", "reference"))
        )
        require_close(f"[{m}, {k}] x [{n}, {k}]", got, want, 1e-5 if format == "int8" else 2**-7)


def _merge(format: str, backend: str, device: str) -> None:
    dtype = FLOATS[format]
    outs = [torch.randn(33, HEADS, 128, generator=_random(i)).to(dtype) for i in range(2)]
    lses = [torch.randn(33, HEADS, generator=_random(7 + i)) for i in range(2)]
    lses[0][::3], lses[1][::6] = -torch.inf, -torch.inf
    sides = [outs[0], lses[0], outs[1], lses[1]]
    want = ops.merge_attention(*sides, backend="reference")
    got = ops.merge_attention(*(x.to(device) for x in sides), backend=backend)
    require_close("out", got[0], want[0], 1e-5 if format == "fp32" else 2 * torch.finfo(dtype).eps)
    require_close("lse", got[1], want[1], 1e-5)


def _attention(format: str, eight_bit: bool, backend: str, device: str) -> None:
    """Ragged segments and pages, grouped heads; alone and beside scratch in bfloat16, as a World has them."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(format, torch.bfloat16)
    allowed, precision = tolerance(format, eight_bit), "8bit" if eight_bit else "exact"
    for width in (128,) if backend == "triton" else (64, 128):  # Triton compiles each for seconds
        for formats in [(format,)] if dtype != torch.bfloat16 else [(format,), (format, "bf16")]:
            q, pools, plan = testing.attention_inputs(
                *((130, 1, 64), (PAGE,) * 5 + (40, 1)), query_heads=2 * HEADS, heads=HEADS, head_dim=width,
                page_size=PAGE, formats=formats, dtype=dtype,
            )  # fmt: skip
            want = ops.paged_attention(_rounded(q, pools) if eight_bit else q, pools, plan, backend="reference")
            given = q.to(device), [_pool(pool, device) for pool in pools], Plan(*_to(plan, device))
            out, lse = _same_in_every_run(*given, precision, backend)
            # Beside other pages: q is rounded to each pool's codes in turn, which one rounding of q can't say.
            most = 1.5 * allowed if eight_bit and len(formats) > 1 else allowed
            what = f"{' + '.join(formats)}, head_dim {width}: "
            require_close(what + "out", out, want[0], most)
            require_close(what + "lse", lse, want[1], max(most, 1e-4))


def _same_in_every_run(
    q: Tensor, pools: list[KVPages], plan: Plan, precision: str, backend: str
) -> tuple[Tensor, Tensor]:
    first = ops.paged_attention(q, pools, plan, precision=precision, backend=backend)
    for _ in range(RUNS - 1):
        again = ops.paged_attention(q, pools, plan, precision=precision, backend=backend)
        if not all(torch.equal(a, b) for a, b in zip(first, again)):
            raise Wrong("not the same bits in every run")
    return first


def _rounded(q: Tensor, pools: Sequence[KVPages]) -> Tensor:
    """q as 8-bit kernels have it: in codes of the keys' type, with a scale for each row."""
    codes, scales = ops.quantize_rows(q.flatten(0, -2), pools[0].sides[0].codec.dtype, backend="reference")
    return (codes.float() * scales[:, None]).view(q.shape).to(q.dtype)


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _to(tensors: Sequence[Tensor | None], device: str) -> list[Tensor]:
    return [x if x is None else x.to(device) for x in tensors]  # type: ignore[misc]


def _pool(pool: KVPages, device: str) -> KVPages:
    return pool.map(lambda tensor: tensor.to(device))


def _list(where: PageList, device: str) -> PageList:
    return PageList(*_to(where, device))
