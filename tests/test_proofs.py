"""What is proved on a GPU decides what `auto` takes there: the order, the store, the processes, a world's kernels."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from inferix import World, cli
from inferix.models import MODELS
from inferix.models.magi.adapters import adapter_for, scheduled
from inferix.models.wan.adapters import ADAPTERS
from inferix_kernels import Unsupported, _dispatch, chosen, compiled
from inferix_kernels import __main__ as kernels_cli
from inferix_kernels.layout import KV_FORMATS, scratch_format
from inferix_kernels.proofs import cases, prove, stored
from inferix_kernels.proofs.stored import RIGHT, Identity, Proof
from inferix_kernels.testing import attention_inputs

HERE = Identity("NVIDIA H200", "9.0", "580.159.04", "0123456789abcdef")
GPU = torch.device("cuda", 0)
with_nvcc = pytest.mark.skipif(not compiled.HAS_CUDA, reason="the extension was built without nvcc")


def proof(**outcomes: str) -> Proof:
    """Of paged_attention over int8 and bf16 pages: compiled="right", triton="wrong: ..."."""
    kernels = [stored.kernel("paged_attention", format) for format in ("int8", "bf16")]
    return Proof(HERE, {backend: dict.fromkeys(kernels, outcome) for backend, outcome in outcomes.items()})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "FOLDER", tmp_path / "proofs")
    monkeypatch.setattr(stored, "identity", lambda device: HERE)
    stored.forget()
    yield tmp_path / "proofs"
    stored.forget()


@pytest.fixture
def tried(cache, monkeypatch):
    """Backends that are asked for paged_attention, in order; each takes it unless it is put into `refusing`."""
    calls = SimpleNamespace(names=[], refusing=set())

    def implementation(op, backend):
        def run(*args, **kwargs):
            calls.names.append(backend)
            if backend in calls.refusing:
                raise Unsupported("not such pages")
            return backend

        return run

    monkeypatch.setattr(_dispatch, "implementation", implementation)
    return calls


def auto(formats=("int8", "bf16")):
    q, pools, plan = attention_inputs([2], [3], query_heads=1, heads=1, head_dim=16, formats=formats)
    return _dispatch.run("paged_attention", "auto", GPU, q, pools, plan)


def test_without_a_proof_triton_runs_first_and_ours_where_it_can_not(tried):
    assert auto() == "triton"
    tried.refusing.add("triton")
    assert auto() == "compiled"


@pytest.mark.parametrize(
    "outcomes, wanted",
    [
        ({"compiled": RIGHT, "triton": RIGHT}, ["compiled", "triton"]),
        ({"compiled": RIGHT}, ["compiled", "triton"]),
        ({"triton": RIGHT}, ["triton", "compiled"]),
        ({"compiled": "wrong: by 0.3"}, ["triton"]),
        ({"compiled": RIGHT, "triton": "wrong: a race"}, ["compiled"]),
        ({"compiled": "unsupported: built without nvcc", "triton": RIGHT}, ["triton", "compiled"]),
        ({"compiled": "not reached: no time was left"}, ["triton", "compiled"]),
    ],
)
def test_the_order_follows_the_proof(tried, outcomes, wanted):
    stored.save(proof(**outcomes))
    tried.refusing |= {"compiled", "triton"}
    with pytest.raises(Unsupported):
        auto()
    assert tried.names == wanted


def test_a_kernel_that_is_wrong_here_never_runs_and_the_error_says_so(tried):
    stored.save(proof(compiled="wrong: no result in time"))
    tried.refusing.add("triton")
    with pytest.raises(Unsupported, match=r"triton: not such pages; compiled: wrong: no result in time \(proved"):
        auto()
    assert tried.names == ["triton"]


def test_every_format_of_a_call_must_be_right(tried):
    stored.save(proof(compiled=RIGHT, triton=RIGHT))
    assert auto(("int8", "bf16")) == "compiled"
    assert auto(("int8", "fp8")) == "triton"  # fp8 pages were not tried


def test_products_in_8_bits_are_kernels_of_their_own(tried, monkeypatch):
    stored.save(proof(compiled=RIGHT))
    monkeypatch.setattr(compiled, "ALLOW_8_BIT", True)
    assert auto() == "triton"


def test_a_backend_asked_for_by_name_needs_no_proof(tried):
    stored.save(proof(compiled="wrong: by 0.3"))
    q, pools, plan = attention_inputs([2], [3], query_heads=1, heads=1, head_dim=16)
    assert _dispatch.run("paged_attention", "compiled", GPU, q, pools, plan) == "compiled"


def test_ops_without_pages_go_by_the_dtype_of_their_first_tensor():
    half = torch.zeros(2, 1, 8, dtype=torch.bfloat16)
    assert _dispatch.formats_of((half, half)) == ("bf16",) and _dispatch.formats_of((torch.zeros(1).int(),)) == ()


@pytest.mark.parametrize("changed", ["gpu", "capability", "driver", "build"])
def test_a_proof_of_something_else_is_not_used_and_the_notice_names_it(cache, monkeypatch, changed):
    stored.save(proof(compiled=RIGHT))
    assert stored.of_device(GPU) is not None and stored.notice(GPU) == ""
    monkeypatch.setattr(stored, "identity", lambda device: HERE._replace(**{changed: "another"}))
    stored.forget()
    assert stored.of_device(GPU) is None
    said = stored.notice(GPU)
    assert "inferix doctor --prove" in said and "\n" not in said
    assert changed == "gpu" or f"with another {changed} {getattr(HERE, changed)}" in said


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"identity": {}, "outcomes": {}}', '{"identity": 1}', "\xff"])
def test_a_damaged_proof_is_none(cache, text):
    stored.save(proof(compiled=RIGHT)).write_text(text, encoding="latin-1")
    stored.forget()
    assert stored.of_device(GPU) is None and "not proved" in stored.notice(GPU)


def test_a_cache_that_can_not_be_written_is_one_line(cache, monkeypatch, capsys):
    cache.write_text("a file where the folder should be")
    with pytest.raises(ValueError, match="proof: cannot write"):
        stored.save(proof(compiled=RIGHT))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(prove, "prove", lambda *_: {"compiled": {"kv_append int8": RIGHT}})
    assert prove.command("cuda") == 2
    last = capsys.readouterr().err
    assert last.startswith("prove: proof: cannot write") and "Triton" in last and last.count("\n") == 1


def test_triton_under_another_distribution_is_identified(monkeypatch):
    triton = pytest.importorskip("triton")
    missing = mock.Mock(side_effect=stored.importlib.metadata.PackageNotFoundError("triton"))
    monkeypatch.setattr(stored.importlib.metadata, "version", missing)
    assert stored.triton_version() == triton.__version__
    stored.build.cache_clear()
    assert len(stored.build()) == 16
    stored.build.cache_clear()


def test_without_a_home_folder_a_gpu_is_unproved(cache, monkeypatch):
    def none(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(type(cache), "expanduser", none)
    assert stored.of_device(GPU) is None and "not proved" in stored.notice(GPU)
    with pytest.raises(ValueError, match=r"proof: cannot write it to .*: Could not determine home"):
        stored.save(proof(compiled=RIGHT))


def test_without_a_gpu_the_reason_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    too_old = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update."

    def init():
        raise RuntimeError(too_old)

    monkeypatch.setattr(torch.cuda, "init", init)
    assert cli.main(["doctor", "--prove"]) == 2
    assert capsys.readouterr().err == f"prove: no GPU that torch can use: {too_old.splitlines()[0]}\n"


# The cases


@pytest.mark.parametrize("format", KV_FORMATS)
def test_the_kernels_of_a_cpu_are_right(format):
    said: dict[str, str] = {}
    prove.prove_in_process(prove.Job("compiled", format, tuple(cases.kernels_of(format))), "cpu", said.__setitem__)
    assert said == dict.fromkeys(cases.kernels_of(format), RIGHT)


def _nothing(*args, **kwargs):
    pass


def _zeroed(q, pools, plan, *, out, lse, **options):
    compiled_attention(q, pools, plan, out=out, lse=lse, **options)
    out[-1] = 0  # one row of many
    return out, lse


def _other_bits(q, pools, plan, *, out, lse, **options):
    compiled_attention(q, pools, plan, out=out, lse=lse, **options)
    out[0, 0, 0] += 1e-3 * next(_other_bits.calls)
    return out, lse


def _fault(*args, **kwargs):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")


compiled_attention = compiled.paged_attention


@pytest.mark.parametrize(
    "op, fake, said",
    [
        ("kv_append", _nothing, "k is not, bit for bit, the reference's"),
        ("kv_commit", _nothing, "k is not, bit for bit, the reference's"),
        ("kv_gather", lambda *args, out: [x.fill_(torch.nan) for x in out], "k is off by nan"),
        ("paged_attention", _zeroed, "out is off by"),
        ("paged_attention", _other_bits, "not the same bits in every run"),
        ("paged_attention", _fault, "RuntimeError: CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_kernel_that_is_not_right_is_found(monkeypatch, op, fake, said):
    _other_bits.calls = iter(range(100))
    monkeypatch.setattr(compiled, op, fake)
    found: dict[str, str] = {}
    name = stored.kernel(op, "int8")
    prove.prove_in_process(prove.Job("compiled", "int8", (name,)), "cpu", found.__setitem__)
    assert found[name].startswith("wrong: ") and said in found[name] and "\n" not in found[name]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nmore"), OSError(28, "No space left")])
def test_a_machine_that_is_full_says_nothing_against_a_kernel(monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(compiled, "kv_append", full)
    found: dict[str, str] = {}
    prove.prove_in_process(prove.Job("compiled", "int8", ("kv_append int8",)), "cpu", found.__setitem__)
    assert found == {"kv_append int8": f"not reached: {str(error).splitlines()[0]}"}


# The processes. What they run is acted: `program` says which kernel it is at, then does what the test wants.

ACT = """
import json, os, signal, sys, time
from pathlib import Path
marker, act, backend, format, device, *kernels = sys.argv[1:]
for name in kernels:
    print(json.dumps([name, ""]), flush=True)
    if name.startswith("kv_commit"):
        Path(marker).write_text(str(os.getpid()))
        exec(act)
    print(json.dumps([name, "right"]), flush=True)
"""
HANGS = "while True: time.sleep(60)"


@pytest.fixture
def run_job(tmp_path, monkeypatch):
    """All int8 kernels in acted processes; for one that hangs its time is over as soon as it does, or all the time."""
    waiting, marker = prove._wait, tmp_path / "marker"

    def run(act: str, all_is_over: bool = False) -> dict[str, str]:
        def wait(process, results, ends):
            at_it = str(process.pid)
            while process.poll() is None and not (marker.exists() and marker.read_text() == at_it):
                time.sleep(0.01)
            if process.poll() is not None or act != HANGS:
                return waiting(process, results, ends)
            return waiting(process, results, 0.0 if all_is_over else ends, 600.0 if all_is_over else 0.0)

        monkeypatch.setattr(prove, "_wait", wait)
        monkeypatch.setattr(prove, "jobs", lambda device: [prove.Job("compiled", "int8", names)])
        names = tuple(cases.kernels_of("int8"))
        return prove.prove("cpu", 600, program=(sys.executable, "-c", ACT, str(marker), act))["compiled"]

    return run


@pytest.mark.parametrize(
    "act, said",
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "wrong: the process ended by signal SIGSEGV"),
        ("sys.exit(3)", "wrong: the process ended with 3"),
        ("raise MemoryError('no room')", "wrong: the process ended with 1: MemoryError: no room"),
        (HANGS, "wrong: no result in time"),
    ],
)
def test_what_ends_a_process_is_that_kernels_outcome_and_the_rest_is_still_proved(run_job, act, said):
    outcomes = run_job(act)
    assert outcomes.pop(stored.kernel("kv_commit", "int8")) == said
    assert len(outcomes) == 3 and set(outcomes.values()) == {RIGHT}


def test_a_kernel_that_the_end_of_all_time_cuts_off_is_not_called_wrong(run_job):
    """It may have been compiling: `auto` would never take it again."""
    outcomes = run_job(HANGS, all_is_over=True)
    assert outcomes.pop(stored.kernel("kv_commit", "int8")) == "not reached: no time was left"
    assert len(outcomes) == 3 and set(outcomes.values()) == {RIGHT}


def test_a_process_has_its_time_for_each_kernel_not_for_all(tmp_path):
    """Eight kernels that Triton compiles for seconds each are no kernel that hangs."""
    results, waits = tmp_path / "results", []

    class Slow:
        def wait(self, seconds):
            waits.append(seconds)
            results.write_text("x" * len(waits))
            if len(waits) < 8:
                raise subprocess.TimeoutExpired("slow", seconds)
            return 0

    results.touch()
    clock = iter(range(0, 10**6, 5))  # 5 s at each look
    with mock.patch.object(prove.time, "monotonic", lambda: float(next(clock))):
        assert prove._wait(Slow(), results, 10**6, cap=25.0) == "the process ended with 0"
    assert len(waits) == 8


@pytest.mark.parametrize("device", ["H200", "nonsense", "mps", "cuda:7", "cuda:x", ""])
def test_a_device_that_can_not_be_proved_is_one_line(monkeypatch, capsys, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert kernels_cli.main(["prove", device]) == 2
    said = capsys.readouterr().err
    assert "device" in said and f"got {device}" in said.replace("'", "") and said.count("\n") == 1
    if device:  # none is its default
        assert cli.main(["doctor", "--prove", "--device", device]) == 2
        said = capsys.readouterr().err
        assert "device" in said and f"got {device}" in said.replace("'", "") and said.count("\n") == 1


def test_a_process_that_can_not_be_killed_is_left_alone(run_job, monkeypatch):
    left = []
    monkeypatch.setattr(prove.os, "killpg", lambda group, number: left.append(group))
    outcomes = run_job(HANGS)
    monkeypatch.undo()
    os.killpg(left[0], signal.SIGKILL)
    assert outcomes[stored.kernel("kv_commit", "int8")] == "wrong: no result in time, and the process can not be killed"
    assert outcomes[stored.kernel("paged_attention", "int8")] == RIGHT


def test_a_process_that_does_not_begin_proves_nothing(monkeypatch):
    monkeypatch.setattr(prove, "jobs", lambda device: [prove.Job("compiled", "int8", ("kv_append int8",))])
    found = prove.prove("cpu", 600, program=(sys.executable, "-c", "raise SystemExit('no module named torch')"))
    assert found == {"compiled": {"kv_append int8": "not reached: the process ended with 1: no module named torch"}}


def test_a_gpu_that_can_not_be_reached_proves_nothing(monkeypatch):
    busy = mock.Mock(side_effect=RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"))
    monkeypatch.setattr(prove.torch, "zeros", busy)
    said: list[tuple[str, str]] = []
    with pytest.raises(RuntimeError, match="busy"):  # the process ends with it, before it has named a kernel
        prove.prove_in_process(prove.Job("compiled", "int8", ("kv_append int8",)), "cuda", lambda *x: said.append(x))
    assert not said


def test_what_there_is_no_time_for_is_not_reached():
    found = prove.prove("cpu", 0)["compiled"]
    assert len(found) == 36 and set(found.values()) == {"not reached: no time was left"}


def test_a_job_in_a_process_of_its_own(monkeypatch):
    job = prove.Job("compiled", "bf16", ("kv_append bf16", "merge_attention bf16"))
    monkeypatch.setattr(prove, "jobs", lambda device: [job])
    assert prove.prove("cpu", 600) == {"compiled": dict.fromkeys(job.kernels, RIGHT)}


# What a world reaches

PROVED_HOPPER = Proof(
    HERE, {"compiled": {stored.kernel("paged_attention", f): RIGHT for f in KV_FORMATS}, "triton": {}}
)
# fp32 pages and q in bfloat16 over fp16 pages are Triton's: the Hopper kernel refuses them.
ON_HOPPER = dict.fromkeys(KV_FORMATS, "compiled") | {"fp32": "triton", "fp16": "triton"}


def stand_in(name: str) -> SimpleNamespace:
    """A model of this name as World sees it before the first block, on a device that holds nothing."""
    adapter = ADAPTERS[name] if name in ADAPTERS else adapter_for(name, scheduled(name))
    return SimpleNamespace(
        adapter=dataclasses.replace(adapter, guidance=1.0),
        layers=1,
        heads=8,
        head_dim=128,
        frame_tokens=90,
        latent_shape=(16, 8, 8),
        dtype=torch.bfloat16,
        device=torch.device("meta"),
        stream=lambda: None,
    )


@with_nvcc
@pytest.mark.parametrize("name", [name for name in MODELS if name != "tiny"])
@pytest.mark.parametrize("kv", KV_FORMATS)
def test_a_world_on_a_proved_hopper_gpu_reaches_the_hopper_kernel(name, kv):
    world = World(stand_in(name), kv=kv)
    pools = world.store.layers[0]
    assert [pool.format for pool in pools] == [kv, "bf16"]
    choice = chosen.attention(
        [pool.format for pool in pools],
        chosen.Target("H200", "cuda", 90, PROVED_HOPPER),
        dtype=world.model.dtype,
        heads=pools[0].heads,
        head_dim=pools[0].head_dim,
        page_size=pools[0].page_size,
    )
    assert choice.backend == ON_HOPPER[kv], choice.reasons


def test_the_tiny_world_runs_our_kernels_on_a_cpu():
    world = World("tiny")
    formats = [pool.format for pool in world.store.layers[0]]
    assert formats == ["int8", "fp32"]
    assert chosen.attention(formats, chosen.target("cpu"), dtype=torch.float32) == ("compiled", ())


@with_nvcc
@pytest.mark.parametrize(
    "device, proof, backend, reason",
    [
        ("H200", None, "triton", "compiled: takes these pages, but is not proved on this GPU"),
        ("H200", PROVED_HOPPER, "compiled", ""),
        ("RTX 4090", PROVED_HOPPER, "triton", "compiled: needs sm_90, a Hopper GPU, and this is sm_89"),
        ("sm_75", None, "", "triton: needs sm_80 or later, and this is sm_75"),
    ],
)
def test_the_choice_says_why(device, proof, backend, reason):
    on = chosen.target(device)._replace(proof=proof)
    choice = chosen.attention(("int8", "bf16"), on)
    assert choice.backend == backend and reason in "; ".join(choice.reasons)
    line = next(line for line in chosen.table(on).splitlines() if "kv int8" in line)
    assert (backend or "none") in line and reason in line


def test_float32_scratch_keeps_a_world_from_the_hopper_kernel():
    pytest.importorskip("triton")
    choice = chosen.attention(("int8", "fp32"), chosen.Target("H200", "cuda", 90, PROVED_HOPPER))
    assert choice.backend == "triton"  # which halves its tile for such pools: hence layout.scratch_format


@pytest.mark.parametrize("device, dtype, format", [
    ("cuda", torch.bfloat16, "bf16"), ("cuda:1", torch.float16, "fp16"), ("cuda", torch.float32, "fp32"),
    ("cuda", torch.float64, "fp32"), ("cpu", torch.bfloat16, "fp32"), ("cpu", torch.float32, "fp32"),
])  # fmt: skip
def test_scratch_is_in_the_networks_precision_on_a_gpu(device, dtype, format):
    assert scratch_format(device, dtype) == format


@pytest.mark.parametrize(
    "name, said", [("H300", "got 'H300'"), ("cuda:7", "a GPU that is here, got cuda:7"), ("", "got ''")]
)
def test_a_device_that_is_not_known_is_one_line(capsys, name, said):
    assert cli.main(["doctor", "--device", name or " "]) == 2
    error = capsys.readouterr().err
    assert "device must be" in error and error.count("\n") == 1


def test_a_world_on_an_unproved_gpu_says_so_in_one_line(cache, monkeypatch, caplog):
    """This world's store is on the meta device; what is said of a GPU is asked for in its place."""
    model, notice = stand_in("self-forcing"), stored.notice
    monkeypatch.setattr(stored, "notice", lambda device: notice(GPU))
    World(model)
    (record,) = caplog.records
    assert "not proved on this GPU" in record.message and "\n" not in record.message
    caplog.clear()
    World(model, backend="triton")  # asked for by name: no proof is needed
    stored.save(proof(compiled=RIGHT))
    World(model)
    assert not caplog.records


def test_on_a_cpu_nothing_is_said(caplog):
    World("tiny")
    assert not caplog.records and stored.notice(torch.device("cpu")) == ""
