"""Names of a Wan checkpoint's tensors: what wrappers add, and what diffusers calls them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

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
PACKED = ".self_attn.qkv."  # our own name for q, k and v in one


def canonical(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The same tensors under the names that Wan published.

    Raises:
        ValueError: two tensors would come to bear one name.
    """
    from_diffusers = any(DIFFUSERS_MARK in name for name in tensors)
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = published(name, from_diffusers)
        if found in named:
            raise ValueError(f"weights: {source} holds {found} twice, once as {name}")
        named[found] = tensor
    return named


def thirds(packed: str) -> list[str]:
    """Published names of what a packed tensor of ours holds."""
    return [packed.replace(PACKED, f".self_attn.{letter}.") for letter in "qkv"]


def published(name: str, from_diffusers: bool) -> str:
    """What Wan calls the tensor of this name, without what wrappers add."""
    name = FRONT.sub("", WRAPPED.sub("", name))
    if from_diffusers:
        for pattern, replacement in DIFFUSERS:
            name = pattern.sub(replacement, name)
    return name
