"""Compares the methods on sets of prompts and LoRAs, with the paper's protocol and a judge.

    python evaluate.py                                   the embedded world
    python evaluate.py --seeds 0-2 --methods clora,merge
    torchrun --nproc-per-node 4 evaluate.py              the same list, split over processes

Every image is one line of results-<rank>.jsonl, written whole; started again, only what is missing is made.
A set is a prompt with its LoRAs; a variant of a method is a recipe with some settings changed ("clora-nomask").
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import clora
import report
from cli import DTYPES, TOY, Parser, split_weight, whole_numbers
from clora import RECIPES, Recipe, Subject
from lora import read_lora
from weights import load_model
from weights.toy import renderer
from weights.toy.judge import Judge, Seen, load_judge

# name of a column: (method, recipe, settings changed)
METHODS: dict[str, tuple[str, str, dict]] = {
    "clora": ("clora", "paper", {}),
    "clora-release": ("clora", "release", {"steps": 50}),
    "no-update": ("clora", "paper", {"update_until": -1}),
    "no-mask": ("clora", "paper", {"mask_from": 10_000}),
    "neither": ("clora", "paper", {"update_until": -1, "mask_from": 10_000}),
    "merge": ("merge", "paper", {}),
    "switch": ("switch", "paper", {}),
    "composite": ("composite", "paper", {}),
    "base": ("base", "paper", {}),
}


# --- the list of images -----------------------------------------------------------------------------------------------

def embedded_sets(split: str, prompts: int, subjects: int) -> list[dict]:
    """Prompts of the embedded world, `subjects` instances each: "tune" and "test" share no pair of instances.

    Every set: {"prompt", "loras": [[file, "ball=zib ball"], ...], "truth": [["ball", "zib"], ...]}.
    """
    rng = np.random.default_rng({"tune": 1, "test": 2}[split])
    names = [instance.name for instance in renderer.INSTANCES]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1:]]
    np.random.default_rng(0).shuffle(pairs)
    allowed = {tuple(pair) for pair in (pairs[:8] if split == "tune" else pairs[8:])}
    instances = {instance.name: instance for instance in renderer.INSTANCES}
    backgrounds = [words for _, _, words in renderer.BACKGROUNDS.values()]
    sets: list[dict] = []
    while len(sets) < prompts:
        chosen = [str(name) for name in rng.choice(names, subjects, replace=False)]
        if subjects == 2 and tuple(sorted(chosen, key=names.index)) not in allowed:
            continue
        kinds = [instances[name].kind for name in chosen]
        listing = " and ".join([", ".join(f"a {kind}" for kind in kinds[:-1]), f"a {kinds[-1]}"])
        sets.append({"prompt": f"{listing} {backgrounds[len(sets) % len(backgrounds)]}",
                     "loras": [[str(TOY / f"loras/{name}.safetensors"), f"{kind}={name} {kind}"]
                               for name, kind in zip(chosen, kinds)],
                     "truth": list(zip(kinds, chosen))})
    return sets


def read_sets(path: Path) -> list[dict]:
    try:
        sets = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(sets, list) or not sets:
        raise ValueError(f'{path} must hold a list of {{"prompt": ..., "loras": [[FILE, "SUBJECT=TRIGGER"], ...]}}')
    for number, one in enumerate(sets):
        if not isinstance(one, dict) or not {"prompt", "loras"} <= one.keys():
            raise ValueError(f"{path}: set {number} needs a prompt and loras")
        for file, _ in one["loras"]:
            if not Path(split_weight(file)[0]).is_file():
                raise ValueError(f"{path}: set {number}: {file} does not exist")
    return sets


# --- one image --------------------------------------------------------------------------------------------------------

def verdict(seen: list[Seen], truth: list[list[str]]) -> dict:
    """success: every subject is there in its own look and no other object wears one of the looks."""
    missing, leaks = 0, 0
    looks = {look for _, look in truth}
    for kind, look in truth:
        missing += not any(one.kind == kind and one.look == look for one in seen)
    for one in seen:
        leaks += one.look in looks and [one.kind, one.look] not in [list(pair) for pair in truth]
    absent = sum(not any(one.kind == kind for one in seen) for kind, _ in truth)
    return {"success": not missing and not leaks, "missing": missing > 0, "absent": absent > 0, "leak": leaks > 0,
            "seen": [[one.kind, one.look] for one in seen]}


class Maker:
    """Loads every LoRA once and makes the images of the list."""

    def __init__(self, args: argparse.Namespace):
        self.model = load_model(args.model, args.device, DTYPES[args.dtype])
        self.judge: Judge | None = load_judge() if args.model == str(TOY) else None
        self.loras: dict = {}
        self.size = self.model.unet.config.sample_size * self.model.vae.config.factor

    def lora(self, file: str):
        if file not in self.loras:
            self.loras[file] = read_lora(file, self.model.unet, self.model.text.model)
        return self.loras[file]

    def subjects(self, one: dict) -> list[Subject]:
        found = []
        for file, words in one["loras"]:
            path, weight = split_weight(file)
            word, _, trigger = words.partition("=")
            found.append(Subject(self.lora(path), word, trigger or word, weight))
        return found

    def style(self, one: dict):
        if "style" not in one:
            return None
        path, weight = split_weight(one["style"])
        return self.lora(path), 1.0 if weight is None else weight

    def make(self, one: dict, method: str, recipe: Recipe, seed: int) -> tuple[np.ndarray, dict]:
        """-> (picture uint8 [H, W, 3], what was measured)."""
        plan = clora.make_plan(self.model, one["prompt"], self.subjects(one), self.style(one), "", method, recipe)
        start, shares = time.time(), []
        for step in clora.compose(self.model, plan, recipe, clora.initial_noise(self.model, self.size, self.size, seed)):
            if step.masks is not None and step.index >= recipe.mask_from:
                shares.append(step.masks.mean(dim=(1, 2)))
        picture = clora.decode(self.model, step.latents)[0].numpy()
        facts = {"seconds": round(time.time() - start, 3)}
        if shares:
            facts["shares"] = [round(x, 3) for x in torch.stack(shares).mean(0).tolist()]
        if self.judge is not None and "truth" in one:
            facts |= verdict(self.judge.look(picture[None])[0], one["truth"])
        return picture, facts


def recipe_of(column: str, settings: dict, changes: dict) -> Recipe:
    """The named recipe, the model's own settings, the command's, and what makes the column what it is."""
    _, name, own = METHODS[column]
    return dataclasses.replace(RECIPES[name], **{**settings.get("recipe", {}), **changes, **own})


# --- results ----------------------------------------------------------------------------------------------------------

def read_results(folder: Path) -> list[dict]:
    """All complete lines of all results files; a damaged last line counts as not made."""
    lines = []
    for path in sorted(folder.glob("results*.jsonl")):
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


def append_line(path: Path, line: dict) -> None:
    """One write of one whole line; what an interrupted write left behind is closed first."""
    damaged = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with open(path, "ab") as file:
        file.write((b"\n" if damaged else b"") + json.dumps(line).encode() + b"\n")


def bootstrap(values: np.ndarray, groups: np.ndarray, rounds: int = 2000) -> tuple[float, float, float]:
    """Mean and 95 % interval of `values`, drawing prompts (groups) and then seeds within them with replacement."""
    rng = np.random.default_rng(0)
    members = [values[groups == g] for g in np.unique(groups)]
    means = []
    for _ in range(rounds):
        drawn = [members[i] for i in rng.integers(0, len(members), len(members))]
        means.append(np.concatenate([rng.choice(m, len(m)) for m in drawn]).mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def table(lines: list[dict], columns: list[str]) -> str:
    """Markdown: a row per method, each figure with its interval, and the paired difference against merge."""
    def interval(values: tuple[float, float, float]) -> str:
        return f"{values[0]:.0%} ({values[1]:.0%} to {values[2]:.0%})"
    by: dict[str, dict] = {column: {} for column in columns}
    for line in lines:
        if "success" in line:
            by[line["column"]][line["set"], line["seed"]] = line
    rows = ["| method | images | success | a subject is missing | a texture leaks | success less merge's | seconds |",
            "|---|---|---|---|---|---|---|"]
    for column in columns:
        done = list(by[column].values())
        if not done:
            continue
        groups = np.array([r["set"] for r in done])
        cells = [interval(bootstrap(np.array([float(r[key]) for r in done]), groups))
                 for key in ("success", "missing", "leak")]
        paired = [(float(r["success"]) - float(by["merge"][key]["success"]), key[0])
                  for key, r in by[column].items() if key in by.get("merge", {})]
        difference = "" if column == "merge" or not paired else "{:+.0%} ({:+.0%} to {:+.0%})".format(
            *bootstrap(np.array([p[0] for p in paired]), np.array([p[1] for p in paired])))
        seconds = np.median([r["seconds"] for r in done])
        rows.append(f"| {column} | {len(done)} | {' | '.join(cells)} | {difference} | {seconds:.1f} |")
    return "\n".join(rows)


def grid(folder: Path, columns: list[str], number: int, seeds: tuple[int, ...], prompt: str) -> Image.Image:
    """Methods in columns, seeds in rows."""
    side, top = 128, 40
    sheet = Image.new("RGB", (side * len(columns), side * len(seeds) + top), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 4), prompt, fill=(0, 0, 0))
    for x, column in enumerate(columns):
        draw.text((x * side + 4, 22), column, fill=(0, 0, 0))
        for y, seed in enumerate(seeds):
            path = folder / f"images/{column}-{number}-{seed}.png"
            if path.exists():
                with Image.open(path) as image:
                    sheet.paste(image.resize((side, side)), (x * side, y * side + top))
    return sheet


def main(args: argparse.Namespace) -> int:
    columns = [name.strip() for name in args.methods.split(",") if name.strip()]
    if unknown := [name for name in columns if name not in METHODS]:
        raise ValueError(f"there is no method called {unknown[0]}; choose from {', '.join(METHODS)}")
    if not columns or not args.seeds:
        raise ValueError("--methods and --seeds must name at least one each")
    changes = json.loads(args.set) if args.set else {}
    if strange := changes.keys() - Recipe.__dataclass_fields__.keys():
        raise ValueError(f"--set: there is no setting called {min(strange)}")
    sets = read_sets(Path(args.sets)) if args.sets else embedded_sets(args.split, args.prompts, args.subjects)
    if args.style:
        sets = [{**one, "style": args.style} for one in sets]
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = Path(args.out)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    maker = Maker(args)
    # what every line of a results file must have been made with
    stamp = {"model": maker.model.hash(), "sets": hashlib.sha256(json.dumps(sets).encode()).hexdigest()[:16],
             "changes": changes, "dtype": args.dtype}
    lines = read_results(folder)
    for line in lines:
        if different := [key for key in stamp if line["stamp"][key] != stamp[key]]:
            raise ValueError(f"{folder} holds results made with another {different[0]} ({line['stamp'][different[0]]}, "
                             f"now {stamp[different[0]]}); give another --out")
    done = {(line["column"], line["set"], line["seed"]) for line in lines if "error" not in line}
    todo = [(column, number, seed) for number in range(len(sets)) for seed in args.seeds for column in columns]
    mine = [item for n, item in enumerate(todo) if n % world == rank and item not in done]
    for n, (column, number, seed) in enumerate(mine):
        line = {"column": column, "set": number, "seed": seed, "prompt": sets[number]["prompt"], "stamp": stamp}
        try:
            recipe = recipe_of(column, maker.model.settings, changes)
            picture, facts = maker.make(sets[number], METHODS[column][0], recipe, seed)
            report.save_picture(folder / f"images/{column}-{number}-{seed}.png", picture,
                                {key: line[key] for key in ("column", "prompt")} | {"seed": str(seed)})
            line |= facts
        except (ValueError, RuntimeError) as error:
            line["error"] = " ".join(str(error).split())
        append_line(folder / f"results-{rank}.jsonl", line)
        if not args.quiet:
            print(f"\r{n + 1} of {len(mine)}", end="", file=sys.stderr, flush=True)
    if rank == 0:
        wanted = set(todo)
        lines = [line for line in read_results(folder) if (line["column"], line["set"], line["seed"]) in wanted]
        text = table(lines, columns)
        print(text)
        with report.in_place(folder / "table.md") as path:
            path.write_text(text + "\n")
        with report.in_place(folder / "grid.png") as path:
            grid(folder, columns, 0, args.seeds[:6], sets[0]["prompt"]).save(path)
        failed = [line for line in lines if "error" in line]
        if failed:
            print(f"{len(failed)} images failed; the first: {failed[0]['error']}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    parser = Parser(prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TOY))
    parser.add_argument("--sets", metavar="FILE.json", help="prompts and LoRAs (default: those of the embedded world)")
    parser.add_argument("--split", choices=("tune", "test"), default="test", help="which prompts of the embedded world")
    parser.add_argument("--prompts", type=int, default=30, help="how many prompts of the embedded world")
    parser.add_argument("--subjects", type=int, choices=(1, 2, 3), default=2, help="subjects in each of them")
    parser.add_argument("--style", metavar="FILE[:WEIGHT]", help="a style LoRA on every image")
    parser.add_argument("--seeds", type=whole_numbers, default=tuple(range(10)), metavar="0-9")
    parser.add_argument("--methods", default=",".join(METHODS), help=", ".join(METHODS))
    parser.add_argument("--set", metavar="JSON", help='settings changed for all methods, as {"alpha": 2}')
    parser.add_argument("--out", default="runs/evaluate", metavar="FOLDER")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--quiet", action="store_true")
    try:
        sys.exit(main(parser.parse_args()))
    except (ValueError, OSError) as error:
        print(f"evaluate: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
