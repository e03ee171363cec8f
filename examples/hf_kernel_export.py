"""Our attention as a kernel of the Hugging Face hub, from a folder: `python examples/hf_kernel_export.py`.

The folder holds all that it needs, and inferix_kernels need not be installed where it is used. It is loaded here as
`kernels` loads it, by that library if it is installed, and compared with torch's attention. Stock diffusers takes the
folder as its backend flash_4_hub; the last lines say how.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

from inferix_kernels.integrations.hf_kernel import export


def load(folder: Path) -> ModuleType:
    if importlib.util.find_spec("kernels") is not None:
        from kernels import get_local_kernel

        return get_local_kernel(folder, backend="cpu")
    variant = folder / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.inference_mode()
def main() -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = export(Path(parent) / "inferix-flash-attn")
        files = [file for file in folder.rglob("*") if file.is_file()]
        print(f"{len(files)} files, {sum(file.stat().st_size for file in files):,} bytes")
        kernel = load(folder)
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 2, 300, 4, 64).bfloat16()
        for causal in (False, True):
            out, _ = kernel.flash_attn_func(q=q, k=k, v=v, causal=causal)
            wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)
            difference, largest = (out - wanted.transpose(1, 2)).abs().max(), out.abs().max()
            print(f"{'causal' if causal else 'full':>6}: {difference:.1e} from torch's, of numbers up to {largest:.1f}")
    print("export: python -m inferix_kernels.integrations.hf_kernel export DIR")
    print("use:    HF_HUB_OFFLINE=1 LOCAL_KERNELS=kernels-community/flash-attn4=DIR python your_script.py")
    print('        with transformer.set_attention_backend("flash_4_hub")')


if __name__ == "__main__":
    main()
