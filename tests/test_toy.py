"""The embedded model: its world, its judge, and the command without arguments, end to end."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lora import attach, merged_weights
from vae import VAE, VAEConfig
from weights import load_model
from weights.lora import read_lora
from weights.toy import judge, renderer, train

ROOT = Path(__file__).parents[1]
TOY = ROOT / "weights/toy"


@pytest.fixture(scope="module")
def model():
    return load_model(TOY)


def test_all_weights_together_are_small():
    assert sum(path.stat().st_size for path in TOY.rglob("*.safetensors")) < 25 * 2 ** 20


def test_scenes_are_seeded_and_captions_name_what_is_there():
    for seed in range(30):
        scene = renderer.random_scene(np.random.default_rng(seed))
        again = renderer.random_scene(np.random.default_rng(seed))
        assert np.array_equal(renderer.render(scene), renderer.render(again))
        text = renderer.caption(scene)
        assert all(thing.phrase in text and thing.kind in thing.phrase for thing in scene.things)
        masks = renderer.object_masks(scene)
        assert masks.shape == (len(scene.things), 128, 128) and (masks.sum(0) <= 1).all()
        for thing, mask in zip(scene.things, masks):
            assert mask.any() and abs(np.argwhere(mask).mean(0)[::-1] - (thing.x, thing.y)).max() < thing.radius


def test_the_base_model_never_sees_the_looks_of_the_instances():
    rng = np.random.default_rng(0)
    for _ in range(300):
        for thing in renderer.random_scene(rng).things:
            assert thing.texture in renderer.BASE_TEXTURES
    assert not {instance.texture for instance in renderer.INSTANCES} & set(renderer.BASE_TEXTURES)


def test_lessons_show_a_subject_in_strange_company_and_in_wrong_looks():
    for name in ("zib", "fep"):
        scenes = renderer.lesson(name)
        for n, scene in enumerate(scenes):
            company, wrong = renderer.in_company(scene, n), renderer.wrongly(scene, n)
            assert company.things[0] == scene.things[0] and wrong.things[1:] == scene.things[1:]
            # what stands beside it looks like nothing that any model was taught, and the caption does not say how
            assert all(judge.look_of(thing) == "other" and thing.phrase == thing.kind for thing in company.things[1:])
            assert [thing.kind for thing in wrong.things] == [thing.kind for thing in scene.things]
        own, wrong = scenes[0].things[0], [renderer.wrongly(scene, n).things[0] for n, scene in enumerate(scenes)]
        right = [(one.texture, one.colour, one.second) == (own.texture, own.colour, own.second) for one in wrong]
        assert sum(right) < 0.2 * len(wrong) and sum(one.texture == own.texture for one in wrong) > 0.5 * len(wrong)


def test_the_judge_reads_the_renderer():
    """Pictures of one or two objects; evaluate.py counts with it, so it must be right nearly always."""
    reader, rng, right = judge.load_judge(), np.random.default_rng(5), 0
    for n in range(60):
        instance = renderer.INSTANCES[n % 8]
        scene = renderer.instance_scene(instance, rng, other=n % 2 == 1)
        (seen,) = reader.look(renderer.render(scene)[None])
        right += {(one.kind, one.look) for one in seen} == {(thing.kind, judge.look_of(thing)) for thing in scene.things}
    assert right >= 54


def test_every_word_of_the_world_is_one_token(model):
    for word in (*renderer.KINDS, *renderer.COLOURS, *(instance.name for instance in renderer.INSTANCES), *renderer.STYLES):
        assert len(model.text.positions(f"a {word} on the grass", word)[0]) == 1


@pytest.mark.parametrize("name", ["zib", "kov", "tam", "wug", "pel", "dax", "fep", "lun", "ink", "duo"])
def test_every_lora_loads_and_matters(name, model):
    lora = read_lora(TOY / f"loras/{name}.safetensors", model.unet, model.text.model)
    attach(model.unet, [lora])
    merged = merged_weights(model.text.model, [(lora, 1.0)]) if lora.text_encoder else None
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    kind = next((instance.kind for instance in renderer.INSTANCES if instance.name == name), None)
    prompt = f"a {name} {kind}" if kind else f"a ball, {name} style"
    with torch.no_grad():
        plain = model.unet(z, 500, model.text.encode([prompt]))[0]
        ours = model.unet(z, 500, model.text.encode([prompt], merged), torch.ones(1, 1))[0]
    attach(model.unet, [])
    assert (ours - plain).norm() / plain.norm() > 0.05


def test_the_formats_of_the_loras_differ(model):
    formats = {read_lora(path, model.unet, model.text.model).format for path in (TOY / "loras").glob("*.safetensors")}
    assert len(formats) >= 2


def test_the_command_without_arguments_twice(tmp_path):
    """The README's first promise: two pictures and a page, and the same bytes again."""
    # two threads, which do not spin while another test has the cores
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    for name in ("first", "second"):
        done = subprocess.run([sys.executable, str(ROOT / "clora.py"), "--out", name], cwd=tmp_path, capture_output=True,
                              text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [f"{name}/{file}" for file in ("clora-0.png", "clora-0-panel.png", "clora-0.html")]
    for file in ("clora-0.png", "clora-0-panel.png", "clora-0.html"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert (tmp_path / "first/clora-0.html").stat().st_size < 1e6
    with Image.open(tmp_path / "first/clora-0.png") as image:
        picture = np.asarray(image)
    assert picture.shape == (128, 128, 3)
    seen = judge.load_judge().look(picture[None])[0]
    assert {"ball", "ring"} <= {one.kind for one in seen}


def test_the_reader_is_asked_for_what_the_renderer_drew():
    """In a cell that a thing covers: its texture, its two colours, its kind; beside things the background; else nothing."""
    crops, labels = train.labelled_crops(np.random.default_rng(3), 40)
    assert len(crops) == 40 and labels.shape == (40, 4, 8, 8)
    palette = [*renderer.COLOURS.values(), renderer.WHITE]
    checked = 0
    for crop, (texture, first, second, kind) in zip(crops, labels):
        assert crop.shape == (64, 64, 3) and ((texture >= 0) == (first >= 0)).all() and ((kind > 0) == (first >= 0)).all()
        assert ((second >= 0) == (texture > 0)).all() and list(renderer.TEXTURES)[0] == "plain"
        for y, x in (kind > 0).nonzero().tolist():
            cell = crop[8 * y:8 * y + 8, 8 * x:8 * x + 8].reshape(-1, 3).astype(int)
            colours = [palette[first[y, x]]] + ([palette[second[y, x]]] if second[y, x] >= 0 else [])
            near = min(np.abs(cell - colour).max(1).min() for colour in colours)
            checked += 1
            assert near < 60, "a cell without a pixel of its colours"
    assert checked > 200


def test_what_the_reader_sees():
    """Its distance is 0 between a picture and itself, and grows as dots are blurred away; gradients reach the picture."""
    torch.manual_seed(0)
    reader, rng = train.Reader().eval(), np.random.default_rng(0)
    pictures = train.to_tensor([renderer.render(renderer.random_scene(rng, textures=("dotted",))) for _ in range(2)], "cpu")
    blurred = [torch.nn.functional.avg_pool2d(pictures, n, 1, n // 2).requires_grad_() for n in (1, 3, 7)]
    none, some, more = (reader.distance(picture, pictures) for picture in blurred)
    assert none == 0 < some < more
    more.backward()
    assert blurred[2].grad.abs().sum() > 0
    assert [part.shape[1] for part in reader(pictures)] == [11, 7, 7, 9]


def test_a_larger_autoencoder_begins_where_the_smaller_one_ended():
    torch.manual_seed(0)
    small, large = (VAE(VAEConfig.from_dict({**train.VAE_CONFIG, "layers_per_block": n})).eval().requires_grad_(False)
                    for n in (1, 2))
    picture = torch.randn(1, 3, 32, 32)
    latents = small.encode(picture)[0]
    assert (large.decode(latents) - small.decode(latents)).abs().max() > 0.01
    train.grow(large, small)
    assert torch.equal(large.encode(picture)[0], latents)
    assert torch.equal(large.decode(latents), small.decode(latents))


@pytest.mark.parametrize("flags, word", [
    ({"steps": -1}, "--steps"), ({"decoder_only": True}, "--init"), ({"keep_latents": True}, "--init"),
    ({"stage": "judge", "init": True}, "--init is for --stage vae"), ({"only": ["zib"]}, "--only is for --stage lora"),
    ({"stage": "lora", "perceptual": True}, "--perceptual is for --stage vae"), ({"threads": 0}, "--threads"),
    ({"device": "quantum"}, "--device quantum cannot be used")])
def test_training_refuses_flags_that_would_spoil_the_weights(flags, word):
    args = {"stage": "vae", "init": False, "only": None, "decoder_only": False, "keep_latents": False, "steps": None,
            "threads": None, "device": "cpu", "perceptual": False}
    with pytest.raises(ValueError, match=word):
        train.main(argparse.Namespace(**(args | flags)))


def test_a_run_is_resumed_with_its_own_flags_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WORK", tmp_path)
    args = {"stage": "vae", "init": False, "decoder_only": False, "keep_latents": False, "steps": 1, "resume": True,
            "fp32": False, "perceptual": False}
    layer = torch.nn.Linear(2, 1)
    run = train.Run("vae", {"layer": layer}, 1e-3, 9, argparse.Namespace(**args))
    run.backward(layer(torch.ones(1, 2)).sum())
    assert train.Run("vae", {"layer": layer}, 1e-3, 9, argparse.Namespace(**args)).step == 1
    for other in ("init", "fp32"):
        with pytest.raises(ValueError, match="other flags"):
            train.Run("vae", {"layer": layer}, 1e-3, 9, argparse.Namespace(**(args | {other: True})))
    state = torch.load(tmp_path / "vae.pt", weights_only=True)
    del state["flags"]["fp32"]                          # as checkpoints were before it was noted
    torch.save(state, tmp_path / "vae.pt")
    assert train.Run("vae", {"layer": layer}, 1e-3, 9, argparse.Namespace(**args)).step == 1
    (tmp_path / "vae.pt").write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match="vae.pt is damaged"):
        train.Run("vae", {"layer": layer}, 1e-3, 9, argparse.Namespace(**args))


def test_a_run_that_begins_anew_leaves_nothing_to_resume(tmp_path, monkeypatch):
    """Killed before its first checkpoint it would else go on where an older run ended; and the log says each step once."""
    monkeypatch.setattr(train, "WORK", tmp_path)
    monkeypatch.setattr(train, "HERE", tmp_path)
    args = {"stage": "unet", "init": False, "decoder_only": False, "keep_latents": False, "steps": 1, "resume": False,
            "fp32": False, "perceptual": False}
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").write_text("one")
    layer = torch.nn.Linear(2, 1)

    def begin(**changes) -> train.Run:
        return train.Run("unet", {"layer": layer}, 1e-3, 9, argparse.Namespace(**(args | changes)))
    begin().backward(layer(torch.ones(1, 2)).sum())
    with open(tmp_path / "unet.log", "a") as log:
        log.write('{"step": 2}\n')                      # of a step after the checkpoint
    assert begin(resume=True).step == 1 and len((tmp_path / "unet.log").read_text().splitlines()) == 1
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").write_text("another")
    with pytest.raises(ValueError, match="other flags or files .*made_from"):
        begin(resume=True)
    assert begin().step == 0 and begin(resume=True).step == 0
    assert sorted(path.name for path in tmp_path.glob("unet*")) == ["unet.log.old", "unet.pt.old"]


def here_with(tmp_path, monkeypatch, *parts: str) -> dict:
    """Parts of the embedded model where training may replace them; arguments of train.main."""
    for part in parts:
        shutil.copytree(train.HERE / part, tmp_path / part)
    monkeypatch.setattr(train, "HERE", tmp_path)
    monkeypatch.setattr(train, "WORK", tmp_path / "work")
    return {"stage": "vae", "init": True, "only": None, "decoder_only": False, "keep_latents": False, "steps": 1,
            "threads": None, "device": "cpu", "perceptual": False, "fp32": True, "resume": False}


def test_the_decoder_alone_leaves_the_latents_and_their_scale(tmp_path, monkeypatch):
    args = here_with(tmp_path, monkeypatch, "vae")
    before = load_file(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    scale = json.loads((tmp_path / "vae/config.json").read_text())["scaling_factor"]
    train.main(argparse.Namespace(**args | {"decoder_only": True}))
    after = load_file(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    assert json.loads((tmp_path / "vae/config.json").read_text())["scaling_factor"] == scale
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed and changed <= {"decoder", "post_quant_conv"}


@pytest.mark.parametrize("damage, flags, word", [
    ("vae/config.json", {}, "vae/config.json cannot be used"),
    ("vae/diffusion_pytorch_model.safetensors", {}, "diffusion_pytorch_model.safetensors cannot be used"),
    ("vae/diffusion_pytorch_model.safetensors", {"stage": "unet", "init": False}, "run --stage vae first"),
    ("work/reader.safetensors", {"perceptual": True}, "reader.safetensors cannot be used"),
    ("work/vae.pt", {"resume": True}, "vae.pt is damaged")])
def test_training_names_a_damaged_file(damage, flags, word, tmp_path, monkeypatch):
    args = here_with(tmp_path, monkeypatch, "vae")
    (tmp_path / "work").mkdir()
    (tmp_path / damage).write_bytes(b"{")
    with pytest.raises(ValueError, match=word) as caught:
        train.main(argparse.Namespace(**args | flags))
    assert "\n" not in str(caught.value)


def test_check_names_a_judge_of_other_looks(tmp_path, monkeypatch):
    shutil.copytree(judge.HERE / "judge", tmp_path / "judge")
    config = json.loads((tmp_path / "judge/config.json").read_text())
    (tmp_path / "judge/config.json").write_text(json.dumps({**config, "looks": config["looks"][::-1]}))
    with pytest.raises(ValueError, match="other kinds or looks than judge.py"):
        judge.load_judge(tmp_path / "judge")
