"""What others expect of a package: types, one version, an import that costs little more than torch's."""

import subprocess
import sys
from pathlib import Path

import pytest

import inferix
import inferix_kernels
from tests.house import extension_stub

ROOT = Path(__file__).parents[2]
# Modules that `import inferix_kernels` must not add to torch's own: each alone costs a tenth of a second or more.
HEAVY = {"triton", "PIL", "av", "matplotlib", "safetensors", "numpy.testing", "diffusers", "transformers", "aiohttp"}
HEAVY |= {"torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes", "torch.testing", "torch.onnx"}


def printed(code: str) -> list[str]:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_the_stub_says_what_the_extension_takes():
    """Every name, keyword and type. If not: `python -m tests.house.extension_stub`."""
    kept, mark, rest = extension_stub.STUB.read_text().partition(extension_stub.CUDA)
    assert mark and kept == extension_stub.common()
    if extension_stub._C.has_cuda:
        assert rest == extension_stub.of_cuda()


def test_the_stub_is_what_type_checkers_read():
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    ignored = [name for override in tools["mypy"]["overrides"] for name in override["module"]]
    assert not any(name.startswith("inferix_kernels._C") for name in ignored)


def test_both_packages_ship_their_types_and_all_their_data():
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folders = {"inferix_kernels": ROOT / "inferix_kernels", "inferix": ROOT / "python" / "inferix"}
    shipped = {
        path
        for package, patterns in data.items()
        for pattern in patterns
        for path in (folders[package.split(".")[0]].joinpath(*package.split(".")[1:])).glob(pattern)
    }
    tracked = subprocess.run(["git", "ls-files", *folders.values()], cwd=ROOT, capture_output=True, text=True)
    files = {ROOT / line for line in tracked.stdout.splitlines()}
    if not files:
        pytest.skip("not a git checkout")
    assert {folder / "py.typed" for folder in folders.values()} <= shipped
    assert extension_stub.STUB in shipped
    assert {path for path in files if path.suffix != ".py"} <= shipped


def test_the_version_stands_in_one_place():
    pytest.importorskip("setuptools")
    result = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == [inferix_kernels.__version__] == [inferix.__version__], result.stderr
    line = f'"{inferix_kernels.__version__}"'
    places = ["pyproject.toml", "setup.py", "inferix_kernels/__init__.py", "python/inferix/__init__.py"]
    assert [place for place in places if line in (ROOT / place).read_text()] == ["inferix_kernels/__init__.py"]


def test_importing_the_kernels_adds_little_to_torch():
    added = printed(
        "import sys, torch; before = set(sys.modules); import inferix_kernels; print(*set(sys.modules) - before)"
    )
    assert not {name for name in added if any(name == heavy or name.startswith(heavy + ".") for heavy in HEAVY)}
    backends = {"_C", "compiled", "reference", "triton_kernels"}
    assert not {name for name in added if name.startswith("inferix_kernels.") and name.split(".")[1] in backends}
    others = {name.split(".")[0] for name in added} - {"inferix_kernels"}
    assert others <= sys.stdlib_module_names, others  # no other distribution at all


def test_importing_the_driver_waits_for_torch():
    assert "torch" not in printed("import sys, inferix; print(*sys.modules)")
