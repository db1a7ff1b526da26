"""A sampler of your own: Euler's method on the probability flow, and a loop that changes the latents between its steps.

    python -m examples.other_sampler            from the repository's folder; writes out/other-sampler.png

A sampler is a class with one method. `step` gets the guided noise prediction and the latents, both [B, 4, h, w], at
timesteps[i], and returns the latents of the next timestep and whatever it wants to be told again then (here nothing).
"""

import math
from pathlib import Path

from PIL import Image
from torch import Tensor

from clora import Step, Subject, compose, decode, initial_noise, make_plan, recipe_for
from scheduler import SCHEDULERS, Generators, History, Scheduler
from weights import load_model

TOY = Path(__file__).parents[1] / "weights/toy"


class Euler(Scheduler):
    """d x / d sigma = eps with x = z / sqrt(a) and sigma = sqrt((1 - a) / a) (arXiv 2206.00364)."""

    def step(self, noise: Tensor, i: int, latents: Tensor, history: History = (),
             generator: Generators = None) -> tuple[Tensor, History]:
        now, then = (*self.levels, self.final_alpha)[i:i + 2]
        sigma, next_sigma = (math.sqrt((1 - a) / a) for a in (now, then))
        x = latents / math.sqrt(now) + (next_sigma - sigma) * noise
        return x * math.sqrt(then), ()


def main(steps: int = 50, out: str = "out/other-sampler.png") -> list[Step]:
    SCHEDULERS["euler"] = Euler
    model = load_model(TOY)
    zib, pel = (model.lora(TOY / f"loras/{name}.safetensors") for name in ("zib", "pel"))
    recipe = recipe_for(model, steps=steps, refine_at=(), scheduler="euler")
    plan = make_plan(model, "a ball and a ring on the grass",
                     [Subject(zib, "ball", "zib ball"), Subject(pel, "ring", "pel ring")], recipe=recipe)
    seen = []
    for step in compose(model, plan, recipe, initial_noise(model, 128, 128, seed=0)):
        step.latents.clamp_(-4, 4)              # in place: the next step starts from here
        seen.append(step)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(decode(model, seen[-1].latents)[0].numpy()).save(out)
    print(out)
    return seen


if __name__ == "__main__":
    main()
