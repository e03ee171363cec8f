"""The networks behind the published metrics against their published implementations, under the same weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from inferix.evaluate.backbones import amt, clip, dino, musiq, pixels
from inferix.evaluate.backbones.load import filled, read
from inferix.evaluate.backbones.vit import Block

from .known_weights import fill, hashed, picture

TOLERANCE = 1e-5  # float32 over a dozen layers; outputs are of about 1


def shapes(network):
    return {name: tensor.shape for name, tensor in network.state_dict().items() if tensor.is_floating_point()}


def renamed(state, pairs, fused):
    """Tensors under other names; the q_proj, k_proj and v_proj of a layer become one matrix, called `fused`."""
    found = {}
    for name, tensor in state.items():
        for theirs, ours in pairs:
            name = name.replace(theirs, ours)
        found[name] = tensor
    for name in [name for name in found if ".q_proj." in name]:
        parts = [found.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        found[name.replace("q_proj.", fused)] = torch.cat(parts)
    return found


CLIP_NAMES = (  # of transformers, and of OpenAI's files
    ("vision_model.", "visual."),
    ("embeddings.patch_embedding", "conv1"),
    ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("pre_layrnorm", "ln_pre"),
    ("post_layernorm", "ln_post"),
    ("encoder.layers.", "transformer.resblocks."),
    ("self_attn.", "attn."),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("visual_projection.weight", "visual.proj"),
)
DINO_NAMES = (  # of transformers, and of DINO's file
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("layers.", "blocks."),
    ("attention.", "attn."),
    ("o_proj", "proj"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("layernorm.", "norm."),
)


@torch.inference_mode()
def test_clip_is_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2, image_size=224,
        patch_size=32, projection_dim=48, hidden_act="quick_gelu", layer_norm_eps=1e-5,
    )  # fmt: skip
    theirs = transformers.CLIPVisionModelWithProjection(config).eval()
    state = fill(shapes(theirs))
    theirs.load_state_dict(state, strict=False)
    state["visual_projection.weight"] = state["visual_projection.weight"].T.contiguous()
    torch.save(renamed(state, CLIP_NAMES, "in_proj_"), tmp_path / "clip.pt")
    ours = clip.load(tmp_path / "clip.pt", "a small CLIP", 128, 3, 32, 48)
    images = torch.stack([picture(224, 224), picture(224, 224).flip(0)])
    expected = theirs(images).image_embeds
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(images), expected, rtol=0, atol=TOLERANCE)


def test_clip_is_read_from_a_torchscript_archive_in_float16(tmp_path):
    class Archive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = torch.nn.Module()
            self.visual.register_parameter("proj", torch.nn.Parameter(hashed("proj", (8, 4)).half()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.save(torch.jit.trace(Archive(), torch.zeros(1)), tmp_path / "clip.pt")
    found = clip.image_half(read(tmp_path / "clip.pt", torchscript=True))
    assert torch.equal(found["proj"], hashed("proj", (8, 4)).half())


def test_a_torchscript_archive_runs_nothing_unless_it_is_asked_for(tmp_path):
    class Archive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.training = torch.nn.Parameter(torch.ones(1)), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

        @torch.jit.export
        def __getstate__(self):
            return self.weight

        @torch.jit.export
        def __setstate__(self, state: torch.Tensor) -> None:
            torch.manual_seed(4321)
            self.weight, self.training = state, False

    torch.jit.save(torch.jit.script(Archive()), tmp_path / "amt-s.pth")
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=r"amt-s.pth must be a file of weights that torch reads, got: .*TorchScript"):
        read(tmp_path / "amt-s.pth")
    assert torch.initial_seed() == 1
    read(tmp_path / "amt-s.pth", torchscript=True)
    assert torch.initial_seed() == 4321, "what the check is for: loading ran code of the file"


@torch.inference_mode()
def test_dino_is_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=3, layer_norm_eps=1e-6,
        image_size=64, patch_size=16,
    )  # fmt: skip
    theirs = transformers.ViTModel(config, add_pooling_layer=False).eval()
    state = fill(shapes(theirs))
    theirs.load_state_dict(state)
    ours = filled(lambda: dino.Dino(96, 3, 3, 16, 64), renamed(state, DINO_NAMES, "qkv."), Path("x"), "DINO")
    images = torch.stack([picture(64, 64), picture(64, 64).flip(0)])
    expected = theirs(images).last_hidden_state[:, 0]
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(images), expected, rtol=0, atol=TOLERANCE)


def test_dino_interpolates_its_positions_as_published():
    """facebookresearch/dino scales by (side + 0.1) / trained side: pinned, since a plain resize differs by 0.02."""
    network = dino.Dino(8, 0, 1, 16, 64)
    network.pos_embed.data = hashed("positions", network.pos_embed.shape)
    found = network.positions(4, 7).detach()
    grid = network.pos_embed.detach()[:, 1:].transpose(1, 2).reshape(1, 8, 4, 4)
    plain = torch.nn.functional.interpolate(grid, (4, 7), mode="bicubic").flatten(2).transpose(1, 2)
    assert found.shape == (1, 29, 8) and torch.equal(found[:, 0], network.pos_embed.detach()[:, 0])
    assert 0.005 < (found[:, 1:] - plain).abs().mean() < 0.1
    assert torch.equal(network.positions(4, 4), network.pos_embed)


def small_musiq():
    return musiq.Musiq(width=96, layers=3, heads=6, hidden=288)


def pyiqa_shapes():
    """Names and shapes of pyiqa's MUSIQ(hidden_size=96, mlp_dim=288, num_layers=3), from ours."""
    found = {}
    for name, shape in shapes(small_musiq()).items():
        for theirs, ours in (
            ("transformer_encoder.transformer.encoderblock_", "blocks."),
            (".attention.query.", ".attn.qkv."),
            (".attention.out.", ".attn.proj."),
        ):
            name = name.replace(ours, theirs)
        name = {
            "position": "transformer_encoder.posembed_input.position_emb",
            "scale": "transformer_encoder.scaleembed_input.scale_emb",
            "cls_token": "transformer_encoder.cls",
            "norm.weight": "transformer_encoder.encoder_norm.weight",
            "norm.bias": "transformer_encoder.encoder_norm.bias",
        }.get(name, name)
        if ".query." in name:
            for part in ("query", "key", "value"):
                found[name.replace("query", part)] = torch.Size([shape[0] // 3, *shape[1:]])
        else:
            found[name] = torch.Size([1, *shape]) if name.endswith("position_emb") else shape
    return found


@torch.inference_mode()
@pytest.mark.parametrize("size, expected", [((96, 160), -1.1323236227035522), ((70, 50), -0.9822565317153931)])
def test_musiq_is_pyiqa(size, expected, musiq_network):
    """What pyiqa 0.1.16's MUSIQ gave under the same weights; recorded, since it is not a dependency."""
    assert abs(musiq_network(picture(*size)[None]).item() - expected) < TOLERANCE


@pytest.fixture(scope="module")
def musiq_network():
    return filled(small_musiq, musiq.renamed(fill(pyiqa_shapes())), Path("x"), "MUSIQ")


AMT_MEANS = (0.6854170560836792, 0.5109570026397705, 0.4090813398361206)
AMT_PIXELS = (  # every 43rd row and 47th column of each channel
    0.48287996649742126, 0.8793483972549438, 0.8912250995635986, 0.6183182001113892, 0.3327009081840515,
    0.6861535310745239, 0.3877580165863037, 0.2087969332933426, 0.37889137864112854, 0.3752947449684143,
    0.5509575009346008, 1.0, 0.6079093217849731, 0.4980391263961792, 0.5965861678123474, 0.364159494638443,
    0.4974128007888794, 0.6212912797927856, 0.13260121643543243, 0.7529044151306152, 0.42534947395324707,
    0.6995802521705627, 0.17608016729354858, 0.822372555732727, 0.7490481734275818, 0.6224601864814758,
    0.4414641559123993, 0.6560208797454834, 0.539643406867981, 0.6372306942939758, 0.6880286931991577,
    0.3024607002735138, 0.4239535331726074, 0.575804591178894, 0.08359711617231369, 0.18942506611347198,
)  # fmt: skip


@torch.inference_mode()
def test_amt_is_vbenchs():
    """What the AMT-S that vbench 0.1.5 carries gave under the same weights; recorded, since it is not a dependency."""
    network = filled(amt.AmtS, fill(shapes(amt.AmtS()), gain=0.6), Path("x"), "AMT-S")
    first = picture(128, 144)[None]
    middle = network(first, first.roll((2, 5), (2, 3)))
    torch.testing.assert_close(middle.mean((0, 2, 3)), torch.tensor(AMT_MEANS), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(middle[0, :, ::43, ::47].flatten(), torch.tensor(AMT_PIXELS), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("conv2.bias"), "must hold a network, got no conv2.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), r"must hold a network, got extra as well \(1 that"),
        (lambda state: state.update({"conv2.bias": torch.zeros(3)}), r"conv2.bias of shape \[84\], got \[3\]"),
    ],
)
def test_weights_of_another_architecture_are_one_line(change, message):
    state = fill(shapes(amt.Features()))
    change(state)
    with pytest.raises(ValueError, match=message) as error:
        filled(amt.Features, state, Path("weights.pth"), "a network")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 nor an archive"])
def test_a_file_that_holds_no_weights_is_one_line(tmp_path, content):
    (tmp_path / "amt-s.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"amt-s.pth must be a file of weights that torch reads") as error:
        amt.load(tmp_path / "amt-s.pth")
    assert "\n" not in str(error.value)


def test_weights_lie_under_state_dict_or_by_themselves(tmp_path):
    optimizer = {"param_groups": [{"lr": np.float64(2e-5)}]}  # as in AMT's checkpoints
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3, "optim": optimizer}, tmp_path / "nested.pth")
    torch.save({"module.a": torch.ones(2)}, tmp_path / "flat.pth")
    assert list(read(tmp_path / "nested.pth")) == list(read(tmp_path / "flat.pth")) == ["a"]
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="must hold tensors by name, got list"):
        read(tmp_path / "list.pth")


def test_pixels_have_torchvisions_sizes():
    frames = np.zeros((1, 480, 832, 3), np.uint8)
    assert pixels.for_clip(frames).shape == (1, 3, 224, 224)
    assert pixels.for_dino(frames).shape == (1, 3, 224, 388)
    assert pixels.for_musiq(frames).shape == (1, 3, 295, 512)
    assert pixels.for_musiq(frames[:, :64, :64]).shape == (1, 3, 64, 64)
    assert pixels.for_dino(frames.swapaxes(1, 2)).shape == (1, 3, 388, 224)


def test_clip_sees_the_middle_of_a_frame():
    frames = np.zeros((1, 224, 448, 3), np.uint8)
    frames[:, :, 112:336] = 255
    seen = pixels.for_clip(frames)
    white = (1 - torch.tensor(pixels.CLIP_MEAN)) / torch.tensor(pixels.CLIP_STD)
    torch.testing.assert_close(seen.amin((0, 2, 3)), white)


@torch.inference_mode()
def test_linear_layers_stay_in_float16_and_compute_as_in_float32():
    state = {name: value.half() for name, value in fill(shapes(Block(64, 1, 128, 1e-5))).items()}
    both = state, {name: value.float() for name, value in state.items()}
    half, full = (filled(lambda: Block(64, 1, 128, 1e-5), each, Path("x"), "a block") for each in both)
    assert (half.attn.qkv.weight.dtype, half.norm1.weight.dtype) == (torch.float16, torch.float32)
    x = hashed("x", (2, 5, 64))
    assert half(x).dtype == torch.float32 and torch.equal(half(x), full(x))
