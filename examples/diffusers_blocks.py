"""A stock WanPipeline of diffusers that goes on block by block: `python examples/diffusers_blocks.py`.

A tiny transformer with random weights makes videos of six blocks, guided. Each block of three frames sees itself, the
six frames before it and the first three. Nothing of the pipeline is changed: it is called once for each block, inside
`cache.block`. The same is done over a past in float32, in 8 and in 4 bits, and the latents are compared.
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

from inferix_kernels import Policy
from inferix_kernels.integrations.diffusers import enable_block_cache

BLOCKS, FRAMES, STEPS = 6, 3, 2
PIXELS = (96, 160)  # latents of 12 x 20, 60 tokens a frame


def make_pipeline() -> WanPipeline:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=64, num_layers=2, ffn_dim=512, text_dim=32
    )  # fmt: skip
    pipeline = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(shift=5.0), transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_video(pipeline: WanPipeline, format: str) -> tuple[Tensor, int, list[int]]:
    """Latents [1, 16, frames, 12, 20], the bytes of all keys and values, and the frames held at the end."""
    generator = torch.Generator().manual_seed(1)
    prompt, negative = torch.randn(2, 1, 8, 32, generator=generator)
    cache = enable_block_cache(pipeline.transformer, Policy(window=9, sink=3, format=format))
    made = []
    for _ in range(BLOCKS):
        with cache.block(FRAMES):
            latents = pipeline(
                prompt_embeds=prompt, negative_prompt_embeds=negative, height=PIXELS[0], width=PIXELS[1],
                num_frames=4 * (FRAMES - 1) + 1, num_inference_steps=STEPS, guidance_scale=3.0, generator=generator,
                output_type="latent",
            ).frames  # fmt: skip
            cache.commit(latents)  # the clean pass, of both branches of guidance
        made.append(latents)
    size, held = cache.nbytes, cache.held()
    cache.disable()  # the pipeline is stock again
    return torch.cat(made, 2), size, held


def main() -> None:
    pipeline = make_pipeline()
    made = {format: make_video(pipeline, format) for format in ("fp32", "int8", "int4")}
    wanted, _, held = made["fp32"]
    print(f"{wanted.shape[2]} latent frames in {BLOCKS} blocks; the last frames held are {', '.join(map(str, held))}")
    print("format  bytes of keys and values  difference of the last block from float32")
    for format, (got, size, _) in made.items():
        difference = (got - wanted)[:, :, -FRAMES:].norm() / wanted[:, :, -FRAMES:].norm()
        print(f"{format:>6}  {size:>24,}  {difference:.1e}")


if __name__ == "__main__":
    main()
