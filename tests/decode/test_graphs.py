"""Forwards that are captured and replayed make the worlds that Python makes, launch by launch."""

import dataclasses

import pytest
import torch

from inferix import World
from inferix.decode.graphs import Graphs
from inferix.decode.sequential import SequentialDecoder
from inferix.trees import parts_of, rebuilt
from inferix_kernels import PassBuffers, profile
from inferix_kernels.store.page_lists import Packed
from tests.decode.recording_backend import installed
from tests.decode.tape import TapeRecorder
from tests.decode.test_contract import Plain
from tests.decode.test_loop import small_world
from tests.decode.test_pipeline import world as pipeline
from tests.models.test_wan_world import wan

TWO_STEPS = {"times": (1.0, 0.5), "timesteps": (1000.0, 500.0)}


@pytest.fixture(autouse=True)
def recording():
    with installed():
        yield


def tiny(**options):
    return small_world(backend="recording", **options)


def captured(world, recorder=None):
    """A loop over this world's model whose forwards are captured, and the loop of the world itself."""
    recorder = recorder or TapeRecorder()
    generator = torch.Generator().manual_seed(0)
    negative = world._negative
    other = SequentialDecoder(world.model, world.store.open(world.table.policy), generator, negative, recorder)
    return other, world.decoder, recorder


def conditioning(world, prompt, i=0):
    actions = [["up", "left", "none"][i % 3]] * 3 if world.model.adapter.actions else []
    return world.model.conditioning(prompt, actions)


def steps(world, decoders, prompts, between=lambda decoder, i: None):
    """Both loops, block by block: the same latents, bit for bit."""
    for i, prompt in enumerate(prompts):
        made = []
        for decoder in decoders:
            made.append(decoder.step(conditioning(world, prompt, i)))
            between(decoder, i)
        assert torch.equal(*made), f"block {i}"
        assert made[0].isfinite().all()


@pytest.mark.parametrize("kv, sink", [("fp32", 0), ("int8", 1)])
def test_a_captured_world_is_the_world_that_python_launches(kv, sink):
    """Through a growing window, a full one and, with a sink of one frame, lists that are filled up to whole blocks."""
    world = tiny(kv=kv, window=6, sink=sink, steps=3, worlds=2)
    graphs, eager, recorder = captured(world)
    steps(world, (graphs, eager), ["desert day", "desert day", "glacier day", "meadow night", "meadow night"])
    before = recorder.tapes, recorder.replays
    steps(world, (graphs, eager), ["desert night", "desert night"])
    assert recorder.tapes == before[0] and recorder.replays == before[1] + 2 * 3  # a full window: replays alone


@pytest.mark.parametrize("reading", [{"time": "relative"}, {"past_bias": -1.0}])
def test_forwards_that_read_by_policy_are_launched_among_replays(reading):
    world = tiny(kv="int8", window=6, sink=1, worlds=2, **reading)
    graphs, eager, recorder = captured(world)
    steps(world, (graphs, eager), ["desert day"] * 3 + ["glacier day"])
    assert recorder.replays > 0
    before = recorder.tapes, recorder.replays
    steps(world, (graphs, eager), ["glacier day"] * 2)
    assert (recorder.tapes, recorder.replays) == before


def test_what_a_replay_reads_and_commits_is_counted_and_it_is_one_span():
    """As if Python had launched it; what fills a page list up is not read."""
    world = tiny(kv="int8", window=6, sink=1, worlds=2)
    counts, spans = [], []
    *pair, recorder = captured(world)
    for decoder in pair:
        profile.start("layer")
        for i in range(6):
            decoder.step(conditioning(world, "desert day", i))
        counts.append((made := profile.stop()).counts())
        made.collect()
        spans.append(made.sums)
    assert counts[0] == counts[1] and counts[0]["pages read"] > 0 and counts[0]["pages committed int8"] > 0
    assert spans[0]["graph"].number == recorder.replays and "graph" not in spans[1]
    assert spans[0]["attention"].number < spans[1]["attention"].number


def test_wan_keeps_its_prompts_apart_in_a_captured_forward():
    world = World(wan(window=6, **TWO_STEPS), backend="recording", kv="int8", worlds=2)
    graphs, eager, recorder = captured(world)
    steps(world, (graphs, eager), ["fog", "fog", "fog", "fog", "rain", "rain", "fog", "snow"])
    assert recorder.replays > recorder.tapes > 2


def test_guidance_is_captured_branch_by_branch():
    world = World(wan(window=6, guidance=3.0, **TWO_STEPS), backend="recording", kv="fp32", worlds=2)
    graphs, eager, recorder = captured(world)
    steps(world, (graphs, eager), ["fog", "fog", "fog", "fog", "rain"])
    assert recorder.replays > recorder.tapes


def test_what_a_user_does_between_blocks_does_not_disturb_a_graph():
    """Clean passes by themselves, pinned frames, rewinding: a list of another length has a graph of its own."""
    world = tiny(kv="int8", window=6, undo=6, worlds=2)
    graphs, eager, recorder = captured(world)

    def between(decoder, i):
        if i in (3, 4):
            decoder.commit_pending()
        if i == 4:
            decoder.table.pin([6])
        if i == 6:
            decoder.rewind(3)
        if i == 8:
            decoder.table.unpin([6])

    steps(world, (graphs, eager), ["desert day"] * 11, between)
    assert recorder.replays > 10


def test_a_fork_has_graphs_of_its_own():
    world = tiny(kv="int8", window=6, worlds=4)
    graphs, eager, recorder = captured(world)
    steps(world, (graphs, eager), ["desert day"] * 4)
    before = recorder.tapes
    pair = graphs.fork(), eager.fork()
    for _ in range(2):
        steps(world, pair, ["glacier day"])
        steps(world, (graphs, eager), ["desert day"])
    assert recorder.tapes > before


def test_weights_that_lie_elsewhere_are_captured_anew():
    world = tiny(kv="fp32", window=6, worlds=2)
    graphs, eager, recorder = captured(world)
    steps(world, (graphs, eager), ["desert day"] * 4)
    before, weight = recorder.tapes, world.model.network.layers[0].up.weight
    weight.data = 1.5 * weight.data  # as a network that was moved away and back, or had its weights exchanged
    steps(world, (graphs, eager), ["desert day"] * 3)
    assert recorder.tapes > before


def test_a_forward_on_another_stream_waits_for_the_one_before():
    world = tiny(kv="fp32", window=6, worlds=2)
    graphs, eager, recorder = captured(world)
    steps(world, (graphs, eager), ["desert day"] * 3)
    assert not recorder.waits
    recorder.here = "side"
    steps(world, (graphs, eager), ["desert day"] * 2)
    assert recorder.waits == [("side", "main")]


def test_page_lists_are_not_written_before_the_forward_on_another_stream_is_done_with_them(monkeypatch):
    world = tiny(kv="fp32", window=6)
    graphs, _, recorder = captured(world)
    for i in range(3):
        graphs.step(conditioning(world, "desert day", i))
    write, done = Packed.write, []
    monkeypatch.setattr(Packed, "write", lambda *given: done.append(list(recorder.waits)) or write(*given))
    recorder.here = "side"
    graphs.step(conditioning(world, "desert day"))
    assert done and done[0] == [("side", "main")]


def test_a_pass_that_is_stale_is_not_replayed():
    world = tiny(kv="fp32", window=6)
    buffers, graphs = PassBuffers(padded=True), Graphs(world.model, TapeRecorder())
    block = world.table.open_block(3)
    passes = [world.table.plan([block], world.model.rope(block.frames), buffers=buffers) for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"^this pass was planned before another one in the same buffers"):
        graphs.predict([], passes[0])
    world.table.abandon()
    with pytest.raises(RuntimeError, match=r"^this pass was planned before its table was edited"):
        graphs.predict([], passes[1])


def test_a_block_that_is_not_finite_is_looked_at_without_graphs():
    world = tiny(kv="fp32", window=6)
    recorder = TapeRecorder()
    world.decoder = captured(world, recorder)[0]
    for _ in range(4):
        world.step(action="up", prompt="desert day")
    before = recorder.replays
    world.model.network.layers[1].down.bias[3] = float("nan")
    with pytest.raises(ValueError, match=r"first in what layers\.1\.down gives"):
        world.step(action="up")
    assert recorder.replays > before


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: World("tiny", graphs=True), "graphs must be False on cpu: forwards are captured on a GPU alone, got"),
        (lambda: World("tiny", graphs=1), "graphs must be True or False, got 1"),
        (lambda: World(on_a_gpu(pipeline().model), graphs=True), "graphs must be False for .*, which has several bl"),
        (lambda: World(on_a_gpu(Plain()), graphs=True), "graphs must be False for plain, which has no network whose"),
        (lambda: Graphs(Plain(), TapeRecorder()), "graphs must be False for plain: it has no network whose weights"),
    ],
)
def test_what_can_not_be_captured_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def on_a_gpu(model):
    model.device = "cuda"  # as it says; it is refused before anything is looked for there
    return model


@dataclasses.dataclass(frozen=True)
class Held:
    pairs: list
    named: dict
    dropped: bool = False


def test_a_conditioning_of_any_form_is_taken_apart_and_put_together():
    a, b, c = (torch.full((2,), float(i)) for i in range(3))
    held = Held([(a, b)], {"c": c, "n": 3})
    form, tensors = parts_of(held)
    assert [x is y for x, y in zip(tensors, (a, b, c), strict=True)] == [True] * 3
    again = rebuilt(held, iter([x + 1 for x in tensors]))
    assert type(again) is Held and again.named["n"] == 3 and torch.equal(again.pairs[0][1], b + 1)
    assert parts_of(again)[0] == form
    for other in (Held([(a, b)], {"c": c, "n": 4}), Held([(a, b)], {"c": c[:1], "n": 3}), Held([[a, b]], held.named)):
        assert parts_of(other)[0] != form
    with pytest.raises(TypeError, match=r"^value must be made of tensors, numbers and text, got "):
        parts_of([a, object()])
