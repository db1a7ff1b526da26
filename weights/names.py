"""The one place that renames: module names of this project (those of diffusers) to the original LDM layout.

Single-file checkpoints and kohya LoRAs made with LDM block names are read through these two functions.
"""

from __future__ import annotations

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET_ENDS = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def ldm_unet_name(name: str, layers: int, attends: tuple[bool, ...]) -> str:
    """"down_blocks.0.resnets.1.conv1" -> "input_blocks.2.0.in_layers.2" and so on for every module of the UNet.

    layers: layers_per_block; attends: whether up block n has attentions. The name may go on below a module (".weight").
    """
    head, _, rest = name.partition(".")
    if head in UNET_ENDS:
        return _join(UNET_ENDS[head], rest)
    if head == "time_embedding":
        return name.replace("time_embedding.linear_1", "time_embed.0").replace("time_embedding.linear_2", "time_embed.2")
    if head == "mid_block":
        kind, n, below = rest.split(".", 2)
        return _join(f"middle_block.{1 if kind == 'attentions' else 2 * int(n)}", _resnet(kind, below))
    block, kind, n, below = rest.split(".", 3)
    level, index = int(block), int(n)
    if head == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (level + 1)}.0.{below.replace('conv', 'op', 1)}"
        return _join(f"input_blocks.{(layers + 1) * level + index + 1}.{int(kind == 'attentions')}", _resnet(kind, below))
    if kind == "upsamplers":
        return f"output_blocks.{(layers + 1) * level + layers}.{1 + attends[level]}.{below}"
    return _join(f"output_blocks.{(layers + 1) * level + index}.{int(kind == 'attentions')}", _resnet(kind, below))


def ldm_vae_name(name: str, levels: int) -> str:
    """"decoder.up_blocks.0.resnets.1.conv1" -> "decoder.up.3.block.1.conv1" and so on for every module of the VAE."""
    half, _, rest = name.partition(".")
    if half not in ("encoder", "decoder"):
        return name
    head, _, below = rest.partition(".")
    if head == "conv_norm_out":
        return f"{half}.norm_out.{below}"
    if head == "mid_block":
        kind, n, below = below.split(".", 2)
        if kind == "resnets":
            return f"{half}.mid.block_{int(n) + 1}.{below}"
        module, _, leaf = below.rpartition(".")
        return f"{half}.mid.attn_1.{VAE_ATTENTION[module]}.{leaf}"
    if head in ("down_blocks", "up_blocks"):
        level, kind, n, below = below.split(".", 3)
        below = below.replace("conv_shortcut", "nin_shortcut")
        where = f"down.{level}" if head == "down_blocks" else f"up.{levels - 1 - int(level)}"
        middle = {"resnets": f"block.{n}", "downsamplers": "downsample", "upsamplers": "upsample"}[kind]
        return f"{half}.{where}.{middle}.{below}"
    return name


def _resnet(kind: str, below: str) -> str:
    if kind != "resnets":
        return below
    module, _, leaf = below.partition(".")
    return _join(RESNET[module], leaf)


def _join(name: str, rest: str) -> str:
    return f"{name}.{rest}" if rest else name
