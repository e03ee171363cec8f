"""These kernels as a folder that Hugging Face's `kernels` loads, and through it diffusers, as its backend flash_4_hub:

    python -m inferix_kernels.integrations.hf_kernel export DIR
    HF_HUB_OFFLINE=1 LOCAL_KERNELS=kernels-community/flash-attn4=DIR python your_script.py

and in the script `transformer.set_attention_backend("flash_4_hub")`. The folder holds a copy of inferix_kernels and
needs only torch and numpy, and Triton on a GPU. A process may use both it and the package. Read against kernels 0.17.2
and diffusers 0.42.1, which passes on bfloat16 and float16 alone, on a CPU too.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from ..files import atomic_write, unwritable
from . import flash_attn_interface

NAME, VERSION, LICENSE = "inferix-flash-attn", 1, "Apache-2.0"
ROOT = Path(__file__).parents[1]
COPIED = ("*.py", "*.json", "py.typed")
# Variant -> the line of its __init__.py that fails at once where its kernels cannot run. torch-cpu holds the extension,
# which is built for one version of Python: without it the reference would be at work, a hundred times slower.
VARIANTS = {
    "cpu": "from .inferix_kernels import compiled as compiled",
    "cuda": "from .inferix_kernels import triton_kernels as triton_kernels",
}
INIT = '''"""Attention of inferix_kernels with the signature of FlashAttention 4. Made by its hf_kernel.py."""

{needed}
from .inferix_kernels.integrations.hf_kernel import flash_attn_func

__all__ = ["flash_attn_func"]
'''


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (None, None),
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """FlashAttention 4's (flash_attn.cute), as diffusers calls it.

    Args:
        q: [B, Sq, Hq, D] float32, bfloat16 or float16; Hq is a multiple of H.
        k, v: [B, Sk, H, D] in q's dtype.
        softmax_scale: of q . k; D ** -0.5 by default.
        causal: the last query stands at the last key, and none sees what comes after it.
        window_size: (left, right), how many keys before and after its own a query sees; None for any number.
        softcap: scores become softcap * tanh(score / softcap); 0 leaves them.

    Returns:
        out as q, and the log-sum-exp [B, Hq, Sq] float32, natural; -inf in a row that sees no key.

    Raises:
        Unsupported: another dtype, v of another width.
        ValueError: sizes that do not fit.

    Example:
        >>> from inferix_kernels.integrations.hf_kernel import flash_attn_func
        >>> q, k = torch.randn(2, 10, 4, 64), torch.randn(2, 30, 2, 64)
        >>> out, lse = flash_attn_func(q, k, k, causal=True)
        >>> list(out.shape), list(lse.shape)
        ([2, 10, 4, 64], [2, 4, 10])
    """
    left, right = (-1 if side is None else side for side in window_size)
    out, lse = flash_attn_interface.flash_attn_func(
        q, k, v, softmax_scale, causal, window_size=(left, right), softcap=softcap, return_attn_probs=True
    )
    return out, lse


def export(path: str | os.PathLike[str]) -> Path:
    """Write the folder: build/torch-cpu and build/torch-cuda, each whole by itself.

    Of each variant metadata.json comes last: without it nothing loads the rest.

    Args:
        path: of the folder; not there yet, or empty.

    Returns:
        The folder.

    Raises:
        ValueError: the folder holds something, cannot be written, or the extension is not built.

    Example:
        >>> from inferix_kernels.integrations.hf_kernel import export
        >>> folder = export("our-flash-attn")
        >>> sorted(file.name for file in (folder / "build").iterdir())
        ['torch-cpu', 'torch-cuda']
    """
    folder, extension = Path(path), importlib.util.find_spec(".._C", __package__)
    if extension is None or extension.origin is None:
        raise ValueError("export needs the extension inferix_kernels._C, which is not built: pip install -e .")
    _check_empty(folder)
    content = {file.relative_to(ROOT): file.read_bytes() for file in (*_sources(), Path(extension.origin))}
    digest = hashlib.sha256(b"".join(content[file] for file in sorted(content))).hexdigest()
    new = not folder.exists()
    try:
        for backend, needed in VARIANTS.items():
            variant = folder / "build" / f"torch-{backend}"
            for file, data in content.items():
                _write(variant / ROOT.name / file, data, path)
            _write(variant / "__init__.py", INIT.format(needed=needed).encode(), path)
            metadata = {
                "id": f"{NAME.replace('-', '_')}_{backend}_{digest[:12]}",  # the name of its module
                "name": NAME,
                "version": VERSION,
                "license": LICENSE,
                "python-depends": [],
                "backend": {"type": backend},
            }
            _write(variant / "metadata.json", json.dumps(metadata, indent=2).encode(), path)
    except BaseException:  # of half a folder nothing stays, and it can be tried again
        shutil.rmtree(folder if new else folder / "build", ignore_errors=True)
        raise
    return folder


def _check_empty(folder: Path) -> None:
    if os.pathsep in str(folder):
        raise ValueError(f"path must be without {os.pathsep!r}, at which LOCAL_KERNELS is split, got {str(folder)!r}")
    try:
        holds = folder.is_symlink() or folder.exists()
        if holds and folder.is_dir():
            holds = any(folder.iterdir())
    except (OSError, ValueError) as error:  # a name that no file can have
        raise ValueError(f"path must be a folder that can be made, got {str(folder)!r:.80}: {error}") from None
    if holds:
        raise ValueError(f"path must be an empty folder or none yet, got {str(folder)!r}, which holds something")


def _sources() -> Iterator[Path]:
    for pattern in COPIED:
        yield from sorted(ROOT.rglob(pattern))


def _write(file: Path, data: bytes, path: str | os.PathLike[str]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None
    with atomic_write(file) as part:
        part.write_bytes(data)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m inferix_kernels.integrations.hf_kernel", description=__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser("export", help="write the folder")
    command.add_argument("path", metavar="DIR", help="not there yet, or empty")
    options = parser.parse_args(arguments)
    try:
        folder = export(options.path).resolve()
    except ValueError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    print(f"HF_HUB_OFFLINE=1 LOCAL_KERNELS={shlex.quote(f'kernels-community/flash-attn4={folder}')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
