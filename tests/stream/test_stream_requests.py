"""Every request with an id gets exactly one answer, whatever is wrong with it."""

import asyncio
import json
from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("aiohttp", reason="needs the extra `stream`")

from inferix.stream import client, session, webrtc
from inferix.stream.client import Bucket
from inferix.stream.protocol import document, validators
from tests.stream.stream_client import Viewer, asynchronous, running, until

EXAMPLES = {
    name.removeprefix("client."): message["examples"][0]["payload"]
    for name, message in document()["components"]["messages"].items()
    if name.startswith("client.")
}
FIELDS = sorted({field for v in validators("client").values() for field in v.schema["properties"]} - {"type", "id"})
DEEP = json.loads("[" * 900 + "]" * 900)
# As JSON text. Some are right for some fields: what they ask for is done, or can't be.
VALUES = [
    *("null", "true", "-1", "0", "2", "1.5", "9007199254740992", "1e308", "1e999", "NaN", "-Infinity", "9" * 5000),
    *(
        '""',
        '"a"',
        '"b"',
        '"calm"',
        '"\\u0000"',
        '"\\ud800"',
        '"../x"',
        json.dumps("x" * 3000),
        json.dumps("x" * 50000),
    ),
    *("[]", '["a"]', '["a", "a"]', '["b"]', "{}", '{"a": {"b": []}}', json.dumps(DEEP)),
]


def requests():
    """(id, JSON text): each kind as it should be, without each field and with every value in it, and with more."""
    texts = []
    for example in EXAMPLES.values():
        fields = {name: json.dumps(value) for name, value in example.items() if name != "id"}
        texts.append(fields)
        texts += [{name: text for name, text in fields.items() if name != gone} for gone in fields]
        texts += [fields | {name: value} for name in FIELDS for value in VALUES if name in fields or value == "null"]
    texts += [{"type": value} for value in VALUES]
    for number, fields in enumerate(texts):
        id = f"q{number}"
        parts = [f'"id": "{id}"', *(f"{json.dumps(name)}: {text}" for name, text in fields.items())]
        yield id, "{" + ", ".join(parts[number % 2 :] + parts[: number % 2]) + "}"


def answers(viewer):
    return Counter(m["id"] for m in viewer.messages if m["type"] in ("done", "error", "answer") and m["id"] is not None)


@pytest.mark.parametrize("limited", [False, True], ids=["at once", "limited"])
@asynchronous
async def test_every_request_is_answered_once(limited, tmp_path, monkeypatch):
    """`limited`: by the rate as well, which most are refused for; it is an answer like others."""
    if not limited:
        monkeypatch.setattr(client, "Bucket", lambda rate, burst: Bucket(rate if rate < 10 else 1e9, max(burst, 20)))
    async with running(tmp_path) as server:
        viewer = await Viewer.join(server)
        asked = dict(requests())
        assert len(asked) > 300
        for count, (id, text) in enumerate(asked.items()):
            await viewer.send(text)
            if count % 8 == 7:  # no more are followed at a time; and messages over 120 a second are not even read
                await until(lambda id=id: answers(viewer)[id])
                if limited:
                    await asyncio.sleep(0.08)
        await until(lambda: set(asked) <= answers(viewer).keys())
        assert (await viewer.request("wheel", take=True))["type"] == "done"
        assert (await viewer.request("reset", seed=1))["type"] == "done"
        await viewer.until("block", since=len(viewer.messages))
        counted = answers(viewer)
        assert [id for id in asked if counted[id] != 1] == []
        await viewer.leave()


@asynchronous
async def test_a_mistake_of_ours_is_answered_and_shows(tmp_path, monkeypatch):
    async def wrong(self, *arguments, **named):
        raise KeyError("of ours")

    told = []
    async with running(tmp_path) as server:
        viewer = await Viewer.join(server)
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context["message"]))
        monkeypatch.setattr(session.Session, "command", wrong)
        monkeypatch.setattr(session.Session, "prompt", wrong)
        monkeypatch.setattr(webrtc.Peer, "answer", wrong)
        for kind in ("fork", "prompt", "offer"):
            fields = {name: value for name, value in EXAMPLES[kind].items() if name not in ("type", "id")}
            answer = await viewer.request(kind, **fields)
            assert answer["code"] == "internal" and answer["text"] == f"{kind}: KeyError: 'of ours'"
        asyncio.get_running_loop().set_exception_handler(None)
        await viewer.leave()
    assert [message.split()[0] for message in told] == ["fork", "prompt", "offer"]


@asynchronous
async def test_words_that_a_broken_world_was_reading_are_answered(tmp_path):
    """A world breaks while it reads a prompt, and is reset: nobody waits for ever."""
    async with running(tmp_path) as server:
        viewer = await Viewer.join(server)
        for command, fields in (("pause", {}), ("prompt", {"text": "crash"})):
            assert (await viewer.request(command, **fields))["type"] == "done"
        remote = server.session.remote
        connection = remote._connection
        remote._connection = SimpleNamespace(send=lambda message: None, close=connection.close)  # a long reading begins
        await viewer.say("prompt", id="words", text="calm")
        await until(lambda: server.session._unread)
        remote._connection = connection
        assert (await viewer.request("resume"))["type"] == "done"
        await viewer.until("state", lambda state: state["phase"] == "crashed")
        assert (await viewer.request("reset", seed=1))["type"] == "done"
        answer = await viewer.answer("words")
        assert answer["code"] == "internal" and answer["text"].startswith("RuntimeError: asked to crash")
        await until(lambda: server.session.phase == "running")
        assert (await viewer.request("prompt", text="calm"))["type"] == "done"
        await viewer.leave()
