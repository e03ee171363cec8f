"""The examples do what they say, and are short."""

import importlib.util
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inferix.stream.server import Server
from inferix.stream.testing import ACTIONS, WORDS, open_bars, read_bars
from tests.stream.stream_client import asynchronous, running

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_says_what_it_shows(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 80
    assert f"python examples/{path.name}" in "".join(lines[:8])


def test_forks_share_the_past_and_pay_for_what_differs(capsys):
    load("fork_a_world").main()
    said = capsys.readouterr().out
    rows = re.findall(r"^ +\d+ +([\d,]+) +([\d,]+)$", said.replace(said.splitlines()[1], ""), re.MULTILINE)
    shared, private = zip(*([int(number.replace(",", "")) for number in row] for row in rows))
    alone = int(re.search(r"alone holds ([\d,]+) bytes", said)[1].replace(",", ""))
    assert shared[0] == alone and private[0] == 0  # sixteen forks cost no page
    assert list(shared) == sorted(shared, reverse=True) and list(private) == sorted(private)
    assert shared[-1] == 0 and private[-1] == 16 * alone  # once nothing of the common past is left in the window


def test_paged_attention_in_a_model_is_dense_attention(capsys):
    load("attention_in_your_model").main()
    rows = re.findall(r"^ +(\w+) +([\d,]+)  (\S+)$", capsys.readouterr().out, re.MULTILINE)
    sizes, differences = ({row[0]: float(row[i].replace(",", "")) for row in rows} for i in (1, 2))
    # Rounding; then what each format loses, of which attention is a part of the sum of a layer.
    assert differences["fp32"] < 1e-5 and differences["int8"] < 2e-3 and differences["int4"] < 2e-2
    assert sizes["fp32"] > 3.7 * sizes["int8"] and sizes["int8"] > 1.8 * sizes["int4"]


def test_a_policy_keeps_what_it_says_and_saves_the_rest(capsys):
    load("policy").main()
    said = re.findall(
        r": +([\d,]+) bytes, +(\d+)% of everything; the next block sees (.*)$", capsys.readouterr().out, re.M
    )
    window = "0, 1, 2, {}51, 52, 53, 54, 55, 56, 57, 58, 59"
    assert [row[1:] for row in said] == [
        ("100", "all 60"),
        ("10", window.format("")),
        ("11", window.format("24, 36, 48, ")),
    ]


@asynchronous
async def test_a_client_steers_a_running_world_and_keeps_a_picture(tmp_path):
    client = load("page_client")
    async with running(tmp_path) as server:
        picture = await client.steer(server.address, "storm", "left")
        _, action, words = read_bars(np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")))
        assert (ACTIONS[action], WORDS[words]) == ("left", "storm")
        with pytest.raises(SystemExit, match="prompt: must be one of calm"):
            await client.steer(server.address, "a herd of elephants", "left")


@asynchronous
async def test_a_client_that_comes_before_the_world_is_open_waits_for_it(tmp_path):
    """`inferix play` prints its address before."""
    server = Server(open_bars, port=0, folder=str(tmp_path / "worlds"))
    await server.start()
    try:
        assert server.session.phase == "opening"
        with pytest.raises(ValueError, match="keys: the world is still being opened"):
            server.session.steering.press(0, ["left"])
        assert await load("page_client").steer(server.address, "storm", "left")
    finally:
        await server.close()


def test_a_clients_address_keeps_the_token():
    address = load("page_client").socket_address
    assert address("http://127.0.0.1:8000/") == "ws://127.0.0.1:8000/ws"
    assert address("https://host/?token=abc") == "wss://host/ws?token=abc"
