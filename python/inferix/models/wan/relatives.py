"""Whose weights a file holds, as far as it says so.

Networks of one architecture take each other's files, and only how they are sampled tells them apart: Self Forcing's
weights under Causal-Forcing's name load without an error. So whatever a file says of itself is looked at: its metadata,
its name, the config and the folder that it lies in, which weights it holds by name, and its sizes. What does not fit
the name it is run under is said, and no more: people call files what they like.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .network import WanConfig

# Families of weights, as rows begin with their names; files are called so too, with other dashes or none.
FAMILIES = (
    "self-forcing",
    "causal-forcing",
    "rolling-forcing",
    "reward-forcing",
    "causvid",
    "longlive-2",
    "longlive",
    "krea-realtime",
    "infinity-rope",
    "matrix-game",
    "wan",
)
OF_ANOTHER = {"infinity-rope": "self-forcing"}  # a way to sample another family's weights
# What LongLive 2's save_merged_nvfp4_generator.py calls its files for TransformerEngine (model_te.pt).
FOR_FOUR_BITS = "longlive_generator_merged_bf16"
# (width, layers) that a family was published with; two of Wan itself.
SMALL, FIVE, LARGE = (1536, 30), (3072, 30), (5120, 40)
SIZES = {"krea-realtime": (LARGE,), "longlive-2": (FIVE,), "wan": (SMALL, LARGE)}


def family_of(text: str) -> str:
    """The family that a name or a title says; "": none.

    Example:
        >>> family_of("self_forcing_dmd.pt"), family_of("LongLive-2.0-5B"), family_of("Wan2.1-T2V"), family_of("m.pt")
        ('self-forcing', 'longlive-2', 'wan', '')
    """
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower())
    for family in FAMILIES:
        pattern = r"\bwan-?(2|t2v|i2v)" if family == "wan" else family.replace("-", "-?")
        if re.search(pattern, plain):
            return OF_ANOTHER.get(family, family)
    return ""


def say_whose(
    row: str,
    path: Path,
    metadata: Mapping[str, str],
    said: Mapping[str, Any],
    parts: Sequence[str],
    config: WanConfig,
) -> None:
    """Log, as warnings of one line, what speaks against these weights being those of a row.

    Args:
        metadata: strings in the file.
        said: what the config.json next to it holds.
        parts: names of the weights that the row is published as, the first one before the others.
    """
    own, log = family_of(row), logging.getLogger("inferix")
    told = [
        (f"its {key:.40}, {value!r:.80}", value) for key, value in metadata.items() if key not in ("config", "holds")
    ]
    told += [(name := f"its name, {path.name!r}", path.name)]
    if origin := said.get("_name_or_path"):
        told += [(f"_name_or_path of its config.json, {origin!r:.80}", str(origin))]
    told += [(f"its folder's name, {path.parent.name!r}", path.parent.name)]
    # All of them began as Wan and may say so; a file that is called so is taken to be no more.
    found = [(where, family_of(text)) for where, text in told if family_of(text) not in ("", "wan")]
    found += [(name, "wan")] if family_of(path.name) == "wan" else []
    if own and found and not own.startswith(found[0][1]):
        where, family = found[0]
        log.warning(f"weights: {path} is {family}'s by {where}; {row} takes {own}'s, which have the same tensors")
    held = metadata.get("holds", "").split(", ")
    if len(parts) > 1 and parts[0] not in held and parts[1] in held:
        log.warning(f"weights: {path} holds {parts[1]} and no {parts[0]}, as which {row} is published")
    if metadata.get("checkpoint_format") == FOR_FOUR_BITS:
        log.warning(f"weights: {path} was trained to be rounded to NVFP4 as it runs, and is run here without")
    size, sizes = (config.dim, config.layers), SIZES.get(own, (SMALL,))
    if own and size not in sizes and size in (SMALL, FIVE, LARGE):
        wide = " or ".join(str(dim) for dim, _ in sizes)
        log.warning(f"weights: {path}: dim is {config.dim}, and {row} was published with {wide}")
