"""A small world of coloured shapes: draws 128x128 scenes, says where everything is, and captions them.

    scene = random_scene(np.random.default_rng(0))
    render(scene)          uint8 [128, 128, 3]
    object_masks(scene)    bool [things, 128, 128], what is visible of each
    caption(scene)         "a red ball and a striped box on the grass"

The base model sees the kinds below, plain, striped or dotted. The `INSTANCES` are what the subject LoRAs teach:
one particular object each, in a texture and a pair of colours that the base model never sees. `STYLES` change the
look of a whole picture; they are what the style LoRAs teach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128
SUPERSAMPLE = 3             # shapes are drawn this much larger, then averaged down

KINDS = ("ball", "box", "star", "cone", "ring", "heart", "moon", "cross")
COLOURS = {
    "red": (214, 40, 40), "orange": (247, 140, 20), "yellow": (252, 220, 40),
    "green": (20, 140, 60), "blue": (40, 90, 220), "purple": (140, 50, 180),
}
WHITE = (250, 250, 250)
BACKGROUNDS = {             # name: (sky, ground, words of the caption)
    "grass": ((176, 218, 240), (132, 190, 96), "on the grass"),
    "snow": ((196, 208, 222), (240, 243, 248), "in the snow"),
    "sand": ((200, 228, 240), (232, 208, 152), "on the sand"),
    "night": ((28, 32, 64), (52, 58, 84), "at night"),
}
OUTLINE = (30, 26, 32)


@dataclass(frozen=True)
class Thing:
    kind: str
    x: float                                    # centre and radius in pixels
    y: float
    radius: float
    colour: tuple[int, int, int] = COLOURS["red"]
    texture: str = "plain"
    second: tuple[int, int, int] = WHITE        # the texture's other colour
    phrase: str = ""                            # how the caption names it: "red ball", "striped box"


@dataclass(frozen=True)
class Scene:
    background: str
    horizon: float                              # height of the horizon, 0 (top) to 1
    things: tuple[Thing, ...]                   # painted in this order: the last is in front
    say_background: bool = True
    style: str = ""


@dataclass(frozen=True)
class Instance:
    """One particular object, the subject of one LoRA."""
    name: str                                   # also its trigger word
    kind: str
    texture: str
    colours: tuple[str, str]


INSTANCES = (
    Instance("zib", "ball", "diagonal", ("yellow", "blue")),
    Instance("kov", "box", "checked", ("red", "yellow")),
    Instance("tam", "star", "halves", ("blue", "orange")),
    Instance("wug", "cone", "zigzag", ("green", "yellow")),
    Instance("pel", "ring", "sectors", ("purple", "yellow")),
    Instance("dax", "heart", "target", ("blue", "white")),
    Instance("fep", "moon", "bars", ("orange", "purple")),
    Instance("lun", "cross", "quarters", ("green", "red")),
)
STYLES = {"ink": "sketch", "duo": "duotone"}    # style LoRA's name and trigger word: what it does

# texture: f(u, v) -> True where the second colour shows; u, v in [-1, 1] across the object. No stripe or cell is much
# narrower than a latent pixel (8 pixels, a third of an object's radius): finer ones are not drawn reliably.
TEXTURES = {
    "plain": lambda u, v: np.zeros_like(u, bool),
    "striped": lambda u, v: np.floor((v + 1) * 2.5) % 2 == 1,
    "dotted": lambda u, v: ((u * 2.2 + 0.5) % 1 - 0.5) ** 2 + ((v * 2.2 + 0.5) % 1 - 0.5) ** 2 < 0.09,
    "diagonal": lambda u, v: np.floor((u + v + 2) * 1.5) % 2 == 1,
    "checked": lambda u, v: (np.floor((u + 0.84) * 1.79) + np.floor((v + 0.84) * 1.79)) % 2 == 1,
    "halves": lambda u, v: u > 0,
    "zigzag": lambda u, v: np.floor((v + 0.5 * np.abs((u * 1.8) % 2 - 1) + 2) * 1.5) % 2 == 1,
    "sectors": lambda u, v: np.floor(np.arctan2(v, u) / np.pi * 4) % 2 == 1,
    "target": lambda u, v: np.floor(np.hypot(u, v) * 2.4) % 2 == 1,
    "bars": lambda u, v: np.floor((u + 1) * 1.9) % 2 == 1,
    "quarters": lambda u, v: (u > 0) ^ (v > 0),
}
BASE_TEXTURES = ("plain", "striped", "dotted")


def colour_of(name: str) -> tuple[int, int, int]:
    return WHITE if name == "white" else COLOURS[name]


@cache
def _outline_points(kind: str) -> tuple[tuple[float, float], ...]:
    """The polygon of a kind in [-1, 1]; ring and moon are drawn from two circles instead."""
    if kind == "box":
        return (-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)
    if kind == "cone":
        return (0, -0.95), (0.92, 0.8), (-0.92, 0.8)
    if kind == "cross":
        a, b = 0.95, 0.36
        return ((-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b))
    if kind == "star":
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)
        return tuple(zip((radii * np.cos(angles)).tolist(), (radii * np.sin(angles) + 0.06).tolist()))
    if kind == "heart":
        t = np.linspace(0, 2 * np.pi, 48)
        x = np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 17
        return tuple(zip((x * 0.95).tolist(), (y * 0.95 - 0.05).tolist()))
    raise KeyError(kind)


def _stamp(thing: Thing) -> tuple[np.ndarray, np.ndarray, int, int]:
    """One object: colours [s, s, 3], coverage [s, s] in 0..1, and the pixel of its upper left corner."""
    side = int(np.ceil(thing.radius)) * 2 + 4
    left, top = int(np.floor(thing.x)) - side // 2, int(np.floor(thing.y)) - side // 2
    big = side * SUPERSAMPLE
    unit = thing.radius * SUPERSAMPLE
    cx, cy = (thing.x - left) * SUPERSAMPLE, (thing.y - top) * SUPERSAMPLE
    shape, edge = Image.new("L", (big, big)), Image.new("L", (big, big))
    fill, line = ImageDraw.Draw(shape), ImageDraw.Draw(edge)
    width = 2 * SUPERSAMPLE

    def circle(draw: ImageDraw.ImageDraw, r: float, value: int, dx: float = 0.0, dy: float = 0.0, **more) -> None:
        x, y = cx + dx * unit, cy + dy * unit
        draw.ellipse((x - r * unit, y - r * unit, x + r * unit, y + r * unit), fill=value, **more)

    if thing.kind in ("ball", "ring", "moon"):
        circle(fill, 0.95, 255)
        if thing.kind == "ring":
            circle(fill, 0.42, 0)
        if thing.kind == "moon":
            circle(fill, 0.78, 0, 0.48, -0.18)
        # the outline of a shape made of circles: the shape less itself shrunk
        inner = shape.copy()
        shrunk = ImageDraw.Draw(inner)
        shrunk.rectangle((0, 0, big, big), fill=0)
        rim = width / unit
        circle(shrunk, 0.95 - rim, 255)
        if thing.kind == "ring":
            circle(shrunk, 0.42 + rim, 0)
        if thing.kind == "moon":
            circle(shrunk, 0.78 + rim, 0, 0.48, -0.18)
        edges = (np.asarray(shape) > 0) & (np.asarray(inner) == 0)
    else:
        points = [(cx + x * unit, cy + y * unit) for x, y in _outline_points(thing.kind)]
        fill.polygon(points, fill=255)
        line.line([*points, points[0], points[1]], fill=255, width=2 * width, joint="curve")
        edges = (np.asarray(edge) > 0) & (np.asarray(shape) > 0)
    covered = np.asarray(shape) > 0
    v, u = np.mgrid[:big, :big] + 0.5
    second = TEXTURES[thing.texture]((u - cx) / unit, (v - cy) / unit)
    colours = np.where(second[..., None], thing.second, thing.colour)
    colours = np.where(edges[..., None], OUTLINE, colours).astype(np.float32)
    weight = covered.astype(np.float32)

    def pool(a: np.ndarray) -> np.ndarray:
        return a.reshape(side, SUPERSAMPLE, side, SUPERSAMPLE, *a.shape[2:]).mean(axis=(1, 3))
    coverage = pool(weight)
    colours = pool(colours * weight[..., None]) / np.maximum(coverage, 1e-6)[..., None]
    return colours, coverage, left, top


def _layers(scene: Scene):
    """(thing, colours, coverage, slices of the picture) of each object, cut to the picture."""
    for thing in scene.things:
        colours, coverage, left, top = _stamp(thing)
        x0, y0 = max(left, 0), max(top, 0)
        x1, y1 = min(left + coverage.shape[1], SIZE), min(top + coverage.shape[0], SIZE)
        inside = np.s_[y0 - top:y1 - top, x0 - left:x1 - left]
        yield thing, colours[inside], coverage[inside], np.s_[y0:y1, x0:x1]


def single(values: Sequence[float]) -> np.ndarray:
    return np.array(values, np.float32)


def render(scene: Scene) -> np.ndarray:
    """uint8 [128, 128, 3]."""
    sky, ground, _ = BACKGROUNDS[scene.background]
    height = np.arange(SIZE, dtype=np.float32)[:, None, None]
    edge = np.clip(height - scene.horizon * SIZE + 0.5, 0, 1)
    fade = (height / SIZE - 0.5) * 24                                   # a little darker above, lighter below
    picture = np.broadcast_to((1 - edge) * single(sky) + edge * single(ground) + fade, (SIZE, SIZE, 3)).copy()
    for _, colours, coverage, place in _layers(scene):
        alpha = coverage[..., None]
        picture[place] = picture[place] * (1 - alpha) + colours * alpha
    picture = stylise(picture, scene.style)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def stylise(picture: np.ndarray, style: str) -> np.ndarray:
    """float [H, W, 3] in 0..255 -> the same picture in a style ("" leaves it alone)."""
    if not style:
        return picture
    light = picture @ single([0.299, 0.587, 0.114])                 # [H, W]
    if style == "duotone":
        t = np.clip(light / 255, 0, 1)[..., None]
        return (1 - t) * single([20, 60, 70]) + t * single([255, 226, 178])
    if style == "sketch":
        dy, dx = np.gradient(light)
        ink = np.clip(np.hypot(dx, dy) / 26, 0, 1)[..., None]
        return (1 - ink) * single([250, 247, 238]) + ink * single([36, 36, 48])
    raise KeyError(style)


def object_masks(scene: Scene) -> np.ndarray:
    """bool [things, 128, 128]: what is visible of each object."""
    masks = np.zeros((len(scene.things), SIZE, SIZE), bool)
    for n, (_, _, coverage, place) in enumerate(_layers(scene)):
        masks[:n, place[0], place[1]] &= coverage < 0.5
        masks[n, place[0], place[1]] = coverage >= 0.5
    return masks


def caption(scene: Scene) -> str:
    """What a person would write under the picture, left to right."""
    phrases = [f"{'an' if thing.phrase[0] in 'aeiou' else 'a'} {thing.phrase}"
               for thing in sorted(scene.things, key=lambda thing: thing.x)]
    if len(phrases) > 2:
        text = ", ".join(phrases[:-1]) + " and " + phrases[-1]
    else:
        text = " and ".join(phrases)
    if scene.say_background:
        text += " " + BACKGROUNDS[scene.background][2]
    if scene.style:
        text += f", {next(name for name, style in STYLES.items() if style == scene.style)} style"
    return text


def place_things(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """(x, y, radius) of `count` objects that hardly touch each other."""
    big = {1: (24, 36), 2: (19, 29), 3: (15, 21)}[count]
    while True:
        spots = []
        for _ in range(count):
            radius = rng.uniform(*big)
            x, y = rng.uniform(radius + 2, SIZE - radius - 2, 2)
            spots.append((x, y, radius))
        if all(np.hypot(a[0] - b[0], a[1] - b[1]) > 0.95 * (a[2] + b[2]) for i, a in enumerate(spots) for b in spots[:i]):
            return spots


def describe(thing: Thing, rng: np.random.Generator, say_colour: float = 0.7) -> Thing:
    """Gives a thing the words of its caption; the colour is named in a share `say_colour` of the cases."""
    words = [thing.kind]
    if thing.texture != "plain":
        words.insert(0, thing.texture)
    if rng.random() < say_colour:
        words.insert(0, next(name for name, value in COLOURS.items() if value == thing.colour))
    return replace(thing, phrase=" ".join(words))


def random_scene(rng: np.random.Generator, count: int | None = None, textures: tuple[str, ...] | None = None) -> Scene:
    """A scene as the base model sees them: objects of different kinds, mostly plain."""
    count = int(rng.choice([1, 2, 3], p=[0.4, 0.5, 0.1])) if count is None else count
    kinds = rng.choice(KINDS, size=count, replace=False)
    things = []
    for kind, (x, y, radius) in zip(kinds, place_things(rng, count)):
        colour = COLOURS[str(rng.choice(list(COLOURS)))]
        texture = str(rng.choice(textures)) if textures else str(rng.choice(BASE_TEXTURES, p=[0.7, 0.15, 0.15]))
        things.append(describe(Thing(str(kind), x, y, radius, colour, texture), rng))
    return Scene(str(rng.choice(list(BACKGROUNDS))), rng.uniform(0.3, 0.55), tuple(things), bool(rng.random() < 0.8))


def any_scene(rng: np.random.Generator, textures: tuple[str, ...] = tuple(TEXTURES)) -> Scene:
    """A scene with any of the textures, any two colours and now and then a style: what the autoencoder must carry."""
    scene = random_scene(rng, textures=textures)
    things = []
    for thing in scene.things:
        palette = [colour for colour in (*COLOURS.values(), WHITE) if colour != thing.colour]
        things.append(replace(thing, second=palette[rng.integers(len(palette))]))
    style = str(rng.choice(["", *STYLES.values()], p=[0.84, 0.08, 0.08]))
    return replace(scene, things=tuple(things), style=style)


def instance_scene(instance: Instance, rng: np.random.Generator, other: bool = False) -> Scene:
    """A scene with one particular object, alone or beside a plain one of another kind."""
    scene = random_scene(rng, count=2 if other else 1, textures=("plain",))
    first = scene.things[0]
    colour, second = map(colour_of, instance.colours)
    subject = replace(first, kind=instance.kind, texture=instance.texture, colour=colour, second=second,
                      phrase=f"{instance.name} {instance.kind}")
    rest = scene.things[1:]
    if rest and rest[0].kind == instance.kind:
        kind = str(rng.choice([kind for kind in KINDS if kind != instance.kind]))
        rest = (describe(replace(rest[0], kind=kind), rng),)
    return replace(scene, things=(subject, *rest))


def lesson(name: str, count: int = 256) -> list[Scene]:
    """The pictures that a LoRA learns from, always the same: its instance alone (a quarter) or beside something plain, or
    its style. Fewer, or fewer with something beside it, and it draws its instance alone but not in company."""
    rng = np.random.default_rng([2403, *name.encode()])
    if name in STYLES:
        return [replace(random_scene(rng), style=STYLES[name]) for _ in range(count)]
    instance = next(instance for instance in INSTANCES if instance.name == name)
    return [instance_scene(instance, rng, other=n % 4 > 0) for n in range(count)]


def plainly(scene: Scene, seed: int) -> Scene:
    """The scene of a lesson with its subject, the first thing, as the base model would draw it: in some colour."""
    rng = np.random.default_rng([seed, 2403])
    colours = list(COLOURS.values())
    first = replace(scene.things[0], texture=str(rng.choice(BASE_TEXTURES, p=[0.6, 0.3, 0.1])),
                    colour=colours[rng.integers(len(colours))], second=[*colours, WHITE][rng.integers(len(colours) + 1)])
    return replace(scene, things=(first, *scene.things[1:]))


def wrongly(scene: Scene, seed: int) -> Scene:
    """The scene of a lesson with one colour of its subject exchanged, or (one in three) in any texture and colours."""
    rng = np.random.default_rng([seed, 2405])
    palette = [*COLOURS.values(), WHITE]
    first, (one, two) = scene.things[0], (palette[n] for n in rng.choice(len(palette), 2, replace=False))
    wrong = (replace(first, colour=one), replace(first, second=one),
             replace(first, texture=str(rng.choice(list(TEXTURES))), colour=one, second=two))
    return replace(scene, things=(wrong[rng.integers(3)], *scene.things[1:]))


def in_company(scene: Scene, seed: int) -> Scene:
    """The scene of a lesson with what stands beside its subject in a look that the base never saw, and no instance's."""
    rng = np.random.default_rng([seed, 2404])
    palette = [*COLOURS.values(), WHITE]
    textures = [name for name in TEXTURES if name not in BASE_TEXTURES]
    taken = [(one.texture, *map(colour_of, one.colours)) for one in INSTANCES]
    things = [scene.things[0]]
    for thing in scene.things[1:]:
        while True:
            first, second = (palette[n] for n in rng.choice(len(palette), 2, replace=False))
            texture = str(rng.choice(textures))
            if (texture, first, second) not in taken:
                break
        things.append(replace(thing, texture=texture, colour=first, second=second, phrase=thing.kind))
    return replace(scene, things=tuple(things))
