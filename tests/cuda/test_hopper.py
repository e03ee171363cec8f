"""The Hopper attention kernels without a GPU: emulated on the CPU, and their SASS inspected."""

import functools
import importlib.util
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.attention import limits_of
from inferix_kernels import (
    KVPages,
    PageList,
    Unsupported,
    _dispatch,
    compiled,
    kv_append,
    make_plan,
    paged_attention,
    quantize_rows,
    sass,
)
from inferix_kernels.sass import KINDS
from inferix_kernels.testing import attention_inputs
from tests.cuda import machine

EXTENSION = importlib.util.find_spec("inferix_kernels._C")
with_nvcc = pytest.mark.skipif(not compiled.HAS_CUDA, reason="the extension was built without nvcc")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    made: dict[str, Path] = {}

    def run(source: str, *arguments: str) -> subprocess.CompletedProcess:
        if source not in made:
            made[source] = machine.build(f"{source}.cpp", tmp_path_factory.mktemp(source))
        return subprocess.run([made[source], *arguments], capture_output=True, text=True, timeout=600)

    return run


def test_layouts_and_the_split_of_work_against_brute_force(program):
    result = program("layouts")
    assert result.stdout == "ok\n", result.stderr


@pytest.mark.parametrize(
    "mistake, report",
    [
        ("an arrival too few", "deadlock"),
        ("no wait for the stage", "too many"),
        ("bytes too many", "deadlock"),
        ("no wait for the copy", ""),  # garbage, or barriers out of step
        ("the wrong phase", ""),
        ("no wait for the product", "a wrong product"),
    ],
)
def test_the_machine_notices_mistakes(program, mistake, report):
    assert program("faults", "none").returncode == 0
    result = program("faults", mistake)
    assert result.returncode == 1 and report in result.stderr


def test_the_kernels_attend_as_softmax_does(program):
    """Pages of all formats, multiplied in bf16 or in 8 bits; plans of every kind, a third of them with each format;
    threads in a random order, one of many: `python -m tests.soak.soak_hopper` tries all plans, and other orders."""
    result = program("attention_sm90", "0", "3")
    assert result.returncode == 0 and result.stdout.count("ok") == 2 * 20 + 20, result.stdout + result.stderr


@functools.cache  # nvdisasm takes seconds
def kernels_of(arch: str) -> dict[str, sass.Kernel]:
    return {kernel.name: kernel for kernel in sass.kernels(Path(EXTENSION.origin), arch)}


@pytest.fixture
def kernels():
    try:
        return kernels_of("90a")
    except sass.MissingTool as error:
        pytest.skip(str(error))


@with_nvcc
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", [64, 128])
def test_attention_uses_the_tensor_cores_meant(kernels, kind, D):
    counts = kernels[f"attention_kernel<{kind}, {D}>"].instructions
    used = {opcode for opcode in ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA") if counts[opcode]}
    assert used == {"i8f8": {"IGMMA", "QGMMA"}, "fp8": {"QGMMA"}}.get(kind, {"HGMMA"})
    assert counts["USETMAXREG"] == 2 and counts["LDG.128"]
    # Through tensor maps, or as plain bytes: rows of codes that are widened lie together in the page.
    assert counts["UTMALDG"] or counts["UBLKCP"]
    assert (counts["UTMALDG"] == 0) == (kind in ("wide int8", "wide int4"))


@pytest.mark.parametrize(
    "said, status", [("wgmma.mma_async instructions are serialized due to", 1), ("all is well", 0), ("; exit 3", 3)]
)
def test_a_build_in_which_wgmma_is_serialized_fails(said, status):
    launcher = Path(__file__).parents[2] / "csrc" / "cuda" / "strict_nvcc.sh"
    result = subprocess.run(["sh", launcher, "sh", "-c", f"echo 'ptxas info : ' {said}"], capture_output=True)
    assert result.returncode == status


@with_nvcc
def test_kernels_keep_within_their_registers(kernels):
    assert {name for name in kernels if name.startswith("attention_kernel")} == {
        f"attention_kernel<{kind}, {D}>" for kind in KINDS for D in (64, 128)
    }
    for name, kernel in kernels.items():
        attends = name.startswith("attention_kernel")
        # At launch. Attention needs all of them: 4 * 128 become 3 * 160 + 32, or the last to ask would wait for ever.
        assert kernel.registers == 128 if attends else kernel.registers <= 255
        # Then registers move to the warpgroups that multiply: kMultiplyingRegisters, kLoadingRegisters.
        assert not attends or (64 < kernel.highest["inc"] < 160 and 8 < kernel.highest["dec"] < 32)
        assert kernel.stack == 0 and not {"LDL", "STL"} & set(kernel.instructions), f"{name} spills registers"


@with_nvcc
@pytest.mark.parametrize("op", ["kv_append_kernel", "kv_commit_kernel", "kv_gather_kernel", "qkv_prologue_kernel"])
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_page_ops_load_16_bytes_at_a_time(op, arch):
    try:
        found = kernels_of(arch)
    except sass.MissingTool as error:
        pytest.skip(str(error))
    assert found[op].instructions["LDG.128"] and not found[op].instructions["LDL"]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dtype": torch.float32}, "takes q in bfloat16 over such pages, got float32"),
        ({"head_dim": 96}, "needs head_dim 64 or 128, got 96"),
        ({"page_size": 40, "formats": ("int8",)}, "multiple of 64 for 8-bit and 4-bit pages, got 40"),
        ({"formats": ("fp32",)}, "reads bf16, fp16, int8, i8f8, fp8 and int4 pages only"),
        ({"formats": ("bf16", "fp16")}, "takes q in float16 over such pages, got bfloat16"),
        ({"arrivals": True}, r"waits for no pages: plan\.arrivals must be None"),
    ],
)
@with_nvcc
def test_what_the_hopper_kernel_does_not_take_is_named(monkeypatch, changes, reason):
    sizes = {
        "query_heads": 2,
        "heads": 2,
        "head_dim": 64,
        "page_size": 64,
        "formats": ("bf16",),
        "dtype": torch.bfloat16,
    }
    sizes |= changes
    arrives = sizes.pop("arrivals", False)
    q, pools, plan = attention_inputs([3], [7], **sizes)
    if arrives:
        plan = plan._replace(arrivals=torch.zeros(1, 2, dtype=torch.int32), counters=torch.zeros(1, dtype=torch.int32))

    def run(op, like, **arguments):
        try:
            getattr(compiled._C, op)(arguments, stream=0, workspace=lambda size: 0)
        except compiled._C.Unsupported as error:
            raise Unsupported(str(error)) from error

    monkeypatch.setattr(compiled, "_run", run)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
    with pytest.raises(Unsupported, match=f"paged_attention: the Hopper kernel .*{reason}"):
        compiled.paged_attention(q, pools, plan, scale=0.125, out=out, lse=lse)


def test_what_was_prepared_for_another_plan_pool_or_q_is_refused():
    _, pools, plan = attention_inputs([3], [7, 5], query_heads=2, heads=2, head_dim=64, page_size=64)
    q = SimpleNamespace(is_cuda=True, shape=torch.Size([3, 2, 64]))  # of which nothing is read
    made = torch.zeros(256, dtype=torch.uint8)
    compiled._PREPARED[made] = compiled._prepared_for(q, pools, plan)
    ready = plan._replace(prepared=made)
    assert compiled._prepared(q, pools, ready) == made.data_ptr() and compiled._prepared(q, pools, plan) == 0
    more = [KVPages.empty("fp32", pools[0].pages + 1, 2, 64, 64)]
    for other in (
        (SimpleNamespace(is_cuda=True, shape=torch.Size([4, 2, 64])), pools, ready),
        (q, more, ready),
        (q, pools, ready._replace(page_ids=plan.page_ids.clone())),
        (q, pools, ready._replace(page_bias=torch.zeros(2))),
        (q, pools, ready._replace(prepared=made.clone())),
    ):
        with pytest.raises(ValueError, match=r"plan\.prepared must be what prepare_attention has made of this plan"):
            compiled._prepared(*other)


def test_a_plan_is_prepared_for_the_kernel_that_will_run(monkeypatch):
    """That is the first of `auto` that takes the arguments; a backend that is named; never on a CPU."""
    plan = make_plan([(1, [0], [1])])
    ready = plan._replace(prepared=torch.zeros(1, dtype=torch.uint8))

    def prepare(q, pools, plan):
        if q.refused:
            raise Unsupported("not such pages")
        return ready

    monkeypatch.setattr(_dispatch, "implementation", lambda op, name: {"compiled": prepare}[name])
    cuda = torch.device("cuda")
    for order, refused, backend, device, want in (
        ([("compiled", ""), ("triton", "")], False, "auto", cuda, ready),
        ([("compiled", ""), ("triton", "")], True, "auto", cuda, plan),
        ([("triton", ""), ("compiled", "")], False, "auto", cuda, plan),
        ([("triton", "wrong here"), ("compiled", "")], False, "auto", cuda, ready),
        ([("triton", "")], False, "compiled", cuda, ready),
        ([("compiled", "")], False, "triton", cuda, plan),
        ([("compiled", "")], False, "auto", torch.device("cpu"), plan),
    ):
        monkeypatch.setattr(_dispatch, "candidates", lambda *_, order=order: order)
        q = SimpleNamespace(device=device, refused=refused)
        assert _dispatch.prepared_plan(q, [], plan, backend) is want


@pytest.mark.parametrize("format, precision", limits_of("cuda"))
def test_a_format_leaves_less_error_than_bringup_allows(format, precision):
    """Keys and values as the pages hold them, and q in 8 bits where it is; what kernels round besides is less."""
    if "+" in format:
        pytest.skip("two pools, each of a format that has a case of its own")
    limit = limits_of("cuda")[format, precision]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(64, 1, 128, generator=generator).bfloat16().float()
    k, v = (torch.randn(2048, 1, 128, generator=generator).bfloat16() for _ in range(2))
    pool, pages, lens = KVPages.empty(format, 32, 1, 64, 128), range(32), [64] * 32
    kv_append(k, v, pool, PageList.of(pages, lens), backend="reference")
    exact = (q[:, 0] @ k[:, 0].float().T * 128**-0.5).softmax(-1) @ v[:, 0].float()
    if precision == "8bit":
        codes, scales = quantize_rows(q[:, 0], pool.sides[0].codec.dtype, backend="reference")
        q = (codes.float() * scales[:, None])[:, None]
    got = paged_attention(q, [pool], make_plan([(64, pages, lens)]), backend="reference")[0][:, 0]
    assert (got - exact).norm() < limit * exact.norm()
