"""The repositories themselves, patched, give what was recorded of them: `pytest --reference DIR tests/integrations`.

DIR holds their checkouts under the names in wan_repositories.REPOSITORIES, and, in golden/, recordings that are not in
this repository. Without it, and where one is missing, tests are skipped by name.
"""

import contextlib

import pytest
import torch

from inferix_kernels.integrations import self_forcing
from tests.integrations import wan_repositories as repositories

FLOAT32 = {"atol": 2e-5, "rtol": 0}  # the recordings are of float64


@pytest.fixture(params=["theirs", "ours"])
def repository(request, monkeypatch):
    """(name, weights' recording) -> the repository over it, as it is but for flash-attn, or patched."""
    root = request.config.getoption("--reference")
    with contextlib.ExitStack() as stack:

        def open_(name, recorded, shift, size, **options):
            layout = repositories.REPOSITORIES[name]
            if root is None or not (repositories.Path(root) / layout.folder).is_dir():
                pytest.skip(f"no checkout of {name}: give --reference DIR")
            recording = repositories.recording(recorded, root)
            if recording is None:
                pytest.skip(f"no recording {recorded}.safetensors in DIR/golden")
            load = stack.enter_context(repositories.imported(layout, root))
            made = repositories.Repository(layout, load, recording.tensors, shift, size, **options)
            for module in made.attentions:
                monkeypatch.setattr(module, "flash_attention", repositories.dense)
            if request.param == "ours":
                patched = self_forcing.patch(made.module, page_size=8)
                assert name in patched.what or name.replace("-v1", " 1") in patched.what
                stack.callback(self_forcing.unpatch, made.module)
            else:
                monkeypatch.setattr(made.module, "attention", repositories.dense)
            made.paged = request.param == "ours"
            return made, recording

        yield open_


def given(monkeypatch, draws):
    """The recorded noise in the place of torch.randn_like; and a GPU's tensors on the CPU."""
    draws, ones = iter(draws), torch.ones
    monkeypatch.setattr(torch, "randn_like", lambda x: next(draws).reshape(x.shape))
    monkeypatch.setattr(torch, "ones", lambda *size, device=None, **more: ones(*size, **more))
    return draws


def in_order(recording, frames):
    """inputs.renoise [block, transition, frame, ...] for blocks of so many frames."""
    renoise = recording.tensors["inputs.renoise"].transpose(0, 1).flatten(1, 2)  # [transition, frame, ...]
    return [part for block in zip(*(each.split(frames) for each in renoise)) for part in block]


@torch.no_grad()
def test_self_forcing_static(repository, monkeypatch):
    repo, recording = repository("Self-Forcing", "self_forcing_static", 5.0, 15)
    x = recording.tensors
    pipeline = repo.pipeline([1000, 750, 500, 250], 3, {"a": x["inputs.prompt_embeds"]})
    repositories.dense_caches(pipeline, 135)
    given(monkeypatch, in_order(recording, 3))
    _, latents = pipeline.inference(x["inputs.noise"], ["a"], return_latents=True)
    torch.testing.assert_close(latents, x["outputs.final"], **FLOAT32)
    for layer, cache in enumerate(pipeline.kv_cache1):
        for side in "kv":
            torch.testing.assert_close(cache[side][:, :135], x[f"outputs.cache.layer{layer}.{side}"], **FLOAT32)
        assert isinstance(cache["k"], self_forcing.CacheView) == repo.paged


@pytest.mark.parametrize("variant", ["local6_sink1", "local4_sink1", "local6_sink0", "framewise_local4_sink1"])
@torch.no_grad()
def test_self_forcing_rolling(repository, variant, monkeypatch, request):
    rolling = repositories.recording("self_forcing_rolling", "")
    options = rolling.config["pipeline"]["variants"][variant]
    window = options["local_attn_size"]
    sizes = {"window": window, "sink": options["sink_size"]}
    repo, _ = repository("Self-Forcing", "self_forcing_static", 5.0, 15, **sizes)
    block, x = options["num_frame_per_block"], rolling.tensors
    pipeline = repo.pipeline([1000, 750, 500, 250], block, {"a": x["inputs.prompt_embeds"]}, window)
    repositories.dense_caches(pipeline, window * 15)
    given(monkeypatch, in_order(rolling, block))
    frames = block * options["num_blocks"]
    _, latents = pipeline.inference(x["inputs.noise"][:, :frames], ["a"], return_latents=True)
    torch.testing.assert_close(latents, x[f"outputs.{variant}.final"], **FLOAT32)
    if variant == "local6_sink1":
        for layer, cache in enumerate(pipeline.kv_cache1):
            for side in "kv":
                expected = x[f"outputs.{variant}.cache.layer{layer}.{side}"]
                torch.testing.assert_close(cache[side][:, :90], expected, **FLOAT32)


@torch.no_grad()
def test_causvid_static(repository, monkeypatch):
    repo, recording = repository("CausVid", "causvid_static", 8.0, 21)
    x = recording.tensors
    pipeline = repo.pipeline([1000, 757, 522, 0], 3, {"a": x["inputs.prompt_embeds"]}, warp=False)
    repositories.dense_caches(pipeline, 189, ends=False)
    given(monkeypatch, in_order(recording, 3))
    _, latents = pipeline.inference(x["inputs.noise"], ["a"], return_latents=True)
    torch.testing.assert_close(latents, x["outputs.final"], **FLOAT32)
    for layer, cache in enumerate(pipeline.kv_cache1):
        for side in "kv":
            torch.testing.assert_close(cache[side][:, :189], x[f"outputs.cache.layer{layer}.{side}"], **FLOAT32)


def drawn(x):
    return [x[f"draws.{i}"] for i in range(sum(name.startswith("draws.") for name in x))]


@torch.no_grad()
def test_causvid_begins_again_with_an_overlap(repository, monkeypatch):
    repo, recording = repository("CausVid", "causvid_overlap6", 8.0, 15)
    x = recording.tensors
    pipeline = repo.pipeline([1000, 757, 522, 0], 3, {"a": x["prompt"]}, warp=False)
    repositories.dense_caches(pipeline, 180, ends=False)
    draws = given(monkeypatch, drawn(x))
    start = None
    for i in range(2):
        _, latents = pipeline.inference(x[f"noise.{i}"], ["a"], start_latents=start, return_latents=True)
        torch.testing.assert_close(latents[0], x[f"latents.{i}"], **FLOAT32)
        start = torch.cat([latents[:, -6:-5] * 0.9 + 0.1, latents[:, -5:]], 1)
    assert next(draws, None) is None


@torch.no_grad()
def test_causal_forcing_two_steps(repository, monkeypatch):
    repo, recording = repository("Causal-Forcing", "causal_forcing_2step", 5.0, 15, window=6, sink=0)
    x = recording.tensors
    first = {"denoising_step_list_first_chunk": [1000, 750, 500, 250]}
    pipeline = repo.pipeline([1000, 500], 1, {"a": x["prompts.p0"]}, 6, **first)
    repositories.dense_caches(pipeline, 90)
    draws = given(monkeypatch, drawn(x))
    _, latents = pipeline.inference(x["noise"], ["a"], return_latents=True)
    torch.testing.assert_close(latents[0], x["latents"], **FLOAT32)
    assert next(draws, None) is None


@pytest.mark.parametrize("switch", [12, 15])
@torch.no_grad()
def test_longlive_switches_its_prompt(repository, switch, monkeypatch):
    repo, recording = repository("LongLive-v1", f"longlive_switch{switch}", 5.0, 15, window=12, sink=3)
    x = recording.tensors
    prompts = {"a": x["prompts.p0"], "b": x["prompts.p1"]}
    pipeline = repo.pipeline([1000, 750, 500, 250], 3, prompts, 12, global_sink=True)
    repositories.dense_caches(pipeline, 180)
    draws = given(monkeypatch, drawn(x))
    again = pipeline._recache_after_switch

    def recache(*args):
        again(*args)
        for layer, cache in enumerate(pipeline.kv_cache1):
            for side in "kv":
                torch.testing.assert_close(cache[side][:, :180], x[f"recached.{layer}.{side}"], **FLOAT32)

    pipeline._recache_after_switch = recache
    prompted = {"text_prompts_list": [["a"], ["b"]], "switch_frame_indices": [switch]}
    _, latents = pipeline.inference(x["noise"], **prompted, return_latents=True)
    torch.testing.assert_close(latents[0], x["latents"], **FLOAT32)
    assert next(draws, None) is None
