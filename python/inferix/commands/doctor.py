"""`inferix doctor`: what this machine can run, and what to do about what it can't."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferix_kernels._install import DISTRIBUTION, DRIVER, explained, install

from .configs import DoctorConfig
from .options import configured

Found = tuple[bool, str]  # well or not, and what was found


def _python() -> Found:
    return True, f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"


def _names() -> Found:
    """PyPI's `inferix` is another project: it would lie over ours, or in front of it."""
    inferix = importlib.import_module("inferix")  # whichever package of that name there is
    foreign = [
        f"{found.version} in {found.locate_file('')}"
        for found in importlib.metadata.distributions(name="inferix")
        if "inferix_kernels" not in (found.read_text("top_level.txt") or "").split()  # ours, by its earlier name
    ]
    if foreign:
        remedy = f"pip uninstall inferix, then install {DISTRIBUTION} again"
        return False, f"another project's distribution `inferix` is installed ({', '.join(foreign)}): {remedy}"
    loaded = str(inferix.__file__)
    if Path(loaded).parent != Path(__file__).parents[1] or "World" not in getattr(inferix, "__all__", ()):
        return False, f"the package inferix is another project's: {loaded}; install {DISTRIBUTION} again"
    return True, f"inferix and inferix_kernels are of {DISTRIBUTION}, in {os.path.dirname(loaded)}"


def _torch() -> Found:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return True, f"{torch.__version__}, {torch.get_num_threads()} threads, {gpu}"


def _extension() -> Found:
    try:
        extension = importlib.import_module("inferix_kernels._C")
    except ImportError as error:
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        hint = "run `make build`" if compiler else "install a C++ compiler (g++), then run `make build`"
        return False, f"not built ({error}); the reference would run instead, slowly: {hint}"
    return True, "built, C++ and CUDA" if extension.has_cuda else "built, C++ only (no nvcc was found)"


def _attention() -> Found:
    import torch

    from inferix_kernels import chosen
    from inferix_kernels.layout import scratch_format

    on = chosen.target("cuda" if torch.cuda.is_available() else "cpu")
    choice = chosen.attention(("int8", scratch_format(on.kind)), on)
    if not choice.backend:
        return False, f"none runs on {on.name}: {'; '.join(choice.reasons)}"
    return True, "; ".join([f"a world on {on.name} uses {choice.backend}", *choice.reasons])


def _driver() -> Found:
    missing = [name for name in DRIVER if importlib.util.find_spec(name) is None]
    if missing:
        return False, f"no {' and no '.join(missing)}, which worlds and videos need: {install('driver')}"
    return True, f"{', '.join(DRIVER[:-1])} and {DRIVER[-1]} found"


def _video() -> Found:
    import av

    has = "libx264" in av.codecs_available
    return has, f"PyAV {av.__version__}, " + ("H.264" if has else "without libx264: MP4 cannot be written")


def _tiny() -> Found:
    from ..models import load_model

    try:
        load_model("tiny")
    except ValueError as error:
        return False, str(error)
    return True, "weights found"


def _wan() -> Found:
    missing = [name for name in ("diffusers", "transformers", "ftfy") if importlib.util.find_spec(name) is None]
    if missing:
        return True, f"no {' and no '.join(missing)}, which prompts and pictures of Wan models need: extra `wan`"
    return True, "diffusers, transformers and ftfy found"


def _magi() -> Found:
    wanted = ("diffusers", "transformers", "ftfy", "bs4", "zstandard")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        return True, f"no {' and no '.join(missing)}, which captions and compressed shards need: extra `magi`"
    return True, f"{', '.join(wanted[:-1])} and {wanted[-1]} found"


def _stream() -> Found:
    missing = [name for name in ("aiohttp", "aiortc", "jsonschema") if importlib.util.find_spec(name) is None]
    if missing:
        return True, f"no {' and no '.join(missing)}, which `inferix play` needs for its page: extra `stream`"
    return True, "aiohttp, aiortc and jsonschema found"


CHECKS: dict[str, Callable[[], Found]] = {
    "python": _python,
    "packages": _names,
    "torch": _torch,
    "inferix_kernels._C": _extension,
    "attention kernel": _attention,
    "worlds": _driver,
    "video": _video,
    "tiny world": _tiny,
    "Wan models": _wan,
    "MAGI-1": _magi,
    "live page": _stream,
}


@dataclass(frozen=True)
class Finding:
    """What one look gave: `good`, or what to do about it in `text`."""

    name: str
    good: bool
    text: str


def doctor(config: DoctorConfig | None = None, /, **options: Any) -> list[Finding]:
    """What this machine can run, and what to do about what it can't.

    Args:
        config: what to look at; without one, all of this machine.
        options: fields of DoctorConfig, in place of those of `config`. `device`: by `kv` format, the kernel that a
            world's attention would use there, and why. `prove`: one finding on the kernels of this GPU (or of
            `device`), each of which is tried, which takes a minute, prints, and stores what came out.

    Raises:
        ValueError: there is no such device.

    Example:
        >>> for found in inferix.doctor(device="H200"):
        ...     print(found.name, "well" if found.good else found.text)
        kv fp32 ...
        kv fp16 ...
        kv bf16 ...
        kv int8 ...
        kv i8f8 ...
        kv fp8 ...
        kv int4 ...
    """
    config = configured(DoctorConfig, config, options)
    if config.prove:
        code, device = _prove(config), config.device or "cuda"
        said = ("none is wrong", "one is wrong", "nothing is proved or kept")[code]
        return [Finding(f"kernels of {device}", code == 0, said)]
    if config.device:
        return _kernels(config.device)
    return [_examine(name, check) for name, check in CHECKS.items()]


def run(config: DoctorConfig) -> int:
    """Print one line per finding; 0 if everything is well."""
    if config.prove:
        return _prove(config)
    if config.device:
        from inferix_kernels import chosen

        print(chosen.table(chosen.target(config.device)))
        return 0
    findings = []
    for name, check in CHECKS.items():
        findings.append(found := _examine(name, check))
        print(f"{'ok ' if found.good else '!! '} {name}: {found.text}")
    print("\nkernels: python -m inferix_kernels · of a world elsewhere: --device H200 · tried on this GPU: --prove")
    return 0 if all(found.good for found in findings) else 1


def _examine(name: str, check: Callable[[], Found]) -> Finding:
    try:
        return Finding(name, *check())
    except ImportError as error:
        return Finding(name, False, f"{explained(error)}; from source: `make build`")


def _kernels(device: str) -> list[Finding]:
    from inferix_kernels import chosen
    from inferix_kernels.layout import KV_FORMATS, scratch_format

    on = chosen.target(device)
    choices = {format: chosen.attention((format, scratch_format(on.kind)), on) for format in KV_FORMATS}
    return [
        Finding(f"kv {format}", bool(choice.backend), "; ".join([choice.backend or "none", *choice.reasons]))
        for format, choice in choices.items()
    ]


def _prove(config: DoctorConfig) -> int:
    from inferix_kernels.proofs import prove

    return prove.command(config.device or "cuda")
