"""Pictures that are decoded beside the next block: the same ones, one block at a time, and what waits for them."""

import threading
import time

import numpy as np
import pytest
import torch

from inferix import saved
from inferix.beside import Beside
from inferix.decode.contract import PictureStream
from inferix.finite import NotFinite, to_bytes
from inferix.models.wan.video import VideoVAE
from inferix.world import World
from tests.decode.test_loop import small_world
from tests.models.test_wan_world import encode, wan

SLOW = 0.02  # seconds that a block's pictures take: who does not wait for them sees what was before


class Looking(PictureStream):
    """A stand-in for a VAE: its pictures depend on all blocks before theirs.

    Args:
        before: called with the number of the block, in the thread that decodes it.
    """

    looks_back = True

    def __init__(self, before=lambda number: time.sleep(SLOW)):
        self.before, self.sum, self.seen = before, torch.zeros(3, 1, 1), 0

    def __call__(self, latents):
        self.before(self.seen)
        self.seen += 1
        x = latents[:, :3].tanh() / 2 + self.sum
        self.sum = (self.sum + x.mean((0, 2, 3))[:, None, None]).clamp(-0.5, 0.5)
        return to_bytes(x.permute(0, 2, 3, 1))

    def fork(self):
        other = Looking(self.before)
        other.sum, other.seen = self.sum, self.seen
        return other

    def restart(self, latents):
        self.sum = self.sum / 2
        return latents * 0.5 + self.sum.mean()

    def state(self):
        return {"sum": self.sum, "seen": self.seen}

    def restore(self, state):
        self.sum, self.seen = state["sum"], state["seen"]


def looking(name="self-forcing", before=None, model=None, **options):
    model = model or wan(name, **({"rollout": 6} if name == "causvid" else {}))
    model.open_video = Looking if before is None else lambda: Looking(before)
    return World(model, **{"kv": "fp32", "window": 9, "worlds": 2, **options})


def stepped(world, prompts):
    return [world.step(prompt=prompt) for prompt in prompts]


def advanced(world, prompts):
    return [coming.result() for coming in [world.advance(prompt=prompt) for prompt in prompts]]


def same(made, wanted):
    return len(made) == len(wanted) and all(map(np.array_equal, made, wanted))


PROMPTS = ["fog", "fog", "rain", "rain", "snow"]


@pytest.mark.parametrize("name", ["self-forcing", "causvid", "longlive"])
def test_the_pictures_are_the_same_bit_for_bit(name):
    """CausVid's second rollout begins with what its pictures end with; LongLive computes its past again."""
    world, straight = looking(name), looking(name)
    wanted = stepped(straight, PROMPTS)
    assert same(advanced(world, PROMPTS), wanted) and not np.array_equal(wanted[0], wanted[1])
    assert torch.equal(world.latents, straight.latents)
    replayed = looking(name)
    taken = [replayed.advance(prompt=PROMPTS[0], latents=straight.latents)]
    assert taken[0].result().shape == wanted[-1].shape


def test_latents_stay_as_they_are_while_the_next_block_is_made():
    """They are still being decoded then."""
    world = looking()
    kept = []
    for prompt in PROMPTS:
        world.advance(prompt=prompt)
        kept.append((world.latents, world.latents.clone()))
    assert all(torch.equal(latents, copy) for latents, copy in kept)


def test_a_block_is_made_while_the_pictures_of_the_one_before_are_decoded():
    """Each decode but the last waits for a forward of the block after it: in turns, this would never come."""
    forwards, blocks = [threading.Event() for _ in range(4)], []
    world = looking(before=lambda number: blocks.append(forwards[number + 1].wait(60)))
    predict = world.model.predict

    def watched(*args):
        forwards[world.frames // 3].set()
        return predict(*args)

    world.model.predict = watched
    forwards[3].set()
    assert same(advanced(world, PROMPTS[:3]), stepped(looking(), PROMPTS[:3]))
    assert blocks == [True] * 3


def test_one_block_is_decoded_at_a_time_and_no_call_returns_before_the_one_before_is_done():
    begun, go, made = [threading.Event() for _ in range(3)], [threading.Event() for _ in range(3)], []

    def before(number):
        begun[number].set()
        assert go[number].wait(60)

    world = looking(before=before)
    thread = threading.Thread(target=lambda: made.extend(world.advance(prompt="fog") for _ in range(3)))
    thread.start()
    for number in range(3):
        assert begun[number].wait(60)
        assert [event.is_set() for event in begun] == [i <= number for i in range(3)]
        assert world.frames <= 3 * (number + 2)  # one block more may be there, and waits
        go[number].set()
    thread.join()
    assert [coming.result().shape[0] for coming in made] == [3, 3, 3]


@pytest.mark.parametrize("undo", [0, 6])
def test_what_needs_to_know_where_pictures_stand_waits_for_them(undo, tmp_path):
    one, straight = looking(undo=undo, worlds=3), looking(undo=undo, worlds=3)
    stepped(straight, PROMPTS[:2])
    for prompt in PROMPTS[:2]:
        one.advance(prompt=prompt)
    fork, other = one.fork(), straight.fork()
    assert same(advanced(fork, PROMPTS[2:]), stepped(other, PROMPTS[2:]))
    fork.release(), other.release()
    one.advance(prompt="rain"), straight.step(prompt="rain")
    saved.save(one, tmp_path / "one"), saved.save(straight, tmp_path / "straight")
    loaded, wanted = saved.load(one, tmp_path / "one"), saved.load(straight, tmp_path / "straight")
    assert same(advanced(loaded, ["snow"] * 2), stepped(wanted, ["snow"] * 2))
    loaded.release(), wanted.release()
    if undo:
        for world in (one, straight):
            coming = world.advance(prompt="rain")
            world.rewind(6)
            assert coming.done() and world.frames == 6
        assert same(advanced(one, ["fog"] * 2), stepped(straight, ["fog"] * 2))
    one.advance(prompt="rain")
    one.reset(1), straight.reset(1)
    frames = np.random.default_rng(0).integers(0, 255, (3, *one.model.adapter.size, 3), dtype=np.uint8)
    one.model.encode_video = straight.model.encode_video = encode
    one.model.pictures_of = straight.model.pictures_of = lambda latents: latents
    assert np.array_equal(one.observe(frames, prompt="fog"), straight.observe(frames, prompt="fog"))
    one.advance(), straight.step()
    assert np.array_equal(one.observe(frames), straight.observe(frames))
    assert same(advanced(one, ["fog"]), stepped(straight, ["fog"]))


def spoiled(error, at_once=False):
    """A world whose second block's pictures come to nothing, while its third one is made or `at_once`."""
    model, third, errors = wan(), threading.Event(), [error]

    def late(number):
        if number == 1 and errors:
            assert at_once or third.wait(60)
            raise errors.pop()

    predict = model.predict
    model.predict = lambda *args: (third.set() if world.frames >= 6 else None, predict(*args))[1]
    world = looking(model=model, before=late)
    return world


def test_pictures_that_are_not_finite_end_their_world_while_the_next_block_is_under_way():
    world = spoiled(NotFinite("pictures are not finite"))
    first, second = world.advance(prompt="fog"), world.advance(prompt="fog")
    assert not second.done()
    said = r"^latent frames 3 to 5 of self-forcing are not finite, first in what the decoder of pictures gives$"
    with pytest.raises(NotFinite, match=said):
        world.advance(prompt="fog")
    assert world.released and first.result().shape[0] == 3
    with pytest.raises(NotFinite, match=said):
        second.result()
    with pytest.raises(RuntimeError, match="advance: this world was released"):
        world.advance(prompt="fog")
    assert all(len(pool.free) == pool.frames for pool in world.store.pools.values())
    world.reset(0)
    assert world.step(prompt="fog").shape[0] == 3


@pytest.mark.parametrize("call", ["fork", "rewind", "observe", "step", "save"])
def test_who_was_told_of_them_is_told_again_by_the_next_call(call, tmp_path):
    world = looking(before=lambda number: number and to_bytes(torch.full((1,), float("inf"))))
    world.advance(prompt="fog")
    coming = world.advance(prompt="fog")
    with pytest.raises(NotFinite, match="frames 3 to 5 of self-forcing are not finite"):
        coming.result()
    assert world.released and not world.decoder.released
    calls = {
        "fork": world.fork,
        "rewind": lambda: world.rewind(3),
        "observe": lambda: world.observe(np.zeros((3, 48, 80, 3), np.uint8)),
        "step": world.step,
        "save": lambda: saved.save(world, tmp_path / "w"),
    }
    with pytest.raises(NotFinite, match="frames 3 to 5 of self-forcing are not finite"):
        calls[call]()
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="fork: this world was released"):
        for _ in range(2):  # of saving the world hears with its next call
            try:
                world.fork()
            except NotFinite:
                assert call == "save"
    assert all(len(pool.free) == pool.frames for pool in world.store.pools.values())


def test_a_block_that_is_not_finite_is_named_by_its_layer_and_nothing_is_built_upon_it():
    model = wan()
    world = looking(model=model)
    coming = world.advance(prompt="fog")
    model.network.state_dict()["blocks.1.ffn.2.bias"][0] = float("nan")
    with pytest.raises(NotFinite, match=r"^latent frames 3 to 5 of .* first in what blocks\.1\.ffn\.2 gives"):
        world.advance(prompt="fog")
    assert world.released and np.isfinite(coming.result()).all()


@pytest.mark.parametrize("told", [True, False])
def test_another_error_is_raised_once_and_the_world_goes_on(told):
    world = spoiled(MemoryError("no room for pictures"), at_once=told)
    world.advance(prompt="fog")
    second = world.advance(prompt="fog")
    with pytest.raises(MemoryError, match="no room for pictures"):
        second.result() if told else world.advance(prompt="fog")
    assert not world.released and world.step(prompt="fog").shape[0] == 3


def test_the_tiny_world_takes_its_pictures_back():
    """Without a look back there is nothing to keep; one thread waits for what another one begins."""
    world, straight = (small_world(window=6) for _ in range(2))
    orders = [("up", "desert day"), ("left", None), ("down", "glacier night")]
    wanted = [straight.step(action=action, prompt=prompt) for action, prompt in orders]
    coming = [world.advance(action=action, prompt=prompt) for action, prompt in orders]
    made = []
    thread = threading.Thread(target=lambda: made.extend(each.result() for each in coming))
    thread.start()
    thread.join()
    assert same(made, wanted) and np.array_equal(world.last_picture(), wanted[-1][-1])


class Halting(VideoVAE):
    """Two layers that look back; the second one may have no room."""

    failing = False

    def begin(self):
        return [torch.zeros(1), torch.zeros(1)]

    def decode(self, latents, memory):
        memory[0] = memory[0] + latents.mean()
        if self.failing:
            raise MemoryError
        memory[1] = memory[1] + memory[0]
        return (memory[0] - memory[1]).expand(len(latents), 3, 8, 8).tanh()

    def encode_pictures(self, pictures):
        raise NotImplementedError


def test_a_stream_whose_block_could_not_be_decoded_is_where_it_was():
    vae = Halting(torch.device("cpu"), torch.float32)
    stream, straight = vae.open(), vae.open()
    blocks = torch.linspace(-1, 1, 18).reshape(3, 3, 2, 1, 1)
    assert np.array_equal(stream(blocks[0]), straight(blocks[0]))
    vae.failing = True
    with pytest.raises(MemoryError):
        stream(blocks[1])
    vae.failing = False
    assert np.array_equal(stream(blocks[2]), straight(blocks[2]))


def test_a_world_that_was_released_is_neither_rewound_nor_saved(tmp_path):
    world = small_world(window=6)
    coming = world.advance(action="up", prompt="desert day")
    world.release()
    assert coming.result().shape[0] == 3
    with pytest.raises(RuntimeError, match=r"^rewind: this world was released"):
        world.rewind(3)
    with pytest.raises(RuntimeError, match=r"^save: this world was released"):
        saved.save(world, tmp_path / "w")
    assert not list(tmp_path.iterdir())


def test_a_block_that_failed_is_made_again_with_the_same_noise():
    """Here a user's function fails as frames leave the window."""
    calls = []

    def on_evict(table, frame):
        calls.append(frame)
        if len(calls) == 2:
            raise RuntimeError("no room on the disk")

    world, straight = (small_world(kv="fp32", window=6, on_evict=on_evict) for on_evict in (on_evict, None))
    for _ in range(2):
        world.step(action="up", prompt="desert day"), straight.step(action="up", prompt="desert day")
    with pytest.raises(RuntimeError, match="no room on the disk"):
        world.advance(action="left")
    world.step(action="left"), straight.step(action="left")
    torch.testing.assert_close(world.latents, straight.latents, rtol=0, atol=1e-5)


def test_jobs_run_in_turn_and_one_that_fails_holds_nobody_up():
    beside, seen = Beside("test"), []
    failed = beside.submit(lambda: 1 / 0)
    jobs = [beside.submit(lambda i=i: seen.append((i, threading.current_thread().name)) or i) for i in range(3)]
    assert [job.result() for job in jobs] == [0, 1, 2] and [i for i, _ in seen] == [0, 1, 2]
    assert {name for _, name in seen} == {"test_0"} and isinstance(failed.exception(), ZeroDivisionError)


def test_on_a_gpu_a_job_begins_where_the_callers_stream_stood_and_ends_with_the_device(monkeypatch):
    """Of a stand-in for CUDA's streams: nothing here has run on a GPU."""
    calls = []

    class Stream:
        def __init__(self, device, priority=0):
            self.device = device
            calls.append(("stream", str(device), priority))

        def record_event(self):
            calls.append("the caller's stream marks where it stands")
            return "event"

        def wait_event(self, event):
            calls.append(f"waits for the {event}")

        def synchronize(self):
            calls.append("the device is done")

        def __enter__(self):
            calls.append("in the stream")

        def __exit__(self, *_):
            calls.append("out of it")

    caller = Stream("caller")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: caller)
    calls.clear()
    beside = Beside("test", "cuda:0")
    assert beside.submit(lambda: calls.append("decodes") or 3).result() == 3
    assert calls == [
        ("stream", "cuda:0", -1),
        "the caller's stream marks where it stands",
        "in the stream",
        "waits for the event",
        "decodes",
        "the device is done",
        "out of it",
    ]
