"""The single-file layout against diffusers' own converters, and whole models against its pipeline, on all keys of SD 1.5."""

import json
import shutil
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers.loaders import single_file_utils as theirs  # noqa: E402

from unet import UNet, UNetConfig  # noqa: E402
from vae import VAE, VAEConfig  # noqa: E402
from weights import from_ldm, load_model  # noqa: E402
from weights.names import ldm_unet_name, ldm_vae_name  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden/model"


def marked(keys) -> dict[str, torch.Tensor]:
    """A tensor of its own for every key: converters only move them."""
    return {key: torch.full((2, 2, 1, 1) if "mid_block.attentions" in key and "weight" in key else (2,), float(n))
            for n, key in enumerate(keys)}


@pytest.fixture(scope="module")
def modules():
    with torch.device("meta"):
        return UNet(UNetConfig()), VAE(VAEConfig())


def test_unet_names(modules):
    state = marked(modules[0].state_dict())
    attends = tuple(bool(block.attentions) for block in modules[0].up_blocks)
    ldm = {f"model.diffusion_model.{ldm_unet_name(key, 2, attends)}": value for key, value in state.items()}
    config = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None}
    converted = theirs.convert_ldm_unet_checkpoint(dict(ldm), config)
    assert converted.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in converted.items())
    assert all(torch.equal(value, state[key]) for key, value in from_ldm(ldm)["unet"].items())


def test_vae_names(modules):
    state = marked(modules[1].state_dict())
    ldm = {f"first_stage_model.{ldm_vae_name(key, 4)}": value for key, value in state.items()}
    config = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    converted = theirs.convert_ldm_vae_checkpoint(dict(ldm), config)
    assert converted.keys() == state.keys()
    ours = from_ldm(ldm)["vae"]
    assert ours.keys() == state.keys()
    for key, value in converted.items():
        assert torch.equal(value.flatten(), state[key].flatten()) and torch.equal(ours[key].flatten(), state[key].flatten())


def test_text_encoder_names():
    state = {f"cond_stage_model.transformer.text_model.encoder.layers.{n}.mlp.fc1.weight": torch.full((2,), float(n))
             for n in range(12)}
    converted = theirs.convert_ldm_clip_checkpoint(dict(state))
    ours = from_ldm(state)["text_encoder"]
    assert ours.keys() == converted.keys() and all(torch.equal(ours[key], converted[key]) for key in ours)


@pytest.mark.parametrize("told", [{"clip_sample": True}, {"steps_offset": 0}, {}])
def test_what_the_pipeline_sets_whatever_the_folder_says(told, tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "model")
    path = folder / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text())
    del config["clip_sample"], config["steps_offset"]
    path.write_text(json.dumps({**config, "_class_name": "DDIMScheduler", **told}))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).scheduler.config
    ours = load_model(folder).scheduler_config
    assert (ours["clip_sample"], ours["steps_offset"]) == (theirs["clip_sample"], theirs["steps_offset"]) == (False, 1)


@pytest.mark.parametrize("height, width, changes, kind", [
    (64, 64, {}, None), (64, 96, {}, None), (64, 96, {"eta": 0.5}, None),
    (64, 96, {"scheduler": "lcm", "guidance": 1.5}, "LCMScheduler"),
    (64, 64, {"scheduler": "lcm", "guidance": 1.0}, "LCMScheduler")])
def test_a_plain_picture_equals_the_pipeline(height, width, changes, kind):
    """Method base: initial noise, prompts, loop, guidance, the noise that samplers add, and decoding together."""
    import dataclasses

    import numpy as np

    import clora
    from recipe import RECIPES
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(GOLDEN, safety_checker=None, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if kind:
        pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config)
    recipe = dataclasses.replace(RECIPES["paper"], steps=6, **changes)
    image = pipeline("a cat and a dog", negative_prompt="nsfw", height=height, width=width, num_inference_steps=6,
                     guidance_scale=recipe.guidance, eta=recipe.eta, generator=torch.Generator().manual_seed(5),
                     output_type="np").images[0]
    model = load_model(GOLDEN)
    plan = clora.make_plan(model, "a cat and a dog", negative="nsfw", method="base", recipe=recipe)
    noise = clora.initial_noise(model, height, width, 5)
    *_, last = clora.compose(model, plan, recipe, noise, clora.step_generators(noise, [5]))
    ours = clora.decode(model, last.latents)[0].numpy()
    assert np.abs(ours - (image * 255).round()).max() <= 1
