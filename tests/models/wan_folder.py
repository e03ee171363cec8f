"""A folder as people have it on disk, with tiny random weights: network, text encoder, tokenizer and VAE.

Needs diffusers and transformers. `python -m tests.models.wan_folder FOLDER [--image | --wan22]` writes
one, with --image that of an image-to-video model, with --wan22 LongLive 2's.
"""

import argparse
import json
from pathlib import Path

import torch

HEADS, TEXT_DIM, TEXT_LEN = 3, 40, 24
WORDS = ["a", "the", "red", "panda", "fox", "walks", "runs", "in", "fog", "rain", "snow", "at", "night", "city"]


def write_network(folder, **config):
    """A Self Forcing checkpoint: a pickle with generator and generator_ema under the names that FSDP leaves."""
    from tests.models.wan_golden import published, random_network, tiny_config

    state = published(random_network(tiny_config(**config)))
    prefixed = {f"model._fsdp_wrapped_module.{name}": x for name, x in state.items()}
    torch.save(
        {"generator_ema": prefixed, "generator": {f"model.{name}": x for name, x in state.items()}}, folder / "m.pt"
    )
    (folder / "config.json").write_text(json.dumps({"num_heads": HEADS, "text_len": TEXT_LEN}))


def write_encoder(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=len(vocabulary), d_model=TEXT_DIM, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    encoder = UMT5EncoderModel(config)
    encoder.save_pretrained(folder / "text_encoder")
    return encoder


def write_image_encoder(folder):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 160, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=14, hidden_act="gelu"))
    tower.save_pretrained(folder / "image_encoder")
    return tower.eval()


def write_vae(folder):
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.save_pretrained(folder / "vae")
    return vae.eval()


def write_published_vae(path, width=8):
    """A VAE in a file under the names that Wan published; returns diffusers' model of it."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    torch.manual_seed(0)
    theirs = AutoencoderKLWan(base_dim=width).eval()
    state, published = theirs.state_dict(), {}
    leaves = [f"residual.{i}.{leaf}" for i in (0, 2, 3, 6) for leaf in ("gamma", "weight", "bias")]
    leaves += [f"{part}.{leaf}" for part in ("shortcut", "resample.1", "time_conv") for leaf in ("weight", "bias")]
    names = [
        f"{side}.{i}.{leaf}"
        for side in ("encoder.downsamples", "decoder.upsamples")
        for i in range(15)
        for leaf in leaves
    ]
    for side in ("encoder", "decoder"):
        middle = [f"residual.{i}.{leaf}" for i in (0, 2, 3, 6) for leaf in ("gamma", "weight", "bias")]
        middle += ["norm.gamma", *(f"{part}.{leaf}" for part in ("to_qkv", "proj") for leaf in ("weight", "bias"))]
        names += [f"{side}.middle.{i}.{leaf}" for i in range(3) for leaf in middle]
        names += [
            f"{side}.{part}" for part in ("conv1.weight", "conv1.bias", "head.0.gamma", "head.2.weight", "head.2.bias")
        ]
    names += [f"{conv}.{leaf}" for conv in ("conv1", "conv2") for leaf in ("weight", "bias")]
    for name in names:
        for called in convert_wan_vae_to_diffusers({name: torch.zeros(1)}):
            if called in state and called not in published.values():
                published[name] = called
    assert set(published.values()) == set(state)
    torch.save({name: state[called] for name, called in published.items()}, path)
    return theirs


def vae22():
    """Wan2.2's VAE, thin, as diffusers has it."""
    from diffusers import AutoencoderKLWan

    from inferix.models.wan.vae import SIZES22

    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=4, decoder_base_dim=4, **SIZES22).eval().requires_grad_(False)


def write_vae22(folder):
    vae = vae22()
    vae.save_pretrained(folder / "vae")
    return vae


def write_published_vae22(path):
    """The same in a file under the names that Wan published; returns diffusers' model of it."""
    vae, state = vae22(), {}
    parts = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    parts |= {"conv_shortcut": "shortcut"}
    whole = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
    whole |= {f"{side}.conv_in": f"{side}.conv1" for side in ("encoder", "decoder")}
    whole |= {f"{side}.norm_out": f"{side}.head.0" for side in ("encoder", "decoder")}
    whole |= {f"{side}.conv_out": f"{side}.head.2" for side in ("encoder", "decoder")}
    for name, x in vae.state_dict().items():
        module, leaf = name.rsplit(".", 1)
        side, *rest = module.split(".")
        if module in whole:
            module = whole[module]
        elif rest[0] == "mid_block":
            rest = rest[1:]
            middle = "1" if rest[0] == "attentions" else str(2 * int(rest[1]))
            module = f"{side}.middle.{middle}.{parts.get(rest[2], rest[2])}"
        else:  # a level: its residual blocks, and what changes the size behind them
            way, last, rest = "down" if side == "encoder" else "up", 2 if side == "encoder" else 3, rest[1:]
            at, tail = (rest[2], parts[rest[3]]) if rest[1] == "resnets" else (last, ".".join(rest[2:]))
            module = f"{side}.{way}samples.{rest[0]}.{way}samples.{at}.{tail}"
        state[f"{module}.{leaf}"] = x
    torch.save(state, path)
    return vae


def write_folder(folder, image=False, wan22=False):
    """With `image` an image-to-video network and the tower that looks at the picture, with `wan22` Wan2.2's latents."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"channels_in": 36, "image_dim": 160} if image else {}
    write_network(folder, **({"channels_in": 48, "channels_out": 48} if wan22 else sizes))
    write_encoder(folder)
    (write_vae22 if wan22 else write_vae)(folder)
    if image:
        write_image_encoder(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image", action="store_true", help="an image-to-video model")
    parser.add_argument("--wan22", action="store_true", help="LongLive 2's latents of 48 channels")
    args = parser.parse_args()
    print(write_folder(args.folder, args.image, args.wan22))
