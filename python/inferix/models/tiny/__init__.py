"""The tiny world: a small world model trained by `train.py` on `simulator.py`, shipped with its weights."""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from inferix_kernels._check import is_whole
from inferix_kernels.quantize import quantize_linears

from ...decode.contract import Adapter, BlockInput, Model, PagedAttend, PictureStream, Presentation, first_predicted
from ...finite import to_bytes
from ..linears import CODES, check_linear, eight_bit_names, linear_of
from .checker import UNKNOWN, look
from .model import CrossCache, TinyConfig, TinyWorldModel, few_step_times, patchify, rope_angles, unpatchify
from .simulator import ACTIONS, FPS, KEYS, SIZE, THEMES, TIMES, parse_theme

ADAPTER = Adapter(
    name="tiny",
    block_frames=3,
    times=few_step_times(steps=3, shift=1.0),  # what train.py distils for: a step for each frame
    first_times=few_step_times(steps=48, shift=2.0),  # a block without a past has everything to invent
    window=9,
    sink=0,
    size=(SIZE, SIZE),
    actions=ACTIONS,
)
PRESENTATION = Presentation(
    fps=FPS,
    scale=4,
    live=True,
    threads=1,  # its matrices are small: a second thread gains little, and on a busy machine loses a factor of ten
    keys={" ": "none"} | {key: ACTIONS[action] for key, action in KEYS.items()},
    example_prompts=THEMES,
)


class TinyWorld(Model):
    """The tiny model as the decode loop sees it. Latents are patches of pixels in [-1, 1]; there is no VAE."""

    adapter, presentation = ADAPTER, PRESENTATION
    network: TinyWorldModel

    def __init__(self, network: TinyWorldModel):
        self.network, config = network.eval().requires_grad_(False), network.config
        self.layers, self.heads, self.head_dim = config.layers, config.heads, config.head_dim
        self.dtype, self.linear = network.head.weight.dtype, linear_of(network)
        self.frame_tokens, self.latent_shape = config.frame_tokens, (config.frame_tokens, config.patch)
        self._themes: dict[tuple[int, int], list[CrossCache]] = {}  # as many as there are, however they are worded

    def rope(self, frames: Sequence[int]) -> Tensor:
        angles = rope_angles(self.network.config, torch.tensor(frames)).flatten(0, 1)
        return torch.stack([angles.cos(), angles.sin()], -1).float()

    @torch.inference_mode()
    def conditioning(self, prompt: str, actions: Sequence[int | str]) -> tuple[Tensor, list[CrossCache]]:
        """Actions [1, 1, frames], and what cross-attention needs of the prompt, computed once per theme."""
        theme = parse_theme(prompt)
        if theme not in self._themes:
            self._themes[theme] = self.network.prompt_cache(torch.tensor([[theme]]))
        return torch.tensor([[[parse_action(action) for action in actions]]]), self._themes[theme]

    def predict(self, inputs: Sequence[BlockInput], attend: PagedAttend, stride: float | None = None) -> list[Tensor]:
        config, count = self.network.config, len(inputs)

        def paged(layer: int, qkv: Tensor, norm_q: Tensor, norm_k: Tensor) -> Tensor | None:
            out = attend(layer, qkv.flatten(0, 2), norm_q, norm_k, config.eps)
            return None if out is None else out.view(1, count, -1, out.shape[-1])

        x = torch.stack([block.x.flatten(0, 1) for block in inputs])[None]
        times = torch.stack([block.t for block in inputs])[None].float()
        actions = torch.cat([block.conditioning[0] for block in inputs], 1)
        per_layer = zip(*(block.conditioning[1] for block in inputs))
        cross = [CrossCache(*map(_side_by_side, zip(*layer))) for layer in per_layer]
        first = first_predicted(inputs)
        predict = slice(first, None)
        predicted = self.network(x.to(self.dtype), times, actions, cross, paged, predict, self.shard)
        nothing = [block.x[:0] for block in inputs]
        if predicted is None:
            return nothing
        made = predicted[0].to(x.dtype).unflatten(1, (config.block_frames, -1))
        made = made.clamp(-1, 1) + 0 * made  # what is infinite must not look like white: it becomes NaN
        return [*nothing[:first], *made]

    def encode(self, frames: np.ndarray) -> Tensor:
        if frames.dtype != np.uint8 or frames.shape[1:] != (SIZE, SIZE, 3):
            raise ValueError(f"frames must be uint8 [n, {SIZE}, {SIZE}, 3], got {frames.dtype} {list(frames.shape)}")
        return patchify(torch.from_numpy(frames).float() / 127.5 - 1).unflatten(0, (len(frames), -1))

    def decode(self, latents: Tensor) -> np.ndarray:
        return to_bytes(unpatchify(latents.flatten(0, 1)))

    def stream(self) -> PictureStream:
        return PictureStream(self.decode)

    def measures(self, frames: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
        seen = look(frames)
        asked = [place * len(TIMES) + time for place, time in map(parse_theme, prompts)]
        return {
            "player exactly once": float(seen.once[:, 0].mean()),
            "both boats exactly once": float(seen.once[:, 1:].all(1).mean()),
            "tiles recognised": float((seen.tiles != UNKNOWN).mean()),
            "theme as asked": float((seen.theme == asked).mean()),
        }


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Of blocks [1, 1, ...] each: [1, blocks, ...]."""
    return torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]


def parse_action(action: int | str) -> int:
    """Index into ACTIONS of an index, a name ("up") or a key ("w")."""
    if isinstance(action, str):
        name = action.strip().lower()
        if name in ACTIONS:
            return ACTIONS.index(name)
        if name in KEYS:
            return KEYS[name]
    elif is_whole(action) and 0 <= action < len(ACTIONS):
        return int(action)
    raise ValueError(f"action must be one of {', '.join(ACTIONS)} (or w, a, s, d), got {action!r}")


def load(
    weights: str | Path | None = None, name: str = "tiny", *, linear: str | None = None, **options: object
) -> TinyWorld:
    """The tiny world from a checkpoint, by default the one shipped in this package.

    Args:
        linear: "int8" or "fp8" puts the layers between the first and the last ones in 8 bits, see
            TinyWorldModel.FULL_PRECISION; "bf16" the whole network in bfloat16. None: all in float32.

    Raises:
        ValueError: the file is missing, damaged, or holds another model, or another option is given: there is none.
            Says which.
    """
    check_linear(linear)
    if options:
        raise ValueError(f"{next(iter(options))}: the tiny world has one size and one schedule, and runs on the CPU")
    path = Path(weights) if weights is not None else Path(str(resources.files(__package__) / "tiny_world.safetensors"))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118, not a dict
    except FileNotFoundError:
        raise ValueError(f"weights: there is no file {path}") from None
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:
        raise ValueError(f"weights: {path} is damaged or not a safetensors file ({error})") from None
    with torch.device("meta"):  # no more memory than the file has, whatever sizes it names
        network = TinyWorldModel(_config(metadata, state, path))
    expected = network.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        want, got = (list(d[name].shape) if name in d else "nothing" for d in (expected, state))
        if want != got:
            raise ValueError(f"weights: {path}: {name} must be {want}, got {got}")
    network.load_state_dict(state, assign=True)
    if linear in CODES:
        quantize_linears(network, CODES[linear], names=eight_bit_names(network))
    return TinyWorld(network.to(torch.bfloat16) if linear == "bf16" else network)


def _config(metadata: Mapping[str, str], state: Mapping[str, Tensor], path: Path) -> TinyConfig:
    """The sizes in a checkpoint's metadata, if they can be those of a tiny world with these tensors."""
    try:
        config = TinyConfig(**json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(
            f"weights: {path} is not a tiny world checkpoint: its metadata has no 'config' we know"
        ) from None
    most = max(map(Tensor.numel, state.values()), default=0)
    for field in dataclasses.fields(TinyConfig):
        value = getattr(config, field.name)
        if field.name == "eps":
            good, wanted = type(value) is float and 0 < value < 1, "a number between 0 and 1"
        elif field.name in ("block_frames", "patch", "grid"):  # of the world itself
            good, wanted = value == field.default, str(field.default)
        else:
            good, wanted = type(value) is int and 1 <= value <= most, f"a whole number from 1 to {most}"
        if not good:
            raise ValueError(f"weights: {path}: {field.name} must be {wanted}, got {reprlib.repr(value)}")
    if config.layers > len(state) or config.dim % config.heads or config.head_dim % 2:
        raise ValueError(f"weights: {path}: no tiny world has these sizes: {config}")
    return config
