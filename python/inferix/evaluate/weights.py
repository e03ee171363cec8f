"""The weight files of the published metrics: which there are, where they come from, whether a file is the right one.

Nothing is ever downloaded: the files are the user's, in one folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class WeightFile:
    """A published file of weights.

    Attributes:
        name: of the file.
        holds: the network, in words.
        source: where its authors publish it.
        size: in bytes, or None where no source that we could read states it.
        sha256: of its bytes, likewise.
    """

    name: str
    holds: str
    source: str
    size: int | None = None
    sha256: str | None = None

    def facts(self) -> str:
        """All that is known of it, on one line."""
        size = f"{self.size:,} bytes" if self.size else "size not published"
        return f"{self.holds}; {size}; sha256 {self.sha256 or 'not published'}; from {self.source}"


_FILES = (
    WeightFile(
        "musiq_spaq_ckpt-358bb6af.pth",
        "MUSIQ trained on SPAQ",
        "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
        sha256="358bb6af275e28ea56821d44fb55c6cb83645db11f394d3ad65b2d149965ab50",
    ),
    WeightFile("amt-s.pth", "AMT-S", "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth"),
    WeightFile(
        "ViT-L-14.pt",
        "CLIP ViT-L/14",
        "https://openaipublic.azureedge.net/clip/models/"
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
        sha256="b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    ),
    WeightFile(
        "sa_0_4_vit_l_14_linear.pth",
        "LAION's aesthetic head for CLIP ViT-L/14",
        "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
        size=4071,
        sha256="2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
    ),
    WeightFile(
        "ViT-B-32.pt",
        "CLIP ViT-B/32",
        "https://openaipublic.azureedge.net/clip/models/"
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        sha256="40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    ),
    WeightFile(
        "dino_vitbase16_pretrain.pth",
        "DINO ViT-B/16, the backbone alone",
        "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    ),
)

FILES: dict[str, WeightFile] = {file.name: file for file in _FILES}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


class WeightsDir:
    """The user's folder of weight files: what metrics take their weights from, and the networks that hold them.

    Args:
        folder: where the files lie; None: there are none.
        verify: refuse a file whose SHA-256 is not the published one, where one is published.
        device: where the networks are to compute, as torch names it.

    Attributes:
        read: SHA-256 of every file that was asked for, by name: for the report.

    Example:
        >>> try:
        ...     WeightsDir(None).path("ViT-B-32.pt")
        ... except ValueError as error:
        ...     print(str(error)[:62])
        ViT-B-32.pt must lie in the folder of weights, which is not gi
    """

    def __init__(self, folder: str | Path | None, verify: bool = True, device: str = "cpu") -> None:
        self.folder = None if folder is None else Path(folder)
        self.device = device
        self.verify = verify
        self.read: dict[str, str] = {}
        self._loaded: dict[str, Any] = {}
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"--weights-dir must be a folder, got {self.folder}")

    def path(self, name: str) -> Path:
        """The file of this name, which is there and is the published one.

        Raises:
            ValueError: one line with the file's contents, size, SHA-256 and source: it is missing, or another one.
        """
        if name not in FILES:
            raise ValueError(f"name must be one of {', '.join(FILES)}, got {name!r}")
        file = FILES[name]
        if self.folder is None:
            raise ValueError(
                f"{name} must lie in the folder of weights, which is not given (--weights-dir): {file.facts()}"
            )
        path = self.folder / name
        if name in self.read:
            return path
        if not path.is_file():
            raise ValueError(f"{name} must lie in {self.folder} (--weights-dir) and does not: {file.facts()}")
        found = sha256(path)
        if self.verify and file.sha256 not in (None, found):
            size = path.stat().st_size
            raise ValueError(
                f"{path} must be {name} as published, got {size:,} bytes of sha256 {found}: {file.facts()}"
            )
        self.read[name] = found
        return path

    def loaded(self, name: str, load: Callable[[Path], Any]) -> Any:
        """What `load` makes of the file of this name: made once, and kept until `release`."""
        if name not in self._loaded:
            self._loaded[name] = load(self.path(name))
        return self._loaded[name]

    def release(self) -> None:
        """Forget what was loaded."""
        self._loaded.clear()


def table() -> list[tuple[str, str, str, str, str]]:
    """Every file: its name, what it holds, its size in bytes, its SHA-256, and where it comes from."""
    return [
        (file.name, file.holds, f"{file.size:,}" if file.size else "", file.sha256 or "", file.source)
        for file in _FILES
    ]
