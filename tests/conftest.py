"""Backends and devices that exist on this machine. A test that takes `backend` and `device` runs once on each pair."""

import contextlib
import importlib.util
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from inferix_kernels import Unsupported, compiled
from inferix_kernels._dispatch import AUTO, implementation
from inferix_kernels.proofs import speeds

# A shell that runs the tests in the background lets them ignore Ctrl-C, and with them every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    # Without a GPU, Triton kernels run in its interpreter. Triton reads this once, when it is imported, and diffusers
    # imports it too: so it is set here, before any test file.
    os.environ["TRITON_INTERPRET"] = "1"


# The longest files by the clock, waiting included: they begin first, so that none of them is left alone at the end.
# `make test` hands files out in this order.
LONGEST = (
    "triton_kernels/test_triton_compile.py",
    "benchmarks/test_benchmarks.py",
    "commands/test_cli.py",
    "soak/test_soak_viewers.py",
    "cuda/test_hopper.py",
    "cuda/test_hazards.py",
    "models/test_wan_generate.py",
    "stream/test_stream_browser.py",
    "soak/test_soak_kills.py",
    "triton_kernels/test_triton_attention.py",
    "stream/test_stream_failures.py",
    "stream/test_stream_play.py",
    "store/test_store_model.py",
    "decode/test_pipeline.py",
    "models/test_tiny_train.py",
)


# Where processes begin, and what those of the tests unpickle.
PRELOADED = ["inferix.models.tiny", "inferix.stream.push", "inferix.stream.worker", "tests.stream.stream_client"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    order = {folder / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))  # else they stay as they are


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshot", metavar="FILE", help="where the test of the page keeps a picture of it")
    parser.addoption("--reference", metavar="DIR", help="checkouts of other repositories, to be run patched")


def pairs() -> list:
    """(backend, device) of every backend but the reference, which is what they are compared with."""
    found = []
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for backend in set(AUTO[device]) - {"reference"}:
            marks = [pytest.mark.gpu] if device == "cuda" else []
            try:
                implementation("kv_append", backend)
            except Unsupported as error:
                marks.append(pytest.mark.skip(reason=str(error)))
            found.append(pytest.param((backend, device), marks=marks, id=f"{backend}-{device}"))
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """On a GPU, an op that has no kernel there yet is skipped by name. On the CPU every op has one."""
    try:
        return (yield)
    except Unsupported as error:
        if item.get_closest_marker("gpu"):
            pytest.skip(str(error))
        raise


@pytest.fixture(params=pairs())
def backend_and_device(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def backend(backend_and_device: tuple[str, str]) -> str:
    return backend_and_device[0]


@pytest.fixture
def device(backend_and_device: tuple[str, str]) -> str:
    return backend_and_device[1]


@pytest.fixture(params=list(compiled.Isa.__members__))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each set of instructions that this CPU has, in turn."""
    level = compiled.Isa.__members__[request.param]
    if level > compiled._C.best_isa():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setattr(compiled, "ISA", level)
    return request.param


@pytest.fixture(scope="session", autouse=True)
def no_records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`auto` goes by the tables, whatever somebody has measured on this machine."""
    before, speeds.FOLDER = speeds.FOLDER, tmp_path_factory.mktemp("speeds")
    speeds.forget()
    yield
    speeds.FOLDER = before


@pytest.fixture(scope="session", autouse=True)
def quick_processes() -> Iterator[Callable]:
    """What would be spawned is forked off a process that has imported the same, for importing takes most of the time.
    Functions and arguments are pickled as ever, and commands that a test starts as typed spawn for themselves.

    Yields the real multiprocessing.get_context, for tests of how processes start.
    """
    original = multiprocessing.get_context
    multiprocessing.set_forkserver_preload(PRELOADED)
    multiprocessing.get_context = lambda method=None: original("forkserver" if method == "spawn" else method)
    yield original
    multiprocessing.get_context = original


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Where Triton's kernels are interpreted, without what its interpreter does over and over."""
    if importlib.util.find_spec("triton") is None or torch.cuda.is_available():
        yield
        return
    from tests.triton_kernels.interpreter import patched_once_a_launch

    with patched_once_a_launch():
        yield


LEVELS = [level for level in compiled.Isa.__members__.values() if level <= compiled._C.best_isa()]


@pytest.fixture(params=["reference", "triton", *LEVELS], ids=lambda where: getattr(where, "name", where))
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend's name; the compiled one at each level of instructions that this CPU has."""
    if isinstance(request.param, str):
        return request.param
    monkeypatch.setattr(compiled, "ISA", request.param)
    return "compiled"


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that change the number of threads: puts it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_disk(tmp_path) -> Iterator["SmallDisk"]:
    """A folder on a disk of 300 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here (needs root)")
    yield SmallDisk(folder)
    subprocess.run(["umount", str(folder)], check=True)


class SmallDisk:
    def __init__(self, folder: Path):
        self.folder = folder

    def fill(self, leave: int = 0) -> None:
        """Until no more than `leave` bytes are free."""
        with (self.folder / "fill").open("wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            file.truncate(max(0, file.tell() - leave))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One server for the tests of a module: starting its worker takes two seconds."""
    from tests.stream.stream_client import LOOP, running

    manager = running(tmp_path_factory.mktemp("shared"))
    yield LOOP.run_until_complete(manager.__aenter__())
    LOOP.run_until_complete(manager.__aexit__(None, None, None))


@pytest.fixture
def server(shared):
    """The shared server, nobody watching, its world begun anew."""
    from tests.stream.stream_client import LOOP, until

    async def fresh():
        for client in tuple(shared.lobby.clients):
            await client.leave()
        await until(lambda: not shared.lobby.clients)
        await shared.session.command("reset", seed=0)
        if shared.session.player.paused:
            await shared.session.command("resume")
        await until(lambda: shared.session.phase == "running")
        shared.session.steering.begin("calm")
        await until(lambda: shared.session.steering.prompts["a"] == "calm" and not shared.session.steering._waiting)

    LOOP.run_until_complete(fresh())
    return shared
