"""What happens to a world's past where one block ends and the next begins."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .. import profile
from .past import Past
from .table_view import TableView


def turn_page(table: TableView, block_end: int, seal: bool = False) -> Past:
    """What the past is after a block boundary: what was fetched has arrived, old frames are gone, and those that grew
    old are in another format. For the caller to put in place.

    Everything that can fail comes before the first call of `on_evict`, but for one thing: frames that change format are
    written where others have just left, as pools have no room to spare. If that is interrupted, what has left the
    window is gone, and the rest is as it was: the boundary is turned when it is tried again.

    Args:
        block_end: of the block that the window is counted back from.
        seal: the oldest open block becomes part of the past at this boundary.

    Raises:
        OutOfPages: no room in host memory for what leaves, or for what changes format; nothing was changed.
    """
    store, policy = table.store, table.policy
    store.sync_copies()
    past = table.state.sealed() if seal else table.state
    fetched, past = past.fetched, past.turned()
    stay = past.pinned | (past.held.keys() - past.slots.keys()) if policy.archive else past.pinned
    window_end = block_end + policy.crowded(block_end, past.pinned)
    leaving = [frame for frame in past.held if frame not in stay and not policy.keeps(frame, window_end)]
    if policy.archive:
        # What was fetched from beyond the window is there for the next block, and then waits again.
        back = [frame for frame in leaving if frame in fetched]
        leaving = [frame for frame in leaving if frame not in fetched]
        _check_ageing(table, past, leaving, block_end)
        store.to_host([(past.held[frame], past.slots[frame]) for frame in [*leaving, *back]])
        past = past.away(back, keep=True)
    else:
        _check_ageing(table, past, leaving, block_end)
    if leaving and policy.on_evict is not None:
        past = _say_goodbye(table, past, leaving)
        leaving = [frame for frame in leaving if frame in past.held and frame not in past.pinned]
        _check_ageing(table, past, leaving, block_end)
    if leaving:
        profile.count("pages evicted", len(leaving) * store.pages_per_frame * store.num_layers)
        past = past.away(leaving, keep=False) if policy.archive else past.without(leaving)
    ageing = _ageing(table, past, block_end)
    if not ageing:
        return past
    # From here on nothing may refer to the slots of those that left but their new owners.
    table.state = past.unsealed(table.state) if seal else past
    assert policy.older is not None
    return table.converted(past, ageing, policy.older[1])


def _ageing(table: TableView, past: Past, block_end: int, leaving: Collection[int] = ()) -> list[int]:
    """Frames on the device that are to change format at this boundary."""
    policy = table.policy
    if policy.older is None or policy.older[1] == policy.format:
        return []
    young = [frame for frame, e in past.held.items() if e.format == policy.format and frame in past.slots]
    return [f for f in young if f not in leaving and policy.format_of(f, block_end) == policy.older[1]]


def _check_ageing(table: TableView, past: Past, leaving: Sequence[int], block_end: int) -> None:
    """Raises OutOfPages if frames that grew old can't change format once those that leave have left."""
    if ageing := _ageing(table, past, block_end, set(leaving)):
        assert table.policy.older is not None
        format = table.policy.older[1]
        fresh = [frame for frame in ageing if past.held[frame].resident_as(format) is None]
        slots = [past.slots[frame] for frame in leaving if frame in past.slots]
        table.store.check_room(table, [format] * len(fresh), slots, [past.slots[frame].group for frame in fresh])


def _say_goodbye(table: TableView, past: Past, leaving: Sequence[int]) -> Past:
    """`past` after the policy's on_evict was called with each frame. The table's own state is what it was.

    Raises:
        RuntimeError: on_evict opened, sealed or forgot blocks of this world, or rewound it; nothing was changed.
    """
    before, on_evict = table.state, table.policy.on_evict
    assert on_evict is not None
    forbidden = "on_evict must not open, seal or forget blocks of the world that it is called with, nor rewind it"
    if table.evicting:
        raise RuntimeError(forbidden)
    try:
        table.state, table.evicting = past, True
        for frame in leaving:
            on_evict(table, frame)
        after = table.state
        if (after.next_frame, after.open_blocks) != (past.next_frame, past.open_blocks):
            raise RuntimeError(forbidden)
        return after
    finally:
        table.state, table.evicting = before, False
