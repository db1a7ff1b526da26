"""Running an image again from its settings, what a stranger's image can and cannot do, and --inspect."""

import io
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

import cli
import report
import rerun
from weights.lora import describe, trigger_words

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder in which a user made out/clora-3.png, with paths relative to it."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(GOLDEN / "model", folder / "model")
    for name in ("cat_peft", "dog_kohya", "style_peft"):
        shutil.copy(GOLDEN / f"loras/{name}.safetensors", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main([
            "--model", "model", "--prompt", "a cat and a dog", "--negative=-nsfw", "--height", "64", "--width", "64",
            "--recipe", "fast", "--steps", "3", "--refine-steps", "0", "--uncond-from", "base",
            "--eta", "0.5", "--scheduler", "ddim", "--seed", "3",
            "--lora", "cat_peft.safetensors", "cat=sks cat", "--lora", "dog_kohya.safetensors:0.9", "dog=sks dog",
            "--style", "style_peft.safetensors:0.8", "--low-memory", "--quiet"]) == 0
    return folder


@pytest.fixture
def user(made, tmp_path, monkeypatch) -> Path:
    """A copy of that folder, in which the user is."""
    folder = Path(shutil.copytree(made, tmp_path / "user"))
    monkeypatch.chdir(folder)
    return folder


def again(*argv: str, image: str = "out/clora-3.png", out: str = "again") -> int:
    return cli.main(["--from", image, "--out", out, "--quiet", *argv])


def test_the_same_bytes(user, capsys):
    before = Path("out/clora-3.png").read_bytes()
    assert again() == 0 and Path("again/clora-3.png").read_bytes() == before
    assert again(out="out") == 0 and Path("out/clora-3.png").read_bytes() == before
    assert capsys.readouterr().err == ""


def test_from_within_the_folder_of_the_image(user, monkeypatch, capsys):
    before = Path("out/clora-3.png").read_bytes()
    monkeypatch.chdir("out")
    assert again(image="clora-3.png", out=".") == 0, capsys.readouterr().err
    assert np.array_equal(np.asarray(Image.open("clora-3.png")), np.asarray(Image.open(io.BytesIO(before))))
    assert again("--lora", "../style_peft.safetensors", "cat=sks cat", image="clora-3.png", out=".") == 2
    assert "would replace" in capsys.readouterr().err


def test_from_another_folder(user, monkeypatch):
    """Paths that are not there from here are looked for around the image."""
    elsewhere = user.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert again(image=str(user / "out/clora-3.png")) == 0
    with Image.open("again/clora-3.png") as a, Image.open(user / "out/clora-3.png") as b:
        assert np.array_equal(np.asarray(a), np.asarray(b))


def recalled(*argv: str, image: str = "out/clora-3.png"):
    return rerun.recall(["--from", image, *argv], Path(image), cli.make_parser)


def test_a_flag_on_top_changes_one_thing(user):
    args = recalled()
    assert (args.seed, args.recipe, args.negative, args.low_memory, args.device) == (3, "fast", "-nsfw", True, "cpu")
    assert args.lora == [["cat_peft.safetensors", "cat=sks cat"], ["dog_kohya.safetensors:0.9", "dog=sks dog"]]
    recipe = cli.make_recipe(args, {"recipe": {"alpha": 99.0}})
    assert (recipe.steps, recipe.eta, recipe.alpha, recipe.uncond_from, recipe.refine_steps) == (3, 0.5, 20, "base", 0)
    changed = recalled("--seed", "8", "--lora", "elsewhere/c.safetensors", "CAT=other cat", "--steps", "30")
    assert (changed.seed, changed.prompt, changed.height) == (8, args.prompt, 64)
    assert changed.lora == [["elsewhere/c.safetensors", "CAT=other cat"], args.lora[1]]
    # update_until 1 and refine_at 0, 1 of 3 steps
    assert cli.make_recipe(changed, {}).refine_at == (0, 10) and cli.make_recipe(changed, {}).uncond_from == "base"
    assert cli.make_recipe(recalled("--recipe", "release"), {}).guidance == 10


def test_another_seed_end_to_end(user):
    assert again("--seed", "8") == 0
    with Image.open("again/clora-8.png") as image:
        assert image.info["seed"] == "8" and image.info["prompt"] == "a cat and a dog"
    assert Path("again/clora-8.png").read_bytes() != Path("out/clora-3.png").read_bytes()


def test_the_image_itself_is_not_replaced_by_another(user, capsys):
    before = Path("out/clora-3.png").read_bytes()
    assert again("--eta", "0.6", out="out") == 2
    assert "another --out" in capsys.readouterr().err and Path("out/clora-3.png").read_bytes() == before


def test_a_panel_is_not_replaced_by_another(user, capsys):
    assert again("--panel", out="out") == 0
    before = Path("out/clora-3-panel.png").read_bytes()
    assert again("--alpha", "1", "--panel", image="out/clora-3-panel.png", out="out") == 2
    assert "would replace" in capsys.readouterr().err and Path("out/clora-3-panel.png").read_bytes() == before


def test_changed_files_are_noticed(user, capsys):
    for name in ("cat_peft.safetensors", "style_peft.safetensors", "model/vae/diffusion_pytorch_model.safetensors"):
        save_file({key: value * 1.01 for key, value in load_file(name).items()}, name)
    args = recalled()
    assert again("--method", "base", "--steps", "1") == 0
    lines = capsys.readouterr().err.splitlines()                    # and of a style that is the image's nothing
    assert len(lines) == 3 and all(line.startswith("clora: warning: ") for line in lines)
    for name, line in zip(("model", "cat_peft.safetensors", "style_peft.safetensors"), lines):
        then = rerun.hashes_of(args.chunks)[{"m": "model", "c": "subject cat", "s": "style"}[name[0]]]
        assert name in line and then[:8] in line and "out/clora-3.png" in line


@pytest.mark.parametrize("word", ["model", "style"])
def test_a_subject_called_like_a_kind_of_file(word):
    chunks = {"model": '{"hash": "a"}', "loras": json.dumps([{"subject": word, "sha256": "b"}]), "style": '{"sha256": "c"}'}
    assert rerun.hashes_of(chunks) == {"model": "a", f"subject {word}": "b", "style": "c"}


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json",
                                  "scheduler/scheduler_config.json", "tokenizer/vocab.json"])
def test_a_changed_file_of_the_model_is_noticed(file, user, capsys):
    path = Path("model") / file
    content = path.read_bytes()
    middle = len(content) // 2
    swapped = content[middle:middle + 1].translate(bytes(range(1, 256)) + b"\0")
    path.write_bytes(content[:middle] + swapped + content[middle + 1:] if path.suffix == ".safetensors" else content + b"\n")
    for flags in ([], ["--vae", ""], ["--vae", "model/vae"]):
        assert again(*flags) == 0
        assert "warning: model is not what out/clora-3.png was made with" in capsys.readouterr().err


def test_what_the_flags_replace_is_no_change(user, capsys):
    shutil.copy("style_peft.safetensors", "other.safetensors")
    assert again("--lora", "other.safetensors", "cat=sks cat") == 0 and capsys.readouterr().err == ""


def test_low_memory_and_style_can_be_taken_away(user, capsys):
    assert recalled().low_memory and not recalled("--no-low-memory").low_memory
    assert again("--style", "") == 0 and capsys.readouterr().err == ""
    assert json.loads(report.load_settings(Path("again/clora-3.png"))["style"]) is None


def test_a_lora_can_be_taken_away(user, capsys):
    assert again("--lora", "", "cat") == 0 and capsys.readouterr().err.count("clora: warning: ") <= 1
    assert [one["subject"] for one in json.loads(report.load_settings(Path("again/clora-3.png"))["loras"])] == ["dog"]
    assert again("--lora", "", "fox") == 2 and 'has no LoRA for "fox"' in capsys.readouterr().err


def test_another_vae_is_part_of_the_settings(user, capsys):
    shutil.copytree("model/vae", "vae")
    state = load_file("vae/diffusion_pytorch_model.safetensors")
    save_file({key: value * 0.9 for key, value in state.items()}, "vae/diffusion_pytorch_model.safetensors")
    assert again("--vae", "vae", out="vae-out") == 0 and capsys.readouterr().err == ""
    image = Path("vae-out/clora-3.png")
    assert image.read_bytes() != Path("out/clora-3.png").read_bytes()
    assert again(image=str(image)) == 0 and Path("again/clora-3.png").read_bytes() == image.read_bytes()
    assert again("--vae", "", image=str(image)) == 0 and capsys.readouterr().err == ""
    assert Path("again/clora-3.png").read_bytes() == Path("out/clora-3.png").read_bytes()
    save_file(state, "vae/diffusion_pytorch_model.safetensors")
    assert again(image=str(image)) == 0 and "warning: vae is not what" in capsys.readouterr().err
    Path("vae").rename("moved")
    assert again(image=str(image)) == 2 and "say where it is: --vae VAE" in capsys.readouterr().err
    assert again("--vae", "moved", image=str(image)) == 0


def test_missing_and_moved_files(user, capsys):
    Path("cat_peft.safetensors").rename("moved.safetensors")
    assert again() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cat_peft.safetensors" in error and '--lora FILE "cat=sks cat"' in error
    assert again("--lora", "moved.safetensors", "cat=sks cat") == 0
    with Image.open("again/clora-3.png") as a, Image.open("out/clora-3.png") as b:
        assert np.array_equal(np.asarray(a), np.asarray(b))
    Path("model").rename("model 2")
    assert again("--lora", "moved.safetensors", "cat=sks cat") == 2
    assert "model: there is no such" in capsys.readouterr().err


def png(path: Path, **chunks: str) -> str:
    info = PngImagePlugin.PngInfo()
    for key, value in chunks.items():
        info.add_text(key, value, zip=len(value) > 10**6)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return str(path)


GOOD = {"model": '{"name": "m", "hash": "0"}', "loras": "[]", "style": "null"}
COMMAND = "python clora.py --prompt 'a cat' --method base"


@pytest.mark.parametrize("chunks, word", [
    ({}, "no settings"), ({"parameters": "a cat, Steps: 20"}, "no settings"),
    ({"command": "rm -rf /", **GOOD}, "not one of clora.py"), ({"command": "python -c 'x'", **GOOD}, "not one of clora.py"),
    ({"command": "", **GOOD}, "not one of clora.py"), ({"command": "python clora.py", **GOOD}, "no --prompt"),
    ({"command": COMMAND + " --nonsense", **GOOD}, "--nonsense"), ({"command": COMMAND + " --steps x", **GOOD}, "--steps"),
    ({"command": COMMAND + " --help", **GOOD}, "--help"), ({"command": COMMAND + " 'open", **GOOD}, "quotation"),
    ({"command": COMMAND + " \x1b[2J --what\x07", **GOOD}, "--what"),
    ({"command": COMMAND}, "damaged"), ({"command": COMMAND, **GOOD, "loras": "{"}, "damaged"),
    ({"command": COMMAND, **GOOD, "loras": "[" * 100_000}, "damaged"),
    ({"command": COMMAND, **GOOD, "loras": "[1]"}, "damaged"),
    ({"command": COMMAND, **GOOD, "model": '{"hash": 5}'}, "damaged"),
    ({"command": COMMAND, **GOOD, "loras": '[{"subject": "cat", "sha256": null}]'}, "damaged"),
    ({"command": COMMAND, **GOOD, "loras": "3"}, "damaged"),
    ({"command": COMMAND, **GOOD, "model": "[]"}, "damaged"), ({"command": COMMAND, **GOOD, "style": "7"}, "damaged"),
    ({"command": COMMAND + " x" * 300_000, **GOOD}, "its command has 600,"),
    ({"command": COMMAND + " x" * 2 * 10**6}, "too large"), ({"command": COMMAND, "x": "y" * 10**7}, "too large")])
def test_bad_settings_are_one_line(chunks, word, tmp_path, capsys):
    assert again(image=png(tmp_path / "bad.png", **chunks), out=str(tmp_path / "out")) == 2
    captured = capsys.readouterr()
    assert word in captured.err and captured.err.count("\n") == 1 and len(captured.err) < 1100 and not captured.out
    assert captured.err.startswith("clora: ") and captured.err.strip().isprintable() and "bad.png" in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, word", [(None, "no such file"), (b"", "no PNG"), (b"nonsense", "no PNG"),
                                           (b"\x89PNG\r\n\x1a\n", "bad.png"), ("jpeg", "no PNG"), ("folder", "directory"),
                                           ("cut", "bad.png"), ("bomb", "bomb")])
def test_bad_images_are_one_line(content, word, tmp_path, capsys):
    path = tmp_path / "bad.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "jpeg":
        Image.new("RGB", (8, 8)).save(path, format="JPEG")
    elif content == "folder":
        path.mkdir()
    elif content:
        png(path, **GOOD)
        whole = path.read_bytes()
        header = b"IHDR" + struct.pack(">II", 2**30, 2**30) + whole[24:29]              # a claim of 2^60 pixels
        bomb = whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
        path.write_bytes(whole[:50] if content == "cut" else bomb)
    assert again(image=str(path)) == 2
    captured = capsys.readouterr()
    assert word in captured.err and captured.err.count("\n") == 1 and captured.err.startswith("clora: ")


def test_an_image_cannot_say_where_to_write(tmp_path):
    hostile = COMMAND + f" --out {tmp_path}/a --trace {tmp_path}/b --seeds 0-9 --panel --batch 9 --from x --inspect y"
    path = png(tmp_path / "x.png", command=hostile, **GOOD)
    args, plain = rerun.recall([], Path(path), cli.make_parser), cli.make_parser().parse_args([])
    for name in ("out", "trace", "seeds", "panel", "batch", "source", "inspect"):
        assert getattr(args, name) == getattr(plain, name)
    assert args.prompt == "a cat" and args.method == "base"


def test_settings_survive_any_text(tmp_path):
    settings = {"prompt": "a “cat” 猫\n\\ 'x' \"y\"", "command": "python clora.py", "loras": [{"a": None}]}
    report.save_picture(tmp_path / "x.png", np.zeros((8, 8, 3), np.uint8), settings)
    assert report.load_settings(tmp_path / "x.png") == {**settings, "loras": '[{"a": null}]'}


# --- what a LoRA file says about itself -------------------------------------------------------------------------------

def kohya(layers: list[str], rank: int = 4, width: int = 768, **more: float) -> dict[str, torch.Tensor]:
    tensors = {}
    for name in layers:
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = torch.ones(rank, width), torch.ones(8, rank)
        tensors |= {f"{name}.{key}": torch.tensor(value) for key, value in more.items()}
    return tensors


BLOCK = "down_blocks_1_attentions_0_transformer_blocks_0"
PEFT, LOHA = f"unet.{BLOCK}.attn1.to_q.lora_", "lora_unet_input_blocks_3_0_op.hada_w1_"
SD15 = [f"lora_unet_{BLOCK}_attn1_to_q", f"lora_unet_{BLOCK}_attn2_to_k", f"lora_unet_{BLOCK}_ff_net_0_proj",
        "lora_unet_down_blocks_0_resnets_0_conv1", "lora_unet_down_blocks_1_attentions_0_proj_in",
        "lora_unet_mid_block_resnets_0_time_emb_proj", "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te_text_model_encoder_layers_0_mlp_fc1"]
TAGS = {"10_sks cat": {"sks": 30, "cat": 30, "snow": 2}, "5_other": {"snow": 40, "sks": 20}}


def test_describe(tmp_path):
    metadata = {"ss_output_name": "my cat", "ss_tag_frequency": json.dumps(TAGS), "ss_base_model_version": "sd_v1",
                "ss_sd_model_name": "v1-5.ckpt", "modelspec.architecture": "stable-diffusion-v1/lora"}
    save_file(kohya(SD15[:4], alpha=2.0) | kohya(SD15[4:], 8, alpha=1.5), tmp_path / "cat.safetensors", metadata)
    said = describe(tmp_path / "cat.safetensors")
    assert said.pop("sha256").isalnum()
    assert said == {"format": "kohya LoRA", "rank": "4, 8", "alpha": "1.5, 2", "made for": "SD 1.x", "name": "my cat",
                    "layers": "UNet: 2 attention, 1 feed-forward, 2 convolutions, 1 other; "
                              "text encoder: 1 attention, 1 feed-forward",
                    "trained on": "sd_v1, v1-5.ckpt, stable-diffusion-v1/lora", "trigger words": "sks, snow, cat"}


@pytest.mark.parametrize("tensors, expected", [
    (kohya([f"lora_unet_{BLOCK}_attn2_to_k"], width=2048), {"made for": "SDXL"}),
    (kohya([f"lora_unet_{BLOCK}_attn2_to_k"], rank=1024), {"made for": "SD 1.x", "rank": "1024"}),
    (kohya([f"lora_unet_{BLOCK}_attn2_to_k"], width=1024), {"made for": "SD 2"}),
    (kohya(["lora_unet_double_blocks_0_img_attn_qkv"]), {"rank": "4", "layers": "UNet: 1 attention"}),
    ({f"{PEFT}A.weight": torch.ones(3, 8), f"{PEFT}B.weight": torch.ones(8, 3)},
     {"format": "peft LoRA", "rank": "3", "alpha": "not in the file, so the rank"}),
    ({f"{LOHA}a": torch.ones(8, 2), f"{LOHA}b": torch.ones(2, 9)},
     {"format": "kohya LoHa", "rank": "2", "layers": "UNet: 1 convolutions"}),
    ({"lora_unet_x_to_q.lokr_w1": torch.ones(2, 2), "lora_unet_x_to_q.lokr_w2": torch.ones(2, 2)}, {"rank": "full"}),
    ({"base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(5, 8)},
     {"rank": "5", "layers": "text encoder: 1 attention"})])
def test_describe_other_models_and_formats(tensors, expected, tmp_path):
    save_file(tensors, tmp_path / "x.safetensors")
    assert expected.items() <= describe(tmp_path / "x.safetensors").items()


def test_inspect_says_which_alpha_counts(tmp_path):
    """PEFT's file may have two; kohya's note of its training does not count where the keys are missing."""
    save_file(kohya(SD15), tmp_path / "x.safetensors", {"ss_network_alpha": "1"})
    without = {key: value for key, value in load_file(tmp_path / "x.safetensors").items() if not key.endswith(".alpha")}
    save_file(without, tmp_path / "x.safetensors", {"ss_network_alpha": "1"})
    assert describe(tmp_path / "x.safetensors")["alpha"] == "not in the file, so the rank (its training says 1)"
    peft = {f"{half}.x.to_q.lora_{ab}.weight": torch.ones(4, 4) for half in ("unet", "text_encoder") for ab in "AB"}
    noted = json.dumps({"unet.lora_alpha": 32, "text_encoder.lora_alpha": 8})
    save_file(peft, tmp_path / "y.safetensors", {"lora_adapter_metadata": noted})
    assert describe(tmp_path / "y.safetensors")["alpha"] == "32, 8"


@pytest.mark.parametrize("metadata, expected", [
    ({}, []), ({"modelspec.trigger_phrase": "sks cat, in snow"}, ["sks cat"]),
    ({"ss_tag_frequency": json.dumps(TAGS), "modelspec.trigger_phrase": "sks"}, ["sks", "snow", "cat"]),
    ({"ss_output_name": "sks"}, ["sks"]), ({"ss_output_name": "x", "ss_tag_frequency": '{"10_sks cat": {}}'}, ["sks cat"]),
    ({"ss_tag_frequency": "{"}, []), ({"ss_tag_frequency": "[1]"}, []), ({"ss_tag_frequency": '{"a": [1]}'}, []),
    ({"ss_tag_frequency": '{"a": {"b": "c", "d": 1}}'}, ["d"]), ({"ss_tag_frequency": "[" * 100_000}, []),
    ({"ss_tag_frequency": '{"a": {"b": 9' + "9" * 5000 + "}}"}, []),
    ({"modelspec.trigger_phrase": "a\x1b[31m\u202eb\nc"}, ["a [31m b c"]),
    ({"modelspec.trigger_phrase": "x" * 10**7}, ["x" * 56 + " ..."])])
def test_trigger_words(metadata, expected):
    assert trigger_words(metadata) == expected


def test_the_tag_with_the_subjects_word_is_suggested(user, capsys):
    tags = {"10_x": {"1girl": 20, "solo": 18, "sks cat": 12, "all": 3}}
    save_file(load_file("cat_peft.safetensors"), "cat.safetensors", {"ss_tag_frequency": json.dumps(tags)})
    assert cli.main(["--model", "model", "--height", "64", "--width", "64", "--steps", "1", "--update-until", "-1",
                     "--quiet", "--prompt", "a cat", "--lora", "cat.safetensors", "cat"]) == 0
    assert 'write "cat=sks cat"' in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_devices_are_not_waited_for(tmp_path, capsys):
    os.mkfifo(pipe := tmp_path / "pipe.safetensors")
    os.mkfifo(tmp_path / "adapter_config.json")
    save_file({f"base_model.model.x.lora_{ab}.weight": torch.ones(2, 2) for ab in "AB"}, tmp_path / "a.safetensors")
    assert cli.main(["--inspect", str(tmp_path / "a.safetensors")]) == 0, "passed over"
    model = Path(shutil.copytree(GOLDEN / "model", tmp_path / "model"))
    (model / "unet/config.json").unlink()
    os.mkfifo(model / "unet/config.json")
    assert cli.main(["--model", str(model), "--prompt", "a cat", "--method", "base", "--out", str(tmp_path)]) == 2
    assert "config.json is a device or a pipe" in capsys.readouterr().err
    assert cli.main(["--inspect", str(pipe), "/dev/zero"]) == 2
    assert cli.main(["--from", str(pipe)]) == 2
    assert capsys.readouterr().err.count("is a device or a pipe") == 3


def test_inspect_takes_a_weight_as_lora_does(capsys):
    assert cli.main(["--inspect", f"{GOLDEN / 'loras/cat_peft.safetensors'}:0.8"]) == 0
    assert "rank" in capsys.readouterr().out


def test_inspect_goes_on_after_a_bad_file(tmp_path, capsys):
    save_file(kohya(SD15), tmp_path / "good.safetensors", {"ss_output_name": "\x1b]0;owned\x07" + "y" * 10**6})
    (tmp_path / "bad.safetensors").write_text("nonsense")
    assert cli.main(["--inspect", str(tmp_path / "bad.safetensors"), str(tmp_path / "good.safetensors")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "bad.safetensors" in captured.err
    assert "good.safetensors" in captured.out and "not in the file, so the rank" in captured.out
    assert all(line.isprintable() and len(line) < 300 for line in captured.out.splitlines())
    assert cli.main(["--inspect", str(tmp_path / "good.safetensors")]) == 0


@pytest.mark.parametrize("words, hint", [("cat", 'write "cat=zib cat"'), ("cat=Cat", '"cat=zib cat"'), ("cat=sks cat", "")])
def test_a_missing_trigger_is_suggested(words, hint, user, capsys):
    save_file(load_file("cat_peft.safetensors"), "cat.safetensors", {"modelspec.trigger_phrase": "zib"})
    flags = ["--model", "model", "--height", "64", "--width", "64", "--steps", "1", "--update-until", "-1", "--quiet"]
    assert cli.main([*flags, "--prompt", "a cat", "--lora", "cat.safetensors", words]) == 0
    assert (hint in capsys.readouterr().err) if hint else capsys.readouterr().err == ""
    if hint:
        assert cli.main([*flags, "--prompt", "a zibzib cat", "--lora", "cat.safetensors", words]) == 0
        assert hint in capsys.readouterr().err
        assert cli.main([*flags, "--prompt", "a zib cat", "--lora", "cat.safetensors", words]) == 0
        assert 'says "zib" to every LoRA' in capsys.readouterr().err
