"""The command line, from files to files: images, settings, traces, and one clear line for every kind of bad input."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import cli
import clora
import report
from recipe import Recipe
from unet import UNet
from weights import load_model

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
CAT, DOG, STYLE = (str(GOLDEN / f"loras/{name}.safetensors") for name in ("cat_peft", "dog_kohya", "style_peft"))
SMALL = ["--model", str(GOLDEN / "model"), "--prompt", "a cat and a dog", "--height", "64", "--width", "96", "--steps", "3",
         "--refine-at", "0", "--refine-steps", "1", "--quiet"]
TWO = ["--lora", CAT, "cat=sks cat", "--lora", f"{DOG}:0.9", "dog=sks dog"]


def run(*arguments: str, out: Path) -> int:
    try:
        return cli.main([*SMALL, "--out", str(out), *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def refused(capsys, out: Path, *arguments: str) -> str:
    """The one line that the command prints before it exits with 2."""
    capsys.readouterr()
    code = run(*arguments, out=out)
    captured = capsys.readouterr()
    message = captured.err.strip()
    assert code == 2 and captured.out == "", f"exit code {code}: {captured}"
    assert message.startswith("clora: ") and "\n" not in message and "Traceback" not in message, message
    assert not out.exists() or not list(out.iterdir()), "something was left behind"
    return message


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted as Linux does")
def test_freed_memory_is_not_cleared_again_by_the_system():
    count = """if True:
        import resource, sys, torch, cli
        if sys.argv[1] == "kept":
            cli.keep_freed_memory()
        def several():
            return [torch.ones(1 << 20) for _ in range(4)]              # 16 MiB, all freed together
        several(); several()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            several()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    faults = {how: int(subprocess.run([sys.executable, "-c", count, how], cwd=ROOT, capture_output=True, text=True,
                                      check=True).stdout) for how in ("kept", "not")}
    assert faults["kept"] <= faults["not"] / 10, faults


def test_images_carry_what_it_takes_to_make_them_again(tmp_path):
    out = tmp_path / "a b"
    assert run(*TWO, "--style", f"{STYLE}:0.8", "--seeds", "3-4", out=out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["clora-3.png", "clora-4.png"]
    with Image.open(out / "clora-3.png") as image:
        settings, picture = dict(image.text), np.asarray(image)
    assert picture.shape == (64, 96, 3) and settings["prompt"] == "a cat and a dog" and settings["seed"] == "3"
    assert json.loads(settings["recipe"])["steps"] == 3 and len(json.loads(settings["model"])["hash"]) == 16
    assert [len(lora["sha256"]) for lora in json.loads(settings["loras"])] == [64, 64]
    words = shlex.split(settings["command"])
    assert words[:2] == ["python", "clora.py"]
    assert cli.main([*words[2:], "--out", str(tmp_path / "again"), "--quiet"]) == 0
    assert (tmp_path / "again/clora-3.png").read_bytes() == (out / "clora-3.png").read_bytes()
    with Image.open(out / "clora-4.png") as other:
        assert not np.array_equal(np.asarray(other), picture)


@pytest.mark.parametrize("method", clora.METHODS)
def test_every_method_makes_a_picture_of_its_own(method, tmp_path):
    assert run(*TWO, "--method", method, out=tmp_path) == 0
    assert (tmp_path / f"{method}-0.png").exists()


def test_methods_differ(tmp_path):
    pictures = []
    for method in clora.METHODS:
        run(*TWO, "--method", method, out=tmp_path)
        pictures.append((tmp_path / f"{method}-0.png").read_bytes())
    assert len(set(pictures)) == len(pictures)


def test_trace(tmp_path):
    trace = tmp_path / "trace.safetensors"
    assert run(*TWO, "--trace", str(trace), "--refine-at", "1", out=tmp_path) == 0
    tensors = load_file(trace)
    assert tensors["timestep"].shape == (3,) and tensors["latents"].shape == (3, 4, 8, 12)
    assert tensors["maps"].shape == (3, 3, 2, 3, 77) and tensors["masks"].shape == (3, 3, 8, 12)
    assert tensors["update_step"].tolist() == [0, 1, 1, 2]
    assert tensors["loss"].shape == (4,) and tensors["updated_latents"].shape == (4, 4, 8, 12)


def test_low_memory_gives_the_same_picture(tmp_path):
    assert run(*TWO, out=tmp_path / "a") == 0 and run(*TWO, "--low-memory", out=tmp_path / "b") == 0
    pictures = []
    for name in "ab":
        with Image.open(tmp_path / name / "clora-0.png") as image:
            pictures.append(np.asarray(image).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_compile_without_a_compiler_is_one_line(tmp_path, monkeypatch, capsys):
    from torch._dynamo.exc import TorchDynamoException

    def forward(*inputs, **options):
        raise TorchDynamoException("No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1 for more")
    monkeypatch.setattr(UNet, "compile", lambda unet, **options: setattr(unet, "forward", forward))
    assert run(*TWO, "--compile", out=tmp_path) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == \
        "clora: --compile does not work here (No working C++ compiler found); go without it"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method, flags", [("clora", ()), ("clora", ("--recipe", "release", "--low-memory")),
                                           ("clora", ("--eta", "0.7")), ("switch", ()), ("clora", ("--scheduler", "pndm"))])
def test_a_batch_gives_the_pictures_of_its_seeds(method, flags, tmp_path):
    common = (*TWO, "--method", method, "--seeds", "3-5", *flags)
    assert run(*common, "--batch", "2", "--trace", str(tmp_path / "t.safetensors"), out=tmp_path / "batch") == 0
    assert run(*common, "--trace", str(tmp_path / "alone.safetensors"), out=tmp_path / "alone") == 0
    whole = 0
    for seed in range(3, 6):
        together = load_file(tmp_path / f"t-{seed}.safetensors")
        alone = load_file(tmp_path / f"alone-{seed}.safetensors")
        assert together.keys() == alone.keys()
        # a mask pixel on its threshold may fall either way in float32; up to there, and nearly always to the end, they agree
        masks = [run["masks"] if "masks" in run else torch.ones(3, 1) for run in (together, alone)]
        apart = (masks[0] != masks[1]).flatten(1).any(1)                                        # [steps]
        steps = int(apart.nonzero()[0]) if apart.any() else len(alone["latents"])
        difference = together["latents"][:steps] - alone["latents"][:steps]
        assert difference.norm() <= 1e-3 * alone["latents"][:steps].norm()                      # random weights: chaotic
        one, other = (pixels(tmp_path / folder / f"{method}-{seed}.png") for folder in ("batch", "alone"))
        assert apart.any() or abs(one.astype(int) - other).max() <= 1
        whole += not apart.any()
    assert whole >= 2


def test_the_panel(tmp_path):
    assert run(*TWO, "--panel", out=tmp_path) == 0
    with Image.open(tmp_path / "clora-0-panel.png") as panel:
        assert panel.height > 256 and panel.width > 5 * 256


def test_the_comparison_of_a_run_whose_unconditional_half_is_the_base_models(tmp_path):
    assert run(*TWO, "--uncond-from", "base", "--panel", "--report", out=tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clora-0-panel.png", "clora-0.html", "clora-0.png"]


@pytest.mark.parametrize("k", [1, 3, 8])
def test_other_numbers_of_subjects(k, tmp_path, capsys):
    names = ("cat", "dog", "owl", "fox", "elk", "ape", "hen", "cow", "bee")
    loras = [[word for name in names[:n] for word in ("--lora", CAT, f"{name}=sks {name}")] for n in (k, 9)]
    assert run("--prompt", " ".join(names), *loras[0], out=tmp_path) == 0
    assert "at most 8" in refused(capsys, tmp_path / "out", "--prompt", " ".join(names), *loras[1])


def test_a_lora_without_text_encoder_weights(tmp_path):
    state = {key: value for key, value in load_file(CAT).items() if key.startswith("unet.")}
    save_file(state, tmp_path / "unet only.safetensors")
    loras = ["--lora", str(tmp_path / "unet only.safetensors"), "cat=sks cat", "--lora", DOG, "dog=sks dog"]
    assert run(*loras, out=tmp_path) == 0


def test_text_lora_can_be_left_out(tmp_path):
    pictures = []
    for flag in ("--text-lora", "--no-text-lora"):
        run(*TWO, flag, out=tmp_path)
        pictures.append((tmp_path / "clora-0.png").read_bytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("flags", [
    ["--alpha", "3"], ["--temperature", "0.2"], ["--threshold", "0.8"], ["--update-until", "-1"], ["--mask-from", "2"],
    ["--maps-from", "both"], ["--noise-from", "before"], ["--dilate"], ["--guidance", "3"], ["--guidance-rescale", "0.7"],
    ["--clip-skip", "1"], ["--scheduler", "pndm"], ["--scheduler", "dpm++-karras"], ["--eta", "0.5"],
    ["--scheduler", "lcm"],
    ["--recipe", "release", "--steps", "3"], ["--negative", "nsfw"], ["--refine-at", "1"], ["--rescale-maps"],
    ["--seed", "9"], ["--dtype", "bfloat16"], ["--update-every", "2"], ["--uncond-from", "base"], ["--refine-stop", "1"],
    ["--recipe", "fast", "--steps", "3"]])
def test_every_setting_changes_the_picture(flags, tmp_path):
    run(*TWO, out=tmp_path / "plain")
    assert run(*TWO, *flags, out=tmp_path / "changed") == 0
    (plain,), (changed,) = (list((tmp_path / name).iterdir()) for name in ("plain", "changed"))
    with Image.open(plain) as a, Image.open(changed) as b:
        assert not np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("flags, until, refined", [
    ("", 25, (0, 10, 20)), ("--steps 50", 25, (0, 10, 20)), ("--steps 20", 10, (0, 4, 8)), ("--steps 8", 4, (0, 2, 3)),
    ("--steps 4", 2, (0, 1, 2)), ("--steps 1", 0, (0,)), ("--steps 100", 50, (0, 20, 40)),
    ("--steps 20 --update-until 25", 25, (0, 4, 8)), ("--steps 20 --refine-at=7", 10, (7,)),
    ("--steps 20 --update-until -1 --refine-at=", -1, ()), ("--recipe release --steps 50", 24, (0, 5, 10)),
    ("--recipe fast --steps 10", 4, (0, 2, 4))])
def test_step_numbers_move_with_the_number_of_steps(flags, until, refined):
    recipe = cli.make_recipe(cli.make_parser().parse_args(flags.split()), {})
    assert (recipe.update_until, recipe.refine_at, recipe.mask_from) == (until, refined, 0)


def test_a_model_sets_step_numbers_for_its_own_number_of_steps():
    own = {"recipe": {"steps": 10, "update_until": -1, "mask_from": 5, "refine_at": (2, 9)}}
    for flags, expected in ([], (10, -1, 5, (2, 9))), (["--steps", "20"], (20, -1, 10, (4, 18))):
        recipe = cli.make_recipe(cli.make_parser().parse_args(flags), own)
        assert (recipe.steps, recipe.update_until, recipe.mask_from, recipe.refine_at) == expected


@pytest.mark.parametrize("flags", [["--steps", "4"], ["--steps", "8", "--guidance", "1.5", "--style", f"{STYLE}:1"]])
def test_lcm(flags, tmp_path):
    """Alone and with a style LoRA; the noise that it adds is the seed's."""
    for name in "ab":
        assert run(*TWO, "--scheduler", "lcm", "--guidance", "1", *flags, out=tmp_path / name) == 0
    assert (tmp_path / "a/clora-0.png").read_bytes() == (tmp_path / "b/clora-0.png").read_bytes()


def test_recipe_flags_cover_every_setting():
    """The flags and their help come from the dataclass; --help says what both recipes take."""
    text = cli.make_parser().format_help()
    for name in Recipe.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    assert re.search(r"paper: 50,\s+release: 100,\s+fast: 20", text)


@pytest.mark.parametrize("arguments, word", [
    (["--scheduler", "lcm", "--steps", "51"], "at most 50"),
    (["--steps", "0"], "--steps"), (["--steps", "ten"], "--steps"), (["--height", "100"], "multiples of 8"),
    (["--width", "0"], "multiples of 8"), (["--seeds", ""], "no seed"), (["--seeds", "9-3"], "9-3"), (["--seeds", "x"], "x"),
    (["--seed", str(2 ** 70)], "64 bits"), (["--method", "magic"], "magic"), (["--scheduler", "euler"], "euler"),
    (["--guidance", "0"], "--guidance"), (["--threshold", "2"], "--threshold"), (["--temperature", "0"], "--temperature"),
    (["--clip-skip", "50"], "clip_skip"), (["--device", "quantum"], "quantum"), (["--nonsense"], "--nonsense"),
    (["--recipe", "secret"], "secret"), (["--model", "nowhere"], "nowhere"), (["--style", "nowhere.safetensors"], "nowhere"),
    (["--prompt", "a fox and a dog"], '"cat"'), (["--prompt", "a cat and a cat and a dog"], "2 times"),
    (["--prompt", ""], '"cat"'),
    (["--prompt", "cat " + "very " * 80 + "dog"], "77"), (["--lora", CAT, "cat=third"], "two LoRAs"),
    (["--lora", CAT, "=x"], "subject"), (["--lora", "nowhere.safetensors", "dog"], "nowhere.safetensors"),
    (["--lora", str(GOLDEN / "README.md"), "dog"], "README.md"), (["--alpha", "nan"], "--alpha"),
    (["--method", "merge", "--panel"], "--panel"), (["--seed", "3", "--seeds", "5"], "not allowed with"),
    (["--prompt", "a cat2 and a dog"], '"cat" is no word of its own'),
    (["--style", STYLE, "--style", CAT], "--style is given twice"), (["--lora", CAT], "write --lora FILE SUBJECT=TRIGGER"),
    (["--seed", "0-3"], "several are --seeds"), (["--lora", f"{CAT}:0,8", "fox"], '"0,8" is no weight; write it as'),
    (["--prompt", "two cats and a dog"], 'name "cats" or write spaces around it'),
    (["--lora", CAT, "fox=sks fox:0.8"], "a weight stands behind the file"), (["--lora", CAT, "fox:1"], "behind the file"),
    (["--lora", f"{CAT}:0.8:0.5", "fox"], f"has two weights; one is for UNet and text encoder alike: write {CAT}:0.8"),
    (["--lora", CAT, "cow=sks dog", "--prompt", "a cat, a dog, a cow"], 'the trigger "sks dog" holds "dog", another LoRA'),
    (["--negative-prompt", "bad"], "is --negative"), (["--cfg-scale", "7"], "guidance is --guidance"),
    (["--guidance-scale", "7"], "guidance is --guidance"), (["--sampler", "ddim"], "the sampler is --scheduler"),
    (["--num-inference-steps", "9"], "steps are --steps"), (["--size", "512x512"], "the size is --height and --width"),
    (["a", "cat"], "put what has spaces in quotes"),
    (["--batch", "0"], "--batch"), (["--uncond-from", "base", "--maps-from", "both"], "--maps-from")])
def test_bad_input_is_one_line_and_exit_code_2(arguments, word, tmp_path, capsys):
    assert word in refused(capsys, tmp_path / "out", *TWO, *arguments)


@pytest.mark.parametrize("arguments, word", [
    (["--scheduler", "dpm++", "--eta", "1"], "--eta is for --scheduler ddim"), (["--eta", "1"], ""),
    (["--method", "base", "--style", STYLE], "--lora, --style is for other methods"), (["--style", STYLE], ""),
    (["--refine-at", "0,1,2", "--update-until", "0"], "--refine-at 1,2 comes after"), (["--update-until", "1"], ""),
    (["--refine-at", "0,7", "--update-until", "9"], "--refine-at 7 comes after the last update, which is of step 2"),
    (["--update-until", "-1"], ""), (["--update-until", "-1", "--alpha", "2"], "--alpha is for latent updates"),
    (["--guidance", "1", "--negative", "no", "--guidance-rescale", "0.5"], "--guidance-rescale, --negative is for guidance"),
    (["--guidance", "1", "--negative", "bad", "--maps-from", "both"], ""),
    (["--switch-every", "2"], "--switch-every is for --method switch"), (["--switch-every", "2", "--method", "switch"], ""),
    (["--method", "merge", "--dilate", "--alpha", "3", "--maps-from", "both"], "--alpha, --dilate, --maps-from is for"),
    (["--method", "merge", "--recipe", "release"], ""), (["--mask-from", "9"], ""),
    (["--mask-from", "9", "--no-dilate"], "--no-dilate is for masks, which begin at step 9"),
    (["--mask-from", "9", "--mask-every", "2"], "--mask-every is for masks"),
    (["--mask-from", "9", "--mask-every", "2", "--update-stop", "0.1"], ""),
    (["--mask-from", "3", "--dilate", "--scheduler", "pndm"], ""),
    (["--refine-at=3", "--update-until=3", "--scheduler=pndm"], ""),
    (["--refine-at", "", "--refine-steps", "7"], "--refine-steps is for --refine-at"),
    (["--method", "switch", "--switch-every", "3"], "--switch-every 3 leaves 1 of 2 LoRAs without a turn in 3 steps"),
    (["--batch", "4"], "write --seeds 0-3"), (["--batch", "4", "--seeds", "0-1"], ""),
    (["--seed", "-1"], "--seed -1 is a seed like any other here"), (["--seeds", "7"], ""),
    (["--prompt", "a sks cat and a dog"], 'says "sks cat" already'),
    (["--prompt", "a sks cat and a dog", "--method", "base"], "--lora is for other methods"),
    (["--prompt", "a (cat:1.3) and a dog"], '"(cat:1.3)" is read as plain words'),
    (["--negative", "bad <LoRA:x:1>"], '"<LoRA:x:1>" is read'), (["--negative", "((ugly))"], '"((ugly))" is read'),
    (["--negative", "[deformed | disfigured]"], '"[deformed | disfigured]" is read'),
    (["--negative", "embedding:easy"], '"embedding:easy" is read'), (["--prompt", "a cat BREAK a dog"], '"BREAK" is read'),
    (["--prompt", "a cat and a dog, [bold], break: a rest"], ""),
    (["--negative", "((a) red:1.3)"], '"red:1.3)" is read'), (["--negative", "(red:1.3 )"], '"(red:1.3 )" is read'),
    (["--negative", "late (at 8:30), (16:9), Psalm (119:105), [from 9:16], (very) late, (note: 2 of them)"], "")])
def test_flags_that_change_nothing_are_named(arguments, word, tmp_path, capsys):
    capsys.readouterr()
    small = SMALL[:SMALL.index("--refine-at")]
    assert cli.main([*small, *TWO, *arguments, "--quiet", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(word) and all(line.startswith("clora: warning: ") and word in line for line in lines), lines


def test_what_the_embedded_model_is_given(tmp_path, capsys):
    """A LoRA of another model where --model was forgotten, and a style whose trigger the prompt does not have."""
    capsys.readouterr()
    assert cli.main(["--prompt", "a cat", "--lora", CAT, "cat", "--out", str(tmp_path)]) == 2
    assert "(no --model is given, so this is the embedded one)" in capsys.readouterr().err
    small = ["--method", "base", "--style", str(cli.TOY / "loras/ink.safetensors"), "--steps", "1", "--quiet"]
    for prompt, hints in (("a ball", 1), ("a ball, Ink style", 0)):
        assert cli.main(["--prompt", prompt, *small, "--out", str(tmp_path)]) == 0
        assert capsys.readouterr().err.count('suggests the trigger "ink"; write that into the prompt') == hints


def test_a_trigger_in_the_prompt_itself(tmp_path, capsys):
    """Every LoRA and the base model would read it; merging alone is done that way."""
    capsys.readouterr()
    zib = ["--lora", str(cli.TOY / "loras/zib.safetensors"), "ball", "--steps", "1", "--quiet", "--out", str(tmp_path)]
    for prompt, method, hint in (("a zib ball", "clora", 'the prompt says "zib" to every LoRA'), ("a zib ball", "merge", ""),
                                 ("a ball", "clora", 'write "ball=zib ball" to use it')):
        assert cli.main(["--prompt", prompt, "--method", method, *zib]) == 0
        assert hint in (said := capsys.readouterr().err) and len(said.splitlines()) == bool(hint), said


def test_a_picture_is_no_folder(tmp_path, capsys):
    message = refused(capsys, tmp_path / "out", *TWO, "--out", str(tmp_path / "cat.png"))
    assert "cat.png is to be a folder; the image in it is called clora-0.png" in message


def test_updates_of_one_lora_are_named(tmp_path, capsys):
    capsys.readouterr()
    assert cli.main([*SMALL, "--lora", CAT, "a cat=cat", "--out", str(tmp_path)]) == 0
    line, = capsys.readouterr().err.splitlines()
    assert "--refine-at, --refine-steps is for two LoRAs" in line       # and of a trigger within its word nothing


def test_what_an_earlier_run_left_beside_a_picture_is_named(tmp_path, capsys):
    assert run(*TWO, "--panel", "--report", out=tmp_path) == 0 and not capsys.readouterr().err
    assert run(*TWO, "--alpha", "3", out=tmp_path) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [Path(line.split()[2]).name for line in lines] == ["clora-0-panel.png", "clora-0.html"]


def test_bad_input_makes_no_folder(tmp_path, capsys):
    for arguments in (["--threshold", "3"], ["--model", "nowhere.safetensors"], ["--prompt", "a fox"]):
        refused(capsys, tmp_path / "new/deep", *TWO, *arguments)
    assert not (tmp_path / "new").exists()
    assert run(*TWO, "--trace", str(tmp_path / "new/deep/t.safetensors"), out=tmp_path / "new/deep") == 0
    assert len(list((tmp_path / "new/deep").iterdir())) == 2
    assert run(*TWO, "--trace", str(tmp_path / "more/t.safetensors"), out=tmp_path / "more/deep") == 0
    assert (tmp_path / "more/t.safetensors").exists()


def test_files_with_unusual_names(tmp_path, monkeypatch, capsys):
    """A weight behind the name of a file that has one in its name; a name that looks like a flag."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(CAT, "cat:2")
    shutil.copy(DOG, "-dog.safetensors")
    assert run("--lora", "cat:2:0.5", "cat=sks cat", "--style=-dog.safetensors", out=tmp_path / "a") == 0
    assert run("--lora", CAT + ":0.5", "cat=sks cat", "--style", DOG, out=tmp_path / "b") == 0
    assert np.array_equal(pixels(tmp_path / "a/clora-0.png"), pixels(tmp_path / "b/clora-0.png"))
    assert run("--lora", "cat:2", "cat=sks cat", out=tmp_path / "c") == 0
    assert run("--lora", CAT, "cat=sks cat", out=tmp_path / "d") == 0
    assert np.array_equal(pixels(tmp_path / "c/clora-0.png"), pixels(tmp_path / "d/clora-0.png"))
    capsys.readouterr()
    assert cli.main(["--from", "a/clora-0.png", "--out", "e", "--quiet"]) == 0
    assert (tmp_path / "a/clora-0.png").read_bytes() == (tmp_path / "e/clora-0.png").read_bytes()
    monkeypatch.setattr(cli, "REPOSITORY", tmp_path)
    assert cli.from_repository("./-dog.safetensors") == "./-dog.safetensors"


@pytest.mark.parametrize("name", ["mask_from", "update_until"])
def test_numbers_that_no_step_can_have(name, tmp_path, capsys):
    huge = 10 ** 400
    assert f"--{name.replace('_', '-')}" in refused(capsys, tmp_path / "out", *TWO, f"--{name.replace('_', '-')}", str(huge))
    for key, value in ((name, huge), ("refine_at", [huge])):                # as in a model's clora.json
        with pytest.raises(ValueError, match=key.replace("_", ".")):
            cli.make_recipe(cli.make_parser().parse_args([]), {"recipe": {key: value}})


def test_a_prompt_without_loras_and_loras_without_a_prompt(tmp_path, capsys):
    assert "--method base" in refused(capsys, tmp_path / "out")
    base = [word for word in SMALL if word not in ("--prompt", "a cat and a dog")]
    capsys.readouterr()
    assert cli.main([*base, *TWO, "--out", str(tmp_path / "out")]) == 2
    assert "--prompt" in capsys.readouterr().err
    assert cli.main(["--model", str(GOLDEN / "model"), "--out", str(tmp_path / "out")]) == 2        # not the demonstration
    assert "without --prompt" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    capsys.readouterr()
    assert run(*TWO, out=tmp_path / "file") == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    trace = str(tmp_path / "nowhere/t.safetensors")
    assert f"cannot write to {trace}: No such" in refused(capsys, tmp_path / "out", *TWO, "--trace", trace)
    (tmp_path / "b/clora-0.png").mkdir(parents=True)
    assert run(*TWO, out=tmp_path / "b") == 2
    assert capsys.readouterr().err.startswith(f"clora: {tmp_path / 'b/clora-0.png'} is a folder")


def test_a_file_with_the_layers_of_lcm_lora_as_style(tmp_path):
    """The layers that the published LCM-LoRA of SD 1.5 has, in its naming; its scheduler, four steps."""
    leaves = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
              "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")
    unet = load_model(GOLDEN / "model").unet
    layers = {name: module.weight for name, module in unet.named_modules() if name.endswith(leaves)}
    tensors, noise = {}, torch.Generator().manual_seed(0)
    for name, weight in layers.items():
        key, kernel = f"lora_unet_{name.replace('.', '_')}", weight.shape[2:]
        tensors[f"{key}.lora_down.weight"] = 0.1 * torch.randn(4, *weight.shape[1:], generator=noise)
        tensors[f"{key}.lora_up.weight"] = 0.1 * torch.randn(len(weight), 4, *(1 for _ in kernel), generator=noise)
        tensors[f"{key}.alpha"] = torch.tensor(8.0)
    save_file(tensors, tmp_path / "lcm.safetensors")
    assert len(load_model(GOLDEN / "model").lora(tmp_path / "lcm.safetensors").unet) == len(layers) > 50
    flags = ("--scheduler", "lcm", "--steps", "4", "--guidance", "1.5", "--trace", str(tmp_path / "t.safetensors"))
    assert run(*TWO, *flags, "--style", str(tmp_path / "lcm.safetensors"), out=tmp_path / "a") == 0
    assert load_file(tmp_path / "t.safetensors")["timestep"].tolist() == [999, 759, 499, 259]       # as diffusers'
    assert run(*TWO, *flags, out=tmp_path / "b") == 0
    assert not np.array_equal(pixels(tmp_path / "a/clora-0.png"), pixels(tmp_path / "b/clora-0.png"))


def test_a_trace_is_of_one_picture(tmp_path):
    both = clora.Step(0, 1, *[torch.zeros(2, 4, 2, 2)] * 3)
    with pytest.raises(ValueError, match="one picture"):
        report.save_trace(tmp_path / "a.safetensors", [both])
    report.save_trace(tmp_path / "a.safetensors", [both.picture(1)])


def test_a_trace_replaces_nothing_that_is_read(tmp_path, capsys):
    mine = Path(shutil.copy(CAT, tmp_path / "mine.safetensors"))
    before = mine.read_bytes()
    for words in (("--lora", f"{mine}:0.5", "cat=sks cat"), ("--style", str(mine), *TWO)):
        assert "would replace" in refused(capsys, tmp_path / "out", *words, "--trace", str(mine))
    numbered = Path(shutil.copy(CAT, tmp_path / "t-1.safetensors"))
    assert "would replace" in refused(capsys, tmp_path / "out", "--lora", str(numbered), "cat=sks cat", "--seeds", "0,1",
                                      "--trace", str(tmp_path / "t.safetensors"))
    model = Path(shutil.copytree(GOLDEN / "model", tmp_path / "model"))
    weights = model / "unet/diffusion_pytorch_model.safetensors"
    assert "would replace" in refused(capsys, tmp_path / "out", *TWO, "--model", str(model), "--trace", str(weights))
    assert numbered.read_bytes() == before and load_file(weights)
    assert "must end in .safetensors" in refused(capsys, tmp_path / "out", *TWO, "--trace", str(tmp_path / "clora-0.png"))
    assert mine.read_bytes() == before


def test_a_full_disk_names_the_file(tmp_path, capsys, monkeypatch):
    def save(image, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", None)
    monkeypatch.setattr(Image.Image, "save", save)
    message = refused(capsys, tmp_path / "out", *TWO)
    assert message == f"clora: cannot write {tmp_path / 'out/clora-0.png'}: No space left on device"


def test_terminals_without_unicode_and_readers_that_stop(tmp_path):
    name = shutil.copy(CAT, tmp_path / "🐈.safetensors")
    command = [sys.executable, str(ROOT / "clora.py"), "--inspect", str(name)]
    ascii_only = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert ascii_only.returncode == 0 and "\\U0001f408.safetensors" in ascii_only.stdout and not ascii_only.stderr
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    closed = subprocess.run(["bash", "-c", f"{shlex.join(command)} >&-"], capture_output=True, text=True)
    assert closed.returncode == 0 and not closed.stderr
    if Path("/dev/full").exists():
        full = subprocess.run(["bash", "-c", f"{shlex.join(command)} > /dev/full"], capture_output=True, text=True)
        assert full.stderr.startswith("clora: the output cannot be written") and full.stderr.count("\n") == 1


def test_files_of_the_repository_are_recorded_as_seen_from_there(tmp_path, monkeypatch):
    """So that an image's command runs wherever it was made, while paths of the user stay as they were written."""
    monkeypatch.chdir(tmp_path)
    inside = os.path.relpath(ROOT / "weights/toy/loras/zib.safetensors")
    assert cli.from_repository(inside) == "weights/toy/loras/zib.safetensors"
    assert cli.from_repository(f"{inside}:0.5") == "weights/toy/loras/zib.safetensors:0.5"
    for name in ("cat.safetensors", "weights/toy", "user/repo:a.safetensors", str(tmp_path)):
        assert cli.from_repository(name) == name


def test_damaged_weights_name_the_step(tmp_path, capsys):
    model = Path(shutil.copytree(GOLDEN / "model", tmp_path / "model"))
    path = model / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_out.bias"][0] = float("nan")
    save_file(state, path)
    assert "step 0" in refused(capsys, tmp_path / "out", *TWO, "--model", str(model))


def test_too_large_an_update_names_the_step(tmp_path, capsys):
    assert "step" in refused(capsys, tmp_path / "out", *TWO, "--alpha", "1e6", "--guidance", "9999", "--refine-steps", "3",
                             "--dtype", "float16")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")])
def test_out_of_memory_says_what_to_lower(error, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(clora, "compose", fail)
    assert "--height" in refused(capsys, tmp_path / "out", *TWO)


def test_a_prompt_that_is_too_long_warns(tmp_path, capsys):
    assert run(*TWO, "--prompt", "a cat and a dog " + "very " * 70 + "wonderful", out=tmp_path) == 0
    line = capsys.readouterr().err.splitlines()[0]
    assert 'wonderful", the end of "a cat and a dog very' in line


def test_a_trigger_that_makes_a_prompt_too_long(tmp_path, capsys):
    text, trigger = load_model(GOLDEN / "model").text, ["--lora", CAT, "cat=one two sks cat"]

    def filled(prompt: str) -> str:
        """The prompt with as many words in its middle as CLIP reads."""
        longest = max(n for n in range(76) if not text.truncated(prompt.format("very " * n)))
        return prompt.format("very " * longest)
    assert run("--prompt", filled("a cat and a {}snow"), *trigger, out=tmp_path) == 0
    assert "CLIP reads 77 tokens; this was cut off" in capsys.readouterr().err
    for method in ("clora", "merge", "switch"):
        assert "beyond the 77" in refused(capsys, tmp_path / "none", "--prompt", filled("a cat and a {}dog"), *trigger,
                                                 "--lora", DOG, "dog=one two sks dog", "--method", method)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_it_leaves_no_partial_file(number, tmp_path):
    """Sent while the image is written."""
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r}); sys.argv = {["clora.py", *SMALL, *TWO, "--out", str(tmp_path)]!r}
from PIL import Image
import cli
def save(image, file, **options):
    assert len(os.listdir({str(tmp_path)!r})) == 1
    os.kill(os.getpid(), {int(number)})
Image.Image.save = save
cli.start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    assert done.returncode == 128 + number and not done.stderr and not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_removed_later(tmp_path):
    names = [".clora-0-abcdefgh.png", ".clora-0-panel-abcdefgh.png", ".t-abcdefgh.safetensors", ".clora-0-12345678.png",
             ".other-0-abcdefgh.png"]
    for name in names:
        (tmp_path / name).touch()
        if "12345678" not in name:
            os.utime(tmp_path / name, (0, 0))
    assert run(*TWO, "--trace", str(tmp_path / "t.safetensors"), out=tmp_path) == 0
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([*names[3:], "clora-0.png", "t.safetensors"]), "young, or not its own"


def test_interruption_keeps_finished_images_and_leaves_no_partial_file(tmp_path):
    command = [sys.executable, str(ROOT / "clora.py"), *SMALL, *TWO, "--seeds", "0-99", "--out", str(tmp_path)]
    # a shell that runs the tests in the background has them ignore Ctrl-C, and children inherit that
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.time() + 120
    while not (tmp_path / "clora-1.png").exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and "interrupted" in errors
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) >= 2 and all(re.fullmatch(r"clora-\d+\.png", name) for name in files)
    for name in files:
        with Image.open(tmp_path / name) as image:
            image.load()
