"""The LoRAs of the benchmarks: rank 16 on every projection of the attention layers, as trainers make them by default."""

from __future__ import annotations

from pathlib import Path

import torch

import lora

RANK = 16


def make_loras(unet: torch.nn.Module, count: int) -> list[lora.LoRA]:
    """`count` LoRAs with random factors, down [RANK, in] and up [out, RANK]."""
    generator = torch.Generator().manual_seed(1)
    names = [name for name, module in unet.named_modules()
             if isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v", "0")
             and ".attn" in name]
    loras = []
    for n in range(count):
        layers = {}
        for name in names:
            weight = unet.get_submodule(name).weight
            layers[name] = lora.LoRALayer(torch.randn(RANK, weight.shape[1], generator=generator) * 0.05,
                                          torch.randn(weight.shape[0], RANK, generator=generator) * 0.05)
        loras.append(lora.LoRA(Path(f"l{n}"), f"l{n}", "peft LoRA", "", (RANK,), layers, {}, {}))
    return loras
