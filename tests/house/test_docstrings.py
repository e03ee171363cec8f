"""Every public name has an example in its docstring, and the examples run.

`torch`, `inferix` and the kernels' public names are there; all else an example makes itself. A method's goes on from
its class's.
"""

import doctest
import inspect
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import inferix
import inferix.profile
import inferix_kernels
import inferix_kernels.profile
from inferix.models import load_model
from inferix.models.linears import weight_bytes
from inferix.profile.overhead import overhead, span_cost
from inferix.profile.rows import Figures
from inferix_kernels import KVPages, KVStore, PageList, PageTable, Pass, Policy, distributed, quantize
from inferix_kernels.distributed import wire
from inferix_kernels.quantize import Linear8, QConfig, Residual, linear_input, linear_output, quantize_linears
from inferix_kernels.store.memory import frame_tokens, plan_memory
from inferix_kernels.store.snapshot import save

ROOT = Path(__file__).parents[2]
PUBLIC = {name: getattr(inferix_kernels, name) for name in inferix_kernels.__all__}
# Public methods that are there for other modules of ours, or that nobody needs an example of.
PLAIN = {"check_held", "check_open", "resident", "seen", "gone", "check_room", "converted"}
PLAIN |= {"keeps", "last_picture", "kv_read", "kv_bytes"}
ALONE = [
    *(x for x in PUBLIC.values() if callable(x)),
    load_model,
    plan_memory,
    frame_tokens,
    save,
    Linear8,
    QConfig,
    quantize.convert,
    quantize.quantize_dynamic,
    quantize.recipe_of,
    quantize.save,
    quantize_linears,
    linear_input,
    linear_output,
    Residual,
    weight_bytes,
]
ALONE += [x for x in (getattr(inferix, name) for name in inferix.__all__) if callable(x) and x is not inferix.World]


_SHARED = [getattr(distributed, name) for name in distributed.__all__ if name != "Ticket"]  # which is a protocol
ALONE += [thing for thing in _SHARED if callable(thing)]

# Of the profiler, all that needs more than a name to be understood.
_SIMPLE = {"clock", "level", "recording", "set_level", "stop", "LEVELS", "Row", "Change", "merge", "read"}
ALONE += [getattr(inferix.profile, name) for name in inferix.profile.__all__ if name not in _SIMPLE]
ALONE += [overhead, span_cost, Figures]
ALONE += [wire.rows_of, wire.page_bytes, wire.keys, wire.queries, wire.outputs, wire.round_the_ring]


def example(thing: object) -> str:
    """The section `Example:` of a docstring."""
    _, found, rest = (inspect.getdoc(thing) or "").partition("\nExample:\n")
    assert found, f"{thing.__qualname__} has no section `Example:` in its docstring"
    section, *_ = rest.split("\n\n")
    assert ">>>" in section, f"{thing.__qualname__}: its example has no line of code"
    return inspect.cleandoc(section)


def methods(kind: type) -> list[str]:
    """In the order of the source, those of base classes first."""
    found = {name: x for base in reversed(kind.__mro__) for name, x in vars(base).items()}
    return [n for n, x in found.items() if inspect.isfunction(x) and not n.startswith("_") and n not in PLAIN]


METHODS = [(kind, name) for kind in (PageTable, Pass, Policy, Residual) for name in methods(kind)]
METHODS += [(KVStore, "open"), (KVPages, "empty"), (PageList, "of"), (distributed.Workload, "of")]


def follow(*things: object) -> None:
    names = {"torch": torch, "inferix": inferix, **PUBLIC}
    failures = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    for thing in things:
        test = doctest.DocTestParser().get_doctest(example(thing), names, thing.__qualname__, None, 0)
        test.globs = names  # not a copy: a method's example goes on
        runner.run(test, out=failures.append, clear_globs=False)
    assert not failures, "".join(failures)


@pytest.mark.parametrize("thing", ALONE, ids=lambda thing: thing.__qualname__)
def test_an_example_runs(thing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    follow(thing)


@pytest.mark.parametrize("kind, method", METHODS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_methods_example_goes_on_from_its_classes(kind, method):
    follow(kind, getattr(kind, method))


def test_a_world_does_what_its_examples_say():
    follow(inferix.World, *(getattr(inferix.World, name) for name in methods(inferix.World)))  # one for all: it is slow


def test_an_example_that_is_wrong_or_missing_fails():
    def wrong():
        """Adds.

        Example:
            >>> 1 + 1
            3
        """

    with pytest.raises(AssertionError, match=r"Got:\n *2"):
        follow(wrong)
    with pytest.raises(AssertionError, match="no section"):
        follow(types.SimpleNamespace(__qualname__="nothing", __doc__="Nothing."))


def test_the_reference_is_built_of_all_public_names(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc is not installed: pip install -e '.[docs]'")
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    modules = re.search(r"^REFERENCE := (.*)$", makefile, re.MULTILINE)[1]
    prefixed = r"\$\(addprefix (\S+),([^)]*)\)"
    modules = re.sub(prefixed, lambda found: " ".join(found[1] + name for name in found[2].split()), modules)
    command = re.search(r"^docs:.*\n\t\$\(BIN\)/python (.*) -o build/docs \$\(REFERENCE\)$", makefile, re.MULTILINE)[1]
    made = subprocess.run(
        [sys.executable, *shlex.split(command), "-o", str(tmp_path), *shlex.split(modules)],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0 and "Warn" not in made.stderr, made.stderr
    page = (tmp_path / "inferix_kernels.html").read_text()
    assert not [name for name in PUBLIC if f'id="{name}"' not in page]
    assert 'id="generate"' in (tmp_path / "inferix/commands/generate.html").read_text()
    assert 'id="World.step"' in (tmp_path / "inferix/world.html").read_text()
