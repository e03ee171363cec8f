"""Every option of every command, declared once: what `inferix COMMAND --help` lists and `inferix.COMMAND(...)` takes.

None as a default says that the model, or the machine, knows best; what that is stands in the help.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..stream import MAX_FILES, MAX_GB
from .options import (
    MOST_THREADS,
    NOT_EMPTY,
    POSITIVE,
    Options,
    Rule,
    at_least,
    at_most,
    between,
    comma_separated,
    option,
)

KV_FORMATS = "fp32, fp16, bf16, int8, i8f8, fp8, int4"  # written out: --help need not wait for torch
MOST_SECONDS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Which weights."""

    model: str = option("which model", "tiny")
    lora: Sequence[str] | None = option(
        "low-rank updates to merge into the weights; may be repeated (default: the *lora* file in the folder)",
        None,
        to="model",
        metavar="FILE[=STRENGTH]",
    )
    linear: str | None = option(
        "the inner linear layers in int8 or fp8, or the whole network in bf16 (default: as the checkpoint has them)",
        None,
        to="model",
        choices=("int8", "fp8", "bf16"),
    )


@dataclass(frozen=True, kw_only=True)
class PlaceOptions(ModelOptions):
    """A world of one seed, and where it runs."""

    weights: str | Path | None = option(
        "checkpoint file or its folder, for models that do not ship one", None, to="model"
    )
    vae: str | Path | None = option(
        "file of another VAE, for Wan: LightVAE, taew2_1.pth, LightTAE (default: the one beside the weights)",
        None,
        to="model",
    )
    size: tuple[int, int] | None = option("pixels of a picture (default: the model's)", None, to="model", metavar="HxW")
    seed: int = option("of all noise", 0, to="world", must=(between(0, 2**64 - 1, "from 0 to 2^64 - 1"),))
    window: int | None = option("frames a block sees, its own included (default: the model's)", None, to="world")
    sink: int | None = option("first frames that are never forgotten (default: the model's)", None, to="world")
    device: str | None = option(
        "where the network runs: cpu or cuda (default: a GPU, if there is one)", None, to="model"
    )
    backend: str = option("kernels: auto, compiled, triton or reference", "auto", to="world")
    image: str | Path | None = option(
        "picture that the video begins with, for models that take one; white where it is transparent", None
    )
    threads: int | None = option("CPU threads (default: the model's)", None, must=(between(1, MOST_THREADS),))


@dataclass(frozen=True, kw_only=True)
class WorldOptions(PlaceOptions):
    """And what its pages hold."""

    kv: str = option(f"format of the KV pages: {KV_FORMATS}", "int8", to="world")
    precision: str = option("products of attention over quantized pages: auto, exact or 8bit", "auto", to="world")
    parallel: str = option(
        "how the processes that torchrun has started share the world: auto, gather, ulysses, ring, pass-q or branches",
        "auto",
        choices=("auto", "ulysses", "gather", "ring", "pass-q", "branches"),
    )
    graphs: bool = option("on a GPU, capture the network's forwards and replay them", False, to="world")
    profile: str | Path | None = option(
        "folder for a report of where the time goes: a page, numbers, and a trace for Perfetto",
        None,
        to="server",
        metavar="DIR",
    )


@dataclass(frozen=True, kw_only=True)
class ScriptOptions(Options):
    """What is done and said where nobody is at the keys."""

    seconds: float = option("length of the video", 10.0, must=(POSITIVE, at_most(MOST_SECONDS, "about 11 days")))
    actions: str | Path = option("a file has one ACTION [FRAMES] a line", "random", metavar="FILE|random|scripted")
    prompt: str | None = option('words for the whole video, for example "desert night"', None)
    prompt_cache: str | Path | None = option(
        "folder for prompt embeddings (default: ~/.cache/inferix/prompts)", None, to="model"
    )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(WorldOptions, ScriptOptions):
    """A video of a world, and the files it is written to.

    Example:
        >>> config = inferix.GenerateConfig(prompt="desert night", seconds=0.5, kv="int4")
        >>> config.model, config.kv, config.seed
        ('tiny', 'int4', 0)
    """

    out: str | Path = option("MP4 to write; a PNG sheet and a JSON summary go next to it", "world.mp4")
    prompt_file: str | Path | None = option(
        "one SECOND PROMPT a line; a line that begins with # says nothing", None, instead_of="prompt"
    )
    steps: int | None = option("denoising steps, for models not distilled to their own", None, to="model")
    stages: int | None = option("blocks in flight, for models that run in a pipeline", None, to="model")
    guidance: float | None = option("away from the negative prompt, for models not distilled", None, to="model")
    negative_prompt: str | None = option(
        "words to be guided away from (default: none, the empty prompt)", None, to="model"
    )
    scale: int | None = option(
        "pixels of the video per pixel of the world (default: the model's)", None, must=(at_least(1),)
    )
    video: str | Path | None = option(
        "video whose start the video goes on from, as long as makes whole blocks, for models that take one",
        None,
        instead_of="image",
    )
    decoder: str | None = option(
        "who makes pictures, for models that bring no VAE", None, to="model", metavar="MODULE:NAME"
    )
    fp8: str | None = option(
        "weights that are in 8 bits (default: keep)", None, to="model", choices=("keep", "dequantize")
    )
    special_tokens: Sequence[str] | None = option(
        "rows before the caption, for models that know them", None, to="model", metavar="A,B", parse=comma_separated
    )
    profile_torch: int = option(
        "blocks that torch.profiler records as well, in the folder of `profile`", 0, must=(at_least(0),), metavar="N"
    )
    resume: bool = option("go on with the video that a kill or Ctrl-C ended", False)


@dataclass(frozen=True, kw_only=True)
class PlayConfig(WorldOptions):
    """A world that is steered, on a page or in the terminal.

    Example:
        >>> config = inferix.PlayConfig(port=8001, undo=30)
        >>> config.host, config.port, config.worlds
        ('127.0.0.1', 8001, 2)
    """

    host: str = option(
        "address to listen at; others than this machine need the token",
        "127.0.0.1",
        to="server",
        page_only=True,
    )
    port: int = option("0: any that is free", 8000, to="server", page_only=True)
    token: str | None = option(
        "what others must know to come in (default: a new one, printed)", None, to="server", page_only=True
    )
    folder: str | Path = option("for saved worlds and recordings", "inferix-worlds", to="server", page_only=True)
    max_files: int = option(
        "worlds and recordings there",
        MAX_FILES,
        to="server",
        page_only=True,
        must=(at_least(0),),
    )
    max_gb: float = option(
        "and what they take, in 10^9 bytes",
        MAX_GB,
        to="server",
        page_only=True,
        must=(at_least(0),),
    )
    push: Sequence[str] = option(
        "also to rtmp://, srt://, .m3u8, .mp4; may be repeated",
        (),
        to="server",
        page_only=True,
        metavar="URL|FILE",
        other_names=("rtmp",),
    )
    undo: float | None = option(
        "seconds that can be rewound (default: 15, or 0 if a VAE looks back)", None, page_only=True, must=(at_least(0),)
    )
    worlds: int = option("how many worlds there is room for: a fork needs 2", 2, page_only=True, must=(at_least(1),))
    terminal: bool = option("play in this terminal instead", False)


@dataclass(frozen=True, kw_only=True)
class InspectKvConfig(PlaceOptions, ScriptOptions):
    """A world to be measured, and the file that says what was found.

    Example:
        >>> config = inferix.InspectKvConfig(model="tiny", seconds=5)
        >>> config.out, config.seconds
        ('kv.json', 5.0)
    """

    out: str | Path = option("JSON to write", "kv.json")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(ModelOptions):
    """A Wan checkpoint, and the file it becomes.

    Example:
        >>> inferix.ConvertConfig(source="Wan2.1-T2V-1.3B", out="wan.safetensors").dtype
        'fp32'
    """

    model: str = option("whose weights to take if the file holds several", "self-forcing")
    source: str | Path = option("checkpoint file, or the folder that holds it", positional=True)
    out: str | Path = option(".safetensors to write", positional=True)
    dtype: str = option("of the weights", "fp32", choices=("fp32", "bf16"))


@dataclass(frozen=True, kw_only=True)
class JudgingOptions(Options):
    """By what a video is judged."""

    metrics: Sequence[str] | None = option(
        "only these, for example proxy:clarity,motion (default: all that can be had)",
        None,
        metavar="A,B",
        parse=comma_separated,
    )
    weights_dir: str | Path | None = option("folder of the weight files of real metrics", None, metavar="DIR")
    chunks: int = option("equal parts of a video, whose scores are compared", 10, must=(between(2, 1000),))
    all: bool = option("look at every frame, not at 12 from the middle of each chunk", False)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(JudgingOptions):
    """Videos to judge, and by what.

    Example:
        >>> inferix.EvaluateConfig(videos=["demo.mp4"]).chunks
        10
    """

    videos: Sequence[str] = option("video files", positional=True, must=(NOT_EMPTY,))
    out: str | Path = option("JSON to write; a page of curves goes next to it", "evaluation.json")


@dataclass(frozen=True, kw_only=True)
class EvaluatePairConfig(Options):
    """A video to compare with another, and by what.

    Example:
        >>> inferix.EvaluatePairConfig(video="int8.mp4", reference="fp32.mp4").chunks
        10
    """

    video: str | Path = option("video file", positional=True)
    reference: str | Path = option("video file that it ought to be like", positional=True)
    floor: Sequence[str] | None = option(
        "two other videos, such as two seeds, whose numbers are shown beside",
        None,
        metavar="A,B",
        parse=comma_separated,
        must=(Rule(lambda value: value is None or len(value) == 2, "two video files"),),
    )
    metrics: Sequence[str] | None = option(
        "only these of psnr,cvvdp,vmaf (default: all that are installed)", None, metavar="A,B", parse=comma_separated
    )
    chunks: int = option("equal parts of the videos", 10, must=(between(1, 1000),))
    all: bool = option("look at every frame, not at 12 from the middle of each chunk", False)
    out: str | Path = option("JSON to write", "pair.json")


@dataclass(frozen=True, kw_only=True)
class EvaluateDatasetConfig(JudgingOptions):
    """A dataset of captions to make videos of, and by what they are judged.

    Example:
        >>> inferix.EvaluateDatasetConfig(folder="InterVBench", model="self-forcing").protocol
        'segments'
    """

    folder: str | Path = option("folder with captions.jsonl; see docs/quality.md", positional=True)
    model: str | None = option("who makes the videos (default: nobody, the dataset's own are judged)", None)
    weights: str | Path | None = option("the model's checkpoint file or its folder", None, to="model")
    kv: str = option(f"format of the KV pages: {KV_FORMATS}", "int8", to="world")
    linear: str | None = option(
        "the inner linear layers in int8 or fp8, or the whole network in bf16 (default: as the checkpoint has them)",
        None,
        to="model",
        choices=("int8", "fp8", "bf16"),
    )
    seed: int = option("of all noise", 0, to="world", must=(between(0, 2**64 - 1, "from 0 to 2^64 - 1"),))
    seconds: float = option("length of each video", 60.0, must=(POSITIVE, at_most(MOST_SECONDS, "about 11 days")))
    protocol: str = option(
        "segments: each prompt from the second on at which its segment begins; first: the first one throughout",
        "segments",
        choices=("segments", "first"),
    )
    split: str | Path | None = option(
        "file of the ids to evaluate, one a line (default: test_ids.txt of the folder, or all)", None
    )
    limit: int | None = option("only so many of them, the first ones", None, must=(at_least(1),))
    jobs: int = option("videos at a time, each in a process of its own", 1, must=(between(1, MOST_THREADS),))
    out: str | Path = option("folder for videos and results; what it holds already is not made again", "dataset-out")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Options):
    """What to look at.

    Example:
        >>> inferix.DoctorConfig(device="H200").prove
        False
    """

    prove: bool = option("try every kernel on this GPU; which ones run goes by it", False)
    device: str | None = option(
        "say which kernels a world would use on it: cuda, sm_90, H200, A100, ...", None, metavar="NAME"
    )
