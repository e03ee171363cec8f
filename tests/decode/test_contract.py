"""The contract of models: what is declared there is all that a World asks, and each network keeps it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from inferix import World, saved
from inferix.decode.contract import Adapter, BlockInput, Model, PictureStream
from inferix.finite import NotFinite
from inferix_kernels import Policy
from tests.decode.test_loop import small_world
from tests.decode.test_pipeline import model as magi
from tests.decode.test_pipeline import world as pipeline
from tests.models.test_wan_world import wan
from tests.models.wan_golden import table_for

DRIVER = Path(__file__).parents[2] / "python" / "inferix"


class Plain(Model):
    """The least that a model can be: one layer of attention, no VAE, no text encoder, no actions."""

    adapter = Adapter(name="plain", block_frames=2, times=(1.0, 0.5), window=6)
    layers, heads, head_dim, frame_tokens, latent_shape, dtype = 1, 2, 8, 4, (4, 16), torch.float32

    def rope(self, frames):
        angles = torch.tensor(frames, dtype=torch.float32)[:, None, None] * torch.ones(4, 4)
        return torch.stack([angles.cos(), angles.sin()], -1).flatten(0, 1)

    def conditioning(self, prompt, actions):
        return 1.0 + len(prompt) % 3

    def predict(self, inputs, attend, stride=None):
        x = torch.cat([block.x * block.conditioning * (1 - 0.5 * block.t) for block in inputs])
        attended = attend(0, x.flatten(0, 1).repeat(1, 3), torch.ones(16), torch.ones(16))
        if attended is None:
            return [x[:0]] * len(inputs)
        return attended.view_as(x).tanh().split([len(block.x) for block in inputs])

    def encode(self, frames):
        return torch.from_numpy(frames).float().flatten(1).unflatten(1, (4, 16)) / 127.5 - 1

    def stream(self):
        return PictureStream(lambda latents: latents.numpy())


def test_a_model_of_the_contract_alone_is_a_world(tmp_path):
    world, straight = (World(Plain(), kv="fp32", undo=4, worlds=2) for _ in range(2))
    made = [world.step(prompt="fog") for _ in range(3)]
    assert made[0].shape == (2, 4, 16) and not np.array_equal(made[0], made[1])
    replayed = [straight.replay(torch.from_numpy(latents), prompt="fog") for latents in made[:2]]
    assert all(np.array_equal(a, b) for a, b in zip(made, [*replayed, straight.step()]))
    saved.save(world, tmp_path / "w")
    fork = world.fork()
    following = world.step(prompt="sun")
    assert np.array_equal(fork.step(prompt="sun"), following)
    fork.release()
    other = saved.load(world, tmp_path / "w")
    assert np.array_equal(other.step(prompt="sun"), following)
    other.release()
    world.rewind(4)
    assert world.frames == 4 and np.array_equal(world.last_picture(), made[1][-1])
    world.reset(0)
    given = np.full((4, 64), 90, np.uint8)
    assert world.observe(given, prompt="fog").shape == (4, 4, 16) and world.frames == 4
    with pytest.raises(ValueError, match="frames must be at least one picture, got none"):
        world.observe(given[:0])
    with pytest.raises(ValueError, match="kv_read: plain does not run in a pipeline"):
        world.kv_read()
    with pytest.raises(ValueError, match="for_video: plain makes a video block by block"):
        world.model.for_video(5)


@pytest.mark.parametrize("make", [lambda: World(Plain(), kv="fp32"), pipeline], ids=["sequential", "pipeline"])
def test_latents_of_another_step_are_refused_and_nothing_has_changed(make):
    world, straight = make(), make()
    for each in (world, straight):
        each.step(prompt="fog")
    again = straight.latents
    wanted = list((straight.step(prompt="sun"), straight.latents)[1].shape)
    for wrong in (again[:1], again[:, :1], torch.cat([again] * 3), again[:0]):
        said = re.escape(f"latents must be {wanted}, what the next step returns, got {list(wrong.shape)}")
        with pytest.raises(ValueError, match=f"^{said}$"):
            world.replay(wrong, prompt="sun")
    for wrong in (again.double(), again.half(), again.to(torch.int32), again.to("meta"), again.to_sparse(), None):
        with pytest.raises((ValueError, TypeError), match=r"^latents must be "):
            world.replay(wrong, prompt="sun")
    assert world.prompt == "fog"
    world.step(prompt="sun")
    assert torch.equal(world.latents, straight.latents)


def test_without_a_network_to_watch_a_block_that_is_not_finite_ends_its_world():
    model = Plain()
    model.conditioning = lambda prompt, actions: float("nan")
    with pytest.raises(NotFinite, match=r"^latent frames 0 to 1 of plain are not finite, first in what guidance"):
        World(model, kv="fp32").step(prompt="fog")


@pytest.mark.parametrize("make", [lambda: small_world().model, wan, magi], ids=["tiny", "wan", "magi"])
def test_every_block_of_a_forward_can_be_predicted(make):
    """As a pipeline asks for it; the loop of one block asks for the last prediction alone."""
    model = make()
    table, size = table_for(model, Policy(window=12)), model.adapter.block_frames
    blocks = [table.open_block(size) for _ in range(2)]
    actions = ["up"] * size if model.adapter.actions else []
    conditioning = model.conditioning("desert day", actions)
    conditioning = next(iter(model.variants(conditioning, None).values()))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, size, *model.latent_shape, generator=generator)

    def predict(*wanted):
        shown = blocks[: len(wanted)]
        rope = model.rope([frame for block in shown for frame in block.frames])
        half = torch.tensor(0.5).double()
        inputs = [BlockInput(x[i], half, conditioning, predict) for i, predict in enumerate(wanted)]
        with torch.inference_mode():
            return model.predict(inputs, table.plan(shown, rope).attend)

    both, last, alone = predict(True, True), predict(False, True), predict(True)
    assert [part.shape for part in both] == [x[0].shape] * 2 and len(last) == 2
    # A later block is not seen by an earlier one; larger products sum in another order.
    assert torch.allclose(both[0], alone[0], atol=2e-5) and torch.allclose(both[1], last[1], atol=2e-5)
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_nothing_is_asked_of_a_model_but_what_is_declared():
    """No attribute is looked for by name, and a World does not ask of which kind its parts are."""
    files = [*(DRIVER / "decode").glob("*.py"), *(DRIVER / f"{name}.py" for name in ("world", "history", "opening"))]
    asked = {
        f"{path.name}: {ast.unparse(node)}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id in ("hasattr", "getattr", "isinstance") and ast.unparse(node.args[1]) not in ("str", "int")
    }
    assert len(files) > 8 and asked == set()
