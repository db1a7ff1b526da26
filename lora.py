"""LoRA: layers that give every row of a batch its own adapters. weights/lora.py reads the files.

One forward serves all variants of CLoRA. `adapters` [B, A] holds the strength of adapter a on row b:

    row of zeros              the base model, untouched to the last bit
    one non-zero entry        one LoRA, at its user weight
    several non-zero entries  LoRAs stacked on one row (subject + style), or merged, at 1/K or their weights

    y = W x + sum_a adapters[b, a] * (up_a @ down_a) x          (LoRA, arXiv 2106.09685, eq. 3)

The layers subclass nn.Linear and nn.Conv2d, so a checkpoint's keys stay as published: factors are plain
attributes, not parameters or buffers, and never enter the state dict.

Shapes: B rows, A adapters, r rank (summed over the adapters of one layer), N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Adapted:
    """What LoRALinear and LoRAConv2d share: the factors of all adapters of this layer, side by side."""

    down: Tensor | None = None      # [r, in] or [r, in, kh, kw]; the ranks of all adapters stacked, alpha / rank folded in
    up: Tensor | None = None        # [out, r]
    owner: Tensor | None = None     # [r] which adapter each rank belongs to
    gain: Tensor | None = None      # [A, out] DoRA only: relative change of each output channel of W

    def attach(self, factors: dict[int, tuple[Tensor, Tensor, Tensor | None]], count: int) -> None:
        """Takes {adapter index: (down, up, gain or None)} for `count` adapters in all; {} detaches."""
        self.down = self.up = self.owner = self.gain = None
        if not factors:
            return
        like = self.weight                                                          # type: ignore[attr-defined]
        place = {"device": like.device, "dtype": like.dtype}
        self.down = torch.cat([down for down, _, _ in factors.values()]).to(**place)
        self.up = torch.cat([up for _, up, _ in factors.values()], dim=1).to(**place)
        self.owner = torch.cat([torch.full((len(down),), a) for a, (down, _, _) in factors.items()]).to(like.device)
        if any(gain is not None for _, _, gain in factors.values()):
            self.gain = torch.zeros(count, like.shape[0], **place)                  # [A, out]
            for a, (_, _, gain) in factors.items():
                if gain is not None:
                    self.gain[a] = gain.to(**place)


class LoRALinear(_Adapted, nn.Linear):
    def forward(self, x: Tensor, adapters: Tensor | None = None) -> Tensor:
        """x [B, ..., in], adapters [B, A] strengths or None -> [B, ..., out]."""
        y = super().forward(x)                                                      # [B, ..., out]
        if adapters is None or self.down is None:
            return y
        middle = (1,) * (x.dim() - 2)
        if self.gain is not None:
            bias = 0 if self.bias is None else self.bias
            y = y + (y - bias) * (adapters @ self.gain).view(len(x), *middle, -1)
        strength = adapters[:, self.owner].view(len(x), *middle, -1)                # [B, ..., r]
        return y + F.linear(F.linear(x, self.down) * strength, self.up)


class LoRAConv2d(_Adapted, nn.Conv2d):
    def forward(self, x: Tensor, adapters: Tensor | None = None) -> Tensor:         # type: ignore[override]
        """x [B, in, h, w], adapters [B, A] strengths or None -> [B, out, h', w']."""
        y = super().forward(x)                                                      # [B, out, h', w']
        if adapters is None or self.down is None:
            return y
        if self.gain is not None:
            bias = 0 if self.bias is None else self.bias.view(-1, 1, 1)
            y = y + (y - bias) * (adapters @ self.gain)[:, :, None, None]
        low = F.conv2d(x, self.down, stride=self.stride, padding=self.padding).movedim(1, -1)      # [B, h', w', r]
        low = low * adapters[:, self.owner][:, None, None, :]
        return y + F.linear(low, self.up).movedim(-1, 1)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """nn.Conv2d's own hook: x [B, in, h, w] -> [B, out, h', w'].

        On the CPU a convolution begins by putting its weights in another order, at every call. At the inner levels,
        where they are larger than the picture, that takes longer than the sums: a matrix product of every pixel's
        3 x 3 surroundings reads the weights as they lie.
        """
        batch, channels, h, w = x.shape
        shape = self.kernel_size, self.stride, self.padding, self.dilation, self.groups
        if not (x.device.type == "cpu" and batch * h * w < channels and channels >= 512
                and shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
                and weight.is_contiguous(memory_format=torch.channels_last)):
            return super()._conv_forward(x, weight, bias)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))                   # [B, h + 2, w + 2, in]
        around = torch.cat([padded[:, i:i + h, j:j + w] for i in range(3) for j in range(3)], dim=-1)   # [B, h, w, 9 in]
        return F.linear(around, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)


# --- one LoRA, whatever file it came from ---------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class LoRALayer:
    """The change of one layer, W' = W + up @ down; with `dora_scale` the rows of that are then rescaled (DoRA)."""

    down: Tensor                        # [r, in] or [r, in, kh, kw]; alpha / rank is folded in
    up: Tensor                          # [out, r]
    dora_scale: Tensor | None = None    # [out] length of every row of W' (arXiv 2402.09353, eq. 5)

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(down, up, gain) with W' - W = up @ down + gain * W, gain [out] or None, for W = `weight`."""
        down, up = self.down.to(weight.device), self.up.to(weight.device)
        if self.dora_scale is None:
            return down, up, None
        lengths = (weight.flatten(1) + up @ down.flatten(1)).norm(dim=1)     # [out]
        scale = self.dora_scale.to(weight.device) / lengths.clamp_min(1e-38)
        return down, up * scale[:, None], scale - 1


@dataclass(frozen=True, eq=False)
class LoRA:
    path: Path
    name: str                           # the file's name without its ending
    format: str                         # "kohya LoRA", "peft DoRA", "kohya LoHa", ...
    sha256: str
    ranks: tuple[int, ...]              # the different ranks of its layers as factored here, ascending
    unet: dict[str, LoRALayer] = field(repr=False)          # by module name
    # by module name in the long form, text_model.encoder.layers.0.self_attn.q_proj
    text_encoder: dict[str, LoRALayer] = field(repr=False)
    metadata: dict[str, str]


@torch.inference_mode(False)            # wherever they are made, gradients will pass through the factors
def attach(unet: nn.Module, loras: Sequence[LoRA]) -> None:
    """Makes column a of `adapters` mean loras[a] in every layer; [] detaches. Move or cast the UNet before, not after."""
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, _Adapted)}
    if missing := {name for lora in loras for name in lora.unet} - set(layers):
        raise ValueError(f"this UNet has no layer {min(missing)}; the LoRA was read for another model")
    unet.attached = None                                                            # type: ignore[assignment]
    for name, module in layers.items():
        weight = module.weight.detach()                                             # type: ignore[attr-defined]
        module.attach({a: lora.unet[name].factors(weight) for a, lora in enumerate(loras) if name in lora.unet}, len(loras))
    unet.attached = tuple(loras)                                                    # type: ignore[assignment]


def merged_weights(module: nn.Module, loras: Sequence[tuple[LoRA, float]], which: str = "text_encoder") -> dict[str, Tensor]:
    """{parameter name: W + sum of strength * (W' - W)}, for torch.func.functional_call(module, ...)."""
    targets = layers_of(module, long=which == "text_encoder")
    merged: dict[str, Tensor] = {}
    for lora, strength in loras:
        for name, layer in getattr(lora, which).items():
            parameter, weight = targets[name]
            down, up, gain = layer.factors(weight)
            # float32, whatever the weight's precision: the factors are float32
            delta = up @ down.flatten(1) + (0 if gain is None else gain[:, None] * weight.flatten(1))
            merged[parameter] = merged.get(parameter, weight) + strength * delta.view_as(weight)
    return {parameter: value.to(module.get_parameter(parameter).dtype) for parameter, value in merged.items()}


def layers_of(module: nn.Module, long: bool = False) -> dict[str, tuple[str, Tensor]]:
    """{module name: (name of its weight, weight)}; `long` puts back the text_model. that transformers 5 leaves out."""
    return {f"text_model.{name.removeprefix('text_model.')}" if long else name: (f"{name}.weight", layer.weight.detach())
            for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
