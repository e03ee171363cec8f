"""The commands of `python -m benchmarks`. Each takes the parsed arguments and returns the exit code."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from inferix_kernels.files import atomic_write

from . import families, isolated, shapes
from . import peers as others
from . import sweep as sweeps
from .harness import compare as comparison
from .harness import environment, folders, isa, launched, plots, show
from .harness import evidence as ledger
from .harness import report as reports
from .harness.measure import Machine, Settings
from .harness.plan import gpu_run
from .harness.processes import since_start
from .harness.rows import Document, Row, append
from .harness.table import markdown
from .harness.timing import TIMERS


def settings_of(args: argparse.Namespace, timer: str = "") -> Settings:
    """Raises ValueError for what can't be measured so."""
    for shape in args.shapes:
        shapes.find_shape(shape)
    choices = TIMERS[args.device]
    timer = args.timer or timer or next(iter(choices))
    if timer not in choices:
        raise ValueError(f"--timer must be one of {', '.join(choices)} on {args.device}, got {timer}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    if args.rounds < 0 or args.seconds < 0 or args.threads < 1:
        raise ValueError("--rounds and --seconds must not be negative, and --threads at least 1")
    isa.hold(args.isa)
    torch.set_num_threads(args.threads)
    model = getattr(args, "model", None) or ("self-forcing" if args.device == "cuda" else "tiny")
    weights, blocks = getattr(args, "weights", None), getattr(args, "blocks", 12)
    return Settings(
        device=args.device,
        timer=timer,
        cold=args.cold,
        small=set(args.shapes) == {"smoke"},
        rounds=args.rounds,
        seconds=args.seconds,
        backends=args.backends,
        formats=args.formats,
        model=model,
        weights=weights,
        blocks=blocks,
        isa=args.isa,
    )


class Results:
    """Where rows go as they come: a long run may be stopped, and keeps what it has."""

    def __init__(self, args: argparse.Namespace, settings: Settings):
        self.args, self.settings, self.document, self.unwritten = args, settings, Document({}, []), 0
        if args.plot:
            plots.figure(1, 1, [1.0])  # without matplotlib, say so before an hour of measuring
        self.append_to = []
        if args.record:
            head = environment.header(settings)
            self.append_to.append(ledger.record_path(head))
        if args.json and args.json.suffix == ".jsonl":
            self.append_to.append(args.json)
        for path in filter(Path.exists, self.append_to):
            head = Document.load(path).header
            if head["kernels"] != environment.fingerprints():
                raise ValueError(f"{path} holds a run of other sources: choose a new file")
            if head["device"] != environment.device_name(settings.device):
                raise ValueError(f"{path} holds a run on {head['device']}: choose a new file")
            if "settings" in head and ledger.setting_of(head) != ledger.setting_of(environment.header(settings)):
                raise ValueError(f"{path} holds a run with {ledger.setting_of(head)}: choose a new file")

    def add(self, rows: Sequence[Row]) -> None:
        """Rows that can't be written, to a disk that is full, say, are shown all the same, and the run goes on."""
        if not rows:
            return
        if not self.document.header:  # not before something has run: clocks of an idle GPU say nothing
            self.document.header = environment.header(self.settings, self.args.note)
        self.document.rows += rows
        try:
            for path in self.append_to:
                append(path, self.document.header, rows)
            if self.args.json and self.args.json not in self.append_to:
                self.document.save(self.args.json)
        except ValueError as error:
            self.unwritten += len(rows)
            print(f"benchmarks: {error}; {self.unwritten} rows are not in it", file=sys.stderr, flush=True)

    def done_before(self) -> set[tuple[str, ...]]:
        """(case, contender, format) of what --json holds already; what was absent then may be here now."""
        path = self.args.json
        rows = Document.load(path).rows if path and path.exists() else []
        return {row.key[:3] for row in rows if row.status != "absent"}

    def finish(self, draw: Callable[[Sequence[Row], Path, str], None]) -> int:
        """Plot what came; 1 if anything of ours was wrong or failed, or could not be written."""
        if self.args.plot:
            draw(self.document.rows, self.args.plot, caption(self.document))
        bad = any(row.status in ("wrong", "failed") for row in self.document.rows if row.ours)
        return int(bad or self.unwritten > 0)


def caption(document: Document) -> str:
    head = document.header
    words = [head["device"], head["architecture"], f"{head['settings']['threads']} threads", head["date"][:10]]
    words += ["caches cold" if head["settings"]["cold"] else "caches warm", f"timer {head['settings']['timer']}"]
    return ", ".join(words)


def run(args: argparse.Namespace) -> int:
    """Check every contender against the reference, then time those that are right, taking turns; with --isolate, one
    after the other in a process that is made anew when one faults or hangs."""
    launched.rank_0_writes(args)
    wanted = args.families or families.FAMILIES
    sizes = args.shapes or shapes.DEFAULT[args.device]
    for name in wanted:
        for size in sizes:
            families.shape_for(name, size)
    settings = settings_of(args)
    if not args.patience > 0:
        raise ValueError(f"--patience must be above 0 seconds, got {args.patience:g}")
    if args.resume and not (args.isolate and args.json and args.json.suffix == ".jsonl"):
        raise ValueError("--resume must come with --isolate and --json F.jsonl, whose rows are not measured again")
    results = Results(args, settings)
    if not args.markdown:
        print("\n".join(environment.lines(environment.brief(settings))) + "\n", flush=True)
    if args.isolate:
        _run_isolated(args, settings, results, wanted, sizes)
    else:
        machine = Machine(torch.device(settings.device), settings.small)
        for rows in families.run(wanted, sizes, settings, machine, args.ops):
            results.add(rows)
            print(*show.tables(rows), sep="\n", flush=True)
    if args.github:
        with atomic_write(args.github, "--github") as part:
            part.write_text(json.dumps(github(results.document.rows), indent=1) + "\n")
    return results.finish(plots.draw_rates)


def _run_isolated(
    args: argparse.Namespace, settings: Settings, results: Results, wanted: Sequence[str], sizes: Sequence[str]
) -> None:
    done = results.done_before() if args.resume else set()
    jobs = [job for job in isolated.jobs_of(wanted, sizes, settings, args.ops) if job.key not in done]
    for rows in isolated.measure(jobs, settings, args.patience):
        results.add(rows)
        for row in rows:
            print(show.line(row), flush=True)
    for rows in families.run_whole(wanted, sizes, settings):
        results.add(rows)
        print(*show.tables(rows), sep="\n", flush=True)


def github(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Rows as github-action-benchmark's customSmallerIsBetter."""
    return [
        {
            "name": f"{row.case} {row.contender} {row.format}",
            "unit": "us",
            "value": round(1e6 * row.median, 3),
            "range": f"{1e6 * row.quantile(20):.3g} .. {1e6 * row.quantile(80):.3g}",
            "extra": f"{show.rate(row)}, error {row.error.get('relative', 0):.1e}",
        }
        for row in rows
        if row.seconds and not row.peak
    ]


def listing(args: argparse.Namespace) -> int:
    """Families, shapes and contenders, and what is missing on this machine."""
    print(
        markdown(["shape", "queries x keys x heads x width"], [[s.name, s.numbers] for s in shapes.SHAPES.values()], 2)
    )
    for name in families.FAMILIES:
        found: dict[tuple[str, str], dict[str, None]] = {}
        for case in families.cases(name, ["smoke"], args.device):
            for contender in case.contenders:
                found.setdefault((contender.name, contender.absent), {})[contender.format] = None
        print(f"\n{name}: {(families.family(name).__doc__ or '').splitlines()[0]}")
        body = [[who, ", ".join(formats), absent] for (who, absent), formats in found.items()]
        print(
            markdown(["contender", "formats", "absent"], body, left=3) if body else "a loop of its own, no contenders"
        )
    return 0


def peers(args: argparse.Namespace) -> int:
    """Which other libraries could do our kernels' work, and which of them are here; with `install`, bring those named
    into folders of their own, build/peers/NAME."""
    if args.names and args.action != "install":
        raise ValueError(f"peers must be followed by install and names, got {args.names[0]}")
    if args.action == "install" and not args.names:
        raise ValueError(f"peers install must be followed by names: {', '.join(folders.names())}")
    for name in args.names:
        folders.install(name)
        print(f"{name} {folders.installed(name)}: {folders.FOLDERS / name}", flush=True)
    if args.action != "install":
        for family in ("attention", "kv_pages", "qkv", "linear"):
            others.register(family)
        print(markdown(["peer", "package", "devices", "families", "to be had by"], others.overview(), left=5))
    return 0


def compare(args: argparse.Namespace) -> int:
    """Judge B against A; exit code 1 if anything is SLOWER or BROKEN."""
    lines: list[comparison.Line] = []
    if args.a.is_dir() and args.b.is_dir():
        settings = settings_of(args, "cpu" if args.device == "cpu" and args.threads == 1 else "")
        if not args.backends:  # what is judged is our code
            settings = dataclasses.replace(settings, backends=("ours",))
        wanted = [
            (name, shape, i)
            for name in args.families or families.FAMILIES
            for shape in args.shapes or shapes.DEFAULT[settings.device]
            for i, _ in enumerate(families.cases(name, [shape], settings.device))
        ]
        for found in comparison.compare_trees([args.a, args.b], wanted, settings, args.threads, args.margin):
            lines += found
            print(f"{len(lines)} rows", file=sys.stderr, flush=True)
    else:
        lines = comparison.compare_recorded(Document.load(args.a), Document.load(args.b), args.margin)
    print(comparison.table(lines))
    return int(comparison.failed(lines))


def sweep(args: argparse.Namespace) -> int:
    """Cost against pages attended to, pages listed, worlds in one call and blocks made."""
    wanted = args.axes or [*sweeps.AXES, sweeps.BLOCKS]
    for axis in wanted:
        if axis not in sweeps.LABELS:
            raise ValueError(f"axis must be one of {', '.join(sweeps.LABELS)}, got {axis!r}")
    settings = settings_of(args)
    results = Results(args, settings)
    machine = Machine(torch.device(settings.device), settings.small)
    for axis in wanted:
        for shape in args.shapes:
            rows = sweeps.run_axis(axis, shapes.find_shape(shape), settings, machine)
            results.add(rows)
            print(sweeps.table(rows), end="\n\n", flush=True)
    return results.finish(draw_sweeps)


def draw_sweeps(rows: Sequence[Row], path: Path, words: str) -> None:
    plots.draw_sweeps(sweeps.series(rows), sweeps.LABELS, path, words)


def show_evidence(args: argparse.Namespace) -> int:
    """What was measured, and whether it still holds."""
    records = ledger.load_records() + [Document.load(path) for path in args.records or ()]
    lines = ledger.evidence(records)
    if args.only:
        lines = [line for line in lines if any(word in line.kernel for word in args.only)]
    print(ledger.table(lines))
    stale = ledger.stale(lines)
    print(f"\n{len(lines) - len(stale)} of {len(lines)} measured at this source")
    return int(args.fail_on_stale and bool(stale))


def report(args: argparse.Namespace) -> int:
    """Make tables and plots anew from records."""
    records = [Document.load(path) for path in args.records] if args.records else ledger.load_records()
    if args.plot:
        record = _newest(records, lambda row: bool(row.seconds))
        plots.draw_rates(record.rows, args.plot, caption(record))
    if args.plot_sweep:
        record = _newest(records, lambda row: row.family == "sweep")
        draw_sweeps(record.rows, args.plot_sweep, caption(record))
    if missing := [str(path) for path in args.files if not path.is_file()]:
        raise ValueError(f"files must be there, to be made anew, got {', '.join(missing)}")
    if args.files or not (args.plot or args.plot_sweep):
        for path in reports.update(args.files or sorted((ledger.ROOT / "docs").glob("*.md")), records):
            print(f"{path}: made anew")
    return 0


def _newest(records: Sequence[Document], drawn: Callable[[Row], bool]) -> Document:
    """The last record with something to draw."""
    for record in reversed(records):
        if any(map(drawn, record.rows)):
            return record
    raise ValueError("there is no record to draw: make one with `run --record` or `sweep --record`")


def env(args: argparse.Namespace) -> int:
    """What a figure of this machine would be a figure of."""
    settings = Settings(args.device, next(iter(TIMERS[args.device])))
    print("\n".join(environment.lines(environment.header(settings))))
    return 0


def gpu(args: argparse.Namespace) -> int:
    """Build, probes, speed, one block, counters, and in the time that is left the rest. Exit code 1: something is not
    well; 3: call again to go on."""
    if not args.minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {args.minutes:g}")
    if not args.dry_run and not torch.cuda.is_available():
        raise ValueError(f"gpu: torch finds no GPU here: {no_gpu()}; --dry-run goes through every stage on the CPU")
    return gpu_run(args.out.resolve(), args.dry_run).go(args.minutes - since_start() / 60)


def no_gpu() -> str:
    """Why, in a line: a driver that is too old, say."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "it says no more"
