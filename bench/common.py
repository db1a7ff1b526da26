"""What the benchmarks share: their LoRAs, and how time and operations are measured."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lora

RANK = 16
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def make_loras(unet: torch.nn.Module, count: int) -> list[lora.LoRA]:
    """`count` LoRAs on every projection of the attention layers, as trainers make them by default, with random factors:
    down [RANK, in] and up [out, RANK]."""
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


def seconds(call, *inputs) -> float:
    """One call, by device events on CUDA."""
    if inputs[0].is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(*inputs)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    call(*inputs)
    return time.perf_counter() - begin


def operations(call, *inputs) -> int:
    """Floating point operations of one call: two for each multiplication with its addition."""
    # the counter does not know the CPU's fused attention, but the matrix products that it stands for
    backend = contextlib.nullcontext() if inputs[0].is_cuda else sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, backend:
        call(*inputs)
    return counter.get_total_flops()


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second in a product of two 4096 x 4096 matrices, the best of ten."""
    a = torch.randn(4096, 4096, device=device).to(dtype)
    return 2 * 4096 ** 3 / min(seconds(torch.mm, a, a) for _ in range(10))
