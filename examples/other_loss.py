"""Another loss: a plain penalty on the overlap of the concepts, in place of the paper's contrast.

    python -m examples.other_loss               from the repository's folder; writes out/other-loss.png

A loss is a function of the concepts' maps. Of each concept c it gets a tensor [n_c, m, n]: the cross-attention maps of
its words in all variants, with their graph, so whatever it returns is differentiated down to the latents.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clora import Step, Subject, compose, decode, initial_noise, make_plan, recipe_for
from weights import load_model

TOY = Path(__file__).parents[1] / "weights/toy"


def overlap_loss(groups: Sequence[Tensor], temperature: float) -> Tensor:
    """Mean over pairs of concepts of the share that their mean maps have in common: 0 apart, 1 in the same place."""
    shares = [(maps / maps.sum((-2, -1), keepdim=True)).mean(dim=0) for maps in groups]     # [m, n], sum 1 each
    common = [torch.minimum(a, b).sum() for a, b in combinations(shares, 2)]
    return sum(common, 0 * shares[0].sum()) / max(1, len(common))                   # one concept alone: 0


def main(steps: int = 50, out: str = "out/other-loss.png") -> list[Step]:
    model = load_model(TOY)
    zib, pel = (model.lora(TOY / f"loras/{name}.safetensors") for name in ("zib", "pel"))
    recipe = recipe_for(model, steps=steps, alpha=2.0, refine_at=())
    plan = make_plan(model, "a ball and a ring on the grass",
                     [Subject(zib, "ball", "zib ball"), Subject(pel, "ring", "pel ring")], recipe=recipe)
    seen = []
    for step in compose(model, plan, recipe, initial_noise(model, 128, 128, seed=0), loss=overlap_loss):
        seen.append(step)
        if step.losses:
            print(f"step {step.index}: overlap {step.losses[-1].item():.3f}")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(decode(model, seen[-1].latents)[0].numpy()).save(out)
    print(out)
    return seen


if __name__ == "__main__":
    main()
