"""Names of a Wan checkpoint's tensors: what wrappers add, what diffusers calls them, and low-rank updates."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .containers import shown

# Left behind by FSDP, activation checkpointing and torch.compile, anywhere in a name.
WRAPPED = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
FRONT = re.compile(r"^((base_model|model|module|diffusion_model|transformer)\.)+")
DIFFUSERS_MARK = "condition_embedder."
# diffusers' name -> the published one, applied in this order.
DIFFUSERS = [
    (re.compile(pattern), published)
    for pattern, published in (
        (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
        (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
        (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
        (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
        (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
        (r"^proj_out\.", "head.head."),
        (r"^scale_shift_table$", "head.modulation"),
        (r"\.scale_shift_table$", ".modulation"),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
        (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_out\.0\.", ".o."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.add_([kv])_proj\.", r".\1_img."),
        (r"\.norm_added_k\.", ".norm_k_img."),
    )
]
LORA = re.compile(r"^(?P<module>.+?)\.(lora_(?P<side>A|B|down|up)(\.\w+)?(\.weight)?|(?P<alpha>alpha))$")


def canonical(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The same tensors under the names that Wan published.

    Raises:
        ValueError: two tensors would come to bear one name.
    """
    from_diffusers = any(DIFFUSERS_MARK in name for name in tensors)
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        published = _published(name, from_diffusers)
        if published in named:
            raise ValueError(f"weights: {source} holds {published} twice, once as {name}")
        named[published] = tensor
    return named


def merge_lora(tensors: dict[str, Tensor], updates: Mapping[str, Tensor], source: str) -> None:
    """Add low-rank updates to the weights they are for: W + alpha / rank * B A, computed in float32.

    Args:
        tensors: canonical; changed in place.
        updates: per module lora_A [rank, in] and lora_B [out, rank] (or down and up), and alpha, a number, where it
            is not the rank.

    Raises:
        ValueError: an update has no weight to go to, or half of it is missing; nothing has been merged.

    Source: arXiv:2106.09685; key names of github.com/huggingface/peft.
    """
    found: dict[str, dict[str, Tensor]] = {}
    strangers = []
    from_diffusers = any(".attn1." in name for name in updates)
    for name, tensor in updates.items():
        match = LORA.match(name)
        if not match:
            strangers.append(name)
            continue
        side = "alpha" if match["alpha"] else {"down": "A", "up": "B"}.get(match["side"], match["side"])
        found.setdefault(_published(match["module"] + ".weight", from_diffusers), {})[side] = tensor
    strangers += sorted(found.keys() - tensors.keys())
    if strangers or not found:
        raise ValueError(f"lora: {source} must hold updates of this network's weights, got {shown(strangers)}")
    merged = {}
    for target, update in found.items():
        if not {"A", "B"} <= update.keys():
            raise ValueError(
                f"lora: {source} must hold lora_A and lora_B for {target}, got {', '.join(sorted(update))}"
            )
        a, b, weight = update["A"].float(), update["B"].float(), tensors[target]
        if (b.shape[0], a.shape[1]) != weight.shape or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"lora: {source}: {target} is {list(weight.shape)}, got B {list(b.shape)} A {list(a.shape)}"
            )
        scale = float(update["alpha"]) / len(a) if "alpha" in update else 1.0
        merged[target] = torch.addmm(weight.float(), b, a, alpha=scale).to(weight.dtype)
    tensors.update(merged)


def _published(name: str, from_diffusers: bool) -> str:
    name = FRONT.sub("", WRAPPED.sub("", name))
    if from_diffusers:
        for pattern, published in DIFFUSERS:
            name = pattern.sub(published, name)
    return name
