"""kv_append, kv_commit, kv_gather: every backend against the reference, which is checked by itself first."""

import math

import pytest
import torch

from inferix_kernels import FORMATS, KVPages, PageList, Unsupported, kv_append, kv_commit, kv_gather
from inferix_kernels.layout import as_bytes
from inferix_kernels.reference import read_side, spans
from inferix_kernels.testing import filled_pool, mixed_pools, poisoned_pool

# (lens, H, page_size, widths of keys and values): one token, a full and a partial page, an empty one in between, odd
# sizes, an odd multiple of 16, values of another width, latent rows.
SHAPES = [
    ([1], 1, 8, 16),
    ([8, 3], 2, 8, 64),
    ([16, 0, 5], 3, 16, 48),
    ([40, 40, 39, 1], 2, 40, 128),
    ([7], 2, 7, 18),
    ([9, 16], 1, 16, (32, 16)),
]
LATENT = ([64, 30], 1, 64, (512, 64))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(source, target) for source in FORMATS for target in FORMATS]
QUANTIZED = [name for name, format in FORMATS.items() if format.quantized]


def tokens(lens, heads, head_dim, dtype=torch.float32, device="cpu", seed=1):
    generator = torch.Generator().manual_seed(seed)
    widths = (head_dim, head_dim) if isinstance(head_dim, int) else head_dim
    k, v = (torch.randn(sum(lens), heads, width, generator=generator) for width in widths)
    k[-1], v[:, 0, 0] = 0, 0  # a key and a channel of zeros: their scale must not be 0
    return k.to(device, dtype), v.to(device, dtype)


def same_bits(a: KVPages, b: KVPages) -> bool:
    bits = ({name: x.view(torch.uint8) for name, x in pages.tensors.items()} for pages in (a, b))
    a, b = bits
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def or_skip(op, *args, backend, device, **kwargs):
    """The op; a GPU kernel that is not written yet is skipped, a CPU kernel has no such excuse."""
    try:
        return op(*args, backend=backend, **kwargs)
    except Unsupported as error:
        if device == "cpu":
            raise
        pytest.skip(str(error))


def check_append(k, v, format, lens, page_size, backend, device):
    """Appended by both, the pages hold the same bits: every rounding is defined."""
    where = PageList.of(range(len(lens), 0, -1), lens, device)
    sizes = (len(lens) + 2, k.shape[1], page_size, (k.shape[2], v.shape[2]), device)
    got, want = poisoned_pool(format, *sizes), poisoned_pool(format, *sizes)
    or_skip(kv_append, k, v, got, where, backend=backend, device=device)
    kv_append(k, v, want, where, backend="reference")
    assert same_bits(got, want)
    return got, where


def check_commit(source, where, target_format, backend, device, mean=None):
    lens = where.lens.tolist()
    to = PageList.of(range(len(lens)), lens, device)
    widths = (source.head_dim, source.value_dim)
    sizes = (target_format, len(lens), source.heads, source.page_size, widths, device)
    got, want = poisoned_pool(*sizes), poisoned_pool(*sizes)
    or_skip(kv_commit, source, where, got, to, mean, backend=backend, device=device)
    kv_commit(source, where, want, to, mean, backend="reference")
    assert same_bits(got, want)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lens, heads, page_size, head_dim", SHAPES)
def test_append_stores_what_the_reference_stores(lens, heads, page_size, head_dim, dtype, format, backend, device):
    k, v = tokens(lens, heads, head_dim, dtype, device)
    check_append(k, v, format, lens, page_size, backend, device)


def test_append_reads_slices_of_a_packed_projection(backend, device):
    k, v = tokens([5], 2, 16, device=device)
    packed = torch.cat((k, v), dim=1)
    got, want = (poisoned_pool("int8", 1, 2, 8, 16, device) for _ in range(2))
    kv_append(packed[:, :2], packed[:, 2:], got, PageList.of([0], [5], device), backend=backend)
    kv_append(k, v, want, PageList.of([0], [5], device), backend="reference")
    assert same_bits(got, want)


@pytest.mark.parametrize("format", FORMATS)
def test_unused_slots_hold_zeros_after_an_append(format, backend, device):
    pool = poisoned_pool(format, 1, 2, 8, 16, device)
    where = PageList.of([0], [3], device)
    or_skip(kv_append, *tokens([3], 2, 16, device=device), pool, where, backend=backend, device=device)
    for side in pool.sides:
        codes = as_bytes(side.codes)
        unused = codes[..., 3:] if side.codec.transposed else codes[..., 3:, :]
        assert not unused.any()
        for parameters in (side.scales, side.offsets):
            assert parameters is None or parameters.isfinite().all()


@pytest.mark.parametrize("source_format, target_format", PAIRS)
@pytest.mark.parametrize("lens, heads, page_size, head_dim", [SHAPES[0], *SHAPES[2:4], SHAPES[5]])
def test_commit_stores_what_the_reference_stores(
    lens, heads, page_size, head_dim, source_format, target_format, backend, device
):
    source, where = filled_pool(source_format, lens, heads, page_size, head_dim, device)
    check_commit(source, where, target_format, backend, device)


@pytest.mark.parametrize("source_format, target_format", [pair for pair in PAIRS if pair[0] not in QUANTIZED])
@pytest.mark.parametrize("lens, heads, page_size, head_dim", SHAPES[1:3])
def test_commit_takes_the_mean_off(lens, heads, page_size, head_dim, source_format, target_format, backend, device):
    source, where = filled_pool(source_format, lens, heads, page_size, head_dim, device)
    check_commit(source, where, target_format, backend, device, torch.randn(heads, head_dim).to(device))


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4", "latent8"])
def test_latent_rows_of_two_widths(format, backend, device):
    """512 and 64 channels of multi-head latent attention, in and out of every kind of page."""
    lens, heads, page_size, widths = LATENT
    k, v = tokens(lens, heads, widths, device=device)
    pool, where = check_append(k, v, format, lens, page_size, backend, device)
    check_commit(pool, where, "latent8", backend, device)
    got, want = (kv_gather([pool], where, backend=which) for which in (backend, "reference"))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert (got[0].shape[2], got[1].shape[2]) == widths


def test_more_pages_than_one_thread_takes_at_once(backend, device, threads):
    torch.set_num_threads(2)
    lens = [8, 5] * 30
    source, where = filled_pool("fp32", lens, 3, 8, 32, device)
    check_commit(source, where, "i8f8", backend, device)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("which", ["reference", "compiled"])
def test_commit_within_a_format_copies_bits(format, which):
    lens = [8, 3]
    source, where = filled_pool(format, lens, 2, 8, 16)
    target, to = poisoned_pool(format, 2, 2, 8, 16), PageList.of([0, 1], lens)
    kv_commit(source, where, target, to, backend=which)
    for (page, start, stop), (to_page, _, _) in zip(spans("", where, source), spans("", to, target)):
        for a, b in zip(source.sides, target.sides):
            for x, y in zip(read_side(a, page, stop - start), read_side(b, to_page, stop - start)):
                assert x is y is None or torch.equal(as_bytes(x), as_bytes(y))


def test_commit_may_copy_within_one_pool(backend, device):
    pool, where = filled_pool("int8", [4], 2, 8, 16, device)
    free = next(page for page in range(pool.pages) if page != int(where.ids[0]))
    kv_commit(pool, where, pool, PageList.of([free], [4], device), backend=backend)
    a, b = (kv_gather([pool], PageList.of([page], [4], device)) for page in (int(where.ids[0]), free))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lens, heads, page_size, head_dim", SHAPES)
def test_gather_reads_all_formats_in_the_order_of_the_list(lens, heads, page_size, head_dim, dtype, backend, device):
    pools, ids, page_lens = mixed_pools(lens, heads, page_size, head_dim, FORMATS, device)
    where = PageList.of(ids, page_lens, device)
    got = or_skip(kv_gather, pools, where, dtype, backend=backend, device=device)
    want = kv_gather(pools, where, dtype, backend="reference")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("which", ["reference", "compiled"])
def test_empty_lists_are_no_error(which):
    pool, _ = filled_pool("int4", [1], 2, 8, 16)
    none, empty = PageList.of([], []), torch.empty(0, 2, 16)
    k, v = kv_gather([pool], none, backend=which)
    assert k.shape == v.shape == (0, 2, 16)
    before = pool.map(torch.clone)
    kv_append(empty, empty, pool, none, backend=which)
    kv_commit(pool, none, pool, none, backend=which)
    assert same_bits(pool, before)


# Largest error as a share of the largest |x| that shares the scale; half a step. Those of e4m3 are 2^-4 of the number
# itself down to 2^-6 of 448.
BOUNDS = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 0.5 / 127, "i8f8": 2.0**-4, "fp8": 2.0**-4}


@pytest.mark.parametrize("format", BOUNDS)
def test_a_round_trip_loses_what_the_format_says(format):
    """The specification by itself."""
    k, v = tokens([8, 5], 2, 32)
    pool, where = KVPages.empty(format, 2, 2, 8, 32), PageList.of([1, 0], [8, 5])
    kv_append(k, v, pool, where, backend="reference")
    got_k, got_v = kv_gather([pool], where, backend="reference")
    exact = not FORMATS[format].quantized  # the error is a share of the number itself
    key_peaks = k.abs() if exact else k.abs().amax(-1, keepdim=True)
    pages = v.split([8, 5])
    value_peaks = v.abs() if exact else torch.cat([x.abs().amax(0, keepdim=True).expand_as(x) for x in pages])
    slack = 1 + 1e-5  # the scale itself is rounded
    assert ((got_k - k).abs() <= BOUNDS[format] * key_peaks * slack + 1e-7 * exact + 1e-12).all()
    assert ((got_v - v).abs() <= BOUNDS[format] * value_peaks * slack + 1e-7 * exact + 1e-12).all()


def test_a_round_trip_through_four_bits_loses_half_a_step():
    """Half of a fifteenth of the range, a little more where float16 rounds the scale or the offset."""
    k, v = tokens([8, 5], 2, 32)
    pool, where = KVPages.empty("int4", 2, 2, 8, 32), PageList.of([1, 0], [8, 5])
    kv_append(k, v, pool, where, backend="reference")
    got_k, got_v = kv_gather([pool], where, backend="reference")
    key_range = torch.cat([(x.amax(0) - x.amin(0)).expand_as(x) for x in k.split([8, 5])])
    value_range = v.amax(-1, keepdim=True) - v.amin(-1, keepdim=True)
    for error, size in (((got_k - k).abs(), key_range), ((got_v - v).abs(), value_range)):
        assert (error <= size / 30 * (1 + 2e-3) + 4 * 2.0**-11).all()


def test_halves_round_to_even(backend, device):
    k = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5], device=device).view(1, 1, 8)
    pool = KVPages.empty("int8", 1, 1, 8, 8, device)
    kv_append(k, k, pool, PageList.of([0], [1], device), backend=backend)
    assert pool.k[0, 0, 0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


def test_four_bits_lie_two_to_a_byte_and_round_to_even(backend, device):
    v = torch.tensor([0.0, 15, 0.5, 1.5, 2.5, 14.5, 7, 8], device=device).view(1, 1, 8)
    pool = KVPages.empty("int4", 1, 1, 8, 8, device)
    or_skip(kv_append, v, v, pool, PageList.of([0], [1], device), backend=backend, device=device)
    assert pool.v[0, 0, 0].tolist() == [0 | 15 << 4, 0 | 2 << 4, 2 | 14 << 4, 7 | 8 << 4]
    assert (pool.v_scales[0, 0, 0], pool.v_offsets[0, 0, 0]) == (1, 0)


@pytest.mark.parametrize("format", ["fp8", "i8f8"])
def test_all_codes_of_8_bit_floats_are_read_as_torch_reads_them(format, backend, device):
    """256 codes, NaN among them, as values [D, page_size] and, by token, as keys."""
    pool = poisoned_pool(format, 1, 2, 8, 16, device)
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    as_bytes(pool.v).view(-1)[:] = codes
    as_bytes(pool.k).view(-1)[:] = codes if format == "fp8" else 0
    pool.k_scales.fill_(0.75)
    pool.v_scales.fill_(3.0)
    where = PageList.of([0], [8], device)
    k, v = or_skip(kv_gather, [pool], where, backend=backend, device=device)
    floats = codes.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(v, floats.view(2, 16, 8).permute(2, 0, 1) * 3, rtol=0, atol=0, equal_nan=True)
    if format == "fp8":
        torch.testing.assert_close(k, floats.view(2, 8, 16).transpose(0, 1) * 0.75, rtol=0, atol=0, equal_nan=True)


def awkward_floats() -> torch.Tensor:
    """Every finite 8-bit float, the middle between each two, and the float32 on either side of all of them."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    exact = torch.cat((codes, (codes[1:] + codes[:-1]) / 2))
    close = torch.cat((exact, exact.nextafter(torch.tensor(0.0)), exact.nextafter(torch.tensor(448.0))))
    tiny = torch.tensor([2.0**-149, 2.0**-126, 1e-30, 2.0**-10, 447.99997])
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(3000, generator=generator) * 2.0 ** torch.randint(-14, 9, (3000,), generator=generator)
    positive = torch.cat((close, tiny, random.clamp(max=448)))
    return torch.cat((positive, -positive))


def test_every_8_bit_float_is_rounded_as_torch_rounds(backend, device):
    """With a 448 in its row the scale is 1: ties, the subnormal range and the largest go as a cast goes."""
    x = awkward_floats()
    x = torch.cat((x, x.new_zeros(-len(x) % 31))).view(-1, 1, 31)
    x = torch.cat((x, torch.full_like(x[..., :1], 448.0)), dim=-1).to(device)  # [T, 1, 32]
    pool, _ = check_append(x, x, "fp8", [len(x)], len(x), backend, device)
    assert (pool.k_scales[1] == 1).all()
    want = x[:, 0].cpu().to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(as_bytes(pool.k)[1, 0].cpu(), want)
    # As values the tokens are the channels: one of them is 448.
    x = x[:, 0].T.unsqueeze(1).contiguous()  # [32, 1, T]
    pool, _ = check_append(x, x, "i8f8", [32], 32, backend, device)
    assert torch.equal(as_bytes(pool.v)[1, 0].cpu(), want)


def hard_quotients(top: int, halves: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, largest): x / scale, with scale = largest / top, is all but the middle between two floats of which one is
    itself the middle between two codes. Which one a division rounds to decides on the code.

    halves: the middles between codes, times 2^10. With h one of them, the middle between it and its neighbour has 25
    bits, M = h * 2^e +- 1. x / scale is closest to it where x = T * 2^j and scale = S, of 24 bits, solve
    T * 2^j - M * S = N for a small N: S = -N / M modulo 2^j.
    """
    found = []
    for half in halves:
        exponent = half.bit_length() - 11  # of half / 2^10
        above, below = (half << 14 - exponent) + 1, (half << 14 - exponent) - 1
        if half & half - 1 == 0:  # below a power of two floats lie twice as close
            below = (half << 15 - exponent) - 1
        for middle in (above, below):
            unit = exponent - 24 - (middle.bit_length() > 25 or (middle == below and half & half - 1 == 0))
            for j in range(22, 27):
                inverse = pow(middle, -1, 1 << j)
                for n in (-6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6):
                    for s in range(-n * inverse % (1 << j), 1 << 24, 1 << j):
                        t = middle * s + n >> j
                        if s >= 1 << 23 <= t < 1 << 24:
                            found.append((math.ldexp(t, j + unit), s))
    x, scale = torch.tensor(found, dtype=torch.float64).float().unbind(1)
    largest = scale * top
    for candidate in (largest.nextafter(scale), largest.nextafter(scale * 1e6)):
        largest = torch.where(largest / top == scale, largest, candidate)
    reached = (largest / top == scale) & (x <= largest)
    return x[reached], largest[reached]


INT8_HALVES = [(2 * code + 1) << 9 for code in range(127)]
E4M3_HALVES = [2 * code + 1 for code in range(8)] + [(2 * m + 1) << e for e in range(15) for m in range(8, 16)][:-2]


@pytest.mark.parametrize("format, top, halves", [("int8", 127, INT8_HALVES), ("fp8", 448, E4M3_HALVES)])
def test_quotients_next_to_a_tie_are_rounded_as_by_division(format, top, halves, backend, device):
    x, largest = hard_quotients(top, halves)
    assert len(x) > 500
    rows = torch.stack((x, largest, -x, largest), dim=1).unsqueeze(1).to(device)  # [T, 1, 4]: as keys
    check_append(rows, rows, format, [len(rows)], len(rows), backend, device)
    columns = torch.stack((x, -largest)).unsqueeze(1).to(device)  # [2, 1, T]: as values
    check_append(columns, columns, format, [2], 8, backend, device)


@pytest.mark.parametrize("format", QUANTIZED)
def test_numbers_of_every_size_are_stored_as_the_reference_stores_them(format, backend, device):
    """Far off zero, huge, tiny, beyond float16, below the least scale, one above all others, both zeros."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(16, 1, 16, generator=generator)
    rows = [noise, 1000.3 + 0.01 * noise, 3e30 * noise, 1e-20 * noise, 1e5 * noise, -2e5 + noise, noise * 0, -noise * 0]
    rows += [noise * torch.tensor([1e4] + [1e-3] * 15), noise.abs(), -noise.abs(), noise.sign() * noise.abs().exp2()]
    rows += [-1e-9 + 0 * noise, torch.where(noise > 0, 0.0, -0.0), noise.round(), (noise * 4).round() / 8]
    for x in rows:
        for k in (x.to(device), x.transpose(0, 2).contiguous().to(device)):
            check_append(k, k, format, [16], 16, backend, device)


def test_nan_and_infinity_survive_float_pages(backend, device):
    k = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38], device=device).view(1, 1, 4)
    for format, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        pool = KVPages.empty(format, 1, 1, 8, 4, device)
        kv_append(k, k, pool, PageList.of([0], [1], device), backend=backend)
        assert pool.k[0, 0, 0, 0].isnan()
        assert pool.k[0, 0, 0, 1:].tolist() == k[0, 0, 1:].to(dtype).tolist()


def test_every_float16_goes_through_every_float_page(backend, device):
    """Subnormal numbers included, which the CPU kernels convert by hand; and every float32 in their neighbourhood."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).short()
    halves = bits.view(torch.float16)
    halves = halves[halves.isfinite()].view(-1, 1, 496)
    pool, where = check_append(halves.to(device), halves.to(device), "fp16", [len(halves)], 128, backend, device)
    assert torch.equal(kv_gather([pool], where, torch.float16, backend=backend)[0].cpu(), halves)
    middles = (halves.float() + halves.float().roll(1, -1)) / 2
    for x in (middles, middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(torch.inf))):
        check_append(x.to(device), x.to(device), "fp16", [len(x)], 128, backend, device)
        check_append(x.to(device), x.to(device), "bf16", [len(x)], 128, backend, device)


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_the_number_of_threads_changes_no_bit(format, threads):
    k, v = tokens([8, 8, 3], 3, 32)
    stored = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        pool = poisoned_pool(format, 3, 3, 8, 32)
        kv_append(k, v, pool, PageList.of([2, 0, 1], [8, 8, 3]), backend="compiled")
        stored.append(pool)
    assert same_bits(stored[0], stored[1]) and same_bits(stored[0], stored[2])
