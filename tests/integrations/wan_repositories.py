"""Wan-family repositories, as they were checked out, at the size of their recordings, on a CPU.

Their modules are imported from their files, without the packages' own __init__ and without what a CPU has no use for
(text encoders, VAEs, tools that ask for a GPU). Where they call flash-attn, dense softmax stands in, as it did when the
recordings were made; all else is their code.
"""

import contextlib
import importlib
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open

GOLDEN = Path(__file__).parents[1] / "models/golden"


class Layout(NamedTuple):
    """Where a repository keeps what is needed."""

    folder: str  # in DIR of --reference DIR
    attention: str  # modules
    wrapper: str
    wrapper_class: str
    pipeline: str
    pipeline_class: str
    absent: tuple[str, ...]


def _wan(folder, pipeline="causal_inference", kind="CausalInferencePipeline"):
    absent = "wan.modules.t5 wan.modules.vae wan.modules.tokenizers utils.memory demo_utils.memory"
    absent += " wan.modules.causal_model_infinity einops"
    return Layout(
        *(folder, "wan.modules.causal_model", "utils.wan_wrapper", "WanDiffusionWrapper"),
        *(f"pipeline.{pipeline}", kind, tuple(absent.split())),
    )


REPOSITORIES = {
    "Self-Forcing": _wan("Self-Forcing"),
    "Causal-Forcing": _wan("Causal-Forcing"),
    "LongLive-v1": _wan("LongLive-v1", "interactive_causal_inference", "InteractiveCausalInferencePipeline"),
    "CausVid": Layout(
        *("CausVid", "causvid.models.wan.causal_model", "causvid.models.wan.wan_wrapper", "CausalWanDiffusionWrapper"),
        *("causvid.models.wan.causal_inference", "InferencePipeline"),
        (*(f"causvid.models.wan.wan_base.modules.{name}" for name in ("t5", "vae", "tokenizers")), "einops"),
    ),
}


class Absent(types.ModuleType):
    """Whatever is imported from it is there, and does nothing."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda x=None, *args, **kwargs: x


@contextlib.contextmanager
def imported(layout, root):
    """A function that imports a repository's modules by name. Afterwards they are unknown again."""
    folder = Path(root) / layout.folder
    tops = {name.split(".")[0] for name in (layout.attention, layout.wrapper, layout.pipeline, *layout.absent)}
    before = dict(sys.modules)

    def forget():
        for name in list(sys.modules):
            if name.split(".")[0] in tops:
                del sys.modules[name]

    forget()
    try:
        for path in folder.rglob("*.py"):
            name = ".".join(path.relative_to(folder).parent.parts)
            if name and name.split(".")[0] in tops and name not in sys.modules:
                package = types.ModuleType(name)
                package.__path__ = [str(path.parent)]
                sys.modules[name] = package
        for name in layout.absent:
            sys.modules[name] = Absent(name)
            sys.modules.setdefault(name.split(".")[0], Absent(name.split(".")[0]))
        if "causvid" in tops:  # whose package says which classes there are
            sys.modules["causvid.models"].__dict__.update(
                dict.fromkeys(("get_diffusion_wrapper", "get_text_encoder_wrapper", "get_vae_wrapper"))
            )
        yield importlib.import_module
    finally:
        forget()
        sys.modules.update({name: module for name, module in before.items() if name.split(".")[0] in tops})


def dense(q, k, v, *args, **kwargs):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Recording(NamedTuple):
    config: dict  # of the file's metadata: config and pipeline, read
    tensors: dict


def recording(name, root):
    """From tests/models/golden or DIR/golden; None: neither has it."""
    for folder in (GOLDEN, Path(root) / "golden"):
        if (folder / f"{name}.safetensors").exists():
            with safe_open(folder / f"{name}.safetensors", "pt") as file:
                said = file.metadata()
                config = {key: json.loads(said[key]) for key in ("config", "pipeline") if key in said}
                return Recording(config, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118, no dict
    return None


class Repository:
    """One repository's pipeline over a model of the recorded size. `draws`: what torch.randn_like gives, in order."""

    def __init__(self, layout, load, weights, shift, size, window=-1, sink=0):
        self.layout, self.size = layout, size
        self.module = load(layout.attention)
        self.attentions = [m for m in map(sys.modules.get, list(sys.modules)) if hasattr(m, "flash_attention")]
        options = {} if "CausVid" in layout.folder else {"local_attn_size": window, "sink_size": sink}
        self.model = tiny_model(self.module, **options)
        state = {name.removeprefix("model."): x for name, x in weights.items() if name.startswith("model.")}
        self.model.load_state_dict(state)
        wrapper = load(layout.wrapper)
        kind = getattr(wrapper, layout.wrapper_class)
        self.wrapper = kind.__new__(kind)
        torch.nn.Module.__init__(self.wrapper)
        self.wrapper.model, self.wrapper.uniform_timestep, self.wrapper.seq_len = self.model, False, 32760
        self.wrapper.scheduler = wrapper.FlowMatchScheduler(shift=shift, sigma_min=0.0, extra_one_step=True)
        self.wrapper.scheduler.set_timesteps(1000, training=True)
        self.wrapper.post_init()
        self.pipelines = load(layout.pipeline)

    def pipeline(self, steps, block, prompts, window=-1, warp=True, **more):
        args = SimpleNamespace(
            **{"denoising_step_list": steps, "warp_denoising_step": warp, "num_frame_per_block": block},
            **{"independent_first_frame": False, "context_noise": 0, "model_name": "", **more},
            model_kwargs=SimpleNamespace(local_attn_size=window),
        )
        text, vae = (lambda text_prompts: {"prompt_embeds": prompts[text_prompts[0]]}), Decoded()
        parts = {"generator": self.wrapper, "text_encoder": text, "vae": vae}
        kind = getattr(self.pipelines, self.layout.pipeline_class)
        if "CausVid" in self.layout.folder:
            for part, name in (("generator", "diffusion"), ("text_encoder", "text_encoder"), ("vae", "vae")):
                setattr(self.pipelines, f"get_{name}_wrapper", lambda model_name, part=part: lambda: parts[part])
            made = kind(args, "cpu")
        else:
            made = kind(args, "cpu", **parts)
        made.num_transformer_blocks, made.frame_seq_length = 2, self.size
        return made


def tiny_model(module, **options):
    """Of the recordings' size, with random weights; its head's are not zero, as they were when training began."""
    torch.manual_seed(0)
    sizes = {"dim": 96, "ffn_dim": 160, "freq_dim": 64, "text_dim": 40, "text_len": 24}
    sizes |= {"num_heads": 3, "num_layers": 2, "in_dim": 16, "out_dim": 16}
    with contextlib.redirect_stdout(None):
        model = module.CausalWanModel(**sizes, **options)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model.eval().requires_grad_(False)


class Decoded:
    def decode_to_pixel(self, latents, use_cache=False):
        return latents


def dense_caches(pipeline, slots, ends=True):
    """What the pipeline's own _initialize_kv_cache makes, whose 12 heads of 128 are written into its code."""

    def make(batch_size, dtype, device, kv_cache_size_override=None):
        size = (batch_size, kv_cache_size_override or slots, 3, 32)
        pipeline.kv_cache1 = [{side: torch.zeros(size, dtype=dtype) for side in "kv"} for _ in range(2)]
        for cache in pipeline.kv_cache1 if ends else []:
            cache |= {name: torch.tensor([0]) for name in ("global_end_index", "local_end_index")}

    pipeline._initialize_kv_cache = make
