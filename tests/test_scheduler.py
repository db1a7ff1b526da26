"""Samplers against float64 by hand, their properties, and configs that are refused; parity/ has diffusers."""

import math

import pytest
import torch

from scheduler import SCHEDULERS, make_scheduler

SD15 = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "clip_sample": False, "trained_betas": None}


def alpha_by_hand(t: int) -> float:
    """Cumulative product of 1 - beta of SD's schedule, in Python floats."""
    low, high, product = math.sqrt(0.00085), math.sqrt(0.012), 1.0
    for n in range(t + 1):
        product *= 1 - (low + (high - low) * n / 999) ** 2
    return product


def pair(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_ddim_step_by_hand(eta):
    z, noise = pair()
    scheduler = make_scheduler(SD15, 50, "ddim", eta=eta)
    ours, _ = scheduler.step(noise, 10, z, generator=torch.Generator().manual_seed(4))
    t = scheduler.timesteps[10]
    now, then = alpha_by_hand(t), alpha_by_hand(t - 20)
    sigma = eta * math.sqrt((1 - then) / (1 - now)) * math.sqrt(1 - now / then)
    fresh = torch.randn(z.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x0 = (z - math.sqrt(1 - now) * noise) / math.sqrt(now)
    theirs = math.sqrt(then) * x0 + math.sqrt(1 - then - sigma ** 2) * noise + sigma * fresh
    # published models were trained with float32 products, which differ from these in the seventh digit
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5


def test_a_step_of_lcm_by_hand():
    """Timesteps 999, 759, 499, 259 of the 50 from 19 to 999; the jump to x0, then noise of the next timestep."""
    z, noise = pair()
    scheduler = make_scheduler(SD15, 4, "lcm")
    assert scheduler.timesteps == (999, 759, 499, 259)
    ours, _ = scheduler.step(noise, 1, z, generator=torch.Generator().manual_seed(4))
    now, then, t = alpha_by_hand(759), alpha_by_hand(499), 7590
    x0 = (z - math.sqrt(1 - now) * noise) / math.sqrt(now)
    clean = t / math.hypot(t, 0.5) * x0 + 0.25 / (t * t + 0.25) * z
    fresh = torch.randn(z.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    theirs = math.sqrt(then) * clean + math.sqrt(1 - then) * fresh
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5
    ours, _ = scheduler.step(noise, 3, z)           # the last step adds nothing
    assert (ours - scheduler.predict_x0(noise, 3, z)).abs().max() < 1e-5


def test_karras_levels_by_hand():
    """Eq. 5 of arXiv 2206.00364 between the schedule's own ends; the UNet is told the nearest timestep, twice at the end."""
    scheduler = make_scheduler(SD15, 50, "dpm++-karras")
    ends = [math.sqrt(1 / alpha_by_hand(t) - 1) ** (1 / 7) for t in (999, 0)]
    for i, (t, a) in enumerate(zip(scheduler.timesteps, scheduler.levels)):
        sigma = (ends[0] + i / 49 * (ends[1] - ends[0])) ** 7
        assert math.sqrt(1 / a - 1) == pytest.approx(sigma, rel=1e-4)        # 1 - a of float32 products
        near = [n for n in (t - 1, t, t + 1) if 0 <= n < 1000]
        away = {n: abs(math.log(sigma) - 0.5 * math.log(1 / alpha_by_hand(n) - 1)) for n in near}
        assert away[t] < min(away.values()) + 1e-3
    assert scheduler.timesteps[0] == 999 and scheduler.timesteps[-3:] == (1, 1, 0)


@pytest.mark.parametrize("config, name, karras", [
    ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, None, True),
    ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "dpm++", True),      # as from_config in diffusers
    ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "ddim", False),
    ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": False}, None, False),
    ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": None}, None, False), ({}, "dpm++-karras", True)])
def test_whose_levels_are_karras(config, name, karras):
    assert (type(make_scheduler({**SD15, **config}, 10, name)) is SCHEDULERS["dpm++-karras"]) is karras


@pytest.mark.parametrize("name", ["ddim", "lcm"])
def test_every_row_has_its_own_noise(name):
    z, noise = pair()
    scheduler = make_scheduler(SD15, 10, name, eta=1.0)
    both, _ = scheduler.step(noise, 0, z, generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)])
    for row, seed in enumerate((3, 4)):
        one = slice(row, row + 1)
        alone, _ = scheduler.step(noise[one], 0, z[one], generator=torch.Generator().manual_seed(seed))
        assert torch.equal(both[one], alone)


def test_generators_are_one_for_every_row():
    z, noise = pair()
    scheduler = make_scheduler(SD15, 10, "ddim", eta=1.0)
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"{count} generators are given for 2 rows"):
            scheduler.step(noise, 0, z, generator=[torch.Generator() for _ in range(count)])


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2 ** -8), (torch.float16, 2 ** -11)])
def test_noise_is_added_in_half_precision_too(dtype, bound):
    """sqrt(1 - a) of the first timesteps, where a rounds to 1."""
    zero, one = torch.zeros(4, 1, 1, 1, dtype=dtype), torch.ones(4, 1, 1, 1, dtype=dtype)
    times = torch.tensor([0, 1, 5, 20])
    added = make_scheduler(SD15, 10, "ddim").add_noise(zero, one, times).flatten()
    for share, t in zip(added.tolist(), times.tolist()):
        assert share == pytest.approx(math.sqrt(1 - alpha_by_hand(t)), rel=bound)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_true_noise_leads_back_to_the_picture(name):
    """If the prediction is always the noise that is in the latents, every sampler must arrive at the clean ones."""
    clean, noise = pair()
    scheduler = make_scheduler(SD15, 20, name)
    z, history = scheduler.add_noise(clean, noise, scheduler.timesteps[0]), ()
    for i, t in enumerate(scheduler.timesteps):
        if name == "lcm":                   # it has drawn new noise
            noise = (z - math.sqrt(scheduler.alpha(t)) * clean) / math.sqrt(1 - scheduler.alpha(t))
        assert (scheduler.predict_x0(noise, i, z) - clean).abs().max() < 1e-5
        z, history = scheduler.step(noise, i, z, history)
    last = 0 if name in ("dpm++", "dpm++-karras", "lcm") else 1 - scheduler.final_alpha
    assert (z - math.sqrt(1 - last) * clean - math.sqrt(last) * noise).abs().max() < 1e-5


@pytest.mark.parametrize("name", SCHEDULERS)
def test_nothing_is_changed_in_place(name):
    z, noise = pair()
    scheduler = make_scheduler(SD15, 10, name)
    before, history = (z.clone(), noise.clone()), ()
    outs = []
    for _ in range(2):                      # the same calls twice: no hidden state
        x, history, generator = z, (), torch.Generator().manual_seed(0)
        for i in range(4):
            x, history = scheduler.step(noise, i, x, history, generator)
        outs.append(x)
    assert torch.equal(*outs) and torch.equal(z, before[0]) and torch.equal(noise, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_precision_is_kept(name, dtype):
    z, noise = (x.to(dtype) for x in pair())
    z, _ = make_scheduler(SD15, 10, name, eta=0.0).step(noise, 0, z)
    assert z.dtype == dtype and torch.isfinite(z).all()


@pytest.mark.parametrize("change, name, word", [
    ({"_class_name": "EulerDiscreteScheduler"}, None, "EulerDiscreteScheduler"),
    ({"prediction_type": "v_prediction"}, None, "SD 2"),
    ({"thresholding": True}, "ddim", "thresholding"), ({"rescale_betas_zero_snr": True}, "ddim", "rescale_betas_zero_snr"),
    ({"skip_prk_steps": False}, None, "skip_prk_steps"), ({"beta_schedule": "wild"}, None, "wild"),
    ({"timestep_spacing": "wild"}, "ddim", "wild"),
    ({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}, "dpm++-karras", "use_lu_lambdas"),
    ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, "solver_order": 3}, None, "solver_order"),
    ({"_class_name": "UniPCMultistepScheduler", "solver_order": 3}, "dpm++", "solver_order"), ({}, "euler", "euler"),
    ({"_class_name": "EulerDiscreteScheduler", "use_exponential_sigmas": True}, "dpm++", "use_exponential_sigmas"),
    ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, None, "algorithm_type"),
    ({"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}, "dpm++", "lambda_min_clipped"),
    ({"lambda_min_clipped": "-inf"}, "dpm++", "lambda_min_clipped"),
    ({"original_inference_steps": 9}, "lcm", "at most 9 steps"), ({"prediction_type": "sample"}, None, "'sample'; this is"),
    *[({key: value}, "lcm", f"{key} cannot be") for key in ("original_inference_steps", "timestep_scaling")
      for value in ("50", None, -1, float("nan"), 1e9)], ({"original_inference_steps": 2000}, "lcm", "cannot be 2000"),
    ({"_class_name": None}, None, "no class")])
def test_configs_that_are_refused(change, name, word):
    with pytest.raises(ValueError, match=word) as caught:
        make_scheduler({**SD15, **change}, 10, name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [
    {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh2", "solver_order": 2},
    {"_class_name": "DEISMultistepScheduler", "algorithm_type": "deis", "solver_type": "logrho"}])
def test_names_of_another_sampler_that_stand_for_ours(config):
    z, noise = pair()
    plain, own = (make_scheduler({**SD15, **more}, 10, "dpm++") for more in ({}, config))
    assert plain.timesteps == own.timesteps and torch.equal(plain.step(noise, 0, z)[0], own.step(noise, 0, z)[0])


@pytest.mark.parametrize("name", ["ddim", "dpm++", "pndm"])
def test_trailing_timesteps_are_as_many_as_asked_for(name):
    for steps in (7, 60, 61, 103, 121, 999):                # rounding errors would give 61, 103 and 121 one more, -1
        timesteps = make_scheduler({**SD15, "timestep_spacing": "trailing"}, steps, name).timesteps
        assert len({*timesteps}) == steps and timesteps[0] == 999 and timesteps[-1] >= 0


@pytest.mark.parametrize("steps", [0, -1, 1001, 1000])
def test_numbers_of_steps_that_cannot_be(steps):
    if steps == 1000:                       # 1001 points on 1000 timesteps
        with pytest.raises(ValueError, match="use fewer"):
            make_scheduler(SD15, steps, "dpm++")
        assert len(make_scheduler(SD15, 999, "dpm++").timesteps) == 999
    with pytest.raises(ValueError):         # 1000 steps with offset 1 would begin beyond the last timestep
        make_scheduler(SD15, steps, "ddim")
