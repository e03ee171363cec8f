"""The decode loop with several blocks in flight: what is seen, kept, forgotten and taken up again."""

import dataclasses

import pytest
import torch

from inferix.loop import Decoder
from inferix.models.magi import Magi, MagiSchedule, adapter_for
from inferix.pipeline import Forward, Pipeline, Segment
from inferix.world import World
from inferix_kernels import Policy
from tests.models.magi_folder import random_network, tiny_config
from tests.models.wan_golden import draws_of, golden, model_for, table_for
from tests.models.wan_golden import run as run_wan

SIZE, CHUNK = (48, 80), 6
WORDS = torch.randn(7, 24, generator=torch.Generator().manual_seed(3))


def model(steps=8, distilled=True, seed=0, **changes):
    schedule = MagiSchedule(steps, distilled=distilled, **changes)
    made = Magi(random_network(tiny_config(layers=2), seed), adapter_for("magi-4.5b", schedule, SIZE), schedule)
    made.text = lambda prompt: WORDS[: 3 + len(prompt) % 5]
    return made


def world(kv="fp32", distilled=True, seed=0, blocks=None, steps=8, **options):
    made = model(steps, distilled, **{k: options.pop(k) for k in ("stages", "ranges", "clean_range") if k in options})
    return World(made, kv=kv, seed=seed, blocks=blocks, backend="compiled", **options)


def play(world, chunks, prompt="fog"):
    done = []
    while len(done) < chunks:
        if len(made := torch.from_numpy(world.step(prompt=prompt))):
            done.append(made)
    return done


# Where a stage fails after its clean chunk was committed, the chunk is not in the stage's first forward again. A
# smaller product sums in another order; and guided, the captioned forward reads what was committed under no caption.
FAILURES = [
    ("fp32", True, 0, 0.0),
    ("int8", True, 0, 0.0),
    ("fp32", False, 1, 0.0),
    ("fp32", True, 1, 2e-5),
    ("int8", True, 1, 2e-2),
    ("fp32", False, 3, 0.2),
]


class OneByOne:
    """Self Forcing's schedule as a pipeline of one block."""

    stages = 1

    def __init__(self, adapter):
        self.levels, self.told = zip(*adapter.schedule(False))
        self.stage_steps, self.context = len(self.levels), adapter.context_time

    def forwards(self, flight, clean):
        ((block, step),) = flight
        before = [] if clean is None else list(self.clean_pass(clean).segments)
        return [Forward((*before, Segment(block, step, self.told[step], 99, "text")), commit=clean is not None)]

    def clean_pass(self, block):
        return Forward((Segment(block, self.stage_steps, self.context, 99, "text", weight=0.0),), commit=True)

    def advance(self, step, x, predicted, noise):
        clean = x - self.levels[step] * predicted
        if step + 1 == self.stage_steps:
            return clean
        return (1 - self.levels[step + 1]) * clean + self.levels[step + 1] * noise(len(x))


def test_a_pipeline_of_one_block_is_the_loop_of_self_forcing():
    tensors = golden("self_forcing_static") | golden("self_forcing_rolling")
    wan = model_for(tensors, "self-forcing")
    policy = Policy(window=5, sink=1)
    wanted = [steps[-1] for steps in run_wan(wan, tensors, table_for(wan, policy, backend="compiled"), 5).x0]
    wan.schedule = OneByOne(wan.adapter)
    wan.tell = lambda condition, remaining: {"text": condition}

    def predict_segments(forward, blocks, told, attend):
        last = wan.predict(blocks, [segment.t for segment in forward.segments], told, attend)
        return [torch.empty(0)] * (len(blocks) - 1) + [last]

    wan.predict_segments = predict_segments
    pipeline = Pipeline(wan, table_for(wan, policy, backend="compiled"), torch.Generator())
    draws = iter(draws_of(tensors, 3, 5))
    pipeline._noise = lambda frames: next(draws)
    condition = wan.condition_on(tensors["inputs.prompt_embeds"][0])
    assert all(torch.equal(pipeline.step(condition), x) for x in wanted)


def test_frames_outside_every_range_are_forgotten():
    """From the sixth chunk on nothing grows: one committed chunk is held, which the noisiest one still sees."""
    running = world(distilled=False)
    used, held, nbytes = [], [], sum(running.kv_bytes().values())
    for _ in range(16):
        running.step(prompt="fog")
        pool = running.store.pools["fp32"]
        used.append(pool.frames - len(pool.free))
        held.append(list(running.table.held))
    assert used == [0] * 4 + [CHUNK] * 12  # the chunk that was clean is committed in the stage after
    assert held[15] == list(range(66, 72)) and running.frames == 78
    assert sum(running.kv_bytes().values()) == nbytes
    assert len(running.decoder.flight) == 3 and len(running.table.open_blocks) == 4


def test_what_is_read_does_not_grow_with_the_video():
    running, reads = world(), []
    for _ in range(14):
        before = dataclasses.replace(running.decoder.traffic)
        running.step(prompt="fog")
        now = running.decoder.traffic
        reads.append((now.read - before.read, now.history - before.history))
    # Two steps a stage. The first commits the clean chunk, which all but it see from then on.
    assert [read for read, _ in reads[5:]] == [12] * 9
    assert [history for _, history in reads[5:]] == [18 + 12 * i for i in range(9)]


@pytest.mark.parametrize("distilled", [True, False])
def test_one_seed_makes_one_world(distilled):
    a, b, c = (play(world(seed=seed, distilled=distilled), 2) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not torch.equal(a[0], c[0])
    assert a[0].shape == (CHUNK, 16, 6, 10)


def test_a_prompt_takes_effect_with_the_block_it_begins():
    same, changed = world(), world()
    for i in range(6):
        before, after = same.step(prompt="fog"), changed.step(prompt="fog" if i < 5 else "rain")
        assert torch.equal(torch.from_numpy(before), torch.from_numpy(after))
    states = [each.decoder.flight for each in (same, changed)]
    differs = [not torch.equal(a.x, b.x) for a, b in zip(*states)]
    assert differs == [False, False, True]  # the blocks before it do not see it


def test_the_pipeline_drains():
    running = world(blocks=3)
    done, steps = [], 0
    while len(done) < 3:
        done += [x] if len(x := running.step(prompt="fog")) else []
        steps += 1
    assert steps == 6 and running.frames == 18 and running.ahead == 0
    with pytest.raises(RuntimeError, match="was to have 3 blocks, and has them"):
        running.step()
    longer = play(world(), 3)
    # What follows a chunk is not seen by it; but forwards of fewer chunks sum in another order.
    assert torch.allclose(torch.from_numpy(done[0]), longer[0], atol=2e-5)


def test_a_clean_pass_by_itself_makes_the_same_video():
    fused, separate = world(), world()
    wanted, done = play(fused, 4), []
    while len(done) < 4:
        separate.decoder.settle()
        done += [torch.from_numpy(x)] if len(x := separate.step(prompt="fog")) else []
    # A forward of fewer chunks multiplies smaller matrices, which sums in another order.
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(wanted, done))


@pytest.mark.parametrize("distilled", [True, False])
def test_int8_pages_stay_close_to_fp32(distilled):
    """The first clean pass, which freezes the mean keys, is run twice, so that it can share a forward as all others do.

    Measured PSNR: 85 dB and more on the recorded weights; a captioned forward without the clean chunk: 48.
    """
    exact, quantized = (torch.cat(play(world(kv, distilled), 5)) for kv in ("fp32", "int8"))
    assert torch.equal(exact[:CHUNK], quantized[:CHUNK])  # nothing was committed then
    peak, error = exact.max() - exact.min(), (exact - quantized)[CHUNK:].square().mean().sqrt()
    assert 70 < 20 * torch.log10(peak / error) < 120


@pytest.mark.parametrize("kv", ["fp32", "int8"])
def test_a_fork_that_does_the_same_makes_the_same(kv):
    alone, running = world(kv), world(kv, worlds=3)
    wanted = play(alone, 4)
    play(running, 2)
    fork, other = running.fork(), running.fork(seed=9)
    differs = play(other, 2)
    ours, theirs = play(running, 2), play(fork, 2)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(wanted[2:], ours, theirs))
    assert torch.equal(differs[0], ours[0]) and not torch.equal(play(other, 3)[2], play(running, 3)[2])
    for each in (running, fork, other):
        each.release()
    assert {format: len(pool.free) for format, pool in running.store.pools.items()} == {kv: 90}


@pytest.mark.parametrize("kv, distilled, fail_at, bound", FAILURES)
def test_a_world_goes_on_after_a_stage_that_failed(kv, distilled, fail_at, bound):
    calm, shaken = world(kv, distilled), world(kv, distilled)
    for _ in range(6):
        assert torch.equal(*(torch.from_numpy(each.step(prompt="fog")) for each in (calm, shaken)))
    state, predict, calls = shaken.decoder.generator.get_state(), shaken.model.predict_segments, iter(range(99))

    def fail(*args):
        if next(calls) == fail_at:
            raise KeyboardInterrupt
        return predict(*args)

    shaken.model.predict_segments = fail
    with pytest.raises(KeyboardInterrupt):
        shaken.step()
    shaken.decoder.generator.set_state(state)
    for _ in range(3):
        a, b = (torch.from_numpy(each.step(prompt="fog")) for each in (calm, shaken))
        assert torch.allclose(a, b, rtol=0, atol=bound)
    assert calm.frames == shaken.frames


@pytest.mark.parametrize("distilled", [True, False])
def test_a_killed_run_is_taken_up_bit_for_bit(distilled):
    whole = world("int8", distilled)
    states = [(whole.step(prompt="fog"), whole.latents)[1] for _ in range(9)]
    again = world("int8", distilled)
    for state in states[:6]:
        again.step(prompt="fog", known=state)
        assert torch.equal(again.latents, state)
    for state in states[6:]:
        again.step(prompt="fog")
        assert torch.equal(again.latents, state)


@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("given", [1, 6, 8, 30])
def test_given_frames_begin_the_world(given, distilled):
    """Whole chunks are the past; frames that are left over stay what they are in the chunk they begin."""
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(given, 16, 6, 10, generator=generator)
    running = world(distilled=distilled)
    running.decoder.observe(latents, running._condition([], "fog"))
    whole = given // CHUNK * CHUNK
    assert running.frames == whole and list(running.table.held) == list(range(max(0, whole - 30), whole))
    made = torch.cat(play(running, 2))
    assert torch.equal(made[: given - whole], latents[whole:])
    other = world(distilled=distilled)
    other.decoder.observe(latents + 0.5, other._condition([], "fog"))
    assert not torch.allclose(torch.cat(play(other, 2))[given - whole :], made[given - whole :], atol=1e-3)
    with pytest.raises(RuntimeError, match="before the first block is begun"):
        running.decoder.observe(latents, None)


@pytest.mark.parametrize("distilled", [True, False])
def test_given_chunks_leave_what_made_ones_leave(distilled):
    made, given = world(distilled=distilled, blocks=3), world(distilled=distilled)
    chunks = play(made, 3)
    made.decoder.settle()
    given.decoder.observe(torch.cat(chunks), given._condition([], "fog"))
    frames = list(made.table.held)
    assert frames[-CHUNK:] == list(range(12, 18)) and set(frames) <= set(given.table.held)
    for layer in range(2):
        for a, b in zip(*(each.table.gather(layer, frames) for each in (made, given))):
            assert torch.allclose(a, b, atol=2e-5)  # in larger forwards, summed in another order


def test_a_sink_is_seen_and_kept():
    plain, sinking = world(), world(sink=6, window=36)
    ours, theirs = play(plain, 7), play(sinking, 7)
    assert list(sinking.table.held)[:6] == list(range(6))
    same = [torch.equal(a, b) for a, b in zip(ours, theirs)]
    assert same[0] and not same[6]


def test_a_smaller_window_is_obeyed():
    narrow, wide = play(world(window=12), 4), play(world(), 4)
    # The third chunk, when it is noisy, would see the first.
    assert [torch.equal(a, b) for a, b in zip(narrow, wide)] == [True, True, False, False]


def test_one_chunk_at_a_time_needs_no_pipeline_to_fill():
    """MAGI-1 with a window of one chunk, for small GPUs: ranges go by how far a chunk is, not by stages."""
    running = world(stages=1)
    first = running.step(prompt="fog")
    assert len(first) == CHUNK and running.store.scratch_blocks == 3 and running.ahead == 0
    reaches = {step: running.model.schedule.forwards([(9, step)], None)[0].segments[0].reach for step in range(8)}
    assert list(reaches.values()) == [5, 5, 4, 4, 3, 3, 2, 2]
    assert len(torch.cat(play(running, 2))) == 2 * CHUNK and not torch.equal(*play(running, 2))


def test_what_no_one_waits_for_is_left_out():
    a, b = (Segment(0, 1, 0.5, 1, "x", weight=weight) for weight in (0.0, 1.0))
    assert Forward((a, a)).needed() is None and Forward((a, b)).needed() == Forward((a, b))
    assert Forward((a,), commit=True).needed() == Forward((a,), commit=True)
    assert Forward((a, b), apart=True).needed() == Forward((b,), apart=True)
    assert Forward((a,), apart=True).needed() is None


def test_words_for_what_can_not_be():
    running = world()
    with pytest.raises(RuntimeError, match="keep a fork"):
        running.rewind(6)
    with pytest.raises(ValueError, match=r"blocks must be at least 1.* got 0"):
        world(blocks=0)
    with pytest.raises(ValueError, match="30 latent frames are more than the 2 blocks"):
        crowded = world(blocks=2)
        crowded.decoder.observe(torch.zeros(30, 16, 6, 10), crowded._condition([], "fog"))
    with pytest.raises(ValueError, match="steps must be a multiple of the 4 stages, got 10"):
        MagiSchedule(10)
    with pytest.raises(ValueError, match="shortcut must be one of"):
        MagiSchedule(12, shortcut="1,2,3")
    assert isinstance(running.decoder, Pipeline) and not isinstance(running.decoder, Decoder)


def test_a_pipeline_does_not_grow_with_the_blocks_it_has_made():
    running, sizes = world(), []
    for _ in range(3):
        play(running, 3)
        assert running.denoising > 0
        sizes.append({name: len(x) for name, x in vars(running.decoder).items() if hasattr(x, "__len__")})
    assert sizes[0] == sizes[1] == sizes[2]
