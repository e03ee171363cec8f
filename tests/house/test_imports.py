"""No import circle, none upward: what lies below does not know what stands on it."""

import functools
from pathlib import Path

import pytest

from tests.house.imports import Graph, circles, graph, modules

ROOT = Path(__file__).parents[2]
FILES = modules(
    {
        "inferix_kernels": ROOT / "inferix_kernels",
        "inferix": ROOT / "python" / "inferix",
        "benchmarks": ROOT / "benchmarks",
        "tests": ROOT / "tests",
    }
)


@functools.cache
def imports() -> Graph:
    return graph(FILES)


# Of inferix_kernels, from below. A module imports those of its own layer and of the layers before it.
LAYERS = (
    ("profile", "_recording", "_ring", "_gpu_times", "verdict", "_spans"),
    (
        *("layout", "plans", "_C", "files", "sass", "hazards", "uploads"),
        *("_install", "_printing", "proofs.stored", "proofs.speeds"),
    ),
    ("_check", "_dispatch", "_overlap", "_remembered", "arrivals", "reference"),
    ("compiled", "triton_kernels", "flash_attn_backend", "torch_backend", "testing", "_library"),
    ("ops", "chosen", "estimate"),
    ("quantize", "store"),
    ("integrations", "proofs", "distributed"),
    ("", "__main__"),
)

# Above all else of its package, a script may import what it likes, if nobody imports it: `python -m` starts these.
SCRIPTS = {"inferix.evaluate.tiny_studies", "inferix.models.tiny.evaluate", "inferix.models.tiny.train"}

# Who never imports whom, with all that lies below the names. No star stands for a part: these are prefixes.
FAMILIES = (
    "arrivals",
    "attention",
    "block",
    "diffusers",
    "e2e",
    "formats",
    "host",
    "kv_pages",
    "linear",
    "page_table",
    "parallel",
    "profiler",
    "qkv",
    "stream",
    "wan_block",
)
COMMANDS = ("inferix.commands",)
NEVER = {
    "inferix_kernels": ("inferix", "benchmarks", "tests"),
    "inferix": ("benchmarks", "tests"),
    "benchmarks": ("tests",),
    "benchmarks.harness": (
        *(f"benchmarks.{name}" for name in (*FAMILIES, "families", "peers", "sweep", "commands", "isolated", "worker")),
        "benchmarks.__main__",
    ),
    "inferix.stream": ("inferix.models", *COMMANDS),
    "inferix.models": ("inferix.stream", "inferix.world", *COMMANDS),
    "inferix.world": ("inferix.stream", *COMMANDS),
    "inferix.media": ("inferix.stream", "inferix.models", "inferix.world", *COMMANDS),
    "inferix.decode": ("inferix.stream", "inferix.world", *COMMANDS),
}

# To be mended: imports that break a rule, or without which a circle opens. One that is gone must leave the list.
UPWARD: set[tuple[str, str]] = set()
CLOSING: set[tuple[str, str]] = set()


def inside(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def layer_of(name: str) -> int:
    """The one with the longest prefix of a module's name."""
    short = name.removeprefix("inferix_kernels").removeprefix(".")
    found = [(len(stem), i) for i, layer in enumerate(LAYERS) for stem in layer if short == stem or inside(short, stem)]
    assert found, f"{name} must be given a layer"
    return max(found)[1]


def upward() -> set[tuple[str, str]]:
    pairs = {(a, b) for a, others in imports().items() for b in others}
    kernels = {(a, b) for a, b in pairs if inside(a, "inferix_kernels") and inside(b, "inferix_kernels")}
    return {(a, b) for a, b in kernels if layer_of(b) > layer_of(a)} | {
        (a, b)
        for a, b in pairs - kernels
        for below, forbidden in NEVER.items()
        if inside(a, below) and a not in SCRIPTS and any(inside(b, above) for above in forbidden)
    }


def test_nothing_imports_upward():
    found = upward()
    assert not found - UPWARD
    assert not UPWARD - found, "mended: take it off the list"


def test_nobody_imports_a_script():
    assert not {(a, b) for a, others in imports().items() for b in others & SCRIPTS if not inside(a, "tests")}


def test_no_modules_import_each_other_in_a_circle():
    assert not circles({a: {b for b in others if (a, b) not in CLOSING} for a, others in imports().items()})


@pytest.mark.parametrize("importer, imported", sorted(CLOSING))
def test_an_import_that_closes_a_circle_is_taken_off_the_list_once_it_is_mended(importer, imported):
    rest = CLOSING - {(importer, imported)}
    assert circles({a: {b for b in others if (a, b) not in rest} for a, others in imports().items()})


def tree(tmp_path, **files):
    for name, text in files.items():
        path = tmp_path / "p" / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for folder in (path for path in (tmp_path / "p", *(tmp_path / "p").rglob("*")) if path.is_dir()):
        (folder / "__init__.py").touch()
    return graph(modules({"p": tmp_path / "p"}))


def test_imports_are_found_wherever_they_stand(tmp_path):
    edges = tree(
        tmp_path,
        a="import p.b\ndef f():\n    from . import c\nif TYPE_CHECKING:\n    from .q.d import D\nimport os, torch.nn",
        b="from p.c import f\nfrom p import q",
        c="x = 1",
        q__d="from .. import b\nfrom ..a import f as g\nfrom . import e as other",
        q__e="from .d import D",
    )
    assert edges["p.a"] == {"p.b", "p.c", "p.q.d"}
    assert edges["p.b"] == {"p.c", "p.q"}
    assert edges["p.q.d"] == {"p.b", "p.a", "p.q.e"}
    assert circles(edges) == [["p.a", "p.q.d", "p.q.e"]]


def test_a_circle_of_any_length_is_found():
    ring = {str(i): {str((i + 1) % 5)} for i in range(5)}
    assert circles(ring | {"out": {"0"}, "end": set()}) == [[str(i) for i in range(5)]]
    assert not circles(ring | {"4": set()})
