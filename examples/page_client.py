"""Steer a running world and keep a picture of it.

    inferix play                                             # prints an address, http://127.0.0.1:8000/
    python examples/page_client.py --address http://127.0.0.1:8000/ --prompt "desert night" --hold up --out night.jpg

Connects to the WebSocket of the page, gives the world a prompt, holds an action, and saves the first picture that was
made under both. The messages are defined in python/inferix/stream/asyncapi.json.
"""

import argparse
import asyncio
import struct
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

HEADER = struct.Struct(">BBBBIQ")  # of a picture: version, flags, codec, 0, its number, its time stamp


def socket_address(page: str) -> str:
    """ws://host/ws?token=... for http://host/?token=..."""
    parts = urlsplit(page)
    return parts._replace(scheme={"http": "ws", "https": "wss"}[parts.scheme], path="/ws").geturl()


async def hold(socket: aiohttp.ClientWebSocketResponse, action: str) -> None:
    """Keys are state, said again and again: after a second of silence they count as released."""
    for seq in range(1_000_000):
        await socket.send_json({"type": "keys", "seq": seq, "pressed": [action]})
        await asyncio.sleep(0.3)


async def steer(page: str, prompt: str, action: str) -> bytes:
    """The first picture, as JPEG, of a block that follows both the prompt and the action."""
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(socket_address(page), protocols=["inferix.v1"], max_msg_size=0) as socket,
    ):
        await socket.send_json({"type": "hello", "drive": True})
        await socket.send_json({"type": "video", "codec": "jpeg"})
        holding, first, acted = None, None, None
        try:
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    number = HEADER.unpack_from(message.data)[4]
                    if first is not None and acted is not None and number >= max(first, acted):
                        return message.data[HEADER.size :]
                    continue
                event = message.json()
                if event["type"] == "error":
                    raise SystemExit(f"page_client: {event['text']}")
                if event["type"] == "state" and event["phase"] == "running" and holding is None:
                    holding = asyncio.create_task(hold(socket, action))
                    await socket.send_json({"type": "prompt", "id": "look", "text": prompt})
                if event["type"] == "prompt" and event["id"] == "look" and event["state"] == "applied":
                    first = event["frame"]
                if event["type"] == "block" and event["actions"]["a"] == action and acted is None:
                    acted = event["first"]
        finally:
            if holding is not None:
                holding.cancel()
    raise SystemExit("page_client: the server closed the connection")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--address", default="http://127.0.0.1:8000/", help="as `inferix play` prints it")
    parser.add_argument("--prompt", default="desert night")
    parser.add_argument("--hold", default="up", metavar="ACTION")
    parser.add_argument("--out", type=Path, default=Path("world.jpg"))
    given = parser.parse_args(arguments)
    given.out.write_bytes(asyncio.run(steer(given.address, given.prompt, given.hold)))
    print(f"{given.out}: {given.prompt}, {given.hold}")


if __name__ == "__main__":
    main()
