"""Masks from a picture instead of from the attention: red is where the first LoRA draws, blue the second, violet both.

    python -m examples.own_masks [masks.png]    from the repository's folder; writes out/own-masks.png

Pixels of any other colour, white and clear ones too, are the base model's. The noise predictions are blended under these
masks from the first step on, and the latent is not updated: the attention has no say in who draws where. Masks put nothing
anywhere: a ball that the noise wants on the right stays there, and is no LoRA's or the other's. So this one has a seed that
fits its masks.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clora import Recipe, Step, Subject, compose, decode, initial_noise, make_plan, recipe_for
from weights import load_model

TOY = Path(__file__).parents[1] / "weights/toy"
MASKS = Path(__file__).parent / "masks.png"


def read_masks(path: str | Path, height: int, width: int) -> Tensor:
    """Picture -> float [3, height, width] of 0 and 1: the base model's part, the red part, the blue part."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGBA").resize((width, height), Image.Resampling.NEAREST)) > 127
    red, green, blue, opaque = np.moveaxis(pixels, -1, 0)                           # [height, width] each
    red, blue = (colour & ~green & opaque for colour in (red, blue))
    return torch.from_numpy(np.stack([~(red | blue), red, blue])).float()


def main(steps: int = 50, masks: str | Path = MASKS, out: str = "out/own-masks.png") -> list[Step]:
    model = load_model(TOY)
    zib, pel = (model.lora(TOY / f"loras/{name}.safetensors") for name in ("zib", "pel"))
    recipe = recipe_for(model, steps=steps, update_until=-1)
    plan = make_plan(model, "a ball and a ring on the grass",
                     [Subject(zib, "ball", "zib ball"), Subject(pel, "ring", "pel ring")], recipe=recipe)

    def from_picture(maps: Tensor, tokens: Sequence[tuple[int, ...]], size: Sequence[int], recipe: Recipe) -> Tensor:
        return read_masks(masks, *size).to(maps.device)
    noise = initial_noise(model, 128, 128, seed=2)
    seen = list(compose(model, plan, recipe, noise, make_masks=from_picture))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(decode(model, seen[-1].latents)[0].numpy()).save(out)
    print(out)
    return seen


if __name__ == "__main__":
    try:
        main(masks=sys.argv[1] if len(sys.argv) > 1 else MASKS)
    except OSError as error:                    # not there, or no picture
        print(f"own_masks: {error}", file=sys.stderr)
        sys.exit(2)
