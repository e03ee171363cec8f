"""A folder as MAGI-1 is published, with tiny random weights: shards with an index, one of them compressed, the T5
encoder with its tokenizer, and the special tokens.

Needs transformers and zstandard. Run as a script, it writes one: `python -m tests.models.magi_folder FOLDER [MODEL]`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save, save_file

HEADS, KV_HEADS, HEAD_DIM, DIM, LAYERS, CAPTION_DIM = 6, 2, 32, 192, 3, 24
EIGHT_BIT = (
    "linear_qkv.q.",
    "linear_qkv.qx.",
    "linear_qkv.k.",
    "linear_qkv.v.",
    "linear_fc1.",
    "linear_fc2.",
    "linear_proj.",
)
SMOOTHED = ("linear_fc2.", "linear_proj.")
WORDS = ["a", "the", "red", "panda", "fox", "walks", "runs", "in", "fog", "rain", "snow", "at", "night", "city"]


def tiny_config(name="magi-4.5b", **changes):
    import dataclasses

    from inferix.models.magi import MagiConfig, config_for

    like = config_for(name)
    config = MagiConfig(
        dim=DIM,
        layers=LAYERS,
        heads=2 * HEADS if like.gated else HEADS,
        ffn=128,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        gated=like.gated,
        cond_dim=48,
        caption_dim=CAPTION_DIM,
        caption_len=64,
        halved=like.halved,
        x_scale=like.x_scale,
    )
    return dataclasses.replace(config, **changes)


def random_network(config, seed=0):
    """Weights large enough that nothing is nearly the identity."""
    from inferix.models.magi import MagiNetwork

    generator = torch.Generator().manual_seed(seed)
    network = MagiNetwork(config)
    for name, x in network.named_parameters():
        if name.endswith("rope.bands"):
            continue
        drawn = torch.randn(x.shape, generator=generator)
        scale = (1 / x[0].numel()) ** 0.5 if x.ndim > 1 and "null_caption" not in name else 0.1
        x.data = drawn * scale + (1.0 if name.endswith("layer_norm.weight") else 0.0)
    return network.eval().requires_grad_(False)


def published(network):
    """The network's tensors under the published names: q, k and v apart."""
    config, state = network.config, {}
    sizes = [config.heads * config.head_dim, *[config.kv_heads * config.head_dim] * 2]
    for name, x in network.state_dict().items():
        if ".qkv." in name:
            state |= {name.replace(".qkv.", f".{letter}."): part.clone() for letter, part in zip("qkv", x.split(sizes))}
        else:
            state[name] = x.clone()
    return state


def in_eight_bits(state, layers):
    """Layers between the first and the last with 8-bit weights and their scales, as the source has them."""
    made = {}
    for name, x in state.items():
        inside = any(f"layers.{i}." in name for i in range(1, layers - 1))
        if not (inside and any(part in name for part in EIGHT_BIT)):
            made[name] = x
            continue
        stem, width = name.removesuffix("weight"), x.shape[1]
        if any(part in name for part in SMOOTHED):
            smooth = 0.02 * (1 + torch.arange(width) % 3)
            x, made[stem + "input_scale"] = x * smooth, torch.ones(1)
            made[stem + "smooth_scale"] = smooth[None]
        else:
            made[stem + "input_scale"] = torch.full((width,), 0.03)
        scale = x.abs().max() / 448
        made[name], made[stem + "weight_scale"] = (x / scale)[None].to(torch.float8_e4m3fn), scale[None]
    return made


def write_weights(folder, name="magi-4.5b", seed=0, compress=True, **changes):
    """inference_weight*/ with two shards and their index; returns the network."""
    network = random_network(tiny_config(name, **changes), seed)
    state = published(network)
    if "quant" in name:
        state = in_eight_bits(state, network.config.layers)
    variant = "inference_weight" + (".fp8" if "quant" in name else "") + (".distill" if "distill" in name else "")
    shards = folder / variant
    shards.mkdir(parents=True, exist_ok=True)
    names, where = sorted(state), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{i:05}-of-00002.safetensors"
        tensors = {key: state[key].contiguous() for key in part}
        if compress and i == 2:
            import zstandard

            (shards / f"{shard}.zst").write_bytes(zstandard.compress(save(tensors)))
        else:
            save_file(tensors, shards / shard)
        where |= dict.fromkeys(part, shard)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return network


def write_encoder(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    target = folder / "t5_pretrained" / "t5-v1_1-xxl"
    fast.save_pretrained(target)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(vocabulary), d_model=CAPTION_DIM, d_kv=8, d_ff=48, num_layers=2, num_heads=3)
    T5EncoderModel(config).save_pretrained(target)


def write_special_tokens(folder):
    generator = np.random.default_rng(0)
    rows = {"caption_token": 1, "logo_token": 1, "other_tokens": 100}
    np.savez(folder / "special_tokens.npz", **{n: generator.standard_normal((k, CAPTION_DIM)) for n, k in rows.items()})


def write_folder(folder, name="magi-4.5b"):
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, name)
    write_encoder(folder)
    write_special_tokens(folder)
    return folder


if __name__ == "__main__":
    from inferix.models.magi import SCHEDULES

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", nargs="?", default="magi-4.5b", choices=list(SCHEDULES))
    args = parser.parse_args()
    print(write_folder(args.folder, args.model))
