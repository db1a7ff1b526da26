"""Runs an image again from the settings that it carries: python clora.py --from image.png [flags that change something].

The settings come from strangers. They are read as arguments by the command line's own parser, never run; what they may say
is a list (KEPT), so that no image can name a place to write to; and the hashes tell which files have changed since.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import report
from clora import Subject
from lora import LoRA
from recipe import Recipe
from weights import Model, hub_place, split_weight

KEPT = ("model", "vae", "prompt", "negative", "method", "seed", "height", "width", "dtype", "device", "low_memory",
        "compile", "style")


def recall(argv: Sequence[str], image: Path, make_parser: Callable[..., argparse.ArgumentParser]) -> argparse.Namespace:
    """The arguments that made an image, with those of argv on top.

    Beside what argv gives: `recorded` has the recipe's values (none if argv names another --recipe), `chunks` the settings,
    `given` what argv puts in the place of the image's files: "model", "vae", "style", "subject ball".
    A --lora of argv takes the place of the image's for the same word, and with '' for a file there is none for it any more.
    ValueError: settings that cannot be used.
    """
    chunks = report.load_settings(image)
    try:
        words = shlex.split(chunks["command"])
        if words[:2] != ["python", "clora.py"]:
            raise ValueError("its command is not one of clora.py")
        then = make_parser(add_help=False).parse_args(words[2:])
        if then.prompt is None:
            raise ValueError("its command has no --prompt")
        hashes_of(chunks)
    except ValueError as error:
        raise ValueError(f"the settings of {image} cannot be used: {error}") from None
    kept = {name: getattr(then, name) for name in KEPT}
    args = make_parser().parse_args(argv, argparse.Namespace(**kept, recipe=None, lora=None))
    args.chunks, args.recorded = chunks, {}
    args.given = {name for name in ("model", "style") if getattr(args, name) != kept[name]}
    if (args.vae or None) != then.vae:
        args.given.add("vae")
    given = {word_of(words): [file, words] for file, words in args.lora or []}
    args.given |= {f"subject {word}" for word in given}
    if args.recipe is None:
        fields = [field.name for field in dataclasses.fields(Recipe)]
        args.recipe = then.recipe
        args.recorded = {name: getattr(then, name) for name in fields if getattr(then, name) is not None}
    if args.model == then.model:
        args.model = locate(then.model, image)
    if args.vae and args.vae == then.vae:
        args.vae = locate(then.vae, image, "--vae VAE")
    if args.style is not None and args.style == then.style:
        args.style = locate(then.style, image, "--style FILE")
    recorded = {word_of(words): (file, words) for file, words in then.lora or []}
    if extra := [word for word, (file, _) in given.items() if not file and word not in recorded]:
        raise ValueError(f'{image} has no LoRA for "{extra[0]}" that could be left out')
    loras = {word: given.get(word) or [locate(file, image, f'--lora FILE "{words}"'), words]
             for word, (file, words) in recorded.items()}
    args.lora = [pair for pair in {**loras, **given}.values() if pair[0]]               # in the image's order
    return args


def word_of(words: str) -> str:
    return words.partition("=")[0].strip().lower()


def locate(name: str, image: Path, remedy: str = "") -> str:
    """Recorded paths are relative to where the user was: here, around the image, or the repository. As recorded if nowhere.

    ValueError if there is a remedy, the flag that says where the file is now, and `name` is no place on the hub either.
    """
    path, _ = split_weight(name)
    beside = image.absolute().parent
    for text in (name, path):                                       # "zib:2" may be a file's own name
        for folder in (Path(), beside, beside.parent, Path(__file__).parent):
            if (folder / text).exists():
                return name if folder == Path() else str(folder / text) + name[len(text):]
    if remedy and hub_place(path) is None:
        raise ValueError(f"{image} was made with {path}, which is not there; say where it is: {remedy}")
    return name


def same_command(one: str, other: str, by_name: bool) -> bool:
    """Whether two images' commands say the same; `by_name`: a file counts by its name alone, wherever it lies."""
    def bare(command: str) -> list[str]:
        words = shlex.split(command)
        return [Path(word).name if flag in ("--model", "--vae", "--lora", "--style") else word
                for flag, word in zip(["", *words], words)]
    return one == other or (by_name and bare(one) == bare(other))


def hashes_of(chunks: dict[str, str]) -> dict[str, str]:
    """{"model", "vae", "style" or "subject " and its word: hash} as the image has them. ValueError: damaged."""
    try:
        model, vae, loras, style = (json.loads(chunks.get(key, "null")) for key in ("model", "vae", "loras", "style"))
        hashes = {"model": model["hash"], **{f"subject {one['subject'].lower()}": one["sha256"] for one in loras}}
        if style is not None:
            hashes["style"] = style["sha256"]
        if vae is not None:
            hashes["vae"] = vae["hash"]
        if not all(isinstance(one, str) for one in hashes.values()):
            raise TypeError
        return hashes
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError("they are damaged") from None


def changed_files(args: argparse.Namespace, model: Model, subjects: Sequence[Subject], style: tuple[LoRA, float] | None
                  ) -> list[str]:
    """A line for every file that is not what the image was made with, but for what the flags put in its place."""
    now = {"model": (args.model, model.hash), **({"vae": (args.vae, model.vae_hash)} if model.vae_hash else {}),
           **{f"subject {s.word.lower()}": (s.lora.path, s.lora.sha256) for s in subjects}}
    if style is not None:
        now["style"] = style[0].path, style[0].sha256
    return [f"{now[key][0]} is not what {args.source} was made with (hash {now[key][1][:8]}, then {then[:8]})"
            for key, then in hashes_of(args.chunks).items() if key in now and key not in args.given and now[key][1] != then]
