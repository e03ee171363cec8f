"""`python -m inferix_kernels`: what runs on this machine, and why the rest does not. Each op is tried, not guessed.

`python -m inferix_kernels compile` compiles the Triton kernels for GPUs that are not here, and says what they use; with
`--arch 90a` it says so of the CUDA kernels that are built.
`python -m inferix_kernels compile --estimate` says what bounds them, by a model.
`python -m inferix_kernels hazards` checks that those leave the registers of an asynchronous product alone.
`python -m inferix_kernels tune` measures their tile sizes on the GPU that is, and writes them down.
`python -m inferix_kernels prove` compares every kernel's results on that GPU with the reference's; `auto` goes by it.
`python -m inferix_kernels fastest` times the backends of 8-bit layers on this machine; `auto` takes the fastest.
`python -m inferix_kernels --device H200` says which kernel a world's attention would take there, and why.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from . import _library, chosen, estimate, hazards, ops, sass, testing
from ._dispatch import AUTO, AUTO_CUDA, BACKENDS, PROVED, Unsupported, implementation
from ._printing import while_read
from .layout import Quantized
from .plans import make_plan
from .proofs import speeds

OPS = tuple(_library.OPS)
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
    latent_pool, latents = testing.filled_pool("latent8", [3], heads=1, page_size=8, head_dim=(16, 8), device=device)
    latent_q, latent_plan = q.new_zeros(2, 1, 24), make_plan([(2, latents.ids.tolist(), [3])], device)
    qkv = torch.zeros(3, 48, device=device)
    tokens = torch.zeros(3, 1, 16, device=device)
    matrix = Quantized(torch.zeros(3, 16, dtype=torch.int8, device=device), torch.ones(3, device=device))
    target, target_list = testing.filled_pool("int8", [3], heads=1, page_size=8, head_dim=16, device=device)
    summaries = torch.zeros(pool.pages, 1, 1, 16, device=device)
    calls: dict[str, Callable[[], object]] = {
        "kv_append": lambda: ops.kv_append(tokens, tokens, pool, where, backend=backend),
        "kv_commit": lambda: ops.kv_commit(pool, where, target, target_list, backend=backend),
        "kv_gather": lambda: ops.kv_gather([pool], where, backend=backend),
        "paged_attention": lambda: ops.paged_attention(q, pools, plan, backend=backend),
        "latent_attention": lambda: ops.latent_attention(
            latent_q, [latent_pool], latent_plan, scale=1.0, backend=backend
        ),
        "merge_attention": lambda: ops.merge_attention(q, lse, q, lse, backend=backend),
        "qkv_prologue": lambda: ops.qkv_prologue(qkv, None, None, None, pool, where, backend=backend),
        "quantize_rows": lambda: ops.quantize_rows(qkv, backend=backend),
        "add_norm": lambda: ops.add_norm(qkv, residual=qkv, norm="layer", backend=backend),
        "linear": lambda: ops.linear(matrix, matrix, backend=backend),
        "page_summaries": lambda: ops.page_summaries([pool], where, backend=backend),
        "page_scores": lambda: ops.page_scores(q, plan.q_indptr, summaries, where, backend=backend),
        "select_pages": lambda: ops.select_pages(torch.zeros(1, 1, 1, device=device), where, 1, backend=backend),
    }
    return calls[op]


def rows() -> list[tuple[str, str, str, str]]:
    return [
        (op, backend, device, try_op(op, backend, device))
        for op in OPS
        for backend in (*BACKENDS, *(["torch"] if op in AUTO_CUDA else []))
        for device in DEVICES
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m inferix_kernels", description="Without a command: what runs here.")
    parser.add_argument(
        "--device", metavar="NAME", help="a world's kernels on cpu, cuda, cuda:1, sm_90, H200, A100, ..."
    )
    commands = parser.add_subparsers(dest="command")
    ahead = commands.add_parser("compile", help="compile the Triton kernels ahead of time; needs no GPU")
    ahead.add_argument("cases", nargs="*", help='what to compile, as "linear" or "kv_append i8f8"; all by default')
    ahead.add_argument("--arch", nargs="+", metavar="SM", help="80 89 90 100 120 by default; gfx942, gfx950; 90a: CUDA")
    output = ahead.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="a list of kernels, each with all that is known of it")
    output.add_argument("--markdown", action="store_true", help="a line for each op")
    ahead.add_argument("--estimate", action="store_true", help="what bounds them, modelled: --arch 80, 90 or 90a")
    followed = commands.add_parser(
        "hazards", help="registers of asynchronous products, in the CUDA kernels that are built"
    )
    followed.add_argument("--arch", default="90a", metavar="SM", help="90a by default")
    tuner = commands.add_parser("tune", help="choose tile sizes on this GPU, for configs/<device>.json")
    tuner.add_argument("ops", nargs="*", help="ops to tune; all by default")
    prover = commands.add_parser("prove", help="try every kernel on the GPU that is here; `auto` goes by the outcome")
    prover.add_argument("on", nargs="?", default="cuda", help="cuda, cuda:1; cpu: its kernels, and nothing is stored")
    racer = commands.add_parser("fastest", help="time the backends of 8-bit layers; `auto` goes by the outcome")
    racer.add_argument("on", nargs="?", default="cpu", help="cpu (default), cuda, cuda:1")
    options = parser.parse_args(arguments)
    try:
        if options.command == "fastest":
            from .proofs import race

            return race.command(options.on)
        if options.command == "prove":
            from .proofs import prove

            return prove.command(options.on)
        if options.device:
            print(chosen.table(chosen.target(options.device)))
            return 0
        if options.command == "compile" and options.estimate:
            return estimate_command(options.arch, options.cases, options.json, options.markdown)
        if options.command == "compile":
            return compile_command(options.arch, options.cases, options.json, options.markdown)
        if options.command == "hazards":
            seen = hazards.inspect_extension(options.arch)
            print(hazards.table(seen))
            return int(any(kernel.hazards for kernel in seen))
        if options.command == "tune":
            from .triton_kernels.tune import tune

            print(f"written: {tune(options.ops)}")
            return 0
    except (Unsupported, ImportError, ValueError, sass.MissingTool) as error:  # ImportError: without Triton
        print(f"python -m inferix_kernels {options.command or '--device'}: {error}", file=sys.stderr)
        return 2
    print_machine()
    return 0


def compile_command(names: Sequence[str] | None, cases: Sequence[str], as_json: bool, as_markdown: bool) -> int:
    """0 if all is sound, 1 if a kernel spills or ptxas warns, 2 if there is nothing to compile."""
    # sm_90a and its like are targets of the CUDA kernels in csrc/, built ahead; Triton adds the letter itself.
    if names and not names[0].isdigit() and not names[0].startswith("gfx"):
        if len(names) > 1 or cases or as_json or as_markdown:
            raise Unsupported(f"--arch {names[0]} must be alone: it is a table of the CUDA kernels that are built")
        print(sass.report(names[0]))
        return 0
    from .triton_kernels import aot

    if others := [name for name in names or () if not name.isdigit() and name not in aot.AMD]:
        raise Unsupported(f"Triton's architectures are numbers, as 90, or {', '.join(aot.AMD)}: no {', '.join(others)}")
    targets = [int(name) if name.isdigit() else name for name in names] if names else aot.ARCHITECTURES
    rows: list[aot.Compilation] = []

    def seen() -> Iterator[aot.Compilation]:
        for row in aot.compile_ahead(targets, cases, counted=as_json):
            rows.append(row)
            yield row

    if as_json or as_markdown:
        list(seen())
        print(json.dumps([row._asdict() for row in rows], indent=1) if as_json else aot.markdown(rows))
    else:
        for line in aot.table(seen()):
            print(line, flush=True)
    if not rows:
        raise Unsupported(f"no case begins with {' or '.join(map(repr, cases))}")
    return int(not all(row.sound for row in rows))


def estimate_command(names: Sequence[str] | None, cases: Sequence[str], as_json: bool, as_markdown: bool) -> int:
    """0 if there was something to estimate, else 2. 90 by default; 90a stands for the CUDA kernels that are built."""
    if as_json:
        raise Unsupported("--estimate has no --json")
    if names == ["90a"]:
        if cases:
            raise Unsupported("--arch 90a takes no cases: it is an estimate of the CUDA kernels that are built")
        rows = list(estimate.of_extension())
    else:
        if wrong := [name for name in names or () if not name.isdigit()]:
            raise Unsupported(f"--estimate takes --arch 80, 90 or, alone, 90a, got {wrong[0]}")
        rows = list(estimate.of_triton([int(name) for name in names or (90,)], cases))
    if not rows:
        raise Unsupported(f"no case with products begins with {' or '.join(map(repr, cases))}")
    for line in estimate.markdown(rows) if as_markdown else estimate.table(rows):
        print(line)
    return 0


def print_machine() -> None:
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()},"
        f" {torch.get_num_threads()} threads, CPU kernels: {instructions()}, GPU: {gpu()}"
    )
    order = "; ".join(f"{', '.join(names)} on {device}" for device, names in AUTO.items())
    print(f"auto tries, in this order: {order}; on a GPU, of kernels that were proved there: {', '.join(PROVED)}")
    print(f"linear on a GPU: those that were proved there, then {', '.join(AUTO_CUDA['linear'])}; {measured()}")
    print(chosen.table(chosen.target("cuda" if torch.cuda.is_available() else "cpu")) + "\n")
    table = [("op", "backend", "device", "runs here?"), *rows()]
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)).rstrip())


def measured() -> str:
    """Is there a record of this machine's own times?"""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    there = speeds.of_device(device) is not None
    said = "as it was measured" if there else "not measured: python -m inferix_kernels fastest"
    return f"on {speeds.name_of(device)}: {said}"


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
    sys.exit(while_read(main))
