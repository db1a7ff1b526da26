"""Makes random LoRA files of every published format for a given UNet and text encoder, and says what they mean.

`Made.deltas` are the changes of the weights, computed in float64 from each format's definition.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora import LoRAConv2d, LoRALinear
from weights.names import ldm_unet_name


@dataclass
class Made:
    state: dict[str, Tensor] = field(default_factory=dict)
    deltas: dict[str, dict[str, Tensor]] = field(default_factory=lambda: {"unet": {}, "text_encoder": {}})

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> Path:
        save_file({key: value.contiguous() for key, value in self.state.items()}, path, metadata)
        return path


def targets(unet: nn.Module, text: nn.Module | None, conv: bool) -> list[tuple[str, str, nn.Module]]:
    """(half, name, layer) of what a trainer adapts: attention and feed-forward, with `conv` the resnets too."""
    found = [("unet", name, module) for name, module in unet.named_modules()
             if isinstance(module, LoRALinear | LoRAConv2d)
             and (any(part in name for part in (".attn", ".ff.", "proj_in", "proj_out"))
                  or conv and any(part in name for part in ("conv1", "conv2", "conv_shortcut", "samplers", "time_emb")))]
    if text is not None:
        found += [("text_encoder", name if name.startswith("text_model.") else f"text_model.{name}", module)
                  for name, module in text.named_modules() if isinstance(module, nn.Linear)]
    return found


def make(form: str, unet: nn.Module, text: nn.Module | None = None, rank: int = 4, alpha: float = 2.0, conv: bool = True,
         seed: int = 0, size: float = 0.15) -> Made:
    """form: kohya, kohya-ldm, peft, down-up, processor, dora, tucker, loha, lokr."""
    rng, made = torch.Generator().manual_seed(seed), Made()

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng) * size

    attends = tuple(bool(block.attentions) for block in unet.up_blocks)
    for half, name, layer in targets(unet, text, conv and form != "processor"):
        out, inputs, *kernel = layer.weight.shape
        if form == "processor" and half == "unet" and ".attn" not in name:
            continue
        down, up = random(rank, inputs, *kernel), random(out, rank, *[1] * len(kernel))
        delta = (up.double().flatten(1) @ down.double().flatten(1)).view(layer.weight.shape)
        flat = name.replace(".", "_")
        if half == "unet" and form == "kohya-ldm":
            flat = ldm_unet_name(name, unet.config.layers_per_block, attends).replace(".", "_")
        key = f"{'lora_unet' if half == 'unet' else 'lora_te'}_{flat}"
        long = f"{half}.{name}"
        if form in ("kohya", "kohya-ldm", "dora", "tucker"):
            parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}
            delta = delta * alpha / rank
            if form == "dora":
                parts["dora_scale"] = 0.5 + torch.rand(out, *[1] * (layer.weight.dim() - 1), generator=rng)
                changed = layer.weight.double() + delta
                norm = changed.flatten(1).norm(dim=1)
                scale = parts["dora_scale"].double().flatten() / norm
                delta = changed * scale.view(-1, *[1] * (delta.dim() - 1)) - layer.weight.double()
            if form == "tucker" and kernel and kernel[0] > 1:
                parts["lora_down.weight"], parts["lora_mid.weight"] = random(rank, inputs, 1, 1), random(rank, rank, *kernel)
                delta = torch.einsum("om,mnhw,ni->oihw", up.double().flatten(1), parts["lora_mid.weight"].double(),
                                     parts["lora_down.weight"].double().flatten(1)) * alpha / rank
            made.state |= {f"{key}.{part}": value for part, value in parts.items()}
        elif form == "peft":
            made.state |= {f"{long}.lora_A.weight": down, f"{long}.lora_B.weight": up}
        elif form == "down-up":
            made.state |= {f"{long}.lora.down.weight": down, f"{long}.lora.up.weight": up}
        elif form == "processor" and half == "unet":
            where, what = name.removesuffix(".0").rsplit(".", 1)
            made.state |= {f"unet.{where}.processor.{what}_lora.down.weight": down,
                           f"unet.{where}.processor.{what}_lora.up.weight": up}
        elif form == "processor":
            made.state |= {f"{long}.lora_linear_layer.down.weight": down, f"{long}.lora_linear_layer.up.weight": up}
        elif form == "loha":
            parts = {"hada_w1_a": random(out, rank), "hada_w1_b": random(rank, inputs * torch.Size(kernel).numel()),
                     "hada_w2_a": random(out, rank), "hada_w2_b": random(rank, inputs * torch.Size(kernel).numel())}
            a, b, c, d = (value.double() for value in parts.values())
            delta = ((a @ b) * (c @ d)).view(layer.weight.shape) * alpha / rank
            made.state |= {f"{key}.{part}": value for part, value in (parts | {"alpha": torch.tensor(alpha)}).items()}
        elif form == "lokr":
            w1 = random(2, 4)
            w2_a, w2_b = random(out // 2, rank), random(rank, inputs // 4 * torch.Size(kernel).numel())
            if out % 2 or inputs % 4:
                continue
            w2 = (w2_a.double() @ w2_b.double()).view(out // 2, inputs // 4, *kernel)
            delta = torch.kron(w1.double().view(2, 4, *[1] * len(kernel)), w2) * alpha / rank
            made.state |= {f"{key}.lokr_w1": w1, f"{key}.lokr_w2_a": w2_a, f"{key}.lokr_w2_b": w2_b,
                           f"{key}.alpha": torch.tensor(alpha)}
        made.deltas[half][name] = delta
    return made
