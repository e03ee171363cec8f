"""Prompt embeddings: UMT5 from transformers, and a cache on disk, since the encoder is five times the 1.3B network.

A prompt that has been embedded before needs neither the encoder nor transformers.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import os
import re
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .containers import read_tensors

CACHE = Path("~/.cache/inferix/prompts")
EXTRA = "install the extra `wan`: pip install 'inferix[wan]'"
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
    try:
        from ftfy import fix_text
    except ImportError:
        raise ImportError(f"prompt: cleaning it needs ftfy, which is not installed: {EXTRA}") from None
    return re.sub(r"\s+", " ", html.unescape(html.unescape(fix_text(prompt)))).strip()


def has_encoder(folder: Path) -> bool:
    return (folder / "text_encoder").is_dir() or (folder / PUBLISHED).exists()


LOADING = threading.Lock()  # one at a time: transformers changes the process's default dtype while it loads


class PromptEncoder:
    """Prompt -> [tokens, text_dim] float32, padding left out. Any thread may call it.

    Args:
        folder: holds text_encoder/ and tokenizer/ (diffusers' layout) or Wan's own two.
        text_len: tokens at most; what is longer is cut.
        cache: folder for embeddings, one file per encoder, length and prompt; None keeps none.
    """

    clean = staticmethod(clean)

    def __init__(self, folder: Path, text_len: int, cache: Path | None = CACHE):
        self.folder, self.text_len = folder, text_len
        self.cache = None if cache is None else cache.expanduser()
        self._identity: str | None = None

    def __call__(self, prompt: str) -> Tensor:
        """Raises ImportError, naming the extra, if a library is needed and missing; ValueError if files are, or if the
        cache can't be used."""
        if self.cache is None:
            return self._encode(prompt)
        file = self.cache / f"{self.key(prompt)}.safetensors"
        try:
            if file.exists():
                with contextlib.suppress(SafetensorError, KeyError):  # half written by a process that was killed
                    return load_file(file)["embedding"]
            self.cache.mkdir(parents=True, exist_ok=True)
            if not os.access(self.cache, os.W_OK):  # encoding takes long: what can't be kept is said before
                raise PermissionError("it can not be written")
        except OSError as error:
            raise self._unusable(error) from None
        embedding = self._encode(prompt)
        partial = file.with_suffix(".part")
        try:
            save_file({"embedding": embedding}, partial)
            partial.replace(file)
        except (OSError, SafetensorError) as error:
            raise self._unusable(error) from None
        return embedding

    def _unusable(self, error: Exception) -> ValueError:
        return ValueError(f"prompt_cache: cannot keep embeddings in {str(self.cache)!r} ({error})")

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
        try:
            from transformers import AutoTokenizer, UMT5EncoderModel
        except ImportError:
            raise ImportError(f"prompt: encoding it needs transformers, which is not installed: {EXTRA}") from None
        if (self.folder / PUBLISHED).exists():
            tokenizer, encoder = self.folder / PUBLISHED_TOKENIZER, published_encoder(self.folder / PUBLISHED)
        else:
            tokenizer = self.folder / "tokenizer"
            encoder = UMT5EncoderModel.from_pretrained(self.folder / "text_encoder", dtype="auto")
        if not tokenizer.is_dir():
            raise ValueError(
                f"weights: {self.folder} has a text encoder but no tokenizer: there is no folder {tokenizer}"
            )
        return AutoTokenizer.from_pretrained(tokenizer), encoder.eval()


def published_encoder(path: Path) -> Any:
    """transformers' encoder from the file that Wan published; its sizes are those of the tensors."""
    import transformers

    tensors, _ = read_tensors(path)
    try:
        heads = tensors["blocks.0.pos_embedding.embedding.weight"].shape[1]
        vocabulary, width = tensors["token_embedding.weight"].shape
        config = transformers.UMT5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=len(tensors["blocks.0.attn.q.weight"]) // heads,
            d_ff=len(tensors["blocks.0.ffn.fc1.weight"]),
            num_layers=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
            num_heads=heads,
            relative_attention_num_buckets=len(tensors["blocks.0.pos_embedding.embedding.weight"]),
        )
    except KeyError as error:
        raise ValueError(f"weights: {path} is no UMT5 encoder: it has no {error.args[0]}") from None
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
        raise ValueError(f"weights: {path} is no UMT5 encoder: missing {missing[:3]}, unexpected {unexpected[:3]}")
    state = {name: tensor for name, tensor in (renamed | tied).items() if name in encoder.state_dict()}
    encoder.load_state_dict(state, assign=True)
    return encoder
