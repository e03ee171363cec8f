"""A Matrix-Game 2 folder as people have it on disk, with tiny random weights: networks, VAE and CLIP.

Needs diffusers and transformers. `python -m tests.models.matrix_game_folder FOLDER` writes one.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from inferix.models.matrix_game import MatrixGameConfig, MatrixGameNetwork
from inferix.models.matrix_game.adapters import CONTROLS, FOLDERS
from tests.models.wan_golden import fill, published

SIZES = {"dim": 96, "layers": 2, "heads": 3, "ffn": 160, "channels_in": 36, "freq_dim": 64, "text_dim": 0}
SIZES |= {"image_dim": 160, "key_dim": 8, "action_dim": 32, "action_heads": 2}


def random_network(name="matrix-game-2", seed=0, **changes):
    controls = CONTROLS[name]
    sizes = {"action_layers": 1, "keyboard": len(controls.keyboard), "mouse": 2 if controls.camera else 0}
    return fill(MatrixGameNetwork(MatrixGameConfig(**(SIZES | sizes | changes))), seed).eval()


def write_network(folder, name="matrix-game-2", **changes):
    """One network under the names, and beside the config.json, that are published."""
    folder.mkdir(parents=True, exist_ok=True)
    network = random_network(name, **changes)
    state = {f"model.{key}": x.contiguous() for key, x in published(network).items()}
    save_file(state, folder / "distilled.safetensors")
    config = {"num_heads": network.config.heads, "action_config": {"heads_num": network.config.action_heads}}
    (folder / "config.json").write_text(json.dumps(config))


def write_folder(folder, names=tuple(FOLDERS)):
    from tests.models.wan_folder import write_image_encoder, write_vae

    for name in names:
        write_network(folder / FOLDERS[name], name)
    write_vae(folder)
    write_image_encoder(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    torch.manual_seed(0)
    print(write_folder(parser.parse_args().folder))
