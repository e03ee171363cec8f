"""Windows, softcap and pages read from a slot on, against the definition in float64, on every backend."""

import math
import random

import pytest
import torch

from inferix_kernels import KVPages, PageList, kv_append, kv_gather, make_plan, paged_attention
from inferix_kernels.plans import Segment
from tests.triton_kernels import triton_mode  # noqa: F401

PAGES = 6
WINDOWS = {"causal": (-1, 0), "sliding": (5, 0), "both sides": (3, 2), "the future": (0, -1), "all": (-1, -1)}
# Of values near 1: what rounding queries and weights to the precision of the pages may add.
BOUNDS = {"fp32": 3e-6, "bf16": 2e-2, "int8": 2e-2, "int4": 2e-2}


def filled(format, heads=2, page_size=24, head_dim=32):
    generator = torch.Generator().manual_seed(3)
    pool = KVPages.empty(format, PAGES, heads, page_size, head_dim)
    k, v = (torch.randn(PAGES * page_size, heads, head_dim, generator=generator) for _ in "kv")
    kv_append(k, v, pool, PageList.of(range(PAGES), [page_size] * PAGES))
    return pool


def tokens_of(pool, segment):
    """[L, H, D] keys and values in the list's order, and the bias of each token, in float64."""
    k, v = kv_gather([pool], PageList.of(range(PAGES), [pool.page_size] * PAGES), backend="reference")
    starts = segment.starts or [0] * len(segment.ids)
    rows = [
        page * pool.page_size + start + slot
        for page, start, length in zip(segment.ids, starts, segment.lens, strict=True)
        for slot in range(length)
    ]
    biases = segment.bias or [0.0] * len(segment.ids)
    bias = [b for b, length in zip(biases, segment.lens, strict=True) for _ in range(length)]
    return k[rows].double(), v[rows].double(), torch.tensor(bias, dtype=torch.float64)


def defined(q, pool, segments, softcap=0.0, alibi_slopes=None):
    """(out, lse) from the words of make_plan's docstring: the last query stands at the last token of its list."""
    outs, lses, first = [], [], 0
    for s, segment in enumerate(segments):
        k, v, bias = tokens_of(pool, segment)
        rows = q[first : first + segment.queries].double()
        first += segment.queries
        group = q.shape[1] // pool.heads
        k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        scores = rows.transpose(0, 1) @ k.mT * q.shape[2] ** -0.5
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        left, right = (math.inf if side == -1 else side for side in segment.window or (-1, -1))
        place = torch.arange(segment.queries)[:, None] + k.shape[1] - segment.queries
        distance = torch.arange(k.shape[1]) - place
        if alibi_slopes is not None:
            slopes = alibi_slopes if alibi_slopes.ndim == 1 else alibi_slopes[s]
            scores = scores - slopes.double()[:, None, None] * distance.abs()
        scores = (scores + bias).masked_fill((distance < -left) | (distance > right), -torch.inf)
        outs.append((scores.softmax(-1).nan_to_num(0.0) @ v).transpose(0, 1))
        lses.append(scores.logsumexp(-1).T)
    return torch.cat(outs), torch.cat(lses)


def check(q, pool, segments, where, bound, **options):
    out, lse = paged_attention(q, [pool], make_plan(segments), backend=where, **options)
    want, want_lse = defined(q, pool, segments, options.get("softcap", 0.0), options.get("alibi_slopes"))
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    assert (out[want_lse == -torch.inf] == 0).all()
    torch.testing.assert_close(out.double(), want, rtol=0, atol=bound)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=bound)


@pytest.mark.parametrize("format", BOUNDS)
def test_a_window_is_aligned_with_the_last_token(format, where):
    """More queries than keys, fewer, as many; a list that is empty; a segment without a window beside them."""
    shapes = [(30, [3, 1], [7, 20]), (9, [0, 2, 5], [24, 24, 11]), (20, [4], [20]), (3, [], [])]
    segments = [Segment(*shape, window=window) for window in WINDOWS.values() for shape in shapes]
    if where == "triton":  # whose interpreter takes its time for a tile: each shape once, with a window of its own
        segments = [Segment(*shape, window=window) for shape, window in zip(shapes, WINDOWS.values())]
    segments.append(Segment(5, [2, 3], [24, 24]))
    q = torch.randn(sum(s.queries for s in segments), 4, 32, generator=torch.Generator().manual_seed(0))
    check(q, filled(format), segments, where, BOUNDS[format])


@pytest.mark.parametrize("softcap", [1.0, 30.0, 1e6])
def test_softcap_comes_before_a_pages_bias(softcap, where):
    q = 4 * torch.randn(12, 2, 32, generator=torch.Generator().manual_seed(1))
    segments = [
        Segment(7, [0, 1], [24, 9], [0.0, 3.0], window=(-1, 0)),
        Segment(5, [2], [13], [-5.0], window=(-1, 0)),
    ]
    check(q, filled("fp32"), segments, where, 3e-6 + 4e-7 * min(softcap, 30.0), softcap=softcap)


@pytest.mark.parametrize("format", ["fp32", "int8"])
@pytest.mark.parametrize("shape", [(4,), (2, 4)], ids=["of a head", "of a segment's head"])
def test_alibi_takes_off_the_distance(shape, format, where):
    """In both directions, by a slope for each query head."""
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(20, 4, 32, generator=generator)
    segments = [
        Segment(13, [0, 1], [24, 9], [0.0, 3.0], window=(-1, -1)),
        Segment(7, [2], [13], [0.0], window=(-1, 0)),
    ]
    slopes = torch.rand(shape, generator=generator)
    check(q, filled(format), segments, where, 4 * BOUNDS[format] / 3, softcap=5.0, alibi_slopes=slopes)


def test_alibi_needs_positions():
    q, pool = torch.zeros(1, 2, 32), filled("fp32")
    with pytest.raises(ValueError, match=r"plan.page_positions must be given with alibi_slopes"):
        paged_attention(q, [pool], make_plan([(1, [0], [1])]), alibi_slopes=torch.ones(2))
    plan = make_plan([Segment(1, [0], [1], window=(-1, -1))])
    with pytest.raises(ValueError, match=r"alibi_slopes must be \[S=1, Hq=2\], got \[2, 2\]"):
        paged_attention(q, [pool], plan, alibi_slopes=torch.ones(2, 2))
    with pytest.raises(TypeError, match="alibi_slopes must be float32, got float64"):
        paged_attention(q, [pool], plan, alibi_slopes=torch.ones(2, dtype=torch.float64))


def test_softcap_bounds_what_would_be_infinite(where):
    pool = filled("fp32")
    q = torch.full((3, 2, 32), 1e30)
    out, lse = paged_attention(q, [pool], make_plan([(3, [0], [24])]), softcap=20.0, backend=where)
    assert out.isfinite().all() and (lse.abs() <= 20 + math.log(24) + 1e-4).all()


@pytest.mark.parametrize("format", ["fp32", "int8", "i8f8", "int4"])
def test_pages_are_read_from_a_slot_on(format, where):
    """And nothing before it: there lies NaN."""
    pool = filled(format)
    whole = [Segment(6, [1, 0, 2], [5, 9, 3], None, None, [4, 15, 0], (7, 0))]
    q = torch.randn(6, 4, 32, generator=torch.Generator().manual_seed(2))
    check(q, pool, whole, where, 2e-2 if format != "fp32" else 3e-6)
    if format == "fp32":
        pool.k[1, :, :4] = pool.v[1, :, :4] = pool.k[0, :, :15] = pool.v[0, :, :15] = torch.nan
        out, _ = paged_attention(q, [pool], make_plan(whole), backend=where)
        assert out.isfinite().all()


def test_many_small_plans_as_they_come(where):
    random_ = random.Random(5)
    pool = filled("fp32", page_size=9)
    for _ in range(2 if where == "triton" else 60):
        segments = []
        for _ in range(random_.choice([1, 2, 3])):
            n = random_.randint(0, 4)
            lens = [random_.randint(0, 9) for _ in range(n)]
            window = random_.choice([None, *WINDOWS.values(), (0, 0), (2, 30)])
            segments.append(
                Segment(
                    random_.choice([1, 3, 17]),
                    [random_.randrange(PAGES) for _ in range(n)],
                    lens,
                    [random_.choice([0.0, -1.0, 2.0]) for _ in range(n)],
                    None,
                    [random_.randint(0, 9 - length) for length in lens],
                    window,
                )
            )
        q = torch.randn(sum(segment.queries for segment in segments), 6, 32)
        check(q, pool, segments, where, 3e-6, softcap=random_.choice([0.0, 5.0]))


def test_a_window_that_hides_all_leaves_what_is_accumulated(where):
    pool, q = filled("fp32"), torch.randn(4, 2, 32)
    first = make_plan([(4, [0], [24])])
    out, lse = paged_attention(q, [pool], first, backend=where)
    want = out.clone(), lse.clone()
    hidden = make_plan([Segment(4, [1], [2], window=(0, 0))])  # of four queries two stand before the first key
    paged_attention(q, [pool], hidden, out=out, lse=lse, accumulate=True, backend=where)
    assert torch.equal(out[:2], want[0][:2]) and torch.equal(lse[:2], want[1][:2])
    assert not torch.equal(out[2:], want[0][2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": None}, "plan.windows and plan.page_positions must be given together"),
        ({"windows": torch.zeros(2, 2, dtype=torch.int32)}, r"plan.windows must be \[S=1, 2\], got \[2, 2\]"),
        ({"page_positions": torch.zeros(1, dtype=torch.int32)}, r"plan.page_positions must be \[N=2\], got \[1\]"),
        (
            {"page_starts": torch.tensor([0, 16], dtype=torch.int32)},
            r"plan.page_starts\[1\] must be in \[0, 15\], got 16",
        ),
    ],
)
def test_a_mistake_is_named(change, message, where):
    plan = make_plan([Segment(3, [0, 1], [24, 9], window=(-1, 0))])._replace(**change)
    with pytest.raises(ValueError, match=message):
        paged_attention(torch.zeros(3, 2, 32), [filled("fp32")], plan, backend=where)


@pytest.mark.parametrize("softcap", [-1.0, math.inf, math.nan])
def test_softcap_must_be_a_bound(softcap):
    with pytest.raises(ValueError, match="softcap must be 0, for none, or a positive number"):
        paged_attention(torch.zeros(1, 2, 32), [filled("fp32")], make_plan([(1, [0], [1])]), softcap=softcap)


@pytest.mark.parametrize("window", [(-2, 0), (4,), (0, 3, 1), 12, (2.5, 0), (True, 0), (0, 2**40)])
def test_a_window_is_two_whole_numbers(window):
    with pytest.raises(ValueError, match=r"segments\[1\]: window must be \(left, right\) in tokens, or -1, got "):
        make_plan([Segment(1, [0], [1]), Segment(1, [0], [1], window=window)])


def test_segments_of_one_plan_fit_together():
    with pytest.raises(ValueError, match=r"window must be \(-1, 0\) in all lists of one segment, got None"):
        make_plan([Segment(1, [0], [1], window=(-1, 0)), Segment(1, [0], [1])], lists_per_segment=2)
    with pytest.raises(ValueError, match=r"segments\[1\]: starts must be given for all segments or for none"):
        make_plan([Segment(1, [0], [1], starts=[0]), Segment(1, [0], [1])])
    for segments in (Segment(1, [0], [1]), (1, [0], [1]), [{"queries": 1}], {"queries": 1}):
        with pytest.raises(ValueError, match="segments must be a list of Segments, or of tuples of their fields, got"):
            make_plan(segments)
    with pytest.raises(ValueError, match="starts must be as many as ids, got 1 and 2"):
        PageList.of([0, 1], [1, 1], starts=[0])
