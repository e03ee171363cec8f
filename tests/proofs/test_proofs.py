"""What is proved on a GPU decides what `auto` takes there: the order, the store, the processes, a world's kernels."""

import dataclasses
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from inferix import World
from inferix.commands import cli
from inferix.models import MODELS
from inferix.models.magi.adapters import adapter_for, scheduled
from inferix.models.matrix_game import adapters as matrix_game
from inferix.models.wan import adapters as wan
from inferix_kernels import Unsupported, _dispatch, chosen, compiled, layout
from inferix_kernels import __main__ as kernels_cli
from inferix_kernels._remembered import Accepted
from inferix_kernels.layout import KV_FORMATS, scratch_format
from inferix_kernels.proofs import prove, stored
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


def auto(formats=("int8", "bf16"), **options):
    q, pools, plan = attention_inputs([2], [3], query_heads=1, heads=1, head_dim=16, formats=formats)
    return _dispatch.run("paged_attention", "auto", GPU, (q, pools, plan), options)


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


def test_a_kind_of_calls_keeps_its_order_until_proofs_are_read_again(tried):
    q, pools, plan = attention_inputs([2], [3], query_heads=1, heads=1, head_dim=16, formats=("int8", "bf16"))
    kind = Accepted({}, True)

    def run():
        return _dispatch.run("paged_attention", "auto", GPU, (q, pools, plan), {}, kind)

    assert run() == "triton"
    with mock.patch.object(_dispatch, "candidates", None):  # not asked again
        assert run() == "triton"
    stored.save(proof(compiled=RIGHT))
    assert run() == "compiled"


def test_every_format_of_a_call_must_be_right(tried):
    stored.save(proof(compiled=RIGHT, triton=RIGHT))
    assert auto(("int8", "bf16")) == "compiled"
    assert auto(("int8", "fp8")) == "triton"  # fp8 pages were not tried


def test_products_in_8_bits_are_kernels_of_their_own(tried):
    stored.save(proof(compiled=RIGHT))
    assert auto(precision="exact") == "compiled" and auto(precision="8bit") == "triton"


def test_a_backend_asked_for_by_name_needs_no_proof(tried):
    stored.save(proof(compiled="wrong: by 0.3"))
    q, pools, plan = attention_inputs([2], [3], query_heads=1, heads=1, head_dim=16)
    assert _dispatch.run("paged_attention", "compiled", GPU, (q, pools, plan), {}) == "compiled"


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


# What a world reaches

PROVED_HOPPER = Proof(
    HERE, {"compiled": {stored.kernel("paged_attention", f): RIGHT for f in KV_FORMATS}, "triton": {}}
)
# fp32 pages and q in bfloat16 over fp16 pages are Triton's: the Hopper kernel refuses them.
ON_HOPPER = dict.fromkeys(KV_FORMATS, "compiled") | {"fp32": "triton", "fp16": "triton"}


def stand_in(name: str) -> SimpleNamespace:
    """A model of this name as World sees it before the first block, on a device that holds nothing."""
    tables = wan.ADAPTERS | matrix_game.ADAPTERS
    adapter = tables[name] if name in tables else adapter_for(name, scheduled(name))
    return SimpleNamespace(
        adapter=dataclasses.replace(adapter, guidance=1.0),
        layers=1,
        heads=8,
        head_dim=128,
        frame_tokens=90,
        latent_shape=(16, 8, 8),
        dtype=torch.bfloat16,
        linear=None,
        device=torch.device("meta"),
        stream=lambda: None,
        turn_back=None,
        schedule=None,
        attention=None,
        branch=None,
    )


@with_nvcc
@pytest.mark.parametrize("name", [name for name in MODELS if name != "tiny"])
@pytest.mark.parametrize("kv", KV_FORMATS)
def test_a_world_on_a_proved_hopper_gpu_reaches_the_hopper_kernel(name, kv):
    world = World(stand_in(name), kv=kv)
    pools = world.store.layers[0]
    # Scratch is last; a sink that moves is held in the same precision.
    assert {pool.format for pool in pools} == {kv, "bf16"} and pools[-1].format == "bf16"
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
    ("cuda", torch.float64, "fp32"), ("cuda", None, "bf16"), ("cpu", torch.float32, "fp32"), ("cpu", None, "fp32"),
])  # fmt: skip
def test_scratch_is_in_the_networks_precision_on_a_gpu(device, dtype, format):
    assert scratch_format(device, dtype) == format


@pytest.mark.parametrize("tiles, format", [(True, "bf16"), (False, "fp32")])
def test_scratch_of_a_bfloat16_network_on_a_cpu_goes_by_its_tile_registers(tiles, format, monkeypatch):
    monkeypatch.setattr(layout, "_has_tile_registers", lambda: tiles)
    assert scratch_format("cpu", torch.bfloat16) == format
    assert scratch_format("cpu", torch.float16) == scratch_format("cpu", torch.float32) == "fp32"


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
