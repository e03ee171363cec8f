"""`inferix evaluate dataset`: a video of each of a dataset's captions, made and judged; what is done is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from inferix_kernels import OutOfPages, Unsupported, __version__
from inferix_kernels.files import atomic_write

from ..evaluate.dataset import CAPTIONS, Dataset, Entry, composition, read_dataset
from ..evaluate.judging import chosen, judge
from ..evaluate.processes import each_done
from ..evaluate.report import failures, html, report, tables
from ..evaluate.video import FRAMES
from ..evaluate.weights import WeightsDir
from ..media.journal import is_unfinished, journal_path
from .configs import EvaluateDatasetConfig
from .evaluate import Evaluated
from .generate import generate
from .options import configured

SETTINGS, EVALUATION = "settings.json", "evaluation.json"
CHECKPOINTS, SAMPLES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin"), 64
MADE = (".mp4", ".journal", ".json")  # what was made, or begun
# Options that no result depends on, or that a result says itself: its metrics and weight files.
WHERE = ("folder", "out", "limit", "jobs", "weights_dir", "split")


def evaluate_dataset(config: EvaluateDatasetConfig | None = None, /, **options: Any) -> Evaluated:
    """Make a video of each of a dataset's captions, and judge them. Called again, it goes on where it was ended.

    Args:
        config: which captions, who makes the videos, and by what they are judged.
        options: fields of EvaluateDatasetConfig, in place of those of `config`.

    Raises:
        ValueError: an option is not what it must be, the captions can not be read, or `out` holds results of other
            settings. A video that can not be made or judged is in the report; the others go on.

    Example:
        >>> from pathlib import Path
        >>> Path("dataset").mkdir()
        >>> line = '{"id": "0001", "prompts": ["desert day", "desert night"]}'
        >>> _ = Path("dataset/captions.jsonl").write_text(line)
        >>> found = evaluate_dataset(folder="dataset", model="tiny", seconds=1, metrics=["proxy:exposure"], chunks=2)
        >>> found.report["dataset"]["protocol"]["each video"]["0001"]
        [[0.0, 'desert day'], [0.5, 'desert night']]
    """
    return _evaluate_dataset(configured(EvaluateDatasetConfig, config, options))


def _evaluate_dataset(config: EvaluateDatasetConfig, progress: bool = False) -> Evaluated:
    dataset = read_dataset(config.folder, config.split)
    weights = WeightsDir(config.weights_dir)
    metrics, left_out = chosen(config.metrics, weights)
    by = {"metrics": {metric.name for metric in metrics}, "weights": dict(weights.read)}
    out, settings = Path(config.out), _settings(config)
    _keep_settings(settings, out)
    entries = dataset.chosen[: config.limit]
    read = partial(_read_result, config, out, by)
    missing = [entry for entry in entries if read(entry) is None]
    failed = dict(dataset.failed)
    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task("videos", total=len(entries), completed=len(entries) - len(missing))
        for entry, error in each_done(partial(_one, config, weights), missing, config.jobs):
            if error:
                failed[entry.id] = f"{entry.id}: {error}"
            bar.advance(task)
    found = []
    for entry in entries:
        if entry.id not in failed and (result := read(entry)) is not None:
            found.append(result)
        else:
            failed.setdefault(entry.id, f"{entry.id}: its result can not be read: {_result_path(out, entry)}")
    whole = _merged(config, settings, dataset, entries, found, failed)
    whole["left_out"] = left_out
    path = out / EVALUATION
    _write(path, whole)
    with atomic_write(path.with_suffix(".html"), "out") as part:
        part.write_text(html(whole), encoding="utf-8")
    return Evaluated(path, whole)


def _settings(config: EvaluateDatasetConfig) -> dict[str, Any]:
    """What every result of a folder depends on, as JSON's types."""
    kept = {name: value for name, value in asdict(config).items() if name not in WHERE}
    if config.weights is not None:
        path = Path(config.weights).resolve()
        kept["weights"] = {"path": str(path), "samples": _sampled(path)}
    if config.model is None:
        kept = {name: kept[name] for name in ("model", "metrics", "chunks", "all")}
    return dict(json.loads(json.dumps(kept)))


def _sampled(path: Path) -> str:
    """Of a checkpoint, or of those in a folder: a hash of their names, sizes, and SAMPLES places in each. Cheap, and a
    network that was trained further differs in most of its numbers."""
    digest = hashlib.sha256()
    if not path.exists():
        raise ValueError(f"weights must be a checkpoint or a folder of one, got {str(path)!r}")
    try:
        files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.suffix in CHECKPOINTS)
        for each in files:
            size = each.stat().st_size
            digest.update(f"{each.name} {size}\n".encode())
            with each.open("rb") as file:
                for i in range(SAMPLES):
                    file.seek(i * size // SAMPLES)
                    digest.update(file.read(4096))
    except OSError as error:
        raise ValueError(f"weights: cannot read {str(path)!r} ({error.strerror})") from None
    return digest.hexdigest()[:16]


def _keep_settings(wanted: Mapping[str, Any], out: Path) -> None:
    """Write them, or refuse a folder that holds what was made by others."""
    path = out / SETTINGS
    try:
        for name in ("videos", "results"):
            (out / name).mkdir(parents=True, exist_ok=True)
        there = json.loads(path.read_text()) if path.exists() else wanted
    except (OSError, ValueError) as error:
        raise ValueError(f"out must be a folder of this command, cannot use {str(out)!r} ({error})") from None
    made = (each for name in ("videos", "results") for each in (out / name).iterdir() if each.suffix in MADE)
    if there != wanted and any(made):
        keys = there.keys() | wanted.keys() if isinstance(there, dict) else ()
        changed = next((name for name in sorted(keys) if there.get(name) != wanted.get(name)), SETTINGS)
        before, now = (str(each.get(changed)) if isinstance(each, dict) else "?" for each in (there, wanted))
        raise ValueError(f"out: {str(out)!r} holds results of other settings: `{changed}` was {before}, now {now}")
    _write(path, wanted)


def _prompts(config: EvaluateDatasetConfig, entry: Entry) -> tuple[tuple[float, str], ...]:
    """(second, prompt) of a video, by the protocol."""
    return entry.schedule(config.seconds)[: 1 if config.protocol == "first" else None]


def _one(config: EvaluateDatasetConfig, weights: WeightsDir, entry: Entry) -> str:
    """Make and judge a video, and write its result; why not, on one line, or ""."""
    out = Path(config.out)
    try:
        metrics, _ = chosen(config.metrics, weights)
        video = _make(config, entry, out) if config.model is not None else entry.video
        if video is None:
            raise ValueError(f"video must be named in {CAPTIONS} where no model is given, got none")
        judged = judge(video, metrics, weights, config.chunks, None if config.all else FRAMES, argument="video")
        result = report([judged], metrics, config.chunks, weights=weights.read)
        asked = None if config.model is None else _prompts(config, entry)
        _write(_result_path(out, entry), {**result, "id": entry.id, "prompts": asked, "video": str(video)})
    except (ValueError, ImportError, OSError, Unsupported, OutOfPages) as error:
        return " ".join(str(error).split()) or type(error).__name__
    except Exception as error:  # a GPU without memory, say: it ends one video, and not the hours of the others
        return " ".join(f"{type(error).__name__}: {error}".split())
    return ""


def _make(config: EvaluateDatasetConfig, entry: Entry, out: Path) -> Path:
    """The entry's video. One of these prompts that is there is not made again, one that was begun is gone on with."""
    video = out / "videos" / f"{entry.id}.mp4"
    script, journal = video.with_suffix(".txt"), journal_path(video)
    wanted = "".join(f"{at!r} {prompt}\n" for at, prompt in _prompts(config, entry))
    if not script.exists() or script.read_text(encoding="utf-8") != wanted:
        for path in (video, journal):  # of other prompts
            path.unlink(missing_ok=True)
        with atomic_write(script, "out") as part:
            part.write_text(wanted, encoding="utf-8")
    if video.exists():
        return video
    made = generate(
        model=config.model,
        prompt_file=script,
        seconds=config.seconds,
        out=video,
        resume=is_unfinished(journal),
        **config.arguments("model"),
        **config.arguments("world"),
    )
    return made.path


def _result_path(out: Path, entry: Entry) -> Path:
    return out / "results" / f"{entry.id}.json"


def _read_result(
    config: EvaluateDatasetConfig, out: Path, by: Mapping[str, Any], entry: Entry
) -> Mapping[str, Any] | None:
    """The result that is there, of these prompts or this video, and by these metrics and weight files; None: there is
    none, or the video was changed since."""
    path = _result_path(out, entry)
    try:
        found = json.loads(path.read_text())
        prompts = found["prompts"] and [tuple(each) for each in found["prompts"]]
        same = prompts == (None if config.model is None else [*_prompts(config, entry)])
        same &= by == {"metrics": set(found["metrics"]), "weights": found["weights"]}
        same &= config.model is not None or found["video"] == str(entry.video)
        video = Path(found["video"])
        same &= not video.exists() or video.stat().st_mtime_ns <= path.stat().st_mtime_ns
        return found if same and isinstance(found["videos"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _merged(
    config: EvaluateDatasetConfig,
    settings: Mapping[str, Any],
    dataset: Dataset,
    entries: Iterable[Entry],
    found: list[Mapping[str, Any]],
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """One report of all videos, and what is known of the dataset."""
    whole = dict(report([], [], config.chunks, failed=failed))
    for name in ("metrics", "weights"):
        whole[name] = {key: value for each in found for key, value in each[name].items()}
    whole["videos"] = [video for each in found for video in each["videos"]]
    made = None if config.model is None else {"by": config.model, "inferix": __version__, **settings}
    whole["dataset"] = {
        "folder": str(dataset.folder),
        "entries": len(dataset.entries),
        "evaluated": len(found),
        "split": None if dataset.split is None else str(dataset.split),
        "composition": [dict(zip(("what", "published", "found", "agrees"), line)) for line in composition(dataset)],
        "made": made,
        "protocol": None
        if made is None
        else {
            "name": config.protocol,
            "seconds": config.seconds,
            "each video": {entry.id: _prompts(config, entry) for entry in entries},
        },
    }
    return dict(json.loads(json.dumps(whole)))


def _write(path: Path, found: Mapping[str, Any]) -> None:
    with atomic_write(path, "out") as part:
        part.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


def run(config: EvaluateDatasetConfig) -> int:
    """Print the tables; 1 if a line could not be read, or a video not made or judged."""
    found = _evaluate_dataset(config, progress=True)
    console = Console()
    print_all(found.report, console.print)
    print(f"{found.path} and {found.path.with_suffix('.html').name}")
    return 1 if found.report["failed"] else 0


def print_all(found: Mapping[str, Any], show: Callable[[Any], object]) -> None:
    """The dataset's composition, the protocol, the tables of metrics, and what failed."""
    dataset = found["dataset"]
    print(dataset["folder"])  # as a title of the table a long one would be broken
    drawn = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("", "published", "found", ""):
        drawn.add_column(head, justify="right" if head else "left", no_wrap=True)
    for line in dataset["composition"]:
        drawn.add_row(line["what"], line["published"], line["found"], "" if line["agrees"] else "differs")
    show(drawn)
    if dataset["protocol"]:
        each = "the prompt of each segment from the second on at which it begins"
        what = each if dataset["protocol"]["name"] == "segments" else "the first prompt throughout"
        print(f"prompts: {what}; {dataset['protocol']['seconds']:g} s, by {dataset['made']['by']}")
    for table in tables(found):
        show(table)
    reasons: dict[str, list[str]] = {}
    for line in failures(found):
        what, _, reason = line.partition(": ")
        reasons.setdefault(reason, []).append(what)
    for reason, (first, *others) in reasons.items():
        print(f"{first}{f' and {len(others)} others' if others else ''}: {reason}")
    if reasons:
        print("the same command goes on with what failed")
