"""A rank is lost in the middle of a world: what was made is taken up by a group of another size."""

import pytest

from inferix_kernels.distributed import PeerLost
from tests.distributed.test_world import magi, same, together, walking

STEPS = 5


def prompt(i):
    return "fog" if i < 3 else "rain"


def played(world, made=()):
    """The latents of each step; those that were made before are taken up."""
    latents = []
    for i in range(STEPS):
        if i < len(made):
            world.replay(made[i], prompt=prompt(i))
        else:
            world.step(prompt=prompt(i))
        latents.append(world.latents.clone())
    return latents


def until_lost(opened, forwards):
    """What rank 0 had made when rank 1 raised an exception in its so many-th forward."""
    made = []

    def failing(ranks):
        world = opened(ranks)
        if not ranks.leads:
            network, calls = world.model.network, []

            def planted(*_):
                calls.append(1)
                if len(calls) == forwards:
                    raise SystemError("planted")

            network.register_forward_pre_hook(planted)
        return world

    def play(world):
        try:
            for i in range(STEPS):
                world.step(prompt=prompt(i))
                made.append(world.latents.clone())
        except PeerLost as error:
            assert error.ranks == (1,) and "step failed on rank 1: SystemError: planted" in error.reason
            raise

    with pytest.raises((PeerLost, RuntimeError), match="step failed on rank 1: SystemError: planted"):
        together(2, play, failing)
    return made


@pytest.mark.parametrize(("opened", "forwards", "schedule"), [(walking, 14, "ring"), (magi, 20, "gather")])
def test_what_was_made_before_a_rank_was_lost_is_taken_up_by_any_number(opened, forwards, schedule):
    made, expected = until_lost(opened, forwards), played(opened())
    assert 1 < len(made) < STEPS, len(made)
    same(made, expected[: len(made)])
    same(played(opened(), made), expected)
    same(together(3, lambda world: played(world, made), opened, schedule), expected)
