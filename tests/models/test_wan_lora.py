"""Low-rank updates: every place where their strength may be written, every way their tensors are called."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from inferix.commands.cli import main
from inferix.models import load_model
from inferix.models.wan.checkpoint import load_network, save_network
from inferix.models.wan.lora import find_lora, named
from tests.models.wan_golden import published, random_network, tiny_config

RANK = 4
MODULES = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v"]
MODULES += ["cross_attn.o", "ffn.0", "ffn.2"]


@pytest.fixture(scope="module")
def network():
    return random_network(tiny_config(ffn=64))


@pytest.fixture(params=["published", "converted"])
def base(request, network, tmp_path):
    """The network's file: as it is published, and as `inferix convert` writes it, with q, k and v in one."""
    path = tmp_path / "base" / "base.safetensors"
    path.parent.mkdir()
    if request.param == "published":
        (path.parent / "config.json").write_text(json.dumps({"num_heads": 3, "text_len": 24}))
        save_file(published(network), path)
    else:
        save_network(network, path)
    return path


def matrices(network, module, seed=0, rank=RANK):
    weight = published(network)[f"{module}.weight"]
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, *weight.shape[1:], generator=generator)
    b = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator)
    return a, b, (b.flatten(1) @ a.flatten(1)).view_as(weight)


def added(network, loaded):
    """What was added to each tensor that has changed, by published name."""
    before, after = published(network), published(loaded)
    return {name: after[name] - x for name, x in before.items() if not torch.equal(after[name], x)}


def write(folder, tensors, header=None, config=None, name="adapter_model.safetensors"):
    folder.mkdir(exist_ok=True)
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / name, header)
    return folder / name


def pair(module, a, b, prefix="base_model.model."):
    return {f"{prefix}{module}.lora_A.weight": a, f"{prefix}{module}.lora_B.weight": b}


def diffusers_header(prefix="transformer.", **fields):
    return {"lora_adapter_metadata": json.dumps({prefix + name: value for name, value in fields.items()})}


PEFT = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "init_lora_weights": True}
# name -> (header, adapter_config.json, alpha beside the matrices), scale
STRENGTHS = {
    "nowhere": ({}, None, None, 1.0),
    "beside the matrices": ({}, None, 6.0, 1.5),
    "adapter_config.json": ({}, PEFT, None, 2.0),
    "rank-stabilised": ({}, PEFT | {"use_rslora": True}, None, 4.0),
    "of this module": ({}, PEFT | {"alpha_pattern": {"blocks.1.ffn.0": 1, "self_attn.q": 2}}, None, 0.5),
    "by a pattern": ({}, PEFT | {"alpha_pattern": {r"blocks\.\d+\.self_attn\.[qk]": 12}}, None, 3.0),
    "of another module": ({}, PEFT | {"alpha_pattern": {"f_attn.q": 2, "attn.k": 2}}, None, 2.0),
    "rank of this module": ({}, PEFT | {"r": 16, "rank_pattern": {"self_attn.q": RANK}}, None, 2.0),
    "diffusers' header": (diffusers_header(**PEFT), None, None, 2.0),
    "diffusers' header, rank-stabilised": (diffusers_header(**PEFT, use_rslora=True), None, None, 4.0),
    "diffusers' header, one model's": (diffusers_header("", r=RANK, lora_alpha=10), None, None, 2.5),
    "lora_alpha in the header": ({"lora_alpha": "8"}, None, None, 2.0),
    "kohya's header": ({"ss_network_alpha": "2.0", "ss_network_dim": "4"}, None, None, 0.5),
    "kohya's, resized": ({"ss_network_alpha": "Dynamic"}, None, 2.0, 0.5),
    "twice, the same": ({"lora_alpha": "8"}, PEFT, None, 2.0),
}


@pytest.mark.parametrize("case", STRENGTHS)
def test_the_strength_is_read_where_it_is_written(case, network, base, tmp_path):
    header, config, alpha, scale = STRENGTHS[case]
    a, b, product = matrices(network, "blocks.0.self_attn.q")
    tensors = pair("blocks.0.self_attn.q", a, b)
    if alpha:
        tensors["base_model.model.blocks.0.self_attn.q.alpha"] = torch.tensor(alpha)
    lora = write(tmp_path / "lora", tensors, header, config)
    changed = added(network, load_network(base, lora=lora))
    assert changed.keys() == {"blocks.0.self_attn.q.weight"}
    assert torch.allclose(changed["blocks.0.self_attn.q.weight"], scale * product, atol=1e-5)


@pytest.mark.parametrize("strength, factor", [("=0.5", 0.5), ("=-1", -1.0), ("", 1.0), ("=0", 0.0)])
def test_a_strength_can_be_asked_for(strength, factor, network, base, tmp_path):
    a, b, product = matrices(network, "blocks.1.cross_attn.v")
    lora = write(tmp_path / "l=2", pair("blocks.1.cross_attn.v", a, b), config=PEFT)  # a name with an equals sign
    for given in (f"{lora}{strength}", f"{lora.parent}{strength}", [f"{lora}{strength}"]):
        changed = added(network, load_network(base, lora=given))
        if factor:
            assert torch.allclose(changed.pop("blocks.1.cross_attn.v.weight"), 2 * factor * product, atol=1e-5)
        assert not changed


def test_several_are_added(network, base, tmp_path):
    """Two onto one packed tensor, one of them onto two thirds of it; rounded once, in half precision."""
    q, v, q2 = (matrices(network, f"blocks.0.self_attn.{x}", seed) for seed, x in enumerate("qvq"))
    one = write(tmp_path / "1", pair("blocks.0.self_attn.q", *q[:2]) | pair("blocks.0.self_attn.v", *v[:2]))
    two = write(tmp_path / "2", pair("blocks.0.self_attn.q", *q2[:2]))
    changed = added(network, load_network(base, lora=[one, f"{two}=-0.5"]))
    assert changed.keys() == {"blocks.0.self_attn.q.weight", "blocks.0.self_attn.v.weight"}
    assert torch.allclose(changed["blocks.0.self_attn.q.weight"], q[2] - 0.5 * q2[2], atol=1e-5)
    assert torch.allclose(changed["blocks.0.self_attn.v.weight"], v[2], atol=1e-5)


def test_what_is_added_is_rounded_to_the_networks_dtype_alone(network, tmp_path):
    """Onto weights of 8 bits: a hundredth of a weight is lost in those, not in bfloat16."""
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 3}))
    state = published(network)
    eight = {name: x.to(torch.float8_e4m3fn) if "ffn.0.weight" in name else x for name, x in state.items()}
    save_file(eight, tmp_path / "m.safetensors")
    name = "blocks.0.ffn.0.weight"
    before = eight[name].float()
    lora = write(tmp_path / "l", {"blocks.0.ffn.0.diff": before / 100})
    exact = before.double() + (before / 100).double()
    for dtype, step in ((torch.float32, 2**-24), (torch.bfloat16, 2**-8)):
        merged = load_network(tmp_path / "m.safetensors", lora=lora, dtype=dtype).state_dict()[name]
        assert merged.dtype == dtype and ((merged.double() - exact).abs() <= exact.abs() * step).all()


@pytest.mark.parametrize("style", ["musubi", "native"])
def test_names_are_what_diffusers_takes_them_for(style, network, base, tmp_path):
    """diffusers' own translation of a file, read by us, is the file read by us."""
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils", reason="diffusers is not installed")
    tensors = {}
    names = [f"blocks.{i}.{module}" for i in range(2) for module in MODULES]
    names += ["time_projection.1", "head.head", "text_embedding.0", "time_embedding.2"] if style == "native" else []
    for seed, name in enumerate(names):
        a, b, _ = matrices(network, name, seed)
        stem = "lora_unet_" + name.replace(".", "_") if style == "musubi" else f"diffusion_model.{name}"
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
        if name.startswith("blocks."):
            tensors[f"{stem}.alpha"] = torch.tensor(2.0 + seed)
        if style == "native":
            tensors[f"{stem}.diff_b"] = torch.randn(len(b))
    if style == "native":  # of both layers that diffusers translates together
        for name in ("text_embedding.2", "time_embedding.0"):
            a, b, _ = matrices(network, name)
            tensors |= pair(name, a, b, "diffusion_model.")
            tensors = {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): x for key, x in tensors.items()}
    name = {"musubi": "_convert_musubi_wan_lora_to_diffusers", "native": "_convert_non_diffusers_wan_lora_to_diffusers"}
    theirs = getattr(utils, name[style])({key: x.clone() for key, x in tensors.items()})
    assert all(key.startswith("transformer.") for key in theirs) and any("lora_B.bias" in key for key in theirs) == (
        style == "native"
    )
    ours = published(load_network(base, lora=write(tmp_path / "l", tensors, name="ours.safetensors")))
    same = published(load_network(base, lora=write(tmp_path / "l", theirs, name="theirs.safetensors")))
    assert all(torch.allclose(ours[key], same[key], atol=2e-5) for key in ours)
    untouched = [key for key, x in published(network).items() if torch.equal(x, ours[key])]
    assert not any(f"{name}.weight" in untouched for name in names) and "patch_embedding.weight" in untouched


def test_whole_differences_are_added(network, base, tmp_path):
    state = published(network)
    names = {
        "blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
        "blocks.1.norm3.diff": "blocks.1.norm3.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm3.bias",
        "blocks.0.self_attn.k.diff_b": "blocks.0.self_attn.k.bias",
        "blocks.0.modulation.diff": "blocks.0.modulation",
        "head.head.diff": "head.head.weight",
        "patch_embedding.diff": "patch_embedding.weight",
    }
    tensors = {f"diffusion_model.{key}": torch.randn(state[name].shape) for key, name in names.items()}
    lora = write(tmp_path / "l", tensors, {"lora_alpha": "8"}, name="x.safetensors")  # which is not for them
    changed = added(network, load_network(base, lora=f"{lora}=2"))
    assert changed.keys() == set(names.values())
    for key, name in names.items():
        assert torch.allclose(changed[name], 2 * tensors[f"diffusion_model.{key}"], atol=1e-5)


def test_a_convolution_and_a_bias_are_updated_too(network, base, tmp_path):
    a, b, product = matrices(network, "patch_embedding")
    tensors = pair("patch_embedding", a, b) | {"base_model.model.patch_embedding.lora_B.bias": torch.ones(len(b))}
    changed = added(network, load_network(base, lora=write(tmp_path / "l", tensors, config=PEFT)))
    assert torch.allclose(changed.pop("patch_embedding.weight"), 2 * product, atol=1e-5)
    assert torch.allclose(changed.pop("patch_embedding.bias"), torch.full([len(b)], 2.0), atol=1e-6) and not changed


Q = "base_model.model.blocks.0.self_attn.q"
# what is wrong -> (changes of the tensors, header, adapter_config.json, message)
WRONG = {
    "no such module": (
        {"base_model.model.blocks.0.self_attn.x.lora_A.weight": 1},
        {},
        None,
        "got .*self_attn.x.lora_A",
    ),
    "no such role": ({f"{Q}.lora_magnitude_vector": 1}, {}, None, "got .*lora_magnitude_vector"),
    "LoHa": ({f"{Q}.hada_w1_a": 1}, {}, None, "got .*hada_w1_a"),
    "no such kohya module": (
        {"lora_unet_blocks_0_attn_x.lora_down.weight": 1},
        {},
        None,
        "got lora_unet_blocks_0_attn_x",
    ),
    "no such bias": ({"base_model.model.blocks.0.modulation.diff_b": 1}, {}, None, "got .*modulation.diff_b"),
    "one weight by two names": (
        {"lora_unet_blocks_0_self_attn_q.diff": torch.zeros(96, 96)},
        {},
        None,
        "holds updates of blocks.0.self_attn.q.weight twice, as base_model.* and as lora_unet_blocks_0_self_attn_q",
    ),
    "half a pair": (
        {f"{Q}.lora_B.weight": None},
        {},
        None,
        "must hold lora_A and lora_B for blocks.0.self_attn.q.weight",
    ),
    "alpha alone": (
        {"base_model.model.blocks.1.ffn.0.alpha": torch.tensor(1.0)},
        {},
        None,
        "lora_A and lora_B for blocks.1.ffn.0",
    ),
    "rank 0": (
        {f"{Q}.lora_A.weight": torch.zeros(0, 96), f"{Q}.lora_B.weight": torch.zeros(96, 0)},
        {},
        None,
        "is .* got B",
    ),
    "whole numbers": ({f"{Q}.lora_A.weight": torch.ones(4, 96, dtype=torch.int8)}, {}, None, "floating-point numbers"),
    "another shape": ({f"{Q}.diff_b": torch.zeros(95)}, {}, None, r"self_attn.q.bias is \[96\], got \[95\]"),
    "alpha is nan": ({f"{Q}.alpha": torch.tensor(math.nan)}, {}, None, "alpha must be a finite number, got nan"),
    "two alphas": ({f"{Q}.alpha": torch.ones(2)}, {}, None, "alpha must be a finite number, got None"),
    "not finite": (
        {f"{Q}.lora_A.weight": torch.zeros(4, 96) / 0},
        {},
        None,
        "added to blocks.0.self_attn.qk?v?.weight",
    ),
    "too much": ({f"{Q}.alpha": torch.tensor(1e38)}, {}, {"peft_type": "LORA"}, "must be finite, got NaN or infinity"),
    "another rank": ({}, {}, PEFT | {"r": 8}, r"adapter_config.json says that .*self_attn.q has rank 8, got 4"),
    "DoRA": ({}, {}, PEFT | {"use_dora": True}, "must be of a LoRA, got DoRA"),
    "LoKr": ({}, {}, PEFT | {"peft_type": "LOKR"}, "must be of a LoRA, got 'LOKR'"),
    "PiSSA": ({}, {}, PEFT | {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' belongs to"),
    "config alpha": ({}, {}, PEFT | {"lora_alpha": "much"}, "lora_alpha must be a finite number, got 'much'"),
    "a bad pattern": ({}, {}, PEFT | {"alpha_pattern": {"(": 1}}, "alpha_pattern has no pattern in '\\('"),
    "patterns": ({}, {}, PEFT | {"alpha_pattern": [1]}, "alpha_pattern must be an object"),
    "header alpha": ({}, {"lora_alpha": "inf"}, None, "lora_alpha must be a finite number, got 'inf'"),
    "resized": ({}, {"ss_network_alpha": "Dynamic"}, None, "must be a finite number, got 'Dynamic'"),
    "header": (
        {},
        {"lora_adapter_metadata": "[" * 100_000},
        None,
        "lora_adapter_metadata in its header is not a JSON object",
    ),
    "two scales": (
        {},
        {"lora_alpha": "4"},
        PEFT,
        "must have one scale, got 1 by .*header and 2 by .*adapter_config.json",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_one_line(case, network, base, tmp_path):
    changes, header, config, message = WRONG[case]
    a, b, _ = matrices(network, "blocks.0.self_attn.q")
    tensors = pair("blocks.0.self_attn.q", a, b)
    for name, x in changes.items():
        tensors[name] = torch.zeros(RANK, 96) if isinstance(x, int) else x
    lora = write(tmp_path / "l", {name: x for name, x in tensors.items() if x is not None}, header, config)
    with pytest.raises(ValueError, match=f"lora: .*{message}") as caught:
        load_network(base, lora=lora)
    assert "\n" not in str(caught.value)


def test_what_is_asked_for_must_be_there(tmp_path):
    file = write(tmp_path / "a", {"x": torch.zeros(1)}, name="style_LoRA.safetensors")
    assert named(None) == [] and named([]) == [] and find_lora(tmp_path) is None
    assert named([file, f"{file.parent}=2e-1"]) == [(file, 1.0), (file, 0.2)]
    for given, message in (
        (tmp_path / "no.pt", "lora: there is no file .*no.pt"),
        (f"{file}=much", "lora: the strength of .*style_LoRA.safetensors must be a finite number, got 'much'"),
        (f"{file}=nan", "must be a finite number, got 'nan'"),
        (tmp_path, "lora: .* holds no file of updates, adapter_model.safetensors or"),
    ):
        with pytest.raises(ValueError, match=message):
            named(given)
    write(tmp_path / "a", {"x": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"holds several \(adapter_model.safetensors, style_LoRA.safetensors\): name one"
    ):
        find_lora(tmp_path / "a")


def test_the_commands_take_several(network, base, tmp_path, capsys):
    a, b, product = matrices(network, "blocks.0.ffn.2")
    lora = write(tmp_path / "l", pair("blocks.0.ffn.2", a, b), config=PEFT)
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(base), str(out), "--lora", f"{lora}=0.25", "--lora", str(lora.parent)]) == 0
    changed = added(network, load_network(out))
    assert torch.allclose(changed.pop("blocks.0.ffn.2.weight"), 2.5 * product, atol=1e-5) and not changed
    assert main(["convert", str(base), str(out), "--lora", f"{lora}=x"]) == 2
    assert capsys.readouterr().err.startswith("inferix convert: --lora: the strength of ")
    before = out.read_bytes()
    assert main(["convert", str(out), str(out), "--lora", str(lora)]) == 0  # over the file it is read from
    assert out.read_bytes() != before and out.stat().st_mode & 0o777 == base.parent.stat().st_mode & 0o666
    model = load_model("self-forcing", str(base), size=(48, 80), lora=[f"{lora}=0.25", str(lora)])
    assert torch.allclose(
        published(model.network)["blocks.0.ffn.2.weight"],
        published(load_network(out))["blocks.0.ffn.2.weight"] - 2 * product,
        atol=1e-5,
    )
