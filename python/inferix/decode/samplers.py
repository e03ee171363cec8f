"""How a block gets from one noise level to the next, given what the network takes the clean block to be.

A noisy block is x = (1 - t) clean + t noise. Whatever the sampler, the last step ends at the clean prediction itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from inferix_kernels._install import require

# (step, x, clean prediction) -> x at the noise level of step + 1
Sampler = Callable[[int, Tensor, Tensor], Tensor]


def renoise(levels: Sequence[float], noise: Callable[[], Tensor]) -> Sampler:
    """Fresh noise at every step: what few-step models are distilled for (CausVid, Self Forcing)."""

    def step(i: int, x: Tensor, clean: Tensor) -> Tensor:
        return (1 - levels[i + 1]) * clean + levels[i + 1] * noise()

    return step


def euler(levels: Sequence[float], noise: Callable[[], Tensor]) -> Sampler:
    """The noise that the prediction implies: Euler's step along the flow."""

    def step(i: int, x: Tensor, clean: Tensor) -> Tensor:
        return clean + levels[i + 1] / levels[i] * (x - clean)

    return step


def unipc(levels: Sequence[float], noise: Callable[[], Tensor]) -> Sampler:
    """A predictor and corrector of second order, diffusers', as Wan's own sampling has it (arXiv:2302.04867).

    Raises:
        ImportError: diffusers is not installed; names the extra.
    """
    scheduler = require("diffusers", "wan", "sampler: unipc").UniPCMultistepScheduler(
        prediction_type="sample", use_flow_sigmas=True
    )
    scheduler.set_timesteps(sigmas=np.asarray(levels))
    scheduler.set_begin_index(0)

    def step(i: int, x: Tensor, clean: Tensor) -> Tensor:
        advanced: Tensor = scheduler.step(clean, scheduler.timesteps[i], x, return_dict=False)[0]
        return advanced

    return step


SAMPLERS = {"renoise": renoise, "euler": euler, "unipc": unipc}
