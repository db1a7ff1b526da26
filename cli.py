"""The command line of clora.py: arguments, files and messages, so that clora.py holds the method alone."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import inspect
import io
import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import clora
import report
import rerun
from clora import METHODS, Step, Subject
from lora import LoRA
from recipe import CHOICES, RECIPES, Recipe, changed
from scheduler import make_scheduler
from weights import Model, find_lora, load_model, split_weight
from weights.lora import Mismatch, describe, printable, trigger_words

# Left alone, MKL with several threads on an Intel CPU may add up in another order every time. It reads this at its
# first call.
os.environ.setdefault("MKL_CBWR", "AUTO")
REPOSITORY = Path(__file__).resolve().parent
TOY = REPOSITORY / "weights" / "toy"
with contextlib.suppress(ValueError):       # Windows: from another drive there is no relative path
    TOY = Path(os.path.relpath(TOY))        # short in messages
DEMO = {"prompt": "a ball and a ring on the grass",
        "lora": [[str(TOY / "loras/zib.safetensors"), "ball=zib ball"],
                 [str(TOY / "loras/pel.safetensors"), "ring=pel ring"]]}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
          "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# what other programs do not read as words: <lora:cat:0.8>, (cat:1.3), ((cat)), [cat|dog], embedding:x, BREAK, AND
FOREIGN = re.compile(r"<\s*(?:lora|lyco|hypernet)\s*:[^>]*>|\(\([^()]*\)\)"
                     r"|(?:\([^()]*)?[^\W\d]+\s*:(?:\s*\d?\.\d+|[0-2])\s*[)\]]"
                     r"|\[[^\[\]|]*\|[^\[\]]*\]|\bembedding:\w+|\b(?-i:BREAK|AND)\b", re.IGNORECASE)
# what argparse says (a pattern of its beginning), and what to do
HINTS = {r"argument --lora: expected 2": "write --lora FILE SUBJECT=TRIGGER, or --style FILE for the whole picture",
         r"argument --seed: invalid int value: '\d+[-,]": "several are --seeds 0-9",
         r"unrecognized arguments: --negative": "the negative prompt is --negative",
         r"unrecognized arguments: --(cfg|guidance)": "classifier-free guidance is --guidance",
         r"unrecognized arguments: --sampl": "the sampler is --scheduler",
         r"unrecognized arguments: --num": "steps are --steps, and several images --seeds 0-9",
         r"unrecognized arguments: --size": "the size is --height and --width",
         r"unrecognized arguments: [^-]": "put what has spaces in quotes"}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        remedy = next((f"; {hint}" for start, hint in HINTS.items() if re.match(start, message)), "")
        raise ValueError(message + remedy)


class Once(argparse.Action):
    """One value, and not another after it that would be taken without a word."""

    def __call__(self, parser, namespace, values, option_string=None):
        if self.dest in (said := namespace.__dict__.setdefault("once", set())):
            parser.error(f"{option_string} is given twice; one is possible")
        said.add(self.dest)
        setattr(namespace, self.dest, values)


def whole_numbers(text: str) -> tuple[int, ...]:
    """"0,10,20" or "0-9" or both mixed -> numbers; "" -> none."""
    numbers: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\d{1,19})(?:-(\d{1,19}))?\s*", part)
        if not match:
            raise argparse.ArgumentTypeError(f"{part!r} is not a number or a range like 0-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= 100_000:
            raise argparse.ArgumentTypeError(f"the range {part} is empty or too long")
        if len(numbers) + last - first >= 100_000:
            raise argparse.ArgumentTypeError("more than 100,000 numbers")
        numbers += range(first, last + 1)
    return tuple(dict.fromkeys(numbers))


def written(value: object) -> str:
    """A value as its flag reads it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def make_parser(add_help: bool = True) -> Parser:
    parser = Parser(prog="clora.py", add_help=add_help,
                    description="Composes several LoRAs in one Stable Diffusion 1.5 image (CLoRA).",
                    epilog="Without --prompt and --lora it runs a demonstration on the small embedded model.")
    group = parser.add_argument_group("what to draw")
    add = group.add_argument
    add("--model", default=str(TOY), metavar="MODEL",
        help="diffusers folder, single-file .safetensors or .ckpt, or on the hub user/repo or user/repo:file (default: the "
             "embedded model)")
    add("--vae", metavar="VAE", help="an autoencoder in the place of the model's: diffusers folder, single file (taken for "
        "SD 1.x's), or on the hub, as stabilityai/sd-vae-ft-mse ('': none, where the image of --from has one)")
    add("--prompt", help=f"names every subject's word once (default: {DEMO['prompt']!r})")
    add("--negative", default="", metavar="TEXT", help="negative prompt")
    add("--lora", nargs=2, action="append", metavar=("FILE[:WEIGHT]", "SUBJECT[=TRIGGER]"),
        help="a LoRA (a file, or on the hub user/repo[:FILE]), the word of the prompt that it draws, and what replaces that "
             "word in its own prompt; repeat for more ('' SUBJECT: none, where the image of --from has one)")
    add("--style", action=Once, metavar="FILE[:WEIGHT]", help="one LoRA added to every variant, a file or on the hub ('': "
        "none, where the image of --from has one)")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--seed", type=int, default=0, help="initial noise as diffusers draws it on the CPU (default: 0)")
    either.add_argument("--seeds", type=whole_numbers, metavar="0-9", help="several seeds, one image each")
    add("--height", type=int, help="pixels, a multiple of 8 (default: the model's)")
    add("--width", type=int, help="pixels, a multiple of 8 (default: the model's)")
    add("--method", choices=METHODS, default="clora", help="clora, or a baseline (default: clora)")

    add("--from", dest="source", metavar="IMAGE.png",
        help="run an image of clora.py again; flags on top change it (--lora: the one for the same word)")
    add("--inspect", nargs="+", metavar="FILE", help="say what is in LoRA files, and draw nothing")

    add = parser.add_argument_group("where and how").add_argument
    add("--out", default="out", metavar="FOLDER", help="folder of the images (default: out)")
    add("--panel", action=argparse.BooleanOptionalAction,
        help="a second picture: maps, masks and plain merging (default: in the demonstration)")
    add("--report", action=argparse.BooleanOptionalAction,
        help="a web page in one file: every step's maps, masks and losses (default: in the demonstration)")
    add("--trace", metavar="FILE.safetensors", help="write every step's maps, masks, losses and latents "
        "(of several seeds to FILE-0.safetensors and so on)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--dtype", choices=DTYPES, help="default: float16 on CUDA, float32 on the CPU")
    add("--batch", type=int, default=1, metavar="N", help="how many seeds to draw at once (default: 1)")
    add("--low-memory", action=argparse.BooleanOptionalAction, default=False,
        help="one variant after the other: slower, for cards with little memory")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile the UNet: minutes of waiting at the start; meant for CUDA")
    add("--quiet", action="store_true", help="no progress bar")

    group = parser.add_argument_group("the recipe", "every choice of the method: the recipe sets all, a model's clora.json "
                                      "some (the embedded model has one), a flag one. With --steps, the recipe's "
                                      "--update-until, --refine-at and --mask-from move in proportion.")
    group.add_argument("--recipe", choices=RECIPES, default="paper", help="paper (default), release or fast")
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Recipe), re.MULTILINE))
    for field in dataclasses.fields(Recipe):
        flag, default = "--" + field.name.replace("_", "-"), getattr(RECIPES["paper"], field.name)
        values = ", ".join(f"{name}: {written(getattr(recipe, field.name))}" for name, recipe in RECIPES.items())
        options: dict = {"help": f"{comments.get(field.name, '')} ({values})"}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = whole_numbers if isinstance(default, tuple) else int if default is None else type(default)
            options["choices"] = CHOICES.get(field.name)
            options["metavar"] = None if options["choices"] else {float: "X", str: "X"}.get(type(default), "N")
        group.add_argument(flag, **options)
    parser.set_defaults(recorded={}, given=set())           # what the image of --from has, and what the flags replace of it
    return parser


def make_recipe(args: argparse.Namespace, model_settings: dict) -> Recipe:
    """The named recipe, then what the model's own clora.json sets, then the values of a --from image, then the flags.

    With --steps the step numbers that no flag gives (update_until, refine_at, mask_from) move in proportion: at 20 of the
    paper's 50 steps the updates end at step 10 and are refined at 0, 4 and 8; at 8 steps they end at 4 and are refined at 0,
    2 and 3.
    """
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)
             if getattr(args, field.name) is not None}
    recipe = changed(changed(RECIPES[args.recipe], model_settings.get("recipe", {}), "clora.json"), args.recorded, "--from")

    def moved(step: int) -> int:
        return step if step < 0 else min(10**6, round(step * given.get("steps", recipe.steps) / recipe.steps))  # -1: never
    scaled = {"update_until": moved(recipe.update_until), "mask_from": moved(recipe.mask_from),
              "refine_at": tuple(sorted({moved(step) for step in recipe.refine_at}))}
    return changed(recipe, {**scaled, **given})


def is_embedded(model: str) -> bool:
    return model == str(TOY) or Path(model).resolve() == REPOSITORY / "weights" / "toy"


def keep_float32(dtype: torch.dtype) -> None:
    """Makes float32 mean that in a GPU's convolutions too, which are in TF32 otherwise."""
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32


def keep_freed_memory() -> None:
    """glibc gives freed memory back to the system, which then clears every page of it anew: a tenth of a small model's time.

    It raises its limits to these by itself, but only when something as large is freed, which a small model never does.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):           # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)       # M_MMAP_THRESHOLD: smaller blocks come from the heap
        mallopt(-1, 64 << 20)       # M_TRIM_THRESHOLD: so much of it stays when it is free


def check_device(device: str) -> None:
    """ValueError if nothing can be computed there."""
    try:
        torch.zeros(1, device=device).add(1).item()     # a card may be there that this PyTorch has no programs for
    except Exception as error:          # RuntimeError, AssertionError: whatever the backend says
        raise ValueError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}); use --device cpu") from None


def read_subject(load: Callable[[str], LoRA], file: str, words: str) -> Subject:
    """FILE[:WEIGHT] and SUBJECT[=TRIGGER]. ValueError: no subject, or what `load` says of the file."""
    path, weight = split_weight(file)
    word, _, trigger = (part.strip() for part in words.partition("="))
    if not word:
        raise ValueError(f"{file} {words!r} names no subject; write it as \"cat=sks cat\"")
    if found := re.fullmatch(r"(.*\S)\s*:\s*[-+]?(?:\d+\.?\d*|\.\d+)", words, re.DOTALL):
        raise ValueError(f"{words!r}: a weight stands behind the file, as {path}:0.8 {found[1]!r}")
    return Subject(load(path), word, trigger or word, weight)


def read_style(load: Callable[[str], LoRA], file: str | None) -> tuple[LoRA, float] | None:
    if file is None:
        return None
    path, weight = split_weight(file)
    return load(path), 1.0 if weight is None else weight


def read_subjects(args: argparse.Namespace, model: Model) -> tuple[list[Subject], tuple[LoRA, float] | None]:
    subjects = []
    if len(args.lora) > 8:
        raise ValueError(f"{len(args.lora)} LoRAs are given; at most 8 subjects can be composed")
    for file, words in args.lora:
        subjects.append(subject := read_subject(model.lora, file, words))
        word = subject.word
        noted = trigger_words(subject.lora.metadata)
        known = next((one for one in noted if word.lower() in one.lower().split()), next(iter(noted), ""))
        if not known or subject.trigger.lower() != word.lower():
            continue                                    # nothing to suggest, or the user has chosen
        if not re.search(rf"(?<!\w){re.escape(known)}(?!\w)", args.prompt, re.IGNORECASE):
            phrase = known if word.lower() in known.lower().split() else f"{known} {word}"
            print(f'clora: hint: {file} suggests the trigger "{known}"; write "{word}={phrase}" to use it', file=sys.stderr)
        elif args.method == "clora" and known.lower() != word.lower():
            print(f'clora: hint: the prompt says "{known}" to every LoRA; write the plain word there and the trigger behind '
                  '--lora FILE, as "cat=sks cat"', file=sys.stderr)
    style = read_style(model.lora, args.style)
    noted = trigger_words(style[0].metadata) if style else []
    if noted and not any(one.lower() in args.prompt.lower() for one in noted):
        print(f'clora: hint: {args.style} suggests the trigger "{noted[0]}"; write that into the prompt', file=sys.stderr)
    return subjects, style


def from_repository(name: str) -> str:
    """A file of the repository as seen from there, where the command of an image is run; any other as the user wrote it."""
    path = Path(os.path.abspath(name))
    inside = os.path.lexists(split_weight(str(path))[0]) and path.is_relative_to(REPOSITORY)
    name = path.relative_to(REPOSITORY).as_posix() if inside else name
    return f"./{name}" if name.startswith("-") else name            # no flag


MASKS = ("threshold", "mask_ties", "mask_from", "mask_every", "dilate", "erode", "open", "close")
UPDATES = ("update_until", "temperature", "alpha", "refine_at", "refine_steps", "refine_stop", "update_every", "update_stop",
           "rescale_maps", "noise_from")


def without_effect(args: argparse.Namespace, recipe: Recipe, steps: int, demo: bool) -> list[str]:
    """A line for every kind of flag that is given and changes nothing beside the others. steps: those of the sampler."""
    last = min(recipe.update_until, steps - 1)
    late = [step for step in args.refine_at or () if step > last]
    composed, never = args.method == "clora" and bool(args.lora), recipe.mask_from >= steps
    several, both = composed and len(args.lora) > 1, recipe.maps_from == "both"
    refined = any(step <= last for step in recipe.refine_at)
    own = () if demo or args.source else ("lora", "style")                  # else nobody gave these
    rules: tuple[tuple[tuple[str, ...], bool, str], ...] = (
        (("eta",), recipe.scheduler != "ddim", f"is for --scheduler ddim; {recipe.scheduler} does not read it"),
        (("switch_every",), args.method != "switch", "is for --method switch"),
        ((*own, "text_lora"), args.method == "base", "is for other methods; --method base draws without LoRAs"),
        ((*MASKS, *UPDATES, "maps_from"), not composed, "is for --method clora with --lora: it alone reads maps"),
        (UPDATES, composed and len(args.lora) == 1, "is for two LoRAs and more: one alone has nothing to be parted from"),
        (("negative", "guidance_rescale", "uncond_from"), recipe.guidance == 1 and not (composed and both),
         "is for guidance, and --guidance 1 is none"),
        (UPDATES[1:], several and last < 0, "is for latent updates, and --update-until says never"),
        (("refine_steps", "refine_stop"), several and last >= 0 and not refined, "is for --refine-at, and none is updated"),
        (tuple({*MASKS} - {"mask_from"} - ({"mask_every"} if recipe.update_stop else set())), composed and never,
         f"is for masks, which begin at step {recipe.mask_from}"))
    lines = []
    turns = -(-steps // recipe.switch_every)
    if args.method == "switch" and turns < len(args.lora):
        lines.append(f"--switch-every {recipe.switch_every} leaves {len(args.lora) - turns} of {len(args.lora)} LoRAs "
                     f"without a turn in {steps} steps")
    if args.batch > 1 and args.seeds is None:
        lines.append(f"--batch {args.batch} draws several seeds at once, and there is one; write --seeds 0-{args.batch - 1}")
    for names, idle, why in rules:
        given = {name: getattr(args, name) for name in names if idle and getattr(args, name) not in (None, [], "")}
        flags = [f"--{'no-' if value is False else ''}{name.replace('_', '-')}" for name, value in given.items()
                 if not (name == "eta" and value == 0 or name == "update_until" and value < 0)]       # say the same
        lines += [f"{', '.join(sorted(flags))} {why}"] if flags else []
    if late and last >= 0 and several:
        lines.append(f"--refine-at {','.join(map(str, late))} comes after the last update, which is of step {last}")
    return lines


def writable(folder: Path) -> None:
    """OSError now and not after the first image, if files cannot be written there or the folder cannot be made."""
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    tempfile.TemporaryFile(dir=nearest).close()


def settings_of(args: argparse.Namespace, recipe: Recipe, model: Model, subjects: list[Subject],
                style: tuple[LoRA, float] | None, seed: int, size: tuple[int, int]) -> dict:
    """What an image carries: all that it takes to make it again, as a command and in parts."""
    words = ["--model", from_repository(args.model)] + (["--vae", from_repository(args.vae)] if args.vae else [])
    for flag, text in (("--prompt", args.prompt), ("--negative", args.negative)):
        words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    words += ["--method", args.method, "--seed", str(seed), "--height", str(size[0]), "--width", str(size[1]),
              "--dtype", args.dtype]
    words += ["--device", "cpu"] if args.device == "cpu" else []        # another machine may have a card, or none
    words += [flag for flag, given in (("--low-memory", args.low_memory), ("--compile", args.compile)) if given]
    for file, subject in args.lora:
        words += ["--lora", from_repository(file), subject]
    words += ["--style", from_repository(args.style)] if args.style else []
    words += ["--recipe", args.recipe]
    for field in dataclasses.fields(Recipe):
        value, flag = getattr(recipe, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            words.append(f"{flag}={written(value)}")
    return {"prompt": args.prompt, "negative": args.negative, "seed": str(seed), "method": args.method,
            "recipe": {"name": args.recipe, **dataclasses.asdict(recipe)},
            "model": {"name": from_repository(args.model), "hash": model.hash},
            "vae": {"name": from_repository(args.vae), "hash": model.vae_hash} if args.vae else None,
            "loras": [{"file": s.lora.path.name, "sha256": s.lora.sha256, "subject": s.word, "trigger": s.trigger,
                       "weight": s.weight} for s in subjects],
            "style": None if style is None else {"file": style[0].path.name, "sha256": style[0].sha256, "weight": style[1]},
            "command": shlex.join(["python", "clora.py", *words])}


def draw(model: Model, plan: clora.Plan, recipe: Recipe, noise: torch.Tensor, seeds: Sequence[int], label: str,
         args: argparse.Namespace, keep: bool = False) -> list[Step]:
    """Runs the loop under a progress bar -> the steps: all of them if `keep`, else the last."""
    steps: list[Step] = []
    generators = clora.step_generators(noise, seeds)
    with tqdm(total=recipe.steps, desc=label, disable=args.quiet) as bar:
        for step in clora.compose(model, plan, recipe, noise, generators, args.low_memory):
            steps = [*steps, step] if keep else [step]
            bar.update(min(1, bar.total - bar.n))
            if step.losses and not args.quiet:              # the bar waits for a GPU here, between two steps
                bar.set_postfix(loss=f"{step.losses[-1].mean().item():.3f}")
    return steps


def run(args: argparse.Namespace) -> None:
    demo = args.prompt is None and args.lora is None
    if demo:
        if not is_embedded(args.model):
            raise ValueError(f"--model {args.model} is given without --prompt; write what to draw")
        args.prompt, args.lora = DEMO["prompt"], DEMO["lora"]
    args.lora, args.style = args.lora or [], args.style or None
    if args.prompt is None:
        raise ValueError("--lora is given without --prompt; write the prompt that names its subject")
    if args.method != "base" and not args.lora and not args.style:
        raise ValueError("no LoRA is given; add --lora FILE SUBJECT=TRIGGER, or use --method base")
    for flag, given in (("--report", args.report), ("--panel", args.panel)):
        if given and (args.method != "clora" or not args.lora):
            raise ValueError(f"{flag} shows the maps of subjects; use it with --lora and --method clora")
    if not (seeds := args.seeds if args.seeds is not None else (args.seed,)):
        raise ValueError("--seeds names no seed")
    if any(not -2**63 <= seed < 2**64 for seed in seeds):
        raise ValueError(f"a seed must fit in 64 bits; {max(seeds, key=abs)} does not")
    if args.batch < 1:
        raise ValueError(f"--batch is {args.batch}; it must be at least 1")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", args.device):
        raise ValueError(f"--device {args.device} is not known; use cpu or cuda")
    args.dtype = args.dtype or ("float16" if args.device.startswith("cuda") else "float32")
    check_device(args.device)
    keep_float32(DTYPES[args.dtype])
    out, place = Path(args.out), args.out
    if out.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and not out.is_dir():
        raise ValueError(f"--out {args.out} is to be a folder; the image in it is called {args.method}-{seeds[0]}.png")
    try:                                                    # say so now, not after the first image
        writable(out)
        trace = Path(args.trace) if args.trace else None
        traces: dict[int, Path] = {}                        # by seed
        if trace is not None:
            place = args.trace
            if trace.suffix != ".safetensors":
                raise ValueError(f"--trace {trace} must end in .safetensors")
            traces = {seed: trace if len(seeds) == 1 else trace.with_stem(f"{trace.stem}-{seed}") for seed in seeds}
            for path in traces.values():
                if path.exists() and not path.is_file():
                    raise ValueError(f"--trace {path} is a folder or a device; name a file")
            if not out.resolve().is_relative_to(trace.parent.resolve()):            # else it is made with it
                tempfile.TemporaryFile(dir=trace.parent).close()
        place = args.out
        stems = {f"{args.method}-{seed}{part}" for seed in seeds for part in ("", "-panel")}
        for folder, left in ((out, stems), *((path.parent, {path.stem}) for path in traces.values())):
            report.remove_temporaries(folder, left, age=3600)       # of runs that were killed; a younger one may be at work
        for seed in seeds:
            if (path := out / f"{args.method}-{seed}.png").is_dir():
                raise ValueError(f"{path} is a folder where the image would be; move it or give another --out")
    except OSError as error:
        raise ValueError(f"cannot write to {place}: {error.strerror}") from None

    model = load_model(args.model, args.device, DTYPES[args.dtype], args.vae)
    if args.compile:                    # fixed shapes: one program for guidance and one for the noise
        model.unet.compile(dynamic=False)
    recipe = make_recipe(args, model.settings)
    default = model.unet.config.sample_size * model.vae.config.factor
    size = (default if args.height is None else args.height, default if args.width is None else args.width)
    clora.initial_noise(model, *size, seeds[0])             # refuses sizes that do not fit
    try:
        subjects, style = read_subjects(args, model)
    except Mismatch as error:
        unsaid = " (no --model is given, so this is the embedded one)" if args.model == str(TOY) else ""
        raise ValueError(f"{error}{unsaid}") from None
    loras = (*(subject.lora for subject in subjects), *([style[0]] if style else []))
    read = {path.resolve() for path in (*model.files, *model.vae_files, *(lora.path for lora in loras))}
    if replaced := [str(path) for path in traces.values() if path.resolve() in read]:
        raise ValueError(f"--trace {replaced[0]} would replace a file that is read; name another")
    plan = clora.make_plan(model, args.prompt, subjects, style, args.negative, args.method, recipe)
    if args.source:
        for line in (stale := rerun.changed_files(args, model, subjects, style)):
            print(f"clora: warning: {printable(line, 1000)}", file=sys.stderr)
        for seed in seeds:
            command = settings_of(args, recipe, model, subjects, style, seed, size)["command"]
            same = rerun.same_command(command, args.chunks["command"], by_name=not args.given)
            written = [(out / f"{args.method}-{seed}{part}.png").resolve() for part in ("", "-panel")]
            if Path(args.source).resolve() in written and (stale or not same):
                raise ValueError(f"this would replace {args.source} with another image; give another --out")
    for texts in ((args.prompt, *plan.prompts), (args.negative,)):
        if long := next(filter(model.text.truncated, texts), ""):
            print(f'clora: warning: CLIP reads 77 tokens; this was cut off: "{printable(model.text.truncated(long), 700)}", '
                  f'the end of "{printable(long, 700)}"', file=sys.stderr)

    said = [f'the prompt says "{s.trigger}" already, and the trigger is put in the place of "{s.word}"; write that alone'
            for s in subjects if args.method != "base" and s.trigger.lower() not in s.word.lower()
            and model.text.positions(args.prompt, s.trigger)]
    said += [f'"{printable(found[0], 100)}" is read as plain words: a prompt has no weights, switches or embeddings here'
             for text in (args.prompt, args.negative, *(s.trigger for s in subjects)) if (found := FOREIGN.search(text))]
    if seeds[0] < 0:                                    # elsewhere -1 asks for a random one
        said.append(f"--seed {seeds[0]} is a seed like any other here, not a random one")
    evaluations = len(make_scheduler(model.scheduler_config, recipe.steps, recipe.scheduler).timesteps)
    for line in (*said, *without_effect(args, recipe, evaluations, demo)):
        print(f"clora: warning: {printable(line, 700)}", file=sys.stderr)

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}") from None
    panel = (demo if args.panel is None else args.panel) and bool(plan.concepts)
    page = (demo if args.report is None else args.report) and bool(plan.concepts)
    for start in range(0, len(seeds), args.batch):
        chunk = seeds[start:start + args.batch]
        noise = torch.cat([clora.initial_noise(model, *size, seed) for seed in chunk])      # [B, 4, h, w]
        label = f"seed {', '.join(map(str, chunk))}"
        steps = draw(model, plan, recipe, noise, chunk, f"{args.method}, {label}", args, panel or page or trace is not None)
        finished = {args.method: steps[-1].latents}                                         # by method
        plain = dataclasses.replace(recipe, uncond_from="each")                             # merge has no base variant
        for method in ("merge", "base") if page else ("merge",) if panel else ():
            other = clora.make_plan(model, args.prompt, subjects, style, args.negative, method, plain)
            # other rows and LoRAs: to compile the UNet anew for one picture takes longer than to draw it
            with torch.compiler.set_stance("force_eager") if args.compile else contextlib.nullcontext():
                finished[method] = draw(model, other, plain, noise, chunk, f"{method}, {label}", args)[-1].latents
        for b, seed in enumerate(chunk):
            settings = settings_of(args, recipe, model, subjects, style, seed, size)
            pictures = {method: clora.decode(model, latents[b:b + 1], args.low_memory)[0].numpy()
                        for method, latents in finished.items()}
            path, own = out / f"{args.method}-{seed}.png", [step.picture(b) for step in steps]
            panel_path, page_path = path.with_stem(f"{path.stem}-panel"), path.with_suffix(".html")
            report.save_picture(path, pictures[args.method], settings)
            print(path)
            for beside, made in ((panel_path, panel), (page_path, page)):
                if beside.exists() and not made:
                    print(f"clora: warning: {beside} is of an earlier run (--panel, --report)", file=sys.stderr)
            if trace is not None:
                report.save_trace(traces[seed], own)
                print(traces[seed])
            if panel:
                middle = own[len(own) // 2]
                sheet = report.panel(pictures["clora"], pictures["merge"], middle, plan.trigger_tokens, subjects,
                                     middle.index >= recipe.mask_from)
                report.save_picture(panel_path, sheet, settings)
                print(panel_path)
            if page:
                report.save_page(page_path, pictures, report.estimates(model, own, args.low_memory), own, plan, subjects,
                                 {**settings, "command": f"{settings['command']} --report"})
                print(page_path)


def inspect_files(files: Sequence[str]) -> int:
    """Prints what is in each LoRA file -> exit code."""
    code = 0
    for file in files:
        try:
            lines = describe(find_lora(split_weight(file)[0])).items()
        except ValueError as error:
            print(f"clora: {printable(str(error), 1000)}", file=sys.stderr)
            code = 2
            continue
        print(file, *(f"    {heading:<14}{text}" for heading, text in lines), sep="\n")
    return code


def out_of_memory(error: Exception) -> bool:
    """Whether this says so: PyTorch on the CPU has no exception of its own for it, and CUDA's libraries have others."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        text in str(error) for text in ("allocate memory", "enough memory", "out of memory", "ALLOC_FAILED"))


def main(argv: list[str] | None = None) -> int:
    """-> exit code: 0 when every image was made, 2 for bad input, 130 when interrupted, 141 when nobody reads its output."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):        # a terminal without the letters of a file's name
                stream.reconfigure(errors="backslashreplace")
        " ".join(argv).encode()                 # what is no text cannot be written into a picture
        args = make_parser().parse_args(argv)
        if args.inspect:
            code = inspect_files(args.inspect)
            if sys.stdout is not None:              # None: closed by who started this
                sys.stdout.flush()
            return code
        run(args if args.source is None else rerun.recall(argv, Path(args.source), make_parser))
        return 0
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            message = "out of memory: use --low-memory, lower --batch, --height and --width, or use --dtype bfloat16"
        elif type(error).__module__.startswith("torch._"):              # of torch.compile: no C++ compiler, mostly
            reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
            message = f"--compile does not work here ({printable(reason, 700)}); go without it"
        else:
            raise
    except BrokenPipeError:                     # `| head`: whoever reads has seen enough, but images may be missing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0 if "--inspect" in argv else 141
    except UnicodeEncodeError as error:
        message = f"{error.object[error.start:error.end]!r} in an argument is not valid UTF-8; write it as text"
    except (ValueError, OSError) as error:
        nameless = isinstance(error, OSError) and error.strerror and error.filename is None
        message = printable(f"the output cannot be written ({error})" if nameless else str(error), 1000)
    except KeyboardInterrupt:
        print("\nclora: interrupted; finished images are kept", file=sys.stderr)
        return 130
    print(f"clora: {message}", file=sys.stderr)
    return 2


def start() -> int:
    """`main`, where this process is the command: ended by a signal, it leaves no half-written file, as after Ctrl-C."""
    def end(number: int, _) -> None:
        sys.exit(128 + number)
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is signal.SIG_DFL:      # nohup: ignored, and so it stays
            signal.signal(number, end)
    keep_freed_memory()
    code = main()
    gc.freeze()         # or Python looks for garbage among a million objects of its modules before it ends, for a second
    return code
