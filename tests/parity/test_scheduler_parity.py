"""Every step of every sampler against diffusers' schedulers."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from scheduler import make_scheduler  # noqa: E402

BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
CLASSES = {"ddim": "DDIMScheduler", "pndm": "PNDMScheduler", "dpm++": "DPMSolverMultistepScheduler",
           "lcm": "LCMScheduler"}
OWN = {"ddim": {"set_alpha_to_one": False, "clip_sample": False},
       "pndm": {"set_alpha_to_one": False, "skip_prk_steps": True}, "dpm++": {}, "lcm": {}}


def fake_model(latents: torch.Tensor, t: int) -> torch.Tensor:
    """Cheap, smooth and nonlinear, so that an error at one step grows in the next."""
    return torch.sin(1.3 * latents + t / 300) * 0.7 + 0.3 * latents.roll(1, -1)


def compare(name: str, steps: int, config: dict, eta: float = 0.0) -> None:
    theirs = getattr(diffusers, CLASSES[name])(**config)
    theirs.set_timesteps(steps)
    ours = make_scheduler({**config, "_class_name": CLASSES[name]}, steps, eta=eta)
    assert list(ours.timesteps) == theirs.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    a = b = torch.randn(2, 4, 4, 6, generator=generator)
    history, ours_rng, theirs_rng = (), torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    more = {"ddim": {"eta": eta, "generator": theirs_rng}, "lcm": {"generator": theirs_rng}}.get(name, {})
    for i, t in enumerate(ours.timesteps):
        a, history = ours.step(fake_model(a, t), i, a, history, ours_rng)
        b = theirs.step(fake_model(b, t), t, b, **more).prev_sample
        assert ((a - b).norm() / b.norm()).item() < 1e-5, f"step {i}, timestep {t}"


@pytest.mark.parametrize("steps", [1, 2, 10, 20, 50, 999])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name, eta", [("ddim", 0.0), ("ddim", 0.5), ("pndm", 0.0), ("dpm++", 0.0)])
def test_every_step(name, eta, offset, steps):
    if (name, offset, steps) == ("dpm++", 1, 999):
        pytest.raises(ValueError, make_scheduler, {**BASE, "timestep_spacing": "leading", "steps_offset": 1}, 999, "dpm++")
        return      # it would begin at timestep 1000, which was never trained; diffusers goes there and gives NaN
    compare(name, steps, {**BASE, **OWN[name], "steps_offset": offset, "timestep_spacing": "leading"}, eta)


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 8, 20, 50, 300])
def test_every_step_at_karras_levels(steps, schedule):
    compare("dpm++", steps, {**BASE, "use_karras_sigmas": True, "beta_schedule": schedule})


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_karras_levels_of_every_number_of_steps(schedule):
    config = {**BASE, "use_karras_sigmas": True, "beta_schedule": schedule}
    for steps in (*range(1, 60), 333, 1000):
        theirs = diffusers.DPMSolverMultistepScheduler(**config)
        theirs.set_timesteps(steps)
        ours = make_scheduler(config, steps, "dpm++")
        assert list(ours.timesteps) == theirs.timesteps.tolist()
        for a, sigma in zip(ours.levels, theirs.sigmas.tolist()):
            assert (1 / a - 1) ** 0.5 == pytest.approx(sigma, rel=1e-6)


@pytest.mark.parametrize("more", [{}, {"clip_sample": True}, {"original_inference_steps": 100, "timestep_scaling": 3.0},
                                  {"steps_offset": 1, "timestep_spacing": "trailing"}])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
def test_every_step_of_lcm(steps, more):
    compare("lcm", steps, {**BASE, **more})


def test_every_schedule_of_lcm():
    for steps in range(1, 51):
        theirs = diffusers.LCMScheduler(**BASE)
        theirs.set_timesteps(steps)
        assert list(make_scheduler(BASE, steps, "lcm").timesteps) == theirs.timesteps.tolist()
    pytest.raises(ValueError, make_scheduler, BASE, 51, "lcm")
    pytest.raises(ValueError, diffusers.LCMScheduler(**BASE).set_timesteps, 51)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("name", CLASSES)
def test_other_spacings(name, spacing):
    compare(name, 17, {**BASE, **OWN[name], "timestep_spacing": spacing})


@pytest.mark.parametrize("more", [{"clip_sample": True, "set_alpha_to_one": True}, {"beta_schedule": "linear"},
                                  {"beta_schedule": "squaredcos_cap_v2"}])
def test_other_options(more):
    compare("ddim", 20, {**BASE, **OWN["ddim"], **more}, eta=0.3)


@pytest.mark.parametrize("kind, more", [
    ("PNDMScheduler", {}), ("EulerDiscreteScheduler", {"use_karras_sigmas": True}), ("UniPCMultistepScheduler", {})])
@pytest.mark.parametrize("name", CLASSES)
def test_another_sampler_from_the_published_config(name, kind, more):
    """--scheduler on SD 1.5's own PNDM config, or another's, does what from_config does in diffusers."""
    published = {**BASE, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False,
                 "trained_betas": None, **more}
    filled = dict(getattr(diffusers, kind).from_config(published).config)           # as the file of such a model has it
    published = {key: value for key, value in filled.items() if key != "_use_default_values"}
    theirs = getattr(diffusers, CLASSES[name]).from_config(published)
    theirs.set_timesteps(25)
    ours = make_scheduler(published, 25, name)
    assert list(ours.timesteps) == theirs.timesteps.tolist()
    a = b = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    history, ours_rng, theirs_rng = (), torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    more = {"generator": theirs_rng} if name == "lcm" else {}
    for i, t in enumerate(ours.timesteps):
        a, history = ours.step(fake_model(a, t), i, a, history, ours_rng)
        b = theirs.step(fake_model(b, t), t, b, **more).prev_sample
        assert ((a - b).norm() / b.norm()).item() < 1e-5
