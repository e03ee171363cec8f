"""Numbers that are no numbers: an error that names where they come from, and nothing written as a good video."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from inferix.decode.contract import PictureStream
from inferix.finite import NotFinite, to_bytes
from inferix.models import load_model
from inferix.world import World
from tests.models.test_wan_world import wan

BAD = (float("nan"), float("inf"))


def tiny():
    return load_model("tiny")


def play(world, blocks):
    for i in range(blocks):
        world.step(action="up" if world.model.adapter.actions else None, prompt=None if i else "desert night")


def spoil(model, name, value=float("nan")):
    """One number of a weight; returns how to put it back."""
    weight = model.network.state_dict()[name].view(-1)
    before = weight[0].clone()
    weight[0] = value
    return lambda: weight.__setitem__(0, before)


@pytest.mark.parametrize("value", BAD)
def test_pictures_that_are_not_finite_are_an_error(value):
    pictures = torch.zeros(2, 4, 4, 3)
    assert (to_bytes(pictures) == 128).all()
    assert [to_bytes(pictures + x).max() for x in (-9, -1, 1, 9)] == [0, 0, 255, 255]
    pictures[1, 2, 3, 0] = value
    with pytest.raises(NotFinite, match="pictures are not finite"):
        to_bytes(pictures)


WEIGHTS = {
    "blocks.1.ffn.2.weight": "what blocks.1.ffn.2 gives",
    "blocks.0.self_attn.norm_q.weight": "what blocks.0.self_attn.o is given",
    "blocks.1.cross_attn.k.weight": "what the network is given",  # the prompt's keys are made once, before
    "head.head.bias": "what head.head gives",
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_that_is_not_finite_is_named(name):
    model = wan(window=6)
    spoil(model, name)
    world = World(model, kv="fp32")
    said = rf"^latent frames 0 to 2 of self-forcing are not finite, first in {WEIGHTS[name]} \(weights that are not: "
    with pytest.raises(NotFinite, match=rf"{said}{name}\)$"):
        world.step(prompt="fog")
    with pytest.raises(RuntimeError, match="was released"):
        world.step(prompt="fog")


@pytest.mark.parametrize("value", BAD)
def test_what_the_tiny_world_makes_is_watched_too(value):
    model = tiny()
    back = spoil(model, "head.weight" if "head.weight" in model.network.state_dict() else "out.weight", value)
    with pytest.raises(NotFinite, match=r"^latent frames 0 to 2 of tiny are not finite, first in "):
        play(World(model), 1)
    back()
    play(World(model), 1)


def test_only_the_world_that_fails_ends():
    """A fork goes on, with the very pictures that it would have made."""
    model = wan(window=6)
    world, twin = World(model, kv="int8", worlds=2), World(model, kv="int8", worlds=2)
    for each in (world, twin):
        each.step(prompt="fog")
    fork, wanted = world.fork(), twin.fork()
    back = spoil(model, "blocks.1.ffn.2.bias")
    with pytest.raises(
        NotFinite, match=r"^latent frames 3 to 5 of self-forcing are not finite, first in what blocks.1"
    ):
        world.step(prompt="rain")
    back()
    for _ in range(3):
        assert np.array_equal(fork.step(prompt="rain"), wanted.step(prompt="rain"))
    fork.release()
    assert all(len(pool.free) == pool.frames for pool in world.store.pools.values())


def test_a_guided_world_names_its_guidance():
    model = wan("wan-causal", guidance=1e30)
    model.adapter = dataclasses.replace(model.adapter, times=model.adapter.times[:1], timesteps=())
    world = World(model, kv="fp32")
    model.adapter = dataclasses.replace(model.adapter, guidance=float("inf"))
    with pytest.raises(NotFinite, match=r"first in what guidance and sampler make of what the network gives$"):
        world.step(prompt="fog")


def test_a_decoder_of_pictures_that_fails_is_named():
    model = wan(window=6)
    spoiled = PictureStream(lambda latents: to_bytes(latents[:, :3].permute(0, 2, 3, 1) + float("nan")))
    model.open_video = lambda: spoiled
    with pytest.raises(NotFinite, match=r"are not finite, first in what the decoder of pictures gives$"):
        World(model).step(prompt="fog")


def test_given_frames_that_the_encoder_spoils_change_nothing():
    model = wan(window=6)
    world, frames = World(model), np.zeros((3, *model.adapter.size, 3), np.uint8)
    encode, model.encode_video = model.encode_video, lambda frames: torch.full((3, *model.latent_shape), float("nan"))
    with pytest.raises(NotFinite, match=r"^frames: the encoder made NaN or infinity of them$"):
        world.observe(frames, prompt="fog")
    model.encode_video = encode
    assert world.frames == 0
    world.observe(frames[:, :, ::-1, ::-1], prompt="fog")  # as cv2's pictures are turned into RGB: negative strides
    assert world.frames == 3


@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_pipeline_names_the_layer_too(at):
    from inferix.models.magi import Magi, adapter_for
    from inferix.models.magi.adapters import scheduled
    from tests.models.magi_folder import random_network, tiny_config

    schedule = scheduled("magi-4.5b", 8, None, None)
    model = Magi(random_network(tiny_config()), adapter_for("magi-4.5b", schedule, (48, 80)), schedule)
    model.conditioning = lambda prompt, actions: model.conditioning_from(torch.ones(5, 24))
    world = World(model, kv="fp32")
    for i in range(at + 1):
        if i == at:
            spoil(model, "videodit_blocks.layers.1.self_attention.linear_qkv.qx.weight")
            with pytest.raises(
                NotFinite, match=r"first in what videodit_blocks\.layers\.1\.self_attention\.linear_qkv\.qx"
            ):
                world.step(prompt="fog")
        else:
            world.step(prompt="fog")
