"""A dataset of captioned videos, such as InterVBench (once LV-Bench): read, and compared with what is published of it.

A folder holds `captions.jsonl`, one JSON object a line: `prompts`, a list of texts, one for each segment of the video;
and what else is known: `id`, `video` (a path within the folder), `source`, `subject`. The format of InterVBench's own
captions is not published in what we could read. `prompts` is what prompt files of WorldAttention's code hold;
`captions`, whose texts end with the seconds that they are of, "(09s - 18s).", is how its paper lists them, and is taken
as well. `test_ids.txt` lists the ids that are evaluated, one a line: the 20 % of the published 80/20 split, whose list
is not published.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

CAPTIONS, SPLIT = "captions.jsonl", "test_ids.txt"
MOST_LINE = 1 << 20  # bytes
ID = re.compile(r"[\w-][\w.-]{0,119}", re.ASCII)  # names files
SPAN = re.compile(r"\s*\((\d{1,6})s\s*-\s*(\d{1,6})s\)\.?\s*$", re.ASCII)
# InterVBench: 1000 videos of more than 50 s, by source; what they show, as shares; arXiv 2511.20714v2. 200 of them are
# evaluated: WorldAttention, arXiv 2609.34606, appendix E.
SOURCES = {"DanceTrack": 66, "GOT-10k": 272, "HD-VILA-100M": 117, "ShareGPT4V": 545}
SUBJECTS = {"human": 0.67, "animal": 0.17, "environment": 0.16}
EVALUATED = 200


@dataclass(frozen=True)
class Entry:
    """A line of the captions.

    Attributes:
        id: of the video; names the files of its results.
        prompts: of its segments.
        starts: the second at which each begins; None: they are equally long.
        video: the dataset's own.
        source, subject: where it is from and what it shows; "" where it is not said.
    """

    id: str
    prompts: tuple[str, ...]
    starts: tuple[float, ...] | None = None
    video: Path | None = None
    source: str = ""
    subject: str = ""

    def schedule(self, seconds: float) -> tuple[tuple[float, str], ...]:
        """(second at which it begins, prompt) of a video so long; what would begin after its end is left out.

        Example:
            >>> Entry("1", ("desert day", "desert night")).schedule(10.0)
            ((0.0, 'desert day'), (5.0, 'desert night'))
        """
        count = len(self.prompts)
        starts = self.starts or tuple(seconds * i / count for i in range(count))
        return tuple((start, prompt) for start, prompt in zip(starts, self.prompts) if start < seconds)


@dataclass(frozen=True)
class Dataset:
    """What a folder holds.

    Attributes:
        folder: of it.
        entries: every line that can be read, in their order.
        chosen: those that are evaluated.
        split: the list of ids that chose them; None: there is none, and they are all.
        failed: by place, "captions.jsonl:7" or an id of the list, why there is no entry.
    """

    folder: Path
    entries: tuple[Entry, ...]
    chosen: tuple[Entry, ...]
    split: Path | None
    failed: Mapping[str, str] = field(default_factory=dict)


def read_dataset(folder: str | Path, split: str | Path | None = None) -> Dataset:
    """Read a folder's captions.

    Args:
        split: a list of the ids to evaluate; None: `test_ids.txt` of the folder, or all if there is none.

    Raises:
        ValueError: there are no captions, none of their lines can be read, or the list can not be. A line that can not
            be read is in `failed`; the others go on.

    Example:
        >>> dataset = read_dataset("dataset")
        >>> [entry.id for entry in dataset.chosen], dict(dataset.failed)
        (['0001'], {})
    """
    folder = Path(folder)
    entries: dict[str, Entry] = {}
    failed: dict[str, str] = {}
    try:
        with (folder / CAPTIONS).open("rb") as file:
            for number, line in enumerate(_lines(file), 1):
                if not line.strip():
                    continue
                try:
                    entry = _entry(line, number, folder)
                    if entry.id in entries:
                        raise ValueError(f"id must be of no other line, got {entry.id!r} again")
                    entries[entry.id] = entry
                except (ValueError, RecursionError) as error:
                    place = f"{CAPTIONS}:{number}"
                    failed[place] = " ".join(f"folder: {folder / CAPTIONS}:{number}: {error}".split())
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"folder must hold {CAPTIONS}: cannot read {str(folder / CAPTIONS)!r} ({reason})") from None
    if not entries:
        first = next(iter(failed.values()), f"folder: {str(folder / CAPTIONS)!r} holds no line")
        raise ValueError(first)
    path = folder / SPLIT if split is None and (folder / SPLIT).exists() else split
    if path is None:
        return Dataset(folder, tuple(entries.values()), tuple(entries.values()), None, failed)
    ids = _ids(Path(path))
    failed |= {id: f"split: {path}: {id!r} has no line in {CAPTIONS}" for id in ids if id not in entries}
    chosen = tuple(entries[id] for id in ids if id in entries)
    return Dataset(folder, tuple(entries.values()), chosen, Path(path), failed)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Its lines; of one of MOST_LINE bytes or more, the beginning."""
    while line := file.readline(MOST_LINE):
        yield line
        while len(line) == MOST_LINE and not line.endswith(b"\n"):
            line = file.readline(MOST_LINE)


def _entry(line: bytes, number: int, folder: Path) -> Entry:
    if len(line) >= MOST_LINE:
        raise ValueError(f"a line must be shorter than {MOST_LINE:,} bytes")
    try:
        read = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it must be UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it must be JSON ({error.msg} at character {error.pos + 1})") from None
    if not isinstance(read, dict):
        raise ValueError(f"it must be a JSON object, got {type(read).__name__}")
    name = "prompts" if "prompts" in read else "captions"
    texts = read.get(name)
    if not isinstance(texts, list) or not texts or not all(isinstance(each, str) and each.strip() for each in texts):
        raise ValueError(f"prompts must be a list of texts, at least one, got {texts!r:.60}")
    spans = [SPAN.search(text) for text in texts]
    prompts = tuple(" ".join(SPAN.sub("", text).split()) for text in texts)
    video = _text(read, "video")
    id = _text(read, "id") or (Path(video).stem if video else f"{number:04d}")
    if not ID.fullmatch(id):
        raise ValueError(f"id must be letters, digits, _ - and . (not first), at most 120, got {id!r:.140}")
    if video and not _is_within(video):
        raise ValueError(f"video must be a path within the folder, got {video!r:.140}")
    return Entry(
        id,
        prompts,
        _starts(spans),
        folder / video if video else None,
        _text(read, "source") or _source_in(video),
        _text(read, "subject"),
    )


def _text(read: Mapping[str, Any], name: str) -> str:
    value = read.get(name, "")
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{name} must be text, got {value!r:.60}")
    return value


def _is_within(video: str) -> bool:
    """By its words: a link may lead elsewhere, as whoever has the folder wants. What has a colon first is no file to
    FFmpeg."""
    path = Path(video)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]


def _source_in(video: str) -> str:
    """A folder of the video's path that has a source's name."""
    return next((part for part in Path(video).parts if part in SOURCES), "")


def _starts(spans: Sequence[re.Match[str] | None]) -> tuple[float, ...] | None:
    """When each segment begins, as its text says; None: no text says it."""
    if not any(spans):
        return None
    found = [float(span[1]) for span in spans if span]
    if len(found) < len(spans):
        raise ValueError("captions must all end with their seconds, or none")
    if found[0] != 0 or any(b <= a for a, b in pairwise(found)):
        raise ValueError(f"captions must begin at 0s and go upwards, got {', '.join(f'{each:g}s' for each in found)}")
    return tuple(found)


def _ids(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"split: cannot read {str(path)!r} ({error})") from None
    ids = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not ids:
        raise ValueError(f"split: {str(path)!r} lists no id")
    return ids


def composition(dataset: Dataset) -> list[tuple[str, str, str, bool]]:
    """What InterVBench is said to hold, beside what this folder does.

    Returns:
        Lines of (what, published, found, whether they agree): the number of videos, of those evaluated, of each source,
        and the share of each subject, which agrees if it is the same in whole per cent.

    Example:
        >>> composition(read_dataset("dataset"))[0]
        ('videos', '1000', '1', False)
    """
    entries = dataset.entries
    sources, subjects = (Counter(getattr(each, name) for each in entries) for name in ("source", "subject"))
    counts = {"videos": (sum(SOURCES.values()), len(entries)), "evaluated": (EVALUATED, len(dataset.chosen))}
    counts |= {f"source {name}": (count, sources[name]) for name, count in SOURCES.items()}
    others = sum(count for name, count in sources.items() if name not in SOURCES)
    counts["source, another or none"] = (0, others)
    lines = [(what, str(wanted), str(found), wanted == found) for what, (wanted, found) in counts.items()]
    for name, share in SUBJECTS.items():
        found = f"{subjects[name] / len(entries):.0%}"
        lines.append((f"subject {name}", f"{share:.0%}", found, found == f"{share:.0%}"))
    return lines
