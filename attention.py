"""Attention of the Stable Diffusion 1.x UNet. Module names are those of the diffusers checkpoint.

A layer whose map is asked for computes softmax(Q K^T / sqrt(d)) in the open and returns it; every other layer
uses PyTorch's fused kernel. Maps are return values: there is no hook and no store (CLoRA, section 3.1).

Shapes: B rows, N image tokens (h * w), T text tokens (77), C channels, D text width, H heads, A adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import LoRAConv2d, LoRALinear


@dataclass(frozen=True)
class TextKeys:
    """Keys and values of R rows of text in every cross-attention layer: they do not change from step to step.

    Made by UNet.text_keys and passed to the UNet in place of `context`.
    """

    layers: dict[str, list[tuple[Tensor, Tensor]]]      # layer name: for each of its blocks, key and value [R, T, C]

    def __getitem__(self, rows: Tensor) -> TextKeys:
        """The rows of an index [B], in its order."""
        return TextKeys({name: [(key[rows], value[rows]) for key, value in blocks]
                         for name, blocks in self.layers.items()})


def attention_probs(query: Tensor, key: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)), the softmax in float32 at least: query [B, H, N, d], key [B, H, T, d] -> [B, H, N, T]."""
    # scaled before the product, which could be more than float16 holds
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)              # [B, H, N, T]
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


class Attention(nn.Module):
    """Multi-head attention; self-attention when no `text` is given."""

    def __init__(self, channels: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = LoRALinear(channels, channels, bias=False)
        self.to_k = LoRALinear(context_dim, channels, bias=False)
        self.to_v = LoRALinear(context_dim, channels, bias=False)
        # A list because the checkpoint says to_out.0; its entry 1 was a dropout without weights.
        self.to_out = nn.ModuleList([LoRALinear(channels, channels)])

    def project(self, context: Tensor, adapters: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, T, D] -> key and value [B, T, C]."""
        return self.to_k(context, adapters), self.to_v(context, adapters)

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor] | None = None, adapters: Tensor | None = None,
                want_map: bool = False, only_map: bool = False) -> tuple[Tensor, Tensor | None]:
        """x [B, N, C], text: key and value [B, T, C] -> (out [B, N, C], probs [B, H, N, T] or None)."""
        def split(y: Tensor) -> Tensor:                                             # [B, *, C] -> [B, H, *, d]
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query = split(self.to_q(x, adapters))                                       # [B, H, N, d]
        key, value = map(split, self.project(x, adapters) if text is None else text)    # [B, H, T, d] each
        probs = attention_probs(query, key) if want_map else None                   # [B, H, N, T]
        if only_map:
            return x, probs
        if probs is None:
            out = F.scaled_dot_product_attention(query, key, value)
        else:
            out = probs.to(value.dtype) @ value                                     # [B, H, N, d]
        out = out.transpose(1, 2).flatten(-2)                                       # [B, N, C]
        return self.to_out[0](out, adapters), probs


class GEGLU(nn.Module):
    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = LoRALinear(channels, inner * 2)

    def forward(self, x: Tensor, adapters: Tensor | None = None) -> Tensor:
        """x [B, N, C] -> [B, N, inner]."""
        x, gate = self.proj(x, adapters).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        # Identity keeps the checkpoint's numbering: net.1 was a dropout.
        self.net = nn.ModuleList([GEGLU(channels, channels * 4), nn.Identity(), LoRALinear(channels * 4, channels)])

    def forward(self, x: Tensor, adapters: Tensor | None = None) -> Tensor:
        """x [B, N, C] -> [B, N, C]."""
        return self.net[2](self.net[0](x, adapters), adapters)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention with the text, feed-forward; each after a norm and with a skip."""

    def __init__(self, channels: int, context_dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_dim, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor], adapters: Tensor | None = None,
                want_map: bool = False, only_map: bool = False) -> tuple[Tensor, Tensor | None]:
        """x [B, N, C], text: key and value [B, T, C] -> (x [B, N, C], cross-attention probs [B, H, N, T] or None)."""
        x = x + self.attn1(self.norm1(x), None, adapters)[0]
        out, probs = self.attn2(self.norm2(x), text, adapters, want_map, only_map)
        if only_map:
            return x, probs
        x = x + out
        return x + self.ff(self.norm3(x), adapters), probs


class Transformer2DModel(nn.Module):
    """Pixels to tokens, transformer blocks, tokens back to pixels, and a skip around it all."""

    def __init__(self, channels: int, context_dim: int, heads: int, depth: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = LoRAConv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [BasicTransformerBlock(channels, context_dim, heads) for _ in range(depth)])
        self.proj_out = LoRAConv2d(channels, channels, 1)

    def text_keys(self, context: Tensor, adapters: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """[B, T, D] -> for each block, key and value [B, T, C] of its cross-attention."""
        return [block.attn2.project(context, adapters) for block in self.transformer_blocks]

    def forward(self, x: Tensor, text: list[tuple[Tensor, Tensor]], adapters: Tensor | None = None,
                want_map: bool = False, only_map: bool = False) -> tuple[Tensor, Tensor | None]:
        """x [B, C, h, w], text: of text_keys -> (x [B, C, h, w], probs of the last block [B, H, h*w, T] or None).

        `only_map` stops as soon as the map exists: what comes back as x is then not an output.
        """
        probs = None
        tokens = self.proj_in(self.norm(x), adapters).flatten(2).transpose(1, 2)    # [B, N, C]
        for block, keys in zip(self.transformer_blocks, text):
            last = block is self.transformer_blocks[-1]
            tokens, probs = block(tokens, keys, adapters, want_map and last, only_map and last)
        if only_map:
            return x, probs
        out = tokens.transpose(1, 2).unflatten(2, x.shape[2:])                      # [B, C, h, w]
        return x + self.proj_out(out, adapters), probs
