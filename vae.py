"""The autoencoder of Stable Diffusion (AutoencoderKL), sized by the published vae/config.json.

    encode: picture [B, 3, H, W] in [-1, 1] -> mean and log-variance of the latents [B, 4, H/8, W/8]
    decode: latents -> picture

Latents here are in the autoencoder's own scale; the UNet's are these times `config.scaling_factor`.
Module names are those of the diffusers checkpoint. Shapes: B rows, C channels, h x w pixels of a level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VAEConfig:
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    sample_size: int = 512

    @classmethod
    def from_dict(cls, config: dict) -> VAEConfig:
        """Reads a published config.json; ValueError if it is another kind of autoencoder."""
        kind = config.get("_class_name", "AutoencoderKL")
        if kind != "AutoencoderKL":
            raise ValueError(f"this VAE is a {kind}; only AutoencoderKL of the SD 1.x family is supported")
        for key in ("down_block_types", "up_block_types"):
            for block in config.get(key, ()):
                if block not in ("DownEncoderBlock2D", "UpDecoderBlock2D"):
                    raise ValueError(f"this VAE has a block of type {block}; it is not of the SD 1.x family")
        for key, allowed in {"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True,
                             "shift_factor": None, "latents_mean": None, "latents_std": None}.items():
            if config.get(key, allowed) not in (allowed, None):
                raise ValueError(f"this VAE is not of the SD 1.x family: {key} is {config[key]!r}")
        values = {key: config[key] for key in cls.__dataclass_fields__ if config.get(key) is not None}
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    @property
    def factor(self) -> int:
        """Picture pixels per latent pixel, 8 for SD."""
        return 2 ** (len(self.block_out_channels) - 1)


def norm_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, bands: int = 1) -> Tensor:
    """conv(silu(norm(x))), 3x3: [B, C, h, w] -> [B, C', h, w].

    In several bands of rows, what lies between norm and conv exists a band at a time: equal to rounding.
    """
    if bands == 1:
        return conv(F.silu(norm(x), inplace=True))              # fresh memory costs time on a CPU
    assert norm.weight is not None and norm.bias is not None
    groups = x.unflatten(1, (norm.num_groups, -1)).unbind(1)                                # G of [B, C/G, h, w]
    # in float32 whatever the precision, as GroupNorm computes inside; a group at a time, as all would be a second picture
    variance, mean = (torch.stack(part, dim=1) for part in zip(*(
        torch.var_mean(group.to(torch.promote_types(x.dtype, torch.float32)), dim=(1, 2, 3), correction=0)
        for group in groups)))                                                              # [B, G]
    scale = (variance + norm.eps).rsqrt().repeat_interleave(x.shape[1] // norm.num_groups, dim=1) * norm.weight     # [B, C]
    shift = norm.bias - mean.repeat_interleave(x.shape[1] // norm.num_groups, dim=1) * scale
    return conv_in_bands(conv, x, bands, lambda band: F.silu(
        band * scale[:, :, None, None] + shift[:, :, None, None]).to(x.dtype))


def conv_in_bands(conv: nn.Conv2d, x: Tensor, bands: int, before: Callable[[Tensor], Tensor], factor: int = 1) -> Tensor:
    """conv(before(x)) band by band, for a 3x3 convolution and a `before` that works on single rows and makes `factor`
    rows of each: [B, C, h, w] -> [B, C', factor * h, factor * w]."""
    height, width = x.shape[2:]
    out = x.new_empty(len(x), conv.out_channels, height * factor, width * factor)
    bands = min(bands, height)
    edges = [height * n // bands for n in range(bands + 1)]
    for top, end in zip(edges, edges[1:]):
        above, below = min(top, 1), min(height - end, 1)                            # rows that the 3x3 sees beyond the band
        y = before(x[:, :, top - above:end + below])
        y = y[:, :, above * (factor - 1):y.shape[2] - below * (factor - 1)]         # one row of them is enough
        y = F.pad(y, (0, 0, 1 - above, 1 - below))
        out[:, :, top * factor:end * factor] = F.conv2d(y, conv.weight, conv.bias, padding=(0, 1))
    return out


class ResnetBlock2D(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, bands: int = 1) -> Tensor:
        """[B, C_in, h, w] -> [B, C_out, h, w]."""
        y = norm_conv(self.norm1, self.conv1, x, bands)
        y = norm_conv(self.norm2, self.conv2, y, bands)
        return y.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Single-head self-attention over all pixels, in the middle of encoder and decoder."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)                      # [B, N, C]
        query, key, value = (layer(tokens)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        out = F.scaled_dot_product_attention(query, key, value)[:, 0]               # [B, N, C]
        return x + self.to_out[0](out).transpose(1, 2).unflatten(2, x.shape[2:])


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock2D(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x: Tensor, bands: int = 1) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x, bands)), bands)


class Downsample2D(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, bands: int = 1) -> Tensor:
        """[B, C, h, w] -> [B, C, h/2, w/2]; padded on the right and below alone, as it was trained."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, bands: int = 1) -> Tensor:
        """[B, C, h, w] -> [B, C, 2h, 2w]."""
        def double(rows: Tensor) -> Tensor:
            return F.interpolate(rows, scale_factor=2.0, mode="nearest")
        return self.conv(double(x)) if bands == 1 else conv_in_bands(self.conv, x, bands, double, factor=2)


class Block(nn.Module):
    """One level: resnets, then a change of size (none on the level at the end)."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, down: bool = False, up: bool = False):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock2D(inputs if n == 0 else outputs, outputs, groups) for n in range(layers)])
        self.downsamplers = nn.ModuleList([Downsample2D(outputs)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample2D(outputs)] if up else [])

    def forward(self, x: Tensor, bands: int = 1) -> Tensor:
        """[B, C_in, h, w] -> [B, C_out, h', w']."""
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x, bands)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups, last = config.block_out_channels, config.norm_num_groups, len(config.block_out_channels) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [Block(widths[max(level - 1, 0)], width, config.layers_per_block, groups, down=level < last)
             for level, width in enumerate(widths)])
        self.mid_block = Middle(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 8, H/8, W/8]: mean and log-variance before quant_conv."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups, last = config.block_out_channels[::-1], config.norm_num_groups, len(config.block_out_channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            [Block(widths[max(level - 1, 0)], width, config.layers_per_block + 1, groups, up=level < last)
             for level, width in enumerate(widths)])
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, bands: int = 1) -> Tensor:
        """[B, 4, h, w] -> [B, 3, 8h, 8w]."""
        x = self.mid_block(self.conv_in(x), bands)
        for block in self.up_blocks:
            x = block(x, bands)
        return norm_conv(self.conv_norm_out, self.conv_out, x, bands)


class VAE(nn.Module):
    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """picture [B, 3, H, W] in [-1, 1] -> (mean [B, 4, H/8, W/8], log-variance [B, 4, H/8, W/8])."""
        mean, logvar = self.quant_conv(self.encoder(picture)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents: Tensor, bands: int = 1) -> Tensor:
        """latents [B, 4, h, w] (already divided by the scaling factor) -> picture [B, 3, 8h, 8w], about [-1, 1].

        More `bands` need less memory, for the same picture to rounding.
        """
        return self.decoder(self.post_quant_conv(latents), bands)

    def forward(self, picture: Tensor) -> Tensor:
        """picture -> its reconstruction from the mean, same shape."""
        return self.decode(self.encode(picture)[0])
