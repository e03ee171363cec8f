"""Plans whose pages are on their way: begun with what is there, the same bits whatever comes first, a deadline."""

import pickle
import random
import threading
import time

import pytest
import torch

from inferix_kernels import (
    Counters,
    KVPages,
    NotArrived,
    Segment,
    Unsupported,
    compiled,
    latent_attention,
    make_plan,
    paged_attention,
)
from inferix_kernels.layout import KV_FORMATS, as_bytes
from inferix_kernels.testing import mixed_pools
from tests.triton_kernels import triton_mode  # noqa: F401

LONG = 60.0  # seconds: far more than any test takes
WAIT = ("compiled", "reference")
LENS = [16] * 7 + [9]


class Coming:
    """Pages of which each belongs to one of `hops` deliveries. Delivery 0 is there; the pages of the others hold NaN
    until `deliver` writes them, in the thread that calls it, and raises their counter."""

    def __init__(self, formats=("fp32",), hops=4, head_dim=32):
        self.pools, self.ids, self.lens = mixed_pools(LENS, 2, 16, head_dim, formats, "cpu", seed=1)
        self.kept = [pool.map(torch.clone) for pool in self.pools]
        self.hop_of = {page: i * hops // len(self.ids) for i, page in enumerate(sorted(self.ids))}
        self.counters = Counters(hops)
        self.dtype = torch.float32 if formats == ("fp32",) else torch.bfloat16
        self.take_back(*range(1, hops))

    def take_back(self, *hops):
        self.counters.reset()
        for page, tensor, _ in self.tensors(*hops):
            # Not every format has a code that is NaN; its scales are.
            tensor[page] = torch.nan if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16) else 127

    def deliver(self, *hops):
        for hop in hops:
            for page, tensor, kept in self.tensors(hop):
                tensor[page] = kept[page]
            self.counters.raise_to(hop, 1)

    def tensors(self, *hops):
        """(page, tensor, what it held at first) of all tensors of the pages of these deliveries."""
        for page in (page for page in self.ids if self.hop_of[page] in hops):
            pool = 0
            while page >= self.pools[pool].pages:
                page, pool = page - self.pools[pool].pages, pool + 1
            for tensor, kept in zip(self.pools[pool][1:], self.kept[pool][1:], strict=True):
                if tensor is not None:
                    yield page, as_bytes(tensor), as_bytes(kept)

    def segment(self, queries, order):
        """Of entries of this order; arrivals as the deliveries say."""
        ids, lens = ([x[i] for i in order] for x in (self.ids, self.lens))
        return Segment(queries, ids, lens, arrivals=[(h, 1) if (h := self.hop_of[page]) else (-1, 0) for page in ids])

    def plan(self, *segments, **options):
        return make_plan(segments, **options)._replace(counters=self.counters.values)

    def shuffled(self, *queries, lists=1):
        """A plan of segments that read all pages, each list in an order of its own."""
        rng = random.Random(2)
        orders = [(n, rng.sample(range(len(self.ids)), len(self.ids))) for n in queries for _ in range(lists)]
        return self.plan(*(self.segment(n, order) for n, order in orders), lists_per_segment=lists)


def room(plan, head_dim=32):
    T = int(plan.q_indptr[-1])
    return {"out": torch.full((T, 4, head_dim), torch.nan), "lse": torch.full((T, 4), torch.nan)}


def attend(coming, plan, backend="compiled", pools=None, **options):
    head_dim = coming.pools[0].head_dim
    options = {"deadline": LONG, **room(plan, head_dim), **options}
    q = torch.randn(len(options["out"]), 4, head_dim, generator=torch.Generator().manual_seed(3)).to(coming.dtype)
    return paged_attention(q, pools or coming.pools, plan, backend=backend, **options)


def without(plan):
    return plan._replace(arrivals=None, counters=None)


def expected(coming, plan, backend="compiled", **options):
    return attend(coming, without(plan), backend, coming.kept, **options)


def same(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert got[0].isfinite().all()


def beside(function, *arguments):
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def written(rows):
    """Waits until attention has written these rows of out, in which NaN was."""
    while rows.isnan().any():
        time.sleep(0)


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", WAIT)
@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
@pytest.mark.parametrize("formats", [("fp32",), ("bf16", "int8"), ("int4", "fp8")], ids="+".join)
def test_what_comes_first_changes_no_bit(formats, order, backend, threads):
    """A thread delivers while attention waits; with all there before the call, and without arrivals, it is the same."""
    coming = Coming(formats)
    plan = coming.shuffled(20, 5)
    thread = beside(coming.deliver, *order)
    got = attend(coming, plan, backend)
    thread.join()
    same(got, attend(coming, plan, backend))
    same(got, expected(coming, plan, backend))


ISAS = [name for name, isa in compiled.Isa.__members__.items() if isa <= compiled._C.best_isa()]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", sorted(KV_FORMATS))
def test_a_task_that_was_stopped_gives_the_same_bits(format, isa, one_thread, monkeypatch):
    """Stopped before each page in turn. The second segment, whose pages are all there, is begun when the first one has
    stopped: the page comes when it is done."""
    monkeypatch.setattr(compiled, "ISA", compiled.Isa.__members__[isa])
    coming = Coming((format,), hops=len(LENS), head_dim=64)
    order = random.Random(4).sample(range(len(LENS)), len(LENS))
    there = coming.ids.index(min(coming.ids))  # of delivery 0
    plan = coming.plan(coming.segment(40, order), coming.segment(1, [there]))
    want = expected(coming, plan)
    for hop in range(1, len(LENS)):
        coming.take_back(hop)
        coming.deliver(*(other for other in range(1, len(LENS)) if other != hop))
        given = room(plan, 64)
        thread = beside(lambda hop=hop, row=given["out"][-1]: (written(row), coming.deliver(hop)))
        same(attend(coming, plan, **given), want)
        thread.join()


@pytest.mark.parametrize("backend", WAIT)
def test_lists_of_each_head(backend, threads):
    coming = Coming()
    plan = coming.shuffled(6, 0, 3, lists=2)
    thread = beside(coming.deliver, 3, 2, 1)
    got = attend(coming, plan, backend)
    thread.join()
    same(got, expected(coming, plan, backend))


@pytest.mark.parametrize("backend", WAIT)
def test_it_merges_into_what_is_there(backend):
    coming = Coming()
    plan = coming.shuffled(7)
    one, other = ({"out": torch.ones(7, 4, 32), "lse": torch.zeros(7, 4)} for _ in "ab")
    thread = beside(coming.deliver, 3, 1, 2)
    got = attend(coming, plan, backend, accumulate=True, **one)
    thread.join()
    same(got, expected(coming, plan, backend, accumulate=True, **other))


@pytest.mark.parametrize("backend", WAIT)
def test_what_does_not_come_is_named(backend, threads):
    """The pages that are missing then, each once, and none that only a segment without queries reads."""
    coming = Coming()
    coming.deliver(2)
    missing = sorted(page for page in coming.ids if coming.hop_of[page] in (1, 3))
    plan = coming.shuffled(3, 2)
    for call in "first", "again":
        with pytest.raises(NotArrived, match=r"did not come within 0\.01 s") as caught:
            attend(coming, plan, backend, deadline=0.01)
        assert caught.value.pages == missing, call
    assert isinstance(caught.value, TimeoutError)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.pages, copy.deadline) == (str(caught.value), missing, caught.value.deadline)
    there = coming.ids.index(min(coming.ids))
    unread = coming.plan(coming.segment(0, range(8)), coming.segment(2, [there]))
    same(attend(coming, unread, backend, deadline=0.0), expected(coming, unread, backend))
    coming.deliver(1, 3)
    same(attend(coming, plan, backend, deadline=0.0), expected(coming, plan, backend))


def test_a_segment_that_waits_holds_up_no_other(one_thread):
    """The page that the first segment waits for comes when the last one, behind it, is done; and so on."""
    coming = Coming(hops=len(LENS))
    at = [coming.ids.index(page) for page in sorted(coming.ids)]  # entry i is of delivery i
    plan = coming.plan(coming.segment(4, [at[0], at[2]]), coming.segment(4, [at[1]]), coming.segment(4, [at[0]]))
    given = room(plan)

    def deliver():
        written(given["out"][8:])
        coming.deliver(1)
        written(given["out"][4:8])
        coming.deliver(2)

    thread = beside(deliver)
    same(attend(coming, plan, **given), expected(coming, plan))
    thread.join()


def test_a_counter_never_falls():
    counters = Counters(3)
    for value in (2, 5, 3, -1):
        counters.raise_to(1, value)
    assert counters.values.tolist() == [0, 5, 0] and len(counters) == 3
    threads = [beside(lambda n=n: [counters.raise_to(2, n * i) for i in range(200)]) for n in range(4)]
    for thread in threads:
        thread.join()
    assert counters.values.tolist() == [0, 5, 3 * 199]
    counters.reset()
    assert counters.values.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Counters(-1), "count must be at least 0, got -1"),
        (lambda: Counters(2).raise_to(2, 1), "index must be from 0 to 1, got 2"),
        (lambda: Counters(2).raise_to(0, 2**31), "value must be a number of 32 bits, got 2147483648"),
        (lambda: Counters(2).raise_to(0, 0.5), "value must be a whole number, got 0.5"),
        (lambda: make_plan([Segment(1, [0], [1], arrivals=[(0, 1), (0, 1)])]), "arrivals must be 1 numbers, got 2"),
        (
            lambda: make_plan([Segment(1, [0], [1], arrivals=[3])]),
            r"arrivals must be pairs \(counter, value\), got \[3\]",
        ),
        (lambda: make_plan([Segment(1, [0], [1], arrivals=[(0, 1)]), (1, [0], [1])]), "for all segments or for none"),
    ],
)
def test_bad_counters_and_segments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


NUMBERS = torch.zeros(1, 2, dtype=torch.int32)
TOGETHER = r"plan\.arrivals and plan\.counters must be given together"
PLANS = {
    "past the counters": ({"arrivals": NUMBERS + 3}, r"plan\.arrivals\[0\] must name one of 3 counters, or -1, got 3"),
    "below -1": ({"arrivals": NUMBERS - 2}, r"plan\.arrivals\[0\] must name one of 3 counters, or -1, got -2"),
    "no counters": ({"counters": None}, TOGETHER),
    "no arrivals": ({"arrivals": None}, TOGETHER),
    "of another length": ({"arrivals": NUMBERS.expand(2, 2)}, r"plan\.arrivals must be \[N=1, 2\], got \[2, 2\]"),
    "without values": ({"arrivals": NUMBERS[:, 0]}, r"plan\.arrivals must be \[N=1, 2\], got \[1\]"),
    "int64": ({"arrivals": NUMBERS.long()}, r"plan\.arrivals must be int32, got int64"),
    "int64 counters": ({"counters": torch.zeros(3).long()}, r"plan\.counters must be int32, got int64"),
    "elsewhere": ({"counters": torch.zeros(3, dtype=torch.int32, device="meta")}, r"plan\.counters must be on cpu"),
}


@pytest.mark.parametrize("backend", WAIT)
@pytest.mark.parametrize("wrong", PLANS)
def test_bad_arrivals_are_refused(wrong, backend):
    """Before anything is read or written, and without a wait."""
    changed, message = PLANS[wrong]
    pool, counters = KVPages.empty("fp32", 1, 1, 16, 16), Counters(3)
    plan = make_plan([Segment(2, [0], [3], arrivals=[(1, 1)])])._replace(counters=counters.values)
    out = torch.full((2, 1, 16), 7.0)
    with pytest.raises((TypeError, ValueError), match=message):
        paged_attention(
            torch.zeros(2, 1, 16), [pool], plan._replace(**changed), out=out, backend=backend, deadline=LONG
        )
    assert (out == 7).all()


@pytest.mark.parametrize("deadline", [-1.0, float("nan"), float("inf"), None, "1"])
def test_a_deadline_is_a_number_of_seconds(deadline):
    pool, plan = KVPages.empty("fp32", 1, 1, 16, 16), make_plan([(2, [0], [3])])
    with pytest.raises(ValueError, match="deadline must be a number of seconds, got"):
        paged_attention(torch.zeros(2, 1, 16), [pool], plan, deadline=deadline)


def test_who_does_not_wait_says_so():
    coming = Coming()
    plan = coming.shuffled(2)
    with pytest.raises(Unsupported, match=r"Triton waits for no pages: plan\.arrivals must be None.*accumulate=True"):
        attend(coming, plan, "triton")
    with pytest.raises(Unsupported, match=r"flash-attn waits for no pages: plan\.arrivals must be None"):
        attend(coming, plan, "flash-attn")
    pool = KVPages.empty("latent8", 8, 1, 16, (32, 16))
    with pytest.raises(ValueError, match=r"plan\.arrivals must be None for latent_attention"):
        latent_attention(torch.zeros(2, 4, 48), [pool], plan, scale=1.0)
