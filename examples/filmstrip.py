"""The method as a strip of pictures: what the README shows beside the functions of clora.py.

    python -m examples.filmstrip        from the repository's folder; writes out/filmstrip.png

A column per step; from top to bottom the picture as that step expects it to become, the attention map of each LoRA's
own words in its own variant, and the masks made from them (red, blue; both: violet; grey is the base model's).
"""

from pathlib import Path

import numpy as np
from PIL import Image

from clora import Step, Subject, compose, decode, initial_noise, make_plan, recipe_for
from report import heat, subject_map
from weights import load_model

TOY = Path(__file__).parents[1] / "weights/toy"
SIDE = 128


def tile(array: np.ndarray, how: Image.Resampling = Image.Resampling.NEAREST) -> np.ndarray:
    """uint8 [h, w, 3] -> [SIDE, SIDE, 3]."""
    return np.asarray(Image.fromarray(array).resize((SIDE, SIDE), how))


def main(steps: int = 50, out: str = "out/filmstrip.png") -> list[Step]:
    model = load_model(TOY)
    recipe = recipe_for(model, steps=steps)
    zib, pel = (model.lora(TOY / f"loras/{name}.safetensors") for name in ("zib", "pel"))
    subjects = [Subject(zib, "ball", "zib ball"), Subject(pel, "ring", "pel ring")]
    plan = make_plan(model, "a ball and a ring on the grass", subjects, recipe=recipe)
    seen = list(compose(model, plan, recipe, initial_noise(model, SIDE, SIDE, seed=0)))
    columns = []
    for step in (seen[int(share * (steps - 1))] for share in (0, 0.06, 0.12, 0.2, 0.4, 0.7, 1)):
        assert step.maps is not None and step.masks is not None
        picture = decode(model, step.x0)[0].numpy()                                 # [128, 128, 3]
        places = enumerate(plan.trigger_tokens, start=1)
        maps = [subject_map(step.maps[0, v], tokens) for v, tokens in places]                 # [8, 8] each
        masks = step.masks[0, 1:].numpy().astype(bool)                              # [2, 16, 16]
        colours = np.full((*masks.shape[1:], 3), 200, np.uint8)
        colours[masks[0]], colours[masks[1]], colours[masks.all(0)] = (230, 60, 50), (40, 110, 230), (150, 70, 200)
        columns.append([tile(picture), *(tile(heat(one.numpy()), Image.Resampling.BICUBIC) for one in maps), tile(colours)])
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([np.concatenate(column) for column in columns], axis=1)).save(out)
    print(out)
    return seen


if __name__ == "__main__":
    main()
