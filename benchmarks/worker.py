"""The process behind one side of `compare A B`: our harness, that tree's kernels.

Started as a script with PYTHONPATH at the tree. The tree's packages are imported first, so that what the harness, found
after that, imports of them is the tree's. Requests are JSON lines on stdin, answers JSON lines on stdout.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any


def serve() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what anything prints must not get among the answers
    del sys.path[0]  # this file's folder
    import inferix_kernels

    sys.path.insert(0, sys.argv[1])
    for answer in _answers(inferix_kernels.__file__):
        print(json.dumps(answer), file=answers, flush=True)


def _answers(kernels: str) -> Iterator[Any]:
    import torch

    from benchmarks import families
    from benchmarks.harness import isa
    from benchmarks.harness.measure import Contest, Machine, Settings

    first = json.loads(sys.stdin.readline())
    if not kernels.startswith(first["tree"]):
        raise SystemExit(f"{first['tree']} must hold inferix_kernels; the one found is {kernels}")
    settings = Settings(**first["settings"])
    isa.hold(settings.isa)
    torch.set_num_threads(first["threads"])
    machine = Machine(torch.device(settings.device), settings.small)
    yield "ready"
    contest: Contest | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "begin" in request:
            if contest:
                contest.close()
            family, shape, number = request["begin"]
            case = list(families.cases(family, [shape], settings.device))[number]
            contest = Contest(case, settings, machine)
            yield [dataclasses.asdict(row) for row in contest.rows]
        else:
            assert contest is not None
            yield contest.sample(contest.rows[request["sample"]])


if __name__ == "__main__":
    serve()
