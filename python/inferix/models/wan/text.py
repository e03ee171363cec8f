"""Prompt embeddings: UMT5 from transformers, and a cache on disk, since the encoder is five times the 1.3B network.

A prompt that has been embedded before needs neither the encoder nor transformers.
"""

from __future__ import annotations

import hashlib
import html
import os
import re
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from inferix_kernels._install import require
from inferix_kernels.files import atomic_write

from .containers import check_floating, count_layers, pretrained, read_tensors, reading, shape_of, shown

CACHE = Path("~/.cache/inferix/prompts")
SAMPLE = 1 << 20  # bytes read at either end of a file to tell it from another of the same name and size
# Wan's own file and tokenizer, and what the names in it are called in transformers.
PUBLISHED, PUBLISHED_TOKENIZER = "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl"
NAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^token_embedding\.", "shared."),
        (r"^norm\.", "encoder.final_layer_norm."),
        (r"^blocks\.(\d+)\.norm([12])\.", lambda m: f"encoder.block.{m[1]}.layer.{int(m[2]) - 1}.layer_norm."),
        (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
        (
            r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
            r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
        ),
        (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
        (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
        (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
    )
]


def clean(prompt: str) -> str:
    """Broken Unicode repaired, entities resolved, white space folded: as the models' captions were.

    Raises:
        ImportError: ftfy is not installed; names the extra.
    """
    repaired = require("ftfy", "wan", "prompt: cleaning it").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(repaired))).strip()


def has_encoder(folder: Path) -> bool:
    return (folder / "text_encoder").is_dir() or (folder / PUBLISHED).exists()


LOADING = threading.Lock()  # one at a time: transformers changes the process's default dtype while it loads


class PromptEncoder:
    """Prompt -> [tokens, text_dim] float32, padding left out. Any thread may call it.

    Args:
        folder: holds text_encoder/ and tokenizer/ (diffusers' layout) or Wan's own two.
        text_len: tokens at most; what is longer is cut.
        cache: folder for embeddings, one file per encoder, length and prompt. None: CACHE; where that can not be used,
            one line on stderr says so and nothing is kept.
    """

    clean = staticmethod(clean)

    def __init__(self, folder: Path, text_len: int, cache: str | Path | None = None):
        self.folder, self.text_len, self.cache = folder, text_len, None if cache is None else Path(cache)
        self._identity: str | None = None
        self._said = False

    def __call__(self, prompt: str) -> Tensor:
        """Raises ImportError, naming the extra, if a library is needed and missing; ValueError if files are, or if a
        cache that was asked for can't be used."""
        key, file = self.key(prompt), None
        try:
            folder = (CACHE if self.cache is None else self.cache).expanduser()
            file = folder / f"{key}.safetensors"
            if (kept := _kept(file)) is not None:
                return kept
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):  # encoding takes long: what can't be kept is said before
                raise PermissionError("it can not be written")
        except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where home is
            self._unusable(error)
            file = None
        embedding = self._encode(prompt)
        try:
            if file is not None:
                with atomic_write(file, "prompt_cache") as part:  # others may be writing the same
                    save_file({"embedding": embedding}, part)
        except (ValueError, SafetensorError) as error:
            self._unusable(error)
        return embedding

    def _unusable(self, error: Exception) -> None:
        """An error for the folder that was asked for; for the one that was not, a line, once."""
        message = (
            f"prompt_cache: cannot keep embeddings in {str(CACHE if self.cache is None else self.cache)!r} ({error})"
        )
        if self.cache is not None:
            raise ValueError(message) from None
        if not self._said:
            print(f"{message}: going on without", file=sys.stderr)
        self._said = True

    def key(self, prompt: str) -> str:
        """What an embedding depends on, hashed."""
        if self._identity is None:
            self._identity = self._fingerprint()
        return hashlib.sha256(f"{self._identity}\n{self.text_len}\n{prompt}".encode()).hexdigest()[:32]

    def _fingerprint(self) -> str:
        """Of the encoder: names and sizes of its files, and a sample of their bytes; all of 11 GB would take long."""
        digest = hashlib.sha256()
        for file in self._files():
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(SAMPLE))
                stream.seek(max(0, size - SAMPLE))
                digest.update(stream.read(SAMPLE))
        return digest.hexdigest()

    def _files(self) -> list[Path]:
        published = self.folder / PUBLISHED
        if published.exists():
            return [published]
        return sorted(file for file in (self.folder / "text_encoder").glob("*") if file.is_file())

    @torch.inference_mode()
    def _encode(self, prompt: str) -> Tensor:
        with LOADING:
            tokenizer, encoder = self._load()
        with reading(self.folder, "that of a text encoder"):  # settings that were read may still make no sense
            tokens = tokenizer(
                [self.clean(prompt)],
                max_length=self.text_len,
                truncation=True,
                add_special_tokens=True,
                return_tensors="pt",
            )
            hidden: Tensor = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]
        return hidden.float().contiguous()

    def _load(self) -> tuple[Any, Any]:
        """Tokenizer and encoder; not kept, since a prompt is encoded once and the network needs the memory."""
        transformers = require("transformers", "wan", "prompt: encoding it")
        if (self.folder / PUBLISHED).exists():
            tokenizer, encoder = self.folder / PUBLISHED_TOKENIZER, published_encoder(self.folder / PUBLISHED)
        else:
            tokenizer = self.folder / "tokenizer"
            encoder = pretrained(
                transformers.UMT5EncoderModel, self.folder / "text_encoder", "a text encoder", dtype="auto"
            )
        if not tokenizer.is_dir():
            raise ValueError(
                f"weights: {self.folder} has a text encoder but no tokenizer: there is no folder {tokenizer}"
            )
        return read_tokenizer(transformers, tokenizer), encoder.eval()


def read_tokenizer(transformers: Any, folder: Path) -> Any:
    with reading(folder, "a tokenizer that transformers can read"):
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _kept(file: Path) -> Tensor | None:
    """The embedding in a file of the cache; None: there is none, or it is damaged and to be made again."""
    try:
        embedding = load_file(file)["embedding"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
    return embedding if embedding.ndim == 2 and embedding.dtype == torch.float32 else None


def published_encoder(path: Path) -> Any:
    """transformers' encoder from the file that Wan published; its sizes are those of the tensors."""
    import transformers

    tensors, _ = read_tensors(path)
    source = str(path)

    def shape(name: str) -> torch.Size:
        return shape_of(tensors, name, (2,), source, "UMT5 encoder")

    with reading(path, "a UMT5 encoder"):
        vocabulary, width = shape("token_embedding.weight")
        buckets, heads = shape("blocks.0.pos_embedding.embedding.weight")
        config = transformers.UMT5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=shape("blocks.0.attn.q.weight")[0] // heads,
            d_ff=shape("blocks.0.ffn.fc1.weight")[0],
            num_layers=count_layers(tensors, "blocks.", source),
            num_heads=heads,
            relative_attention_num_buckets=buckets,
        )
        check_floating(tensors, tensors, source)
        return _filled_encoder(transformers, config, tensors, source)


def _filled_encoder(transformers: Any, config: Any, tensors: Mapping[str, Tensor], source: str) -> Any:
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in NAMES:
            name = pattern.sub(replacement, name)
        renamed[name] = tensor
    with torch.device("meta"):
        encoder = transformers.UMT5EncoderModel(config)
    tied = {"encoder.embed_tokens.weight": renamed.get("shared.weight")}  # one matrix under two names
    missing = sorted(encoder.state_dict().keys() - renamed.keys() - tied.keys())
    unexpected = sorted(renamed.keys() - encoder.state_dict().keys())
    if missing or unexpected:
        raise ValueError(
            f"weights: {source} is no UMT5 encoder: missing {shown(missing)}, unexpected {shown(unexpected)}"
        )
    state = {name: tensor for name, tensor in (renamed | tied).items() if name in encoder.state_dict()}
    encoder.load_state_dict(state, assign=True)
    return encoder
