"""What is refused, by name, before anything is sent; what a pass asks of a schedule, and in which order."""

import pytest
import torch

from inferix_kernels import KVPages, NotResident, PageList, Policy, TopK
from inferix_kernels.distributed import Gather, PassQ, Ring, in_process_group, run_ranks, shard_for
from inferix_kernels.distributed.agreement import Facts, compare
from inferix_kernels.store import Shard
from inferix_kernels.store.attention import Sharded
from tests.distributed.lazy import lazy
from tests.distributed.worlds import Story, store_of, tell

STORY = Story("int8", layers=1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 2, "ranks": 2}, r"shard.rank must be from 0 to 1, got 2"),
        ({"rank": 1, "ranks": 4, "heads": 3}, r"shard.heads must divide the 4 ranks, got 3 on rank 1"),
        ({"rank": 1, "ranks": 4, "frames": 3}, r"shard.frames must be 1 or 4, the groups of ranks, got 3 on rank 1"),
        ({"ranks": 0}, r"shard.ranks must be at least 1, got 0"),
    ],
)
def test_a_shard_that_can_not_be(options, message):
    with pytest.raises(ValueError, match=message):
        Shard(**options)


def test_heads_and_frames_that_can_not_be_cut():
    with pytest.raises(ValueError, match=r"heads must be a multiple of shard.heads=3, got 4 on rank 2"):
        store_of(STORY, Shard(2, 3, heads=3))
    with pytest.raises(ValueError, match=r"pools\['int8'\] must be a frame for each of shard.frames=3 .*2 on rank 1"):
        store_of(STORY, Shard(1, 3, frames=3), pools={"int8": 2})
    for schedule in ("usp", None):
        said = f"schedule must be one of ulysses, gather, ring, pass-q, got {schedule!r}"
        with pytest.raises(ValueError, match=said):
            shard_for(schedule, 0, 2, 4)


def test_heads_that_do_not_divide_are_cut_into_groups():
    assert shard_for("ulysses", 3, 8, heads=12) == Shard(3, 8, heads=4)
    assert shard_for("ulysses", 3, 8, heads=5) == Shard(3, 8)
    assert shard_for("ring", 3, 8, heads=12, head_parts=2) == Shard(3, 8, heads=2, frames=4)


@pytest.mark.parametrize(
    "shard, attention, message",
    [
        (Shard(1, 2), None, "attention must be of inferix_kernels.distributed .* rank 1 of 2, got Local"),
        (Shard(1, 2), lambda t: TopK(2), "attention must be of inferix_kernels.distributed .* rank 1 of 2, got TopK"),
        (Shard(0, 2), Gather, "transport must be that of the store's rank 0 of 2, got that of rank 1 of 2"),
        (Shard(1, 2, frames=2), Gather, "Gather needs a store with all frames"),
        (Shard(1, 2), Ring, "Ring needs a store with some of the frames"),
        (Shard(1, 2), PassQ, "PassQ needs a store with some of the frames"),
    ],
)
def test_attention_that_does_not_fit_the_store(shard, attention, message):
    table = store_of(STORY, shard).open(Policy(window=4))
    options = {} if attention is None else {"attention": attention(in_process_group(2)[1])}
    with pytest.raises(ValueError, match=message):
        table.plan([table.open_block(2)], **options)


def test_a_policy_that_reads_otherwise():
    table = store_of(STORY, Shard(1, 2)).open(Policy(window=4, past_bias=-1.0))
    with pytest.raises(ValueError, match="attention of several ranks needs a policy without past_bias"):
        table.plan([table.open_block(2)], attention=Gather(in_process_group(2)[1]))


@pytest.mark.parametrize(
    "field, options, changes, message",
    [
        ("store", {}, {"format": "fp8"}, r"got \"pools\['fp8'\]=20\" on rank 1 and \"pools\['int8'\]=20\" on rank 0"),
        ("store", {"page_size": 16}, {}, "got 'page_size=16' on rank 1 and 'page_size=8' on rank 0"),
        ("store", {"precision": "auto"}, {}, "got 'precision=auto' on rank 1 and 'precision=exact' on rank 0"),
        ("qkv", {}, {"query_heads": 8}, "got '8 query heads' on rank 1 and '4 query heads' on rank 0"),
        ("blocks", {}, {"frames": 1, "window": 12}, "got 'world 0: 21 tokens' on rank 1 and 'world 0: 42 tokens'"),
    ],
)
def test_what_differs_between_ranks_is_named(field, options, changes, message):
    def rank(transport):
        odd = transport.rank == 1
        story = STORY._replace(**changes) if odd else STORY
        shard = shard_for("gather", transport.rank, 3, STORY.heads)
        own = {"pools": {story.format: 20}} | (options if odd else {})
        tell(story, store_of(story, shard, **own), Gather(transport))

    transports = lazy(3)
    with pytest.raises(ValueError, match=f"^{field} must be the same on all ranks, {message}"):
        run_ranks(transports, rank)


def test_a_schedule_that_differs_between_ranks_is_named():
    def rank(transport):
        store = store_of(STORY, shard_for("ring", transport.rank, 2, STORY.heads))
        tell(STORY, store, (Ring, PassQ)[transport.rank](transport))

    with pytest.raises(ValueError, match="attention must be the same on all ranks, got 'PassQ' on rank 1 and 'Ring'"):
        run_ranks(lazy(2), rank)


def test_what_differs_last_in_a_long_list_is_named():
    def rank(transport):
        see = [f"block 0: int8 {frame}" for frame in range(5000 - transport.rank // 2)]
        compare(transport, Facts({"see": see}, bytes([transport.rank // 2] * 8)))

    with pytest.raises(ValueError, match=r"^see must .* got nothing on rank 2 and 'block 0: int8 4999' on rank 0$"):
        run_ranks(lazy(3), rank)


def test_frames_on_other_ranks_are_not_read_by_accident():
    def rank(transport):
        told = tell(STORY, store_of(STORY, shard_for("ring", transport.rank, 2, STORY.heads)), Ring(transport))
        slots = told.table.state.slots
        theirs, mine = ([frame for frame, slot in slots.items() if slot.own is own] for own in (False, True))
        with pytest.raises(NotResident, match="lie on other ranks"):
            told.table.gather(0, theirs)
        return mine, told.table.store.held_bytes["int8"] // told.table.store.pools["int8"].frame_bytes

    made = run_ranks(lazy(2), rank)
    assert [len(mine) == held for mine, held in made] == [True, True]
    assert not {*made[0][0]} & {*made[1][0]}


class Noting(Sharded):
    """The other rank's rows are ones."""

    def __init__(self, reads):
        self.store, self.notes = reads.store, []
        self.pages = KVPages.empty("fp32", 8, 4, 8, 16)

    def staging(self, rows):
        self.notes.append(("staging", rows))
        return self.pages, PageList.of([0, 1, 2], [8, 8, rows.stop - 16])

    def begin(self, layer, q):
        self.notes.append(("begin", self.pages.k[0, 0, 0].tolist(), self.store.pools["int8"].pages.k[:3].tolist()))
        self.store.scratch.k.fill_(1)
        self.store.scratch.v.fill_(1)

    def everywhere(self, mean):
        return mean

    def __call__(self, layer, q, out):
        self.notes.append(("attend", self.store.pools["int8"].pages.v[:3, :, :5].unique().tolist()))
        return torch.zeros(len(q), 4, 16)


def test_a_layer_is_written_then_begun_then_committed_then_attended_to():
    made = []

    class Choice:
        def bind(self, reads):
            made.append(Noting(reads))
            return made[0]

    store = store_of(STORY, Shard(1, 2))
    for side in (store.pools["int8"].pages.k, store.pools["int8"].pages.v):
        side.fill_(7)
    table = store.open(Policy(window=4))
    block = table.open_block(2)
    clean = table.plan([block], commit=block, attention=Choice())
    assert clean.rows == slice(10, 21)
    out = clean.attend(0, torch.full((22, 3 * 4 * 16), 3.0), None, None)
    (staged, rows), (begun, written, before), (attended, committed) = made[0].notes
    assert (staged, begun, attended) == ("staging", "begin", "attend") and rows == slice(0, 22)
    assert written == [3.0] * 16, "own rows were there when it began"
    assert {x for page in before for head in page for row in head for x in row} == {7}, "and nothing was committed"
    assert committed == [127], "what it brought was, before attention"
    assert out.shape == (22, 64)
