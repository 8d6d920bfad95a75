"""ACS guidance in an existing diffusers script: the lines marked with (1) to (3) are all that is new.

    python examples/three_lines.py [MODEL]    default: a tiny random DiT, for a look at the mechanics

MODEL: a DiT in diffusers format or its Hugging Face id, as facebook/DiT-XL-2-256. Writes three-lines/*.png.
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from acs_fast import accelerate  # (1)


def tiny_pipeline() -> DiTPipeline:
    """A DiT of diffusers with random weights and eight latent pixels."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
    )
    first, *others = (block.norm1.emb for block in transformer.transformer_blocks)
    for other in others:  # a real checkpoint has one embedder, stored with every block
        other.load_state_dict(first.state_dict())
    vae = AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)  # fmt: skip
    return DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False))


pipe = DiTPipeline.from_pretrained(sys.argv[1]) if len(sys.argv) > 1 else tiny_pipeline()
pipe = accelerate(pipe)  # (2)
labels = [207, 207, 207, 207, 250, 250, 250, 250]
images = pipe(
    labels,
    num_inference_steps=25,
    generator=torch.Generator().manual_seed(0),
    curricula=2,  # (3): the last two images of each class challenge a discriminator of the first two
).images
out = Path("three-lines")
out.mkdir(exist_ok=True)
for number, (label, image) in enumerate(zip(labels, images, strict=True)):
    image.save(out / f"{label}-{number}.png")
print(f"{len(images)} images in {out}")
