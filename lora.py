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

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
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


# --- files ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class LoRALayer:
    """What a file holds for one layer, whatever its format: W' = W + up @ down, alpha / rank folded in."""

    down: Tensor                        # [r, in] or [r, in, kh, kw]
    up: Tensor                          # [out, r]
    dora_scale: Tensor | None = None    # [out] DoRA's magnitudes (arXiv 2402.09353, eq. 5)


@dataclass(frozen=True)
class LoRA:
    path: Path
    sha256: str
    format: str
    unet: dict[str, LoRALayer]          # by module name
    text_encoder: dict[str, LoRALayer]  # by module name, text_model.encoder.layers...
    metadata: dict[str, str]

    @property
    def name(self) -> str:
        return self.path.stem


# what follows the layer's name in a key: what it is. The first that fits counts.
ROLES = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid", ".alpha": "alpha",
    ".dora_scale": "dora", ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up", ".lora_magnitude_vector.weight": "dora", ".lora_magnitude_vector": "dora",
    ".lora.down.weight": "down", ".lora.up.weight": "up", "_lora.down.weight": "down", "_lora.up.weight": "up",
    "_lora.alpha": "alpha", ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    **{f".{name}": name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w1_a",
                                     "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
}
FORMATS = {"lora_unet_": "kohya", "lora_te": "kohya", "unet.": "diffusers", "text_encoder.": "diffusers"}


def read_lora(path: str | Path, unet: nn.Module, text_encoder: nn.Module | None = None) -> LoRA:
    """Reads a LoRA file of any published format: kohya-ss, diffusers' attention processors, PEFT, LyCORIS (LoHa, LoKr).

    ValueError, one line that names the file: no such file, not a LoRA, damaged, for another model, keys that fit no
    layer, shapes that do not fit, numbers that are not finite.
    """
    path = Path(path)
    state, metadata = read_tensors(path)
    if model := _looks_like(state):
        raise ValueError(f"{path} looks like a LoRA for {model}; this model is of the SD 1.x family")
    known = _aliases(unet, text_encoder)
    groups: dict[tuple[str, str], dict[str, Tensor]] = {}
    strangers = []
    for key, tensor in state.items():
        suffix = next((suffix for suffix in ROLES if key.endswith(suffix)), None)
        target = known.get(key.removesuffix(suffix)) if suffix else None
        if suffix is None or target is None:
            strangers.append(key)
        else:
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{path}: {key} holds NaN or infinite numbers; the file is damaged")
            groups.setdefault(target, {})[ROLES[suffix]] = tensor.float()
    if len(strangers) == len(state):
        raise ValueError(f"{path} holds no LoRA for this model: none of its {len(state)} keys fits (the first is "
                         f"{min(state, default='missing')})")
    if strangers:
        raise ValueError(f"{path}: {len(strangers)} of {len(state)} keys fit no layer of this model: "
                         f"{', '.join(sorted(strangers)[:3])}{' ...' if len(strangers) > 3 else ''}")
    halves: dict[str, dict[str, LoRALayer]] = {"unet": {}, "text_encoder": {}}
    modules = {"unet": dict(unet.named_modules()), "text_encoder": _text_modules(text_encoder)}
    for (half, name), parts in groups.items():
        alpha = parts["alpha"].item() if "alpha" in parts else _alpha_beside(path, metadata, half, name)
        try:
            halves[half][name] = _to_layer(parts, modules[half][name].weight, alpha)
        except (KeyError, RuntimeError, ValueError) as error:
            reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}: {half}.{name}: {reason}") from None
    first = next(iter(state))
    kind = next((kind for prefix, kind in FORMATS.items() if first.startswith(prefix)), "peft")
    return LoRA(path, _sha256(path), kind, halves["unet"], halves["text_encoder"], metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A .safetensors file, or a pickle of nothing but tensors -> (tensors by key, metadata)."""
    if not path.is_file():
        raise ValueError(f"{path}: {'is a folder, not a LoRA file' if path.is_dir() else 'there is no such file'}")
    with open(path, "rb") as file:
        magic = file.read(2)
    if magic in (b"PK", b"\x80\x02"):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=magic == b"PK")
        except Exception as error:      # a damaged pickle can raise anything at all
            raise ValueError(f"{path} is a pickle that would run code or is damaged, and is not loaded; convert it to "
                             f"safetensors ({type(error).__name__})") from None
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"{path} holds no plain table of tensors; convert it to safetensors")
        return state, {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        empty = path.stat().st_size == 0
        raise ValueError(f"{path} is {'empty' if empty else f'damaged or not a safetensors file ({error})'}") from None


def _looks_like(state: dict[str, Tensor]) -> str:
    """The other family that the keys or widths point to, or ""."""
    for key, tensor in state.items():
        if re.search(r"lora_te2_|text_encoder_2\.|transformer_blocks[_.][1-9]\d*[_.]attn", key):
            return "SDXL"
        if re.search(r"double_blocks|single_blocks|single_transformer_blocks|^transformer\.|lora_transformer_", key):
            return "Flux, SD 3 or another transformer"
        if re.search(r"attn2[._](processor\.)?to_k", key) and re.search(r"down\.weight|lora_A", key) and tensor.dim() > 1:
            if family := {2048: "SDXL", 1024: "SD 2.x"}.get(tensor.shape[1]):
                return family
    return ""


def _text_modules(text_encoder: nn.Module | None) -> dict[str, nn.Module]:
    """Modules of a CLIPTextModel by long name: transformers 5 dropped the "text_model." that files still carry."""
    if text_encoder is None:
        return {}
    return {name if name.startswith("text_model.") else f"text_model.{name}": module
            for name, module in text_encoder.named_modules()}


def _aliases(unet: nn.Module, text_encoder: nn.Module | None) -> dict[str, tuple[str, str]]:
    """Every name that some format gives a layer -> ("unet" or "text_encoder", our module name)."""
    from weights.names import ldm_unet_name  # a cycle at import time: weights needs the UNet, which needs LoRA
    table: dict[str, tuple[str, str]] = {}
    attends = tuple(bool(block.attentions) for block in unet.up_blocks)             # type: ignore[union-attr]
    for name, module in unet.named_modules():
        if isinstance(module, _Adapted):
            ldm = ldm_unet_name(name, unet.config.layers_per_block, attends)        # type: ignore[union-attr, arg-type]
            spellings = [name, f"unet.{name}", f"base_model.model.{name}", f"unet.base_model.model.{name}",
                         f"lora_unet_{name.replace('.', '_')}", f"lora_unet_{ldm.replace('.', '_')}"]
            block, _, leaf = name.partition(".attn")
            if leaf:                                # attention processors: attn1.processor.to_q_lora
                old = f"{block}.attn{leaf[0]}.processor.{leaf[2:].removesuffix('.0')}"
                spellings += [old, f"unet.{old}"]
            table |= dict.fromkeys(spellings, ("unet", name))
    for name, module in _text_modules(text_encoder).items():
        if isinstance(module, nn.Linear):
            flat = name.replace(".", "_")
            spellings = [name, f"text_encoder.{name}", f"base_model.model.{name}", f"text_encoder.base_model.model.{name}",
                         f"lora_te_{flat}", f"lora_te1_{flat}"]
            table |= dict.fromkeys(spellings, ("text_encoder", name))
    return table


def _alpha_beside(path: Path, metadata: dict[str, str], half: str, name: str) -> float | None:
    """PEFT keeps alpha out of the tensors: in diffusers' metadata, or in adapter_config.json beside the file."""
    if "lora_adapter_metadata" in metadata:
        config = {key.removeprefix(f"{half}."): value for key, value in json.loads(metadata["lora_adapter_metadata"]).items()
                  if key.startswith(f"{half}.")}
    elif path.name.startswith("adapter_model.") and (beside := path.with_name("adapter_config.json")).is_file():
        config = json.loads(beside.read_text())
    else:
        return None
    patterns = config.get("alpha_pattern") or {}
    alpha = next((value for pattern, value in patterns.items() if re.search(rf"(^|\.){pattern}$", name)),
                 config.get("lora_alpha"))
    if alpha is not None and config.get("use_rslora"):
        raise ValueError(f"{path}: rank-stabilised LoRA (use_rslora) is not supported")
    return alpha


def _to_layer(parts: dict[str, Tensor], weight: Tensor, alpha: float | None) -> LoRALayer:
    """Any kind of factors -> (down, up) for a layer with this weight [out, in(, kh, kw)]."""
    if "hada_w1_a" in parts:            # LoHa (arXiv 2108.06098): the product of two products, exactly of rank r * r
        a, b, c, d = (parts[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        rank = b.shape[0]
        up = (a[:, :, None] * c[:, None, :]).flatten(1)                             # [out, r * r]
        down = (b[:, None] * d[None, :]).flatten(0, 1)                              # [r * r, in * k]
    elif "lokr_w1" in parts or "lokr_w1_a" in parts:        # LoKr: kron(A1 B1, A2 B2) = kron(A1, A2) kron(B1, B2)
        pairs, rank = [], None
        for name in ("lokr_w1", "lokr_w2"):
            if name in parts:
                full = parts[name].flatten(1)
                wide = full.shape[0] < full.shape[1]
                pairs.append((torch.eye(len(full)), full) if wide else (full, torch.eye(full.shape[1])))
            else:
                pairs.append((parts[f"{name}_a"], parts[f"{name}_b"].flatten(1)))
                rank = parts[f"{name}_b"].shape[0]
        (a1, b1), (a2, b2) = pairs
        up, down = torch.kron(a1, a2), torch.kron(b1, b2)
        rank, alpha = (rank, alpha) if rank else (1, 1.0)   # full factors are not scaled
    else:
        down, up = parts["down"], parts["up"].flatten(1)
        rank = down.shape[0]
        if "mid" in parts:              # LoCon in Tucker form: 1x1 down, kxk core, 1x1 up
            down = torch.einsum("mnhw,ni->mihw", parts["mid"], down.flatten(1))
    scale = 1.0 if alpha is None else alpha / rank
    wanted = (len(down), *weight.shape[1:])
    if down.numel() != torch.Size(wanted).numel() or up.shape != (weight.shape[0], len(down)):
        raise ValueError(f"factors {list(up.shape)} x {list(down.shape)} do not fit the layer's {list(weight.shape)}")
    dora = parts.get("dora")
    if dora is not None and dora.numel() != weight.shape[0]:
        raise ValueError(f"dora_scale {list(dora.shape)} is not one number per output channel ({weight.shape[0]})")
    if dora is not None and dora.dim() == 2 and dora.shape[0] == 1 and weight.shape[0] != 1:
        raise ValueError("dora_scale is given per input channel (an early LyCORIS form), which is not supported")
    return LoRALayer(down.reshape(wanted), up * scale, None if dora is None else dora.flatten())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- use ------------------------------------------------------------------------------------------------------------

def _delta(layer: LoRALayer, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """(up @ down shaped as the weight, DoRA's change of each output row or None), in float32 on the weight's device."""
    delta = (layer.up.to(weight.device) @ layer.down.to(weight.device).flatten(1)).view(weight.shape)
    if layer.dora_scale is None:
        return delta, None
    length = (weight.float() + delta).flatten(1).norm(dim=1)                        # [out]
    return delta, layer.dora_scale.to(weight.device) / length - 1


def attach(unet: nn.Module, loras: Sequence[LoRA]) -> None:
    """Makes loras[a] adapter a of every layer of the UNet, in place of any before; attach(unet, []) takes all off."""
    for name, module in unet.named_modules():
        if isinstance(module, _Adapted):
            factors = {}
            for a, lora in enumerate(loras):
                if name in lora.unet:
                    layer, up, gain = lora.unet[name], lora.unet[name].up, None
                    if layer.dora_scale is not None:
                        gain = _delta(layer, module.weight)[1]                      # type: ignore[arg-type]
                        up = up * (1 + gain.cpu())[:, None]                         # type: ignore[union-attr]
                    factors[a] = layer.down, up, gain
            module.attach(factors, len(loras))


def merged_weights(module: nn.Module, loras: Sequence[tuple[LoRA, float]], half: str = "text_encoder") -> dict[str, Tensor]:
    """{parameter name: W + sum of strength * delta}, for torch.func.functional_call: the module itself is not changed.

    `half` says which part of the files belongs to the module: "text_encoder" or "unet".
    """
    merged: dict[str, Tensor] = {}
    parameters = dict(module.named_parameters())
    for lora, strength in loras:
        for name, layer in getattr(lora, half).items():
            key = f"{name}.weight"
            key = key if key in parameters else key.removeprefix("text_model.")
            weight = parameters[key].detach().float()
            delta, gain = _delta(layer, weight)
            if gain is not None:
                gain = gain.view(-1, *[1] * (weight.dim() - 1))
                delta = weight * gain + delta * (1 + gain)
            merged[key] = merged.get(key, weight) + strength * delta
    return {key: value.to(parameters[key].dtype) for key, value in merged.items()}
