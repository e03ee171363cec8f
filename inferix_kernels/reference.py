"""What every op means, in plain torch. This is the specification: written to be read, and every backend is held to it.

Same names and parameters as in ops.py, which fills in every optional one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .layout import Codec, KVPages, PageList, Plan, Quantized, Side, as_bytes

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.uint8: 15.0}  # int8 is symmetric: -128 is never stored
AMAX_FLOOR = 1e-12  # an all-zero row gets a scale above 0: it stores zeros, not NaN
STEP_FLOOR = 2.0**-14  # the same for 4-bit codes: the smallest normal float16
HALF_MAX = 65504.0


def kv_append(k: Tensor, v: Tensor, pages: KVPages, where: PageList) -> None:
    for page, start, stop in spans("where", where, pages, tokens=k.shape[0], written=True):
        write_page(pages, page, k[start:stop].float(), v[start:stop].float())


def kv_commit(
    source: KVPages, source_list: PageList, target: KVPages, target_list: PageList, k_mean: Tensor | None = None
) -> None:
    reads = spans("source_list", source_list, source)
    writes = spans("target_list", target_list, target, written=True)
    if source_list.lens.tolist() != target_list.lens.tolist():
        raise ValueError(
            "target_list.lens must equal source_list.lens, "
            f"got {target_list.lens.tolist()} and {source_list.lens.tolist()}"
        )
    for (from_page, start, stop), (to_page, _, _) in zip(reads, writes, strict=True):
        if source.format == target.format and k_mean is None:
            copy_page(source, from_page, target, to_page, stop - start)
        else:
            k, v = read_page(source, from_page, stop - start)
            write_page(target, to_page, k if k_mean is None else k - k_mean, v)


def kv_gather(
    pools: Sequence[KVPages], where: PageList, dtype: torch.dtype = torch.float32, *, out: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    for page, start, stop in spans("where", where, *pools, tokens=out[0].shape[0]):
        k, v = read_page(*locate(pools, page), stop - start)
        out[0][start:stop], out[1][start:stop] = k, v
    return out


def paged_attention(
    q: Tensor, pools: Sequence[KVPages], plan: Plan, *, scale: float, out: Tensor, lse: Tensor, accumulate: bool = False
) -> tuple[Tensor, Tensor]:
    queries = q[None] if q.ndim == 3 else q  # [V, T, Hq, D]
    H, D = pools[0].heads, q.shape[-1]
    starts = indptr("q_indptr", plan.q_indptr, queries.shape[1])
    lists = indptr("page_indptr", plan.page_indptr, len(plan.page_ids))
    entries = spans("plan.page", PageList(plan.page_ids, plan.page_lens), *pools)
    bias = [0.0] * len(entries) if plan.page_bias is None else plan.page_bias.tolist()
    variants = [0] * len(entries) if plan.page_variants is None else choices(plan.page_variants, len(queries))
    group = queries.shape[2] // H  # query head j reads KV head j // group
    shared = H if len(lists) == len(starts) else 1  # KV heads that share a page list
    for i in range(len(lists) - 1):
        s, head = divmod(i * shared, H)
        at = slice(starts[s], starts[s + 1]), slice(head * group, (head + shared) * group)
        x = queries[:, at[0], at[1]].float().unflatten(2, (shared, group))  # [V, t, heads, group, D]
        scores, values = [x.new_empty(*x.shape[1:4], 0)], [x.new_empty(0, shared, D)]
        for entry in range(lists[i], lists[i + 1]):
            page, start, stop = entries[entry]
            k, v = (side[:, head : head + shared] for side in read_page(*locate(pools, page), stop - start))
            scores.append(torch.einsum("thgd,lhd->thgl", x[variants[entry]], k) * scale + bias[entry])
            values.append(v)
        list_out, list_lse = softmax_sum(torch.cat(scores, -1), torch.cat(values))
        if accumulate:
            list_out, list_lse = merge(out[at].float(), lse[at], list_out, list_lse)
        out[at], lse[at] = list_out, list_lse
    return out, lse


def softmax_sum(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """scores [t, H, group, L], values [L, H, D] -> out [t, H * group, D], lse [t, H * group].

    Without a key, or with none above -inf, out is 0 and lse -inf.
    """
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
    weights = (scores - lse.where(lse != -torch.inf, 0.0)[..., None]).exp()
    return torch.einsum("thgl,lhd->thgd", weights, values).flatten(1, 2), lse.flatten(1, 2)


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    merged_out, merged_lse = merge(out_a.float(), lse_a, out_b.float(), lse_b)
    out.copy_(merged_out)
    lse.copy_(merged_lse)
    return out, lse


def qkv_prologue(
    qkv: Tensor,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    rope: Tensor | None,
    pages: KVPages,
    where: PageList,
    *,
    norm_q_bias: Tensor | None = None,
    norm_k_bias: Tensor | None = None,
    bias: Tensor | None = None,
    k_mean: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = True,
    out: Tensor,
) -> Tensor:
    H, D = pages.heads, pages.head_dim
    x = qkv.float() if bias is None else qkv.float() + bias.float()
    q, k, v = x.split([out.shape[1] * D, H * D, H * D], dim=1)
    q = rotate(normalise(q, norm_q, norm_q_bias, eps).unflatten(1, (-1, D)), rope, interleaved)
    k = rotate(normalise(k, norm_k, norm_k_bias, eps).unflatten(1, (-1, D)), rope, interleaved)
    kv_append(k if k_mean is None else k - k_mean, v.unflatten(1, (-1, D)), pages, where)
    return out.copy_(q)


def quantize_rows(
    x: Tensor,
    dtype: torch.dtype = torch.int8,
    *,
    norm: str | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    activation: str | None = None,
    out: Quantized,
) -> Quantized:
    y = x.float()
    if norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    if norm is not None:
        y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight.float()
    y = y if bias is None else y + bias.float()
    y = y if scale is None else y * (1 + per_row(scale, len(y)))
    y = y if shift is None else y + per_row(shift, len(y))
    y = activate(y, activation)
    codes, scales, _ = encode(y[None], Codec(dtype, "token"))
    as_bytes(out.codes).copy_(as_bytes(codes[0]))
    out.scales.copy_(scales[0])  # type: ignore[index]
    return out


def linear(
    x: Quantized,
    weight: Quantized,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor,
) -> Tensor:
    # float64 holds every sum of products of 8-bit codes exactly.
    y = (x.codes.double() @ weight.codes.double().mT).float() * (x.scales[:, None] * weight.scales)
    y = y if bias is None else y + bias.float()
    y = activate(y, activation)
    y = y if gate is None else y * per_row(gate, len(y))
    return out.copy_(y if residual is None else y + residual.float())


def activate(y: Tensor, activation: str | None) -> Tensor:
    gelu = {"gelu": "none", "gelu_tanh": "tanh"}  # by the error function, and its approximation
    return y if activation is None else torch.nn.functional.gelu(y, approximate=gelu[activation])


def per_row(groups: Tensor, rows: int) -> Tensor:
    """[G, N] -> [rows, N]: each group's row for rows / G rows in turn."""
    return groups.float().repeat_interleave(rows // max(len(groups), 1), 0)


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x [T, heads * D]: the RMS norm, or the layer norm if there is a bias.

    The weight's length is the size of the group that is normalised together: all heads, or one.
    """
    if weight is None:
        return x
    groups = x.unflatten(1, (-1, min(len(weight), x.shape[1])))
    if bias is not None:
        groups = groups - groups.mean(-1, keepdim=True)
    groups = groups * (groups.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()
    return (groups if bias is None else groups + bias.float()).flatten(1)


def rotate(x: Tensor, rope: Tensor | None, interleaved: bool) -> Tensor:
    """x [T, heads, D], rope [T, R/2, 2]: turns the first R channels by pairs (2j, 2j+1), or (j, j + R/2)."""
    if rope is None:
        return x
    half = rope.shape[1]
    cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]  # [T, 1, R/2]
    pairs = x[..., : 2 * half]
    a, b = (pairs[..., 0::2], pairs[..., 1::2]) if interleaved else (pairs[..., :half], pairs[..., half:])
    turned = (a * cos - b * sin, a * sin + b * cos)
    turned_pairs = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([turned_pairs, x[..., 2 * half :]], -1)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the union of two disjoint sets of keys, from the results over each: out [..., D], lse [...]."""
    largest = torch.maximum(lse_a, lse_b)
    # -inf on both sides: any finite number in the maximum's place makes both weights 0.
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    weight_a, weight_b = (lse_a - largest).exp(), (lse_b - largest).exp()
    total = weight_a + weight_b
    lse = largest + total.log()
    # A side that saw no key contributes nothing, whatever its out holds: 0 * NaN is NaN, so it is chosen away.
    share_a = torch.where((weight_a > 0)[..., None], out_a * (weight_a / total)[..., None], 0.0)
    share_b = torch.where((weight_b > 0)[..., None], out_b * (weight_b / total)[..., None], 0.0)
    return share_a + share_b, lse


def encode(x: Tensor, codec: Codec) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x [H, L, width] float32 -> codes of the same shape, not yet packed or transposed, scales and offsets [H, n].

    8-bit codes are x / scale with scale = max(largest |x|, 1e-12) / 127 (int8) or 448 (e4m3). 4-bit codes are
    (x - offset) / scale with offset = the smallest x and scale = max((largest x - offset) / 15, 2^-14), both
    float16. Divisions are float32, roundings half to even.
    """
    if codec.scaled_by is None:
        return x.to(codec.dtype), None, None
    dim, top = (-1 if codec.scaled_by == "token" else -2), x.new_full((), LARGEST[codec.dtype])
    if codec.packed:
        shape = x.sum(dim, keepdim=True).shape  # amin of no tokens is undefined
        low, high = (x.amin(dim, True), x.amax(dim, True)) if x.shape[dim] else (x.new_zeros(shape),) * 2
        offset = low.clamp(-HALF_MAX, HALF_MAX).half() + 0.0  # -0 becomes 0
        scale = ((high.clamp(max=HALF_MAX) - offset.float()) / top).clamp(min=STEP_FLOOR).half()
        codes = ((x - offset.float()) / scale.float()).round().clamp(0, LARGEST[codec.dtype]).to(codec.dtype)
        return codes, scale.squeeze(dim), offset.squeeze(dim)
    amax = x.abs().amax(dim, True) if x.shape[dim] else x.new_zeros(x.sum(dim, keepdim=True).shape)
    scale = amax.clamp(min=AMAX_FLOOR) / top  # a tensor: by a Python number CUDA multiplies with the reciprocal
    codes = (x / scale).clamp(-top, top)
    return (codes if codec.dtype.is_floating_point else codes.round()).to(codec.dtype), scale.squeeze(dim), None


def decode(codes: Tensor, scales: Tensor | None, offsets: Tensor | None, codec: Codec) -> Tensor:
    """The inverse of encode: [H, L, width] float32."""
    x = codes.float()
    if scales is None:
        return x
    dim = -1 if codec.scaled_by == "token" else -2
    x = x * scales.float().unsqueeze(dim)
    return x if offsets is None else x + offsets.float().unsqueeze(dim)


def write_page(pages: KVPages, page: int, k: Tensor, v: Tensor) -> None:
    """k [L, H, D] and v [L, H, Dv] float32 fill slots 0 : L. The others hold code 0: no NaN hides there."""
    for side, x in zip(pages.sides, (k, v), strict=True):
        write_side(side, page, *encode(x.transpose(0, 1), side.codec))


def write_side(side: Side, page: int, codes: Tensor, scales: Tensor | None, offsets: Tensor | None) -> None:
    """Store encode's results for the first L tokens; unused slots hold code 0, the least scale and offset 0."""
    codec, length = side.codec, codes.shape[1]
    tile = as_bytes(side.codes[page])  # [H, ...]: torch can't assign to slices of float8
    tile.zero_()
    rows = tile.transpose(1, 2) if codec.transposed else tile  # [H, page_size, stored]
    rows[:, :length] = codes[..., 0::2] | codes[..., 1::2] << 4 if codec.packed else as_bytes(codes)
    if side.scales is not None and scales is not None:
        side.scales[page] = STEP_FLOOR if codec.packed else torch.tensor(AMAX_FLOOR) / LARGEST[codec.dtype]
        side.scales[page, :, : scales.shape[1]] = scales
    if side.offsets is not None and offsets is not None:
        side.offsets[page] = 0
        side.offsets[page, :, : offsets.shape[1]] = offsets


def read_side(side: Side, page: int, length: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What write_side was given for the first `length` tokens."""
    codec = side.codec
    codes = side.codes[page].transpose(1, 2) if codec.transposed else side.codes[page]
    codes = codes[:, :length]
    if codec.packed:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    scales, offsets = (
        x if x is None else x[page, :, :length] if codec.scaled_by == "token" else x[page]
        for x in (side.scales, side.offsets)
    )
    return codes, scales, offsets


def read_page(pages: KVPages, page: int, length: int) -> tuple[Tensor, Tensor]:
    """The first tokens of a page, dequantized: k [length, H, D], v [length, H, Dv] float32."""
    k, v = (decode(*read_side(side, page, length), side.codec).transpose(0, 1) for side in pages.sides)
    return k, v


def copy_page(source: KVPages, from_page: int, target: KVPages, to_page: int, length: int) -> None:
    """Bit for bit; slots past length as write_page leaves them."""
    for from_side, to_side in zip(source.sides, target.sides, strict=True):
        write_side(to_side, to_page, *read_side(from_side, from_page, length))


def locate(pools: Sequence[KVPages], page: int) -> tuple[KVPages, int]:
    """Page ids count through the pools in the order given."""
    for pages in pools:
        if page < pages.pages:
            return pages, page
        page -= pages.pages
    raise AssertionError("spans() checked the ids")


def spans(
    name: str, where: PageList, *pools: KVPages, tokens: int | None = None, written: bool = False
) -> list[tuple[int, int, int]]:
    """(page, first token, one past the last token) of every entry of a page list, checked."""
    num_pages, page_size = sum(pages.pages for pages in pools), pools[0].page_size
    ids, lens = where.ids.tolist(), where.lens.tolist()
    # plan.page_ids and plan.page_lens are fields of their own; where.ids and where.lens belong to a PageList.
    ids_name, lens_name = (f"{name}_ids", f"{name}_lens") if name == "plan.page" else (f"{name}.ids", f"{name}.lens")
    for i, (page, length) in enumerate(zip(ids, lens, strict=True)):
        if not 0 <= page < num_pages:
            raise ValueError(f"{ids_name}[{i}] must be in [0, {num_pages}), got {page}")
        if not 0 <= length <= page_size:
            raise ValueError(f"{lens_name}[{i}] must be in [0, {page_size}], got {length}")
    if tokens is not None and sum(lens) != tokens:
        raise ValueError(f"{lens_name} must sum to T={tokens}, got {sum(lens)}")
    if written and len(set(ids)) != len(ids):
        raise ValueError(f"{ids_name} must name each written page once, got {max(ids, key=ids.count)} twice")
    return list(_spans(ids, lens))


def _spans(ids: list[int], lens: list[int]) -> Iterator[tuple[int, int, int]]:
    start = 0
    for page, length in zip(ids, lens, strict=True):
        yield page, start, start + length
        start += length


def choices(variants: Tensor, count: int) -> list[int]:
    values: list[int] = variants.tolist()
    for i, value in enumerate(values):
        if not 0 <= value < count:
            raise ValueError(f"plan.page_variants[{i}] must be in [0, {count}), got {value}")
    return values


def indptr(name: str, pointers: Tensor, end: int) -> list[int]:
    """A CSR row pointer, checked: it starts at 0, never falls and ends at `end`."""
    values: list[int] = pointers.tolist()
    if values[0] != 0 or values[-1] != end or any(a > b for a, b in pairwise(values)):
        raise ValueError(f"plan.{name} must rise from 0 to {end}, got {values}")
    return values
