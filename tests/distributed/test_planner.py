"""The planner against its formulas written a second time, figures worked out by hand, and the driver's own tables."""

import itertools
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import SHAPES
from inferix.models.linears import weight_bytes
from inferix.models.magi import adapters as magi
from inferix.models.magi.network import MagiNetwork
from inferix.models.tiny import ADAPTER as TINY
from inferix.models.tiny.model import TinyConfig, TinyWorldModel
from inferix.models.wan import WanConfig, WanNetwork
from inferix.models.wan.adapters import ADAPTERS
from inferix_kernels import Policy
from inferix_kernels.distributed import DEVICES, LINKS, MODELS, Device, Link, Workload, plan_attention
from inferix_kernels.distributed.__main__ import main
from inferix_kernels.store import memory

ROOT = Path(__file__).parents[2]
ANY = 1e18  # bytes
PLAIN = Device("plain", attention=550e12, linear=500e12, memory=ANY)


def plan(work, link=LINKS["nvlink4"], room=ANY, device=PLAIN):
    return plan_attention(work, link, room, device)


def by_name(choice):
    return {str(option.layout): option for option in choice.options}


# The model, a second time and without `wire`.


def brute(w, link, device, past):
    """Every way to use all ranks: (replicas, branches, name) -> (bytes that a rank sends, seconds)."""
    e = {"fp32": 4, "bf16": 2}[w.scratch_format]
    frame = w.frame_tokens or w.tokens
    frames = math.ceil(past / frame)
    # int8: a float32 beside each token's key and each channel's value, per page.
    page = 4 * w.page_size * w.head_dim
    page = page if w.kv_format == "bf16" else page // 2 + 4 * w.page_size + 4 * w.head_dim
    found = {}
    for n, b, u in itertools.product(range(1, w.worlds + 1), range(1, w.branches + 1), range(1, w.kv_heads + 1)):
        if w.ranks % (n * b * u) or w.heads % u or w.kv_heads % u:
            continue
        p = w.ranks // (n * b)
        g = p // u
        t = w.tokens // frame * math.ceil(frame / p)
        turns = math.ceil(w.worlds / n) * math.ceil(w.branches / b)
        second_per_key = 4 * t * w.heads * w.head_dim / device.attention
        seconds = second_per_key * (past + w.tokens) + 2 * t * w.linear / device.linear
        sent = 0
        if u > 1:
            half = t * (u - 1) * w.heads * w.head_dim * e // u
            sent, seconds = 2 * half, seconds + 2 * (link.latency + half / link.bandwidth)
        if b > 1:
            shared = t * (b - 1) * w.prediction // w.layers
            sent, seconds = sent + shared, seconds + link.latency / w.layers + shared / link.bandwidth
        keys = (p - 1) * t * 2 * w.kv_heads // u * w.head_dim * e
        arrive = link.latency + keys / link.bandwidth if p > 1 else 0
        behind, merge = second_per_key * past, device.merge if past and p > 1 else 0

        prefix, number = (f"U{u}x", g) if u > 1 else ("", "")
        alone = "U" if u > 1 else "alone"
        ways = {f"{prefix}G{number}" if g > 1 else alone: (0, max(0, arrive - behind) + merge)}
        if g > 1:
            most = math.ceil(frames / g)
            shard = most * math.ceil(frame / w.page_size) * page * w.kv_heads // u
            hop = link.latency + shard / link.bandwidth
            hops = [hop + keys / link.bandwidth] + [hop] * (g - 2)
            wait = sum(max(0, one - behind / g) for one in hops) + g * merge
            ways[f"{prefix}R{number}"] = (g - 1) * shard, wait if past else arrive
            asked = (g - 1) * t * w.heads * w.head_dim * e if past else 0
            answers = (g - 1) * t * w.heads * (w.head_dim * e + 4) if past else 0
            wait = max(0, link.latency + (keys + asked) / link.bandwidth - behind / g) + link.latency
            wait += answers / link.bandwidth + g * merge + second_per_key * frame * (g * most - frames)
            ways[f"{prefix}Q{number}"] = asked + answers, wait if past else arrive
        found |= {
            (n, b, name): (turns * (sent + keys + more), turns * (seconds + wait))
            for name, (more, wait) in ways.items()
        }
    return found


def label(layout):
    within = str(layout._replace(replicas=1, branches=1))
    return layout.replicas, layout.branches, within


def grid(points):
    """Workloads, links and devices of all sizes, the same every time."""
    draw = random.Random(0)
    for _ in range(points):
        kv_heads = draw.choice([1, 2, 4, 5, 8, 12, 40])
        frame, frames = draw.choice([(1, 1), (7, 1), (64, 3), (130, 3), (1560, 1), (1560, 3), (2025, 6)])
        tokens = frame * frames
        yield (
            Workload(
                tokens=tokens,
                keys=tokens + draw.choice([0, 1, 1000, 9360, 28080, 200_000]),
                heads=kv_heads * draw.choice([1, 1, 3]),
                kv_heads=kv_heads,
                head_dim=draw.choice([64, 128]),
                ranks=draw.choice([1, 2, 3, 4, 6, 8, 16]),
                kv_format=draw.choice(["bf16", "int8"]),
                worlds=draw.choice([1, 1, 2, 3, 8]),
                branches=draw.choice([1, 1, 2, 3]),
                layers=draw.choice([1, 30]),
                linear=draw.choice([0, 40_000_000]),
                frame_tokens=draw.choice([None, frame]),
                scratch_format=draw.choice(["bf16", "fp32"]),
            ),
            Link("drawn", 10 ** draw.uniform(9, 12), draw.choice([0.0, 12e-6, 30e-6]), "drawn"),
            Device("drawn", 10 ** draw.uniform(12, 15), 500e12, ANY, merge=draw.choice([0.0, 8e-6])),
        )


def test_the_plan_is_the_minimum_of_the_model_on_200_points():
    chosen = set()
    for w, link, device in grid(200):
        choice = plan(w, link, ANY, device)
        expected = brute(w, link, device, w.past)
        assert {label(o.layout): o.sent for o in choice.options} == {name: sent for name, (sent, _) in expected.items()}
        for one in choice.options:
            assert one.seconds == pytest.approx(expected[label(one.layout)][1], rel=1e-9)
        assert choice.best.seconds == pytest.approx(min(seconds for _, seconds in expected.values()), rel=1e-9)
        first = brute(w, link, device, 0)
        assert choice.first.first == pytest.approx(min(seconds for _, seconds in first.values()), rel=1e-9)
        chosen.add(choice.best.layout.scheme)
    assert chosen == {"alone", "U", "G", "R", "Q"}  # each is best somewhere


# Wan 1.3B, one layer: (ranks, heads, format of pages, keys, GB/s, us of latency) -> us of G, worked out by hand.
BY_HAND = {
    (4, 12, 9360, 360, 12): 141,
    (4, 12, 9360, 360, 30): 159,
    (4, 12, 9360, 45, 30): 578,
    (4, 12, 32760, 360, 12): 436,
    (4, 12, 32760, 360, 30): 436,
    (4, 12, 32760, 45, 30): 578,
    (8, 40, 32760, 360, 12): 722,
}


@pytest.mark.parametrize("case", BY_HAND, ids=str)
def test_a_gather_costs_what_was_worked_out_by_hand(case):
    ranks, heads, keys, bandwidth, latency = case
    w = Workload(4680, keys, heads, heads, 128, ranks=ranks, frame_tokens=1560)
    options = by_name(plan(w, Link("by hand", bandwidth * 1e9, latency * 1e-6, "")))
    assert options["G"].seconds * 1e6 == pytest.approx(BY_HAND[case], abs=0.6)


def test_ulysses_costs_what_was_worked_out_by_hand():
    """Wan 1.3B on 4 ranks without a past, bf16: 3 / 16 of 4680 rows of 2 x 1536 numbers for q and out, at 360 GB/s and
    12 us: 2 x 19.5 us; a quarter of 4680 rows' keys and values for 3 others: 27.0 us; 61.2 us of attention."""
    w = Workload(4680, 4680, 12, 12, 128, ranks=4, frame_tokens=1560)
    ulysses = by_name(plan(w, Link("by hand", 360e9, 12e-6, "")))["U"]
    assert ulysses.seconds * 1e6 == pytest.approx(61.2 + 2 * 19.5 + 27.0, abs=0.2)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1024, 2048, 4096, 8192, 16384])
def test_a_ring_hides_its_hops_where_the_block_is_long_enough(ranks, tokens):
    """arXiv:2411.01783, equation 2: T >= P C Hkv e / (2 Hq B), whatever the length of the past."""
    link = Link("no latency", 360e9, 0.0, "")
    w = Workload(tokens, 4096 * tokens, 12, 12, 128, ranks=ranks)  # beside such a past the new keys are nothing
    waited = by_name(plan(w, link))["R"].exposed - ranks * PLAIN.merge
    long_enough = tokens >= ranks * PLAIN.attention * 2 / (2 * link.bandwidth)
    assert (waited < 1e-3 * w.past * 1e-9) == long_enough


def test_what_ulysses_and_gather_send_does_not_depend_on_the_past():
    sent = {}
    for past in (0, 1560, 28080):
        w = Workload(4680, 4680 + past, 12, 12, 128, ranks=4, frame_tokens=1560)
        options = by_name(plan(w))
        sent[past] = {name: options[name].sent for name in ("U", "G", "U2xG2")}
    assert sent[0] == sent[1560] == sent[28080]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("link", LINKS)
def test_replicas_come_first_where_there_is_a_world_for_each_rank(model, link):
    best = plan(Workload.of(model, ranks=8, worlds=8), LINKS[link]).best
    assert best.layout.replicas == 8 and best.sent == 0 and best.exposed == 0


def test_branches_go_to_ranks_of_their_own_where_the_link_is_slow():
    work = Workload.of("wan1.3b", ranks=2, branches=2)
    assert plan(work, LINKS["pcie4"]).best.layout.branches == 2
    one = by_name(plan(work, LINKS["pcie4"]))["2 branches"]
    assert 0 < one.sent == 4680 * 256 // 30  # once a step, its predictions


def test_memory_decides_before_speed():
    work = Workload.of("wan14b", ranks=8)
    free = plan(work)
    assert str(free.best.layout) == "G"
    smaller = plan(work, room=free.best.memory - 1)
    assert smaller.best.seconds > free.best.seconds and smaller.best.memory < free.best.memory
    assert not by_name(smaller)["G"].fits
    # Neither all pages nor heads that divide: frames are what is left.
    odd = Workload.of("wan14b", ranks=8, heads=39, kv_heads=39)
    assert plan(odd, room=by_name(plan(odd))["G"].memory - 1).best.layout.frames == 8


def test_on_nvlink_a_ring_is_chosen_for_nothing_that_fits_otherwise():
    for model in ("wan1.3b", "wan14b"):
        for ranks in (2, 4, 8):
            options = by_name(plan(Workload.of(model, ranks=ranks, kv_format="int8")))
            assert options["R"].seconds > options["G"].seconds


@pytest.mark.parametrize("format", ["bf16", "int8"])
@pytest.mark.parametrize("worlds, branches", [(1, 1), (3, 2)])
def test_one_rank_needs_what_the_store_plans(format, worlds, branches):
    work = Workload.of("wan1.3b", ranks=1, kv_format=format, worlds=worlds, branches=branches)
    stored = memory.plan_memory(
        layers=30, heads=12, head_dim=128, frame_tokens=1560, block_frames=3, weights=work.weights,
        policy=Policy(window=21, format=format), worlds=worlds * branches,
    )  # fmt: skip
    assert plan(work).best.memory == stored.device


def test_branches_that_share_a_past_need_it_once():
    one, shared, own = (
        plan(Workload.of("magi-4.5b", ranks=1, branches=branches, shared_past=shared)).best.memory
        for branches, shared in ((1, True), (3, True), (3, False))
    )
    assert one == shared < own


def test_a_rank_of_many_needs_its_share_of_the_pages():
    options = by_name(plan(Workload.of("wan1.3b", ranks=4)))
    pages = {name: one.memory - Workload.of("wan1.3b", ranks=4).weights for name, one in options.items()}
    assert pages["U"] * 4 == pages["U2xG2"] * 2 == pages["G"]
    assert pages["U"] < pages["U2xQ2"] < pages["U2xR2"] < pages["Q"] < pages["R"] < pages["G"] / 3


def test_what_is_not_built_is_listed_and_never_chosen():
    choice = plan(Workload.of("wan14b", ranks=8))
    pipeline, sharding = choice.not_built
    assert pipeline.seconds > 8 * choice.best.compute  # one world goes through it as through one rank
    assert sharding.memory < choice.best.memory - 0.8 * choice.workload.weights
    gather = LINKS["nvlink4"].seconds(-(-choice.workload.weights // 40) * 7 // 8)  # one layer, the others' part of it
    assert sharding.first == max(choice.best.first, gather) == gather
    assert sharding.seconds == pytest.approx(max(choice.best.seconds, gather))
    many = plan(Workload.of("wan14b", ranks=8, worlds=64))
    assert many.not_built[0].seconds < 1.2 * many.best.seconds  # 64 worlds fill it
    assert {"layer pipeline", "weight sharding"}.isdisjoint(by_name(choice))


# The table of models


def linear_parameters(layer, prompt):
    """Weights of the linear layers of a layer, but for those that only see the prompt or the timestep."""
    layers = {name: x for name, x in layer.named_modules() if isinstance(x, torch.nn.Linear)}
    unknown = [name for name in prompt if name not in layers]
    assert not unknown
    return sum(x.weight.numel() for name, x in layers.items() if name not in prompt)


def networks():
    with torch.device("meta"):
        for name, heads, layers, ffn in (("wan1.3b", 12, 30, 8960), ("wan14b", 40, 40, 13824)):
            config = WanConfig(dim=heads * 128, layers=layers, heads=heads, ffn=ffn)
            network = WanNetwork(config).to(torch.bfloat16)
            yield name, network, network.blocks[0], ["cross_attn.k", "cross_attn.v"], (layers, heads, heads, 128)
        for name, config in magi.CONFIGS.items():
            network = MagiNetwork(config).to(torch.bfloat16)
            sizes = config.layers, config.heads, config.kv_heads, config.head_dim
            layer = network.videodit_blocks.layers[0]
            prompt = ["self_attention.linear_kv_xattn", "ada_modulate_layer.proj.0"]
            yield f"magi-{name}", network, layer, prompt, sizes
        config = TinyConfig()
        network = TinyWorldModel(config)
        sizes = config.layers, config.heads, config.heads, config.head_dim
        yield "tiny", network, network.layers[0], ["cross_q", "cross_kv", "cross_out"], sizes


def test_the_models_sizes_are_the_drivers():
    seen = set()
    for name, network, layer, prompt, sizes in networks():
        row = MODELS[name]
        assert (row.layers, row.heads, row.kv_heads, row.head_dim) == sizes, name
        assert row.weights == weight_bytes(network), name
        assert row.linear == linear_parameters(layer, prompt), name
        seen.add(name)
    assert seen == set(MODELS)


def test_the_models_blocks_are_the_drivers():
    wan = ADAPTERS["self-forcing"]
    adapters = {"tiny": TINY, "wan1.3b": wan, "wan14b": wan}
    tokens = {"tiny": TinyConfig().frame_tokens, "wan1.3b": memory.frame_tokens(*wan.size)}
    tokens["wan14b"] = tokens["wan1.3b"]
    for name in ("magi-4.5b", "magi-24b"):
        adapters[name] = magi.adapter_for(name, magi.SCHEDULES[name])
        tokens[name] = memory.frame_tokens(*adapters[name].size)
    for name, row in MODELS.items():
        adapter = adapters[name]
        assert (row.block_frames, row.window, row.frame_tokens) == (adapter.block_frames, adapter.window, tokens[name])
    for name, shape in (("tiny", "tiny"), ("wan1.3b", "wan1.3b-480p"), ("wan14b", "wan14b-480p")):
        work = Workload.of(name, ranks=1)
        assert (work.tokens, work.keys, work.heads) == (SHAPES[shape].queries, SHAPES[shape].keys, SHAPES[shape].heads)


# What is printed, and what is refused


def test_explain_says_what_is_modelled_and_what_was_measured():
    work = Workload.of("wan14b", ranks=8, kv_format="int8")
    said = plan_attention(work, "nvlink4").explain()
    head, _, tables = said.partition("Modelled, not measured")
    assert "link nvlink4: 360 GB/s, 30 us (assumed" in head and "measured" not in head
    for name in ("G", "U", "U2xG4", "U4xG2", "U2xR4", "U4xQ2", "Q", "R"):
        assert f"\n   {name} " in tables or f"\n*  {name} " in tables
    assert "Not built, modelled all the same" in tables and "A ring of 8: a hop takes" in tables
    own = plan_attention(work, Link.measured(300e9, 20e-6)).explain()
    assert "link link: 300 GB/s, 20 us (measured)" in own


def test_the_command_prints_the_plan(capsys):
    assert main(["plan", "--model", "wan1.3b", "--ranks", "4", "--bandwidth", "45", "--latency", "30"]) == 0
    said = capsys.readouterr().out
    assert "45 GB/s, 30 us (measured)" in said and "Chosen: U2xG2, the fastest" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ranks", "0"], "ranks must be a whole number, at least 1, got 0"),
        (["--ranks", "8", "--memory", "20"], "memory must be at least 32.1 GB a rank .as U., got 20"),
        (["--ranks", "8", "--memory", "-1"], "memory must be a finite number above 0, got -1"),
        (["--ranks", "8", "--latency", "3"], "--bandwidth must be given too"),
        (["--ranks", "8", "--bandwidth", "0", "--latency", "3"], "bandwidth must be a finite number above 0, got 0"),
        (["--ranks", "8", "--keys", "1"], "keys must be at least the block's own 4680, got 1"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message, capsys):
    assert main(["plan", "--model", "wan14b", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


SIZES = {"tokens": 4680, "keys": 32760, "heads": 12, "kv_heads": 12, "head_dim": 128, "ranks": 4}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Workload(**SIZES | {"tokens": 1.5}), "tokens must be a whole number, at least 1, got 1.5"),
        (lambda: Workload(**SIZES | {"worlds": True}), "worlds must be a whole number, at least 1, got True"),
        (lambda: Workload(**SIZES | {"kv_heads": 5}), "heads must be a multiple of kv_heads=5, got 12"),
        (lambda: Workload(**SIZES, kv_format="latent8"), "kv_format must be one of .*, got 'latent8'"),
        (lambda: Workload(**SIZES, scratch_format="int8"), "scratch_format must be one of .*, got 'int8'"),
        (lambda: Workload(**SIZES, weights=-1), "weights must be a whole number, at least 0, got -1"),
        (lambda: Workload.of("wan2b", ranks=4), "model must be one of tiny, .*, got 'wan2b'"),
        (lambda: plan_attention(Workload(**SIZES), "nvlink9"), "link must be one of nvlink3, .*, got 'nvlink9'"),
        (lambda: plan_attention(Workload(**SIZES), device="h300"), "device must be one of a100, .*, got 'h300'"),
        (lambda: plan_attention(Workload(**SIZES), memory=math.nan), "memory must be a finite number above 0"),
        (lambda: Link.measured(math.inf, 0.0), "bandwidth must be a finite number above 0, got inf"),
        (lambda: Link.measured(1e9, -1e-6), "latency must be a finite number not below 0, got -1e-06"),
        (lambda: Device("none", 0, 1e12, 1e9), "attention must be a finite number above 0, got 0"),
    ],
)
def test_bad_input_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_planner_needs_no_torch():
    """As a module: a package above it, which imports torch, is stood in for."""
    code = (
        "import sys, types; package = types.ModuleType('inferix_kernels'); package.__path__ = ['inferix_kernels'];"
        "sys.modules['inferix_kernels'] = package; from inferix_kernels.distributed import Workload, plan_attention;"
        "print(plan_attention(Workload.of('wan14b', ranks=8)).explain()); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Chosen:" in done.stdout, done.stderr


def test_presets_say_where_they_are_from():
    assert all(one.source and one.known == "assumed" for one in (*LINKS.values(), *DEVICES.values()))
