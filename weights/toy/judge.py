"""Says which objects a picture shows, where, and in which texture and colour. Trained on the renderer's pictures alone.

    judge = load_judge()
    judge.look(pictures)        per picture: [Seen(kind="ball", look="zib", x=40.0, y=77.0, cells=19), ...]

A small convolutional network labels every cell of a 16x16 grid with a kind (or background) and a look; cells of one
kind that touch are one object. Looks are the six plain colours, "striped" and "dotted" (of any colour), the texture
and colours of each LoRA instance, and "other". Styles (line drawing, duotone) are told for the whole picture.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from weights.toy import renderer
from weights.toy.renderer import COLOURS, INSTANCES, KINDS, STYLES, TEXTURES, WHITE, Scene, colour_of

HERE = Path(__file__).resolve().parent
LOOKS = (*COLOURS, "striped", "dotted", *(instance.name for instance in INSTANCES), "other")
MANNERS = ("", *STYLES.values())
GRID, CELL = 16, 8


@dataclass(frozen=True)
class Seen:
    kind: str
    look: str
    x: float                            # centre in pixels
    y: float
    cells: int                          # area in cells of 8x8 pixels


class Judge(nn.Module):
    def __init__(self, width: int = 48):
        super().__init__()

        def layer(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False),
                                 nn.BatchNorm2d(outputs), nn.ReLU())
        self.body = nn.Sequential(
            layer(3, width // 2, 2), layer(width // 2, width), layer(width, width, 2), layer(width, 2 * width),
            layer(2 * width, 2 * width, 2), layer(2 * width, 2 * width), layer(2 * width, 2 * width, dilation=2),
            layer(2 * width, 2 * width))
        self.kind = nn.Conv2d(2 * width, len(KINDS) + 1, 1)
        self.look_of = nn.Conv2d(2 * width, len(LOOKS), 1)
        self.manner = nn.Linear(2 * width, len(MANNERS))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, 128, 128] in [-1, 1] -> logits: kind [B, 9, 16, 16], look [B, L, 16, 16], style [B, 3]."""
        x = self.body(pictures)                                                     # [B, C, 16, 16]
        return self.kind(x), self.look_of(x), self.manner(x.mean(dim=(2, 3)))

    @torch.no_grad()
    def look(self, pictures: np.ndarray) -> list[list[Seen]]:
        """uint8 [B, 128, 128, 3] -> the objects of each picture, left to right."""
        device = self.manner.weight.device
        batch = torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        kinds, looks, _ = self(batch)
        return [objects_of(kind.cpu(), look.cpu()) for kind, look in zip(kinds.log_softmax(1), looks.log_softmax(1))]

    @torch.no_grad()
    def styles(self, pictures: np.ndarray) -> list[str]:
        """uint8 [B, 128, 128, 3] -> "", "sketch" or "duotone" for each."""
        batch = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return [MANNERS[n] for n in self(batch.to(self.manner.weight.device))[2].argmax(1).tolist()]


def objects_of(kinds: Tensor, looks: Tensor, least: int = 4) -> list[Seen]:
    """Cell log-probabilities of kinds [9, 16, 16] (0 is background) and looks [L, 16, 16] -> the objects.

    Cells that touch, corners included, form a patch. A patch is one object of its likeliest kind, unless another kind
    has a quarter of its cells: then its cells go to either, and each is an object. Patches under `least` cells are none.
    """
    found = []
    best = kinds.argmax(0)
    for patch in patches({(y, x) for y, x in (best > 0).nonzero().tolist()}):
        counts = Counter(int(best[y, x]) for y, x in patch)
        large = [kind for kind, n in counts.items() if n >= max(least, len(patch) / 4)]
        if len(patch) < least:
            continue
        if len(large) < 2:
            large = [int(sum(kinds[1:, y, x] for y, x in patch).argmax()) + 1]      # type: ignore[union-attr]
        for kind in large:
            cells = patch if len(large) == 1 else [
                (y, x) for y, x in patch if max(large, key=lambda k: float(kinds[k, y, x])) == kind]
            ys, xs = torch.tensor(cells).T
            look = looks[:, ys, xs].mean(dim=1).argmax().item()
            found.append(Seen(KINDS[kind - 1], LOOKS[int(look)], (xs.float().mean().item() + 0.5) * CELL,
                              (ys.float().mean().item() + 0.5) * CELL, len(cells)))
    return sorted(found, key=lambda seen: seen.x)


def patches(cells: set[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Groups of cells that touch, corners included."""
    groups = []
    while cells:
        group, edge = [], [cells.pop()]
        while edge:
            y, x = edge.pop()
            group.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & cells
            cells -= near
            edge += near
        groups.append(sorted(group))
    return groups


def look_of(thing: renderer.Thing) -> str:
    """The true look of a thing that the renderer drew."""
    if thing.texture == "plain":
        return next(name for name, value in COLOURS.items() if value == thing.colour)
    if thing.texture in ("striped", "dotted") and thing.second == WHITE:
        return thing.texture
    for instance in INSTANCES:
        if thing.texture == instance.texture and (thing.colour, thing.second) == tuple(map(colour_of, instance.colours)):
            return instance.name
    return "other"


def judge_scene(rng: np.random.Generator) -> Scene:
    """Any kind in any look, the instances' own looks on other kinds too: a leak must be seen as one."""
    scene = renderer.random_scene(rng)
    palette = [*COLOURS.values(), WHITE]
    things = []
    for thing in scene.things:
        draw = rng.random()
        if draw < 0.5:
            instance = INSTANCES[rng.integers(len(INSTANCES))]
            colour, second = map(colour_of, instance.colours)
            thing = replace(thing, texture=instance.texture, colour=colour, second=second)
        elif draw < 0.65:
            first, second = rng.choice(len(palette), 2, replace=False)
            texture = str(rng.choice([name for name in TEXTURES if name != "plain"]))
            thing = replace(thing, texture=texture, colour=palette[first], second=palette[second])
        things.append(thing)
    style = str(rng.choice(MANNERS, p=[0.9, 0.05, 0.05]))
    return replace(scene, things=tuple(things), style=style)


def labels_of(scene: Scene) -> tuple[Tensor, Tensor]:
    """True kind and look of every cell: two int64 [16, 16]; kind 0 is background, -100 a cell half covered."""
    kind, look = torch.zeros(GRID, GRID, dtype=torch.long), torch.full((GRID, GRID), -100)
    if scene.things:
        masks = torch.from_numpy(renderer.object_masks(scene)).float()              # [things, 128, 128]
        share = F.avg_pool2d(masks, CELL)                                           # [things, 16, 16]
        for n, thing in enumerate(scene.things):
            covered = share[n] > 0.4
            kind[(share[n] > 0.15) & ~covered] = -100
            kind[covered] = KINDS.index(thing.kind) + 1
            if not scene.style:
                look[covered] = LOOKS.index(look_of(thing))
    return kind, look


def load_judge(folder: Path = HERE / "judge") -> Judge:
    config = json.loads((folder / "config.json").read_text())
    if (config["kinds"], config["looks"]) != ([*KINDS], [*LOOKS]):
        raise ValueError(f"{folder} names other kinds or looks than judge.py; train it again")
    judge = Judge(config["width"])
    judge.load_state_dict({key: value.float() if value.is_floating_point() else value
                           for key, value in load_file(folder / "model.safetensors").items()})
    return judge.eval()


def draws_all(seen: Sequence[Seen], things: Sequence[renderer.Thing]) -> bool:
    """Every thing of the list is seen as its own object, with its colour or texture if its phrase names one."""
    left = list(seen)
    for thing in things:
        wanted = look_of(thing) if len(thing.phrase.split()) > 1 else None
        match = next((one for one in left if one.kind == thing.kind and wanted in (None, one.look)), None)
        if match is None:
            return False
        left.remove(match)
    return True
