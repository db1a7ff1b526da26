"""`--recipe release` against what the authors' code computed, step by step (tests/golden/README.md)."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import clora
from recipe import RECIPES
from weights import load_model
from weights.lora import read_lora

GOLDEN = Path(__file__).parent / "golden"


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN / "model")


@pytest.fixture(scope="module", params=[("main", "peft"), ("main", "kohya"), ("noupdate", "kohya")],
                ids=lambda case: "-".join(case))
def run(request, model):
    """(recorded arguments, recorded tensors, our plan, our initial noise, our steps)."""
    name, form = request.param
    facts = json.loads((GOLDEN / f"runs/{name}.json").read_text())
    args, tensors = facts["args"], load_file(GOLDEN / f"runs/{name}.safetensors")
    loras = [read_lora(GOLDEN / f"loras/{subject}_{form}.safetensors", model.unet, model.text.model)
             for subject in ("cat", "dog")]
    subjects = [clora.Subject(loras[0], "cat", "sks cat"), clora.Subject(loras[1], "dog", "sks dog")]
    recipe = dataclasses.replace(
        RECIPES["release"], steps=args["num_inference_steps"], guidance=args["guidance_scale"],
        alpha=args["step_size"], update_until=args["max_iter_to_alter"] - 1 if args["latent_update"] else -1,
        refine_at=tuple(args["iterative_steps"]), refine_steps=args["iterative_steps_steps"],
        threshold=args["mask_threshold_alpha"])
    prompts = args["prompt_list"]
    plan = clora.make_plan(model, prompts[0], subjects, None, args["negative_prompt_list"][0], "clora", recipe)
    assert list(plan.prompts) == prompts
    noise = clora.initial_noise(model, args["height"], args["width"], facts["seed"])
    return args, tensors, plan, noise, list(clora.compose(model, plan, recipe, noise))


def test_words_are_found_where_the_release_was_told_they_are(run):
    args, _, plan, _, _ = run
    theirs = [[(v, token) for v, tokens in enumerate(group) for token in tokens]
              for group in args["important_token_indices"]]
    assert [list(concept) for concept in plan.concepts] == theirs
    assert [list(words) for words in plan.trigger_tokens] == args["mask_indices"][1:]


def test_initial_noise_is_equal(run):
    _, tensors, _, noise, _ = run
    assert torch.equal(noise, tensors["init_latents"])


def test_prompt_embeddings(run):
    _, tensors, plan, _, _ = run
    ours = plan.context.unflatten(0, (2, -1)).transpose(0, 1)                       # [P, 2, 77, D]
    assert relative(ours, tensors["prompt_embeds"]) < 1e-5


def test_timesteps_are_equal(run):
    _, tensors, _, _, steps = run
    assert [step.timestep for step in steps] == tensors["timesteps"].tolist()


def test_losses_and_updates(run):
    args, tensors, _, _, steps = run
    updated = tensors["eval_updated"].bool()
    assert [step.index for step in steps for _ in step.losses] == tensors["eval_step"][updated].tolist()
    if not args["latent_update"]:
        return
    ours = torch.cat([loss for step in steps for loss in step.losses])
    assert relative(ours, tensors["eval_loss"][updated]) < 1e-4
    ours = torch.cat([latents for step in steps for latents in step.updates])
    assert relative(ours, tensors["eval_latents_out"][updated]) < 1e-4


def test_gradients(run, model):
    """Gradients at the recorded latents, so that each is compared alone."""
    args, tensors, plan, _, _ = run
    if not args["latent_update"]:
        return
    recipe, layers = RECIPES["release"], model.unet.map_layers(2)
    for e in (0, 3, 5, 10):
        t = int(tensors["timesteps"][tensors["eval_step"][e]])
        loss, gradient = clora.contrast(model.unet, tensors["eval_latents_in"][e][None], t, plan, layers, recipe)
        assert relative(loss[0], tensors["eval_loss"][e]) < 1e-5
        assert relative(gradient[0], tensors["eval_grad"][e]) < 1e-4


def test_maps_and_masks(run):
    args, tensors, plan, _, steps = run
    last = torch.tensor([(tensors["eval_step"] == i).nonzero().max() for i in range(len(steps))])
    theirs = tensors["eval_maps"][last]                                             # [S, P, 8, 8, tokens]
    ours = torch.cat([step.maps for step in steps])[..., :theirs.shape[-1]]
    assert relative(ours, theirs) < 1e-4
    masks = torch.cat([step.masks for step in steps])
    wrong = masks != tensors["step_masks"]
    for s, v, y, x in wrong.nonzero().tolist():             # a pixel may differ only if it lies on the threshold
        words = plan.trigger_tokens[v - 1] if v else [token for group in plan.trigger_tokens for token in group]
        near = []
        for k in range(1, theirs.shape[1]):
            for token in words:
                values = theirs[s, k, :, :, token]
                near.append((values[y // 4, x // 4] / (args["mask_threshold_alpha"] * values.max()) - 1).abs().item())
        assert min(near) < 1e-4, f"step {s}, variant {v}, pixel {y}, {x} is no tie"


def test_noise_and_latents_of_every_step(run):
    _, tensors, _, _, steps = run
    for i, step in enumerate(steps):
        assert relative(step.noise[0], tensors["step_noise_pred"][i]) < 1e-4, f"step {i}"
        assert relative(step.latents[0], tensors["step_latents_out"][i]) < 1e-4, f"step {i}"


def test_image(run, model):
    _, tensors, _, _, steps = run
    picture = clora.decode(model, steps[-1].latents)[0].numpy()
    theirs = tensors["image_u8"].numpy()
    assert np.abs(picture.astype(int) - theirs.astype(int)).max() <= 1
    assert (picture != theirs).mean() < 0.01
