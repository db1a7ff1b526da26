"""The choices of the method and their three named sets of values: data, which the method reads.

Every value is a flag of the command line and a setting of evaluate.py; a model's folder may hold some in its clora.json.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from scheduler import SCHEDULERS
from weights import Model

# what a text may be (a sampler that is registered later too), and the lowest and highest of numbers
CHOICES: dict[str, Collection[str]] = {"scheduler": SCHEDULERS, "maps_from": ("cond", "both"),
                                       "noise_from": ("after", "before"), "uncond_from": ("each", "base")}
RANGES = {"steps": (1, 1000), "eta": (0, 1), "guidance": (1, 1e4), "guidance_rescale": (0, 1), "temperature": (1e-6, 1e6),
          "alpha": (-1e6, 1e6), "update_until": (-10**6, 10**6), "refine_steps": (0, 10_000), "refine_stop": (0, 1),
          "update_every": (1, 1000), "update_stop": (0, 1), "threshold": (0, 1), "mask_from": (0, 10**6),
          "mask_every": (1, 1000), "switch_every": (1, 1000)}


@dataclass(frozen=True)
class Recipe:
    """Every choice of the method. The defaults are the paper's; where it is silent the release's, and the usual guidance.

    The command line has a flag for each field, whose type is bool, int (or None), float, str or a tuple of ints; the comment
    beside it is its help.
    """

    steps: int = 50                     # denoising steps
    scheduler: str = "ddim"             # ddim, pndm, dpm++, dpm++-karras or lcm
    eta: float = 0.0                    # noise added by DDIM, 0 (none) to 1 (DDPM)
    guidance: float = 7.5               # classifier-free guidance scale
    guidance_rescale: float = 0.0       # phi of arXiv 2305.08891, eq. 16; 0 is off
    clip_skip: int | None = None        # how many of CLIP's last layers to leave out
    text_lora: bool = True              # use the text-encoder half of LoRA files that have one
    temperature: float = 0.5            # tau of the loss
    alpha: float = 20.0                 # step size of the latent update
    update_until: int = 25              # last step with a latent update; -1: never
    refine_at: tuple[int, ...] = (0, 10, 20)    # steps that repeat their update
    refine_steps: int = 20              # how many times more they do
    refine_stop: float = 0.0            # end a picture's repeats once one lowers its loss by less than this share; 0: never
    update_every: int = 1               # steps from one latent update to the next
    update_stop: float = 0.0            # end a picture's updates once a step moves its maps by less than this; 0: never
    rescale_maps: bool = False          # scale each map to 0..1 before the loss
    maps_from: str = "cond"             # "cond": conditional pass; "both": mean with the unconditional one
    noise_from: str = "after"           # predict the noise at the latent "after" or "before" the step's last update
    uncond_from: str = "each"           # unconditional half of guidance: of "each" variant or of the "base" for all
    threshold: float = 0.4              # theta: share of a map's maximum above which a pixel is the subject's
    mask_ties: bool = True              # a pixel exactly at the threshold belongs to the mask
    mask_from: int = 0                  # first step with masks; before it the variants are averaged
    mask_every: int = 1                 # steps from one reading of maps and masks to the next
    dilate: bool = False                # grow the masks by a pixel of the maps, 32 in SD 1.5 (then erode, open, close)
    erode: bool = False                 # shrink the masks by a pixel of the maps
    open: bool = False                  # erode, then dilate: drops specks
    close: bool = False                 # dilate, then erode: fills holes
    switch_every: int = 1               # method switch: steps until the next LoRA's turn

    def __post_init__(self):
        """ValueError names a value of another type, out of range or of no use beside another."""
        for name, value in vars(self).items():
            default = getattr(type(self), name)
            kind = type(default)
            kinds = {float: (int, float), tuple: (tuple, list), type(None): (int, type(None))}.get(kind, kind)
            parts = value if kind is tuple and isinstance(value, (tuple, list)) else []
            if not isinstance(value, kinds) or isinstance(value, bool) != (kind is bool) or \
                    not all(type(part) is int and abs(part) <= 10**6 for part in parts):
                raise ValueError(f"{name} cannot be {value!r}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose from {', '.join(allowed)}")
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be between {low} and {high}")
        if self.uncond_from == "base" and self.maps_from == "both":
            raise ValueError("--uncond-from base leaves no unconditional maps for --maps-from both; choose one of the two")
        object.__setattr__(self, "refine_at", tuple(self.refine_at))            # JSON has lists


RECIPES = {
    "paper": Recipe(),
    "release": Recipe(steps=100, guidance=10.0, update_until=49, rescale_maps=True, maps_from="both",
                      noise_from="before", mask_ties=False),
    "fast": Recipe(steps=20, scheduler="dpm++", update_until=9, refine_at=(0, 4, 8), refine_steps=5),
}


def changed(recipe: Recipe, values: object, where: str = "") -> Recipe:
    """The recipe with these values. ValueError says where they come from, and names one that is unknown or not possible."""
    start = f"{where}: " if where else ""
    if not isinstance(values, dict):
        raise ValueError(f"{start}the settings must be an object like {{\"alpha\": 2}}")
    if unknown := [name for name in values if name not in Recipe.__dataclass_fields__]:
        raise ValueError(f"{start}there is no setting called {unknown[0]}")
    try:
        return replace(recipe, **values)
    except ValueError as error:
        raise ValueError(f"{start}{error}") from None


def recipe_for(model: Model, name: str = "paper", **changes) -> Recipe:
    """The named recipe with the values that the model comes with (clora.json of its folder), and `changes` on top.

    They are taken as they are: with `steps` alone update_until and refine_at stay, which the command line moves along.
    ValueError: a name or value that is not possible.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no recipe called {name}; choose from {', '.join(RECIPES)}")
    return changed(changed(RECIPES[name], model.settings.get("recipe", {}), "clora.json"), changes, "recipe_for")
