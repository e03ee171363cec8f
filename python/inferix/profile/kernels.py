"""Some blocks under torch.profiler, which sees every operation and kernel, and slows them down while it looks."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inferix_kernels import profile
from inferix_kernels.files import atomic_write


class _Annotated(profile.Span):
    """A span that torch.profiler shows as well."""

    __slots__ = ("shown",)

    def __enter__(self) -> Any:  # type: ignore[override]
        import torch

        self.shown = torch.profiler.record_function(self.name)
        self.shown.__enter__()
        self.begin(profile._track().ring, on_gpu=True)
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.shown.__exit__(*(error or (None, None, None)))


class _Look:
    """A hook that begins after the next block and ends itself `blocks` later."""

    __name__ = "torch.profiler"

    def __init__(self, blocks: int, folder: Path):
        self.left, self.folder = blocks, folder
        self.running: Any = None
        self.end = profile.on_block(self)

    def __call__(self, row: profile.Row) -> None:
        import torch

        if self.running is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.running = torch.profiler.profile(activities=activities)
            profile._annotate(_Annotated)
            self.running.start()
            return
        self.left -= 1
        if not self.left:
            self.finish()

    def finish(self) -> None:
        """It has seen enough."""
        self.end()
        if self.running is None or self.left < 0:  # it never began, or has ended
            return
        self.left = -1
        profile._annotate(None)
        self.running.stop()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.folder / "kernels.json", "profile") as part:
                named = part.with_suffix(".json")  # torch writes to no other name
                with contextlib.suppress(FileNotFoundError):
                    self.running.export_chrome_trace(str(named))
                    shutil.move(named, part)
        except (OSError, ValueError) as error:
            print(f"inferix: {error}: what torch.profiler saw is lost", file=sys.stderr)


def kernels(blocks: int, folder: str | Path) -> Callable[[], None]:
    """Have the blocks after the next one recorded by torch.profiler: every operation, and every kernel of a GPU.

    The trace, folder/kernels.json, opens in Perfetto; spans are shown in it at level "layer". Something has to be
    recording, as blocks are counted by their rows; the blocks looked at are slower than others.

    Returns:
        What ends it before.

    Raises:
        ValueError: blocks is not a positive number.

    Example:
        >>> from inferix import profile
        >>> from pathlib import Path
        >>> with profile.profiling("layer"):
        ...     end = profile.kernels(1, "looked-at")
        ...     for _ in range(3):
        ...         with profile.block():
        ...             x = torch.ones(8).sum()
        >>> Path("looked-at/kernels.json").exists()
        True
    """
    if blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {blocks}")
    return _Look(blocks, Path(folder)).finish
