"""The build says in one line what it lacks; what it builds needs neither a GPU nor a driver."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import inferix_kernels
from inferix_kernels import _dispatch

ROOT = Path(__file__).parents[2]


def build(path: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}"]
    env = {key: value for key, value in os.environ.items() if key != "CXX"} | {"PATH": path} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def no_compiler_beside_python():
    if any(Path(sysconfig.get_path("scripts"), name).exists() for name in ("c++", "g++", "clang++")):
        pytest.skip("this Python has a C++ compiler beside it: it can not be hidden by PATH")


def test_a_missing_compiler_is_one_clear_line(tmp_path):
    pytest.importorskip("setuptools")
    result = build(str(tmp_path), tmp_path)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].startswith("inferix: no C++ compiler found (looked for c++, g++, clang++)")
    assert "Traceback" not in result.stderr


def test_a_compiler_asked_for_is_not_replaced(tmp_path):
    pytest.importorskip("setuptools")
    result = build(os.environ["PATH"], tmp_path, CXX="no-such-compiler -O2")
    assert result.returncode != 0
    assert "no C++ compiler found (looked for no-such-compiler)" in result.stderr


def test_an_architecture_that_the_kernels_are_not_made_for_is_refused(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "build_ext", f"--build-temp={tmp_path}", "--cuda-architectures", "90a;75"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0 and not list(tmp_path.iterdir())
    assert result.stderr.splitlines()[-1] == "inferix: --cuda-architectures must be of 80, 90a, got '75'"


def test_the_extension_needs_neither_torch_nor_a_driver():
    extension = pytest.importorskip("inferix_kernels._C").__file__
    code = f"import sys; sys.path.insert(0, {os.path.dirname(extension)!r}); import _C; print(_C.has_cuda)"
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() in ("True", "False"), result.stderr


def test_a_missing_extension_is_one_clear_line():
    """In a process that can not find _C."""
    code = (
        "import sys; sys.modules['inferix_kernels._C'] = None\n"
        "import torch, inferix_kernels as ik\n"
        "x = torch.zeros(1, 1, 16)\n"
        "try: ik.merge_attention(x, x[..., 0], x, x[..., 0], backend='compiled')\n"
        "except ik.Unsupported as error: print(error)\n"
        "print(ik.merge_attention(x, x[..., 0], x, x[..., 0])[1].item())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert "inferix_kernels._C is not built" in lines[0] and "pip install" in lines[0], result.stderr
    assert float(lines[1]) == pytest.approx(0.6931472)  # auto takes the reference: log(1 + 1)


def test_an_extension_of_other_sources_says_so(monkeypatch):
    compiled = pytest.importorskip("inferix_kernels.compiled")
    monkeypatch.setattr(compiled._C, "merge_attention", compiled._C.kv_append)  # takes other arguments
    out, lse = torch.zeros(1, 1, 16), torch.zeros(1, 1)
    with pytest.raises(RuntimeError, match=r"merge_attention: .* other sources than these: build it again"):
        inferix_kernels.merge_attention(out, lse, out, lse, backend="compiled")


def test_the_listing_names_every_op_and_backend():
    result = subprocess.run([sys.executable, "-m", "inferix_kernels"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for op in [name for name in inferix_kernels.__all__ if name.startswith(("kv_", "paged_", "merge_", "qkv_"))]:
        for backend in _dispatch.BACKENDS:
            assert any(line.split()[:2] == [op, backend] for line in result.stdout.splitlines())
