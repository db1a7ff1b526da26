"""The functions of clora.py against float64 written out by hand, then their limits and properties."""

import cmath
import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import clora
import lora
from attention import attention_probs
from lora import LoRA, LoRALayer
from recipe import RECIPES, Recipe
from scheduler import make_scheduler
from text import swap_words
from unet import UNet, UNetConfig

SD15_SCHEDULER = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                  "num_train_timesteps": 1000, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
TINY = UNetConfig(block_out_channels=(8, 16), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",) * 2,
                  up_block_types=("CrossAttnUpBlock2D",) * 2, cross_attention_dim=12, attention_head_dim=2,
                  norm_num_groups=4, sample_size=8)


def loss_by_hand(groups: list[list[list[complex]]], tau: float) -> complex:
    """METHOD section 4 with loops. Complex numbers, so that a step along the imaginary axis gives exact derivatives."""
    maps = [(c, one) for c, group in enumerate(groups) for one in group]

    def sim(a: list[complex], b: list[complex]) -> complex:
        return sum(x * y for x, y in zip(a, b)) / (cmath.sqrt(sum(x * x for x in a)) * cmath.sqrt(sum(x * x for x in b)))
    terms = []
    for (ci, a), (cj, b) in itertools.permutations(maps, 2):
        if ci == cj:
            positive = cmath.exp(sim(a, b) / tau)
            negative = sum(cmath.exp(sim(a, n) / tau) for cn, n in maps if cn != ci)
            terms.append(-cmath.log(positive / (positive + negative)))
    return sum(terms) / len(terms)


def numbers(groups: list[Tensor]) -> list[list[list[complex]]]:
    return [[[complex(x) for x in one.flatten().tolist()] for one in group] for group in groups]


def some_maps(*counts: int, side: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(counts))
    return [torch.rand(n, side, side + 1, generator=generator, dtype=torch.float64) for n in counts]


@pytest.mark.parametrize("counts", [(2, 2), (3, 4), (2, 3, 5), (2,) * 8])
@pytest.mark.parametrize("tau", [0.5, 0.07])
def test_loss_equals_the_formula(counts, tau):
    groups = some_maps(*counts)
    assert clora.info_nce_loss(groups, tau).item() == pytest.approx(loss_by_hand(numbers(groups), tau).real, rel=1e-10)


def test_loss_gradient_equals_the_complex_step():
    """d/dx f(x) = Im f(x + ih) / h, exact to rounding because nothing is subtracted."""
    groups = some_maps(3, 2, side=3)
    leaves = [group.clone().requires_grad_() for group in groups]
    gradients = torch.autograd.grad(clora.info_nce_loss(leaves), leaves)
    for g, group in enumerate(groups):
        for m, n in itertools.product(range(len(group)), range(group[0].numel())):
            moved = numbers(groups)
            moved[g][m][n] += 1e-30j
            assert gradients[g][m].flatten()[n].item() == pytest.approx(loss_by_hand(moved, 0.5).imag / 1e-30, rel=1e-10)


def test_loss_of_constant_maps_is_finite():
    groups = [torch.ones(2, 4, 4), torch.rand(2, 4, 4)]
    leaves = [group.requires_grad_() for group in groups]
    loss = clora.info_nce_loss([clora.rescale(group) for group in leaves])
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(loss, leaves))


def test_loss_of_one_concept_is_zero():
    """K = 1 has no other concept: nothing to push from, so the loss and its gradient are zero."""
    group = torch.rand(3, 4, 4).requires_grad_()
    loss = clora.info_nce_loss([group])
    assert loss.item() == 0 and torch.autograd.grad(loss, group)[0].abs().max() == 0


def test_loss_ignores_scale_and_order():
    a, b = some_maps(3, 3)
    loss = clora.info_nce_loss([a, b])
    assert torch.allclose(loss, clora.info_nce_loss([a * 7, b * 0.1]))
    assert torch.allclose(loss, clora.info_nce_loss([b, a.flip(0)]))


def test_separated_concepts_have_a_lower_loss():
    left, right = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
    left[:, :, :2], right[:, :, 2:] = 1, 1
    assert clora.info_nce_loss([left, right]) < clora.info_nce_loss([left, left]) - 0.5


def test_noise_of_the_steps_is_drawn_after_the_initial_noise():
    noise = torch.cat([torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    for one, seed, generator in zip(noise, (3, 4), clora.step_generators(noise, (3, 4))):
        theirs = torch.Generator().manual_seed(seed)
        assert torch.equal(torch.randn(4, 3, 5, generator=theirs), one)
        assert torch.equal(torch.randn(1, 4, 3, 5, generator=generator), torch.randn(1, 4, 3, 5, generator=theirs))


def test_attention_maps_are_the_mean_over_layers_and_heads():
    layers = [torch.rand(3, 4, 6, 77), torch.rand(3, 4, 6, 77)]
    maps = clora.attention_maps(layers, (2, 3))
    by_hand = sum(layer[1, head, 4, 9] for layer in layers for head in range(4)) / 8
    assert maps.shape == (3, 2, 3, 77) and torch.allclose(maps[1, 1, 1, 9], by_hand)


def test_mask_is_the_union_of_thresholded_maps():
    maps = torch.tensor([[[1.0, 0.4, 0.1]], [[0.0, 0.1, 2.0]]])
    assert clora.concept_mask(maps, 0.4).tolist() == [[True, True, True]]
    assert clora.concept_mask(maps, 0.4, ties=False).tolist() == [[True, False, True]]
    assert clora.concept_mask(maps[:1], 0.41).tolist() == [[True, False, False]]
    assert clora.concept_mask(maps, 0.0).all()


def test_masks_cover_every_pixel_and_fit_any_size():
    recipe, maps = Recipe(threshold=0.9), torch.rand(3, 3, 5, 77)
    masks = clora.variant_masks(maps, [(2, 3), (5,)], (11, 17), recipe)
    assert masks.shape == (3, 11, 17) and (masks.sum(0) >= 1).all()
    assert torch.equal(masks[0], 1 - masks[1:].amax(0))


@pytest.mark.parametrize("name, pixels", [("dilate", 9), ("erode", 0), ("open", 0), ("close", 1)])
def test_morphology_of_one_pixel(name, pixels):
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[2, 3] = True
    out = clora.morphology(mask, Recipe(**{name: True}))
    assert out.sum() == pixels and out[1:4, 2:5].sum() == pixels


def test_morphology_does_not_eat_the_border():
    """What lies outside the picture neither grows nor erodes a mask."""
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[:, :3] = True
    assert clora.morphology(mask, Recipe(erode=True)).int().sum(1).tolist() == [2] * 5
    assert torch.equal(clora.morphology(mask, Recipe(open=True, close=True)), mask)


def test_morphology_leaves_a_full_mask_full():
    full = torch.ones(4, 5, dtype=torch.bool)
    assert clora.morphology(full, Recipe(dilate=True, erode=True, open=True, close=True)).all()


def test_blend_averages_overlaps_and_keeps_single_owners():
    noise = torch.stack([torch.full((4, 2, 2), float(v)) for v in range(3)])[None]
    masks = torch.tensor([[[[1, 0], [0, 0]], [[0, 1], [1, 0]], [[0, 0], [1, 1]]]])
    assert clora.blend(noise, masks)[0, 0].tolist() == [[0, 1], [1.5, 2]]


def test_blend_of_noise_is_blend_of_latents_under_ddim():
    """The paper blends the latents after the step, the release the noise before it: with DDIM, eta 0, the same thing."""
    torch.manual_seed(0)
    z, noise = torch.randn(1, 4, 6, 8, dtype=torch.float64), torch.randn(3, 4, 6, 8, dtype=torch.float64)
    masks = (torch.rand(3, 6, 8) > 0.5).double()
    masks[0] = torch.maximum(masks[0], 1 - masks.amax(0))
    scheduler = make_scheduler(SD15_SCHEDULER, 50)
    for i in (0, 13, 49):
        blended_first, _ = scheduler.step(clora.blend(noise[None], masks[None]), i, z)
        stepped_first = torch.cat([scheduler.step(one[None], i, z)[0] for one in noise])
        assert (clora.blend(stepped_first[None], masks[None]) - blended_first).abs().max() < 1e-10


def test_update_is_a_gradient_step():
    z, gradient = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    assert torch.equal(clora.update_latents(z, gradient, 20), z - 20 * gradient)
    assert torch.equal(clora.update_latents(z, gradient, 0), z)


def test_guidance_limits():
    uncond, cond = torch.randn(1, 4, 5, 5), torch.randn(1, 4, 5, 5)
    assert torch.allclose(clora.guide(uncond, cond, Recipe(guidance=1.0)), cond)
    rescaled = clora.guide(uncond, cond, Recipe(guidance=7.5, guidance_rescale=1.0))
    assert torch.allclose(rescaled.std(), cond.std())


def tiny_plan(variants: int = 3, dtype: torch.dtype = torch.float64) -> clora.Plan:
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(2 * variants, 77, TINY.cross_attention_dim, generator=generator, dtype=dtype)
    concepts = tuple(
        tuple((v, token) for v in range(variants) for token in ((2 + 3 * k, 3 + 3 * k) if v == k + 1 else (3 + 3 * k,)))
        for k in range(variants - 1))
    return clora.Plan(("",) * variants, context, torch.zeros(2 * variants, 1, dtype=dtype), concepts)


def tiny_model() -> tuple[SimpleNamespace, clora.Plan]:
    """What `compose` needs of a model, and a plan with its words; seeded."""
    torch.manual_seed(0)
    plan = dataclasses.replace(tiny_plan(), trigger_tokens=((2, 3), (6,)))
    unet = UNet(TINY).double().eval().requires_grad_(False)
    return SimpleNamespace(unet=unet, map_level=1, scheduler_config=SD15_SCHEDULER), plan


@pytest.mark.parametrize("name", ["paper", "release"])
def test_gradient_through_the_unet_equals_central_differences(name):
    torch.manual_seed(0)
    unet, plan, recipe = UNet(TINY).double().eval().requires_grad_(False), tiny_plan(), RECIPES[name]
    layers, z = unet.map_layers(1), torch.randn(1, 4, 6, 8, dtype=torch.float64)
    _, gradient = clora.contrast(unet, z, 500, plan, layers, recipe)
    direction = torch.randn_like(z)
    # central differences along random directions and single entries; both see every part of the chain
    for d in [direction / direction.norm(), *torch.eye(z.numel(), dtype=z.dtype)[::37].view(-1, *z.shape)]:
        step = 1e-5
        ends = [clora.contrast(unet, z + s * step * d, 500, plan, layers, recipe)[0].item() for s in (1, -1)]
        assert (gradient * d).sum().item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-9)


def test_updates_lower_the_loss():
    torch.manual_seed(0)
    unet, plan, recipe = UNet(TINY).double().eval().requires_grad_(False), tiny_plan(), RECIPES["paper"]
    layers, z = unet.map_layers(1), torch.randn(1, 4, 8, 8, dtype=torch.float64)
    losses = []
    for _ in range(20):
        loss, gradient = clora.contrast(unet, z, 500, plan, layers, recipe)
        losses.append(loss.item())
        z = clora.update_latents(z, gradient, 0.5 / gradient.norm().item())
    assert losses[-1] < losses[0]


def test_maps_are_not_transposed_for_wide_pictures():
    probs = [torch.arange(2 * 3, dtype=torch.float32).view(1, 1, 1, 6, 1).expand(1, 1, 2, 6, 77)]
    assert clora.read_maps(probs, (8, 12), 1, "cond")[0, 0, :, :, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert clora.read_maps(probs, (12, 8), 1, "cond")[0, 0, :, :, 0].tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("prompt, word, trigger, expected", [
    ("a cat and a dog", "cat", "sks cat", "a sks cat and a dog"), ("a Cat, please", "cat", "x", "a x, please"),
    ("category of cat", "cat", r"\1", r"category of \1"), ("a cat-dog", "dog", "d", "a cat-d")])
def test_swapping_a_word(prompt, word, trigger, expected):
    assert swap_words(prompt, {word: trigger}) == expected


def test_swapping_several_words_touches_no_replacement():
    pairs = {"ball": "zib ring ball", "ring": "pel ring"}
    assert swap_words("a ball and a ring", pairs) == "a zib ring ball and a pel ring"
    assert swap_words("a ball and a ring", {"ball": "ring", "ring": "ball"}) == "a ring and a ball"
    assert swap_words("a toy  BALL", {"toy ball": "zib"}) == "a zib"
    assert swap_words("a toy ball", {}) == "a toy ball"
    assert swap_words("un cafe\u0301", {"caf\u00e9": "sks caf\u00e9"}) == "un sks caf\u00e9", "one letter in two ways"


@pytest.mark.parametrize("prompt, words", [("a ball2", ["ball"]), ("a ball_3", ["ball"]),
                                           ("a toy ball", ["toy ball", "ball"])])
def test_a_part_of_a_word_is_not_swapped(prompt, words):
    with pytest.raises(ValueError, match='"ball" is no word of its own'):
        swap_words(prompt, dict.fromkeys(words, "zib"))


@pytest.mark.parametrize("name", ["paper", "release"])
def test_low_memory_gives_the_same_gradient(name):
    torch.manual_seed(0)
    unet, plan, recipe = UNet(TINY).double().eval().requires_grad_(False), tiny_plan(4), RECIPES[name]
    layers, z = unet.map_layers(1), torch.randn(1, 4, 6, 8, dtype=torch.float64)
    loss, gradient = clora.contrast(unet, z, 500, plan, layers, recipe)
    again, same = clora.contrast(unet, z, 500, plan, layers, recipe, low_memory=True)
    assert loss.item() == pytest.approx(again.item(), rel=1e-12)
    assert ((gradient - same).norm() / gradient.norm()).item() < 1e-12


def test_keys_made_once_are_the_keys_of_every_step():
    torch.manual_seed(0)
    unet, plan = UNet(TINY).double().eval().requires_grad_(False), tiny_plan()
    z = torch.randn(6, 4, 6, 8, dtype=torch.float64)
    layers = unet.map_layers(1)
    noise, maps = unet(z, 500, plan.context, plan.adapters, layers)
    again, same = unet(z, 500, unet.text_keys(plan.context, plan.adapters), plan.adapters, layers)
    assert torch.equal(noise, again) and all(torch.equal(maps[name], same[name]) for name in layers)


def test_the_unet_compiles_to_one_program_for_guidance_and_one_for_the_noise():
    from torch._dynamo.testing import CompileCounterWithBackend
    torch.manual_seed(0)
    unet, plan, recipe = UNet(TINY).double().eval().requires_grad_(False), tiny_plan(), RECIPES["paper"]
    plan.adapters[4:] = 1
    weight = unet.mid_block.resnets[0].conv1.weight
    factors = LoRALayer(torch.randn(2, *weight.shape[1:]), torch.randn(len(weight), 2))
    lora.attach(unet, [LoRA(Path("l"), "l", "kohya LoRA", "", (2,), {"mid_block.resnets.0.conv1": factors}, {}, {})])
    layers, z = unet.map_layers(1), torch.randn(1, 4, 8, 8, dtype=torch.float64)

    def outputs() -> list[torch.Tensor]:
        out: list[torch.Tensor] = []
        for timestep in (500, 400, 3):
            out += clora.contrast(unet, z, timestep, plan, layers, recipe)
            with torch.inference_mode():
                noise, maps = clora.predict(unet, z, timestep, plan, range(6), layers)
            out += [noise, *maps]
        return out
    plain, counter = outputs(), CompileCounterWithBackend("eager")
    unet.compile(backend=counter, dynamic=False, fullgraph=True)
    assert all(torch.allclose(mine, other, rtol=1e-12, atol=1e-12) for mine, other in zip(outputs(), plain, strict=True))
    assert counter.frame_count == 2             # not one for every timestep


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("name", ["paper", "release"])
def test_a_batch_has_the_gradients_of_its_pictures(name, low_memory):
    torch.manual_seed(0)
    unet, plan, recipe = UNet(TINY).double().eval().requires_grad_(False), tiny_plan(), RECIPES[name]
    layers, z = unet.map_layers(1), torch.randn(3, 4, 6, 8, dtype=torch.float64)
    losses, gradients = clora.contrast(unet, z, 500, plan, layers, recipe, low_memory)
    assert losses.shape == (3,) and losses.std() > 1e-4             # the pictures differ, or this test shows nothing
    for b in range(3):
        loss, gradient = clora.contrast(unet, z[b:b + 1], 500, plan, layers, recipe)
        assert loss.item() == pytest.approx(losses[b].item(), rel=1e-12)
        assert ((gradient[0] - gradients[b]).norm() / gradient.norm()).item() < 1e-12


@pytest.mark.parametrize("changes", [{}, {"scheduler": "pndm"}, {"scheduler": "dpm++-karras"}, {"eta": 0.7},
                                     {"maps_from": "both"}, {"uncond_from": "base", "update_every": 2},
                                     {"refine_stop": 0.01}, {"update_stop": 0.05, "mask_every": 2}])
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_batch_gives_what_its_pictures_give_alone(changes, low_memory):
    model, plan = tiny_model()
    recipe = Recipe(steps=4, refine_at=(1,), refine_steps=2, **changes)
    noise = torch.randn(3, 4, 6, 8, dtype=torch.float64)

    def last(rows: list[int], low_memory: bool = False) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return list(clora.compose(model, plan, recipe, noise[rows], generators, low_memory))[-1].latents
    together = last([0, 1, 2], low_memory)
    for b in range(3):
        alone = last([b])[0]
        assert ((together[b] - alone).norm() / alone.norm()).item() < 1e-9
    assert (together[0] - together[1]).norm() > 0.1


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_loss_and_masks_of_ones_own(low_memory):
    """The update follows the given loss, twice it moves twice as far, and the blend follows the given masks."""
    model, plan = tiny_model()
    recipe, noise = Recipe(steps=1, refine_at=()), torch.randn(2, 4, 6, 8, dtype=torch.float64)
    everything_to = [torch.eye(3, dtype=torch.float64)[v].view(3, 1, 1).expand(3, 6, 8) for v in range(3)]

    def one(factor: float, v: int) -> clora.Step:
        def loss(groups: list[Tensor], temperature: float) -> Tensor:
            assert len(groups) == 2 and groups[0].shape == (4, 3, 4) and temperature == recipe.temperature
            return factor * groups[0].square().sum()

        def masks(maps: Tensor, words: tuple, size: tuple, given: Recipe) -> Tensor:
            assert maps.shape == (3, 3, 4, 77) and words == plan.trigger_tokens and tuple(size) == (6, 8) and given is recipe
            return everything_to[v]
        (step,) = clora.compose(model, plan, recipe, noise, None, low_memory, loss=loss, make_masks=masks)
        return step
    once, twice, other = one(1, 0), one(2, 0), one(1, 1)
    assert torch.allclose(twice.losses[0], 2 * once.losses[0])
    moved, further = once.updates[0] - noise, twice.updates[0] - noise
    assert moved.norm() > 1e-6 and torch.allclose(further, 2 * moved, rtol=1e-6)
    assert torch.equal(once.masks[0], everything_to[0]) and not torch.allclose(once.noise, other.noise)
    with pytest.raises(ValueError, match=r"\[2, 6, 8\], and 3 variants need \[3, 6, 8\]"):
        list(clora.compose(model, plan, recipe, noise, None, low_memory, make_masks=lambda *_: torch.ones(2, 6, 8)))
    for holes in (torch.eye(6, 8).repeat(3, 1, 1), torch.full((3, 6, 8), torch.nan)):
        with pytest.raises(ValueError, match="NaN or left pixels without a variant at step 0"):
            list(clora.compose(model, plan, recipe, noise, None, low_memory, make_masks=lambda *_, holes=holes: holes))
    for wrong in (lambda groups, _: None, lambda groups, _: 1.5, lambda groups, _: groups[0].sum((1, 2)),
                  lambda groups, _: groups[0].detach().sum()):
        with pytest.raises(ValueError, match="loss must return a scalar tensor that was computed from the maps"):
            list(clora.compose(model, plan, recipe, noise, None, low_memory, loss=wrong))


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
def test_latents_changed_in_place_are_where_the_next_step_starts(scheduler):
    model, plan = tiny_model()
    recipe = Recipe(steps=3, update_until=-1, scheduler=scheduler)
    sampler = make_scheduler(SD15_SCHEDULER, 3, scheduler)
    for step in clora.compose(model, plan, recipe, torch.randn(1, 4, 6, 8, dtype=torch.float64)):
        if step.index:
            assert torch.allclose(step.x0, sampler.predict_x0(step.noise, step.index, torch.full_like(step.noise, 0.5)))
        step.latents.fill_(0.5)


def test_a_plan_keeps_its_loras(tmp_path):
    """Another plan made since, or run in turn with this one, has attached others."""
    model, plan = tiny_model()
    names = [name for name, module in model.unet.named_modules() if isinstance(module, lora.LoRALinear)]
    generator = torch.Generator().manual_seed(3)

    def one(name: str) -> LoRA:
        layers = {key: lora.LoRALayer(torch.randn(2, weight.shape[1], generator=generator, dtype=torch.float64),
                                      torch.randn(weight.shape[0], 2, generator=generator, dtype=torch.float64))
                  for key in names for weight in [model.unet.get_submodule(key).weight]}
        return LoRA(Path(name), name, "", "", (2,), layers, {}, {})
    cat, dog = one("cat"), one("dog")
    adapters = torch.tensor([[0.0, 0], [1, 0], [0, 1]] * 2, dtype=torch.float64)
    here = dataclasses.replace(plan, adapters=adapters, loras=(cat, dog))
    there = dataclasses.replace(here, loras=(dog, cat))
    recipe, noise = Recipe(steps=2, refine_at=()), torch.randn(1, 4, 6, 8, dtype=torch.float64)

    def run(plan: clora.Plan) -> list[Tensor]:
        return [step.latents for step in clora.compose(model, plan, recipe, noise)]
    alone = run(here), run(there)
    lora.attach(model.unet, [])
    list(clora.compose(model, here, Recipe(steps=1, update_until=-1), noise))       # attaches where no gradient is wanted
    again = run(here)
    turns = [(a.latents, b.latents) for a, b in zip(*(clora.compose(model, one, recipe, noise) for one in (here, there)))]
    assert not torch.equal(alone[0][1], alone[1][1])
    assert all(torch.equal(x, y) for x, y in zip(alone[0], again, strict=True))
    assert all(torch.equal(a, x) and torch.equal(b, y) for (a, b), x, y in zip(turns, *alone, strict=True))
    # strengths changed in place during the loop count in the next one, and not by half: for layers, but not for keys
    changed = dataclasses.replace(here, adapters=adapters.clone())
    meanwhile = []
    for step in clora.compose(model, changed, recipe, noise):
        meanwhile.append(step.latents)
        changed.adapters.zero_()
    assert all(torch.equal(x, y) for x, y in zip(alone[0], meanwhile, strict=True))


def test_noise_from_before_is_from_before_the_last_update_that_was_made():
    """In a batch whose pictures stop at different repeats: each one's noise is that at its own latent."""
    model, plan = tiny_model()
    noise = torch.randn(3, 4, 6, 8, dtype=torch.float64)
    # a stop that lies between the gains of the pictures' first repeats: some go on, some do not
    recipe = Recipe(steps=1, refine_at=(0,), refine_steps=4, alpha=2000, noise_from="before")
    (free,) = clora.compose(model, plan, recipe, noise)
    gains = sorted(1 - (free.losses[1] / free.losses[0]))
    recipe = dataclasses.replace(recipe, refine_stop=float(gains[0] + gains[1]) / 2)
    (step,) = clora.compose(model, plan, recipe, noise)
    states = [noise, *step.updates]
    stops = set()
    for b in range(3):
        own = [states[0][b]] + [z[b] for a, z in itertools.pairwise(states) if not torch.equal(a[b], z[b])]
        stops.add(len(own))
        at = dataclasses.replace(recipe, update_until=-1, mask_from=99)
        want, = clora.compose(model, plan, dataclasses.replace(at, noise_from="after"), own[-2][None])
        kept, = clora.compose(model, plan, dataclasses.replace(recipe, mask_from=99), noise[b:b + 1])
        assert torch.allclose(kept.noise, want.noise, rtol=1e-9, atol=1e-12)
        both, = clora.compose(model, plan, dataclasses.replace(recipe, mask_from=99), noise)
        assert torch.allclose(both.noise[b:b + 1], want.noise, rtol=1e-9, atol=1e-12)
    assert len(stops) > 1


def test_one_concept_has_nothing_to_part_from():
    """Its loss is 0 whatever the latents, so there are no updates; a loss of one's own has them."""
    model, _ = tiny_model()
    plan = dataclasses.replace(tiny_plan(2), trigger_tokens=((2, 3),))
    noise = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    value, gradient = clora.contrast(model.unet, noise, 500, plan, model.unet.map_layers(1), Recipe())
    assert value.item() == 0 and not gradient.any()
    (step,) = clora.compose(model, plan, Recipe(steps=1), noise)
    assert step.losses == step.updates == [] and step.masks is not None
    recipe = Recipe(steps=1, refine_at=())
    (own,) = clora.compose(model, plan, recipe, noise, loss=lambda groups, _: groups[0].square().sum())
    assert len(own.losses) == 1 and not torch.equal(own.updates[0], noise)


def test_repeats_end_when_the_loss_stops_falling():
    """What is done before the stop is what is done without it; and the stop comes at the first small gain."""
    model, plan = tiny_model()
    noise = torch.randn(1, 4, 6, 8, dtype=torch.float64)

    def losses(stop: float) -> list[float]:
        recipe = Recipe(steps=1, refine_at=(0,), refine_steps=30, refine_stop=stop, alpha=2000)
        (step,) = clora.compose(model, plan, recipe, noise)
        return torch.cat(step.losses).tolist()
    free = losses(0)
    gains = [1 - after / before for before, after in itertools.pairwise(free)]
    stop = sorted(gains)[len(gains) // 2]
    first = next(n for n, gain in enumerate(gains) if gain <= stop)
    assert len(free) == 31 and losses(stop) == free[:first + 1] and 0 < first < 29

    def below(groups: list[Tensor], temperature: float) -> Tensor:          # a loss of one's own may be negative
        return clora.info_nce_loss(groups, temperature) - 100
    recipe = Recipe(steps=1, refine_at=(0,), refine_steps=3, refine_stop=1e-9, alpha=2000)
    (step,) = clora.compose(model, plan, recipe, noise, loss=below)
    assert len(step.losses) == 4 and step.losses[-1] < step.losses[0] < 0
    (step,) = clora.compose(model, plan, dataclasses.replace(recipe, refine_stop=0.5), noise, loss=below)
    assert len(step.losses) == 1


def test_updates_end_when_the_maps_stand_still():
    """Per picture: the first step that changes the concepts' maps by less than the share is the last with an update."""
    model, plan = tiny_model()
    noise = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    places = [place for concept in plan.concepts for place in concept]

    def steps(stop: float) -> list[clora.Step]:
        return list(clora.compose(model, plan, Recipe(steps=6, refine_at=(), update_stop=stop), noise))
    free = steps(0)
    told = [torch.stack([step.maps[:, v, :, :, token] for v, token in places], dim=1).flatten(1) for step in free]
    changes = torch.stack([(after - before).norm(dim=1) / before.norm(dim=1)
                           for before, after in itertools.pairwise(told)])                      # [5, 2]
    stop = changes[0].mean().item()
    last = [next((n + 1 for n, change in enumerate(changes[:, b]) if change < stop), 6) for b in range(2)]
    assert sorted(last) == [1, 2]                                   # the pictures end apart, or this shows too little
    gaps = (told[2] - told[0]).norm(dim=1) / told[0].norm(dim=1)                    # of two steps
    for factor, count in ((0.49, 4), (0.51, 3)):            # where every second step reads maps, half of that is a step's
        sparse = Recipe(steps=6, refine_at=(), update_stop=factor * gaps[0].item(), mask_every=2)
        assert sum(len(step.losses) for step in itertools.islice(clora.compose(model, plan, sparse, noise[:1]), 4)) == count
    stopped = steps(stop)
    assert [len(step.losses) for step in stopped] == [1 if i <= max(last) else 0 for i in range(6)]
    for b in range(2):                                              # a picture's own updates, though the batch had more
        assert [len(step.picture(b).losses) for step in stopped] == [1 if i <= last[b] else 0 for i in range(6)]
        assert torch.equal(stopped[0].picture(b).updates[0], stopped[0].updates[0][b:b + 1])
    assert torch.equal(stopped[0].picture(-1).latents, stopped[0].latents[1:])
    pytest.raises(IndexError, stopped[0].picture, 2)
    for b in range(2):
        for step, other in zip(stopped[:last[b] + 1], free):
            assert torch.equal(step.latents[b], other.latents[b])
        for step, before in zip(stopped[last[b] + 1:], stopped[last[b]:]):
            assert all(torch.equal(z[b], before.latents[b]) for z in step.updates)


def test_scores_that_half_precision_could_not_hold():
    """The products of 160 channels are larger than float16's largest number; divided by sqrt(160) they are not."""
    query = torch.full((1, 1, 2, 160), 25.0, dtype=torch.float16)
    key = query * torch.tensor([1, 0.9], dtype=torch.float16).view(1, 1, 2, 1)
    probs = attention_probs(query, key)
    assert probs.dtype == torch.float32 and torch.allclose(probs, torch.tensor([1.0, 0.0]).expand(1, 1, 2, 2))


def test_masks_are_kept_between_two_readings():
    model, plan = tiny_model()
    noise = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    steps = list(clora.compose(model, plan, Recipe(steps=8, update_until=-1, mask_every=3, mask_from=4), noise))
    new = [i == 0 or not torch.equal(step.maps, steps[i - 1].maps) for i, step in enumerate(steps)]
    assert [i for i, one in enumerate(new) if one] == [0, 3, 4, 6]
    for i, step in enumerate(steps):
        expected = (torch.ones(3, 6, 8) if i < 4 else
                    clora.variant_masks(step.maps[0], plan.trigger_tokens, (6, 8), Recipe()))
        assert torch.equal(step.masks[0], expected), i


@pytest.mark.parametrize("changes", [{}, {"uncond_from": "base"}, {"guidance_rescale": 0.7}])
@pytest.mark.parametrize("low_memory", [False, True])
def test_without_guidance_the_unconditional_half_is_not_computed(low_memory, changes, monkeypatch):
    """At a scale of 1 guidance is the conditional prediction."""
    model, plan = tiny_model()
    noise, rows = torch.randn(1, 4, 6, 8, dtype=torch.float64), []
    forward = UNet.forward

    def count(unet, latents, *args, stop_after_maps=False, **options):
        rows.extend([] if stop_after_maps else latents)
        return forward(unet, latents, *args, stop_after_maps=stop_after_maps, **options)
    monkeypatch.setattr(UNet, "forward", count)

    def last(guidance: float) -> torch.Tensor:
        rows.clear()
        recipe = Recipe(steps=3, guidance=guidance, refine_at=(1,), refine_steps=2, **changes)
        return list(clora.compose(model, plan, recipe, noise, None, low_memory))[-1].latents
    almost = last(1 + 1e-12)
    assert len(rows) == 3 * (4 if "uncond_from" in changes else 6)
    alone = last(1.0)
    assert len(rows) == 3 * 3
    assert ((alone - almost).norm() / almost.norm()).item() < 1e-9
    if not changes:                                         # without concepts no maps are read from that half
        plan = dataclasses.replace(plan, concepts=(), trigger_tokens=())
        recipe = Recipe(steps=2, guidance=1, maps_from="both")
        rows.clear()
        list(clora.compose(model, plan, recipe, noise, None, low_memory))
        assert len(rows) == 2 * 3


def test_an_update_of_ones_own():
    model, plan = tiny_model()
    recipe, noise = Recipe(steps=2, refine_at=()), torch.randn(1, 4, 6, 8, dtype=torch.float64)

    def half(latents: Tensor, gradient: Tensor, alpha: float) -> Tensor:
        return clora.update_latents(latents, gradient, alpha / 2)
    ours = list(clora.compose(model, plan, recipe, noise, update=half))[-1].latents
    theirs = list(clora.compose(model, plan, dataclasses.replace(recipe, alpha=10.0), noise))[-1].latents
    assert torch.equal(ours, theirs)


def test_functions_of_ones_own_may_change_what_they_are_given():
    """In place: the steps that were yielded stay as they were, and so do pictures whose repeats have ended."""
    model, plan = tiny_model()
    recipe = Recipe(steps=3, refine_at=(0,), refine_steps=3, refine_stop=0.02)

    def update(latents: Tensor, gradient: Tensor, alpha: float) -> Tensor:
        return latents.sub_(alpha * gradient)

    def masks(maps: Tensor, *others) -> Tensor:
        made = clora.variant_masks(maps, *others)
        maps.zero_()
        return made
    noise = torch.randn(2, 4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = list(clora.compose(model, plan, recipe, noise))
    for one, other in zip(expected, list(clora.compose(model, plan, recipe, noise, update=update, make_masks=masks))):
        assert torch.equal(one.latents, other.latents) and torch.equal(one.maps, other.maps)
        assert all(map(torch.equal, one.updates, other.updates))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_exact_under_autocast(dtype):
    """As it is for a model that was loaded in half precision, with the gradient's small entries."""
    torch.manual_seed(0)
    unet, plan, z = UNet(TINY).eval().requires_grad_(False), tiny_plan(dtype=torch.float32), torch.randn(1, 4, 6, 8)
    layers = unet.map_layers(1)

    def small(groups, temperature):
        return 1e-4 * clora.info_nce_loss(groups, temperature)
    for loss in (clora.info_nce_loss, small):
        value, expected = clora.contrast(unet, z, 500, plan, layers, Recipe(), loss=loss)
        with torch.autocast("cpu", dtype):
            mixed, gradient = clora.contrast(unet, z, 500, plan, layers, Recipe(), loss=loss)
        assert mixed.dtype == gradient.dtype == torch.float32
        # bfloat16 would have 1.0078, 1.0156 and so on
        assert mixed.item() != mixed.bfloat16().item() and mixed.item() == pytest.approx(value.item(), rel=2e-3)
        assert ((gradient - expected).norm() / expected.norm()).item() < (0.05 if dtype == torch.float16 else 0.2)


def test_a_model_without_maps_at_its_level():
    model, plan = tiny_model()
    for level in (2, 7, -1):
        model.map_level = level
        with pytest.raises(ValueError, match=f"no maps at map_level {level}"):
            next(clora.compose(model, plan, Recipe(steps=2), torch.randn(1, 4, 6, 8, dtype=torch.float64)))


class NoWaiting(TorchDispatchMode):
    """Fails where a GPU would be waited for: at a copy to it that blocks. Values read back fail on "meta" by themselves."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.device != args[0].device:
            assert (kwargs or {}).get("non_blocking"), f"a blocking copy of {tuple(out.shape)}"
        return out


class NoNumbers(TorchFunctionMode):
    """The same for numbers that Python writes to the GPU, which no dispatch mode sees."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor) or "device" not in (kwargs or {}), "numbers written to the device"
        if func is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(x, (list, tuple)) for x in index), "an index written to the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("low_memory,changes", [
    (False, {"eta": 0.5}), (False, {"scheduler": "lcm"}),
    (False, {"scheduler": "dpm++", "uncond_from": "base", "guidance_rescale": 0.7, "mask_every": 2, "open": True}),
    (True, {"scheduler": "pndm", "rescale_maps": True, "maps_from": "both", "noise_from": "before", "mask_ties": False})])
def test_steps_run_on_another_device_and_never_wait_for_it(low_memory, changes):
    """PyTorch's "meta" device in a GPU's place: it takes no tensor of the processor and gives no value back."""
    model, plan = tiny_model()
    layers = {name: lora.LoRALayer(torch.ones(2, *module.weight.shape[1:]), torch.ones(len(module.weight), 2))
              for name, module in model.unet.named_modules() if isinstance(module, (lora.LoRALinear, lora.LoRAConv2d))}
    model.unet.half().to("meta")
    lora.attach(model.unet, [LoRA(Path("a"), "a", "", "", (2,), layers, {}, {})])
    plan = dataclasses.replace(plan, context=plan.context.half().to("meta"), adapters=plan.adapters.half().to("meta"))
    recipe = Recipe(steps=3, refine_at=(1,), refine_steps=1, **changes)
    noise = torch.empty(2, 4, 6, 8, dtype=torch.half, device="meta")
    steps = clora.compose(model, plan, recipe, noise, [torch.Generator(), torch.Generator()], low_memory)
    for _ in make_scheduler(SD15_SCHEDULER, recipe.steps, recipe.scheduler).timesteps:
        with NoWaiting(), NoNumbers():
            step = next(steps)
        assert step.latents.device.type == step.masks.device.type == step.losses[0].device.type == "meta"
        assert step.latents.shape == noise.shape and step.latents.dtype == torch.float32
        assert step.noise.dtype == torch.half and step.masks.shape == (2, 3, 6, 8)
    with pytest.raises(RuntimeError, match="meta"):         # only after the last one: were the latents finite?
        next(steps)


def test_half_precision_rounds_no_update_away():
    """The UNet computes in half, the latents add up in float32."""
    model, plan = tiny_model()
    model.unet.bfloat16()
    plan = dataclasses.replace(plan, context=plan.context.bfloat16(), adapters=plan.adapters.bfloat16())
    noise = torch.randn(1, 4, 6, 8).bfloat16()
    step = next(clora.compose(model, plan, Recipe(steps=1, update_until=0, refine_at=(), alpha=1.0), noise))
    moved = (step.updates[0] - noise.float()).abs()
    assert 0 < moved.max() < 2 ** -9 * noise.abs().max(), "less than bfloat16 could add"
    assert (moved > 0).float().mean() > 0.9


@pytest.mark.parametrize("low_memory", [False, True])
def test_inference_mode_around_it_changes_nothing(low_memory):
    model, plan = tiny_model()
    recipe, noise = Recipe(steps=2, refine_at=()), torch.randn(1, 4, 6, 8, dtype=torch.float64)
    outside = list(clora.compose(model, plan, recipe, noise, None, low_memory))[-1].latents
    with torch.inference_mode():
        inside = list(clora.compose(model, plan, recipe, noise.clone(), None, low_memory))[-1].latents
    assert torch.equal(outside, inside)


def test_a_plan_may_be_changed():
    """What is replaced counts, and nothing made from the old context or strengths is left."""
    model, plan = tiny_model()
    recipe, noise = Recipe(steps=1, update_until=-1), torch.randn(1, 4, 6, 8, dtype=torch.float64)
    plan = dataclasses.replace(plan, keys=model.unet.text_keys(plan.context, plan.adapters))

    def latents(**changes) -> Tensor:
        return list(clora.compose(model, dataclasses.replace(plan, **changes), recipe, noise))[-1].latents
    other = plan.context.flip(0)
    assert (latents(context=other) - latents()).norm() > 1e-3
    assert torch.equal(latents(context=other, keys=None), latents(context=other))


def test_plans_and_steps_can_be_compared():
    """By what they are: tensors in them would not say yes or no."""
    model, plan = tiny_model()
    assert plan == plan and plan != dataclasses.replace(plan)


def test_settings_of_the_models_folder_that_are_not_possible():
    for values, word in (({"stepz": 3}, "no setting called stepz"), ({"steps": "10"}, "steps cannot be '10'"),
                         ([1], "must be an object"), ({"threshold": 3}, "--threshold is 3")):
        with pytest.raises(ValueError, match=f"clora.json: .*{word}"):
            clora.recipe_for(SimpleNamespace(settings={"recipe": values}))
    recipe = clora.recipe_for(SimpleNamespace(settings={"recipe": {"refine_at": [0, 1]}}))
    assert recipe.refine_at == (0, 1) and hash(recipe) == hash(Recipe(refine_at=(0, 1)))


def test_a_layer_named_twice_is_one_map():
    model, plan = tiny_model()
    layers = model.unet.map_layers(model.map_level)
    noise, maps = model.unet(torch.randn(6, 4, 6, 8, dtype=torch.float64), 5, plan.context, plan.adapters,
                             (*layers, *layers), stop_after_maps=True)
    assert noise is None and [*maps] == [*layers]


def test_a_step_prints_without_its_numbers():
    model, plan = tiny_model()
    step = next(clora.compose(model, plan, Recipe(steps=2, refine_at=()), torch.randn(1, 4, 6, 8, dtype=torch.float64)))
    assert repr(step) == f"Step(0, timestep {step.timestep}, 1 pictures, 1 updates)"


@pytest.mark.parametrize("changes, word", [
    ({"noise_from": "befor"}, "noise_from is 'befor'; choose from after, before"), ({"uncond_from": "Base"}, "each, base"),
    ({"maps_from": ""}, "maps_from"), ({"uncond_from": "base", "maps_from": "both"}, "choose one of the two"),
    ({"threshold": 40}, "--threshold is 40; it must be between 0 and 1"), ({"alpha": float("nan")}, "--alpha is nan"),
    ({"steps": 4.0}, "steps cannot be 4.0"), ({"refine_at": 0}, "refine_at cannot be 0"), ({"dilate": 1}, "dilate can"),
    ({"update_until": True}, "update_until cannot be True"), ({"refine_at": (0, 0.5)}, "refine_at cannot"),
    ({"scheduler": "eular"}, "scheduler is 'eular'; choose from ddim")])
def test_a_recipe_has_no_choice_that_is_none(changes, word):
    with pytest.raises(ValueError, match=word):
        Recipe(**changes)
    with pytest.raises(ValueError, match="no recipe called fastt; choose from paper, release, fast"):
        clora.recipe_for(tiny_model()[0], "fastt")


def test_the_base_variant_is_asked_for_where_there_is_none():
    model, plan = tiny_model()
    plan = dataclasses.replace(plan, concepts=(), trigger_tokens=())                 # composite
    with pytest.raises(ValueError, match="no variant without LoRAs"):
        next(clora.compose(model, plan, Recipe(steps=1, uncond_from="base"), torch.randn(1, 4, 6, 8, dtype=torch.float64)))


def test_half_precision_keeps_small_gradients():
    """The loss is scaled up for the way back, and the gradient down again: entries below 6e-8 would be 0 in float16."""
    torch.manual_seed(0)
    unet, plan, z = UNet(TINY).eval().requires_grad_(False), tiny_plan(dtype=torch.float32), torch.randn(1, 4, 6, 8)
    half = dataclasses.replace(plan, context=plan.context.half(), adapters=plan.adapters.half())
    layers = unet.map_layers(1)

    def small(groups, temperature):
        return 1e-4 * clora.info_nce_loss(groups, temperature)
    _, expected = clora.contrast(unet, z, 500, plan, layers, Recipe(), loss=small)
    _, gradient = clora.contrast(unet.half(), z.half(), 500, half, layers, Recipe(), loss=small)
    assert expected.abs().median() < 1e-7 and ((gradient - expected).norm() / expected.norm()).item() < 0.05


@pytest.mark.parametrize("size", [(9, 7), (5, 8), (7, 12)])
def test_odd_sizes_have_maps_of_half_a_pixel_more(size):
    model, plan = tiny_model()
    recipe = Recipe(steps=2, refine_at=())
    (_, step) = clora.compose(model, plan, recipe, torch.randn(2, 4, *size, dtype=torch.float64))
    assert step.maps.shape == (2, 3, -(-size[0] // 2), -(-size[1] // 2), 77) and step.masks.shape == (2, 3, *size)
    assert torch.allclose(step.maps.sum(dim=-1), torch.ones(()).double())


def test_guidance_rescale_is_of_each_picture():
    uncond, cond = (torch.randn(3, 4, 6, 8) * torch.tensor([0.1, 1, 5]).view(3, 1, 1, 1) for _ in range(2))
    recipe = Recipe(guidance_rescale=0.7)
    alone = [clora.guide(uncond[b:b + 1], cond[b:b + 1], recipe) for b in range(3)]
    assert torch.allclose(clora.guide(uncond, cond, recipe), torch.cat(alone), rtol=1e-5)


def test_merge_takes_the_users_weights():
    from weights import load_model
    golden = Path(__file__).parent / "golden"
    model = load_model(golden / "model")
    cat, dog, style = (model.lora(golden / f"loras/{name}.safetensors") for name in ("cat_peft", "dog_kohya", "style_peft"))

    def rows(*weights: float | None) -> list[list[float]]:
        subjects = [clora.Subject(cat, "cat", "sks cat", weights[0]), clora.Subject(dog, "dog", "sks dog", weights[1])]
        plan = clora.make_plan(model, "a cat and a dog", subjects, (style, 0.25), method="merge")
        return plan.adapters.tolist()
    assert rows(None, None) == [[0.5, 0.5, 0.25]] * 2 and rows(0.75, None) == [[0.75, 0.5, 0.25]] * 2
