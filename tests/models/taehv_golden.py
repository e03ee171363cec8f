"""A recorded run of TAEHV on random weights: `python -m tests.models.taehv_golden CHECKOUT` writes golden/taehv.json.

CHECKOUT is a checkout of github.com/madebyollin/taehv (made with 1f14a56). Of it only numbers are kept: the names and
shapes of its tensors, and some of what it makes of random latents and pictures.
"""

import json
import sys
from pathlib import Path

import torch

GOLDEN = Path(__file__).parent / "golden" / "taehv.json"
KEPT = 400  # numbers of a result, evenly


def fill(network):
    """The same random weights for whoever has tensors of these names; most of what is decoded is within [0, 1]."""
    for i, name in enumerate(sorted(state := network.state_dict())):
        x = state[name]
        drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        x.copy_(0.8 * drawn / x[0].numel() ** 0.5 if x.ndim > 1 else 0.1 * drawn)
    state["decoder.22.bias"].fill_(0.5)
    return network.eval().requires_grad_(False)


def latents():
    return torch.randn(3, 16, 4, 6, generator=torch.Generator().manual_seed(1))


def pictures():
    """[9, 3, 32, 48] in [0, 1]."""
    return torch.rand(9, 3, 32, 48, generator=torch.Generator().manual_seed(2))


def some(x):
    return x.float().flatten()[:: x.numel() // KEPT].tolist()


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    from taehv import TAEHV

    theirs = TAEHV(checkpoint_path=None)
    shapes = {name: list(x.shape) for name, x in theirs.state_dict().items()}
    fill(theirs)
    with torch.inference_mode():
        decoded = theirs.decode_video(latents()[None], parallel=False, show_progress_bar=False)[0]
        encoded = theirs.encode_video(pictures()[None], parallel=False, show_progress_bar=False)[0]
    record = {"shapes": shapes, "decoded": some(decoded), "encoded": some(encoded)}
    GOLDEN.write_text(json.dumps(record) + "\n")
    print(f"{GOLDEN}: {list(decoded.shape)} pictures, {list(encoded.shape)} latents")
