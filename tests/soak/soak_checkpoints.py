"""Damaged checkpoints, indices and LoRAs by the thousand: each is a ValueError of one line, or loaded right.

    python -m tests.soak.soak_checkpoints --times 2000 --seed 0

A case takes one of a few small files that are whole (a Wan network as a pickle of both formats, as safetensors, as
shards with one compressed, converted; a LoRA with its settings; MAGI-1's shards, in 8 bits too; a tiny world), damages
a copy and loads it. Damage is bytes changed, cut off or added, and fields of headers, indices and settings replaced by
what does not belong there; among it are names that lead out of the folder, where a whole checkpoint lies as bait. What
loads is compared with what a reader of its own, below, finds in the same files. Counted besides are open files,
mappings, temporary files, and what was read outside.
"""

import argparse
import collections
import contextlib
import faulthandler
import gc
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.soak.damage import damage

# Whole files


def wan_state(folder):
    from tests.models.wan_golden import published, random_network, tiny_config

    (folder / "config.json").write_text(json.dumps({"num_heads": 3, "text_len": 24, "eps": 1e-6}))
    return published(random_network(tiny_config(ffn=64)))


def pickle(folder):
    torch.save({"generator": {f"model.{name}": x for name, x in wan_state(folder).items()}}, folder / "m.pt")


def old_pickle(folder):
    torch.save(wan_state(folder), folder / "m.pt", _use_new_zipfile_serialization=False)


def single(folder):
    save_file(wan_state(folder), folder / "m.safetensors", {"format": "pt"})


def shards(folder):
    import zstandard
    from safetensors.torch import save

    state, where = wan_state(folder), {}
    for i in range(3):
        part = dict(sorted(state.items())[i::3])
        file = f"m-{i}.safetensors"
        where |= dict.fromkeys(part, file)
        data = save(part)
        if i == 1:
            file, data = file + ".zst", zstandard.ZstdCompressor().compress(data)
        (folder / file).write_bytes(data)
    (folder / "m.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def converted(folder):
    from inferix.models.wan.checkpoint import save_network
    from tests.models.wan_golden import random_network, tiny_config

    save_network(random_network(tiny_config(ffn=64)), folder / "m.safetensors")


def lora(folder):
    converted(folder)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, rows, columns in (("blocks.0.self_attn.q", 96, 96), ("blocks.1.ffn.0", 64, 96)):
        for side, shape in (("A", (4, columns)), ("B", (rows, 4))):
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = torch.randn(shape, generator=generator)
    tensors["base_model.model.blocks.1.ffn.2.diff_b"] = torch.ones(96)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False, "alpha_pattern": {"ffn.0": 2}}
    header = {"lora_adapter_metadata": json.dumps(settings)}
    (folder / "lora").mkdir()
    save_file(tensors, folder / "lora" / "adapter_model.safetensors", header)
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(settings))


def magi(folder):
    from tests.models.magi_folder import write_special_tokens, write_weights

    write_weights(folder)
    write_special_tokens(folder)


def magi8(folder):
    from tests.models.magi_folder import write_weights

    write_weights(folder, "magi-4.5b-distill-quant", compress=False)


def tiny(folder):
    from inferix.models.tiny.model import TinyConfig, TinyWorldModel
    from inferix.models.tiny.train import export

    torch.manual_seed(0)
    export(TinyWorldModel(TinyConfig(dim=32, layers=2, heads=2, head_dim=16, ffn=48)), folder / "t.safetensors", {})


def beside(folder):
    """What lies beside a Wan network: text encoder, tokenizer, VAE, image encoder."""
    from tests.models.wan_folder import write_encoder, write_image_encoder, write_vae

    for write in (write_encoder, write_vae, write_image_encoder):
        write(folder)


def load_wan(folder):
    from inferix.models.wan.checkpoint import find_checkpoint, load_network

    adapter = folder / "lora"
    return load_network(find_checkpoint(folder), lora=adapter if adapter.exists() else None)


def load_beside(folder):
    from inferix.models.wan.image import load_image_encoder
    from inferix.models.wan.text import PromptEncoder
    from inferix.models.wan.vae import load_vae

    text = PromptEncoder(folder, 24)
    text._encode("the fox runs")
    return torch.nn.ModuleList([text._load()[1], load_vae(folder).model, load_image_encoder(folder).model])


def load_magi(name):
    def load(folder):
        from inferix.models.magi.captions import load_captions
        from inferix.models.magi.checkpoint import find_weights, load_network

        load_captions(folder, None)
        return load_network(find_weights(folder, name), name, fp8="dequantize")

    return load


def load_tiny(folder):
    from inferix.models.tiny import load

    return load(folder / "t.safetensors").network


LOADERS = dict.fromkeys((pickle, old_pickle, single, shards, converted, lora), load_wan)
LOADERS |= {
    beside: load_beside,
    magi: load_magi("magi-4.5b"),
    magi8: load_magi("magi-4.5b-distill-quant"),
    tiny: load_tiny,
}


# What must hold

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def held_tensors(folder):
    """What the folder's safetensors files hold, by a reader of a few lines: name -> tensor. What makes no sense is left
    out, so that it is wrong to have loaded it."""
    found = {}
    for file in folder.rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        with contextlib.suppress(Exception):
            if data[:4] == b"\x28\xb5\x2f\xfd":
                import zstandard

                data = zstandard.ZstdDecompressor().stream_reader(data).read()
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            for name, entry in header.items():
                with contextlib.suppress(Exception):
                    (start, end), shape = entry["data_offsets"], entry["shape"]
                    part = data[8 + length + start : 8 + length + end]
                    found[name] = torch.frombuffer(bytearray(part), dtype=DTYPES[entry["dtype"]]).view(shape)
    return found


def wrong(network, folder, whole):
    """The first thing that is not as the files have it, or None."""
    state = network.state_dict()
    sizes = {name: tuple(x.shape) for name, x in whole.state_dict().items()}
    if {name: tuple(x.shape) for name, x in state.items()} != sizes:
        return "other sizes"
    held = held_tensors(folder)
    targets = [
        re.sub(r"\.[qkv]$", ".qkv", m[1])
        for name in held
        if (m := re.match(r"base_model\.model\.(.*?)\.(lora|diff)", name))
    ]
    for name, x in state.items():
        parts = [name] if name in held else [name.replace(".qkv.", f".{letter}.") for letter in "qkv"]
        if x.is_meta or not x.is_floating_point():
            return f"{name} is {x.dtype} on {x.device}"
        if (
            (folder / "m.pt").exists()
            or (folder / "vae").exists()
            or any(name.startswith(target) for target in targets)
        ):
            continue  # there is no second reader; what LoRAs add is tested elsewhere
        if not all(part in held for part in parts):
            return f"{name} is in no file"
        if any(held[part].dtype in (torch.float8_e4m3fn, torch.float8_e5m2) for part in parts):
            continue  # multiplied by scales
        expected, got = torch.cat([held[part].double() for part in parts]), x.double()
        if expected.shape != x.shape or not ((expected == got) | (expected.isnan() & got.isnan())).all():
            return f"{name} has other numbers"
    return None


class Watch:
    """A context: files that are opened in it and lie where none should be read."""

    def __init__(self):
        self.on, self.outside = False, []
        sys.addaudithook(self._opened)  # which is for ever

    def __enter__(self):
        from inferix.models.wan import containers

        def watched(path, *args, **options):  # it opens files without Python
            self._opened("open", (path,))
            return self.safe_open(path, *args, **options)

        self.safe_open, containers.safe_open, self.on = containers.safe_open, watched, True
        return self

    def __exit__(self, *_):
        from inferix.models.wan import containers

        containers.safe_open, self.on = self.safe_open, False

    def _opened(self, event, args):
        if event == "open" and self.on and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(args[0]))
            if path in ("/etc/passwd", "/dev/zero") or os.path.basename(path).startswith("bait"):
                self.outside.append(path)


def things(top):
    """Open descriptors, and mappings of files in a folder, once nothing refers to what was loaded."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    return len(os.listdir("/proc/self/fd")), sum(str(top) in line for line in maps)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def one(draw, sources, work, counts, watch):
    """One case: counts what came of it; returns what was wrong, or None."""
    write, load, source, whole = draw.choice(sources)
    folder = work / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    how = [damage(folder, draw) for _ in range(draw.choice([1, 1, 1, 2]))]
    case = f"{write.__name__}, {' and '.join(how)}"
    try:
        network = load(folder)
    except ValueError as error:
        counts["refused"] += 1
        said = str(error)
        good = said.startswith(("weights: ", "lora: ", "special tokens: ")) and "\n" not in said and len(said) < 1500
        return None if good else f"{case}: not one line that names the argument: {said[:500]!r}"
    except Exception as error:  # what is being looked for
        return f"{case}: {type(error).__name__}: {str(error)[:500]}"
    counts["loaded"] += 1
    found = wrong(network, folder, whole)
    return f"{case}: {found}" if found else None


def soak(times, seed, first=0, tell=lambda line: None):
    """Runs cases first .. first + times - 1 of a seed.

    Returns:
        {"refused": n, "loaded": n, ...} and a list of what was wrong.
    """
    counts, failures, usual = collections.Counter(), [], tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="soak") as top, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work, temporary, sources = Path(top) / "work", Path(top) / "temporary", []
        work.mkdir()
        temporary.mkdir()
        single(work)
        (work / "m.safetensors").rename(work / "bait.safetensors")  # what ../ leads to: whole, and not to be read
        (work / "config.json").unlink()
        for write, load in LOADERS.items():
            folder = Path(top) / write.__name__
            folder.mkdir()
            write(folder)
            sources.append((write, load, folder, load(folder)))
        with Watch() as watch:
            tempfile.tempdir = str(temporary)
            for i in range(first, first + times):
                tell(f"case {i}")
                if found := one(random.Random(f"{seed} {i}"), sources, work, counts, watch):
                    failures.append(f"case {i}: {found}")
                if i == first + min(50, times - 1):
                    before, memory = things(top), resident()
            tempfile.tempdir = usual
        if (after := things(top)) != before:
            failures.append(f"(descriptors, mappings): {before} at the beginning, {after} at the end")
        failures += [f"temporary file left: {left}" for left in temporary.iterdir()]
        failures += [f"read outside of its folder: {path}" for path in watch.outside]
        counts["MiB grown"] = resident() - memory
    return counts, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="begin with this case: to see one again")
    args = parser.parse_args()
    faulthandler.enable()
    started = time.monotonic()
    last = sys.stderr.isatty()
    counts, failures = soak(
        args.times, args.seed, args.first, lambda x: print(x, end="\r", file=sys.stderr) if last else None
    )
    for failure in failures:
        print(failure)
    told = ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))
    print(
        f"{args.times} cases of seed {args.seed}: {told}; {len(failures)} failures; {time.monotonic() - started:.0f} s"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
