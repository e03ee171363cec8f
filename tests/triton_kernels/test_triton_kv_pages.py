"""The page ops in Triton against the reference, bit for bit: in its interpreter, or on a GPU where there is one."""

import inspect

import pytest
import torch

from tests.triton_kernels import triton_mode
from tests.triton_kernels.triton_mode import on

# isort: split
import triton
import triton.language as tl

from inferix_kernels import FORMATS, KVPages, PageList, Unsupported, ops, reference, triton_kernels
from inferix_kernels.__main__ import OPS, try_op
from inferix_kernels._dispatch import implementation
from inferix_kernels.testing import filled_pool, poisoned_pool
from inferix_kernels.triton_kernels import codecs, kv_pages, launch

device = triton_mode.device
WIDTHS = (24, 20)  # of keys and values: different, no powers of two


def tokens(count, heads, widths=WIDTHS, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(count, heads, width, generator=generator) for width in widths)
    k[-1], v[:, 0, 0] = 0, 0  # a key and a channel of zeros: their scale must not be 0
    return k.to(dtype), v.to(dtype)


def assert_same_bits(got: KVPages, want: KVPages):
    assert got.tensors.keys() == want.tensors.keys()
    for name, x in got.tensors.items():
        assert torch.equal(x.cpu().view(torch.uint8), want.tensors[name].view(torch.uint8)), name


def check_append(format, k, v, where, device, pages=4, page_size=8):
    """The reference runs on the CPU: on a GPU torch divides by a number by multiplying with its reciprocal."""
    got, want = (poisoned_pool(format, pages, k.shape[1], page_size, (k.shape[2], v.shape[2])) for _ in range(2))
    got = on(device, got)
    ops.kv_append(k.to(device), v.to(device), got, on(device, where), backend="triton")
    ops.kv_append(k, v, want, where, backend="reference")
    assert_same_bits(got, want)  # pages that are not in the list too
    return want


def check_commit(source, source_list, target_format, device, k_mean=None):
    lens = source_list.lens.tolist()
    to = PageList.of(range(len(lens), 0, -1), lens)
    shape = (len(lens) + 1, source.heads, source.page_size, (source.head_dim, source.value_dim))
    got, want = (poisoned_pool(target_format, *shape) for _ in range(2))
    got = on(device, got)
    mean = None if k_mean is None else k_mean.to(device)
    ops.kv_commit(on(device, source), on(device, source_list), got, on(device, to), mean, backend="triton")
    ops.kv_commit(source, source_list, want, to, k_mean, backend="reference")
    assert_same_bits(got, want)


@pytest.mark.parametrize(
    "format, dtype",
    [(format, torch.float32) for format in FORMATS]
    + [(format, dtype) for format in ("fp16", "i8f8") for dtype in (torch.bfloat16, torch.float16)],
)
def test_append_stores_what_the_reference_stores(format, dtype, device):
    check_append(format, *tokens(13, 1, dtype=dtype), PageList.of([3, 0, 2], [8, 0, 5]), device)


@pytest.mark.parametrize("format", ["i8f8", "int4"])
def test_append_reads_slices_of_a_packed_projection(format, device):
    packed = torch.cat(tokens(5, 2, (16, 16)), dim=1).to(device)
    got, want = (poisoned_pool(format, 1, 2, 8, 16) for _ in range(2))
    got, where = on(device, got), PageList.of([0], [5])
    ops.kv_append(packed[:, :2], packed[:, 2:], got, on(device, where), backend="triton")
    ops.kv_append(packed[:, :2].cpu(), packed[:, 2:].cpu(), want, where, backend="reference")
    assert_same_bits(got, want)


@pytest.mark.parametrize("format", ["bf16", "fp8", "int4"])
def test_a_tile_in_several_parts_is_the_same_tile(format, device, monkeypatch):
    monkeypatch.setattr(codecs, "_PART", 64)
    monkeypatch.setattr(codecs, "_LEAST_CHANNELS", 4)
    key = codecs.tile_of(FORMATS[format].k, 8, WIDTHS[0])
    assert key.parts > 1 and key.rows * key.cols <= 64
    stored = check_append(format, *tokens(7, 1), PageList.of([1], [7]), device)
    check_commit(stored, PageList.of([1], [7]), format, device)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # to float16, where infinity is right
@pytest.mark.parametrize("format", FORMATS)
def test_numbers_of_all_sizes_round_as_in_the_reference(format, device):
    generator = torch.Generator().manual_seed(3)
    powers = torch.randint(-60, 60, (2, 24, 2, 1), generator=generator)
    k, v = torch.randn(2, 24, 2, 32, generator=generator) * torch.pow(2.0, powers)
    k[0] = torch.arange(64.0).view(2, 32) / 2 - 15.5  # 15.5 is the largest: halves of 4-bit and int8 steps
    v[:, 1] = (v[:, 1] * 3).frac() + torch.arange(24.0)[:, None].exp2() * 2.0**-18  # subnormal e4m3
    check_append(format, k, v, PageList.of([2, 0, 1], [8, 8, 8]), device)


@triton.jit
def convert_kernel(x, codes, halves, back, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    numbers = tl.load(x + i)
    bits = codecs.to_e4m3(numbers)
    tl.store(codes + i, bits)
    tl.store(back + i, codecs.from_e4m3(bits))
    tl.store(halves + i, codecs.round_to(numbers, tl.bfloat16))


def test_conversions_are_torchs(device):
    """Every float32 with 12 leading bits of mantissa, exactly and one bit to either side: all ties and neighbours."""
    exponents = torch.arange(127 - 20, 127 + 9).view(-1, 1, 1) << 23
    mantissas = torch.arange(1 << 12).view(1, -1, 1) << 11
    bits = (exponents + mantissas + torch.tensor([-1, 0, 1])).flatten().int()
    x = bits.view(torch.float32).clamp(max=448)
    x = torch.cat((x, -x, torch.tensor([0.0, -0.0]), torch.zeros(-2 * (len(x) + 1) % 32768)))
    codes, halves = torch.empty(len(x), dtype=torch.uint8), torch.empty(len(x), dtype=torch.bfloat16)
    codes, halves, back = (t.to(device) for t in (codes, halves, torch.empty(len(x))))
    convert_kernel[(len(x) // 32768,)](x.to(device), codes, halves, back, SIZE=32768)
    want = x.to(torch.float8_e4m3fn)
    assert torch.equal(codes.cpu(), want.view(torch.uint8))
    assert torch.equal(back.cpu().view(torch.int32), want.float().view(torch.int32))
    assert torch.equal(halves.cpu().view(torch.int16), x.bfloat16().view(torch.int16))


@pytest.mark.parametrize("target_format", FORMATS)
@pytest.mark.parametrize("source_format", FORMATS)
def test_commit_of_every_pair_of_formats(source_format, target_format, device):
    check_commit(*filled_pool(source_format, [5], 1, 8, WIDTHS), target_format, device)


@pytest.mark.parametrize("target_format", ["bf16", "int8", "int4"])
def test_commit_takes_off_the_mean(target_format, device):
    source, where = filled_pool("bf16", [8, 0, 3], 2, 8, WIDTHS)
    check_commit(source, where, target_format, device, torch.randn(2, WIDTHS[0]))


def test_commit_between_heads_and_pages_of_many_tokens(device):
    check_commit(*filled_pool("i8f8", [40, 0, 13], 2, 40, 32), "int4", device)
    check_commit(*filled_pool("int4", [40, 0, 13], 2, 40, 32), "int4", device)


def test_commit_may_copy_within_one_pool(device):
    pool, where = filled_pool("fp8", [4], 2, 8, 16)
    free = PageList.of([next(page for page in range(pool.pages) if page != int(where.ids[0]))], [4])
    got = on(device, pool)
    ops.kv_commit(got, on(device, where), got, on(device, free), backend="triton")
    ops.kv_commit(pool, where, pool, free, backend="reference")
    assert_same_bits(got, pool)


@pytest.mark.parametrize(
    "dtype, formats", [(torch.bfloat16, list(FORMATS)), (torch.float32, ["i8f8", "int4"]), (torch.float16, ["fp32"])]
)
def test_gather_reads_all_formats_in_the_order_of_the_list(dtype, formats, device):
    pools, ids = [], []
    for i, format in enumerate(formats):
        pool, where = filled_pool(format, [5], 1, 8, WIDTHS, seed=i)
        ids.append(sum(earlier.pages for earlier in pools) + int(where.ids[0]))
        pools.append(pool)
    where = PageList.of(ids[1::2] + ids[::2], [5, 2, 0, 3, 5, 4, 5, 1][: len(ids)])
    # Strided: keys and values side by side in one tensor.
    packed = torch.full((int(where.lens.sum()), 1, sum(WIDTHS)), torch.nan, dtype=dtype, device=device)
    out = packed.split(WIDTHS, dim=2)
    got = ops.kv_gather([on(device, pool) for pool in pools], on(device, where), out=out, backend="triton")
    want = ops.kv_gather(pools, where, dtype, backend="reference")
    assert torch.equal(got[0].cpu(), want[0]) and torch.equal(got[1].cpu(), want[1])


def test_empty_lists(device):
    pool, empty = on(device, filled_pool("int8", [1], 2, 8, 16)[0]), on(device, PageList.of([], []))
    k, v = ops.kv_gather([pool], empty, backend="triton")
    assert k.shape == v.shape == (0, 2, 16)
    ops.kv_append(k, v, pool, empty, backend="triton")


def test_an_entry_that_does_not_fit_is_skipped(device, monkeypatch):
    """On a GPU nobody looks at a list before the kernel does."""
    monkeypatch.setattr(reference, "spans", lambda *args, **options: [])
    k, v = (x.to(device) for x in tokens(6, 1))
    pool = on(device, KVPages.empty("fp32", 2, 1, 8, WIDTHS))
    for tensor in (pool.k, pool.v):
        tensor.fill_(7)
    # Past the pool, before it, too long, fits, past the tokens.
    where = on(device, PageList(*torch.tensor([[2, -1, 0, 1, 0], [1, 1, -5, 3, 2]], dtype=torch.int32)))
    ops.kv_append(k, v, pool, where, backend="triton")
    assert (pool.k[0] == 7).all() and (pool.v[0] == 7).all()
    assert torch.equal(pool.k[1, 0, :3], k[2:5, 0]) and not pool.v[1, 0, 3:].any()
    out = torch.full_like(k, 7), torch.full_like(v, 7)
    ops.kv_gather([pool], where, out=out, backend="triton")
    assert torch.equal(out[0][2:5], k[2:5]) and (out[0][:2] == 7).all() and (out[1][5:] == 7).all()
    before = pool.k.clone()
    monkeypatch.setattr(kv_pages, "_check_commit", lambda *args: None)
    ops.kv_commit(pool, where, pool, where._replace(lens=where.lens + 1), backend="triton")
    assert torch.equal(pool.k, before)


WRONG_NUMBERS = {
    "id": (PageList.of([2], [3]), r"where.ids\[0\] must be in \[0, 2\), got 2"),
    "len": (PageList.of([0], [9]), r"where.lens\[0\] must be in \[0, 8\], got 9"),
    "sum": (PageList.of([0], [4]), "where.lens must sum to T=3, got 4"),
    "page twice": (PageList.of([1, 1], [2, 1]), "where.ids must name each written page once, got 1 twice"),
}


@triton_mode.IN_INTERPRETER
@pytest.mark.parametrize("mistake", WRONG_NUMBERS)
def test_a_wrong_page_list_is_named_before_anything_is_written(mistake):
    where, message = WRONG_NUMBERS[mistake]
    pool = KVPages.empty("fp32", 2, 1, 8, 16)
    pool.k.fill_(7)
    x = torch.zeros(3, 1, 16)
    with pytest.raises(ValueError, match=message):
        ops.kv_append(x, x, pool, where, backend="triton")
    if "twice" not in message:
        with pytest.raises(ValueError, match=message):
            ops.kv_gather([pool], where, out=(x, x), backend="triton")
    assert (pool.k == 7).all()


@triton_mode.IN_INTERPRETER
def test_lists_of_a_commit_must_agree():
    pool = KVPages.empty("fp32", 2, 1, 8, 16)
    with pytest.raises(ValueError, match=r"target_list.lens must equal source_list.lens, got \[4\] and \[3\]"):
        ops.kv_commit(pool, PageList.of([0], [3]), pool, PageList.of([1], [4]), backend="triton")


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    pool, where = filled_pool("fp32", [3], 1, 8, 16)
    with pytest.raises(Unsupported, match="kv_gather: Triton takes cpu tensors only in its interpreter: set TRITON_"):
        ops.kv_gather([pool], where, backend="triton")


def test_every_op_has_a_kernel_and_what_is_none_is_named():
    assert all(callable(getattr(triton_kernels, op)) for op in OPS)
    with pytest.raises(Unsupported, match="kv_transpose: no Triton kernel yet"):
        implementation("kv_transpose", "triton")


def test_the_backend_says_where_it_runs():
    got = {(op, try_op(op, "triton", "cpu")) for op in OPS}
    assert {answer for _, answer in got} == {"runs, in Triton's interpreter"} or not launch.INTERPRETED


@pytest.mark.parametrize("op", OPS)
def test_parameters_are_the_references(op):
    assert inspect.signature(getattr(triton_kernels, op)) == inspect.signature(getattr(reference, op))
