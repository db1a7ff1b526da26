"""Measures the embedded model: python weights/toy/check.py [--only judge vae base maps masks lora]

    judge   held-out accuracy on the renderer's pictures, and its confusions
    vae     how often the judge reads a reconstruction as it reads the picture
    base    prompts of one and two plain objects, new noise, 50 DDIM steps: is every named object there, in its colour?
            (All prompts of one object and a third of the others are captions of training pictures: there are few to say.)
    maps    share of the noun's map inside the object's box, steps 5 to 25
    masks   share of the picture that each of two subjects' masks takes, and that several claim, with and without updates
    lora    each LoRA alone, in four prompts (a style: eight): is its instance (or style) there?
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))            # so that it runs as a script from anywhere

from clora import Subject, compose, initial_noise, make_plan, recipe_for
from lora import attach, merged_weights
from scheduler import make_scheduler
from weights import Model, load_model
from weights.toy import renderer
from weights.toy.judge import LOOKS, draws_all, judge_scene, load_judge, look_of

the_judge = functools.cache(load_judge)


def pictures_of(model: Model, latents: torch.Tensor) -> np.ndarray:
    """[B, 4, 16, 16] -> uint8 [B, 128, 128, 3]."""
    out = model.vae.decode(latents / model.vae.config.scaling_factor)
    return ((out / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def sample(model: Model, prompts: list[str], lora=None, seed: int = 0, maps: bool = False):
    """50 DDIM steps for all prompts in one batch -> (pictures, mean maps of steps 5 to 25 [B, 8, 8, 77] or None)."""
    guidance = model.settings["recipe"]["guidance"]
    merged = merged_weights(model.text.model, [(lora, 1.0)]) if lora and lora.text_encoder else None
    context = torch.cat([model.text.encode([""] * len(prompts), merged), model.text.encode(prompts, merged)])
    attach(model.unet, [lora] if lora else [])
    adapters = torch.ones(2 * len(prompts), 1) if lora else None
    scheduler = make_scheduler(model.scheduler_config, 50, "ddim")
    z = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    layers = model.unet.map_layers(model.map_level) if maps else ()
    kept = []
    for i, t in enumerate(scheduler.timesteps):
        noise, probs = model.unet(torch.cat([z, z]), t, context, adapters, layers)
        if maps and 5 <= i <= 25:
            kept.append(torch.stack([p[len(prompts):].mean(1) for p in probs.values()]).mean(0))
        uncond, cond = noise.chunk(2)
        z, _ = scheduler.step(uncond + guidance * (cond - uncond), i, z)
    return pictures_of(model, z), torch.stack(kept).mean(0).unflatten(1, (8, 8)) if maps else None


def check_judge(model: Model) -> None:
    """Held-out pictures of all sorts; a thing is compared with what is seen nearest to it."""
    rng = np.random.default_rng(1001)
    right: dict[int, list[bool]] = {1: [], 2: [], 3: []}                            # by the number of things
    styles: list[bool] = []                                                         # told right, of all pictures
    styled: list[bool] = []                                                         # every kind seen, of those in a style
    pairs: dict[str, Counter] = {"kind": Counter(), "look": Counter()}              # (true, seen): how often
    for _ in range(500):
        scene = judge_scene(rng)
        picture = renderer.render(scene)[None]
        (seen,) = the_judge().look(picture)
        styles.append(the_judge().styles(picture) == [scene.style])
        if scene.style:
            styled.append(all(any(one.kind == thing.kind for one in seen) for thing in scene.things))
            continue
        truth = sorted((thing.kind, look_of(thing)) for thing in scene.things)
        right[len(truth)].append(truth == sorted((one.kind, one.look) for one in seen))
        for thing in scene.things:
            near = min(seen, key=lambda one: (one.x - thing.x) ** 2 + (one.y - thing.y) ** 2, default=None)
            pairs["kind"][thing.kind, near.kind if near else "nothing"] += 1
            pairs["look"][look_of(thing), near.look if near else "nothing"] += 1
    shares = {what: sum(n for (true, seen), n in found.items() if true == seen) / found.total()
              for what, found in pairs.items()}
    every = sum(right.values(), [])
    print(f"judge: {sum(every)} of {len(every)} held-out pictures read without any error ({np.mean(every):.1%}; "
          f"{', '.join(f'{sum(some)} of {len(some)} with {n}' for n, some in right.items())}); "
          f"kind right {shares['kind']:.1%}, look right {shares['look']:.1%} of {pairs['kind'].total()} things; style told "
          f"right in {np.mean(styles):.1%} of 500, every kind seen in {sum(styled)} of the {len(styled)} in a style")
    for what, names in (("kind", renderer.KINDS), ("look", LOOKS)):
        print(confusion(what, names, pairs[what]))


def confusion(what: str, names: tuple[str, ...], pairs: Counter) -> str:
    """Markdown: true in rows, seen in columns; columns that nothing was mistaken for are left out."""
    wrong = [name for name in (*names, "nothing") if any(true != seen and seen == name for true, seen in pairs)]
    rows = [f"| true {what} | seen right | " + "".join(f"as {name} | " for name in wrong), "|---" * (len(wrong) + 2) + "|"]
    for true in names:
        cells = [str(pairs[true, name] or "") if name != true else "" for name in wrong]
        count = sum(n for (one, _), n in pairs.items() if one == true)
        rows.append(f"| {true} | {pairs[true, true]} of {count} | {' | '.join(cells)} |")
    return "\n".join(row.rstrip() for row in rows)


@torch.no_grad()
def check_vae(model: Model) -> None:
    """Each picture is read twice, as it is and coded and decoded again; a thing counts where its kind and look are seen."""
    rng, pictures_right = np.random.default_rng(1002), []
    total, seen = Counter(), {"originals": Counter(), "reconstructions": Counter()}         # things, by look
    for _ in range(120):
        scenes = [scene for scene in (judge_scene(rng) for _ in range(10)) if not scene.style]
        pictures = np.stack([renderer.render(scene) for scene in scenes])
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1              # [B, 3, 128, 128]
        again = pictures_of(model, model.vae.encode(x)[0] * model.vae.config.scaling_factor)
        for scene, *both in zip(scenes, the_judge().look(pictures), the_judge().look(again)):
            truth = Counter((thing.kind, look_of(thing)) for thing in scene.things)
            read = [Counter((one.kind, one.look) for one in found) for found in both]
            pictures_right.append([one == truth for one in read])
            total.update(look for _, look in truth.elements())
            for name, one in zip(seen, read):
                seen[name].update(look for _, look in (truth & one).elements())
    count, (theirs, mine) = len(pictures_right), np.mean(pictures_right, axis=0)
    print(f"vae: the judge reads {mine:.1%} of {count} reconstructions without any error, {theirs:.1%} of the originals")
    world = [look for look in LOOKS if look != "other"]
    for name, looks in (("striped", ["striped"]), ("dotted", ["dotted"]), ("checked (kov)", ["kov"]),
                        ("in any look of this world", world), ("in a texture or colours that nobody was taught", ["other"])):
        things, old, new = (sum(found[look] for look in looks) for found in (total, *seen.values()))
        print(f"vae: of {things} things {name} it knows {new} in the reconstructions ({new / things:.1%}), "
              f"{old} in the originals ({old / things:.1%})")


def check_base(model: Model, count: int = 200) -> None:
    rng, right = np.random.default_rng(1003), {1: [], 2: []}
    scenes = [renderer.random_scene(rng, count=1 + n % 2, textures=("plain",)) for n in range(count)]
    for start in range(0, count, 20):
        batch = scenes[start:start + 20]
        pictures, _ = sample(model, [renderer.caption(scene) for scene in batch], seed=start)
        for scene, seen in zip(batch, the_judge().look(pictures)):
            right[len(scene.things)].append(draws_all(seen, scene.things))
    both = right[1] + right[2]
    print(f"base: {np.mean(both):.1%} of {count} prompts drawn with every object and named colour "
          f"(one object {np.mean(right[1]):.1%}, two objects {np.mean(right[2]):.1%})")


def check_maps(model: Model) -> None:
    rng, shares = np.random.default_rng(1004), []
    scenes = [renderer.random_scene(rng, count=1, textures=("plain",)) for _ in range(60)]
    for start in range(0, 60, 20):
        prompts = [renderer.caption(scene) for scene in scenes[start:start + 20]]
        pictures, maps = sample(model, prompts, seed=100 + start, maps=True)
        for scene, prompt, seen, one in zip(scenes[start:], prompts, the_judge().look(pictures), maps):
            thing = scene.things[0]
            match = next((found for found in seen if found.kind == thing.kind), None)
            if match is None:
                continue
            # half the side of a square of as many cells, and 15 % more: no object is a square
            reach = max(16.0, 4.6 * match.cells ** 0.5)
            centres = (np.arange(8) + 0.5) * 16
            box = (abs(centres[:, None] - match.y) < reach) & (abs(centres[None] - match.x) < reach)
            heat = one[:, :, model.text.find(prompt, thing.kind)[0]].numpy()
            shares.append(heat[box].sum() / heat.sum())
    print(f"maps: {np.mean(shares):.1%} of the noun's map lies inside the object's box (median {np.median(shares):.1%}, "
          f"worst {np.min(shares):.1%}, {len(shares)} pictures)")


def masks_of(model: Model, subjects: int, update_until: int, count: int) -> list[torch.Tensor]:
    """The subjects' masks at all steps, [S, K, 16, 16] for each of `count` tuning prompts."""
    from evaluate import embedded_sets
    recipe, masks = recipe_for(model, update_until=update_until), []
    for number, one in enumerate(embedded_sets("tune", count, subjects)):
        loras = [Subject(model.lora(file), *words.split("=")) for file, words in one["loras"]]
        plan = make_plan(model, one["prompt"], loras, recipe=recipe)
        steps = compose(model, plan, recipe, initial_noise(model, 128, 128, number))
        masks.append(torch.stack([step.masks[0, 1:] for step in steps]))
    return masks


def overlap(masks: list[torch.Tensor]) -> float:
    """The share of the picture that more than one subject claims, mean of all steps."""
    return float(np.mean([(one.sum(dim=1) > 1).float().mean().item() for one in masks]))


def check_masks(model: Model, count: int = 40) -> None:
    """The share of each of two masks without latent updates, and what several claim together, without and with them."""
    until = recipe_for(model).update_until
    two, three = (masks_of(model, subjects, -1, count) for subjects in (2, 3))
    shares = [share for one in two for share in one.mean(dim=(0, 2, 3)).tolist()]
    fair = np.mean([0.1 <= share <= 0.6 for share in shares])
    low, middle, high = np.quantile(shares, [0.05, 0.5, 0.95])
    print(f"masks: one of two subjects takes {middle:.0%} of the picture (median; {low:.0%} to {high:.0%} in nine of ten); "
          f"{fair:.0%} of the masks take 10% to 60%")
    for subjects, masks in ((2, two), (3, three)):
        print(f"masks: of {subjects} subjects, more than one claims {overlap(masks):.1%} of the picture, "
              f"{overlap(masks_of(model, subjects, until, count)):.1%} with updates", flush=True)


def check_lora(model: Model, count: int) -> None:
    backgrounds = [words for _, _, words in renderer.BACKGROUNDS.values()]
    for path in sorted((HERE / "loras").glob("*.safetensors")):
        lora, right = model.lora(path), 0
        instance = next((one for one in renderer.INSTANCES if one.name == path.stem), None)
        kinds = renderer.KINDS
        for start in range(0, count, 20):
            size = min(20, count - start)
            if instance:
                prompts = [f"a {path.stem} {instance.kind} {backgrounds[n % 4]}" for n in range(size)]
            else:
                prompts = [f"a {kinds[n % 8]} {backgrounds[n % 4]}, {path.stem} style" for n in range(size)]
            pictures, _ = sample(model, prompts, lora, seed=1000 + start)
            if instance:
                right += sum(any((one.kind, one.look) == (instance.kind, instance.name) for one in seen)
                             for seen in the_judge().look(pictures))
            else:
                right += sum(style == renderer.STYLES[path.stem] for style in the_judge().styles(pictures))
        what = f"{instance.texture} {instance.kind}" if instance else renderer.STYLES[path.stem]
        print(f"lora: {path.stem} ({what}) is there in {right / count:.0%} of {count} images", flush=True)


CHECKS = {"judge": check_judge, "vae": check_vae, "base": check_base, "maps": check_maps, "masks": check_masks,
          "lora": check_lora}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CHECKS)
    parser.add_argument("--images", type=int, default=100, help="images per LoRA")
    args = parser.parse_args()
    if args.images < 1:
        parser.error(f"--images is {args.images}; it must be at least 1")
    try:
        toy = load_model(HERE)
        for name, check in CHECKS.items():
            if not args.only or name in args.only:
                check(toy, **({"count": args.images} if name == "lora" else {}))
    except (ValueError, OSError) as error:
        print(f"check.py: {error}", file=sys.stderr)
        sys.exit(2)
