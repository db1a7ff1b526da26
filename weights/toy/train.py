"""Trains the embedded model: python weights/toy/train.py --stage vae|unet|lora [--resume]

    vae    AutoencoderKL on 64x64 crops of rendered scenes
    unet   UNet and CLIP text encoder together, on cached latents of captioned scenes
    lora   one LoRA per instance and style, each from 20 pictures

Every stage is seeded, logs its losses to work/<stage>.log, saves work/<stage>.pt as it goes (--resume continues
there, to the same result) and ends by writing the published layout next to this file: vae/, unet/, text_encoder/,
tokenizer/, scheduler/, loras/. Run vae first, then unet, then lora. On CPU and CUDA alike.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
sys.path.insert(0, str(HERE.parents[1]))            # so that it runs as a script from anywhere

from unet import UNet, UNetConfig                   # noqa: E402
from vae import VAE, VAEConfig                      # noqa: E402
from weights.toy import renderer                    # noqa: E402

VAE_CONFIG = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
    "block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 128,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "scaling_factor": 1.0,                          # measured at the end of the stage
}


class Run:
    """Bookkeeping that all stages share: steps, log, checkpoint, moving average of the weights."""

    def __init__(self, name: str, modules: dict[str, nn.Module], lr: float, steps: int, args: argparse.Namespace,
                 ema: float = 0.998, weight_decay: float = 0.0):
        self.name, self.steps, self.ema_decay, self.lr = name, args.steps or steps, ema, lr
        self.modules = nn.ModuleDict(modules)
        self.parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
        self.ema = [p.detach().clone() for p in self.parameters]
        self.step, self.seconds = 0, 0.0
        self.path = WORK / f"{name}.pt"
        WORK.mkdir(exist_ok=True)
        if args.resume and self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            self.modules.load_state_dict(state["modules"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema = [e.to(p.device) for e, p in zip(state["ema"], self.parameters)]
            self.step, self.seconds = state["step"], state["seconds"]
        self.started = time.time() - self.seconds
        self.sums: dict[str, float] = {}
        self.since = 0

    def rng(self) -> np.random.Generator:
        """Random numbers of the current step: the same whether or not the run was interrupted."""
        torch.manual_seed(self.step)
        return np.random.default_rng([self.step, 2403])

    def backward(self, loss: Tensor, **parts: Tensor) -> None:
        """One optimiser step on `loss`: warm-up, then cosine decay; then the moving average; then the log."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1, (self.step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / self.steps)))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        decay = min(self.ema_decay, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)
        self.step += 1
        self.since += 1
        for key, value in {"loss": loss, **parts}.items():
            self.sums[key] = self.sums.get(key, 0.0) + float(value)
        if self.step % 50 == 0 or self.step == self.steps:
            self.seconds = time.time() - self.started
            line = {"step": self.step, "seconds": round(self.seconds),
                    **{key: round(value / self.since, 5) for key, value in self.sums.items()}}
            self.sums, self.since = {}, 0
            with open(WORK / f"{self.name}.log", "a") as log:
                log.write(json.dumps(line) + "\n")
        if self.step % 250 == 0 or self.step == self.steps:
            state = {"modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema,
                     "step": self.step, "seconds": self.seconds}
            torch.save(state, self.path.with_suffix(".tmp"))
            self.path.with_suffix(".tmp").replace(self.path)

    def use_average(self) -> None:
        """Puts the moving average in place of the weights; training is over after this."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.ema):
                parameter.copy_(average)


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def save_half(module: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half().contiguous() for key, value in module.state_dict().items()}, path, {"format": "pt"})


def to_tensor(pictures: list[np.ndarray], device: str) -> Tensor:
    """uint8 [H, W, 3] each -> float [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- vae ------------------------------------------------------------------------------------------------------------

def object_crops(rng: np.random.Generator, count: int, side: int = 64) -> list[np.ndarray]:
    """Crops of random scenes, most of them around an object: that is where textures and colours are."""
    crops: list[np.ndarray] = []
    while len(crops) < count:
        scene = renderer.any_scene(rng)
        picture = renderer.render(scene)
        for thing in scene.things[:2]:
            x, y = (thing.x, thing.y) if rng.random() < 0.85 else rng.uniform(0, renderer.SIZE, 2)
            left, top = (int(np.clip(c - side / 2 + rng.uniform(-20, 20), 0, renderer.SIZE - side)) for c in (x, y))
            crops.append(picture[top:top + side, left:left + side])
    return crops[:count]


def train_vae(args: argparse.Namespace) -> None:
    vae = VAE(VAEConfig.from_dict(VAE_CONFIG)).to(args.device)
    run = Run("vae", {"vae": vae}, lr=1.5e-3, steps=5000, args=args)
    while run.step < run.steps:
        picture = to_tensor(object_crops(run.rng(), 16), args.device)                           # [16, 3, 64, 64]
        with torch.autocast(args.device, torch.bfloat16):
            mean, logvar = (part.float() for part in vae.encode(picture))                       # [16, 4, 8, 8]
            out = vae.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean)).float()
        error = out - picture
        # squared error keeps colours exact, absolute error keeps edges sharp
        reconstruction = error.abs().mean() + 2 * error.pow(2).mean()
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
        run.backward(reconstruction + 3e-4 * kl, l1=error.abs().mean(), kl=kl)
    run.use_average()
    vae.eval()
    rng = np.random.default_rng(1)
    with torch.no_grad():
        pictures = to_tensor([renderer.render(renderer.random_scene(rng)) for _ in range(256)], args.device)
        latents = torch.cat([vae.encode(chunk)[0] for chunk in pictures.split(32)])
    write_json(HERE / "vae/config.json", {**VAE_CONFIG, "scaling_factor": round(1 / latents.std().item(), 5)})
    save_half(vae, HERE / "vae/diffusion_pytorch_model.safetensors")


STAGES = {"vae": train_vae}


def main(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    STAGES[args.stage](args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--resume", action="store_true", help="continue from work/<stage>.pt")
    parser.add_argument("--steps", type=int, help="train for fewer or more steps than the stage's own number")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    main(parser.parse_args())
