"""The UNet of Stable Diffusion 1.x, sized by the published unet/config.json; weights load with strict=True.

    down:  latents -> conv_in -> down_blocks (each halves h, w except the last) -> mid_block
    up:    the same way back, every resnet reading one skip from the way down -> conv_out -> noise

Cross-attention maps are returned by name, for the layers that the caller lists, and the forward can stop as soon
as the last of them exists: CLoRA's loss (section 3.2 of the paper) needs no more than that.

Shapes: B rows, C channels, h x w latent pixels, T text tokens (77), D text width, E time embedding, A adapters.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import TextKeys, Transformer2DModel
from lora import LoRAConv2d, LoRALinear


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    cross_attention_dim: int = 768
    # diffusers' name for the number of heads, kept for old checkpoints; one number or one per level
    attention_head_dim: int | tuple[int, ...] = 8
    transformer_layers_per_block: int = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 64
    mid_block: bool = True              # False in small models: tiny-sd, BK-SDM

    # Options of the diffusers class that SD 1.x leaves at one value: {key: (allowed values, what else it would be)}
    FIXED = {
        "use_linear_projection": ((False,), "SD 2.x (linear projections)"),
        "addition_embed_type": ((None,), "SDXL"),
        "class_embed_type": ((None,), "an upscaler or another class-conditioned model"),
        "encoder_hid_dim": ((None,), "Kandinsky or IP-Adapter"),
        "time_cond_proj_dim": ((None,), "a guidance-distilled model (LCM)"),
        "num_class_embeds": ((None,), "a class-conditioned model"),
        "dual_cross_attention": ((False,), "Versatile Diffusion"),
        "only_cross_attention": ((False,), "the x4 upscaler"),
        "act_fn": (("silu", "swish"), "another family"),
        "resnet_time_scale_shift": (("default",), "another family"),
        "mid_block_type": (("UNetMidBlock2DCrossAttn", None), "another family"),
        "attention_type": (("default",), "GLIGEN"),
        "time_embedding_act_fn": ((None,), "another family"), "timestep_post_act": ((None,), "another family"),
        "conv_in_kernel": ((3,), "another family"), "conv_out_kernel": ((3,), "another family"),
        "downsample_padding": ((1,), "another family"), "mid_block_scale_factor": ((1,), "another family"),
        "flip_sin_to_cos": ((True,), "another family"), "freq_shift": ((0,), "another family"),
        "center_input_sample": ((False,), "another family"), "num_attention_heads": ((None,), "another family"),
        "time_embedding_type": (("positional",), "another family"),
    }

    @classmethod
    def from_dict(cls, config: dict) -> UNetConfig:
        """Reads a published config.json; ValueError names the model that it looks like if it is not SD 1.x."""
        for key, (allowed, family) in cls.FIXED.items():
            if config.get(key, allowed[0]) not in allowed:
                raise ValueError(f"this UNet is not of the SD 1.x family: {key} is {config[key]!r}; "
                                 f"it looks like {family}")
        known = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
        for block in (*config.get("down_block_types", ()), *config.get("up_block_types", ())):
            if block not in known:
                raise ValueError(f"this UNet is not of the SD 1.x family: it has a block of type {block}")
        values = {key: config[key] for key in cls.__dataclass_fields__ if config.get(key) is not None}
        values["mid_block"] = "mid_block_type" not in config or config["mid_block_type"] is not None    # null: none
        early = re.match(r"0\.[0-8]\.", str(config.get("_diffusers_version")))
        if early and isinstance(values.get("sample_size"), int) and values["sample_size"] < 64:
            values["sample_size"] = 64                      # 32 meant nothing then; diffusers' pipeline corrects it likewise
        self = cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
        if self.in_channels != self.out_channels:
            raise ValueError(f"this UNet takes {self.in_channels} channels and returns {self.out_channels}; "
                             "it looks like an inpainting, depth or instruct-pix2pix model")
        if not isinstance(self.transformer_layers_per_block, int):
            raise ValueError("this UNet is not of the SD 1.x family: transformer_layers_per_block is a list; "
                             "it looks like SDXL")
        return self

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads of each level."""
        dim = self.attention_head_dim
        return (dim,) * len(self.block_out_channels) if isinstance(dim, int) else dim


def timestep_embedding(timestep: Tensor, channels: int) -> Tensor:
    """Sinusoids of the timestep: [B] -> [B, channels] in float32, cosines first."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timestep.device, dtype=torch.float32) / half)
    angles = timestep.float()[:, None] * frequencies                                # [B, half]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    def __init__(self, channels: int, embed: int):
        super().__init__()
        self.linear_1 = LoRALinear(channels, embed)
        self.linear_2 = LoRALinear(embed, embed)

    def forward(self, x: Tensor, adapters: Tensor | None = None) -> Tensor:
        """x [B, C] -> [B, E]."""
        return self.linear_2(F.silu(self.linear_1(x, adapters)), adapters)


class ResnetBlock2D(nn.Module):
    def __init__(self, inputs: int, outputs: int, embed: int, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=eps)
        self.conv1 = LoRAConv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = LoRALinear(embed, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=eps)
        self.conv2 = LoRAConv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = LoRAConv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, embed: Tensor, adapters: Tensor | None = None) -> Tensor:
        """x [B, C_in, h, w], embed [B, E] -> [B, C_out, h, w]."""
        y = self.conv1(F.silu(self.norm1(x)), adapters)
        y = y + self.time_emb_proj(F.silu(embed), adapters)[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)), adapters)
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x, adapters))


class Downsample2D(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = LoRAConv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, adapters: Tensor | None = None) -> Tensor:
        """[B, C, h, w] -> [B, C, ceil(h/2), ceil(w/2)]."""
        return self.conv(x, adapters)


class Upsample2D(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = LoRAConv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size, adapters: Tensor | None = None) -> Tensor:
        """[B, C, h, w] -> [B, C, *size]: the size of the skip it will meet, so that odd sizes fit again."""
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"), adapters)


class Block(nn.Module):
    """One level, or the middle: the layers, under the checkpoint's names. UNet.forward walks them."""

    def __init__(self, config: UNetConfig, resnets: list[tuple[int, int]], attentions: int, heads: int,
                 down: bool = False, up: bool = False):
        super().__init__()
        width, groups = resnets[-1][1], config.norm_num_groups
        self.resnets = nn.ModuleList(
            [ResnetBlock2D(i, o, config.block_out_channels[0] * 4, groups, config.norm_eps) for i, o in resnets])
        self.attentions = nn.ModuleList(
            [Transformer2DModel(width, config.cross_attention_dim, heads, config.transformer_layers_per_block, groups)
             for _ in range(attentions)])
        self.downsamplers = nn.ModuleList([Downsample2D(width)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample2D(width)] if up else [])


class UNet(nn.Module):
    attached: tuple | None = ()         # the LoRAs that the columns of `adapters` stand for (lora.attach)

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        widths, heads, layers = config.block_out_channels, config.heads, config.layers_per_block
        last = len(widths) - 1
        self.conv_in = LoRAConv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], widths[0] * 4)

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]                                     # channels of each skip, in the order it is made
        for level, (kind, width) in enumerate(zip(config.down_block_types, widths)):
            resnets = [(skips[-1] if n == 0 else width, width) for n in range(layers)]
            attentions = layers if kind == "CrossAttnDownBlock2D" else 0
            self.down_blocks.append(Block(config, resnets, attentions, heads[level], down=level < last))
            skips += [width] * (layers + (level < last))

        self.mid_block = Block(config, [(widths[-1], widths[-1])] * 2, 1, heads[-1]) if config.mid_block else None

        self.up_blocks = nn.ModuleList()
        channels = widths[-1]
        for level, (kind, width) in enumerate(zip(config.up_block_types, reversed(widths))):
            resnets = [((channels if n == 0 else width) + skips.pop(), width) for n in range(layers + 1)]
            attentions = layers + 1 if kind == "CrossAttnUpBlock2D" else 0
            self.up_blocks.append(Block(config, resnets, attentions, heads[last - level], up=level < last))
            channels = width

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = LoRAConv2d(widths[0], config.out_channels, 3, padding=1)

    def map_layers(self, level: int = 2) -> tuple[str, ...]:
        """Names of the cross-attention layers whose maps are [h / 2^level, w / 2^level], in the order they run.

        Level 2 of SD 1.5: down_blocks.2.attentions.0-1 and up_blocks.1.attentions.0-2 (CLoRA, section 3.1).
        The middle block, of the last level's size, is never among them. () where a level has none.
        """
        if not 0 <= level < len(self.down_blocks):
            return ()
        down, up = f"down_blocks.{level}", f"up_blocks.{len(self.up_blocks) - 1 - level}"
        return tuple(f"{name}.attentions.{n}" for name in (down, up)
                     for n in range(len(self.get_submodule(name).attentions)))      # type: ignore[arg-type]

    def text_keys(self, context: Tensor, adapters: Tensor | None = None) -> TextKeys:
        """context [B, T, D], adapters [B, A] -> what forward takes in place of the context at every step of an image."""
        return TextKeys({name: module.text_keys(context, adapters) for name, module in self.named_modules()
                         if isinstance(module, Transformer2DModel)})

    def forward(self, latents: Tensor, timestep: Tensor | int, context: Tensor | TextKeys,
                adapters: Tensor | None = None, maps_at: tuple[str, ...] = (), stop_after_maps: bool = False,
                checkpointing: bool = False) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Predicts the noise, and returns the cross-attention maps of the layers named in `maps_at`.

        latents [B, 4, h, w], timestep int or [B], context [B, T, D] or of text_keys, adapters [B, A] strengths or None
        -> (noise [B, 4, h, w], {layer name: probs [B, H, N, T] in float32, N = h' * w' of that layer}).
        With `stop_after_maps` nothing after the last wanted map is computed and the noise is None. With `checkpointing`
        a backward pass computes resnets and transformers again instead of keeping what it needs (arXiv 1604.06174).
        Raises ValueError for a name in `maps_at` that is no cross-attention layer.
        """
        maps: dict[str, Tensor] = {}

        def call(module: nn.Module, *inputs):
            if not checkpointing:
                return module(*inputs)
            return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)       # nothing is random

        def attend(name: str, attention: Transformer2DModel, x: Tensor) -> Tensor:
            wanted = name in maps_at
            only_map = stop_after_maps and wanted and len(maps) == len({*maps_at}) - 1
            keys = context.layers[name] if isinstance(context, TextKeys) else attention.text_keys(context, adapters)
            x, probs = call(attention, x, keys, adapters, wanted, only_map)
            if wanted:
                maps[name] = probs
            return x

        def finished() -> bool:
            return stop_after_maps and len(maps) == len({*maps_at})

        # 1. time
        device = latents.device
        timestep = torch.as_tensor(timestep).to(device, non_blocking=device.type != "mps").expand(len(latents))     # [B]
        embed = timestep_embedding(timestep, self.config.block_out_channels[0]).to(latents.dtype)
        embed = self.time_embedding(embed, adapters)                                            # [B, E]

        # 2. down
        x = self.conv_in(latents, adapters)                                                     # [B, C0, h, w]
        skips = [x]
        for level, block in enumerate(self.down_blocks):
            for n, resnet in enumerate(block.resnets):
                x = call(resnet, x, embed, adapters)                                            # [B, C, h, w]
                if block.attentions:
                    x = attend(f"down_blocks.{level}.attentions.{n}", block.attentions[n], x)
                    if finished():
                        return None, maps
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x, adapters)                                                     # [B, C, h/2, w/2]
                skips.append(x)

        # 3. middle
        if self.mid_block is not None:
            x = call(self.mid_block.resnets[0], x, embed, adapters)
            x = attend("mid_block.attentions.0", self.mid_block.attentions[0], x)
            if finished():
                return None, maps
            x = call(self.mid_block.resnets[1], x, embed, adapters)

        # 4. up
        for level, block in enumerate(self.up_blocks):
            for n, resnet in enumerate(block.resnets):
                x = call(resnet, torch.cat([x, skips.pop()], dim=1), embed, adapters)
                if block.attentions:
                    x = attend(f"up_blocks.{level}.attentions.{n}", block.attentions[n], x)
                    if finished():
                        return None, maps
            for upsample in block.upsamplers:
                x = upsample(x, skips[-1].shape[2:], adapters)                                  # [B, C, 2h, 2w]

        # 5. out
        if unknown := set(maps_at) - set(maps):
            raise ValueError(f"no cross-attention layer is called {', '.join(sorted(unknown))}")
        return self.conv_out(F.silu(self.conv_norm_out(x)), adapters), maps
