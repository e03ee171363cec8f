"""Where a served world's time goes: on the page, as a report, for Prometheus, in a folder."""

import aiohttp
import pytest

from inferix import profile
from tests.stream.stream_client import Viewer, asynchronous, running, until

pytest.importorskip("psutil", reason="needs the extra `stream`")
parser = pytest.importorskip("prometheus_client.parser", reason="needs the extra `stream`")


async def fetched(server, path):
    async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{server.port}/{path}") as answer:
        return answer.status, answer.headers, await answer.text()


async def samples(server):
    _, headers, text = await fetched(server, "metrics")
    assert headers["Content-Type"].startswith("text/plain")
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


@asynchronous
async def test_figures_of_both_processes_are_there_for_prometheus(server):
    viewer = await Viewer.join(server)
    await viewer.request("video", codec="jpeg")
    before = await samples(server)
    made = len(viewer.all("block"))
    await until(lambda: len(viewer.all("block")) > made + 2 and len(viewer.pictures) > 6)
    after = await samples(server)
    assert after["inferix_frames_total", "worlds"] >= before.get(("inferix_frames_total", "worlds"), 0) + 6
    assert after["inferix_block_seconds_count",] >= before["inferix_block_seconds_count",] + 2
    assert after["inferix_span_seconds_total", "denoise", "worlds"] > 0
    for name in ("encode", "send", "request"):
        assert after["inferix_spans_total", name, "server"] > 0
    assert after["inferix_counted_total", "bytes sent", "server"] > 0
    assert ("inferix_metric", "pictures waiting", "server") in after
    await viewer.leave()


@asynchronous
async def test_the_pages_figures_are_the_profilers(server):
    viewer = await Viewer.join(server)
    block = await viewer.until("block", lambda block: block["block"] > 0, since=len(viewer.messages))
    spans, seconds = block["spans"], block["seconds"]
    assert {"denoise", "block", "transfer", "encode"} <= set(spans)
    assert abs(spans["denoise"] - seconds["denoise"]) < 1e-9 and spans["transfer"] == seconds["transfer"]
    await viewer.leave()


@asynchronous
async def test_the_driver_switches_the_level(server):
    viewer, watcher = await Viewer.join(server), await Viewer.join(server, drive=False)
    assert (await viewer.request("profile", level="layer"))["type"] == "done"
    await watcher.until("state", lambda state: state["profile"] == "layer")
    assert profile.level() == "layer"
    assert (await watcher.request("profile", level="block"))["code"] == "watching"
    assert (await viewer.request("profile", level="off"))["code"] == "malformed"
    assert (await viewer.request("profile", level="block"))["type"] == "done"
    assert profile.level() == "block"
    await viewer.leave()
    await watcher.leave()


@asynchronous
async def test_the_report_is_a_page_of_both_processes(server):
    await until(lambda: server.session._blocks > 2)
    status, headers, text = await fetched(server, "profile")
    assert status == 200 and headers["Content-Security-Policy"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert "<svg" in text and "denoise" in text and "server: " in text and "worlds: " in text


@asynchronous
async def test_a_played_world_leaves_a_folder(tmp_path):
    async with running(tmp_path, profile=str(tmp_path / "out")) as server:
        assert server.session.state()["profile"] == "layer"
        viewer = await Viewer.join(server)
        await until(lambda: len(viewer.all("block")) > 2)
        await viewer.leave()
    taken = profile.read(tmp_path / "out")
    assert [process["name"] for process in taken["processes"]] == ["worlds", "server"]
    assert taken["processes"][0]["blocks"]["seen"] >= 2


@asynchronous
async def test_of_a_world_that_is_gone_the_servers_part_is_kept(tmp_path, capsys):
    async with running(tmp_path, profile=str(tmp_path / "out")) as server:
        server.session.remote._process.kill()
        await until(lambda: server.session.phase == "crashed")
        assert "what the worlds" not in (await fetched(server, "profile"))[2], "it is known to be gone"
    (process,) = profile.read(tmp_path / "out")["processes"]
    assert process["name"] == "server" and "what the worlds' process recorded" in process["lost"][0]
