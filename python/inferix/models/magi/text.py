"""Caption embeddings: T5 v1.1 XXL from transformers, and the cache on disk that Wan's prompts have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inferix_kernels._install import require

from ..wan.containers import pretrained
from ..wan.text import PromptEncoder, read_tokenizer

# Where the encoder may lie in a model's folder: as diffusers and as MAGI-1 have it.
FOLDERS = ("text_encoder", "t5_pretrained/t5-v1_1-xxl", "t5/t5-v1_1-xxl", "t5-v1_1-xxl")


def find_encoder(folder: Path) -> Path | None:
    return next((folder / name for name in FOLDERS if (folder / name).is_dir()), None)


def clean(prompt: str) -> str:
    """As the captions were that the model learned from: lower case, no links, tags or rare signs (DeepFloyd's rules).

    Raises:
        ImportError: diffusers, ftfy or beautifulsoup4 is not installed; names the extra.
    """
    for module in ("bs4", "ftfy"):  # diffusers would go on without them, and fail
        require(module, "magi", "prompt: cleaning it")
    pipeline = require("diffusers", "magi", "prompt: cleaning it").PixArtAlphaPipeline
    for _ in range(2):  # cleaning may lay bare what is to be cleaned
        prompt = pipeline._clean_caption(pipeline, prompt)
    return prompt


class CaptionEncoder(PromptEncoder):
    """Caption -> [tokens, caption_dim] float32, padding left out.

    Args:
        folder: the one of the encoder; its tokenizer is in it, or in tokenizer/ next to it.
        text_len, cache: as for PromptEncoder.
    """

    clean = staticmethod(clean)

    def _files(self) -> list[Path]:
        return sorted(file for file in self.folder.glob("*") if file.is_file())

    def _load(self) -> tuple[Any, Any]:
        transformers = require("transformers", "magi", "prompt: encoding it")
        tokenizer = self.folder.parent / "tokenizer"
        encoder = pretrained(transformers.T5EncoderModel, self.folder, "a text encoder", dtype="auto")
        return read_tokenizer(transformers, tokenizer if tokenizer.is_dir() else self.folder), encoder.eval()
