"""Whole numbers and devices that the store is given: taken as what they are, or refused by name; nothing is changed."""

import json

import numpy as np
import pytest
import torch

from inferix import World
from inferix_kernels import Policy, TopK
from inferix_kernels.store import snapshot
from tests.store.stores import HEAD_DIM, HEADS, add_block, add_blocks, open_store, rope

POLICY = Policy(window=6, sink=1, format="int8", undo=3)


@pytest.fixture
def table():
    made = open_store("int8", frames=16, host={"int8": 16}).open(POLICY)
    add_blocks(made, 2)
    return made


def open_pass(table):
    return table.plan([table.open_block(3)], rope(3))


QKV, KV = torch.randn(63, 3 * HEADS * HEAD_DIM), torch.randn(63, HEADS, HEAD_DIM)
NAMED = {  # argument of each call, and the call with 1 in its place
    "frames open_block": lambda table, n: table.open_block(n),
    "frames rewind": lambda table, n: table.rewind(n),
    "frames select": lambda table, n: table.select([0, n]),
    "frames gather": lambda table, n: table.gather(0, [n]),
    "frames forget": lambda table, n: table.forget([n]),
    "frames pin": lambda table, n: table.pin([n]),
    "frames unpin": lambda table, n: table.unpin([n]),
    "frames convert": lambda table, n: table.convert([n], "int8"),
    "frames offload": lambda table, n: table.offload([n]),
    "frames prefetch": lambda table, n: table.prefetch([n]),
    "frames check_room": lambda table, n: table.check_room([], [n]),
    "frame rewrite": lambda table, n: table.rewrite(n, lambda layer, k, v: (k, v)),
    "end truncate": lambda table, n: table.truncate(n),
    "end gone": lambda table, n: table.gone(n),
    "layer gather": lambda table, n: table.gather(n, [0]),
    "layer attend": lambda table, n: open_pass(table).attend(n, QKV, None, None),
    "layer append": lambda table, n: open_pass(table).append(n, KV, KV),
    "horizon seal": lambda table, n: table.seal(table.open_block(1), n),
    "see plan": lambda table, n: table.plan([table.open_block(3)], rope(3), see=[[n]]),
    "pages TopK": lambda table, n: TopK(pages=n),
    "frames TopK": lambda table, n: TopK(pages=1, frames=n),
    "queries TopK": lambda table, n: TopK(pages=1, queries=n),
}


@pytest.mark.parametrize("call", NAMED)
@pytest.mark.parametrize("number", [True, 1.0, np.float32(1), np.bool_(True), "1", None])
def test_what_is_no_whole_number_is_refused_by_name(table, call, number):
    if number is None and call in ("horizon seal", "frames TopK"):
        return  # None has a meaning there
    before = table.state._replace(open_blocks=())
    with pytest.raises(ValueError, match=rf"^{call.split()[0]} must be a whole number, got "):
        NAMED[call](table, number)
    assert table.state._replace(open_blocks=()) == before


@pytest.mark.parametrize("call", NAMED)
def test_numbers_of_numpy_are_taken_for_what_they_are(table, call, tmp_path):
    """And end as Python's in what is written."""
    for number in (np.int64(1), np.uint8(1)):
        fork = table.fork()
        if call == "horizon seal":
            with pytest.raises(RuntimeError, match="seal needs"):
                NAMED[call](fork, number)
        else:
            NAMED[call](fork, number)
        fork.abandon()
        if call == "frames open_block":
            add_block(fork, number)
        snapshot.save(fork, tmp_path / "s")
        assert all(type(frame) is int for frame in (*fork.held, *fork.pinned, *fork.cold, fork.next_frame))
        json.dumps([fork.next_frame, sorted(fork.pinned)])


def test_a_layer_that_is_none_is_refused(table):
    for layer in (-1, 2):
        for call in ("layer gather", "layer attend", "layer append"):
            fork = table.fork()
            with pytest.raises(ValueError, match=rf"^layer must be from 0 to 1, got {layer}$"):
                NAMED[call](fork, layer)


def test_a_world_is_rewound_by_whole_numbers():
    world = World("tiny", kv="bf16", window=3)
    world.step(action="up", prompt="desert night")
    for frames in (True, 3.0, "3"):
        with pytest.raises(ValueError, match=r"^frames must be a whole number, got "):
            world.rewind(frames)
    world.rewind(np.int64(3))
    assert world.frames == 0


NOT_HERE = [
    *([] if torch.cuda.is_available() else ["cuda", "cuda:0"]),
    "cuda:99",
    "abacus",
    "cpu:x",
    None,
    1.5,
    ["cpu"],
]


@pytest.mark.parametrize("device", NOT_HERE, ids=str)
def test_a_device_that_is_not_there_is_refused_by_name(device):
    with pytest.raises(ValueError, match=r"^device must be a device that is there, got [^\n]*$"):
        open_store(device=device)


def test_a_device_without_memory_is_one_all_the_same():
    assert open_store(device="meta").device == torch.device("meta")
