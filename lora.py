"""LoRA: layers that give every row of a batch its own adapters, and a reader for the files that people have.

One forward serves all variants of CLoRA. `adapters` [B, A] holds the strength of adapter a on row b:

    row of zeros              the base model, untouched to the last bit
    one-hot row               one LoRA at its user weight
    several non-zero entries  LoRAs stacked on one row (subject + style), or merged (1/K each)

    y = W x + sum_a adapters[b, a] * (up_a @ down_a) x          (LoRA, arXiv 2106.09685, eq. 3)

The layers subclass nn.Linear and nn.Conv2d, so a checkpoint's keys stay as published: factors are plain
attributes, not parameters or buffers, and never enter the state dict.

Shapes: B rows, A adapters, r rank (summed over the adapters of one layer), N tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Adapted:
    """What LoRALinear and LoRAConv2d share: the factors of all adapters of this layer, side by side."""

    down: Tensor | None = None      # [r, in] or [r, in, kh, kw]; the ranks of all adapters stacked
    up: Tensor | None = None        # [out, r]; alpha / rank is folded in
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
        if adapters is None or self.down is None:
            return super().forward(x)
        middle = (1,) * (x.dim() - 2)
        y = super().forward(x)                                                      # [B, ..., out]
        if self.gain is not None:
            bias = 0 if self.bias is None else self.bias
            y = y + (y - bias) * (adapters @ self.gain).view(len(x), *middle, -1)
        strength = adapters[:, self.owner].view(len(x), *middle, -1)                # [B, ..., r]
        return y + F.linear(F.linear(x, self.down) * strength, self.up)


class LoRAConv2d(_Adapted, nn.Conv2d):
    def forward(self, x: Tensor, adapters: Tensor | None = None) -> Tensor:         # type: ignore[override]
        """x [B, in, h, w], adapters [B, A] strengths or None -> [B, out, h', w']."""
        if adapters is None or self.down is None:
            return super().forward(x)
        y = super().forward(x)                                                      # [B, out, h', w']
        if self.gain is not None:
            bias = 0 if self.bias is None else self.bias.view(-1, 1, 1)
            y = y + (y - bias) * (adapters @ self.gain)[:, :, None, None]
        strength = adapters[:, self.owner][:, :, None, None]                        # [B, r, 1, 1]
        low = F.conv2d(x, self.down, stride=self.stride, padding=self.padding) * strength   # [B, r, h', w']
        return y + F.conv2d(low, self.up[:, :, None, None])
