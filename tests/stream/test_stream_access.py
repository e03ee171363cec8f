"""Who may come in, and what nobody may send: addresses, tokens, paths, limits."""

import asyncio
import json
import re

import pytest

pytest.importorskip("aiohttp", reason="needs the extra `stream`")

import aiohttp
import yarl

from inferix.stream import protocol
from tests.stream.stream_client import Viewer, asynchronous, running, until


@pytest.mark.parametrize(
    "name", ["../pyproject.toml", "%2e%2e%2fsecret.mp4", "secret.mp4", "", "/etc/passwd", "bars-20260101-000000-1"]
)
@asynchronous
async def test_no_path_from_a_client_is_opened(name, server):
    folder = server.archive.folder
    folder.mkdir(exist_ok=True)
    for place in (folder, folder.parent):
        (place / "secret.mp4").write_text("not for you")  # not a name that the server gives
    viewer = await Viewer.join(server)
    async with viewer.http.get(f"http://127.0.0.1:{server.port}/files/{name}") as response:
        assert response.status == 404 and b"not for you" not in await response.read()
    if name:
        assert (await viewer.request("load", name=name))["code"] == "refused"
    await viewer.leave()


@asynchronous
async def test_other_sites_and_other_names_for_us_are_kept_out(server):
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"}):
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await Viewer.join(server, headers=headers)
        assert refused.value.status == 403
    viewer = await Viewer.join(server, headers={"Origin": f"http://127.0.0.1:{server.port}"})
    await viewer.leave()


@asynchronous
async def test_elsewhere_than_here_a_token_is_wanted(tmp_path):
    async with running(tmp_path, host="0.0.0.0") as server:
        assert len(server.token) >= 16 and server.token in server.address
        root = f"http://127.0.0.1:{server.port}/"
        async with aiohttp.ClientSession() as http:
            for path in ("", "app.js", "ws", "files/x", "?token=wrong", "?token=é"):
                async with http.get(root + path) as response:
                    assert response.status == 403, path
            async with http.get(f"{root}?token={server.token}") as response:
                assert response.status == 200 and "HttpOnly" in response.headers["Set-Cookie"]
            async with http.get(f"{root}app.js", headers={"Cookie": f"inferix={server.token}"}) as response:
                assert response.status == 200
            async with http.ws_connect(f"{root}ws?token={server.token}") as socket:
                assert (await socket.receive_json())["type"] == "welcome"


@asynchronous
async def test_a_token_of_any_characters_is_in_the_address(tmp_path):
    async with running(tmp_path, host="0.0.0.0", token="a b&c#d/é+") as server, aiohttp.ClientSession() as http:
        url = yarl.URL(server.address.replace("0.0.0.0", "127.0.0.1"), encoded=True)
        async with http.get(url) as response:
            assert response.status == 200
            cookie = response.cookies["inferix"].OutputString(["none"])
        async with http.get(url.origin() / "app.js", headers={"Cookie": cookie}) as response:
            assert response.status == 200


@pytest.mark.parametrize("header", ["Origin: http://[", "Host: [", "Cookie: inferix=\xff\xfe"])
@asynchronous
async def test_headers_that_make_no_sense_are_kept_out(header, tmp_path, caplog):
    async with running(tmp_path, host="0.0.0.0") if "Cookie" in header else running(tmp_path) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        host = "" if "Host" in header else f"Host: 127.0.0.1:{server.port}\r\n"
        writer.write(f"GET / HTTP/1.1\r\n{host}{header}\r\n\r\n".encode("latin-1"))
        assert b" 403 " in await reader.readline()
        writer.close()
    assert not caplog.records


@asynchronous
async def test_too_large_and_too_many_are_answered_and_change_nothing(server):
    viewer = await Viewer.join(server)
    await viewer.send(json.dumps({"type": "prompt", "text": "x" * (protocol.MAX_BYTES + 1)}))
    assert (await viewer.until("error"))["code"] == "oversized"
    for i in range(60):
        await viewer.say("record", on=True, id=f"many{i}")
    await viewer.until("error", lambda error: error["code"] == "rate")
    limited = [error for error in viewer.all("error") if error["code"] == "rate"]
    assert all("per second" in error["text"] or "under way" in error["text"] for error in limited)
    await asyncio.sleep(1.5)
    assert (await viewer.request("ping2"))["code"] == "malformed"
    assert (await viewer.request("pause"))["type"] == "done"
    await viewer.leave()


@asynchronous
async def test_rewinding_a_world_that_has_shown_nothing_yet(server):
    viewer = await Viewer.join(server)
    await viewer.until("block")
    await viewer.say("reset", id="r", seed=3)
    assert (await viewer.request("rewind", frame=0))["type"] == "done"
    since = len(viewer.messages)
    await viewer.until("block", since=since)
    assert not [state for state in viewer.all("state") if state["phase"] == "crashed"]
    await viewer.leave()


@asynchronous
async def test_half_a_character_is_refused_and_everyone_goes_on(server):
    viewer, watcher = await Viewer.join(server), await Viewer.join(server, drive=False)
    await viewer.send('{"type": "prompt", "id": "\\ud800", "text": "snow"}')
    assert (await viewer.until("error"))["code"] == "malformed"
    blocks = len(watcher.all("block"))
    await until(lambda: len(watcher.all("block")) > blocks + 2)
    for each in (viewer, watcher):
        await each.leave()


@asynchronous
async def test_the_page_needs_nothing_from_elsewhere(server):
    async with aiohttp.ClientSession() as http:
        for name in server.pages:
            async with http.get(f"http://127.0.0.1:{server.port}/{name}") as response:
                text = await response.text()
                assert response.status == 200 and "default-src 'self'" in response.headers["Content-Security-Policy"]
                outside = re.findall(r"""["'(]((?:https?:)?//[^"')\s]+)""", text)
                assert set(outside) <= {"http://www.w3.org/2000/svg"}, name
