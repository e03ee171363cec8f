"""What is said of videos: as JSON, in tables that keep real metrics and proxies apart, on a page; by the command."""

import doctest
import json
from pathlib import Path

import pytest

from inferix.commands import cli
from inferix.commands.evaluate import evaluate
from inferix.evaluate import report as module
from inferix.evaluate.drift import drift
from inferix.evaluate.judging import Judged
from inferix.evaluate.metric import registered
from inferix.evaluate.report import failures, html, means, report, rows, sparkline, tables
from inferix.evaluate.video import Video
from tests.evaluate.clips import counted, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write(folder / "a.mp4", counted(40))
    write(folder / "b.mp4", counted(40)[::-1])
    write(folder / "short.mp4", counted(3))
    (folder / "no.mp4").write_bytes(b"none")
    return folder


def judged(name: str, **scores: list[float]) -> Judged:
    scores = {each.replace("_", ":"): of for each, of in scores.items()}
    drifts = {each: drift(of) for each, of in scores.items()}
    return Judged(
        Video(Path(name), 40, 16.0, (8, 8)), 10, 10, scores, drifts, {each: of[0] for each, of in scores.items()}
    )


def test_real_metrics_and_proxies_are_never_in_one_table() -> None:
    found = report([judged("a.mp4", clarity=[50.0, 45.0], proxy_clarity=[5.0, 6.0])], [], 2)
    assert [line[0] for line in rows(found, proxies=False)] == ["clarity"]
    assert rows(found, proxies=True) == [("proxy:clarity", "5", "0.2", "0", "20.00%", "+20.00%", "▁█")]
    assert [table.title for table in tables(found)] == [
        "Real metrics, 2 chunks",
        f"VDE, published: {module.SOURCE}",
        "Proxies without weights, 2 chunks",
    ]


def test_what_is_published_stands_beside_real_metrics_alone() -> None:
    proxies = report([judged("a.mp4", proxy_clarity=[5.0, 6.0])], [], 2)
    assert module.published_rows(proxies) == [] and "LongLive" not in html(proxies)
    real = report([judged("a.mp4", clarity=[50.0, 45.0])], [], 2)
    *others, ours = module.published_rows(real)
    assert ours == ("these videos", "–", "–", "–", "–", "0.1")
    assert [line[0] for line in others] == ["Self Forcing", "MAGI-1", "LongLive", "WorldAttention"]
    assert "LongLive" in html(real)


def test_of_several_videos_the_tables_show_the_mean() -> None:
    found = report(
        [judged("a.mp4", clarity=[50.0, 45.0]), judged("b.mp4", clarity=[40.0, 32.0], motion=[1.0, 1.0])], [], 2
    )
    assert means(found)["clarity"]["whole"] == 45 and means(found)["clarity"]["linear"] == pytest.approx(0.15)
    assert means(found)["motion"]["whole"] == 1
    assert "mean of 2 videos" in tables(found)[0].title


def test_a_first_chunk_of_0_is_null_in_json_and_a_line_of_its_own() -> None:
    found = report([judged("a.mp4", proxy_dynamic=[0.0, 1.0])], [], 2)
    assert json.loads(json.dumps(found, allow_nan=False))["videos"][0]["drift"]["proxy:dynamic"]["linear"] is None
    assert failures(found) == ["a.mp4: proxy:dynamic: its first chunk scores 0, to which no drift is relative"]
    assert rows(found, proxies=True)[0][2:6] == ("–",) * 4


def test_a_curve_that_hardly_moves_is_drawn_so() -> None:
    assert sparkline([1.0, 1.0001, 1.0]) == "▄▅▄" and sparkline([]) == ""
    page = html(report([judged("<a>.mp4", proxy_motion=[0.99, 0.98, 0.97])], [], 3))
    assert page.count("<circle") == 3 and "<a>.mp4" not in page and "http" not in page


def test_the_command_judges_what_it_can_and_says_what_it_cannot(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(["evaluate", "a.mp4", "no.mp4", "short.mp4", "b.mp4", "--chunks", "4", "--out", "out.json"]) == 1
    printed = capsys.readouterr().out
    found = json.loads((folder / "out.json").read_text())
    assert [video["path"] for video in found["videos"]] == ["a.mp4", "b.mp4"]
    assert list(found["failed"]) == ["no.mp4", "short.mp4"]
    for line in found["failed"].values():
        assert line in printed.splitlines()
    up, down = (video["drift"]["proxy:exposure"]["slope"] for video in found["videos"])
    assert up > 0 > down
    assert set(found["metrics"]) | set(found["left_out"]) == set(registered())
    assert "proxy:exposure" in printed and "not without --weights-dir: clarity" in printed
    assert "proxy:exposure" in (folder / "out.html").read_text()


def test_the_function_gives_what_the_file_holds_and_prints_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "f.json"
    found = evaluate(videos=[str(folder / "a.mp4")], metrics=["proxy:exposure"], all=True, out=out)
    assert found.path == out and json.loads(out.read_text()) == found.report
    assert found.report["videos"][0]["looked_at"] == 4
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "words, said",
    [
        (["a.mp4", "--chunks", "1"], "--chunks must be from 2 to 1000, got 1"),
        (["a.mp4", "--metrics", "sharpness"], "--metrics must be of "),
        (["a.mp4", "--metrics", "clarity"], "musiq_spaq_ckpt-358bb6af.pth"),
        (["a.mp4", "--weights-dir", "nowhere"], "must be a folder, got"),
        (["a.mp4", "--out", "a.mp4"], "--out: 'a.mp4' would be written over"),
        (["a.mp4", "--out", "nowhere/x.json"], "--out: cannot write"),
        ([], "the following arguments are required: videos"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    try:
        code = cli.main(["evaluate", *words])
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1
    assert sorted(folder.iterdir()) == before


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0
