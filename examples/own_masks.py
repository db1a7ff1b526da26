"""Masks from a picture instead of from the attention: red is where the first LoRA draws, blue the second, the rest neither.

    python -m examples.own_masks [masks.png]    from the repository's folder; writes out/own-masks.png

The noise predictions are blended under these masks from the first step on, and the latent is not updated: the attention
has no say in where things go.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clora import RECIPES, Recipe, Step, Subject, compose, decode, initial_noise, make_plan
from weights import load_model, read_lora

TOY = Path(__file__).parents[1] / "weights/toy"
MASKS = Path(__file__).parent / "masks.png"


def read_masks(path: str | Path, height: int, width: int) -> Tensor:
    """Picture -> float [3, height, width] of 0 and 1: the base model's part, the red part, the blue part."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST))
    red, blue = pixels[..., 0] > 127, pixels[..., 2] > 127
    return torch.from_numpy(np.stack([~(red | blue), red, blue])).float()


def main(steps: int = 50, masks: str | Path = MASKS, out: str = "out/own-masks.png") -> list[Step]:
    model = load_model(TOY)
    zib, pel = (read_lora(TOY / f"loras/{name}.safetensors", model.unet, model.text.model) for name in ("zib", "pel"))
    recipe = replace(RECIPES["paper"], steps=steps, guidance=3.0, update_until=-1)
    plan = make_plan(model, "a ball and a ring on the grass",
                     [Subject(zib, "ball", "zib ball"), Subject(pel, "ring", "pel ring")], recipe=recipe)

    def from_picture(maps: Tensor, words: Sequence[tuple[int, ...]], size: Sequence[int], recipe: Recipe) -> Tensor:
        return read_masks(masks, *size).to(maps.device)
    noise = initial_noise(model, 128, 128, seed=0)
    seen = list(compose(model, plan, recipe, noise, make_masks=from_picture))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(decode(model, seen[-1].latents)[0].numpy()).save(out)
    return seen


if __name__ == "__main__":
    main(masks=sys.argv[1]) if len(sys.argv) > 1 else main()
