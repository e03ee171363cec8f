"""The documents are short, link to what is there, and their code runs."""

import ast
import functools
import re
import shlex
from pathlib import Path

import pytest

from inferix_kernels import __main__ as command
from inferix_kernels._library import OPS

ROOT = Path(__file__).parents[2]
DOCS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("python/**/*.md"), *ROOT.glob("benchmarks/*.md")]
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]+`")
OF_OTHERS = {"self_forcing_dmd.pt"}  # names in other projects


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@functools.cache
def words() -> set[str]:
    """All names in the sources, and those of their files."""
    folders = ("inferix_kernels", "python", "csrc", "benchmarks", "tests")
    kinds = {".py", ".pyi", ".h", ".cpp", ".cuh", ".cu", ".js", ".json", ".sh"}
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    text = " ".join(path.read_text() for path in [*files, ROOT / "pyproject.toml"])
    return {*re.findall(r"\w+", text), *(path.name for path in files)}


@pytest.mark.parametrize("name", ["README.md", "DESIGN.md"])
def test_the_first_pages_are_short(name):
    assert len((ROOT / name).read_text().splitlines()) <= 150


def test_the_readme_has_at_most_four_pictures():
    assert 1 <= len(re.findall(r"!\[", (ROOT / "README.md").read_text())) <= 4


@pytest.mark.parametrize("path", DOCS, ids=named)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", prose(path))):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        goal = path.parent / file if file else path
        assert goal.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(goal), f"{target}: no such heading"


@pytest.mark.parametrize("path", DOCS, ids=named)
def test_files_and_modules_that_are_named_exist(path):
    if path.name == "CHANGELOG.md":  # says what there was once
        return
    said = path.read_text()
    for name in re.findall(r"\b(?:tests|docs|examples|csrc|benchmarks|inferix_kernels|inferix)/[\w/.]+\.\w+", said):
        assert (ROOT / name).exists() or (ROOT / "python" / name).exists(), name
    for module in re.findall(r"python -m ((?:tests|benchmarks|inferix|inferix_kernels)[\w.]*)", said):
        place = module.rstrip(".").replace(".", "/")
        found = [(ROOT / folder / f"{place}{end}") for folder in ("", "python") for end in (".py", "/__main__.py")]
        assert any(file.exists() for file in found), module
    for target in re.findall(r"make ([a-z]+)`", said):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


@pytest.mark.parametrize("path", DOCS, ids=named)
def test_commands_that_compile_take_what_they_are_given(path, monkeypatch):
    """An option that takes several values would swallow the cases behind it."""
    given = []
    monkeypatch.setattr(command, "estimate_command", lambda archs, cases, *_: given.append((archs, cases)) or 0)
    monkeypatch.setattr(command, "compile_command", lambda archs, cases, *_: given.append((archs, cases)) or 0)
    for said in re.findall(r"`(python -m inferix_kernels compile [^`[]+)`", prose(path)):
        command.main(shlex.split(said)[3:])
    for archs, cases in given:
        assert all(re.fullmatch(r"gfx\d+|\d+a?", arch) for arch in archs or ()), archs
        assert all(case.split()[0] in OPS for case in cases), cases


def test_every_document_can_be_found_from_the_first_pages():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        path = todo.pop()
        if path in reached or path.suffix != ".md" or not path.exists():
            continue
        reached.add(path)
        links = re.findall(r"\]\(([^)\s#]+)", CODE.sub("", prose(path)))
        todo += [(path.parent / link).resolve() for link in links if not link.startswith("http")]
    assert {path for path in DOCS if path.parent in (ROOT, ROOT / "docs")} <= reached


@pytest.mark.parametrize("path", [path for path in DOCS if "```python" in path.read_text()], ids=named)
def test_the_code_in_a_document_runs(path, tmp_path, monkeypatch):
    """One block after the other, as somebody who reads would."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for language, code in FENCE.findall(path.read_text()):
        if language == "python":
            exec(compile(code, named(path), "exec"), names)


@pytest.mark.parametrize("path", DOCS, ids=named)
def test_names_in_code_type_exist(path):
    if path.name == "CHANGELOG.md":  # says what there was once
        return
    for name in re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`", prose(path)):
        known = name in words() or all(part in words() for part in name.split("."))
        assert known or name in OF_OTHERS, f"nothing is called {name}"


def test_the_house_in_design_stands():
    (house,) = [code for _, code in FENCE.findall((ROOT / "DESIGN.md").read_text()) if "csrc/" in code]
    files = [name for name in re.findall(r"\b\w+\.(?:py|h|cpp)\b", house) if name in words()]
    tops = [ROOT / top for top in ("inferix_kernels", "python", "csrc", "benchmarks", "tests", "examples", "docs")]
    here = {path.name for top in tops for path in [top, *top.rglob("*")] if path.is_dir()}
    folders = [name for name in re.findall(r"\b(\w+)/", house) if name in here]
    assert files == re.findall(r"\b\w+\.(?:py|h|cpp)\b", house) and folders == re.findall(r"\b(\w+)/", house)


def test_the_glossary_says_each_term_once():
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    terms = [term for row in rows if row != "term" for term in row.split(", ")]
    assert len(terms) > 50 and len(set(terms)) == len(terms)


def defined(path: Path) -> set[str]:
    """Names that a file defines: functions, classes, Class.method, constants, fields."""
    text = path.read_text()
    if path.suffix != ".py":
        return set(re.findall(r"\b\w+\b", text))
    names: set[str] = set()

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                names.add(prefix + child.name)
                walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.Assign | ast.AnnAssign):
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    walk(ast.parse(text), "")
    return names


def test_what_how_a_block_is_made_cites_exists():
    said = (ROOT / "docs/how-a-block-is-made.md").read_text()
    cited = re.findall(r"`([\w/.]+\.(?:py|cpp|h|cuh|cu|js|json)):([\w.]+)`", said)
    assert len(cited) > 30
    for file, name in cited:
        path = ROOT / file
        assert path.exists(), f"{file}: no such file"
        assert name in defined(path), f"{file}: nothing is called {name}"
