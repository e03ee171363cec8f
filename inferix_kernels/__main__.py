"""`python -m inferix_kernels`: what runs on this machine, and why the rest does not. Each op is tried, not guessed."""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch

from . import ops, testing
from ._dispatch import AUTO, BACKENDS, Unsupported, implementation
from .layout import Quantized

OPS = (
    "kv_append",
    "kv_commit",
    "kv_gather",
    "paged_attention",
    "merge_attention",
    "qkv_prologue",
    "quantize_rows",
    "linear",
)
DEVICES = tuple(AUTO)


def try_op(op: str, backend: str, device: str) -> str:
    """Run an op on a handful of numbers: "runs", or the reason why it can not."""
    try:
        implementation(op, backend)
        if device == "cuda" and not torch.cuda.is_available():
            return "no GPU here" + without_gpu(op, backend)
        call_for(op, backend, device)()
        if device == "cuda":
            torch.cuda.synchronize()  # a kernel that fails does so here
    except Unsupported as error:
        return str(error).removeprefix(f"{op}: ")
    return "runs, in Triton's interpreter" if (backend, device) == ("triton", "cpu") else "runs"


def without_gpu(op: str, backend: str) -> str:
    """What is known of an op's GPU kernel without a GPU."""
    if backend == "triton":
        return "; its kernel is checked in Triton's interpreter, never run on a GPU"
    if backend != "compiled":
        return ""
    from . import compiled

    if not compiled.HAS_CUDA:
        raise Unsupported("built without nvcc")
    if op not in compiled.CUDA_OPS:
        raise Unsupported("no CUDA kernel yet")
    return "; its kernel is built, never run on a GPU"


def call_for(op: str, backend: str, device: str) -> Callable[[], object]:
    pool, where = testing.filled_pool("fp32", [3], heads=1, page_size=8, head_dim=16, device=device)
    q, pools, plan = testing.attention_inputs([2], [3], query_heads=1, heads=1, head_dim=16, device=device)
    lse = q[:, :, 0].contiguous()
    qkv = torch.zeros(3, 48, device=device)
    tokens = torch.zeros(3, 1, 16, device=device)
    matrix = Quantized(torch.zeros(3, 16, dtype=torch.int8, device=device), torch.ones(3, device=device))
    target, target_list = testing.filled_pool("int8", [3], heads=1, page_size=8, head_dim=16, device=device)
    calls: dict[str, Callable[[], object]] = {
        "kv_append": lambda: ops.kv_append(tokens, tokens, pool, where, backend=backend),
        "kv_commit": lambda: ops.kv_commit(pool, where, target, target_list, backend=backend),
        "kv_gather": lambda: ops.kv_gather([pool], where, backend=backend),
        "paged_attention": lambda: ops.paged_attention(q, pools, plan, backend=backend),
        "merge_attention": lambda: ops.merge_attention(q, lse, q, lse, backend=backend),
        "qkv_prologue": lambda: ops.qkv_prologue(qkv, None, None, None, pool, where, backend=backend),
        "quantize_rows": lambda: ops.quantize_rows(qkv, backend=backend),
        "linear": lambda: ops.linear(matrix, matrix, backend=backend),
    }
    return calls[op]


def rows() -> list[tuple[str, str, str, str]]:
    return [
        (op, backend, device, try_op(op, backend, device)) for op in OPS for backend in BACKENDS for device in DEVICES
    ]


def main() -> None:
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()},"
        f" {torch.get_num_threads()} threads, CPU kernels: {instructions()}, GPU: {gpu()}"
    )
    order = "; ".join(f"{', '.join(names)} on {device}" for device, names in AUTO.items())
    print(f"auto tries, in this order: {order}\n")
    table = [("op", "backend", "device", "runs here?"), *rows()]
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)).rstrip())


def instructions() -> str:
    """The level that run-time dispatch has chosen for the C++ kernels."""
    try:
        from . import compiled
    except ImportError:
        return "not built"
    name: str = compiled.ISA.name
    return name


def gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


if __name__ == "__main__":
    main()
