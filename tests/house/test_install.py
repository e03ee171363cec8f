"""Names, extras and the commands that messages give: one constant, and pyproject.toml says the same."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from inferix.commands import cli, doctor
from inferix_kernels._install import DISTRIBUTION, DRIVER, explained, install, require

tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FILES = ["*.md", "Makefile", "*.toml", "setup.py", ".ci/*", ".github/**/*.yml", "docs/**/*.md"]
FILES += [
    "inferix_kernels/**/*.py",
    "python/**/*.py",
    "python/**/*.md",
    "benchmarks/**/*.py",
    "tests/**/*.py",
    "examples/*",
]
TEXTS = {path: path.read_text() for pattern in FILES for path in ROOT.glob(pattern) if path.is_file()}


def brought(extra):
    """Names of the distributions that an extra brings, through the extras that it names."""
    found = set()
    for requirement in EXTRAS[extra]:
        name, extras = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", requirement).groups()
        if name == DISTRIBUTION:
            found |= set().union(*(brought(other) for other in extras.split(",")))
        else:
            found.add(name)
    return found


def test_the_kernels_need_torch_and_numpy_alone_and_every_extra_brings_the_driver():
    assert PROJECT["name"] == DISTRIBUTION != "inferix"
    assert [re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"]] == ["torch", "numpy"]
    driver = brought("driver")
    assert driver == {"pillow" if name == "PIL" else name for name in DRIVER}
    assert all(driver <= brought(extra) for extra in EXTRAS)


def test_every_command_in_the_tree_is_the_constants():
    """`pip install` of ours, in documents and messages: of this name, with an extra that there is."""
    ours = re.compile(r"""(?:inferix[\w-]*|['"\s]\.)\[([\w,]+)\]""")  # inferix-kernels[wan], '.[test,lint]'
    named, commands = set(), 0
    for path, text in TEXTS.items():
        for line in text.splitlines():
            if "pip install" not in line and path.name != "pyproject.toml":
                continue
            for match in ours.finditer(line):
                named |= set(match[1].split(","))
                assert match[0].startswith((DISTRIBUTION, "'.", " .")), (path, line)
                if match[0].startswith(DISTRIBUTION) and path.name != "pyproject.toml":
                    assert install(match[1]) in line.replace("\\", ""), (path, line)
                    commands += 1
            assert not re.search(r"pip install\b[^:]*\binferix(?!-kernels)\b", line.split("#")[0]), (path, line)
    assert commands >= 5 and {"stream", "wan", "magi", "bench", "test"} <= named <= EXTRAS.keys()
    source = "".join(text for path, text in TEXTS.items() if path.suffix == ".py" and path.parent.name != "tests")
    used = set(re.findall(r"""\binstall\(['"](\w+)['"]\)|\brequire\([^,()]+, ['"](\w+)['"]""", source))
    assert {"driver", "evaluate", "stream", "bench", "wan", "magi"} == {name for pair in used for name in pair if name}


def run_without(code):
    """In a process that finds torch and numpy, and nothing else that pip installs."""
    absent = [*DRIVER, "triton", "diffusers", "transformers", "aiohttp", "aiortc", "jsonschema", "matplotlib"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); {code}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_the_kernels_run_with_torch_and_numpy_alone():
    result = run_without(
        "import torch, inferix_kernels as ik, inferix_kernels.store.memory, inferix_kernels.files\n"
        "store = ik.KVStore(layers=1, heads=1, head_dim=16, frame_tokens=4, block_frames=1, pools={'int8': 2})\n"
        "table = store.open(ik.Policy(window=2, format='int8'))\n"
        "from inferix_kernels.store import snapshot\n"
        "for call in (lambda: snapshot.save(table, 'nowhere'), lambda: snapshot.load(store, 'nowhere')):\n"
        "    try: call()\n"
        "    except ImportError as error: print(error)"
    )
    assert (
        result.stdout.splitlines()
        == [f"path: a snapshot needs safetensors, which is not installed: {install('driver')}"] * 2
    ), result.stderr


def test_the_driver_names_its_extra():
    """One after the other in a process: each finds what it lacks by itself."""
    commands = [["generate"], ["doctor"], ["play", "--terminal"]]
    result = run_without(
        "from inferix.commands.cli import main\n"
        f"for words in {commands}:\n"
        "    print('status', main(words), flush=True)\n"
        "    print('status', file=sys.stderr, flush=True)"
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    statuses = re.findall("^status (.*)$", result.stdout, re.MULTILINE)
    assert len(statuses) == 3 and all(int(status) for status in statuses), result.stdout
    printed = re.split("^status.*$", result.stdout, flags=re.MULTILINE)
    for words, *said in zip(commands, printed, result.stderr.split("status\n")):
        assert install("driver") in "".join(said), (words, said)


def test_what_is_absent_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError) as caught:
        require("diffusers", "wan", "weights: the VAE")
    said = "weights: the VAE needs diffusers, which is not installed: pip install 'inferix-kernels[wan]'"
    assert str(caught.value) == explained(caught.value) == said
    assert explained(ImportError("no rich", name="rich")) == f"no rich: {install('driver')}"
    assert explained(ImportError("no such thing", name="other")) == "no such thing"


def distribution(folder, version, packages):
    info = folder / f"inferix-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: inferix\nVersion: {version}\n")
    if packages:
        (info / "top_level.txt").write_text("\n".join(packages))
    return importlib.metadata.Distribution.at(info)


@pytest.mark.parametrize(
    "packages, good", [(None, False), (["inferix"], False), (["inferix", "inferix_kernels"], True)]
)
def test_doctor_names_a_foreign_inferix(packages, good, tmp_path, monkeypatch, capsys):
    found = distribution(tmp_path, "0.1.10", packages)
    monkeypatch.setattr(doctor.importlib.metadata, "distributions", lambda name: [found])
    monkeypatch.setattr(doctor, "CHECKS", {"packages": doctor._names})
    assert cli.main(["doctor"]) == (0 if good else 1)
    said = capsys.readouterr().out
    assert ("0.1.10" in said and str(tmp_path) in said and "pip uninstall inferix" in said) == (not good), said


def test_doctor_names_a_package_that_lies_over_ours(monkeypatch):
    import inferix

    monkeypatch.setattr(inferix, "__file__", "/elsewhere/inferix/__init__.py")
    assert doctor._names() == (
        False,
        f"the package inferix is another project's: /elsewhere/inferix/__init__.py; install {DISTRIBUTION} again",
    )
    monkeypatch.undo()
    monkeypatch.delattr(inferix, "__all__")
    assert not doctor._names()[0]
