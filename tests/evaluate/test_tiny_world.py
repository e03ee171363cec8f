"""Variants of the tiny world, what the simulator says of them, and studies that go on where they were ended."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferix import World
from inferix.evaluate import tiny_studies
from inferix.evaluate.tiny_studies import SIMULATOR, STUDIES, Study, Task, main, pair_table, tasks_of, truth_table
from inferix.evaluate.tiny_world import TRUTH, Variant, VariantWorld, by_chunks, of_blocks, stream, truth_of
from inferix.models import load_model
from inferix.models.tiny.simulator import ACTIONS

PAST, TRUE = truth_of(0, 60)
GIVEN = PAST.actions.tolist()


def steps(variant: Variant, blocks: int = 2) -> np.ndarray:
    """The first blocks of a variant, after six true frames."""
    world = VariantWorld(variant, seed=0)
    world.observe(PAST.frames, GIVEN, "desert day")
    return np.concatenate([world.step(["right"] * variant.block, "desert day") for _ in range(blocks)])


def test_a_variant_that_changes_nothing_is_the_world_itself() -> None:
    world = World("tiny", kv="int8", seed=0)
    world.observe(PAST.frames, GIVEN, "desert day")
    expected = np.concatenate([world.step(["right"] * 3, "desert day") for _ in range(2)])
    assert (steps(Variant("as shipped", kv="int8")) == expected).all()


def test_blocks_of_other_lengths_know_the_actions_that_were_learned() -> None:
    shipped = load_model("tiny").network.action.weight
    kinds = len(ACTIONS) + 1
    for frames in (1, 2, 6):
        weight = of_blocks(load_model("tiny"), frames).network.action.weight
        known = min(frames, 3) * kinds
        assert len(weight) == frames * kinds and (weight[:known] == shipped[:known]).all() and not weight[known:].any()
    assert steps(Variant("one", block=1)).shape == (2, 96, 96, 3)
    assert not Variant("one", block=1).trained and Variant("old", older=(6, "int4")).trained


def test_all_pages_of_the_past_are_the_dense_past_and_one_is_not() -> None:
    dense, every, one = (steps(Variant("", pages=pages)).astype(int) for pages in (None, 6, 1))
    assert np.abs(every - dense).max() <= 1, "the same sums in another order, rounded to bytes"
    assert np.abs(one - dense).max() > 8


def test_old_pages_are_in_their_own_format() -> None:
    world = VariantWorld(Variant("mixed", kv="int8", older=(6, "int4")), seed=0)
    assert {format: world.decoder.table.store.pools[format].frames for format in ("int8", "int4")} == {
        "int8": 6,
        "int4": 3,
    }


def test_the_truth_is_right_in_every_chunk_and_a_frozen_video_is_not() -> None:
    scores = by_chunks(TRUE.frames, TRUE)
    assert list(scores) == list(TRUTH) and all(len(each) == 10 for each in scores.values())
    assert all(value in (1.0, None) for name in TRUTH[:-1] for value in scores[name])
    assert min(value for value in scores["psnr"] if value is not None) > 58
    frozen = by_chunks(np.repeat(TRUE.frames[:1], 60, 0), TRUE)
    followed = [value for value in frozen["follows_moving"] if value is not None]
    assert followed and not any(followed)
    assert all(value is not None and value < 40 for value in frozen["psnr"][1:])


def test_the_simulator_is_a_variant_without_a_fault() -> None:
    assert (np.concatenate(list(stream(SIMULATOR, 0, 60))) == TRUE.frames).all() and SIMULATOR.trained


def found(variant: Variant, pair: dict[str, Any] | None = None) -> dict[str, Any]:
    """A result as it is on disk."""
    return {"variant": dataclasses.asdict(variant), "truth": {name: [0.5, None] for name in TRUTH}, "pair": pair or {}}


def test_what_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str | None]] = []

    def make(variant: Variant, number: int, frames: int, path: Path, *rest: Any) -> dict[str, Any]:
        calls.append((path.stem, rest[2] and rest[2].stem))
        path.touch()
        return found(variant)

    monkeypatch.setattr(tiny_studies, "make", make)
    study = Study("", (Variant("fp32"), Variant("int8, old int4", older=(6, "int4"))), 60, pairs=True)
    tasks = tasks_of(study, 60, 2, tmp_path)
    assert len(tiny_studies.run(study, tasks, 1)) == 4
    assert calls == [
        ("fp32-0-60", None),
        ("fp32-1-60", None),
        ("int8-old-int4-0-60", "fp32-0-60"),
        ("int8-old-int4-1-60", "fp32-1-60"),
    ]
    tiny_studies.run(study, tasks, 1)
    assert len(calls) == 4
    other = dataclasses.replace(tasks[-1], variant=Variant("int8, old int4", older=(3, "int4")))
    assert other.result() is None, "another variant by the same name"
    tasks[0].path().write_text("{")
    tiny_studies.run(study, tasks, 1)
    assert calls[4:] == [("fp32-0-60", None)]


def test_the_tables_say_what_is_untrained_and_show_the_worst_chunk() -> None:
    pair = {"scores": {"psnr": [40.0, 20.0]}, "opening": {"psnr": 41.0}, "parted": 7}
    results = json.loads(json.dumps([found(Variant("a")), found(Variant("b", block=1), pair)]))
    assert truth_table(results)[1:] == [[name, *["50.00"] * 6, "0.5"] for name in ("a", "b (untrained)")]
    assert pair_table(results)[1:] == [["b (untrained)", "30.00", "20.00", "41.00", "1 of 1"]]


def test_every_variant_has_a_file_of_its_own() -> None:
    for study in STUDIES.values():
        paths = [Task(variant, 0, 60, Path()).path() for variant in study.variants]
        assert len(set(paths)) == len(paths)


@pytest.mark.parametrize(
    "words, says",
    [
        (["--frames", "59"], "--frames must be at least 60, got 59"),
        (["--streams", "0"], "--streams must be at least 1, got 0"),
        (["--jobs", "100000"], "--jobs must be at most"),
        (["--variants", "int3"], "--variants must be of fp32; "),
        (["--folder", "file"], "--folder must be a folder, got 'file'"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(["quantization", *words]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
