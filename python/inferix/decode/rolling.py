"""A window of blocks that are denoised together, each at a noise level of its own and seeing all the others.

    step 0    1    2    3    4    5
      b0 ▁ ←→ ▂ ←→ ▄ ←→ ▆ ←→ █ commit          ▁ noise … █ clean; ←→ see each other, in both directions
           b1 ▁ ←→ ▂ ←→ ▄ ←→ ▆ ←→ █ commit
                b2 ▁ ←→ ▂ ←→ ▄ ←→ ▆ ←→ …

The blocks in flight share one list of frames: the sink, and the window counted back from the newest of them. A clean
pass sees the window before its own block, none of those in flight, and the sink only where the window reaches it.

Source: arXiv:2509.25161 and github.com/TencentARC/RollingForcing (a1477d0), pipeline/rolling_forcing_inference.py and
the cache in wan/modules/causal_model.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from .contract import Adapter, Forward, Segment
from .samplers import SAMPLERS


@dataclasses.dataclass(frozen=True)
class RollingSchedule:
    """A schedule, as `inferix.decode.pipeline` runs it, of an adapter's noise levels.

    Raises:
        ValueError: the adapter's stages, window, guidance or sampler are not such a model's.

    Example:
        >>> adapter = Adapter("rolling", block_frames=3, times=(1.0, 0.5), stages=2, window=12, sink=3)
        >>> (forward,) = RollingSchedule(adapter).forwards([(7, 1), (8, 0)], clean=None)
        >>> [(each.block, each.t, each.lookback, each.lookahead) for each in forward.segments]
        [(7, 0.5, 2, 1), (8, 1.0, 3, 0)]
    """

    adapter: Adapter
    partly_given: ClassVar[bool] = False

    def __post_init__(self) -> None:
        adapter, steps = self.adapter, len(self.adapter.times)
        if adapter.stages < 1 or steps % adapter.stages:
            raise ValueError(f"stages must divide the {steps} steps of {adapter.name}, got {adapter.stages}")
        least = adapter.stages * adapter.block_frames + adapter.sink
        if adapter.window is None or adapter.window < least or adapter.window % adapter.block_frames:
            raise ValueError(
                f"window must be whole blocks, the sink and {adapter.stages} blocks in flight at least, {least} "
                f"frames, got {adapter.window}"
            )
        if adapter.guidance != 1 or adapter.sampler not in ("renoise", "euler"):
            raise ValueError(
                f"sampler must be renoise or euler, without guidance, for blocks in flight, got {adapter.sampler!r} "
                f"and guidance {adapter.guidance:g}"
            )

    @property
    def stages(self) -> int:
        return self.adapter.stages

    @property
    def stage_steps(self) -> int:
        return len(self.adapter.times) // self.adapter.stages

    def forwards(self, flight: Sequence[tuple[int, int]], clean: int | None) -> list[Forward]:
        """See `Schedule`. One forward for all blocks, and the clean one before them."""
        newest = flight[-1][0]
        before = () if clean is None else self.clean_pass(clean).segments
        noisy = tuple(self._segment(block, step, newest - block) for block, step in flight)
        return [Forward((*before, *noisy), commit=clean is not None)]

    def clean_pass(self, block: int) -> Forward:
        adapter = self.adapter
        assert adapter.window is not None
        window = adapter.window // adapter.block_frames
        steps = len(adapter.times)
        return Forward((Segment(block, steps, adapter.context_time, window, weight=0.0, sink=False),), commit=True)

    def advance(self, step: int, x: Tensor, predicted: Tensor, noise: Callable[[int], Tensor]) -> Tensor:
        adapter = self.adapter
        clean = predicted if adapter.prediction == "x0" else x - adapter.times[step] * predicted
        if step + 1 == len(adapter.times):
            return clean
        return SAMPLERS[adapter.sampler](adapter.times, lambda: noise(len(x)))(step, x, clean)

    def _segment(self, block: int, step: int, later: int) -> Segment:
        """Args: later: blocks in flight that are newer."""
        adapter = self.adapter
        assert adapter.window is not None
        # The sink counts as part of the window, so that what is seen in all is no more than the window.
        reach = (adapter.window - adapter.sink) // adapter.block_frames
        t = adapter.steps(first=False)[step][1]
        return Segment(block, step, t, reach - later, lookahead=later)
