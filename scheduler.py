"""Samplers, built from the published scheduler_config.json: DDIM, PNDM as SD 1.5 ships it, DPM-Solver++ 2M (Karras), LCM.

A scheduler is stateless: `step` returns new latents and the history that the next step needs, and changes nothing.

    scheduler = make_scheduler(config, steps=50)
    history = ()
    for i, t in enumerate(scheduler.timesteps):
        latents, history = scheduler.step(predict_noise(latents, t), i, latents, history)

Notation: z_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps, with a_t the cumulative product of 1 - beta ("alphas_cumprod").
Coefficients are Python floats, so that latents of any precision and device keep theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

History = tuple[Any, ...]
Generators = torch.Generator | Sequence[torch.Generator] | None

# What a sampler here would have to obey and does not: {key: the values that it has anyway}. Of other classes too, as in
# diffusers, whose multistep solver takes "deis", "logrho" and "bh" for its own.
FIXED: dict[str, tuple] = {
    "trained_betas": (None,), "thresholding": (False,), "rescale_betas_zero_snr": (False,), "skip_prk_steps": (True,),
    "use_exponential_sigmas": (False, None), "use_beta_sigmas": (False, None), "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None), "euler_at_final": (False,), "solver_order": (2,), "final_sigmas_type": ("zero",),
    "algorithm_type": ("dpmsolver++", "deis"), "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
}


class Scheduler:
    """What all samplers share: the noise schedule and the choice of timesteps."""

    init_noise_sigma = 1.0
    set_alpha_to_one = False            # what the class takes where the config is silent
    timestep_spacing = "leading"
    options: tuple[str, ...] = ()       # keys of FIXED that this sampler would have to obey

    def __init__(self, config: dict, steps: int, eta: float = 0.0):
        prediction = config.get("prediction_type", "epsilon")
        if prediction != "epsilon":
            looks = "it looks like SD 2.x (v-prediction), and this" if prediction == "v_prediction" else "this"
            raise ValueError(f"the scheduler's prediction_type is {prediction!r}; {looks} is an SD 1.x implementation")
        for key in ("trained_betas", "thresholding", "rescale_betas_zero_snr", *self.options):
            if key in config and config[key] not in FIXED[key]:
                raise ValueError(f"scheduler_config.json: {key} = {config[key]!r} is not supported")
        for key, high, kind in (("num_train_timesteps", 10_000, int), ("steps_offset", 10_000, int),
                                ("beta_start", 1, float), ("beta_end", 1, float), ("clip_sample_range", 1e6, float),
                                ("original_inference_steps", 10_000, int), ("timestep_scaling", 1e6, float)):
            value = config.get(key, 0)
            if not (type(value) in (int, kind) and 0 <= value <= high):
                raise ValueError(f"scheduler_config.json: {key} cannot be {str(value)[:100]}")
        self.train_steps = config.get("num_train_timesteps", 1000)
        if not 1 <= steps <= self.train_steps:
            raise ValueError(f"the number of steps must be between 1 and {self.train_steps}, not {steps}")
        self.config, self.steps, self.eta = config, steps, eta
        self.alphas = _alphas_cumprod(config, self.train_steps)                     # a_t, train_steps floats
        if not 1 > self.alphas[0] >= self.alphas[-1] > 0:
            raise ValueError("scheduler_config.json: beta_start and beta_end make a schedule that is no noise or no picture")
        # what stands for "before the first timestep" (DDIM, section C.1)
        self.final_alpha = 1.0 if config.get("set_alpha_to_one", self.set_alpha_to_one) else self.alphas[0]
        self.timesteps = self.make_timesteps()
        if max(self.timesteps) >= self.train_steps:
            raise ValueError(f"{steps} steps with steps_offset {config['steps_offset']} would begin at timestep "
                             f"{max(self.timesteps)}, beyond the last one, {self.train_steps - 1}: use fewer steps")
        self.levels = self.make_levels()
        if len({*self.levels}) < steps:
            raise ValueError(f"{steps} steps are more than this sampler has timesteps for; use fewer")

    def make_timesteps(self) -> tuple[int, ...]:
        """Descending timesteps ("leading", "trailing", "linspace": arXiv 2305.08891, table 2)."""
        spacing, total = self.config.get("timestep_spacing", self.timestep_spacing), self.train_steps
        if spacing == "leading":
            ratio, offset = total // self.steps, self.config.get("steps_offset", 0)
            return tuple(n * ratio + offset for n in reversed(range(self.steps)))
        if spacing == "trailing":
            # [:steps]: rounding may bring one more, which diffusers takes for a timestep of -1
            return tuple((np.round(np.arange(total, 0, -total / self.steps)[:self.steps]) - 1).astype(int).tolist())
        if spacing == "linspace":
            return tuple(np.linspace(0, total - 1, self.steps).round()[::-1].astype(int).tolist())
        raise ValueError(f"scheduler_config.json: timestep_spacing {spacing!r} is not known")

    def make_levels(self) -> tuple[float, ...]:
        """a_t of the latents at every step: as the schedule has it at the step's timestep."""
        return tuple(self.alpha(t) for t in self.timesteps)

    def step(self, noise: Tensor, i: int, latents: Tensor, history: History = (),
             generator: Generators = None) -> tuple[Tensor, History]:
        """Goes from timesteps[i] to the next lower one -> (latents, history for the next call).

        noise, latents [B, C, h, w]; history is () at the first step; `generator` serves DDIM with eta > 0 and LCM: one for
        all rows, or a list with one for each.
        """
        raise NotImplementedError

    def alpha(self, t: int) -> float:
        return self.alphas[t] if t >= 0 else self.final_alpha

    def predict_x0(self, noise: Tensor, i: int, latents: Tensor) -> Tensor:
        """The picture that this noise prediction implies: x0 = (z_t - sqrt(1 - a_t) eps) / sqrt(a_t), same shape."""
        a = self.levels[i]
        return (latents - math.sqrt(1 - a) * noise) / math.sqrt(a)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """z_t of clean latents [B, C, h, w] at timesteps t, an int or [B]."""
        a = torch.tensor(self.alphas, device=latents.device)[t].reshape(-1, 1, 1, 1)    # float32: 1 - a is small at first
        return a.sqrt().to(latents.dtype) * latents + (1 - a).sqrt().to(latents.dtype) * noise


def _alphas_cumprod(config: dict, count: int) -> list[float]:
    # float32, as every checkpoint of the family was trained with
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    kind = config.get("beta_schedule", "linear")
    if kind == "scaled_linear":
        betas = torch.linspace(start ** 0.5, end ** 0.5, count, dtype=torch.float32) ** 2
    elif kind == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float32)
    elif kind == "squaredcos_cap_v2":
        def bar(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = torch.tensor([min(1 - bar((i + 1) / count) / bar(i / count), 0.999) for i in range(count)])
    else:
        raise ValueError(f"scheduler_config.json: beta_schedule {kind!r} is not known")
    return (1.0 - betas).cumprod(0).tolist()


def fresh_noise(like: Tensor, generator: Generators) -> Tensor:
    """[B, C, h, w] drawn where the generator lives, as diffusers does, so that a seed means one picture on every device."""
    if isinstance(generator, Sequence) and len(generator) != len(like):
        raise ValueError(f"{len(generator)} generators are given for {len(like)} rows; give one for each")
    parts = zip(like.split(1), generator) if isinstance(generator, Sequence) else [(like, generator)]
    return torch.cat([torch.randn(rows.shape, generator=one, device=like.device if one is None else one.device,
                                  dtype=like.dtype).to(like.device, non_blocking=like.device.type != "mps")
                      for rows, one in parts])


class DDIM(Scheduler):
    """Denoising diffusion implicit models (arXiv 2010.02502), eq. 12 and 16; eta 0 is deterministic."""

    set_alpha_to_one = True

    def step(self, noise: Tensor, i: int, latents: Tensor, history: History = (),
             generator: Generators = None) -> tuple[Tensor, History]:
        t = self.timesteps[i]
        now, then = self.alpha(t), self.alpha(t - self.train_steps // self.steps)
        x0 = self.predict_x0(noise, i, latents)
        if self.config.get("clip_sample", True):
            limit = self.config.get("clip_sample_range", 1.0)
            x0 = x0.clamp(-limit, limit)
        sigma = self.eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))     # eq. 16
        latents = math.sqrt(then) * x0 + math.sqrt(1 - then - sigma ** 2) * noise   # eq. 12
        if self.eta > 0:
            latents = latents + sigma * fresh_noise(noise, generator)
        return latents, ()


class PNDM(Scheduler):
    """Pseudo linear multistep (arXiv 2202.09778, eq. 9 and 12) as SD 1.5 ships it: no Runge-Kutta warm-up.

    The second timestep is visited twice: the first move is repeated with the mean of two predictions.
    """

    options = ("skip_prk_steps",)

    def make_timesteps(self) -> tuple[int, ...]:
        if not self.config.get("skip_prk_steps", False):
            raise ValueError("scheduler_config.json: PNDM with skip_prk_steps false (Runge-Kutta steps) is not supported")
        t = super().make_timesteps()
        return t if len(t) == 1 else (t[0], t[1], *t[1:])

    def step(self, noise: Tensor, i: int, latents: Tensor, history: History = (),
             generator: Generators = None) -> tuple[Tensor, History]:
        t, ratio = self.timesteps[i], self.train_steps // self.steps
        if i == 1:                      # history: (first prediction, latents it was made at)
            past, latents = history[:1], history[1]
            noise = (noise + past[0]) / 2
            return self._transfer(latents, t + ratio, t, noise), past
        past = (*history, noise)[-4:]
        if len(past) == 1:
            return self._transfer(latents, t, t - ratio, noise), (noise, latents)
        if len(past) == 2:
            noise = (3 * past[1] - past[0]) / 2
        elif len(past) == 3:
            noise = (23 * past[2] - 16 * past[1] + 5 * past[0]) / 12
        else:
            noise = (55 * past[3] - 59 * past[2] + 37 * past[1] - 9 * past[0]) / 24
        return self._transfer(latents, t, t - ratio, noise), past

    def _transfer(self, latents: Tensor, t: int, before: int, noise: Tensor) -> Tensor:
        """Eq. 9 of the paper: from timestep t to `before` along one noise estimate."""
        now, then = self.alpha(t), self.alpha(before)
        slope = (then - now) / (now * math.sqrt(1 - then) + math.sqrt(now * (1 - now) * then))
        return math.sqrt(then / now) * latents - slope * noise


class DPMSolverPP(Scheduler):
    """DPM-Solver++ (2M), arXiv 2211.01095, algorithm 2, midpoint; the last step is of first order and ends at x0."""

    timestep_spacing = "linspace"
    options = ("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas", "euler_at_final",
               "solver_order", "algorithm_type", "solver_type", "final_sigmas_type")

    def make_timesteps(self) -> tuple[int, ...]:
        # one more than asked for and the last left out: the end, t = 0, is a point of its own
        spacing = self.config.get("timestep_spacing", self.timestep_spacing)
        lowest = self.config.get("lambda_min_clipped", -math.inf)                   # meant for cosine schedules
        if type(lowest) not in (int, float) or 0.5 * math.log(self.alphas[-1] / (1 - self.alphas[-1])) < lowest:
            raise ValueError(f"scheduler_config.json: lambda_min_clipped = {lowest!r} is not supported")
        if spacing == "leading":
            ratio, offset = self.train_steps // (self.steps + 1), self.config.get("steps_offset", 0)
            return tuple(n * ratio + offset for n in reversed(range(1, self.steps + 1)))
        if spacing == "linspace":
            return tuple(np.linspace(0, self.train_steps - 1, self.steps + 1).round()[:0:-1].astype(int).tolist())
        return super().make_timesteps()

    def step(self, noise: Tensor, i: int, latents: Tensor, history: History = (),
             generator: Generators = None) -> tuple[Tensor, History]:
        x0 = self.predict_x0(noise, i, latents)
        if i == len(self.timesteps) - 1:
            return x0, ()               # sigma is 0 there: all that is left is the estimate

        def point(n: int) -> tuple[float, float, float]:
            a = self.levels[n]
            return math.sqrt(a), math.sqrt(1 - a), 0.5 * math.log(a / (1 - a))      # alpha, sigma, lambda
        (_, sigma, now), (alpha_next, sigma_next, then) = point(i), point(i + 1)
        h = then - now
        mean = x0
        if history:
            ratio = (now - point(i - 1)[2]) / h
            mean = x0 + (x0 - history[0]) / (2 * ratio)
        return sigma_next / sigma * latents - alpha_next * math.expm1(-h) * mean, (x0,)


class KarrasDPMSolverPP(DPMSolverPP):
    """The same at other noise levels, "DPM++ 2M Karras": sigma = sqrt((1 - a) / a) as in arXiv 2206.00364, eq. 5, rho 7."""

    def make_timesteps(self) -> tuple[int, ...]:
        # the UNet is told the nearest one (of a cosine schedule the one below, as in diffusers); two steps may share one
        a = np.array(self.alphas, np.float32)
        known = np.log(np.sqrt((1 - a) / a))                                        # [train_steps], ascending
        t = np.interp([0.5 * math.log(1 / level - 1) for level in self.make_levels()], known, np.arange(len(known)))
        return tuple((t if self.config.get("beta_schedule") == "squaredcos_cap_v2" else t.round()).astype(int).tolist())

    def make_levels(self) -> tuple[float, ...]:
        low, high = (math.sqrt((1 - a) / a) ** (1 / 7) for a in (self.alphas[0], self.alphas[-1]))
        return tuple(1 / (1 + root ** 14) for root in np.linspace(high, low, self.steps).tolist())


class LCM(Scheduler):
    """Multistep consistency sampling (arXiv 2310.04378, algorithm 3) for models distilled so, or with an LCM-LoRA.

    Each step jumps to the estimate of the clean latents and adds fresh noise of the next timestep; the last one ends there.
    """

    def make_timesteps(self) -> tuple[int, ...]:
        # a subset of the timesteps it was distilled at, every train_steps / 50 of them, evenly spread
        total = self.config.get("original_inference_steps", 50)
        if not 1 <= total <= self.train_steps:
            raise ValueError(f"scheduler_config.json: original_inference_steps cannot be {total}")
        if self.steps > total:
            raise ValueError(f"LCM takes at most {total} steps, not {self.steps}; 4 to 8 are usual")
        return tuple((total - n * total // self.steps) * (self.train_steps // total) - 1 for n in range(self.steps))

    def step(self, noise: Tensor, i: int, latents: Tensor, history: History = (),
             generator: Generators = None) -> tuple[Tensor, History]:
        x0 = self.predict_x0(noise, i, latents)
        if self.config.get("clip_sample", False):
            limit = self.config.get("clip_sample_range", 1.0)
            x0 = x0.clamp(-limit, limit)
        # eq. 9 with sigma_data 0.5: at t = 0 the estimate is the sample itself
        t = self.timesteps[i] * self.config.get("timestep_scaling", 10.0)
        skip, out = 0.25 / (t ** 2 + 0.25), t / math.sqrt(t ** 2 + 0.25)
        clean = out * x0 + skip * latents
        if i == len(self.timesteps) - 1:
            return clean, ()
        then = self.alpha(self.timesteps[i + 1])
        return math.sqrt(then) * clean + math.sqrt(1 - then) * fresh_noise(noise, generator), ()


SCHEDULERS: dict[str, type[Scheduler]] = {
    "ddim": DDIM, "pndm": PNDM, "dpm++": DPMSolverPP, "dpm++-karras": KarrasDPMSolverPP, "lcm": LCM}
CLASSES = {"DDIMScheduler": "ddim", "PNDMScheduler": "pndm", "DPMSolverMultistepScheduler": "dpm++", "LCMScheduler": "lcm"}


def make_scheduler(config: dict, steps: int, name: str | None = None, eta: float = 0.0) -> Scheduler:
    """A sampler of `steps` steps from the contents of scheduler_config.json; `name` takes another one than it names.

    ValueError: an unknown class or name, a schedule or an option that is not supported, a number of steps out of range.
    """
    if name is None:
        kind = str(config.get("_class_name") or "")
        if kind not in CLASSES:
            raise ValueError(f"scheduler_config.json: {kind or 'no class'} is not supported; "
                             f"choose one with --scheduler {', '.join(SCHEDULERS)}")
        name = CLASSES[kind]
    elif name not in SCHEDULERS:
        raise ValueError(f"there is no scheduler called {name}; choose from {', '.join(SCHEDULERS)}")
    elif name == "pndm":                # the only form there is here; a config of another class does not say
        config = {"skip_prk_steps": True, **config}
    if name == "dpm++" and config.get("use_karras_sigmas"):         # of any class, as in diffusers
        name = "dpm++-karras"
    return SCHEDULERS[name](config, steps, eta)
