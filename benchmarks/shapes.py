"""The work that real models ask of a kernel, as data: one block of new tokens over what one layer remembers.

Sources: the models' published configurations; 480p is 480 x 832, 1560 tokens a latent frame after 8 x 8 x 4
compression and 2 x 2 patches; MAGI-1 at 720 x 720 makes chunks of 6 latent frames and attends to five of them.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Shape(NamedTuple):
    """One block in one layer of a model."""

    name: str
    queries: int  # tokens of one block
    keys: int  # tokens attended to, the block's own included
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int  # width of the residual stream
    ffn: int
    frame_tokens: int
    page_size: int = 64

    @property
    def numbers(self) -> str:
        """As it can be asked for: queries x keys x heads x head_dim; of linear layers queries x hidden x ffn."""
        if not self.heads:
            return f"{self.queries}x{self.hidden}x{self.ffn}"
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"{self.queries}x{self.keys}x{heads}x{self.head_dim}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 192, 576, 4, 4, 64, hidden=128, ffn=512, frame_tokens=64),  # window of 9 frames
        Shape("tiny-36", 192, 2304, 4, 4, 64, hidden=128, ffn=512, frame_tokens=64),  # of 36
        # A tenth of a 480p block, for CPUs: the shape of Wan 1.3B at 144 x 256 over 7 blocks.
        Shape("wan1.3b-480p-small", 468, 3276, 12, 12, 128, hidden=1536, ffn=8960, frame_tokens=156),
        Shape("wan1.3b-480p-frame", 1560, 4680, 12, 12, 128, hidden=1536, ffn=8960, frame_tokens=1560),
        Shape("wan1.3b-480p", 4680, 32760, 12, 12, 128, hidden=1536, ffn=8960, frame_tokens=1560),  # 21 frames
        Shape("wan1.3b-480p-window9", 4680, 14040, 12, 12, 128, hidden=1536, ffn=8960, frame_tokens=1560),
        Shape("wan14b-480p", 4680, 32760, 40, 40, 128, hidden=5120, ffn=13824, frame_tokens=1560),
        Shape("magi-4.5b", 12150, 60750, 24, 8, 128, hidden=3072, ffn=12288, frame_tokens=2025),
        # For tests: grouped heads, ragged pages, seconds in total. Measured alone it is measured on warm caches.
        Shape("smoke", 33, 150, 4, 2, 32, hidden=64, ffn=96, frame_tokens=11, page_size=16),
    )
}
DEFAULT = {"cpu": ("tiny", "wan1.3b-480p-small"), "cuda": ("wan1.3b-480p", "wan14b-480p", "magi-4.5b")}
_NUMBERS = re.compile(r"(\d+)x(\d+)x(\d+)(?:/(\d+))?x(\d+)")
_LAYERS = re.compile(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)")


def find_shape(name: str) -> Shape:
    """A shape by its name, or by its numbers: queries x keys x heads[/kv_heads] x head_dim, as "468x3276x12x128".

    Three numbers are a shape of linear layers alone: tokens x hidden x ffn, as "192x1536x8960". It has no heads.

    Raises:
        ValueError: neither; the message lists the names.
    """
    if name in SHAPES:
        return SHAPES[name]
    if layers := _LAYERS.fullmatch(name):
        tokens, hidden, ffn = map(int, layers.groups())
        return Shape(name, tokens, tokens, 0, 0, 0, hidden, ffn, tokens)
    match = _NUMBERS.fullmatch(name)
    if match is None:
        raise ValueError(
            f"shape must be one of {', '.join(SHAPES)} or numbers such as 468x3276x12x128 "
            f"(of linear layers 192x1536x8960), got {name!r}"
        )
    queries, keys, heads, kv_heads, head_dim = (int(number or match[3]) for number in match.groups())
    if not queries or not head_dim or not kv_heads or heads % kv_heads or keys < queries:
        raise ValueError(f"shape must have keys >= queries > 0 and heads a multiple of kv_heads, got {name!r}")
    for shape in SHAPES.values():
        if name == shape.numbers:
            return shape
    hidden = heads * head_dim
    frame_tokens = queries // 3 if queries % 3 == 0 else queries
    return Shape(name, queries, keys, heads, kv_heads, head_dim, hidden, 4 * hidden, frame_tokens)
