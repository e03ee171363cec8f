"""A dataset's captions read line by line; videos made of them, judged, and not made twice."""

import doctest
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from inferix.commands import cli
from inferix.commands import evaluate_dataset as command
from inferix.commands.evaluate_dataset import evaluate_dataset
from inferix.evaluate import dataset, judging, processes
from inferix.evaluate.dataset import SOURCES, composition, read_dataset
from inferix.evaluate.judging import chosen
from inferix.evaluate.metric import Metric
from inferix.evaluate.processes import DIED, each_done
from inferix.evaluate.weights import WeightsDir
from tests.evaluate.clips import counted, write

QUICK = {"metrics": ["proxy:exposure"], "chunks": 2, "seconds": 0.5}


def folder(path: Path, *lines: object) -> Path:
    """A dataset of these lines: texts as they are, others as JSON."""
    path.mkdir(exist_ok=True)
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (path / "captions.jsonl").write_text("\n".join(text) + "\n")
    return path


def test_segments_are_equal_or_begin_when_their_texts_say(tmp_path: Path) -> None:
    spans = ["A dog runs. (00s - 09s).", "It sits\ndown (09s - 30s)"]
    read = read_dataset(folder(tmp_path, {"prompts": ["a", "b", "c"]}, {"id": "dog", "captions": spans}))
    equal, said = read.entries
    assert (equal.id, equal.schedule(30.0)) == ("0001", ((0.0, "a"), (10.0, "b"), (20.0, "c")))
    assert said.schedule(30.0) == ((0.0, "A dog runs."), (9.0, "It sits down"))
    assert said.schedule(9.0) == ((0.0, "A dog runs."),), "what would begin after the end has no place"


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "must be JSON"),
        ("[1]", "must be a JSON object, got list"),
        ({"prompts": []}, "prompts must be a list of texts, at least one, got []"),
        ({"prompts": ["a", " "]}, "prompts must be a list of texts"),
        ({"prompts": ["a"], "id": "../a"}, "id must be letters"),
        ({"prompts": ["a"], "id": 3}, "id must be text, got 3"),
        ({"prompts": ["a"], "video": "../a.mp4"}, "video must be a path within the folder, got '../a.mp4'"),
        ({"prompts": ["a"], "video": "/a.mp4"}, "video must be a path within the folder, got '/a.mp4'"),
        ({"prompts": ["a"], "video": "http://b/a.mp4"}, "video must be a path within the folder"),
        ({"prompts": ["a"], "id": "good"}, "id must be of no other line, got 'good'"),
        ({"captions": ["a (00s - 09s)", "b"]}, "captions must all end with their seconds, or none"),
        ({"captions": ["a (03s - 09s)"]}, "captions must begin at 0s and go upwards, got 3s"),
        ("[" * 100_000, "captions.jsonl:2"),
    ],
)
def test_a_line_that_can_not_be_read_is_named_and_the_others_go_on(tmp_path: Path, line: object, says: str) -> None:
    read = read_dataset(folder(tmp_path, {"prompts": ["a"], "id": "good"}, line, {"prompts": ["a"], "id": "last"}))
    assert [entry.id for entry in read.entries] == ["good", "last"]
    [(place, reason)] = read.failed.items()
    assert place == "captions.jsonl:2" and says in reason and "\n" not in reason


def test_a_line_that_is_too_long_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MOST_LINE", 64)
    fits = json.dumps({"prompts": ["a"]}).ljust(62)
    read = read_dataset(
        folder(tmp_path, fits, *("x" * length for length in (63, 64, 65, 128, 200)), {"prompts": ["b"]})
    )
    assert [entry.id for entry in read.entries] == ["0001", "0007"]
    assert list(read.failed) == [f"captions.jsonl:{number}" for number in (2, 3, 4, 5, 6)]
    assert all("must be shorter than 64 bytes" in line for line in read.failed.values())


def test_what_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    path = folder(tmp_path, {"prompts": ["a"]}) / "captions.jsonl"
    path.write_bytes(path.read_bytes() + b'{"prompts": ["\xff"]}\n')
    assert "must be UTF-8" in read_dataset(tmp_path).failed["captions.jsonl:2"]


def test_the_list_of_ids_chooses_in_its_order(tmp_path: Path) -> None:
    folder(tmp_path, *({"prompts": ["a"], "id": name} for name in "abcde"))
    assert len(read_dataset(tmp_path).chosen) == 5
    (tmp_path / "test_ids.txt").write_text("d\n\nb\nz\nd\n")
    read = read_dataset(tmp_path)
    assert [entry.id for entry in read.chosen] == ["d", "b"] and len(read.entries) == 5
    assert list(read.failed) == ["z"] and "'z' has no line" in read.failed["z"]
    (tmp_path / "none.txt").write_text("\n")
    for split, says in (("none.txt", "lists no id"), ("missing.txt", "split: cannot read")):
        with pytest.raises(ValueError, match=says):
            read_dataset(tmp_path, tmp_path / split)


def test_no_captions_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder must hold captions\.jsonl"):
        read_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"captions\.jsonl:1: it must be JSON"):
        read_dataset(folder(tmp_path, "nothing"))


def test_the_composition_is_compared_with_the_published_one(tmp_path: Path) -> None:
    subjects = ["human"] * 670 + ["animal"] * 170 + ["environment"] * 160
    sources = [name for name, count in SOURCES.items() for _ in range(count)]
    lines = [
        {"prompts": ["a"], "video": f"videos/{source}/{i}.mp4", "subject": subject}
        for i, (source, subject) in enumerate(zip(sources, subjects))
    ]
    folder(tmp_path, *lines)
    (tmp_path / "test_ids.txt").write_text("\n".join(map(str, range(200))))
    assert [line for line in composition(read_dataset(tmp_path)) if not line[-1]] == []
    folder(tmp_path, *lines[66:])
    (tmp_path / "test_ids.txt").unlink()
    differs = {what: found for what, _, found, agrees in composition(read_dataset(tmp_path)) if not agrees}
    assert differs["videos"] == "934" and differs["source DanceTrack"] == "0" and "source GOT-10k" not in differs


def test_videos_are_made_and_judged_and_not_made_again(tmp_path: Path) -> None:
    source = folder(tmp_path / "data", {"id": "a", "prompts": ["desert day", "glacier night"]}, "{")
    given = {"folder": source, "model": "tiny", "out": tmp_path / "out", **QUICK}
    first = evaluate_dataset(**given).report
    [video] = first["videos"]
    assert video["frames"] == 8 and len(video["scores"]["proxy:exposure"]) == 2
    assert first["dataset"]["protocol"] == {
        "name": "segments",
        "seconds": 0.5,
        "each video": {"a": [[0.0, "desert day"], [0.25, "glacier night"]]},
    }
    assert list(first["failed"]) == ["captions.jsonl:2"]
    made = tmp_path / "out" / "videos" / "a.mp4"
    when = made.stat().st_mtime_ns
    folder(source, {"id": "a", "prompts": ["desert day", "glacier night"]}, {"id": "b", "prompts": ["no such place"]})
    again = evaluate_dataset(**given).report
    assert made.stat().st_mtime_ns == when and again["videos"] == first["videos"]
    assert list(again["failed"]) == ["b"] and again["failed"]["b"].startswith("b: prompt_file: ")
    with pytest.raises(ValueError, match=r"out: .* holds results of other settings: `seed` was 0, now 1"):
        evaluate_dataset(**given, seed=1)
    folder(source, {"id": "a", "prompts": ["glacier night"]})
    [other] = evaluate_dataset(**given).report["videos"]
    assert other["whole"] != video["whole"], "other prompts are another video"


def test_without_a_model_the_datasets_own_videos_are_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "good.mp4", counted(20))
    (tmp_path / "broken.mp4").write_bytes(np.arange(100, dtype=np.uint8).tobytes())
    lines = [{"prompts": ["a"], "video": f"{name}.mp4"} for name in ("good", "broken", "absent")]
    folder(tmp_path, *lines, {"prompts": ["a"], "id": "none"})
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "dataset", ".", "--metrics", "proxy:exposure", "--chunks", "2", "--out", "out"]
    assert cli.main(words) == 1
    found = json.loads(Path("out/evaluation.json").read_text())
    assert [video["frames"] for video in found["videos"]] == [20] and found["dataset"]["made"] is None
    assert list(found["failed"]) == ["broken", "absent", "none"]
    said = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert [line for line in said if line in found["failed"]] == ["broken", "absent", "none"], "one line each"


def test_what_was_judged_by_other_metrics_or_weights_is_judged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "good.mp4", counted(20))
    folder(tmp_path, {"prompts": ["a"], "video": "good.mp4"})
    both = ["proxy:exposure", "proxy:contrast"]
    for names, digest in ((both[:1], "0"), (both, "0"), (both, "1")):
        metrics, _ = chosen(names, WeightsDir(None))

        def had(_: object, weights: WeightsDir) -> tuple[list[Metric], dict[str, str]]:
            weights.read["a.pth"] = digest  # noqa: B023
            return metrics, {}  # noqa: B023

        monkeypatch.setattr(command, "chosen", had)
        found = evaluate_dataset(folder=tmp_path, out=tmp_path / "out", chunks=2).report
        assert list(found["videos"][0]["scores"]) == names and found["weights"] == {"a.pth": digest}


def test_a_video_that_was_changed_is_judged_again(tmp_path: Path) -> None:
    video = write(tmp_path / "good.mp4", counted(20))
    folder(tmp_path, {"prompts": ["a"], "video": "good.mp4"})
    given = {"folder": tmp_path, "out": tmp_path / "out", "metrics": ["proxy:exposure"], "chunks": 2}
    before, same = (evaluate_dataset(**given).report["videos"][0]["scores"] for _ in range(2))
    write(video, counted(20)[::-1])
    assert evaluate_dataset(**given).report["videos"][0]["scores"] != before == same


def test_another_checkpoint_of_the_same_name_is_refused(tmp_path: Path) -> None:
    source, weights = folder(tmp_path / "data", {"prompts": ["no such place"]}), tmp_path / "checkpoints"
    weights.mkdir()
    (weights / "world.safetensors").write_bytes(bytes(10**6))
    (weights / "notes.txt").write_text("first")
    given = {"folder": source, "model": "tiny", "weights": weights, "out": tmp_path / "out", **QUICK}
    evaluate_dataset(**given, seed=1)
    assert list(evaluate_dataset(**given).report["failed"]) == ["0001"], "nothing was made by the other seed"
    (tmp_path / "out" / "videos" / "0001.mp4").touch()
    (weights / "notes.txt").write_text("second")
    evaluate_dataset(**given)
    (weights / "world.safetensors").write_bytes(bytes(10**6 - 10**5) + b"trained on" * 10**4)
    with pytest.raises(ValueError, match=r"out: .* holds results of other settings: `weights` was .*samples"):
        evaluate_dataset(**given)
    with pytest.raises(ValueError, match=r"weights must be a checkpoint or a folder of one, got '.*/nowhere'"):
        evaluate_dataset(**given | {"weights": tmp_path / "nowhere"})


def test_whatever_ends_one_video_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bad", "good"):
        write(tmp_path / f"{name}.mp4", counted(20))
    folder(tmp_path, *({"prompts": ["a"], "video": f"{name}.mp4"} for name in ("bad", "good")))

    def judge(video: Path, *rest: object, **options: object) -> object:
        if video.stem == "bad":
            raise RuntimeError("out of memory\n on a GPU")
        return judging.judge(video, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(command, "judge", judge)
    found = evaluate_dataset(folder=tmp_path, out=tmp_path / "out", metrics=["proxy:exposure"], chunks=2).report
    assert found["failed"] == {"bad": "bad: RuntimeError: out of memory on a GPU"} and len(found["videos"]) == 1


def test_a_result_that_is_not_there_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "good.mp4", counted(20))
    folder(tmp_path, {"prompts": ["a"], "video": "good.mp4"})
    monkeypatch.setattr(command, "_one", lambda config, weights, entry: "")
    found = evaluate_dataset(folder=tmp_path, out=tmp_path / "out", metrics=["proxy:exposure"], chunks=2).report
    assert found["videos"] == [] and "good: its result can not be read: " in found["failed"]["good"]


def test_what_many_videos_fail_by_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "data", *({"prompts": ["a"], "id": name} for name in "abc"))
    words = ["evaluate", "dataset", str(source), "--model", "none", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--metrics", "proxy:exposure"]) == 1
    [line] = [line for line in capsys.readouterr().out.splitlines() if "model must be one of" in line]
    assert line.startswith("a and 2 others: model must be")


def test_a_folders_name_is_no_markup_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / f"{'a long name, ' * 10}data[final]", {"prompts": ["a"]})
    found = evaluate_dataset(folder=source, out=tmp_path / "out", metrics=["proxy:exposure"]).report
    command.print_all(found, Console(width=80).print)
    assert str(source) in capsys.readouterr().out.splitlines()


def test_tasks_are_done_in_other_processes_and_errors_come_back() -> None:
    says = {"__import__('os').kill(__import__('os').getpid(), 9)": DIED, "'a'": "a", "'b'": "b"}
    assert dict(each_done(eval, list(says), jobs=2)) == says, "one is killed, and the others go on"
    with pytest.raises(ValueError):
        list(each_done(int, ["1", "no number"], jobs=1))  # type: ignore[arg-type]


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "dataset", {"id": "0001", "prompts": ["desert day"]})
    monkeypatch.chdir(tmp_path)
    for module in (dataset, processes):
        failed, tried = doctest.testmod(module)
        assert tried and not failed
