"""From a folder of shards, as MAGI-1 is published, to a MagiNetwork.

Its weights lie in inference_weight/, with .fp8 and .distill behind the name for those variants, as safetensors shards
with an index; a shard may be compressed (.zst). Nothing is ignored: what is missing, what is too much and what has
another size is named.

Source of the key names and folders: github.com/SandAI-org/MAGI-1 (6ff822e), inference/infra/checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..wan.containers import check_floating, count_layers, read_tensors, reading, shape_of, shown
from .adapters import config_for
from .network import MagiConfig, MagiNetwork
from .quantized import FP8, SCALES, Codes, read_codes

LAYER = "videodit_blocks.layers."
PACKED = ".linear_qkv.qkv."
# Held in float32 where the layers are bfloat16: embeddings, the end, and norms that are not at a projection's front.
PRECISE = re.compile(
    r"^(x_embedder|y_embedder|t_embedder|rope|final_linear)\.|\.final_layernorm\.|\.[qk]_layernorm\.|_post_norm\."
)
FP8_CHOICES = ("keep", "dequantize")


def find_weights(weights: str | Path | None, name: str) -> Path:
    """The index, or the one file, of a model's weights.

    Args:
        weights: the model's folder, the folder of shards in it, or the file.

    Raises:
        ValueError: there is none; says where it was looked for.
    """
    if weights is None:
        raise ValueError("weights must be MAGI-1's folder: this model ships none")
    path = Path(weights)
    if not path.is_dir():
        if not path.exists():
            raise ValueError(f"weights: there is no file or folder {path}")
        return path
    variant = "inference_weight" + (".fp8" if "quant" in name else "") + (".distill" if "distill" in name else "")
    files = ("model.safetensors.index.json", "model.safetensors", "model.safetensors.zst")
    for folder in (path / variant, path):
        for file in files:
            if (folder / file).exists():
                return folder / file
    raise ValueError(f"weights: {path} holds no {name}: neither {variant}/{files[0]} nor {files[0]}, or {files[1]}")


def load_network(
    path: Path,
    name: str,
    *,
    fp8: str = "keep",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> MagiNetwork:
    """A network from a checkpoint.

    Args:
        path: as `find_weights` gives it.
        name: of the model, for what tensors do not show.
        fp8: 8-bit weights: "keep" them and multiply in 8 bits, or "dequantize" them to `dtype`.
        dtype: of the other weights, and so of the network's products; see PRECISE.
        backend: of the 8-bit products.

    Raises:
        ValueError: the file is damaged or holds another architecture; says which tensor, and what differs.
    """
    if fp8 not in FP8_CHOICES:
        raise ValueError(f"fp8 must be one of {', '.join(FP8_CHOICES)}, got {fp8!r}")
    tensors, _ = read_tensors(path)
    with reading(path, "a MAGI-1 transformer"):
        config = config_of(tensors, name, str(path))
        with torch.device("meta"):
            network = MagiNetwork(config)
        wanted = {key: tuple(parameter.shape) for key, parameter in network.state_dict().items()}
        _check(tensors, wanted, config, str(path))
    state: dict[str, Tensor] = {}
    for key in wanted:
        kept = torch.promote_types(dtype, torch.float32) if PRECISE.search(key) else dtype
        parts = _parts(key)
        if not _is_fp8(tensors[parts[0]]):
            whole = tensors[key] if parts == [key] else torch.cat([tensors[part] for part in parts])
            state[key] = whole.to(device, kept)
            continue
        codes = read_codes(tensors, parts, str(path))
        if fp8 == "dequantize":
            state[key] = codes.dequantized().to(device, kept)
        else:
            _replace(network, key, codes, device, backend)
    network.load_state_dict(state, assign=True, strict=False)  # what there must be has been checked above
    return network.eval().requires_grad_(False)


def config_of(tensors: Mapping[str, Tensor], name: str, source: str) -> MagiConfig:
    """Sizes read off the tensors; the model's name tells what they do not show.

    Raises:
        ValueError: a tensor that shows a size is missing.
    """

    def shape(key: str, *dims: int) -> torch.Size:
        return shape_of(tensors, key, dims or (2, 3), source, "MAGI-1 transformer")  # in 8 bits there may be three

    first, like = LAYER + "0.", config_for(name)
    patch, null = shape("x_embedder.weight", 5), shape("y_embedder.null_caption_embedding", 2)
    head_dim = shape(first + "self_attention.q_layernorm.weight", 1)[0]
    ffn, hidden = (shape(first + f"mlp.linear_fc{i}.weight") for i in (2, 1))
    return MagiConfig(
        dim=patch[0],
        layers=count_layers(tensors, LAYER, source),
        heads=shape(first + "self_attention.linear_qkv.q.weight")[-2] // head_dim,
        kv_heads=shape(first + "self_attention.linear_qkv.k.weight")[-2] // head_dim,
        head_dim=head_dim,
        ffn=ffn[-1],
        gated=hidden[-2] == 2 * ffn[-1],
        cond_dim=shape("t_embedder.mlp.2.weight")[0],
        caption_len=null[0],
        caption_dim=null[1],
        channels=patch[1] // (2 if like.halved else 1),
        halved=like.halved,
        x_scale=like.x_scale,
        patch=patch[-1],
    )


def _parts(key: str) -> list[str]:
    """Names under which a parameter is published."""
    return [key.replace(PACKED, f".linear_qkv.{letter}.") for letter in "qkv"] if PACKED in key else [key]


def _check(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], config: MagiConfig, src: str) -> None:
    """Every tensor that must be there is, with its shape, and no other."""
    expected: dict[str, tuple[int, ...]] = {}
    heads = [config.heads, config.kv_heads, config.kv_heads]
    for key, shape in wanted.items():
        if PACKED in key:
            expected |= {part: (n * config.head_dim, *shape[1:]) for part, n in zip(_parts(key), heads)}
        else:
            expected[key] = shape
    scales = {
        key.removesuffix("weight") + kind
        for key in expected
        for kind in SCALES
        if key in tensors and _is_fp8(tensors[key])
    }
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys() - scales)
    if missing or unexpected:
        raise ValueError(
            f"weights: {src} does not fit: {len(missing)} tensors are missing ({shown(missing)}), "
            f"{len(unexpected)} are unexpected ({shown(unexpected)})"
        )
    for key, shape in expected.items():
        got = tuple(tensors[key].shape)
        if got != shape and not (_is_fp8(tensors[key]) and got == (1, *shape)):
            raise ValueError(f"weights: {src}: {key} must be {list(shape)}, got {list(got)}")
    check_floating(tensors, [*expected, *scales & tensors.keys()], src)


def _is_fp8(tensor: Tensor) -> bool:
    return tensor.dtype == FP8


def _replace(network: MagiNetwork, key: str, codes: Codes, device: torch.device | str, backend: str) -> None:
    parent, _, leaf = key.removesuffix(".weight").rpartition(".")
    module: nn.Module = network.get_submodule(parent)
    setattr(module, leaf, codes.layer(backend).to(device))
