"""An exported folder of kernels: self-contained, beside the package in one process, and a backend of diffusers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import inferix_kernels.compiled
from inferix_kernels.integrations import hf_kernel
from inferix_kernels.integrations.hf_kernel import export, flash_attn_func, main
from tests.house.test_docstrings import follow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(tmp_path_factory.mktemp("hub") / "flash")


@pytest.fixture(scope="module")
def loaded(folder):
    """As kernels 0.17.2 imports a variant: its __init__.py, under the name that metadata.json gives."""
    variant = folder / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def qkv(dtype=torch.float32, queries=50, keys=70, heads=4, kv_heads=2, width=64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, queries, heads, width), (2, keys, kv_heads, width), (2, keys, kv_heads, width)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def dense(q, k, v, causal):
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1]) if causal else None
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_the_function_is_flash_attention_4s(dtype, bound, causal):
    q, k, v = qkv(dtype)
    out, lse = flash_attn_func(q=q, k=k, v=v, softmax_scale=None, causal=causal)  # as diffusers calls it
    assert out.dtype == dtype and lse.shape == (2, 4, 50)
    assert (out.double() - dense(q, k, v, causal)).abs().max() < bound  # half a unit in the last place of numbers < 4


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    follow(flash_attn_func)
    follow(export)


def test_a_copy_stands_beside_the_package(loaded):
    copy = sys.modules[f"{loaded.__name__}.inferix_kernels"]
    assert copy is not inferix_kernels and copy.KVPages is not inferix_kernels.KVPages
    compiled, dispatch = (sys.modules[f"{copy.__name__}.{name}"] for name in ("compiled", "_dispatch"))
    assert "torch-cpu" in Path(compiled._C.__file__).parts and compiled._C is not inferix_kernels.compiled._C
    assert all(name.startswith(copy.__name__) for name in (dispatch.BACKENDS | dispatch.PEERS).values())
    q, k, v = qkv()
    assert torch.equal(loaded.flash_attn_func(q=q, k=k, v=v)[0], flash_attn_func(q, k, v)[0])
    graph = torch.compile(lambda q: loaded.flash_attn_func(q, k, v)[0], backend="eager", fullgraph=True)
    assert torch.equal(graph(q), flash_attn_func(q, k, v)[0])


@pytest.mark.skipif(not inferix_kernels.compiled.HAS_CUDA, reason="the extension was built without nvcc")
def test_an_error_of_the_package_stays_its_own(loaded):
    """Each of two extensions in a process translates what it threw itself."""
    pool, plan = inferix_kernels.KVPages.empty("fp32", 1, 1, 64, 64), inferix_kernels.make_plan([(1, [0], [64])])
    with pytest.raises(inferix_kernels.Unsupported, match="the Hopper kernel reads bf16"):
        inferix_kernels.compiled.require_attention(torch.zeros(1, 1, 64), [pool], plan)


def test_a_copy_needs_torch_alone(folder):
    """In a process that cannot import the package; and each variant has metadata, the same files and another name."""
    script = (
        "import sys, torch; sys.modules['inferix_kernels'] = sys.modules['diffusers'] = None; sys.path.insert(0, '.')\n"
        "f = __import__('torch-cpu').flash_attn_func; q = torch.ones(1, 9, 1, 8)\n"
        "out, lse = f(q=q, k=q, v=q, causal=True); print(out.sum().item(), f.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder / "build", capture_output=True, text=True)
    assert done.stdout == "72.0 torch-cpu.inferix_kernels.integrations.hf_kernel\n", done.stderr
    variants = [folder / "build" / f"torch-{backend}" for backend in ("cpu", "cuda")]
    files = [sorted(str(p.relative_to(v)) for p in v.rglob("*") if "__pycache__" not in p.parts) for v in variants]
    assert files[0] == files[1] and "inferix_kernels/triton_kernels/configs/sm_90.json" in files[0]
    told = [json.loads((variant / "metadata.json").read_text()) for variant in variants]
    assert [x["backend"]["type"] for x in told] == ["cpu", "cuda"] and told[0]["id"] != told[1]["id"]
    assert all(x["id"].isidentifier() and x["python-depends"] == [] for x in told)


def test_what_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "x").write_text("mine")
    for path in (tmp_path, tmp_path / "x"):
        assert main(["export", str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"export: path must be an empty folder or none yet, got '{path}'")
    assert main(["export", str(tmp_path / "x" / "y")]) == 2
    assert "Not a directory" in capsys.readouterr().err and (tmp_path / "x").read_text() == "mine"
    monkeypatch.setattr(hf_kernel.importlib.util, "find_spec", lambda *name: None)
    with pytest.raises(ValueError, match=r"export needs the extension inferix_kernels\._C, which is not built"):
        export(tmp_path / "new")
    assert not (tmp_path / "new").exists()


TEXT = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1)).bfloat16()


def wan():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra: wan)")
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 2, "ffn_dim": 32, "text_dim": 8}
    return diffusers.WanTransformer3DModel(**sizes, freq_dim=16).to(torch.bfloat16).eval()


@torch.no_grad()
def call(transformer):
    x = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    return transformer(x, timestep=torch.tensor([900.0]), encoder_hidden_states=TEXT).sample


@pytest.fixture
def backend(loaded, monkeypatch):
    """flash_4_hub, by diffusers' dispatcher: what it would have got from `kernels` is given to it."""
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch", reason="diffusers is not installed")
    name, calls = dispatch.AttentionBackendName.FLASH_4_HUB, []

    def noting(**arguments):
        calls.append(sorted(arguments))
        return loaded.flash_attn_func(**arguments)

    monkeypatch.setattr(dispatch._HUB_KERNELS_REGISTRY[name], "kernel_fn", noting)
    monkeypatch.setattr(dispatch, "_check_attention_backend_requirements", lambda name: None)
    monkeypatch.setattr(dispatch._AttentionBackendRegistry, "_active_backend", dispatch.AttentionBackendName.NATIVE)
    return dispatch, calls


def test_set_and_context_manager_are_the_same_and_close_to_native(backend):
    dispatch, calls = backend
    native = call(wan())
    assert not calls
    chosen = wan()
    chosen.set_attention_backend("flash_4_hub")
    got = call(chosen)
    assert calls == [["causal", "k", "q", "softmax_scale", "v"]] * 4  # two layers, each with cross-attention
    dispatch._AttentionBackendRegistry.set_active_backend(dispatch.AttentionBackendName.NATIVE)
    with dispatch.attention_backend("flash_4_hub"):
        within = call(wan())
    assert len(calls) == 8 and torch.equal(within, got)
    assert torch.allclose(got, native, rtol=1e-2, atol=1e-2) and not torch.equal(got, native)


def test_a_backend_is_switched_and_restored(backend):
    dispatch, calls = backend
    transformer = wan()
    native = call(transformer)
    for _ in range(2):
        transformer.set_attention_backend("flash_4_hub")
        call(transformer)
        transformer.set_attention_backend("native")
        assert torch.equal(call(transformer), native)
    assert len(calls) == 8
    active = dispatch._AttentionBackendRegistry.get_active_backend()
    with pytest.raises(KeyboardInterrupt), dispatch.attention_backend("flash_4_hub"):
        raise KeyboardInterrupt
    assert dispatch._AttentionBackendRegistry.get_active_backend() == active


def test_what_flash_4_has_not_is_refused_by_diffusers(backend):
    dispatch, calls = backend
    q = torch.randn(1, 9, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="attn_mask"), dispatch.attention_backend("flash_4_hub"):
        dispatch.dispatch_attention_fn(q, q, q, attn_mask=torch.ones(9, 9, dtype=torch.bool))
    with dispatch.attention_backend("flash_4_hub"):
        out = dispatch.dispatch_attention_fn(q, q, q, is_causal=True, scale=0.1)
    assert torch.allclose(
        out,
        F.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, is_causal=True, scale=0.1).transpose(1, 2),
        atol=1e-2,
    )
    assert len(calls) == 1


STOCK = """
import torch
from tests.integrations.test_hf_kernel import call, wan
transformer = wan()
native = call(transformer)
transformer.set_attention_backend("flash_4_hub")
got = call(transformer)
assert torch.allclose(got, native, rtol=1e-2, atol=1e-2) and not torch.equal(got, native)
from diffusers.models.attention_dispatch import _HUB_KERNELS_REGISTRY, AttentionBackendName
print(_HUB_KERNELS_REGISTRY[AttentionBackendName.FLASH_4_HUB].kernel_fn.__module__)
"""


def test_stock_diffusers_loads_it_through_kernels(folder):
    pytest.importorskip("diffusers", reason="diffusers is not installed (extra: wan)")
    if importlib.util.find_spec("kernels") is None:
        pytest.skip("kernels is not installed: pip install 'kernels>=0.12.3'")
    name = json.loads((folder / "build" / "torch-cpu" / "metadata.json").read_text())["id"]
    environment = {"HF_HUB_OFFLINE": "1", "LOCAL_KERNELS": f"kernels-community/flash-attn4={folder}"}
    done = subprocess.run(
        [sys.executable, "-c", STOCK], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == f"{name}.inferix_kernels.integrations.hf_kernel\n", done.stderr
