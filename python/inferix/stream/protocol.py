"""The messages between page and server: asyncapi.json defines them, and is what they are checked with.

A message is one JSON object in UTF-8 with a `type`. Whatever is not exactly as defined raises `Invalid`, and the sender
gets an `error` message that says what is wrong.
"""

from __future__ import annotations

import functools
import json
import struct
from importlib import resources
from typing import Any

from jsonschema import Draft7Validator
from jsonschema.exceptions import best_match

VERSION = 1
SUBPROTOCOL = "inferix.v1"
MAX_BYTES = 64 * 1024  # of a message: a session description of a browser is about 8 kB
HEADER = struct.Struct("!BBBBIQ")  # of a binary message; see asyncapi.json
MOST_DIGITS = 400  # of a whole number; the largest that is not infinite to JavaScript has 309
CODECS = {"h264": 0, "jpeg": 1}

Message = dict[str, Any]


class Invalid(ValueError):
    """A message that is not as defined. `code` is that of the error message, `id` the sender's, if it could be read."""

    def __init__(self, text: str, code: str = "malformed", id: str | None = None):
        super().__init__(text)
        self.code, self.id = code, id


@functools.cache
def document() -> Message:
    """asyncapi.json."""
    read: Message = json.loads((resources.files(__package__) / "asyncapi.json").read_text("utf-8"))
    return read


@functools.cache
def validators(side: str) -> dict[str, Draft7Validator]:
    """By type of message, of what one side, "client" or "server", may send."""
    messages = document()["components"]["messages"]
    return {
        name.removeprefix(f"{side}."): Draft7Validator(message["payload"])
        for name, message in messages.items()
        if name.startswith(f"{side}.")
    }


def parse(data: str | bytes) -> Message:
    """What a client sent, if it is a message.

    Raises:
        Invalid: it is not. Says what it must be and what it is.
    """
    size = len(data) if isinstance(data, bytes) else len(data.encode("utf-8", "replace"))
    if size > MAX_BYTES:
        raise Invalid(f"a message must have at most {MAX_BYTES} bytes, got {size}", "oversized")
    message = None
    try:
        message = json.loads(data, parse_float=_number, parse_int=_whole)
        # NaN, infinity and "\\ud800", half a character, are read, but no answer and no broadcast could repeat them.
        encode(message).encode()
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and UnicodeEncodeError are ValueErrors
        text = f"a message must be JSON in UTF-8, got {_short(data)} ({_short(error)})"
        raise Invalid(text, id=_id_of(message)) from None
    if not isinstance(message, dict):
        raise Invalid(f"a message must be an object, got {_short(message)}")
    check(message, "client")
    return message


def check(message: Message, side: str) -> None:
    """Raise Invalid unless this is a message that `side` may send."""
    known, kind, id = validators(side), message.get("type"), _id_of(message)
    if not isinstance(kind, str) or kind not in known:
        raise Invalid(f"type must be one of {', '.join(known)}, got {_short(kind)}", id=id)
    error = best_match(known[kind].iter_errors(message))
    if error is not None:
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        raise Invalid(f"{kind}{where}: {_short(error.message, 300)}", id=id)


def encode(message: Message) -> str:
    return json.dumps(message, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _number(text: str) -> int | float:
    """7.0 is an integer to JavaScript, which knows no others, and to the document."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _whole(text: str) -> int | float:
    """One of more digits than Python reads is as good as infinite."""
    return int(text) if len(text) <= MOST_DIGITS else float("inf")


def _id_of(message: Any) -> str | None:
    """The sender's, if an answer could carry it."""
    id = message.get("id") if isinstance(message, dict) else None
    return id if isinstance(id, str) and len(id) <= 32 and id == id.encode("utf-8", "ignore").decode() else None


def _short(value: object, length: int = 60) -> str:
    text = str(value) if isinstance(value, Exception | str) else repr(value)
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= length else f"{text[:length]}…"
