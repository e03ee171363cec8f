"""Journals: what is taken up is what was written, damaged or not; one run writes."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch

from inferix.media.journal import Journal, _checksum, refuse_unfinished

SETTINGS = {"model": "x", "seed": 5, "prompts": [[0.0, "a fox"]]}
FRAME = (4, 2, 3)


def blocks(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1 + i % 3, 4, 2, 3, generator=generator) for i in range(count)]


def write(path: Path, count: int) -> None:
    journal = Journal(path, FRAME, SETTINGS, resume=False)
    for block in blocks(count):
        journal.append(block)
    journal.close(done=False)


def is_start(taken: list[torch.Tensor], of: list[torch.Tensor]) -> bool:
    return len(taken) <= len(of) and all(torch.equal(a, b) for a, b in zip(taken, of))


def test_a_journal_cut_anywhere_is_taken_up_as_far_as_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, 4)
    whole, made = path.read_bytes(), blocks(5)
    counts = []
    for end in [*range(0, len(whole), 7), len(whole)]:
        path.write_bytes(whole[:end])
        journal = Journal(path, FRAME, SETTINGS, resume=True)
        counts.append(journal.count)
        assert is_start(journal.blocks, made)
        journal.append(made[journal.count])
        journal.close(done=False)
        again = Journal(path, FRAME, SETTINGS, resume=True)
        assert again.count == counts[-1] + 1 and is_start(again.blocks, made)
        again.close(done=True)
        assert not path.exists()
    assert counts == sorted(counts) and set(counts) == {0, 1, 2, 3, 4}


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """One bit, a stretch of zeros or noise, a stretch lost, or one twice."""
    at, length = chance.randrange(len(whole)), chance.randrange(1, 200)
    kind = chance.randrange(5)
    if kind == 0:
        return whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :]
    middle = [bytes(length), chance.randbytes(length), b"", whole[at : at + length] * 2][kind - 1]
    return whole[:at] + middle + whole[at + length :]


@pytest.mark.parametrize(
    "before, now, says",
    [
        ({"precision": "auto"}, {"precision": "exact"}, "`precision` must be 'auto' as before, got 'exact'"),
        ({}, {"precision": "auto"}, "`precision` must be left to the version that began the video, got 'auto'"),
        ({"what it shows": 1}, {"what it shows": 2}, "what it shows must be 1 as before, got 2"),
    ],
)
def test_a_run_with_other_settings_is_not_taken_up(tmp_path: Path, before: dict, now: dict, says: str) -> None:
    """An option is between backquotes, by which the command line knows it."""
    Journal(tmp_path / "j", FRAME, SETTINGS | before, resume=False).close(done=False)
    written = (tmp_path / "j").read_bytes()
    with pytest.raises(ValueError, match=f"^resume: {re.escape(says)}$"):
        Journal(tmp_path / "j", FRAME, SETTINGS | now, resume=True)
    assert (tmp_path / "j").read_bytes() == written


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_journal_is_refused_or_taken_up_right(tmp_path: Path, seed: int) -> None:
    path, chance, made = tmp_path / "j", random.Random(seed), blocks(4)
    write(path, 4)
    whole, outcomes = path.read_bytes(), set()
    for _ in range(125):
        path.write_bytes(damaged(whole, chance))
        try:
            journal = Journal(path, FRAME, SETTINGS, resume=True)
        except ValueError as error:
            assert str(error).startswith("resume: ") and "\n" not in str(error)
            outcomes.add("refused")
            continue
        assert is_start(journal.blocks, made)
        outcomes.add(journal.count)
        journal.close(done=False)
    assert {"refused", 0, 1} <= outcomes


@pytest.mark.parametrize(
    "line",
    [b"[" * 100_000 + b"\n", b"7\n", b"{}\n", b"\xff\n", b"x" * (1 << 20)],
    ids=["deep", "7", "{}", "ff", "long"],
)
def test_a_first_line_of_another_kind_is_refused_and_kept(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "j"
    path.write_bytes(line)
    with pytest.raises(ValueError, match=r"^resume: ([^\n]* is damaged: its first line is not JSON|`journal` must be)"):
        Journal(path, FRAME, SETTINGS, resume=True)
    with pytest.raises(ValueError, match="an unfinished video has its journal there"):
        Journal(path, FRAME, SETTINGS, resume=False)
    assert path.read_bytes() == line


def test_a_block_that_is_not_in_its_place_is_not_taken(tmp_path: Path) -> None:
    """Lost, twice, or exchanged, though each is whole in itself."""
    path, made = tmp_path / "j", blocks(7)
    ends = []
    for count in range(8):
        path.unlink(missing_ok=True)
        write(path, count)
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    head, parts = whole[: ends[0]], [whole[a:b] for a, b in itertools.pairwise(ends)]
    for order, taken in (((1, 2), 0), ((0, 2), 1), ((0, 0, 1), 1), ((3, 1, 2, 0), 0), ((0, 1, 5, 3, 4, 2), 2)):
        path.write_bytes(head + b"".join(parts[i] for i in order))
        journal = Journal(path, FRAME, SETTINGS, resume=True)
        assert journal.count == taken and is_start(journal.blocks, made)
        journal.close(done=False)


@pytest.mark.parametrize("shape", [[10**9, 10**9], [-1, 4], [1.5], "x", {}, [True], [[2]]])
def test_a_shape_that_is_none_allocates_nothing(tmp_path: Path, shape: object) -> None:
    path = tmp_path / "j"
    write(path, 1)
    before = path.stat().st_size
    with path.open("ab") as file:
        file.write(json.dumps({"shape": shape, "crc32": 0}).encode() + b"\n" + bytes(64))
    journal = Journal(path, FRAME, SETTINGS, resume=True)
    assert journal.count == 1
    journal.append(blocks(2)[1])
    journal.close(done=False)
    assert path.stat().st_size > before


@pytest.mark.parametrize("shape", [[], [3], [2, 4, 2], [1, 4, 2, 4], [1, 4, 2, 3, 1], [4, 2, 3]])
def test_a_block_that_is_none_of_these_latents_is_not_taken(tmp_path: Path, shape: list[int]) -> None:
    """Though it is whole, and its checksum the right one."""
    path = tmp_path / "j"
    write(path, 1)
    whole = path.read_bytes()
    before = json.loads(whole.split(b"\n", 2)[1])["crc32"]
    numbers = torch.ones(shape).numpy().tobytes()
    checksum = _checksum(before, shape, numbers)
    path.write_bytes(whole + json.dumps({"shape": shape, "crc32": checksum}).encode() + b"\n" + numbers)
    journal = Journal(path, FRAME, SETTINGS, resume=True)
    assert journal.count == 1 and torch.equal(journal.blocks[0], blocks(1)[0])
    journal.append(blocks(2)[1])
    journal.close(done=False)
    again = Journal(path, FRAME, SETTINGS, resume=True)
    assert is_start(again.blocks, blocks(2)) and again.count == 2


def test_one_run_writes_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    first = Journal(path, FRAME, SETTINGS, resume=False)
    first.append(blocks(1)[0])
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"^path: '.*j' is being written by another run$"):
            Journal(path, FRAME, SETTINGS, resume)
    first.append(blocks(2)[1])
    first.close(done=False)
    with pytest.raises(ValueError, match="`resume` goes on"):
        refuse_unfinished(path)
    second = Journal(path, FRAME, SETTINGS, resume=True)
    assert second.count == 2
    second.close(done=True)
    refuse_unfinished(path)


def test_a_full_disk_keeps_the_blocks_before(small_disk) -> None:
    path = small_disk.folder / "j"
    journal = Journal(path, FRAME, SETTINGS, resume=False)
    block = torch.randn(417, *FRAME)
    with pytest.raises(ValueError, match=r"^path: no space left: '.*j'$"):
        for _ in range(20):
            journal.append(block)
    kept = journal.count
    journal.close(done=False)
    again = Journal(path, FRAME, SETTINGS, resume=True)
    assert 0 < again.count == kept < 20 and all(torch.equal(x, block) for x in again.blocks)
