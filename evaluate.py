"""Compares the methods on sets of prompts and LoRAs, with the paper's protocol and a judge.

    python evaluate.py                                   a first look at all methods in the embedded world: minutes
    python evaluate.py --prompts 30 --seeds 0-9 --methods clora,merge --out runs/long
    python evaluate.py --model MODEL --sets sets.json    your own model, prompts and LoRAs
    torchrun --nproc-per-node 4 evaluate.py              the same list, split over processes (and GPUs)

Every image is one line of results-<rank>.jsonl, written whole; started again, only what is missing is made.
A column is a method with a recipe in which some settings are changed ("no-mask"). sets.json is a list of
    {"prompt": "a cat and a dog", "loras": [["cat.safetensors:0.9", "cat=sks cat"], ["dog.safetensors", "dog=sks dog"]],
     "style": "ink.safetensors", "references": ["photos/cat", "photos/dog"]}
where style and references (a folder of pictures for each LoRA, for the DINO scores) may be left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

import clora
import report
from cli import (
    DTYPES,
    FOREIGN,
    TOY,
    Parser,
    check_device,
    from_repository,
    is_embedded,
    keep_float32,
    keep_freed_memory,
    out_of_memory,
    read_style,
    read_subject,
    settings_of,
    whole_numbers,
)
from clora import Plan, Step, Subject
from recipe import RECIPES, Recipe, changed
from scheduler import make_scheduler
from text import write_prompts
from weights import find_lora, load_model, split_weight
from weights.lora import printable
from weights.toy import renderer
from weights.toy.judge import Judge, Seen, load_judge  # type: ignore[attr-defined]  # mypy takes the folder judge/

try:
    import fcntl
except ImportError:                     # Windows has no such locks
    fcntl = None                        # type: ignore[assignment]

# name of a column: (method, recipe, settings changed)
COLUMNS: dict[str, tuple[str, str, dict]] = {
    "clora": ("clora", "paper", {}),
    "clora-release": ("clora", "release", {"steps": 50}),           # updated at all of them
    "clora-fast": ("clora", "fast", {}),
    "no-update": ("clora", "paper", {"update_until": -1}),
    "no-mask": ("clora", "paper", {"mask_from": 10_000}),
    "neither": ("clora", "paper", {"update_until": -1, "mask_from": 10_000}),
    "merge": ("merge", "paper", {}),
    "merge-full": ("merge", "paper", {}),       # every LoRA at weight 1 where it has none, see `full_weight`
    "switch": ("switch", "paper", {}),
    "composite": ("composite", "paper", {}),
    "base": ("base", "paper", {}),
}
DEFAULT = tuple(COLUMNS)
CODE: list[str] = []                    # files of your own that an image depends on (examples/own_column.py)
# the paper's recipe with one thing saved, and some together: what recipe fast, 20 steps and 5 repeats, was chosen from
TWENTY: dict = {"steps": 20, "scheduler": "dpm++", "update_until": 9, "refine_at": (0, 4, 8)}
COLUMNS |= {
    "switch-5": ("switch", "paper", {"switch_every": 5}),                   # as its authors' code is set
    "refine-5": ("clora", "paper", {"refine_steps": 5}),
    "refine-0": ("clora", "paper", {"refine_steps": 0}),
    "refine-stop": ("clora", "paper", {"refine_stop": 0.01}),
    "every-2": ("clora", "paper", {"update_every": 2}),
    "update-stop": ("clora", "paper", {"update_stop": 0.03}),
    "mask-every-5": ("clora", "paper", {"mask_every": 5}),
    "uncond-base": ("clora", "paper", {"uncond_from": "base"}),
    "refine-0-base": ("clora", "paper", {"refine_steps": 0, "uncond_from": "base"}),
    "every-2-base": ("clora", "paper", {"refine_steps": 0, "update_every": 2, "uncond_from": "base"}),
    "dpm-20": ("clora", "paper", TWENTY),
    "dpm-20-refine-0": ("clora", "paper", TWENTY | {"refine_steps": 0}),
    "dpm-20-refine-5-base": ("clora", "paper", TWENTY | {"refine_steps": 5, "uncond_from": "base"}),
    "dpm-20-refine-0-base": ("clora", "paper", TWENTY | {"refine_steps": 0, "uncond_from": "base"}),
    "dpm-12-refine-5-base": ("clora", "paper", {"steps": 12, "scheduler": "dpm++", "update_until": 5, "refine_at": (0, 2, 5),
                                                "refine_steps": 5, "uncond_from": "base"}),
    # the paper's recipe with one choice of the released code
    "maps-both": ("clora", "paper", {"maps_from": "both"}),
    "rescale-maps": ("clora", "paper", {"rescale_maps": True}),
    "noise-before": ("clora", "paper", {"noise_from": "before"}),
    "strict-mask": ("clora", "paper", {"mask_ties": False}),
    "update-49": ("clora", "paper", {"update_until": 49}),
    "clora-release-100": ("clora", "release", {}),                          # the recipe as it is
    "steps-100": ("clora", "paper", {"steps": 100, "update_until": 49}),
    "guidance-2.7": ("clora", "paper", {"guidance": 2.0 * 10 / 7.5}),       # the embedded model's 2, raised as 7.5 is to 10
}


# --- the list of images -----------------------------------------------------------------------------------------------

def embedded_sets(split: str, prompts: int, subjects: int) -> list[dict]:
    """Prompts of the embedded world, `subjects` instances each; no prompt twice. With two subjects "tune" shares no pair of
    instances with the others (with three, some combinations). "final" has no prompt of the first 30 of "test", which were
    looked at during development.

    Every set: {"prompt", "loras": [[file, "ball=zib ball"], ...], "truth": [["ball", "zib"], ...]}.
    """
    rng = np.random.default_rng({"tune": 1, "test": 2, "final": 3}[split])
    seen = [one["prompt"] for one in embedded_sets("test", 30, subjects)] if split == "final" else []
    instances = {instance.name: instance for instance in renderer.INSTANCES}
    names = list(instances)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1:]]
    np.random.default_rng(0).shuffle(pairs)
    tuning = pairs[:8]
    for name in names:                              # settings are chosen with every instance: each is in two pairs at least
        missing = 2 - sum(name in pair for pair in tuning)
        tuning = tuning + [pair for pair in pairs if name in pair and pair not in tuning][:max(0, missing)]
    allowed = {pair for pair in pairs if (pair in tuning) == (split == "tune")}
    backgrounds = [words for _, _, words in renderer.BACKGROUNDS.values()]
    sets: list[dict] = []
    drawn = repeated = 0
    while len(sets) < prompts:
        chosen = [str(name) for name in rng.choice(names, subjects, replace=False)]
        if subjects == 2 and tuple(sorted(chosen, key=names.index)) not in allowed:
            continue
        kinds = [instances[name].kind for name in chosen]
        *some, last = [f"a {kind}" for kind in kinds]
        listing = f"{', '.join(some)} and {last}" if some else last
        prompt = f"{listing} {backgrounds[drawn % len(backgrounds)]}"
        drawn += 1
        repeated += 1
        if prompt in seen:
            if repeated > 10_000:
                raise ValueError(f"--prompts is {prompts}; there are only {len(sets)} different ones of this kind")
            continue
        repeated = 0
        seen.append(prompt)
        sets.append({"prompt": prompt,
                     "loras": [[str(TOY / f"loras/{name}.safetensors"), f"{kind}={name} {kind}"]
                               for name, kind in zip(chosen, kinds)],
                     "truth": list(zip(kinds, chosen))})
    return sets


def files_of(one: dict) -> list[str]:
    """The LoRA files of a set, with their weights, the style's last."""
    return [*(file for file, _ in one["loras"]), *filter(None, [one.get("style")])]


def full_weight(one: dict) -> dict:
    """The set with every LoRA at weight 1, unless it has a weight: by itself merging takes 1/K."""
    return {**one, "loras": [[file if split_weight(file)[1] is not None else f"{file}:1", words]
                             for file, words in one["loras"]]}


def are_pairs(value: object) -> bool:
    """Whether this is a list of pairs of texts, as JSON has them."""
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in value)


def read_sets(path: Path) -> list[dict]:
    try:
        sets = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(sets, list) or not sets:
        raise ValueError(f'{path} must hold a list of {{"prompt": ..., "loras": [[FILE, "SUBJECT=TRIGGER"], ...]}}')
    there: set[str] = set()                         # files that were found, so that the hub is asked once for each
    for number, one in enumerate(sets):
        if not isinstance(one, dict) or not {"prompt", "loras"} <= one.keys():
            raise ValueError(f"{path}: set {number} needs a prompt and loras")
        if unknown := one.keys() - {"prompt", "loras", "style", "references", "truth"}:
            raise ValueError(f"{path}: set {number}: {min(unknown)} is not known; use prompt, loras, style, references")
        if not are_pairs(one.get("truth", [])):
            raise ValueError(f'{path}: set {number}: truth must be a list of ["ball", "zib"]')
        if not isinstance(one["prompt"], str) or re.search("[\ud800-\udfff]", one["prompt"]):
            raise ValueError(f"{path}: set {number}: the prompt is no text")
        if not are_pairs(one["loras"]):
            raise ValueError(f'{path}: set {number}: loras must be a list of [FILE, "SUBJECT=TRIGGER"]')
        if len(one["loras"]) > 8:
            raise ValueError(f"{path}: set {number} has {len(one['loras'])} LoRAs; at most 8 subjects can be composed")
        if any(re.search("[\ud800-\udfff]", words) for _, words in one["loras"]):
            raise ValueError(f"{path}: set {number}: a subject or trigger is no text")
        if not isinstance(one.get("style", ""), str) or one.get("style") == "":
            raise ValueError(f"{path}: set {number}: the style is no file name; leave it out where there is none")
        for file in files_of(one):
            name = split_weight(file)[0]
            if name in there:
                continue
            try:
                found = find_lora(name).is_file()
            except ValueError as error:
                raise ValueError(f"{path}: set {number}: {error}") from None
            if not found:
                raise ValueError(f"{path}: set {number}: {file} does not exist (relative paths begin at the current folder)")
            there.add(name)
        folders = one.get("references", [])
        if "references" in one and not (isinstance(folders, list) and len(folders) == len(one["loras"])):
            raise ValueError(f"{path}: set {number}: references must be a list of one folder for each LoRA")
        for folder in folders:
            if not isinstance(folder, str) or not pictures_in(folder):
                raise ValueError(f"{path}: set {number}: there are no pictures in the references {folder}")
            try:
                if folder not in there:
                    read_pictures(folder)
            except ValueError as error:
                raise ValueError(f"{path}: set {number}: {error}") from None
            there.add(folder)
    return sets


# --- scores -----------------------------------------------------------------------------------------------------------

class Scorer:
    """DINO similarity to reference pictures and CLIP score of the prompt, by models that transformers loads.

    `dino` and `clip` are folders or hub ids: "facebook/dino-vits16" and "openai/clip-vit-base-patch32" are the paper's
    kind. A CLIP serves as `dino` too (its image tower), which is what the embedded world does.
    """

    def __init__(self, dino: str, clip: str, device: str):
        from transformers import AutoImageProcessor, AutoModel, CLIPTokenizer
        from transformers.utils import logging
        logging.disable_progress_bar()
        logging.set_verbosity_error()                   # else it tells which layers of these models have no use here
        self.device = device
        try:
            self.clip = AutoModel.from_pretrained(clip).float().to(device).eval()
            self.dino = self.clip if dino == clip else AutoModel.from_pretrained(dino).float().to(device).eval()
            self.tokenizer = CLIPTokenizer.from_pretrained(clip)
            self.processors = [AutoImageProcessor.from_pretrained(name, use_fast=False) for name in (dino, clip)]
            self.references: dict[str, torch.Tensor] = {}
            blank = np.zeros((64, 64, 3), np.uint8)
            self.score(blank, "", [("", lambda: [blank])])          # a model of another kind is found out now
            self.references.clear()
            self.hash = digest([hash_of(self.clip), hash_of(self.dino), *(p.to_json_string() for p in self.processors)])
        except Exception as error:                      # SafetensorError, and whatever a stranger's model raises
            raise ValueError(f"the scoring models cannot be used ({dino}, {clip}): {error}") from None

    def _pixels(self, pictures: list[np.ndarray], processor) -> torch.Tensor:
        """uint8 [H, W, 3] each -> [B, 3, S, S], as the model's own settings say."""
        return processor(images=pictures, return_tensors="pt")["pixel_values"].to(self.device)

    @torch.no_grad()
    def look(self, pictures: list[np.ndarray]) -> torch.Tensor:
        """-> unit vectors [B, D] of the picture encoder (the class token's)."""
        pixels = self._pixels(pictures, self.processors[0])
        tower = getattr(self.dino, "vision_model", self.dino)
        return torch.nn.functional.normalize(tower(pixel_values=pixels).last_hidden_state[:, 0], dim=1)

    @torch.no_grad()
    def score(self, picture: np.ndarray, prompt: str, references: list[tuple[str, Callable[[], list[np.ndarray]]]]) -> dict:
        """Mean similarity to each LoRA's references (its minimum, mean, maximum over the LoRAs), and the CLIP score."""
        for key, pictures in references:
            if key not in self.references:
                self.references[key] = self.look(pictures())
        mine = self.look([picture])
        similar = [(self.references[key] @ mine.T).mean().item() for key, _ in references]
        ids = self.tokenizer([prompt], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        out = self.clip(input_ids=ids.to(self.device), pixel_values=self._pixels([picture], self.processors[1]))
        score = (out.text_embeds * out.image_embeds).sum().item()
        facts = {"clip": round(score, 4)}
        if similar:
            facts |= {"dino_min": round(min(similar), 4), "dino_avg": round(sum(similar) / len(similar), 4),
                      "dino_max": round(max(similar), 4)}
        return facts


def hash_of(model: torch.nn.Module) -> str:
    """SHA-256 of its tensors and their names."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def pictures_in(folder: str | Path) -> list[Path]:
    return [path for path in sorted(Path(folder).glob("*")) if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]


def read_pictures(folder: str) -> list[np.ndarray]:
    """uint8 [H, W, 3] each, upright as a viewer shows them, on white where they are transparent.

    ValueError names a file that is no picture, or has more than 8 bits a value.
    """
    pictures = []
    for path in pictures_in(folder):
        try:
            with Image.open(path) as image:
                if image.mode[0] in "IF":               # converting them would clip what is above 255
                    raise ValueError("it has more than 8 bits a value; save it with 8")
                upright = ImageOps.exif_transpose(image)
                if upright.has_transparency_data:
                    white = Image.new("RGBA", upright.size, "white")
                    upright = Image.alpha_composite(white, upright.convert("RGBA"))
                pictures.append(np.asarray(upright.convert("RGB")))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as a picture ({error})") from None
    return pictures


def lesson_pictures(name: str) -> list[np.ndarray]:
    return [renderer.render(scene) for scene in renderer.lesson(name, 64)]


def references_of(one: dict) -> list[tuple[str, Callable[[], list[np.ndarray]]]]:
    """(name, pictures) for each LoRA of a set: its "references" (folders), or the lessons where all are embedded LoRAs."""
    if "references" in one:
        return [(f"folder {folder}", functools.partial(read_pictures, folder)) for folder in one["references"]]
    paths = [Path(split_weight(file)[0]) for file, _ in one["loras"]]
    known = {instance.name for instance in renderer.INSTANCES}
    if not all(path.parent.resolve() == (TOY / "loras").resolve() and path.stem in known for path in paths):
        return []                                   # of some of the LoRAs alone a minimum would mean something else
    return [(f"lesson {path.stem}", functools.partial(lesson_pictures, path.stem)) for path in paths]


# --- one image --------------------------------------------------------------------------------------------------------

def verdict(seen: list[Seen], truth: list[list[str]], style: tuple[str, str] | None = None) -> dict:
    """success: every subject is there in its own look and no other object wears one of the looks, not even its double.

    With a style (asked, seen), which changes every colour, looks are not judged: success is that every kind of object is
    there, and that the picture has the style.
    """
    there, wanted = [[one.kind, one.look] for one in seen], [[*pair] for pair in truth]
    absent = not {kind for kind, _ in wanted} <= {kind for kind, _ in there}
    facts = {"absent": absent, "extra": len(there) > len(wanted), "seen": there}
    if style is not None:
        asked, found = style
        return {"success": not absent and asked == found, "missing": absent, "styled": asked == found, **facts}
    missing = any(pair not in there for pair in wanted)
    looks = {look for _, look in wanted}
    leak = any(pair[1] in looks and there.count(pair) > wanted.count(pair) for pair in there)
    return {"success": not missing and not leak, "missing": missing, "leak": leak, **facts}


class Maker:
    """Loads every LoRA once and makes the images of the list."""

    def __init__(self, args: argparse.Namespace):
        self.model = load_model(args.model, args.device, DTYPES[args.dtype], args.vae)
        embedded = is_embedded(args.model)
        self.judge: Judge | None = load_judge() if embedded else None
        clip = args.clip or (str(TOY / "clip") if embedded else "openai/clip-vit-base-patch32")
        dino = args.dino or (clip if embedded else "facebook/dino-vits16")
        self.scorer = None if args.no_scores else Scorer(dino, clip, args.device)
        self.scores = None if self.scorer is None else [from_repository(dino), from_repository(clip), self.scorer.hash]
        self.loras: dict = {}
        self.args = args
        self.size = self.model.unet.config.sample_size * self.model.vae.config.factor

    def lora(self, file: str):
        if file not in self.loras:
            self.loras[file] = self.model.lora(file)
        return self.loras[file]

    def subjects(self, one: dict) -> list[Subject]:
        return [read_subject(self.lora, file, words) for file, words in one["loras"]]

    def style(self, one: dict):
        return read_style(self.lora, one.get("style"))

    def settings(self, one: dict, column: str, recipe: Recipe, seed: int) -> dict:
        """What clora.py --from needs to make the image of this seed again; nothing where it would miss your own code."""
        if CODE:
            return {}
        method, name, _ = COLUMNS[column]
        args = argparse.Namespace(model=self.args.model, vae=self.args.vae, prompt=one["prompt"], negative="",
                                  method=method, recipe=name, dtype=self.args.dtype, device=self.args.device,
                                  lora=one["loras"], style=one.get("style"),
                                  low_memory=self.args.low_memory, compile=False)
        return settings_of(args, recipe, self.model, self.subjects(one), self.style(one), seed, (self.size, self.size))

    def check(self, sets: Sequence[dict], recipes: dict[str, Recipe]) -> list[str]:
        """Reads every LoRA and finds every word before the first image, and tries every column's sampler and text encoder.

        -> what a user may not expect of the prompts. ValueError names the set or the column that cannot be drawn.
        """
        for column, recipe in recipes.items():
            try:
                make_scheduler(self.model.scheduler_config, recipe.steps, recipe.scheduler, eta=recipe.eta)
                self.model.text.encode([""], clip_skip=recipe.clip_skip)
            except ValueError as error:
                raise ValueError(f"{column}: {error}") from None
        warnings: dict[str, None] = {}
        for number, one in enumerate(sets):
            try:
                subjects, style = self.subjects(one), self.style(one)
                for method in sorted({COLUMNS[column][0] for column in recipes}):
                    if method != "base" and not subjects and style is None:
                        raise ValueError(f"{method} needs a LoRA, and none is named")
                    prompts, *_ = write_prompts(self.model.text, one["prompt"], subjects, method)
                    for prompt in prompts:
                        if cut := self.model.text.truncated(prompt):
                            warnings[f'set {number}: CLIP reads 77 tokens; of "{prompt}" this is cut off: "{cut}"'] = None
                        if found := FOREIGN.search(prompt):
                            warnings[f'set {number}: "{found[0]}" is read as plain words'] = None
            except ValueError as error:
                raise ValueError(f"set {number}: {error}") from None
        return list(warnings)

    def hashes(self, one: dict) -> list[str]:
        """Of every LoRA that the set names, with PEFT's settings beside it."""
        return [self.lora(split_weight(file)[0]).sha256 for file in files_of(one)]

    def attempt(self, one: dict, column: str, recipe: Recipe, seeds: Sequence[int]) -> list[tuple[np.ndarray | None, dict]]:
        """`make`; if that fails every seed alone, so that one does not take the others with it; then the reason."""
        try:
            return self.make(one, column, recipe, seeds)
        except Exception as error:                  # whatever it is, the other images of a long sweep are wanted
            if isinstance(error, getattr(torch, "AcceleratorError", ())):
                raise                               # a GPU that does nothing any more: they would all fail
            if len(seeds) == 1:
                return [(None, {"error": printable(str(error) or type(error).__name__, 1000)})]
        return [made for seed in seeds for made in self.attempt(one, column, recipe, [seed])]

    def steps(self, one: dict, column: str, plan: Plan, recipe: Recipe, noise: torch.Tensor, seeds: Sequence[int]
              ) -> Iterator[Step]:
        """The loop. A class of your own can hook into it, or note what it yields (examples/own_column.py)."""
        return clora.compose(self.model, plan, recipe, noise, clora.step_generators(noise, seeds), self.args.low_memory)

    def make(self, one: dict, column: str, recipe: Recipe, seeds: Sequence[int]) -> list[tuple[np.ndarray | None, dict]]:
        """One batch -> for each seed: picture uint8 [H, W, 3], what was measured (seconds: the batch's, shared out)."""
        method = COLUMNS[column][0]
        plan = clora.make_plan(self.model, one["prompt"], self.subjects(one), self.style(one), "", method, recipe)
        start, shares = time.time(), []
        noise = torch.cat([clora.initial_noise(self.model, self.size, self.size, seed) for seed in seeds])
        for step in self.steps(one, column, plan, recipe, noise, seeds):
            if step.masks is not None and step.index >= recipe.mask_from:
                shares.append(step.masks.mean(dim=(2, 3)))                          # [B, V]
        # one by one, as clora.py: the VAE needs more memory than all that was before
        pictures = torch.cat([clora.decode(self.model, one[None], self.args.low_memory) for one in step.latents]).numpy()
        made = []
        for b, picture in enumerate(pictures):
            facts: dict = {"seconds": round((time.time() - start) / len(seeds), 3)}
            if shares and method == "clora":
                facts["shares"] = [round(x, 3) for x in torch.stack(shares).mean(0)[b].tolist()]
                facts["mask"] = round(sum(facts["shares"][1:]) / len(facts["shares"][1:]), 3)
            made.append((picture, facts))
        asked = renderer.STYLES.get(Path(split_weight(one.get("style", ""))[0]).stem)
        for picture, facts in made:
            if self.judge is not None and "truth" in one:
                style = (asked, self.judge.styles(picture[None])[0]) if asked else None
                facts |= verdict(self.judge.look(picture[None])[0], one["truth"], style)
            if self.scorer is not None:
                facts |= self.scorer.score(picture, one["prompt"], references_of(one))
        return made


def digest(value) -> str:
    """16 hex digits of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def code_digest() -> str:
    """Of what an image and its verdict depend on beside model, LoRAs and settings: this program and the judge."""
    here = Path(__file__).parent
    names = (*CODE, "attention.py", "clora.py", "evaluate.py", "lora.py", "recipe.py", "scheduler.py", "text.py", "unet.py",
             "vae.py", "weights/__init__.py", "weights/lora.py", "weights/names.py", "weights/toy/judge.py",
             "weights/toy/renderer.py", "weights/toy/judge/config.json", "weights/toy/judge/model.safetensors")
    return digest([hashlib.sha256((here / name).read_bytes()).hexdigest() for name in names])


def folder_digest(folder: str) -> str:
    """Of the pictures in a folder of references."""
    return digest([hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures_in(folder)])


def recipe_of(column: str, settings: dict, changes: dict) -> Recipe:
    """The named recipe, the model's own settings, the command's, and what makes the column what it is."""
    method, name, own = COLUMNS[column]
    recipe = changed(changed(RECIPES[name], settings.get("recipe", {}), "clora.json"), changes, "--set")
    recipe = changed(recipe, own, column)
    if recipe.uncond_from == "base" and method not in ("clora", "base"):
        raise ValueError(f"uncond_from base is not for {column}, which has no variant without LoRAs")
    return recipe


# --- results ----------------------------------------------------------------------------------------------------------

def read_results(folder: Path) -> list[dict]:
    """All complete lines of all results files; a damaged last line counts as not made."""
    lines = []
    for path in sorted(folder.glob("results*.jsonl")):
        for text in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                line = json.loads(text)
                kinds = {"column": str, "set": int, "group": int, "seed": int, "stamp": dict}
                if isinstance(line, dict) and all(isinstance(line.get(key), kind) for key, kind in kinds.items()):
                    lines.append(line)
    return lines


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Nobody else writes this file within the block; ValueError if somebody does. A killed process leaves no lock."""
    with open(path, "ab") as file:
        for _ in range(10):                             # `others_write` may hold it for a moment
            if not (taken := is_locked(file)):
                break
            time.sleep(0.05)
        if taken:
            raise ValueError(f"another process is writing to {path}; wait for it, or give another --out")
        yield


def is_locked(file: BinaryIO) -> bool:
    """Whether another process holds the lock; if not, this one does until the file is closed."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def others_write(folder: Path, rank: int) -> bool:
    """Whether another process of this sweep is still at work."""
    for path in folder.glob("results-*.jsonl"):
        if path.name != f"results-{rank}.jsonl":
            with open(path, "ab") as file:
                if is_locked(file):
                    return True
    return False


def append_line(path: Path, line: dict) -> None:
    """One write of one whole line; what an interrupted write left behind is closed first."""
    damaged = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with open(path, "ab") as file:
        file.write((b"\n" if damaged else b"") + json.dumps(line).encode() + b"\n")


def bootstrap(values: np.ndarray, groups: np.ndarray, rounds: int = 2000) -> tuple[float, float, float]:
    """Mean and 95 % interval of `values`, drawing groups (prompts with the same LoRAs) and then images within them with
    replacement. The LoRAs themselves count as given: for LoRAs drawn anew the interval would have to be wider."""
    rng = np.random.default_rng(0)
    order = np.argsort(groups, kind="stable")
    values = values[order]
    _, starts, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    means = []
    for _ in range(rounds):
        drawn = rng.integers(0, len(sizes), len(sizes))
        first, size = (np.repeat(of[drawn], sizes[drawn]) for of in (starts, sizes))        # of every image's group
        means.append(values[first + rng.integers(0, size)].mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


FEW = 5             # groups from which on there are intervals; drawn from fewer they would be far too narrow


def interval(values: Sequence[float], groups: Sequence[int]) -> tuple[float, float, float] | None:
    """Mean and 95 % interval (`bootstrap`), None where there can be none: too few groups, or measures that are all the same.

    Verdicts (int) that are all the same leave nothing to draw from. Then it is Clopper and Pearson's bound for as many
    independent images as there are groups, as those of one group may be right or wrong together.
    """
    count = len(set(groups))
    if count < FEW:
        return None
    mean, low, high = bootstrap(np.array(values, float), np.array(groups))
    if len(set(values)) > 1:
        return mean, low, high
    if not all(isinstance(value, int) for value in values):
        return None
    beyond = 1 - 0.025 ** (1 / count)
    return mean, max(min(mean, 0.0), mean - beyond), min(1.0, mean + beyond)            # a difference may be below 0


# figures of the table: heading, key of a result, how it is written
FIGURES = (("success", "success", "{:.0%}"), ("a subject is missing or looks wrong", "missing", "{:.0%}"),
           ("an object is absent", "absent", "{:.0%}"), ("a texture leaks", "leak", "{:.0%}"),
           ("an object too many", "extra", "{:.0%}"), ("the style is there", "styled", "{:.0%}"),
           ("mask of a subject", "mask", "{:.0%}"), ("DINO min", "dino_min", "{:.3f}"),
           ("DINO avg", "dino_avg", "{:.3f}"), ("DINO max", "dino_max", "{:.3f}"), ("CLIP", "clip", "{:.3f}"))


def image_of(line: dict) -> tuple[str, int, int]:
    return line["column"], line["set"], line["seed"]


def by_image(lines: list[dict], columns: list[str]) -> dict[str, dict[tuple[int, int], dict]]:
    """{column: {(set, seed): line}} without failures; an image that two processes made counts once.

    In the order of sets and seeds: the bootstrap draws by position, and files hold their lines as they were made.
    """
    made = sorted((line for line in lines if "error" not in line), key=lambda line: (line["set"], line["seed"]))
    return {column: {(line["set"], line["seed"]): line for line in made if line["column"] == column} for column in columns}


def failures(lines: list[dict]) -> dict[tuple[str, int, int], str]:
    """{image: reason} of those that were not made by a later attempt either."""
    good = {image_of(line) for line in lines if "error" not in line}
    return {image_of(line): line["error"] for line in lines if "error" in line and image_of(line) not in good}


def grouping(lines: Collection[dict]) -> str:
    """What the intervals draw by: "group", as images of the same LoRAs are not independent (what those cannot do fails in
    all of them), or, where there are too few combinations of LoRAs, "set", the prompts."""
    return "group" if len({line["group"] for line in lines}) >= FEW else "set"


def table(lines: list[dict], columns: list[str]) -> str:
    """Markdown: a row per method; figures with their 95 % interval, and paired differences to merging and clora.

    The first figure is success, where there is a judge. A figure that only some images have (of masks, of references) is
    of those.
    """
    by = by_image(lines, columns)
    failed = failures(lines)
    notes = []
    if failed:
        (column, *_), reason = next(iter(failed.items()))
        notes = [f"{len(failed)} images failed and are in no figure; the first, of {column}: {reason}"]
    if not any(by.values()):
        return "\n".join(["no image was made", *notes])
    present = [figure for figure in FIGURES if any(figure[1] in line for line in lines)]
    if any("styled" in line for line in lines):             # then looks are not judged
        present = [("a subject is missing" if key == "missing" else name, key, form) for name, key, form in present
                   if key != "absent"]
    compared = [figure for figure in present if figure[1] == "success"] or \
               [figure for figure in present if figure[1] in ("dino_min", "dino_avg", "clip")]
    differences = [(*figure, other) for other in ("merge", "merge-full", "clora") if other in columns for figure in compared]
    if "clora" in columns:
        differences += [(*figure, "clora") for figure in present if figure[1] in ("absent", "leak")]
    headings = ["method", "images", *(name for name, _, _ in present),
                *(f"{name} less {other}'s" for name, _, _, other in differences), "seconds"]
    rows = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]

    made = [line for some in by.values() for line in some.values()]
    by_what = grouping(made)

    def written(form: str, values: list[float], groups: list[int]) -> str:
        if not values:
            return ""
        if "+" in form and not any(values):
            return f"{form.format(0)} (none differs)"
        if (found := interval(values, groups)) is None:
            return form.format(np.mean(values))
        mean, low, high = (form.format(x) for x in found)
        return f"{mean} ({low} to {high})"
    for column in columns:
        done = list(by[column].values())
        asked = len({(line["set"], line["seed"]) for line in lines if line["column"] == column})
        if not asked:
            continue
        cells = []
        for _, name, written_as in present:
            own = [line for line in done if name in line]
            cells.append(written(written_as, [line[name] for line in own], [line[by_what] for line in own]))
        for _, key, form, other in differences:
            pairs = [(line[by_what], line[key] - by[other][at][key]) for at, line in by[column].items()
                     if column != other and key in line and key in by[other].get(at, {})]
            cells.append(written(form.replace(":", ":+"), [d for _, d in pairs], [g for g, _ in pairs]))
        cells.append(f"{np.median([line['seconds'] for line in done]):.1f}" if done else "")
        count = f"{len(done)} of {asked}" if asked > len(done) else str(len(done))          # the others failed
        rows.append(f"| {column} | {count} | {' | '.join(cells)} |")
    loras, prompts = (len({line[what] for line in made}) for what in ("group", "set"))
    if by_what == "group":
        note = f"In brackets: 95 % intervals over {loras} combinations of LoRAs and the images of each."
    elif prompts >= FEW:
        note = f"In brackets: 95 % intervals over {prompts} prompts and the images of each, for these LoRAs alone."
    else:
        note = f"No intervals: {FEW} combinations of LoRAs, or {FEW} prompts, are needed for them."
    notes.insert(0, note)
    return "\n".join([*rows, "", *notes])


def grid(folder: Path, columns: list[str], seeds: tuple[int, ...], prompt: str) -> Image.Image:
    """The first set: methods in columns, seeds in rows."""
    side, top = 128, 40
    width = max(side * len(columns), math.ceil(ImageFont.load_default().getlength(prompt)) + 8)
    sheet = Image.new("RGB", (width, side * len(seeds) + top), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 4), prompt, fill=(0, 0, 0))
    for x, column in enumerate(columns):
        draw.text((x * side + 4, 22), column, fill=(0, 0, 0))
        for y, seed in enumerate(seeds):
            # an image that failed has no file, and one that somebody damaged is no reason to end without a table
            with contextlib.suppress(OSError):
                with Image.open(folder / f"images/{column}-0-{seed}.png") as image:
                    sheet.paste(image.resize((side, side)), (x * side, y * side + top))
    return sheet


def curve(lines: list[dict], columns: list[str]) -> Image.Image:
    """Success (with its interval) against the seconds of an image, a point per column."""
    width, height, left, bottom, top = 760, 460, 60, 50, 20
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    points = {}
    by = by_image(lines, columns)
    by_what = grouping([line for made in by.values() for line in made.values()])
    for column, made in by.items():
        if done := [line for line in made.values() if "success" in line]:
            success = [line["success"] for line in done]
            mean = float(np.mean(success))
            found = interval(success, [line[by_what] for line in done]) or (mean, mean, mean)
            points[column] = float(np.median([line["seconds"] for line in done])), found
    most = 1.3 * max((seconds for seconds, _ in points.values()), default=1.0)

    def at(seconds: float, share: float) -> tuple[float, float]:
        return left + seconds / most * (width - left - 20), height - bottom - share * (height - bottom - top)
    for tenth in range(0, 11, 2):
        draw.line((*at(0, tenth / 10), *at(most, tenth / 10)), fill=(225, 225, 225))
        draw.text((left - 8, at(0, tenth / 10)[1]), f"{tenth * 10}%", fill=(60, 60, 60), font=font, anchor="rm")
        x, y = at(most * tenth / 10, 0)
        draw.text((x, y + 8), f"{most * tenth / 10:.1f}", fill=(60, 60, 60), font=font, anchor="ma")
    draw.text((width / 2, height - 8), "seconds an image", fill=(60, 60, 60), font=font, anchor="ms")
    draw.text((left + 4, top - 4), "images that are a success", fill=(60, 60, 60), font=font, anchor="ls")
    labels: list[tuple[float, float, float]] = []       # names as drawn: left, right, middle
    for n, (column, (seconds, (mean, low, high))) in enumerate(points.items()):
        colour = tuple(part // (1 + n // len(report.COLOURS)) for part in report.COLOURS[n % len(report.COLOURS)])
        x, y = at(seconds, mean)
        draw.line((*at(seconds, low), *at(seconds, high)), fill=colour, width=2)
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        right = x + 8 * len(column)
        while any(abs(y - middle) < 14 and x < end and start < right for start, end, middle in labels):
            y += 14                                     # below the names that are there already
        labels.append((x, right, y))
        draw.text((x + 8, y), column, fill=colour, font=font, anchor="lm")
    return sheet


def evaluate(args: argparse.Namespace, make: Callable[[argparse.Namespace], Maker]) -> int:
    columns = list(dict.fromkeys(name.strip() for name in args.methods.split(",") if name.strip()))
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise ValueError(f"there is no method called {unknown[0]}; choose from {', '.join(COLUMNS)}")
    if args.batch is None:
        args.batch = 3 if is_embedded(args.model) else 1
    if args.curve and Path(args.curve).suffix.lower() != ".png":
        raise ValueError(f"--curve {args.curve} must end in .png")
    if args.curve and not is_embedded(args.model):
        raise ValueError("--curve shows the share of pictures that are right, and only the embedded model's have a judge")
    if args.batch < 1:
        raise ValueError(f"--batch is {args.batch}; it must be at least 1")
    if not columns or not args.seeds:
        raise ValueError("--methods and --seeds must name at least one each")
    if args.model and not is_embedded(args.model) and not args.sets:
        raise ValueError(f"--model {args.model} needs prompts and LoRAs of its own: --sets FILE.json")
    try:
        rank, world, local = (int(os.environ.get(name, default)) for name, default in
                              (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    except ValueError:
        raise ValueError("RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers, as torchrun sets them") from None
    if not 0 <= rank < world:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE {world}; a rank must be between 0 and the size less 1")
    if args.device == "cuda":
        # torchrun: a GPU for each process, which may see no other
        args.device = f"cuda:{local % max(1, torch.cuda.device_count())}"
    args.dtype = args.dtype or ("float16" if args.device.startswith("cuda") else "float32")
    if args.prompts < 1:
        raise ValueError(f"--prompts is {args.prompts}; it must be at least 1")
    check_device(args.device)
    keep_float32(DTYPES[args.dtype])
    try:
        changes = json.loads(args.set or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--set {args.set} is no JSON object like '{{\"alpha\": 2}}' ({error})") from None
    changed(Recipe(), changes, "--set")
    sets = read_sets(Path(args.sets)) if args.sets else embedded_sets(args.split, args.prompts, args.subjects)
    if args.curve and not any("truth" in one for one in sets):
        raise ValueError(f"--curve shows the share of pictures that are right; no set of {args.sets} says what is (truth)")
    if args.style:
        if not find_lora(split_weight(args.style)[0]).is_file():
            raise ValueError(f"--style {args.style}: there is no such file")
        if own := [number for number, one in enumerate(sets) if "style" in one]:
            raise ValueError(f"set {own[0]} of {args.sets} has a style of its own; leave out --style")
        name = Path(split_weight(args.style)[0]).stem           # the embedded styles have triggers too
        words = f", {name} style" if not args.sets and name in renderer.STYLES else ""
        sets = [{**one, "prompt": one["prompt"] + words, "style": args.style} for one in sets]
    for flag, idle, why in (("--split", args.sets and args.split != "test", "--sets has its own prompts"),
                            ("--prompts", args.sets and args.prompts != 6, "--sets has its own"),
                            ("--subjects", args.sets and args.subjects != 2, "--sets has its own prompts"),
                            ("--dino", args.no_scores and args.dino, "--no-scores needs none"),
                            ("--clip", args.no_scores and args.clip, "--no-scores needs none")):
        if idle:
            print(f"evaluate: warning: {flag} changes nothing: {why}", file=sys.stderr)
    folder = Path(args.out)
    new = [place for place in (folder / "images", folder) if not place.exists()]
    for place in (folder / "images", *([Path(args.curve).parent] if args.curve else [])):
        place.mkdir(parents=True, exist_ok=True)
    mine = folder / f"results-{rank}.jsonl"
    with only_writer(mine):             # already while the models load: so the other processes know that this one is at work
        try:
            maker = make(args)
            recipes = {column: recipe_of(column, maker.model.settings, changes) for column in columns}
            for line in maker.check(sets, recipes) if rank == 0 else ():
                print(f"evaluate: warning: {printable(line, 700)}", file=sys.stderr)
        except BaseException:
            with contextlib.suppress(OSError):          # of what was made above what is empty goes again
                if not mine.stat().st_size:
                    mine.unlink()
                for place in new:
                    place.rmdir()
            raise
        return sweep(args, maker, recipes, changes, sets, rank, world, folder)


def rank_of(n: int, columns: int, world: int) -> int:
    """Which process makes batch n of a list that goes through the columns in turn: an equal share of every column each."""
    return (n // columns + n % columns) % world


def sweep(args: argparse.Namespace, maker: Maker, recipes: dict[str, Recipe], changes: dict, sets: list[dict], rank: int,
          world: int, folder: Path) -> int:
    """Makes what is missing of this process' share, then the table of all there is (rank 0)."""
    entered, columns = time.time(), list(recipes)
    # what every line of a results file must have been made with; a folder may hold more sets than are asked for now
    common = {"code": code_digest(), "model": maker.model.hash, "vae": maker.model.vae_hash, "changes": changes,
              "dtype": str(DTYPES[args.dtype]).removeprefix("torch."), "device": torch.device(args.device).type,
              "batch": args.batch, "low_memory": args.low_memory, "scores": maker.scores}
    # 1 and 1.0 are the same setting
    of_column = {column: {"recipe": digest({name: float(value) if type(value) is int else value
                                            for name, value in dataclasses.asdict(recipe).items()})}
                 for column, recipe in recipes.items()}
    pictures = set() if args.no_scores else {folder for one in sets for folder in one.get("references", [])}
    digests = {folder: folder_digest(folder) for folder in pictures}
    of_set = []
    for one in sets:
        named = {**one, "loras": [[from_repository(file), words] for file, words in one["loras"]],
                 **({"style": from_repository(one["style"])} if "style" in one else {})}
        of_set.append({"set": digest(named), "loras": digest(maker.hashes(one)),
                       "references": digest([digests[folder] for folder in one["references"]])
                       if digests and "references" in one else None})
    files = [sorted(maker.lora(split_weight(file)[0]).sha256 for file, _ in one["loras"]) for one in sets]
    groups = [files.index(some) for some in files]

    def results() -> list[dict]:
        """What is in the folder. ValueError: made with other settings, perhaps by another process just now."""
        lines = []
        for line in read_results(folder):
            number = line["set"]
            here = of_set[number] if 0 <= number < len(sets) else {}
            stamp = common | of_column.get(line["column"], {}) | here
            key = next((key for key in stamp if line["stamp"].get(key) != stamp[key]), None)
            if key is None:
                lines.append(line)
            elif "error" not in line:                   # else nothing was made with other settings
                then, now = ("none" if (value := of.get(key)) is None else value for of in (line["stamp"], stamp))
                same = "the same --dino, --clip and --no-scores, or " if key == "scores" else ""
                what = ("prompt, words or files" if key == "set" else key) + (f" for set {number}" if key in here else "")
                raise ValueError(f"{folder} holds results made with another {what} ({then}, now {now}); "
                                 f"give {same}another --out")
        return lines
    lines = results()
    done = {image_of(line) for line in lines if "error" not in line}
    # A batch is always made as a whole, though only what is missing of it is kept: rounding depends on a batch's size,
    # and a sweep that was interrupted or split must end with the same figures.
    batches = [(column, number, args.seeds[start:start + args.batch]) for number in range(len(sets))
               for start in range(0, len(args.seeds), args.batch) for column in columns]
    mine = [(column, number, seeds) for n, (column, number, seeds) in enumerate(batches)
            if rank_of(n, len(columns), world) == rank and any((column, number, seed) not in done for seed in seeds)]
    stems = {f"{column}-{number}-{seed}" for column, number, seeds in mine for seed in seeds}
    report.remove_temporaries(folder / "images", stems)
    if rank == 0:
        report.remove_temporaries(folder, {"table", "grid"})
    began = time.time()
    for n, (column, number, seeds) in enumerate(mine):
        one = full_weight(sets[number]) if column == "merge-full" else sets[number]
        made = maker.attempt(one, column, recipes[column], seeds)
        for seed, (picture, facts) in zip(seeds, made):
            if (column, number, seed) in done:
                continue
            line = {"column": column, "set": number, "seed": seed, "prompt": one["prompt"],
                    "stamp": common | of_column[column] | of_set[number], "group": groups[number], **facts}
            if picture is not None:
                settings = maker.settings(one, column, recipes[column], seed)
                report.save_picture(folder / f"images/{column}-{number}-{seed}.png", picture, {"column": column, **settings})
            append_line(folder / f"results-{rank}.jsonl", line)
        if not args.quiet:
            left = (time.time() - began) / (n + 1) * (len(mine) - n - 1) / 60
            print(f"\r{n + 1} of {len(mine)} batches, {left:.0f} minutes left ", end="", file=sys.stderr, flush=True)
    if not args.quiet:
        print(file=sys.stderr)
    code = 0
    if rank == 0:
        wanted = {(column, number, seed) for column, number, seeds in batches for seed in seeds}

        def missing() -> int:               # what failed before, others may be trying again
            return len(wanted - {image_of(line) for line in read_results(folder) if "error" not in line})
        # the others may have begun a few seconds later
        while missing() and (others_write(folder, rank) or (world > 1 and time.time() < entered + 10)):
            time.sleep(0.5)
        lines = [line for line in results() if image_of(line) in wanted]
        text = table(lines, columns)
        with report.in_place(folder / "table.md") as path:
            path.write_text(text + "\n")
        with report.in_place(folder / "grid.png") as path:
            grid(folder, columns, args.seeds[:6], sets[0]["prompt"]).save(path)
        if args.curve:
            with report.in_place(Path(args.curve)) as path:
                curve(lines, columns).save(path)
        try:
            print(text, flush=True)
        except BrokenPipeError:                 # `| head`: whoever reads has seen enough, and the files are written
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not args.quiet:
            print(f"{folder} has the images, grid.png and table.md", file=sys.stderr)
        code = 1 if lines and all("error" in line for line in lines) else 0
        if count := len(wanted - {image_of(line) for line in lines}):
            print(f"{count} of {len(wanted)} images are still to be made; the table is of the others", file=sys.stderr)
    return code


def make_parser() -> Parser:
    parser = Parser(prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TOY), metavar="MODEL", help="as in clora.py (default: the embedded model)")
    parser.add_argument("--vae", metavar="VAE", help="as in clora.py")
    parser.add_argument("--sets", metavar="FILE.json", help="prompts and LoRAs (default: those of the embedded world)")
    parser.add_argument("--split", choices=("tune", "test", "final"), default="test",
                        help="which prompts of the embedded world: to choose settings by, to develop with, or neither "
                        "(default: test)")
    parser.add_argument("--prompts", type=int, default=6, help="how many prompts of the embedded world (default: 6)")
    parser.add_argument("--subjects", type=int, choices=(1, 2, 3), default=2, help="subjects in each of them (default: 2)")
    parser.add_argument("--style", metavar="FILE[:WEIGHT]", help="a style LoRA on every image")
    parser.add_argument("--seeds", type=whole_numbers, default=(0, 1, 2), metavar="0-9", help="default: 0-2")
    parser.add_argument("--batch", type=int, metavar="N",
                        help="how many seeds to draw at once (default: 3 with the embedded model, else 1)")
    parser.add_argument("--low-memory", action="store_true", help="as in clora.py")
    parser.add_argument("--methods", default=",".join(DEFAULT), metavar="A,B",
                        help=f"from {', '.join(COLUMNS)} (default: the first {len(DEFAULT)})")
    parser.add_argument("--curve", metavar="FILE.png", help="draw success against time")
    parser.add_argument("--set", metavar="JSON",
                        help='settings changed in all columns, as {"alpha": 2}; what a column itself changes wins (the '
                        'steps of clora-release or dpm-20, but not of clora-fast); step numbers do not move with "steps"')
    parser.add_argument("--dino", metavar="MODEL", help="picture encoder, folder or hub id (default: facebook/dino-vits16; "
                        "with the embedded model its own CLIP)")
    parser.add_argument("--clip", metavar="MODEL", help="folder or hub id (default: openai/clip-vit-base-patch32; with the "
                        "embedded model its own)")
    parser.add_argument("--no-scores", action="store_true", help="no DINO and CLIP scores")
    parser.add_argument("--out", default="runs/evaluate", metavar="FOLDER",
                        help="folder of the results and the images (default: runs/evaluate)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16 on CUDA, float32 on the CPU")
    parser.add_argument("--quiet", action="store_true")
    return parser


def main(argv: Sequence[str] | None = None, make: Callable[[argparse.Namespace], Maker] | None = None) -> int:
    """make: a Maker of your own (examples/own_column.py).

    -> exit code: 0, 1 when no image could be made or the GPU failed, 2 for bad input, 130 when interrupted.
    """
    keep_freed_memory()
    try:
        return evaluate(make_parser().parse_args(argv), make or Maker)
    except (ValueError, OSError) as error:
        print(f"evaluate: {printable(str(error), 1000)}", file=sys.stderr)
        return 2
    except getattr(torch, "AcceleratorError", ()) as error:
        reason = printable(str(error).splitlines()[0], 300)
        print(f"evaluate: the GPU failed ({reason}); started again, it goes on where it was", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:        # while the models load; later it is noted with the image
        if not out_of_memory(error):
            raise
        print("evaluate: out of memory while the models load; use --dtype float16 or bfloat16", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nevaluate: interrupted; started again, it goes on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
