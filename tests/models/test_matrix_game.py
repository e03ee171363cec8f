"""Matrix-Game 2 against recorded runs of its own code, and as a world: forked, rewound, saved, refused.

The recordings and how they were made: golden/README.md.
"""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from inferix import saved
from inferix.models import load_model
from inferix.models.matrix_game import ADAPTERS, MatrixGame
from inferix.models.matrix_game.adapters import DRIVE, RUN, UNIVERSAL
from inferix.models.matrix_game.checkpoint import matrix_game_network
from inferix.models.wan.names import canonical
from inferix.world import World
from inferix_kernels import Policy
from tests.models.matrix_game_folder import random_network, write_network
from tests.models.wan_golden import GOLDEN, DenseTable, Replay, draws_of, golden, table_for

MODES = {"universal": "matrix-game-2", "gta_drive": "matrix-game-2-gta", "templerun": "matrix-game-2-templerun"}
BLOCKS = 4
RECORDED = golden("matrix_game_2")
with safe_open(GOLDEN / "matrix_game_2.safetensors", "pt") as file:
    ACTIONS = json.loads(file.metadata()["actions"])


def recorded(mode):
    """One mode's tensors, without its name in front."""
    return {key.removeprefix(f"{mode}."): x for key, x in RECORDED.items() if key.startswith(f"{mode}.")}


def model_for(mode, dtype=torch.float32):
    tensors = {key: x for key, x in (RECORDED | recorded(mode)).items() if key.startswith("model.")}
    weights, name = canonical(tensors, "golden"), MODES[mode]
    network = matrix_game_network(weights, {"heads": 2, "action_heads": 2}, "golden", name)
    state = {
        key: weights[key] if key in weights else torch.cat([weights[key.replace("qkv", letter)] for letter in "qkv"])
        for key in network.state_dict()
    }
    network.load_state_dict(state)
    latents = RECORDED["cond_latents"][0].transpose(0, 1)
    mask = torch.zeros(len(latents), 4, *latents.shape[2:])
    mask[0] = 1
    adapter = dataclasses.replace(ADAPTERS[name], size=tuple(8 * side for side in latents.shape[2:]))
    model = MatrixGame(network.to(dtype), adapter)
    return model.conditioned(torch.cat([mask, latents], 1).to(dtype), RECORDED["visual_context"][0])


def run(mode, model, table):
    tensors = recorded(mode)
    order = {"inputs.noise": tensors["inputs.noise"][None], "inputs.renoise": tensors["inputs.renoise"]}
    decoder = Replay(model, table, draws_of(order, 3, BLOCKS))
    for block in range(BLOCKS):
        decoder.step(model.conditioning("", ACTIONS[mode][3 * block : 3 * block + 3]))
    decoder.commit_pending()
    assert next(decoder.draws, None) is None
    return decoder, torch.stack([torch.stack(steps) for steps in decoder.x0])


def difference(a, b):
    return float((a.double() - b.double()).abs().max())


@pytest.mark.parametrize("mode", MODES)
def test_the_recorded_run_in_float64(mode):
    model, tensors = model_for(mode, torch.float64), recorded(mode)
    window = model.adapter.window
    table = DenseTable(model, Policy(window))
    decoder, x0 = run(mode, model, table)
    assert difference(x0, tensors["outputs.x0"]) < 1e-6
    frames = range(12 - window, 12)  # of their caches, which are as long as the window
    held = torch.stack(table.gather(1, frames))
    assert difference(held, tensors["outputs.cache.layer1"]) < 1e-6
    seen = [list(range(max(0, 3 * block + 3 - window), 3 * block + 3)) for block in range(BLOCKS)]
    assert decoder.held == seen
    kept = [clean.conditioning.own.kept for clean in decoder.recent]
    for part in ("mouse", "keyboard"):
        if f"outputs.{part}_cache" in tensors:
            ours = torch.stack([torch.cat([block[0, part][side] for block in kept])[-window:] for side in (0, 1)])
            ours = ours.transpose(1, 2) if part == "mouse" else ours[:, :, 0]
            assert difference(ours, tensors[f"outputs.{part}_cache"]) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_the_recorded_run_over_pages(mode):
    model, tensors = model_for(mode), recorded(mode)
    policy = Policy(model.adapter.window)
    _, exact = run(mode, model, table_for(model, policy, backend="auto"))
    assert difference(exact, tensors["outputs.x0"]) < 2e-5
    _, int8 = run(mode, model, table_for(model, policy, "int8", backend="auto"))
    error = (int8 - exact)[:, -1].square().mean().sqrt()
    peak = exact[:, -1].max() - exact[:, -1].min()
    assert 20 * torch.log10(peak / error) > 60  # measured: see docs/matrix-game.md


@pytest.mark.parametrize("mode", MODES)
def test_actions_are_told_as_recorded(mode):
    controls = {"universal": UNIVERSAL, "gta_drive": DRIVE, "templerun": RUN}[mode]
    keyboard, mouse = controls.told([tuple(name.split("+")) for name in ACTIONS[mode]])
    tensors = recorded(mode)
    last = [0, *range(4, 45, 4)]  # of each latent frame's pictures
    assert torch.equal(keyboard, tensors["inputs.keyboard"][last])
    assert mouse is None if mode == "templerun" else torch.equal(mouse, tensors["inputs.mouse"][last])


def test_opposites_done_at_once_are_nothing():
    keyboard, mouse = UNIVERSAL.told([("forward", "back", "left", "camera_l", "camera_r", "camera_up")])
    assert keyboard.tolist() == [[0, 0, 1, 0]]
    assert mouse.tolist() == [[pytest.approx(0.1), 0.0]]


@pytest.fixture(scope="module")
def model():
    adapter = dataclasses.replace(ADAPTERS["matrix-game-2"], size=(32, 48))
    model = MatrixGame(random_network(), adapter)
    generator = torch.Generator().manual_seed(1)
    channels = torch.randn(5, 20, 4, 6, generator=generator)
    return model.conditioned(channels, torch.randn(7, 160, generator=generator))


def world_of(model, **options):
    from inferix.decode.contract import PictureStream

    model.open_video = lambda: PictureStream(lambda latents: latents.numpy())
    return World(model, kv="fp32", seed=3, **options)


def latents_of(world, *actions):
    made = []
    for action in actions:
        world.step(action=action)
        made.append(world.latents.clone())
    return torch.cat(made)


def test_what_is_done_matters_from_its_own_block_on(model):
    worlds = [world_of(model) for _ in range(2)]
    same = [latents_of(world, "forward", "left+camera_l") for world in worlds]
    assert torch.equal(*same)
    a, b = (latents_of(world, action, "nomove") for world, action in zip(worlds, ("forward", "back")))
    assert (a[:3] != b[:3]).any() and (a[3:] != b[3:]).any()


def test_a_clean_pass_by_itself_leaves_what_a_shared_one_does(model):
    shared, alone = world_of(model), world_of(model)
    a = latents_of(shared, "forward", "left", "right")
    made = []
    for action in ("forward", "left", "right"):
        made.append(latents_of(alone, action))
        alone.commit_pending()
    assert difference(a, torch.cat(made)) < 1e-5


def test_forks_and_rewound_worlds_remember_what_was_done(model):
    world = world_of(model, undo=6, worlds=2)
    latents_of(world, "forward", "left")
    other = world.fork()
    a, b = latents_of(world, "right", "back"), latents_of(other, "right", "back")
    assert torch.equal(a, b)
    noise = world.decoder.generator.get_state()
    c = latents_of(world, "camera_up")
    world.rewind(3)
    world.decoder.generator.set_state(noise)
    assert difference(latents_of(world, "camera_up"), c) < 1e-5


def test_a_saved_world_goes_on(model, tmp_path):
    world = world_of(model, worlds=2)
    latents_of(world, "forward", "left", "camera_l")
    saved.save(world, tmp_path / "world")
    again = saved.load(world, tmp_path / "world")
    assert torch.equal(latents_of(world, "right", "back"), latents_of(again, "right", "back"))


def test_a_damaged_memory_is_refused(model):
    carried = model.carried(model.placed(model.conditioning("", ["nomove"] * 3), 0, []))
    for damaged in (None, {}, carried, carried | {"kept": {"0 mouse": 1}}):
        with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
            model.resumed(damaged)


def test_after_the_picture_the_channels_stay(model):
    block = model.placed(model.conditioning("", ["nomove"] * 3), 300, [])
    from inferix.decode.contract import BlockInput

    given = model.channels(BlockInput(torch.zeros(3, 16, 4, 6), 0.0, block))
    assert torch.equal(given[:, 16:], model.concat_latents[-1].expand(3, -1, -1, -1))


def test_graphs_which_would_lose_what_blocks_leave_are_refused(model):
    from tests.decode.test_graphs import on_a_gpu

    with pytest.raises(ValueError, match="graphs must be False for matrix-game-2, which keeps what its blocks leave"):
        World(on_a_gpu(copy.copy(model)), graphs=True)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"prompt": "a city"}, "prompt must be empty: matrix-game-2 takes no words"),
        ({"actions": ["jump"] * 3}, "action must be one of nomove, forward, .* joined with \\+\\), got 'jump'"),
        ({"actions": ["forward+"] * 3}, "action must be one of"),
        ({"actions": [9] * 3}, "action must be a name or an index below 9, got 9"),
    ],
)
def test_bad_steering_is_refused(given, said, model):
    with pytest.raises(ValueError, match=said):
        model.conditioning(**({"prompt": "", "actions": ["nomove"] * 3} | given))


def test_a_world_needs_its_picture():
    bare = MatrixGame(random_network(), dataclasses.replace(ADAPTERS["matrix-game-2"], size=(32, 48)))
    with pytest.raises(ValueError, match="image: matrix-game-2 is conditioned on its first picture"):
        bare.conditioning("", ["nomove"] * 3)
    with pytest.raises(ValueError, match="image must be given"):
        bare.with_picture(None)
    with pytest.raises(ValueError, match="need a VAE next to them"):
        bare.with_picture(np.zeros((32, 48, 3), np.uint8))
    with pytest.raises(ValueError, match="image: tiny is conditioned on no picture"):
        load_model("tiny").with_picture(np.zeros((96, 96, 3), np.uint8))


@pytest.mark.parametrize(
    "made, opened, said",
    [
        ("matrix-game-2-gta", "matrix-game-2", "matrix-game-2 must have 4 keys and 2 mouse channels, got 2 and 2"),
        ("matrix-game-2", "matrix-game-2-templerun", "must have 7 keys and 0 mouse channels, got 4 and 2"),
        ("matrix-game-2", "self-forcing", "action_model"),
    ],
)
def test_another_models_weights_are_refused(made, opened, said, tmp_path):
    write_network(tmp_path, made)
    with pytest.raises(ValueError, match=said):
        load_model(opened, str(tmp_path), device="cpu")


def test_action_modules_in_the_last_layer_are_refused(tmp_path):
    write_network(tmp_path, action_layers=2)
    with pytest.raises(ValueError, match=r"not in the last one, .* got them in \[0, 1\] of 2"):
        load_model("matrix-game-2", str(tmp_path), device="cpu")


def test_a_wan_is_no_matrix_game(tmp_path):
    from tests.models import wan_folder

    wan_folder.write_network(tmp_path)
    with pytest.raises(ValueError, match="matrix-game-2 must have action modules, got none"):
        load_model("matrix-game-2", str(tmp_path), device="cpu")
