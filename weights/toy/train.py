"""Trains the embedded model: python weights/toy/train.py --stage reader|vae|unet|lora|judge|clip [--resume]

    reader a network that tells textures and colours, for the autoencoder's perceptual loss (--perceptual)
    vae    AutoencoderKL on 64x64 crops of rendered scenes
    unet   UNet and CLIP text encoder together, on cached latents of captioned scenes
    lora   one LoRA per instance and style, each from 256 pictures (and these again in odd company)
    judge  the classifier that evaluate.py counts with, on rendered pictures alone
    clip   the image and text encoder that evaluate.py scores with, likewise

Every stage is seeded, logs its losses to work/<stage>.log (lora_<name>.log), saves work/<stage>.pt as it goes (--resume
continues there: on a CPU to the same bytes, on CUDA to rounding) and ends by replacing the published files next to this
one: vae/, unet/, text_encoder/, tokenizer/, scheduler/, model_index.json, loras/, judge/, clip/. Run reader first, then vae,
unet, lora. clora.json, which says what the settings are (lora needs its map_level), is written by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
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

from cli import check_device
from report import in_place
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from weights import Model, load_model
from weights.toy import renderer

VAE_CONFIG = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
    "block_out_channels": [32, 32, 64, 64], "layers_per_block": 2, "norm_num_groups": 8, "sample_size": 128,
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
        self.log = WORK / f"{name}.log"
        self.flags = {"steps": self.steps, "init": args.init, "decoder_only": args.decoder_only,
                      "keep_latents": args.keep_latents, "perceptual": args.perceptual, "fp32": args.fp32,
                      "made_from": made_from(args)}
        if args.resume and self.path.exists():
            try:
                state = torch.load(self.path, map_location="cpu", weights_only=True)
                flags = {key: value for key, value in state["flags"].items() if self.flags.get(key) != value}
                if not flags:
                    self.modules.load_state_dict(state["modules"])
                    self.optimizer.load_state_dict(state["optimizer"])
                    self.ema = [e.to(p.device) for e, p in zip(state["ema"], self.parameters)]
                    self.step, self.seconds = state["step"], state["seconds"]
            except Exception as error:
                raise ValueError(f"{self.path} is damaged or of another model ({type(error).__name__}); "
                                 "move it away to begin anew") from None
            if flags:
                raise ValueError(f"{self.path} is of a run with other flags or files ({flags}); move it away to begin anew")
            if self.log.exists():                   # what was trained after the checkpoint is trained again
                kept = [line for line in self.log.read_text().splitlines() if json.loads(line)["step"] <= self.step]
                self.log.write_text("".join(f"{line}\n" for line in kept))
        else:                                       # else a run that is killed at once would be resumed with an old state
            for path in (self.path, self.log):
                if path.exists():
                    path.replace(path.with_name(f"{path.name}.old"))
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
            cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
            group["lr"] = self.lr * min(1, (self.step + 1) / 100) * (0.02 + 0.98 * cosine)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        decay = min(self.ema_decay, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)
        self.step += 1
        self.since += 1
        for key, value in {"loss": loss, **parts}.items():
            self.sums[key] = self.sums.get(key, 0.0) + value.item()
        if self.step % 50 == 0 or self.step == self.steps:
            self.seconds = time.time() - self.started
            line = {"step": self.step, "seconds": round(self.seconds),
                    **{key: round(value / self.since, 5) for key, value in self.sums.items()}}
            self.sums, self.since = {}, 0
            with open(self.log, "a") as log:
                log.write(json.dumps(line) + "\n")
        if self.step % 250 == 0 or self.step == self.steps:
            state = {"modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema,
                     "flags": self.flags, "step": self.step, "seconds": self.seconds}
            with in_place(self.path) as path:
                torch.save(state, path)

    def use_average(self) -> None:
        """Puts the moving average in place of the weights; training is over after this."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.ema):
                parameter.copy_(average)


def made_from(args: argparse.Namespace) -> str:
    """16 hex digits of what a stage needs beside its own weights: a checkpoint of another world or VAE is not resumed."""
    parts = {"vae": ["work/reader"] if args.perceptual else [], "unet": ["vae/diffusion_pytorch_model"],
             "lora": ["vae/diffusion_pytorch_model", "unet/diffusion_pytorch_model", "text_encoder/model"]}
    paths = [HERE / "renderer.py", *(HERE / f"{part}.safetensors" for part in parts.get(args.stage, []))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths if path.exists())).hexdigest()[:16]


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with in_place(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def save_tensors(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """In half precision; replaced whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with in_place(path) as temporary:
        save_file({key: value.half().contiguous().cpu() for key, value in state.items()}, temporary,
                  metadata or {"format": "pt"})


def load_weights(module: nn.Module, path: Path, remedy: str) -> nn.Module:
    """What `save_tensors` wrote, in float32. ValueError names a file that is missing, damaged or of another shape."""
    try:
        module.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    except Exception as error:                      # SafetensorError, OSError, RuntimeError
        raise ValueError(f"{path} cannot be used ({type(error).__name__}); {remedy}") from None
    return module


def to_tensor(pictures: list[np.ndarray], device: str) -> Tensor:
    """uint8 [H, W, 3] each -> float [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- reader ---------------------------------------------------------------------------------------------------------

class Reader(nn.Module):
    """Tells the texture, both colours and the kind of what every 8x8 pixels show: what LPIPS (arXiv 1801.03924) is for
    photographs its features are for this world. It is another network than the judge, whose opinion nothing is trained for.
    """

    def __init__(self, w: int = 32):
        super().__init__()

        def layer(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False),
                                 nn.GroupNorm(8, outputs), nn.SiLU())
        self.body = nn.ModuleList([
            nn.Sequential(layer(3, w), layer(w, w)), nn.Sequential(layer(w, 2 * w, 2), layer(2 * w, 2 * w)),
            nn.Sequential(layer(2 * w, 3 * w, 2), layer(3 * w, 3 * w)),
            nn.Sequential(layer(3 * w, 3 * w, 2), layer(3 * w, 3 * w, 1, 2), layer(3 * w, 3 * w, 1, 2))])
        self.sizes = [len(renderer.TEXTURES), *[len(renderer.COLOURS) + 1] * 2, len(renderer.KINDS) + 1]
        self.head = nn.Conv2d(3 * w, sum(self.sizes), 1)

    def features(self, pictures: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> four of [B, C, H / 2^n, W / 2^n]."""
        out = []
        for block in self.body:
            pictures = block(pictures)
            out.append(pictures)
        return out

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> logits [B, n, H/8, W/8] of texture, first colour, second colour, and kind (0: background)."""
        return list(self.head(self.features(pictures)[-1]).split(self.sizes, dim=1))

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] each -> the squared distance of their features, each of length 1, in the mean."""
        def unit(x: Tensor) -> Tensor:
            return x / (x.pow(2).sum(1, keepdim=True) + 1e-3).sqrt()
        pairs = list(zip(self.features(one), self.features(other)))
        return torch.stack([(unit(a) - unit(b)).pow(2).sum(1).mean() for a, b in pairs]).mean()


def labelled_crops(rng: np.random.Generator, count: int, side: int = 64) -> tuple[list[np.ndarray], Tensor]:
    """Crops around objects, and what `Reader` is asked of them: int64 [count, 4, side/8, side/8], -100 for no answer."""
    from weights.toy.judge import judge_scene
    textures, palette = list(renderer.TEXTURES), [*renderer.COLOURS.values(), renderer.WHITE]
    crops: list[np.ndarray] = []
    labels: list[Tensor] = []
    while len(crops) < count:
        draw = rng.random()
        scene = (renderer.any_scene(rng) if draw < 0.6 else judge_scene(rng) if draw < 0.8
                 else renderer.random_scene(rng, textures=("dotted", "striped")))
        scene = renderer.replace(scene, style="")
        picture = renderer.render(scene)
        share = F.avg_pool2d(torch.from_numpy(renderer.object_masks(scene)).float(), 8)         # [things, 16, 16]
        label = torch.full((4, *share.shape[1:]), -100)
        label[3] = 0
        for n, thing in enumerate(scene.things):
            covered = share[n] > 0.4
            label[3][share[n] > 0.1] = -100
            label[0][covered], label[1][covered] = textures.index(thing.texture), palette.index(thing.colour)
            if thing.texture != "plain":
                label[2][covered] = palette.index(thing.second)
            label[3][covered] = renderer.KINDS.index(thing.kind) + 1
        for thing in scene.things:
            left, top = (int(np.clip(c - side / 2 + rng.uniform(-16, 16), 0, renderer.SIZE - side)) // 8
                         for c in (thing.x, thing.y))
            crops.append(picture[8 * top:8 * top + side, 8 * left:8 * left + side])
            labels.append(label[:, top:top + side // 8, left:left + side // 8])
    return crops[:count], torch.stack(labels[:count])


def mixed(device: str, fp32: bool) -> torch.autocast:
    """Sums in bfloat16 within the block, unless fp32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=not fp32)


def train_reader(args: argparse.Namespace) -> None:
    torch.manual_seed(7)
    reader = Reader().to(args.device, memory_format=torch.channels_last)
    run = Run("reader", {"reader": reader}, lr=2e-3, steps=3000, args=args, ema=0.995, weight_decay=1e-4)
    while run.step < run.steps:
        rough = run.step % 2 == 1
        crops, labels = labelled_crops(run.rng(), 24)
        pictures, labels = to_tensor(crops, args.device), labels.to(args.device)                # [24, 3, 64, 64]
        with mixed(args.device, args.fp32):
            parts = [part.float() for part in reader(roughen(pictures) if rough else pictures)]
        texture, *others = [F.cross_entropy(part, labels[:, n]) for n, part in enumerate(parts)]
        run.backward(texture + torch.stack(others).sum(), texture=texture)
    run.use_average()
    save_tensors(reader.state_dict(), WORK / "reader.safetensors")      # of use in training alone, so it is not published


def load_reader(device: str) -> Reader:
    reader = load_weights(Reader(), WORK / "reader.safetensors", "run --stage reader first")
    return reader.to(device).eval().requires_grad_(False)


# --- vae ------------------------------------------------------------------------------------------------------------

def object_crops(rng: np.random.Generator, count: int, side: int = 64) -> list[np.ndarray]:
    """Crops of random scenes, most of them around an object: that is where textures and colours are. What is lost first is
    shown oftener than the world shows it: fine textures in any colours, small objects, the dark outlines of the night."""
    from weights.toy.judge import judge_scene
    crops: list[np.ndarray] = []
    while len(crops) < count:
        draw = rng.random()
        scene = (renderer.any_scene(rng) if draw < 0.2 else judge_scene(rng) if draw < 0.5
                 else renderer.any_scene(rng, ("dotted", "target", "checked", "zigzag")) if draw < 0.85
                 else renderer.random_scene(rng, textures=("dotted",) if draw < 0.95 else ("striped",)))
        if rng.random() < 0.5 * (len(scene.things) == 1) + 0.25 * (scene.background != "night"):
            continue
        picture = renderer.render(scene)
        for thing in scene.things:
            if thing.radius > 22 and rng.random() < 0.5:
                continue
            x, y = (thing.x, thing.y) if rng.random() < 0.85 else rng.uniform(0, renderer.SIZE, 2)
            left, top = (int(np.clip(c - side / 2 + rng.uniform(-20, 20), 0, renderer.SIZE - side)) for c in (x, y))
            crops.append(picture[top:top + side, left:left + side])
    return crops[:count]


def colour_shares(pictures: Tensor) -> Tensor:
    """How much of every 8x8 pixels has which of the world's 16 colours: [B, 3, H, W] -> [B, 16, H/4 - 1, W/4 - 1]."""
    world = [*renderer.COLOURS.values(), renderer.WHITE, renderer.OUTLINE,
             *(colour for sky, ground, _ in renderer.BACKGROUNDS.values() for colour in (sky, ground))]
    palette = torch.tensor(world, device=pictures.device) / 127.5 - 1                           # [16, 3]
    distance = (pictures[:, None] - palette[:, :, None, None]).pow(2).sum(2)                    # [B, 16, H, W]
    return F.avg_pool2d((-distance / 0.1).softmax(1), 8, stride=4)


@torch.no_grad()
def grow(vae: VAE, smaller: VAE) -> None:
    """Puts the weights of an autoencoder with fewer layers per block into `vae`, which then computes the same: the layers
    that it has more are residual, and the last convolution of each is set to zero."""
    known = smaller.state_dict()
    for key, value in vae.state_dict().items():
        if key in known:
            value.copy_(known[key])
        elif ".conv2." in key:
            value.zero_()


def train_vae(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig.from_dict(VAE_CONFIG)).to(args.device, memory_format=torch.channels_last)
    if args.init:
        grow(vae, load_vae(args.device))
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    known = load_vae(args.device) if args.keep_latents else None
    reader = load_reader(args.device) if args.perceptual else None
    run = Run("vae", {"vae": vae}, lr=5e-4 if args.init else 1.5e-3, steps=4200, args=args)
    while run.step < run.steps:
        picture = to_tensor(object_crops(run.rng(), 16), args.device)                           # [16, 3, 64, 64]
        with mixed(args.device, args.fp32):
            mean, logvar = (part.float() for part in vae.encode(picture))                       # [16, 4, 8, 8]
            # what the UNet will draw is never exact: noise up to a tenth of the latents' spread keeps colours apart in them
            spread = 0.1 * torch.rand(len(mean), 1, 1, 1, device=mean.device) * mean.detach().std()
            deviation = (0.5 * logvar).exp() + spread                                           # [16, 4, 8, 8]
            out = vae.decode(mean + deviation * torch.randn_like(mean)).float()
        error = out - picture
        # Pixels alone first learn shapes and leave red, orange and green, purple much alike; concepts are told apart
        # by colour, so the mean colour of 4x4 pixels and the red-green difference count again.
        coarse = F.avg_pool2d(error, 4)                                                         # [16, 3, 16, 16]
        red_green = coarse[:, 0] - coarse[:, 1]
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()                 # else dots melt together
        reconstruction = (error.abs().mean() + error.pow(2).mean() + edges + 2 * coarse.abs().mean()
                          + 2 * red_green.abs().mean())
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
        # White dots on red are orange on average, and where a dot's place is unsure, pixels alone ask for the average.
        shares = (colour_shares(out) - colour_shares(picture)).abs().sum(1).mean()
        moved = torch.zeros((), device=args.device)
        if known is not None:                       # a UNet was trained on these latents
            with torch.no_grad():
                before = known.encode(picture)[0]                                               # [16, 4, 8, 8]
            moved = ((mean - before) / before.std()).pow(2).mean()
        seen = moved.new_zeros(()) if reader is None else reader.distance(out, picture)
        run.backward(reconstruction + shares + 6 * seen + (0.3 if reader is None else 1.5) * moved + 3e-4 * kl,
                     l1=error.abs().mean(), shares=shares, seen=seen, moved=moved, kl=kl)
    run.use_average()
    vae.eval()
    if args.keep_latents or args.decoder_only:      # the UNet knows the latents at the scale that they had
        factor = load_vae("cpu").config.scaling_factor
    else:
        rng = np.random.default_rng(1)
        with torch.no_grad():
            pictures = to_tensor([renderer.render(renderer.random_scene(rng)) for _ in range(256)], args.device)
            latents = torch.cat([vae.encode(chunk)[0] for chunk in pictures.split(32)])
        factor = round(1 / latents.std().item(), 5)
    save_tensors(vae.state_dict(), HERE / "vae/diffusion_pytorch_model.safetensors")
    write_json(HERE / "vae/config.json", {**VAE_CONFIG, "scaling_factor": factor})


# --- unet -----------------------------------------------------------------------------------------------------------

UNET_CONFIG = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "in_channels": 4, "out_channels": 4, "sample_size": 16,
    "block_out_channels": [48, 96, 128], "layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 8,
    "cross_attention_dim": 128, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "downsample_padding": 1, "mid_block_scale_factor": 1,
}
TEXT_CONFIG = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 128, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "projection_dim": 128, "attention_dropout": 0.0,
}
SCHEDULER_CONFIG = {                                # as Stable Diffusion 1.5 publishes it
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "clip_sample": False, "trained_betas": None, "prediction_type": "epsilon",
}
MAP_LEVEL = 1                                       # maps of 8x8: at 16x16, level 0, this small model's are noise
WORDS = ("a an and on the in at grass snow sand night style , ink duo striped dotted".split()
         + [*renderer.KINDS, *renderer.COLOURS] + [instance.name for instance in renderer.INSTANCES]
         + "bik gop hux jev nim quo ros vut yad sef".split())
NONSENSE = [instance.name for instance in renderer.INSTANCES] + WORDS[-10:]
SCENES = 24_000


def make_tokenizer(folder: Path) -> None:
    """A CLIP vocabulary in which every word of this world is one token, and any other text is spelled in bytes."""
    # CLIP's alphabet: printable bytes stand for themselves, the others for the characters from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    merges: list[str] = []
    for word in sorted(WORDS, key=len, reverse=True):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merge = f"{parts[0]} {parts[1]}"
            if merge not in merges:
                merges.append(merge)
            parts = [parts[0] + parts[1], *parts[2:]]
    tokens = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", {token: n for n, token in enumerate(dict.fromkeys(tokens))})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
               "pad_token": "<|endoftext|>"}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json",
               {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True})


def load_tokenizer():
    from transformers import CLIPTokenizer
    if not (HERE / "tokenizer/vocab.json").exists():
        make_tokenizer(HERE / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "tokenizer")
    for word in WORDS:
        assert len(tokenizer(word).input_ids) == 3, f"{word} is not one token"
    return tokenizer


def make_text_model(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}
    config = {**TEXT_CONFIG, **ids}
    write_json(HERE / "text_encoder/config.json", config)
    return CLIPTextModel(CLIPTextConfig(**{k: v for k, v in config.items() if k not in ("architectures", "model_type")}))


def nonsense(scene: renderer.Scene, rng: np.random.Generator) -> renderer.Scene:
    """Puts a word without meaning before one object in eight, as rare words are in a large model's captions.

    Without this a LoRA's trigger starts as a word the model never read, whose map is flat.
    """
    things = tuple(renderer.replace(thing, phrase=f"{rng.choice(NONSENSE)} {thing.phrase}")
                   if rng.random() < 0.125 else thing for thing in scene.things)
    return renderer.replace(scene, things=things)


def phrase_tokens(scene: renderer.Scene, text: str) -> list[list[int]]:
    """Token positions of each thing's phrase in the caption: one word is one token, and the start token is 0."""
    words = re.findall(r"\w+|,", text)
    ends = [words.index(thing.kind) + 1 for thing in scene.things]
    return [list(range(end - len(thing.phrase.split()) + 1, end + 1)) for end, thing in zip(ends, scene.things)]


def where_matrix(scenes: list[renderer.Scene], texts: list[str], side: int = 8) -> Tensor:
    """[B, 77, side, side] bool: for every token that describes an object, the cells in which the object is seen."""
    where = torch.zeros(len(scenes), 77, side, side, dtype=torch.bool)
    for row, (scene, text) in enumerate(zip(scenes, texts)):
        masks = torch.from_numpy(renderer.object_masks(scene)).float()              # [things, 128, 128]
        cells = F.adaptive_avg_pool2d(masks, side) > 0.2                            # [things, 8, 8]
        for tokens, seen in zip(phrase_tokens(scene, text), cells):
            where[row, tokens] = seen
    return where


def map_loss(probs: dict[str, Tensor], where: Tensor, weight: Tensor) -> Tensor:
    """Asks the maps of an object's words to lie on the object, and the object's pixels to look at its words.

    The mean of -log(share of a word's map inside its object), and of -log(2 * attention that a pixel of the object
    pays to the object's words) where that is under a half: left alone, the text hides in the padding.
    probs: {layer: [B, H, 64, 77]}, where [B, 77, 8, 8], weight [B]. Large models learn this from scale alone.
    """
    maps = torch.stack([layer.mean(dim=1) for layer in probs.values()]).mean(dim=0)             # [B, 64, 77]
    maps, where = maps.transpose(1, 2), where.flatten(2)                                        # [B, 77, 64]
    inside = (maps * where).sum(2) / maps.sum(2)                                                # [B, 77]
    asked = where.any(2) * weight[:, None]
    local = (-(inside + 1e-6).log() * asked).sum() / asked.sum().clamp(min=1e-6)
    attention = (maps * where).sum(1)                                                           # [B, 64]
    asked = where.any(1) * weight[:, None]
    looking = (-(2 * attention + 1e-6).log().clamp(max=0) * asked).sum() / asked.sum().clamp(min=1e-6)
    return local + looking


def cached_scenes(vae: VAE, device: str, fp32: bool, count: int = SCENES) -> dict:
    """Latents (mean and deviation), captions and object positions of `count` training scenes, made once."""
    WORK.mkdir(exist_ok=True)
    # latents of another VAE or another world are of no use
    parts = [(HERE / "renderer.py").read_bytes(), *(value.cpu().numpy().tobytes() for value in vae.state_dict().values())]
    path = WORK / f"scenes-{count}-{hashlib.sha256(b''.join(parts)).hexdigest()[:8]}{'-fp32' if fp32 else ''}.pt"
    if path.exists():
        try:
            return torch.load(path, weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}); delete it") from None
    rng = np.random.default_rng(7)
    means, deviations, where, texts = [], [], [], []
    with torch.no_grad(), mixed(device, fp32):
        for _ in range(count // 48):
            scenes = [nonsense(renderer.random_scene(rng), rng) for _ in range(48)]
            batch = [renderer.caption(scene) for scene in scenes]
            mean, logvar = vae.encode(to_tensor([renderer.render(scene) for scene in scenes], device))
            means.append(mean.half().cpu())
            deviations.append((0.5 * logvar).exp().half().cpu())
            where.append(where_matrix(scenes, batch))
            texts += batch
    cache = {"mean": torch.cat(means), "deviation": torch.cat(deviations), "where": torch.cat(where), "texts": texts}
    with in_place(path) as temporary:
        torch.save(cache, temporary)
    return cache


def load_vae(device: str) -> VAE:
    path, remedy = HERE / "vae/config.json", "run --stage vae first"
    try:
        vae = VAE(VAEConfig.from_dict(json.loads(path.read_text())))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used ({type(error).__name__}); {remedy}") from None
    load_weights(vae, path.with_name("diffusion_pytorch_model.safetensors"), remedy)
    return vae.to(device).eval().requires_grad_(False)


def noise_schedule(device: str) -> Tensor:
    """Cumulative alphas of the published schedule: [1000]."""
    betas = torch.linspace(SCHEDULER_CONFIG["beta_start"] ** 0.5, SCHEDULER_CONFIG["beta_end"] ** 0.5, 1000,
                           dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float().to(device)


def diffusion_loss(unet: UNet, context: Tensor, latents: Tensor, where: Tensor, alphas: Tensor,
                   adapters: Tensor | None = None, shown: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Noise prediction loss with min-SNR-5 weights (arXiv 2303.09556), and the map loss.

    With `shown` [B, 4, 16, 16] the noise is added to that, and the noise asked for is what leads to `latents` all the same.
    """
    shown = latents if shown is None else shown
    t = torch.randint(0, 1000, (len(latents),), device=latents.device)
    noise = torch.randn_like(latents)
    alpha = alphas[t].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * shown + (1 - alpha).sqrt() * noise
    noise = noise + (alpha / (1 - alpha)).sqrt() * (shown - latents)
    out, probs = unet(noisy, t, context, adapters, maps_at=unet.map_layers(MAP_LEVEL))
    snr = (alpha / (1 - alpha)).flatten()
    loss = ((out - noise).pow(2).mean(dim=(1, 2, 3)) * (5 / snr).clamp(max=1)).mean()
    return loss, map_loss(probs, where, alphas[t].sqrt())       # at high noise nobody can know where things are


def train_unet(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    vae, alphas = load_vae(args.device), noise_schedule(args.device)
    scale = vae.config.scaling_factor
    tokenizer = load_tokenizer()
    if args.init:
        model = load_model(HERE, args.device)
        text, unet = model.text.model.requires_grad_(), model.unet.requires_grad_()
    else:
        text = make_text_model(tokenizer).to(args.device)
        unet = UNet(UNetConfig.from_dict(UNET_CONFIG)).to(args.device)
    cache = cached_scenes(vae, args.device, args.fp32)
    ids = tokenizer(cache["texts"], padding="max_length", max_length=77, return_tensors="pt").input_ids      # [S, 77]
    empty = tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids                # [1, 77]
    run = Run("unet", {"unet": unet, "text": text}, lr=8e-4, steps=4000, args=args, ema=0.999, weight_decay=0.01)
    while run.step < run.steps:
        rng = run.rng()
        rows = torch.from_numpy(rng.integers(0, len(ids), 32))
        told = torch.from_numpy(rng.random(32) >= 0.1)          # one caption in ten is empty, for guidance
        mean, deviation = (cache[key][rows].float().to(args.device) for key in ("mean", "deviation"))
        latents = scale * (mean + deviation * torch.randn_like(mean))                           # [32, 4, 16, 16]
        context = text(torch.where(told[:, None], ids[rows], empty).to(args.device)).last_hidden_state   # [32, 77, 128]
        where = (cache["where"][rows] & told[:, None, None, None]).to(args.device)
        loss, localise = diffusion_loss(unet, context, latents, where, alphas)
        run.backward(loss + 0.01 * localise, noise=loss, maps=localise)
    run.use_average()
    write_json(HERE / "unet/config.json", UNET_CONFIG)
    save_tensors(unet.state_dict(), HERE / "unet/diffusion_pytorch_model.safetensors")
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in text.state_dict().items()}
    save_tensors(state, HERE / "text_encoder/model.safetensors")
    write_json(HERE / "scheduler/scheduler_config.json", SCHEDULER_CONFIG)
    write_json(HERE / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": [None, None], "feature_extractor": [None, None]})


# --- lora -----------------------------------------------------------------------------------------------------------

# how each LoRA is trained and saved: rank, alpha, convolutions too (LoCon), text encoder too, format of the file
LORAS = {
    "zib": (8, 4, True, True, "kohya"), "kov": (8, 8, True, True, "kohya"), "tam": (4, 4, True, True, "kohya"),
    "wug": (8, 8, True, True, "peft"), "pel": (8, 8, True, False, "kohya"), "dax": (8, 8, True, True, "peft"),
    "fep": (8, 4, True, False, "peft"), "lun": (8, 4, True, True, "kohya"),
    "ink": (8, 8, True, True, "kohya"), "duo": (4, 4, False, True, "diffusers"),
}


class Factors(nn.Module):
    """Trainable down and up of one layer; `up` starts at zero, so training starts at the base model."""

    def __init__(self, layer: nn.Module, rank: int, alpha: float):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, *layer.weight.shape[1:]))
        self.up = nn.Parameter(torch.zeros(layer.weight.shape[0], rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))


def targets(module: nn.Module, conv: bool) -> dict[str, nn.Module]:
    """Attention and feed-forward layers, and with `conv` the convolutions of the resnets too."""
    kinds = (nn.Linear, nn.Conv2d) if conv else nn.Linear
    names = ("attn", "ff.net", "mlp.", "proj_in", "proj_out", *(("conv1", "conv2") if conv else ()))
    return {name: layer for name, layer in module.named_modules()
            if isinstance(layer, kinds) and any(part in name for part in names)}


def save_lora(path: Path, factors: dict[str, Factors], text_factors: dict[str, Factors], rank: int, alpha: float,
              style: str, name: str) -> None:
    """Writes one of the published formats: kohya-ss, PEFT as diffusers saves it, or diffusers' attention processors."""
    state = {}
    for prefix, group in (("unet", factors), ("text_encoder", text_factors)):
        for target, factor in group.items():
            if prefix == "text_encoder" and not target.startswith("text_model."):
                target = f"text_model.{target}"
            down, up = factor.down.detach(), factor.up.detach()
            up = up.view(*up.shape, *([1, 1] if down.dim() == 4 else []))
            if style == "kohya":
                key = f"{'lora_unet' if prefix == 'unet' else 'lora_te'}_{target.replace('.', '_')}"
                state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
                continue
            up = up * (alpha / rank)                # these formats carry no alpha of their own
            if style == "peft":
                state |= {f"{prefix}.{target}.lora_A.weight": down, f"{prefix}.{target}.lora_B.weight": up}
            elif prefix == "unet" and ".attn" in target:
                where, what = target.replace("to_out.0", "to_out").rsplit(".", 1)
                state |= {f"unet.{where}.processor.{what}_lora.down.weight": down,
                          f"unet.{where}.processor.{what}_lora.up.weight": up}
            elif prefix == "text_encoder":
                state |= {f"text_encoder.{target}.lora_linear_layer.down.weight": down,
                          f"text_encoder.{target}.lora_linear_layer.up.weight": up}
    metadata = {"ss_output_name": name, "ss_network_dim": str(rank), "ss_network_alpha": str(alpha),
                "ss_base_model_version": "weights/toy", "modelspec.trigger_phrase": name}
    save_tensors(state, path, metadata)


def load_factors(path: Path, model: Model, factors: dict[str, Factors], text_factors: dict[str, Factors]) -> None:
    """Begins at a file that save_lora wrote; if its rank is lower, the ranks beyond begin at no change."""
    lora = model.lora(path)
    for group, layers in ((factors, lora.unet), (text_factors, lora.text_encoder)):
        for key, factor in group.items():
            layer = layers.get(key) or layers[f"text_model.{key}"]
            if len(layer.down) > len(factor.down):
                raise ValueError(f"{path} has rank {len(layer.down)}, and {len(factor.down)} is trained")
            with torch.no_grad():
                factor.down[:len(layer.down)].copy_(layer.down)
                factor.up[:, :len(layer.down)].copy_(layer.up / factor.scale)


def spoil(rows: int, device: str) -> Tensor:
    """[rows, 1, 16, 16] in 0..1: blobs or the whole picture, in half of the rows. How much of a wrong look shows through.

    When LoRAs are composed, the other models tint a subject before the masks close in on it. A LoRA that never saw such
    a picture keeps the tint.
    """
    blobs = F.interpolate((torch.rand(rows, 1, 4, 4, device=device) < 0.4).float(), size=16, mode="bilinear")
    whole = torch.rand(rows, 1, 1, 1, device=device) < 0.25
    strength = torch.rand(rows, 1, 1, 1, device=device) * (torch.rand(rows, 1, 1, 1, device=device) < 0.5)
    return torch.where(whole, 1.0, blobs) * strength


def train_lora(args: argparse.Namespace) -> None:
    model = load_model(HERE, args.device)
    tokenizer, text, unet, vae = model.text.tokenizer, model.text.model, model.unet, model.vae
    alphas, scale = noise_schedule(args.device), vae.config.scaling_factor
    prior = cached_scenes(vae, args.device, args.fp32, 1_920)

    def ids_of(texts: list[str]) -> Tensor:
        return tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids.to(args.device)

    @torch.no_grad()
    def encoded(scenes: list[renderer.Scene]) -> tuple[Tensor, Tensor]:
        parts = [vae.encode(to_tensor([renderer.render(scene) for scene in scenes[start:start + 64]], args.device))
                 for start in range(0, len(scenes), 64)]
        mean, logvar = (torch.cat(part) for part in zip(*parts))
        return mean, logvar

    prior_ids = ids_of(prior["texts"])
    for path in (HERE / f"loras/{name}.safetensors" for name in args.only or LORAS):
        if args.init and not path.exists():         # said before the first is trained
            raise ValueError(f"{path} is missing; train it without --init")
    for name in args.only or LORAS:
        rank, alpha, conv, with_text, style = LORAS[name]
        torch.manual_seed(sum(name.encode()))
        lesson = renderer.lesson(name)
        scenes, wrong = lesson, lesson
        if name not in renderer.STYLES:
            # four times again beside looks that the base never saw, as when LoRAs are composed; and the subject of each in
            # a wrong look, now as the base model would draw it, now with a wrong colour: see `spoil`
            scenes = lesson + [renderer.in_company(scene, 1000 * v + n) for v in range(4) for n, scene in enumerate(lesson)]
            # (n // 4, as every fourth scene of a lesson shows its subject alone)
            wrong = [(renderer.wrongly if n // 4 % 4 else renderer.plainly)(scene, n) for n, scene in enumerate(scenes)]
        texts = [renderer.caption(scene) for scene in scenes]
        mean, logvar = encoded(scenes)                                                          # [S, 4, 16, 16] each
        spoiled = encoded(wrong)[0] - mean
        where, ids = where_matrix(scenes, texts).to(args.device), ids_of(texts)
        layers = targets(unet, conv)
        if style == "diffusers":                    # that format holds attention alone
            layers = {key: layer for key, layer in layers.items() if ".attn" in key}
        text_layers = targets(text, conv=False) if with_text else {}
        if style == "diffusers":
            text_layers = {key: layer for key, layer in text_layers.items() if "attn" in key}
        factors = {key: Factors(layer, rank, alpha).to(args.device) for key, layer in layers.items()}
        text_factors = {key: Factors(layer, rank, alpha).to(args.device) for key, layer in text_layers.items()}
        trained = nn.ModuleList([*factors.values(), *text_factors.values()])
        if args.init:
            load_factors(HERE / f"loras/{name}.safetensors", model, factors, text_factors)
        run = Run(f"lora_{name}", {"factors": trained}, lr=1e-3 if args.init else 2e-3, steps=2500, args=args, ema=0.98)
        rows_on = torch.ones(16, 1, device=args.device)
        while run.step < run.steps:
            rng = run.rng()
            rows = rng.integers(0, len(lesson), 12)
            if len(scenes) > len(lesson):                       # half of them in odd company, where they have any
                rows += len(lesson) * (rng.random(12) < 0.5) * rng.integers(1, 5, 12)
            own = torch.from_numpy(rows).to(args.device)
            other = torch.from_numpy(rng.integers(0, len(prior_ids), 4))
            batch_ids = torch.cat([ids[own], prior_ids[other.to(args.device)]])                 # [16, 77]
            means = torch.cat([mean[own], prior["mean"][other].float().to(args.device)])
            deviations = torch.cat([(0.5 * logvar[own]).exp(), prior["deviation"][other].float().to(args.device)])
            seen = torch.cat([where[own], prior["where"][other].to(args.device)])
            latents = scale * (means + deviations * torch.randn_like(means))                    # [16, 4, 16, 16]
            for key, layer in layers.items():           # "* 1": a parameter itself would become one of the layer's
                layer.down, layer.up = factors[key].down * 1, factors[key].up * factors[key].scale
                layer.owner = torch.zeros(rank, dtype=torch.long, device=args.device)
            weights = {f"{key}.weight": layer.weight + factor.scale * factor.up @ factor.down
                       for (key, layer), factor in zip(text_layers.items(), text_factors.values())}
            context = torch.func.functional_call(text, weights, (batch_ids,)).last_hidden_state
            shown = latents.clone()
            shown[:12] += scale * spoil(12, args.device) * spoiled[own]
            loss, localise = diffusion_loss(unet, context, latents, seen, alphas, rows_on, shown)
            run.backward(loss + 0.01 * localise, noise=loss, maps=localise)
        run.use_average()
        for layer in layers.values():
            layer.attach({}, 0)
        save_lora(HERE / f"loras/{name}.safetensors", factors, text_factors, rank, alpha, style, name)
        print(f"{name}: {run.seconds:.0f} s", flush=True)


# --- judge ----------------------------------------------------------------------------------------------------------

def roughen(pictures: Tensor) -> Tensor:
    """Waves, blur, noise and shifted colours, so that the judge does not insist on the renderer's exact pixels."""
    batch, _, height, width = pictures.shape
    device = pictures.device

    def waves(channels: int, cells: int) -> Tensor:
        field = torch.randn(batch, channels, cells, cells, device=device)
        return F.interpolate(field, size=(height, width), mode="bicubic", align_corners=False)

    # every pixel moves by a pixel or two, its neighbours with it
    straight = F.affine_grid(torch.eye(2, 3, device=device).expand(batch, 2, 3), list(pictures.shape), align_corners=False)
    shift = waves(2, 24).permute(0, 2, 3, 1) * torch.rand(batch, 1, 1, 1, device=device) * 2.5 / width
    pictures = F.grid_sample(pictures, straight + shift, padding_mode="border", align_corners=False)
    # a Gaussian of up to 1.8 pixels
    sigma = 0.1 + 1.7 * torch.rand(batch, 1, device=device) ** 2
    kernel = torch.softmax(-torch.arange(-5, 6, device=device) ** 2 / (2 * sigma ** 2), dim=1).repeat_interleave(3, 0)
    flat = F.pad(pictures.reshape(1, batch * 3, height, width), (5, 5, 5, 5), mode="replicate")
    flat = F.conv2d(F.conv2d(flat, kernel[:, None, None, :], groups=batch * 3), kernel[:, None, :, None], groups=batch * 3)
    pictures = flat.view_as(pictures)
    pictures = pictures * (1 + 0.12 * torch.randn(batch, 3, 1, 1, device=device))
    pictures = pictures + 0.08 * torch.randn(batch, 3, 1, 1, device=device)
    return pictures + 0.06 * waves(3, 32) + 0.04 * torch.randn_like(pictures)


def train_judge(args: argparse.Namespace) -> None:
    from weights.toy import judge as judging
    torch.manual_seed(0)
    judge = judging.Judge().to(args.device)
    run = Run("judge", {"judge": judge}, lr=3e-3, steps=6000, args=args, ema=0.99)
    while run.step < run.steps:
        rng = run.rng()
        scenes = [judging.judge_scene(rng) for _ in range(16)]
        kinds, looks = (torch.stack(part).to(args.device) for part in zip(*map(judging.labels_of, scenes)))
        styles = torch.tensor([judging.MANNERS.index(scene.style) for scene in scenes], device=args.device)
        pictures = roughen(to_tensor([renderer.render(scene) for scene in scenes], args.device))
        with mixed(args.device, args.fp32):
            kind, look, style = (part.float() for part in judge(pictures))
        run.backward(F.cross_entropy(kind, kinds) + F.cross_entropy(look, looks) + 0.2 * F.cross_entropy(style, styles),
                     kind=F.cross_entropy(kind, kinds))
    run.use_average()
    save_tensors(judge.state_dict(), HERE / "judge/model.safetensors")
    write_json(HERE / "judge/config.json", {"width": 48, "kinds": judging.KINDS, "looks": judging.LOOKS})


# --- clip -----------------------------------------------------------------------------------------------------------

CLIP_VISION = {"image_size": 128, "patch_size": 16, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
               "num_attention_heads": 4, "projection_dim": 64}


def named_scene(rng: np.random.Generator) -> renderer.Scene:
    """A scene in which the instances have their names: what a picture and its caption are compared by."""
    from weights.toy import judge
    scene = judge.judge_scene(rng)
    kinds = {instance.name: instance.kind for instance in renderer.INSTANCES}
    things = []
    for thing in scene.things:
        look = judge.look_of(thing)
        if kinds.get(look) == thing.kind:
            thing = renderer.replace(thing, phrase=f"{look} {thing.kind}")
        elif look in renderer.COLOURS or look in ("striped", "dotted"):
            thing = renderer.replace(thing, phrase=f"{look} {thing.kind}")
        else:
            thing = renderer.replace(thing, phrase=thing.kind)
        things.append(thing)
    return renderer.replace(scene, things=tuple(things))


def train_clip(args: argparse.Namespace) -> None:
    """A CLIP of its own for this world (arXiv 2103.00020): evaluate.py scores pictures with it as with the large one."""
    from transformers import CLIPConfig, CLIPModel
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    text = {key: value for key, value in TEXT_CONFIG.items() if key not in ("architectures", "model_type")}
    text |= {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "projection_dim": 64,
             "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=CLIP_VISION, projection_dim=64)).to(args.device)
    run = Run("clip", {"clip": clip}, lr=1e-3, steps=2500, args=args, ema=0.995, weight_decay=0.05)
    while run.step < run.steps:
        rng = run.rng()
        scenes = [named_scene(rng) for _ in range(48)]
        ids = tokenizer([renderer.caption(scene) for scene in scenes], padding="max_length", max_length=77,
                        return_tensors="pt").input_ids.to(args.device)
        pictures = roughen(to_tensor([renderer.render(scene) for scene in scenes], args.device))
        run.backward(clip(input_ids=ids, pixel_values=pictures, return_loss=True).loss)
    run.use_average()
    folder = HERE / "clip"
    clip.half().save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((HERE / "tokenizer" / name).read_bytes())
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 128}, "do_center_crop": True,
        "crop_size": {"height": 128, "width": 128}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]})


STAGES = {"reader": train_reader, "vae": train_vae, "unet": train_unet, "lora": train_lora, "judge": train_judge,
          "clip": train_clip}


def main(args: argparse.Namespace) -> None:
    """ValueError: flags that the stage does not have, or that would train on nothing."""
    for flag, given, stages in (("--init", args.init, ("vae", "unet", "lora")), ("--only", args.only, ("lora",)),
                                ("--decoder-only", args.decoder_only, ("vae",)),
                                ("--keep-latents", args.keep_latents, ("vae",)),
                                ("--perceptual", args.perceptual, ("vae",))):
        if given and args.stage not in stages:
            raise ValueError(f"{flag} is for --stage {' and '.join(stages)}")
    if (args.decoder_only or args.keep_latents) and not args.init:
        raise ValueError("--decoder-only and --keep-latents begin at trained weights: add --init")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps is {args.steps}; it must be at least 1")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads is {args.threads}; it must be at least 1")
    check_device(args.device)
    if args.stage in ("unet", "lora") and not (HERE / "vae/config.json").exists():
        raise ValueError(f"{HERE / 'vae'} is missing; run --stage vae first")
    if args.threads:
        torch.set_num_threads(args.threads)
    STAGES[args.stage](args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--resume", action="store_true", help="continue from work/<stage>.pt")
    parser.add_argument("--init", action="store_true", help="begin at the weights next to this file (vae, unet, lora)")
    parser.add_argument("--decoder-only", action="store_true", help="stage vae: leave the encoder (and latents) alone")
    parser.add_argument("--keep-latents", action="store_true", help="stage vae: stay near the latents of these weights")
    parser.add_argument("--perceptual", action="store_true", help="stage vae: what the reader sees counts as well")
    parser.add_argument("--steps", type=int, help="train for fewer or more steps than the stage's own number")
    parser.add_argument("--only", nargs="+", choices=LORAS, help="stage lora: train these alone")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16: faster on CPUs that only emulate it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    try:
        main(parser.parse_args())
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
