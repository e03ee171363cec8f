"""Worlds of several ranks on disk: saved by some, loaded by others; and one that is played, by the page's worker."""

import threading
from multiprocessing import Pipe

import numpy as np
import pytest
import torch
from safetensors import safe_open

pytest.importorskip("aiohttp", reason="needs the extra `stream`")

from inferix import saved
from inferix.ranks import Ranks
from inferix.stream import worker
from inferix.stream.worker import Order, Stage
from inferix.world import World
from inferix_kernels import profile
from inferix_kernels.distributed import in_process_group, run_ranks
from tests.distributed.test_world import same, together
from tests.models.test_wan_world import wan


def opened(ranks=None, kv="fp32", **changes):
    model = wan(window=5, sink=1, **changes)
    return World(model, kv=kv, seed=3, worlds=3, undo=6, precision="exact", ranks=ranks)


def begin(world):
    """Past its window, so that frames have been evicted."""
    for prompt in ("fog", "fog", "rain"):
        world.step(prompt=prompt)
    return world


def goes_on(world):
    world.step(prompt="snow")
    return [world.latents]


def saves(folder):
    return lambda world: saved.save(begin(world), folder)


def loads(folder):
    return lambda world: goes_on(saved.load(world, folder))


@pytest.mark.parametrize(
    ("by", "ranks", "then", "others"),
    [("gather", 2, "ring", 3), ("ulysses", 3, None, 1), ("ring", 3, "ulysses", 3), (None, 1, "pass-q", 2)],
)
def test_what_some_ranks_saved_others_load(by, ranks, then, others, tmp_path):
    folder = tmp_path / "saved"
    saves(folder)(opened()) if by is None else together(ranks, saves(folder), opened, by)
    made = loads(folder)(opened()) if then is None else together(others, loads(folder), opened, then)
    same(made, goes_on(begin(opened())))


def test_int8_pages_are_saved_as_they_are(tmp_path):
    """Codes and scales of every head and frame: to one process, and back to ranks."""

    def again(world):
        saved.save(saved.load(world, tmp_path / "0"), tmp_path / "1")

    saves(tmp_path / "0")(opened(kv="int8"))
    together(3, again, lambda ranks: opened(ranks, "int8"), "ring")
    first, second = (safe_open(tmp_path / name / "past0.safetensors", "pt") for name in "01")
    assert (
        first.metadata() == second.metadata()
    )  # checksums among it; in which order tensors lie is safetensors' affair
    names = sorted(first.keys())
    assert sorted(second.keys()) == names
    assert all(torch.equal(first.get_tensor(name), second.get_tensor(name)) for name in names)


def test_what_rank_0_can_not_write_is_refused_everywhere_and_the_world_goes_on(tmp_path):
    (tmp_path / "there").mkdir()

    def play(world):
        begin(world)
        with pytest.raises(ValueError, match="folder must be new"):
            saved.save(world, tmp_path / "there")
        with pytest.raises(ValueError, match=r"takes .* bytes, at most 10 are left for it"):
            saved.save(world, tmp_path / "large", most=10)
        assert [path.name for path in tmp_path.iterdir()] == ["there"]
        return goes_on(world)

    same(together(2, play, opened, "ulysses"), goes_on(begin(opened())))


def test_a_world_whose_predictions_are_on_ranks_of_their_own_is_not_saved(tmp_path):
    def play(world):
        world.step(prompt="fog")
        with pytest.raises(ValueError, match="with each prediction on ranks of its own, got self-forcing"):
            saved.save(world, tmp_path / "saved")

    together(2, play, lambda ranks: opened(ranks, guidance=2.0), "branches")


REQUESTS = (
    ("step", {"orders": {"a": Order(None, "fog")}}),
    ("fork", {}),
    ("step", {"orders": {"a": Order(None, "rain"), "b": Order()}}),
    ("rewind", {"names": ["b"], "position": 3}),
    ("save", {"name": "a"}),
    ("step", {"orders": {"a": Order(), "b": Order(None, "snow")}}),
    ("close", {"name": "b"}),
    ("load", {}),
    ("prepare", {"text": "fog"}),
    ("step", {"orders": {"a": Order()}}),
    ("reset", {"seed": 5}),
    ("step", {"orders": {"a": Order(None, "snow")}}),
)


def asked(name, arguments, folder):
    return arguments | ({"folder": folder} if name in ("save", "load") else {})


@pytest.fixture
def recorded():
    """The worker's process records, until it ends; here that is this process."""
    yield
    profile.stop()
    profile._hooks.clear()


def test_a_page_plays_a_world_of_two_ranks(tmp_path, monkeypatch, recorded):
    """Its worker leads; when the page asks it to end, all ranks do."""
    monkeypatch.setattr(worker.signal, "signal", lambda number, handler: None)
    alone = Stage(opened)
    expected = [getattr(alone, name)(**asked(name, given, tmp_path / "alone")) for name, given in REQUESTS]
    page, theirs = Pipe()
    ended = []

    def run(transport):
        ranks = Ranks(transport, "gather")
        if ranks.leads:
            return worker.serve(theirs, lambda: opened(ranks))
        return ended.append(opened(ranks).ranks.follow())

    def answer():
        while (message := page.recv()) is None:
            pass
        return message

    group = threading.Thread(target=run_ranks, args=(in_process_group(2, deadline=60), run))
    group.start()
    assert answer()[1]["fps"] == alone.describe()["fps"]
    for (name, given), other in zip(REQUESTS, expected, strict=True):
        page.send((1, name, asked(name, given, tmp_path / "together")))
        _, result, error = answer()
        assert error is None, error
        if name == "step":
            assert result["made"] == other["made"] and result["undo"] == other["undo"]
            for world, pictures in result["pictures"].items():
                assert np.abs(pictures.astype(float) - other["pictures"][world]).max() <= 1
    page.send((0, worker.END, {}))
    group.join()
    assert ended == [None]
