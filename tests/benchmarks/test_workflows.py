"""The workflows of .github, acted out on a CPU: each step runs, in its order, in a copy of the repository.

What only a runner has is stood in for: the expressions of GitHub, its actions, two commands of NVIDIA, and a build of
the extension, which is copied. Commands of the benchmarks run in this process, where torch is loaded already, on a
small machine; what `compare` measures is left to its own test. Other values of a job's `env` make them small; the
commands are the workflow's own.
"""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from benchmarks import __main__ as cli
from benchmarks import commands, families
from benchmarks.harness.ledger import kernels
from benchmarks.harness.measure import Machine
from inferix_kernels import _C

yaml = pytest.importorskip("yaml", reason="pip install pyyaml")
ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"
ON_A_CPU = {
    "TESTS": "--version",  # it starts; which tests there are for a GPU needs all of them to be imported
    "FAMILIES": "kv_pages",
    "MEASURE": "--device cpu --shapes smoke --rounds 1 --seconds 1 --backends ours --threads 1",
    "KERNELS": "cpu/kv_pages",
}
STAND_INS = {
    "nvidia-smi": 'test "$1" = --query-gpu=name && echo "NVIDIA H200" && echo "NVIDIA H200"',
    "nvcc": "echo 13.0",
    # `python -m benchmarks` is noted, and run afterwards.
    "python": """
if [ "$1" = setup.py ]; then test -f setup.py && cp "$EXTENSION" inferix_kernels/
elif [ "$1 $2" = "-m benchmarks" ]; then shift 2; for word; do printf '%s\\n' "$word" >> "$NOTED"; done
else exec "$PYTHON" "$@"; fi""",
}
EXPRESSION = re.compile(r"\$\{\{\s*(.+?)\s*\}\}")


class Runner:
    """A machine that has checked the repository out.

    Attributes:
        steps: names of those that ran.
    """

    def __init__(self, folder: Path, event: dict[str, object]):
        self.workspace, self.folder, self.event = folder / "work", folder, event
        self.said: dict[str, str] = {}  # github.ref and so on -> value
        self.steps: list[str] = []
        skip = shutil.ignore_patterns("*.so", "__pycache__", "records", "node_modules")
        for part in ("inferix_kernels", "python", "csrc", "benchmarks"):
            shutil.copytree(ROOT / part, self.workspace / part, ignore=skip)
        for part in (".gitignore", "Makefile", "setup.py", "pyproject.toml", "CMakeLists.txt"):
            shutil.copy2(ROOT / part, self.workspace)
        git = [
            "git",
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b",
            "-c",
            "init.defaultBranch=main",
            "-C",
            self.workspace,
        ]
        for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "base"]):
            subprocess.run([*git, *words], check=True)
        self.base = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("temp", "bin"):
            (folder / name).mkdir()
        for name, script in STAND_INS.items():
            place = self.workspace / ".venv" / "bin" if name == "python" else folder / "bin"
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(f"#!/bin/sh\n{script}\n")
            (place / name).chmod(stat.S_IRWXU)
        shutil.copy2(_C.__file__, self.workspace / "inferix_kernels")
        for stamp in ("torch", "built", "tools"):  # what `make .venv/tools` leaves, newer than every source
            (self.workspace / ".venv" / stamp).touch()

    def run(self, job: dict, monkeypatch: pytest.MonkeyPatch) -> None:
        """All steps of a job that this event is for."""
        assert set(ON_A_CPU) == set(job["env"]), "the values that make the job small are those that it has"
        for step in job["steps"]:
            if "if" in step and not self._holds(step["if"]):
                continue
            if "run" in step:
                self._execute(step, {**job["env"], **ON_A_CPU}, monkeypatch)
            else:
                self._use(step["uses"], {name: self._filled(value) for name, value in step.get("with", {}).items()})
            self.steps.append(step.get("name", step.get("uses")))

    def _execute(self, step: dict, env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        noted, output, script = (self.folder / name for name in ("noted", "output", "script"))
        noted.write_text(""), output.write_text(""), script.write_text(self._filled(step["run"]))
        own = {name: self._filled(value) for name, value in step.get("env", {}).items()}
        places = {"GITHUB_OUTPUT": output, "GITHUB_WORKSPACE": self.workspace, "RUNNER_TEMP": self.folder / "temp"}
        ours = {"EXTENSION": _C.__file__, "NOTED": noted, "PYTHON": shutil.which("python3") or "python3"}
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        everything = {**os.environ, **env, **own, **places, **ours, "PATH": path}
        self.variables = {name: str(value) for name, value in everything.items()}
        # As a runner does where a step names no shell.
        ran = subprocess.run(
            ["bash", "-e", str(script)], cwd=self.workspace, env=self.variables, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{step['name']}: {ran.stdout}{ran.stderr}"
        if words := noted.read_text().splitlines():
            monkeypatch.chdir(self.workspace)
            assert cli.main(words) == 0, f"{step['name']}: {shlex.join(words)}"
        for line in output.read_text().splitlines():
            name, value = line.split("=", 1)
            self.said[f"steps.{step['id']}.outputs.{name}"] = value

    def _use(self, action: str, given: dict[str, object]) -> None:
        name, version = action.split("@")
        assert re.fullmatch(r"v\d+", version)
        if name == "benchmark-action/github-action-benchmark":
            rows = json.loads((self.workspace / str(given["output-file-path"])).read_text())
            assert rows and all({"name", "unit", "value"} <= row.keys() for row in rows)
            assert given["tool"] == "customSmallerIsBetter" and given["name"] == "NVIDIA H200"
        else:
            assert name == "actions/checkout" and not self.steps

    def _value(self, path: str) -> str:
        known = {"github.event_name": self.event["name"], "github.ref": self.event["ref"]}
        known |= {"github.event.pull_request.base.sha": self.base, "secrets.GITHUB_TOKEN": "secret", **self.said}
        return str(known[path])

    def _filled(self, text: object) -> object:
        return EXPRESSION.sub(lambda match: self._value(match[1]), text) if isinstance(text, str) else text

    def _holds(self, condition: str) -> bool:
        if match := re.fullmatch(r"startsWith\((\S+), '(.+)'\)", condition):
            return self._value(match[1]).startswith(match[2])
        match = re.fullmatch(r"(\S+) == '(.+)'", condition)
        assert match, condition
        return self._value(match[1]) == match[2]


def not_compared(trees, cases, settings, threads, margin):
    """In the place of compare_trees: both trees are there, built."""
    assert [tree.name for tree in trees] == ["base", ""] and cases and settings.device == "cpu"
    assert all(len(list(tree.glob("inferix_kernels/_C*.so"))) == 1 for tree in trees)
    return iter(())


EVENTS = [
    (
        {"name": "pull_request", "ref": "refs/pull/1/merge"},
        ["what is there", "build", "right on a GPU", "build what would be replaced", "not slower than it"],
    ),
    (
        {"name": "push", "ref": "refs/tags/v1"},
        ["what is there", "build", "right on a GPU", "measure", "no release on stale evidence", "history"],
    ),
]


@pytest.mark.parametrize("event, steps", EVENTS, ids=[event["name"] for event, _ in EVENTS])
def test_the_workflow_of_a_runner_with_a_gpu_runs_step_by_step(event, steps, tmp_path, monkeypatch):
    if not shutil.which("git") or not shutil.which("make"):
        pytest.skip("needs git and make")
    monkeypatch.setattr(commands, "Machine", lambda device, small: Machine(device, small=True))
    monkeypatch.setattr(commands.comparison, "compare_trees", not_compared)
    workflow = yaml.safe_load((WORKFLOWS / "gpu-benchmarks.yml").read_text())
    (job,) = workflow["jobs"].values()
    runner = Runner(tmp_path, event)
    runner.run(job, monkeypatch)
    assert runner.steps == ["actions/checkout@v5", *steps]
    if (
        event["name"] == "pull_request"
    ):  # the runner's folder is kept, but for what is temporary: the next one finds it so
        shutil.rmtree(tmp_path / "temp" / "base")
        (again,) = (step for step in job["steps"] if step.get("name") == "build what would be replaced")
        runner._execute(again, job["env"], monkeypatch)
        assert list((tmp_path / "temp" / "base" / "inferix_kernels").glob("_C*.so"))


def test_what_a_release_must_have_measured_is_what_is_measured():
    """Every kernel and format that the evidence is asked for is a contender of the families that are run."""
    (job,) = yaml.safe_load((WORKFLOWS / "gpu-benchmarks.yml").read_text())["jobs"].values()
    asked = {
        (kernel, format)
        for kernel, formats in kernels().items()
        for format in formats
        if any(word in kernel for word in job["env"]["KERNELS"].split(","))
    }
    contenders = [
        contender
        for family in job["env"]["FAMILIES"].split()
        for case in families.cases(family, ["wan1.3b-480p"], "cuda")
        for contender in case.contenders
        if contender.name.startswith("ours")
    ]
    assert len(asked) > 20 and not asked - {(contender.kernel, contender.format) for contender in contenders}


def test_commands_of_the_gpu_workflow_are_taken_with_its_own_values():
    """With the job's own `env`, as on a runner, and in the event's order: what a step reads an earlier one writes."""
    (job,) = yaml.safe_load((WORKFLOWS / "gpu-benchmarks.yml").read_text())["jobs"].values()
    scripts = [step["run"] for step in job["steps"] if "-m benchmarks" in step.get("run", "")]
    assert len(scripts) == 3
    for script in scripts:
        words = shlex.split(script.split("-m benchmarks", 1)[1])
        filled = [part for word in words for part in job["env"].get(word.strip("$"), word).split()]
        args = cli.parser().parse_args(filled)
        assert not any(part.startswith("$") for part in filled if "RUNNER_TEMP" not in part)
        assert getattr(args, "device", "cuda") == "cuda"


def test_the_cpu_workflow_is_what_ci_runs():
    """Its commands are those of .ci/run in the same order, for the Pythons that pyproject.toml allows, and exist."""
    (job,) = yaml.safe_load((WORKFLOWS / "cpu.yml").read_text())["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    ci = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert commands == ci and len(ci) == 3
    least = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert job["strategy"]["matrix"]["python"][0] == f"3.{least}"
    for command in commands:
        ran = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 0 and ran.stdout.strip(), command
