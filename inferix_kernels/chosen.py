"""Which kernel `auto` takes for a world's attention on a named device, and why; the device need not be here.

print(table(target("H200")))
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ._dispatch import AUTO, PROVED, Unsupported, implementation
from .layout import KV_FORMATS, KVPages, scratch_format
from .plans import make_plan
from .proofs import stored

# GPUs by the names people know, and their compute capability.
GPUS = {
    "A100": 80, "A800": 80, "A30": 80, "A10": 86, "A40": 86, "RTX 3090": 86, "L4": 89, "L40S": 89, "RTX 4090": 89,
    "H100": 90, "H200": 90, "H800": 90, "H20": 90, "GH200": 90, "B200": 100, "GB200": 100, "B300": 103, "RTX 5090": 120,
}  # fmt: skip
HOPPER = 90


class Target(NamedTuple):
    """A device, here or not.

    Attributes:
        kind: "cpu" or "cuda".
        capability: 90 for sm_90; 0 for a CPU.
        proof: what was proved on it, if it is here.
    """

    name: str
    kind: str
    capability: int = 0
    proof: stored.Proof | None = None


class Choice(NamedTuple):
    """The backend that runs ("" if none can), and a reason for each that comes before it or would be better."""

    backend: str
    reasons: tuple[str, ...]


def target(name: str) -> Target:
    """A device by name: "cpu", "cuda", "cuda:1", "sm_90", or a GPU's as in GPUS.

    Raises:
        ValueError: it is none of these, or a GPU that should be here is not.
    """
    if name == "cpu":
        return Target("cpu", "cpu")
    if re.fullmatch(r"cuda(:\d+)?", name):
        index = int(name.partition(":")[2] or 0)
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise ValueError(f"device must be a GPU that is here, got {name}: name its kind instead, as H100 or sm_90")
        device = torch.device("cuda", index)
        of = stored.identity(device)
        return Target(of.gpu, "cuda", int(of.capability.replace(".", "")), stored.of_device(device))
    if match := re.fullmatch(r"sm_(\d{2,3})a?", name):
        return Target(name, "cuda", int(match[1]))
    known = {gpu.replace(" ", "").lower(): gpu for gpu in GPUS}
    if gpu := known.get(name.replace(" ", "").lower()):
        return Target(gpu, "cuda", GPUS[gpu])
    raise ValueError(f"device must be cpu, cuda, cuda:N, sm_NN or one of {', '.join(GPUS)}, got {name!r}")


def attention(
    formats: Sequence[str],
    on: Target,
    *,
    dtype: torch.dtype = torch.bfloat16,
    heads: int = 12,
    query_heads: int | None = None,
    head_dim: int = 128,
    page_size: int = 64,
    precision: str = "auto",
) -> Choice:
    """What runs paged_attention over pools of these formats.

    Args:
        formats: of the pools, in order, scratch last.
        dtype: of q.
        precision: as for ops.paged_attention.
    """
    pools = [KVPages.empty(format, 1, heads, page_size, head_dim) for format in formats]
    q = torch.zeros(1, query_heads or heads, head_dim, dtype=dtype)
    order = [(name, "") for name in AUTO[on.kind]]
    if on.kind == "cuda":
        eight_bit = precision == "8bit"
        order = [*stored.rank(on.proof, "paged_attention", formats, eight_bit, AUTO["cuda"], PROVED)]
    said = {name: wrong or refusal(name, on, q, pools, precision) for name, wrong in order}
    taken = next((name for name, why in said.items() if not why), "")
    reasons = [f"{name}: {why}" for name, why in said.items() if why]
    if on.kind == "cuda" and taken != "compiled" and not said["compiled"]:
        reasons.append("compiled: takes these pages, but is not proved on this GPU: python -m inferix_kernels prove")
    return Choice(taken, tuple(reasons))


def refusal(backend: str, on: Target, q: torch.Tensor, pools: Sequence[KVPages], precision: str = "auto") -> str:
    """Why a backend's paged_attention can not take this on the device; "" if it can."""
    try:
        implementation("paged_attention", backend)
        if on.kind == "cuda" and backend == "compiled":
            from . import compiled

            plan = make_plan([(len(q), [], [])])
            compiled.require_attention(q, pools, plan, precision)
            if on.capability != HOPPER:
                raise Unsupported(f"needs sm_90, a Hopper GPU, and this is sm_{on.capability}")
        if backend == "triton" and on.capability < 80:
            raise Unsupported(f"needs sm_80 or later, and this is sm_{on.capability}")
    except Unsupported as error:
        return str(error).removeprefix("paged_attention: ")
    return ""


def table(on: Target, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128) -> str:
    """For every `kv` format of a world whose network works in `dtype`: the kernel of its attention, and why."""
    scratch = scratch_format(on.kind, dtype)
    lines = [f"attention of a world on {on.name}{f' (sm_{on.capability})' if on.capability else ''}, scratch {scratch}"]
    for format in KV_FORMATS:
        choice = attention((format, scratch), on, dtype=dtype, head_dim=head_dim)
        lines.append("  ".join([f"  kv {format:5}", f"{choice.backend or 'none':9}", *choice.reasons]).rstrip())
    return "\n".join(lines)
