"""What a layer's attention costs the host besides torch's launches: Python, with kernels that do nothing.

A pass over a block of Wan 1.3B's layers (12 heads of 128, bfloat16) by itself, and over a clean block and a noisy one.
"null": our checks, the choice of a backend and the store's part of a layer, over a backend that returns at once.
"triton": the same and what Triton's ops do up to each launch. Sizes do not matter, as nothing is computed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from unittest import mock

import torch

from inferix_kernels import KVStore, PassBuffers, Policy, Unsupported, _dispatch, reference
from inferix_kernels.store import Pass

from .harness.measure import Settings
from .harness.rows import Row

LAYERS, HEADS, WIDTH, TOKENS = 30, 12, 128, 24
TARGET = 90


def run(settings: Settings, shapes: Sequence[str]) -> Iterator[Row]:
    for contender in ("null", "triton"):
        name = f"ours-{contender}"
        if not settings.wants_name(name):
            continue
        row = Row("host", "python of a layer", f"{LAYERS} layers", name, "int8+bf16", settings.device, "ok")
        if settings.device != "cpu":
            row.status, row.note = "unsupported", "kernels do nothing: there is no difference between devices"
        else:
            try:
                row.metrics = measure(contender, max(1, settings.rounds))
            except (Unsupported, ImportError) as reason:
                row.status, row.note = "unsupported", str(reason)
        yield row


def measure(contender: str, rounds: int) -> dict[str, float]:
    """Microseconds of a layer, the least of some rounds."""
    with backend(contender) as name:
        store = KVStore(
            layers=LAYERS,
            heads=HEADS,
            head_dim=WIDTH,
            frame_tokens=TOKENS,
            block_frames=3,
            pools={"int8": 9},
            scratch_format="bf16",
            page_size=8,
            backend=name,
        )
        table, buffers = store.open(Policy(window=9)), PassBuffers()
        means = tuple(torch.zeros(HEADS, WIDTH) for _ in range(LAYERS))
        table.state = table.state._replace(k_means=means)
        first, second = (table.open_block(3) for _ in range(2))
        noisy = table.plan([first], rope(3), buffers=buffers)
        fused = table.plan([first, second], rope(6), commit=first, buffers=buffers)
        return {
            "noisy us": 1e6 * min(layer_seconds(noisy, 3) for _ in range(rounds)),
            "fused us": 1e6 * min(layer_seconds(fused, 6) for _ in range(rounds)),
        }


def rope(frames: int) -> torch.Tensor:
    return torch.zeros(frames * TOKENS, WIDTH // 2, 2)


def layer_seconds(planned: Pass, frames: int) -> float:
    """Of one layer of the pass, on average over all."""
    qkv = torch.zeros(frames * TOKENS, 3 * HEADS * WIDTH, dtype=torch.bfloat16)
    norm_q, norm_k = (torch.ones(HEADS * WIDTH, dtype=torch.bfloat16) for _ in range(2))
    with torch.inference_mode():
        started = time.process_time()
        for layer in range(LAYERS):
            planned.attend(layer, qkv, norm_q, norm_k)
        return (time.process_time() - started) / LAYERS


@contextlib.contextmanager
def backend(contender: str) -> Iterator[str]:
    """The name of a backend whose kernels do nothing."""
    if contender == "null":
        with mock.patch.dict(_dispatch.BACKENDS, {"null": f"{__package__}.null_backend"}):
            yield "null"
        return
    from inferix_kernels.triton_kernels.launch import launch_nothing

    def unchecked(*args: object, **kwargs: object) -> None:
        """On a GPU nobody looks at a list's numbers."""

    with launch_nothing(TARGET), mock.patch.multiple(reference, check_plan=unchecked, spans=unchecked):
        yield "triton"
