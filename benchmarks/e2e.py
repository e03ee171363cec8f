"""The whole loop, block by block: our attention over pages against the same loop with gather + SDPA, taking turns.

`run e2e --model tiny` is the world that ships with the repository. `--model self-forcing` takes a checkpoint with
`--weights`; without one it has random weights, the published 1.3B at 480 x 832 on a GPU and a small one on a CPU, and a
tiny VAE (TAEHV's architecture) with random weights.

The last row says what it is worth to decode the pictures of a block while the next one is made: latent frames a second
by the wall clock over runs of blocks, the last one's pictures included, and the same with pictures after each block.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from inferix_kernels import KVStore, PageList, Plan, Policy, Unsupported, kv_gather
from inferix_kernels.layout import scratch_format
from inferix_kernels.store import attention as strategies

from .harness.case import error_of
from .harness.ledger import ROOT
from .harness.measure import Settings
from .harness.memory import Peak
from .harness.rows import Row

KV = "int8"
RUNS, RUN = 4, 6  # of how many blocks each, with pictures beside and after
CHECKED = 3  # blocks whose latents are compared: by then the past is read back from its committed pages
# Both loops read the same codes; they differ by rounding, which the denoising of three blocks carries on.
LIMIT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


class GatherAttention:
    """paged_attention as one writes it without a kernel: dequantize the pages of a segment, then torch's attention."""

    def __init__(self) -> None:
        self.cuts: dict[int, tuple[Plan, list[int], list[int]]] = {}  # a plan's row pointers, on the host

    def __call__(self, q: Tensor, pools: Any, plan: Plan, *, scale: Any = None, **rest: Any) -> tuple[Tensor, Tensor]:
        if id(plan) not in self.cuts:
            self.cuts[id(plan)] = plan, plan.q_indptr.tolist(), plan.page_indptr.tolist()
        _, rows, pages = self.cuts[id(plan)]
        parts = []
        for s in range(len(rows) - 1):
            where = PageList(*(x[pages[s] : pages[s + 1]] for x in (plan.page_ids, plan.page_lens)))
            k, v = kv_gather(pools, where, q.dtype, backend=rest.get("backend", "auto"))
            q_, k_, v_ = (x.transpose(0, 1)[None] for x in (q[rows[s] : rows[s + 1]], k, v))
            out = F.scaled_dot_product_attention(q_, k_, v_, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts), rest["lse"]


@dataclasses.dataclass
class Loop:
    """One running world, and the times of its blocks."""

    name: str
    decoder: Any
    conditioning: Callable[[], Any]
    pictures: Callable[[Tensor], Any] | None
    attention: Callable[[], AbstractContextManager[Any]]
    device: str
    clock: Callable[[], float]
    latents: list[Tensor] = dataclasses.field(default_factory=list)
    shown: list[Any] = dataclasses.field(default_factory=list)  # pictures of these blocks
    made: list[float] = dataclasses.field(default_factory=list)  # seconds per block, of the network
    clean: list[float] = dataclasses.field(default_factory=list)  # of these, in a clean pass of its own
    decoded: list[float] = dataclasses.field(default_factory=list)
    memory: int = 0

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self.clock()

    def step(self) -> None:
        with self.attention(), Peak(self.device) as peak:
            started = self.now()
            latents = self.decoder.step(self.conditioning())
            denoised = self.now()
            if not self.decoder.model.adapter.fused:
                self.decoder.commit_pending()
            made = self.now()
            pictures = self.pictures(latents) if self.pictures else None
            self.decoded.append(self.now() - made)
        self.made.append(made - started)
        self.clean.append(made - denoised)
        self.memory = max(self.memory, peak.bytes)
        if len(self.latents) < CHECKED:
            self.latents.append(latents.float().cpu())
            self.shown.append(pictures)

    def metrics(self) -> dict[str, float]:
        """Per block after the first, which has no past and is often made in more steps."""
        blocks = [a + b for a, b in zip(self.made, self.decoded)][1:]
        table, adapter = self.decoder.table, self.decoder.model.adapter
        frames = self.decoder.frames / len(self.made)
        network = statistics.median(self.made[1:])
        clean = statistics.median(self.clean[1:])
        ordered = sorted(blocks)
        shown = {
            "first frame ms": 1e3 * (self.made[0] + self.decoded[0]),
            "block p50 ms": 1e3 * statistics.median(blocks),
            "p95 ms": 1e3 * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
            "denoise ms": 1e3 * (network - clean),
            "clean pass ms": 1e3 * clean,
            "decode ms": 1e3 * statistics.median(self.decoded[1:]),
            "window full %": 100 * min(1.0, (len(table.held) + adapter.block_frames) / adapter.window),
            "latent FPS": frames / network,
            "with decode": frames / statistics.median(blocks),
            "peak MiB": self.memory / 2**20,
            "KV MiB": sum(table.store.nbytes.values()) / 2**20,
        }
        missing = ["decode ms", "with decode"] if self.pictures is None else []
        missing += ["clean pass ms"] if adapter.fused else []
        return {name: value for name, value in shown.items() if name not in missing}


def load(settings: Settings) -> tuple[Any, Callable[[], Any]]:
    """(model, conditioning of the next block)."""
    sys.path.append(str(ROOT / "python"))  # from a plain checkout, where inferix is not installed
    from inferix.models import load_model

    model: Any
    if settings.model == "tiny":
        model = load_model("tiny", settings.weights)
        conditioning = model.conditioning(model.presentation.example_prompts[0], ["right"] * model.adapter.block_frames)
        return model, lambda: conditioning
    if settings.weights:
        model = load_model(settings.model, settings.weights, device=settings.device)
    else:
        model = random_wan(settings.device)
    if model.text is not None:
        conditioning = model.conditioning(model.presentation.example_prompts[0], [])
    else:
        generator = torch.Generator().manual_seed(0)
        embedding = torch.randn(40, model.network.config.text_dim, generator=generator)
        conditioning = model.conditioning_from(embedding)
    return model, lambda: conditioning


def random_wan(device: str) -> Any:
    """Self Forcing's architecture with random weights: the published size on a GPU, a hundredth of it on a CPU."""
    from inferix.models.wan import ADAPTERS, Wan, WanConfig

    from .wan_block import SIZES, random_network

    if device == "cuda":
        return Wan(random_network(SIZES["1.3B"], torch.bfloat16, device), ADAPTERS["self-forcing"])
    config = WanConfig(dim=192, layers=4, heads=3, ffn=768, text_dim=64, text_len=64)
    adapter = dataclasses.replace(ADAPTERS["self-forcing"], size=(128, 224), window=9)
    return Wan(random_network(config, torch.float32), adapter)


def open_loop(
    name: str, model: Any, conditioning: Callable[[], Any], settings: Settings, backend: str = "auto"
) -> Loop:
    """A world of its own, from the same seed."""
    from inferix.decode.sequential import SequentialDecoder

    adapter = model.adapter
    policy = Policy(adapter.window, adapter.sink, format=KV)
    store = KVStore(
        layers=model.layers,
        heads=model.heads,
        head_dim=model.head_dim,
        frame_tokens=model.frame_tokens,
        block_frames=max(adapter.block_frames, adapter.first_block_frames),
        pools=policy.capacity(),
        scratch_format=scratch_format(settings.device, model.dtype),
        device=settings.device,
        backend=backend,
    )
    decoder = SequentialDecoder(model, store.open(policy), torch.Generator().manual_seed(0))
    try:
        pictures = model.stream()
    except ValueError:  # no VAE next to the weights
        pictures = None
    gather = GatherAttention()
    attention = (
        (lambda: mock.patch.object(strategies, "paged_attention", gather)) if name == "gather-sdpa" else nullcontext
    )
    clock = time.process_time if settings.timer == "cpu" else time.perf_counter
    return Loop(name, decoder, conditioning, pictures, attention, settings.device, clock)


def run(settings: Settings, shapes: Sequence[str]) -> Iterator[Row]:
    """Rows of our loop, of the same with every clean pass by itself, of the baseline, and of our loop with its pictures
    beside the next block; `shapes` are not used."""
    if settings.model == "tiny" and settings.device == "cuda":
        yield Row("e2e", "loop", "tiny", "ours", KV, "cuda", "unsupported", "the tiny world runs on CPUs")
        return
    row = Row("e2e", "loop", settings.model, "ours", KV, settings.device, "ok")
    try:
        loops = list(open_loops(settings))
        for number in range(max(settings.blocks, CHECKED)):
            for loop in loops[:: 1 if number % 2 else -1]:
                loop.step()
    except Unsupported as reason:
        yield dataclasses.replace(row, status="unsupported", note=str(reason))
        return
    except ModuleNotFoundError as reason:
        yield dataclasses.replace(row, status="absent", note=f"pip install {reason.name}")
        return
    limit = LIMIT[torch.float32 if settings.device == "cpu" else torch.bfloat16]
    *mine, baseline = loops
    right = True
    for loop in loops:
        shown = dataclasses.replace(row, contender=loop.name, error={}, metrics={})
        if loop in mine:
            error = error_of(torch.cat(loop.latents), torch.cat(baseline.latents))
            shown.error = {**error._asdict(), "limit": limit}
            if not error.relative <= limit:
                right, shown.status, shown.note = (
                    False,
                    "wrong",
                    f"latents differ from the baseline's by {error.relative:.1e}",
                )
        if shown.status == "ok":
            shown.metrics = loop.metrics()
            shown.seconds = [a + b for a, b in zip(loop.made, loop.decoded)][1:]
        yield shown
    if loops[0].pictures is not None and right:
        yield pictures_beside(dataclasses.replace(row, contender="ours-beside"), loops[0], settings)


def pictures_beside(row: Row, after: Loop, settings: Settings) -> Row:
    """The row, with the rate of a new world whose pictures are decoded beside the next block, and that of one whose
    pictures come after each block. They must be the same, bit for bit."""
    from inferix.history import Pictures

    beside = open_loop("ours", after.decoder.model, after.conditioning, settings)
    pictures = Pictures(beside.decoder.model.stream(), 0, settings.device)

    def run_after(blocks: int) -> list[Any]:
        assert after.pictures is not None
        return [after.pictures(after.decoder.step(after.conditioning())) for _ in range(blocks)]

    def run_beside(blocks: int) -> list[Any]:
        steps = (beside.decoder.step(beside.conditioning()) for _ in range(blocks))
        return [coming.result() for coming in [pictures.begin(latents, 0, "a block") for latents in steps]]

    made = run_beside(len(after.made))
    if not all(map(np.array_equal, made, after.shown)):
        return dataclasses.replace(row, status="wrong", note="pictures beside the next block are not the same")
    del made
    rates: dict[str, list[float]] = {"decode beside": [], "decode after": []}
    runs = (("decode beside", run_beside), ("decode after", run_after))
    blocks = min(RUN, settings.blocks)
    for turn in range(RUNS if blocks == RUN else 1):
        for name, run in runs[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()  # a result is on the host: a GPU is done with it
            run(blocks)
            rates[name].append(blocks * beside.decoder.model.adapter.block_frames / (time.perf_counter() - started))
    row.metrics = {name: statistics.median(found) for name, found in rates.items()}
    return row


def random_vae(device: str) -> Any:
    """TAEHV's architecture with random weights: the published size on a GPU, a sixty-fourth of it on a CPU."""
    from inferix.models.wan.tiny_vae import DECODER, ENCODER, TinyNetwork, TinyVAE

    torch.manual_seed(0)
    if device == "cuda":
        return TinyVAE(TinyNetwork().to(device, torch.float16))
    return TinyVAE(TinyNetwork([n // 8 for n in ENCODER], [n // 8 for n in DECODER]))


def open_loops(settings: Settings) -> Iterator[Loop]:
    model, conditioning = load(settings)
    if settings.model != "tiny" and not settings.weights:
        model.open_video = random_vae(settings.device).open
    yield open_loop("ours", model, conditioning, settings)
    if model.adapter.fused:  # a clean pass that shares a forward has no time of its own
        apart = copy.copy(model)
        apart.adapter = dataclasses.replace(model.adapter, fused=False)
        yield open_loop("ours-separate", apart, conditioning, settings)
    yield open_loop("gather-sdpa", model, conditioning, settings)
