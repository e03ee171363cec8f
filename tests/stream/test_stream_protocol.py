"""The messages: the document is what the code checks with, and nothing that is not as it says changes anything."""

import asyncio
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("aiohttp", reason="needs the extra `stream`")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferix.stream import protocol
from inferix.stream.client import Bucket, Client
from inferix.stream.protocol import Invalid, check, document, parse, validators
from inferix.stream.session import Session
from inferix.stream.steering import Steering
from tests.stream.stream_client import LOOP

MESSAGES = document()["components"]["messages"]


def test_the_document_is_whole():
    """Every message is in the channel, in the operation of its side, and says what it is for."""
    channel = document()["channels"]["control"]["messages"]
    assert set(channel) == set(MESSAGES)
    assert all(channel[name] == {"$ref": f"#/components/messages/{name}"} for name in MESSAGES)
    operations = document()["operations"]
    for side, operation, action in (("client", "fromClient", "receive"), ("server", "toClient", "send")):
        mine = [{"$ref": f"#/channels/control/messages/{name}"} for name in MESSAGES if name.startswith(f"{side}.")]
        assert operations[operation]["messages"] == mine and operations[operation]["action"] == action
    assert all(message["summary"] and name.endswith(f".{message['name']}") for name, message in MESSAGES.items())
    for side in ("client", "server"):
        for validator in validators(side).values():
            validator.check_schema(validator.schema)


def test_every_request_has_an_example_that_is_taken_and_someone_who_follows_it():
    session = {"pause", "resume", "step", "reset", "fork", "close", "steer", "rewind", "save", "load", "record"}
    session.add("profile")
    connection = {"hello", "keys", "prompt", "wheel", "video", "offer", "ping"}
    assert {name for name in validators("client")} == session | connection
    assert {name.removeprefix("_do_") for name in dir(Session) if name.startswith("_do_")} == session
    for name, message in MESSAGES.items():
        if name.startswith("client."):
            for example in message["examples"]:
                assert parse(json.dumps(example["payload"])) == example["payload"]


@pytest.mark.parametrize(
    "data, says",
    [
        ("", "JSON"),
        (b"\xff\xfe", "JSON in UTF-8"),
        ("[" * 30000, "JSON"),
        ('{"type": "ping", "time": NaN}', "not JSON compliant"),
        ('{"type": "ping", "time": 1e999}', "not JSON compliant"),
        ('{"type": "ping", "time": ' + "9" * 5000 + "}", "not JSON compliant"),
        ("[]", "must be an object"),
        ("{}", "type must be one of hello, keys"),
        ('{"type": ["keys"]}', "type must be one of"),
        ('{"type": "server.state"}', "type must be one of"),
        ('{"type": "keys", "seq": -1, "pressed": []}', "keys.seq: -1 is less than the minimum of 0"),
        ('{"type": "keys", "seq": 1e300, "pressed": []}', "keys.seq"),
        ('{"type": "keys", "seq": 1, "pressed": ["up", 3]}', "keys.pressed[1]: 3 is not of type 'string'"),
        ('{"type": "keys", "seq": 1}', "'pressed' is a required property"),
        ('{"type": "pause", "now": true}', "'now' was unexpected"),
        ('{"type": "steer", "worlds": ["c"]}', "steer.worlds[0]: 'c' is not one of"),
        ('{"type": "prompt", "text": ""}', "prompt.text"),
        ('{"type": "prompt", "id": "\\ud800", "text": "x"}', "t encode character"),
        ('{"type": "prompt", "text": "\ud800"}', "t encode character"),
        ('{"type": "pause", "\\udfff": 1}', "t encode character"),
    ],
)
def test_what_is_wrong_is_said(data, says):
    with pytest.raises(Invalid) as error:
        parse(data)
    assert says in str(error.value) and len(str(error.value).encode()) < 500


def test_whole_numbers_are_integers_however_they_are_written():
    for text in ("7", "7.0", "0.7e1", "70e-1"):
        seed = parse(f'{{"type": "reset", "seed": {text}}}')["seed"]
        assert seed == 7 and type(seed) is int
    assert parse('{"type": "ping", "time": 7.5}')["time"] == 7.5


def test_characters_beyond_the_first_plane_are_whole():
    assert parse('{"type": "prompt", "text": "\\ud83d\\ude00"}')["text"] == "😀"


def test_an_oversized_message_is_told_from_a_malformed_one():
    with pytest.raises(Invalid) as error:
        parse('{"type": "prompt", "text": "' + "é" * (protocol.MAX_BYTES // 2) + '"}')
    assert error.value.code == "oversized"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
FIELDS = sorted({field for v in validators("client").values() for field in v.schema["properties"]} - {"type"})


@st.composite
def almost(draw):
    """A message with the right type and some of the right fields, of any value."""
    message = {"type": draw(st.sampled_from(sorted(validators("client"))))}
    for field in draw(st.lists(st.sampled_from(FIELDS), max_size=3, unique=True)):
        message[field] = draw(json_values)
    return json.dumps(message)


@st.composite
def spoiled(draw):
    """A right message with a byte changed, added or gone."""
    payloads = [m["examples"][0]["payload"] for name, m in MESSAGES.items() if name.startswith("client.")]
    data = bytearray(json.dumps(draw(st.sampled_from(payloads))).encode())
    place = draw(st.integers(0, len(data) - 1))
    data[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(data)


class Recording:
    """Stands for the session: notes what a message would have changed."""

    def __init__(self):
        self.followed = []
        self.steering = Steering(("none", "up"), {"w": "up"})
        broadcast = SimpleNamespace(subscribe=lambda *a: self.followed.append("video"), unsubscribe=lambda s: None)
        self.player = SimpleNamespace(broadcast=broadcast, ticks=lambda: 0)

    async def prompt(self, *arguments):
        self.followed.append("prompt")

    async def command(self, name, /, **arguments):
        self.followed.append(name)


def state(client):
    steering = client.session.steering
    held = steering.seq, steering._held, steering._tapped, list(steering._waiting)
    return held, list(client.session.followed), client.lobby.driver


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(st.text(max_size=40) | st.binary(max_size=40) | almost() | spoiled(), min_size=10, max_size=10))
def test_thousands_of_messages_no_crash_and_a_bad_one_changes_nothing(messages):
    """250 lists of ten. What the document does not allow is answered by an error, and nothing else happens."""

    async def deliver():
        session, told = Recording(), []
        lobby = SimpleNamespace(session=session, driver=None)
        lobby.drive = lambda client: setattr(lobby, "driver", client)
        lobby.let_go = lambda client: setattr(lobby, "driver", None)
        client = Client(lobby, SimpleNamespace(closed=False), "fuzz")
        client.tell, client._complaints = told.append, Bucket(1e9, 1e9)
        lobby.driver = client
        for data in messages:
            await asyncio.sleep(0)  # what was allowed is followed
            await asyncio.gather(*client._requests)
            before, said = state(client), len(told)
            client.receive(data)
            try:
                parse(data)
            except Invalid:
                assert state(client) == before and not client._requests
                assert [message["type"] for message in told[said:]] == ["error"]
            for message in told[said:]:
                check(message, "server")
        for task in client._requests:
            task.cancel()

    LOOP.run_until_complete(deliver())


def test_who_can_be_sent_nothing_any_more_is_gone():
    async def send():
        told, closed = [], []

        class Socket:
            closed = False

            async def send_str(self, text):
                raise UnicodeError("half a character")

            async def close(self, code, message):
                closed.append(code)

        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context["message"]))
        client = Client(SimpleNamespace(session=None), Socket(), "viewer-7")
        client.tell({"type": "pong"})
        await client._send()
        await client._leaving
        asyncio.get_running_loop().set_exception_handler(None)
        assert closed == [1011] and told == ["nothing can be sent to viewer-7 any more"]

    LOOP.run_until_complete(send())


def test_a_bucket_lets_through_its_rate():
    bucket = Bucket(rate=10, burst=3)
    now = bucket.at
    assert [bucket.take(now) for _ in range(4)] == [True, True, True, False]
    assert [bucket.take(now + 0.15), bucket.take(now + 0.15)] == [True, False]
    assert all(bucket.take(now + 100) for _ in range(3)) and not bucket.take(now + 100)
