"""Reads the LoRA files that people have, and says what is in them.

Every format ends as the same thing: for each layer a pair of low-rank factors (`LoRALayer` of lora.py).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import pickletools
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lora import LoRA, LoRALayer, layers_of
from weights.names import ldm_unet_name


def read_lora(path: str | Path, unet: nn.Module, text_encoder: nn.Module | None = None) -> LoRA:
    """Reads a LoRA of any common format for these two modules; without a text encoder that half is left unread.

    Naming:     kohya-ss (with diffusers' or LDM's block names), diffusers old and new, PEFT
    Algorithms: LoRA and LoCon (also Tucker), LyCORIS LoHa and LoKr as exact low-rank factors, DoRA on any of them
    Every key is used, or a ValueError of one line names the file, the key and the remedy.
    """
    file = _File(Path(path))
    targets = {"unet": layers_of(unet), "text_encoder": layers_of(text_encoder, long=True) if text_encoder else {}}
    names = {"unet": _unet_names(unet, targets["unet"]), "text_encoder": _text_names(targets["text_encoder"])}
    matches = file.match_keys()
    groups: dict[tuple[str, str], dict[str, str]] = {}          # (half, module name) -> {part: key}
    unknown = []
    for key, match in matches.items():
        prefix, layer = (match["half"] or "", _flat(match["layer"])) if match else ("", "")
        halves = ("text_encoder",) if "te" in prefix else ("unet",) if prefix else ("unet", "text_encoder")
        found = next(((half, names[half][layer]) for half in halves if layer in names[half]), None)
        if match is None or found is None:
            unknown += [key] if "te" not in prefix or text_encoder else []
            continue
        part = PARTS.get(match["lora"], match["lora"]) or match["other"]
        if (other := groups.setdefault(found, {}).setdefault(part, key)) != key:
            raise file.error(f"{key} and {other} are for the same layer; remove one of them")
        if 0 in file.shapes[key] or (not file.shapes[key] and part != "alpha"):
            raise file.error(f"{key} has shape {list(file.shapes[key])}; the file is damaged, download it again")
    if unknown:
        listed = f"{', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}"
        if (kind := _first(UNSUPPORTED, unknown)) and not _first(FAMILIES, file.described):
            raise file.error(f"holds {kind}, which is not supported ({listed}); {SUPPORTED}")
        raise file.mismatch(f"{len(unknown)} of {len(file.shapes)} keys match nothing in this model: {listed}")
    layers: dict[str, dict[str, LoRALayer]] = {"unet": {}, "text_encoder": {}}
    for (half, name), parts in groups.items():
        layers[half][name] = _read_layer(file, half, name, parts, targets[half][name][1])
    ranks = {layer.up.shape[1] for half in layers.values() for layer in half.values()}
    return LoRA(file.path, file.path.stem, file.format(), file.sha256, tuple(sorted(ranks)), **layers,
                metadata=file.metadata)


KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<half>lora_unet[_.]|lycoris_|unet\.|diffusion_model\.|lora_te1?[_.]|text_encoder\."
    r"|text_encoders\.clip_l\.transformer\.)?"
    r"(?:base_model\.model\.)?(?P<layer>.+?)"
    r"(?:(?:[._]lora|\.lora_linear_layer)[._](?P<lora>down|up|mid|A|B|alpha|magnitude_vector)"
    r"|\.(?P<other>alpha|dora_scale|(?:hada|lokr)_(?:w[12](?:_[ab])?|t[12])))(?:\.default)?(?:\.weight)?")
NAMINGS = {"kohya": "^lora_", "lycoris": "^lycoris_", "peft": "lora_A", "comfyui": r"^(diffusion_model|text_encoders)\."}
KINDS = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "magnitude": "DoRA"}
PARTS = {"A": "down", "B": "up", "magnitude_vector": "magnitude"}
TO_TEXT = r"attn2\S*to_k\S*(down|lora_A|_b)\S* \[\d+"                # of the factor that reads the text, up to its width
# What keys and shapes, one "key [shape]" a line, give away about the model that a file is for
FAMILIES = {
    r"double_blocks|single_blocks|joint_blocks|single_transformer|^transformer\.|^lora_transformer"
    r"|^diffusion_model\.(?!input_blocks|middle_block|output_blocks|out\.|time_embed)":
        "a transformer model (Flux, SD 3 or similar)",
    r"lora_te2_|text_encoder_2\.|attentions.\d.transformer_blocks.[1-9]|put_blocks.\d.1.transformer_blocks.[1-9]"
    rf"|{TO_TEXT}, 2048": "SDXL", rf"{TO_TEXT}, 1024": "SD 2"}
CHECKPOINT = re.compile(r"^((model\.diffusion_model|first_stage_model|cond_stage_model|control_model|controlnet_\w+)\."
                        r"|conv_in\.|(en|de)coder\.conv_in|text_model\.embeddings)")
NOT_A_LORA = {r"model\.diffusion_model|first_stage_model|^down_blocks|^encoder\.|^conv_in|^text_model": "a checkpoint",
              r"emb_params|string_to|^clip_[lg] |^<": "a textual inversion embedding"}


# What LoRA files may hold beside, by their keys
UNSUPPORTED = {
    r"oft_|boft": "OFT", r"\.on_input$|ia3_": "IA3", r"\.[ab][12](\.weight)?$": "GLoRA", r"\.diff$": "differences of layers",
    r"\.(diff_b|bias)$": "differences of biases", r"\.[wb]_norm$": "differences of norms", r"vera_": "VeRA", r"hra_": "HRA",
    r"lora_[AB]\.(?!default\.)[^.]+\.weight$": "a PEFT adapter under a name of its own", r"\.scalar$": "LyCORIS' scalar",
    r"custom_diffusion": "Custom Diffusion", r"\.(q|p|lambda)_layer": "T-LoRA",
    r"motion_modules": "motion modules (AnimateDiff)", r"lora_vae": "layers of the VAE",
    r"add_embedding|label_emb": "SDXL's embedding of the size", r"embedding|string_to_param|_emb\.": "embeddings"}
SUPPORTED = "use a LoRA, LoCon, LoHa, LoKr or DoRA of UNet and text encoder"


def _first(table: dict[str, str], lines: Iterable[str]) -> str:
    """What the first pattern of a table that occurs in the lines stands for, or ""."""
    text = "\n".join(lines)
    return next((what for pattern, what in table.items() if re.search(pattern, text, re.M)), "")


def _flat(name: str) -> str:
    """One spelling for all: kohya has underscores for dots, diffusers' first format has a `processor` in between."""
    return name.replace(".processor.", ".").replace(".", "_")


def _text_names(targets: Iterable[str]) -> dict[str, str]:
    """{flat name: module name} of a CLIP text encoder; diffusers' first format said to_q for q_proj."""
    aliases = {name: (name, re.sub(r"(q|k|v|out)_proj$", r"to_\1", name)) for name in targets}
    return {_flat(long.removeprefix(cut)): name for name in targets for long in aliases[name] for cut in ("", "text_model.")}


def _unet_names(unet: nn.Module, targets: Iterable[str]) -> dict[str, str]:
    """{flat name: module name}: diffusers' names, diffusers' first format (to_out), and those of the LDM code."""
    layers = len(unet.down_blocks[0].resnets)                                       # type: ignore
    attends = tuple(bool(getattr(block, "attentions", ())) for block in unet.up_blocks)         # type: ignore
    aliases = {name: (name, ldm_unet_name(name, layers, attends), name.replace(".to_out.0", ".to_out")) for name in targets}
    return {_flat(alias): name for name in targets for alias in aliases[name]}


class _File:
    """An opened LoRA file: `shapes` are known at once, tensors are read when asked for."""

    def __init__(self, path: Path):
        self.path, self.metadata = path, dict[str, str]()
        try:
            if is_stream(path):
                raise self.error("is a device or a pipe; name a file")
            size, pickled = path.stat().st_size, is_pickle(path)
        except OSError as error:
            raise self.error(f"cannot be read ({str(error.strerror).lower()}); check the path of the LoRA") from None
        if not size:
            raise self.error("is empty; download it again")
        if pickled:
            try:
                tensors = read_pickle(path)
            except ValueError as error:
                raise self.error(str(error)) from None
            self.shapes, self._get = {key: tuple(value.shape) for key, value in tensors.items()}, tensors.__getitem__
        else:
            try:
                handle = safe_open(path, "pt")
                self.shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}
            except Exception as error:                          # SafetensorError, or OSError from the mapping
                raise self.error(disguised(path) or f"is damaged or not a safetensors file ({error}); download it again") \
                    from None
            self.metadata, self._get = handle.metadata() or {}, handle.get_tensor
        with path.open("rb") as stream:                         # now: whatever claims to be huge was refused
            digest = hashlib.file_digest(stream, "sha256")
        self.own_sha256 = digest.hexdigest()
        if any(len(key) > 500 for key in self.shapes):          # a name is searched for patterns: keep that quick
            raise self.error("is no LoRA: it has keys of more than 500 characters")
        self.config, beside = self._peft_config()
        digest.update(beside)                                   # where settings lie beside the weights they count as well
        self.sha256 = digest.hexdigest()
        for half in ("unet", "text_encoder"):
            start = str(self.config.get(f"{half}.init_lora_weights", "")).lower()
            if start.startswith(("pissa", "olora", "loftq", "corda", "lora_ga")):
                raise self.error(f"was trained from {start}, which changes the base model's weights too; save it again with "
                                 "PEFT's path_initial_model_for_weight_conversion")

    @property
    def described(self) -> list[str]:
        """A line for every key, with its shape."""
        return [f"{key} {list(shape)}" for key, shape in self.shapes.items()]

    def match_keys(self) -> dict[str, re.Match | None]:
        matches = {key: KEY.fullmatch(key) for key in self.shapes}
        if not any(match and match["other"] != "alpha" for match in matches.values()):
            others = [key for key, match in matches.items() if not match]
            if not any(map(CHECKPOINT.match, others)) and (kind := _first(UNSUPPORTED, others)):
                raise self.error(f"holds {kind}, which is not supported ({', '.join(others[:3])}, ...); {SUPPORTED}")
            raise self.error(f"has no LoRA keys (first: {next(iter(self.shapes), 'none at all')}); "
                             f"it looks like {_first(NOT_A_LORA, self.described) or 'something else'}, name a LoRA file")
        return matches

    def format(self) -> str:
        text = "\n".join(self.shapes)
        naming = next((name for name, pattern in NAMINGS.items() if re.search(pattern, text, re.M)), "diffusers")
        return f"{naming} {next((kind for word, kind in KINDS.items() if word in text), 'LoRA')}"

    def _peft_config(self) -> tuple[dict, bytes]:
        """What PEFT noted about alpha: in the file (recent diffusers), or beside a file of bare PEFT weights -> by half of
        the model, {"unet.r": 8, "unet.lora_alpha": 4, ...}, and the bytes of the file beside it that were used."""
        beside, content = self.path.parent / "adapter_config.json", b""
        try:
            config = dict(json.loads(self.metadata.get("lora_adapter_metadata") or "{}"))
            if not config and any(key.startswith("base_model.model.") for key in self.shapes) and beside.is_file():
                content = beside.read_bytes()
                config = dict(json.loads(content))
        except (ValueError, TypeError, OSError, RecursionError) as error:
            raise self.error(f"its PEFT settings cannot be read ({error}); save the LoRA again") from None
        if (kind := config.get("peft_type") or "LORA") != "LORA":
            raise self.error(f"is a PEFT adapter of the kind {kind}, and of PEFT's kinds only LORA is supported; save it in "
                             "LyCORIS' format")
        # a whole pipeline's settings name the half, those of one module do not
        both = {f"{half}.{key}": value for half in ("unet", "text_encoder") for key, value in config.items()}
        return both | config, content

    def peft_scale(self, half: str, name: str, rank: int) -> float:
        """alpha / rank of a layer without an alpha key: from the PEFT settings, else 1."""
        noted = self.config.get(f"{half}.r", rank)
        if noted != rank and not self.config.get(f"{half}.rank_pattern"):
            raise self.error(f"its PEFT settings are of another LoRA: they say r = {noted!r}, and {name} has rank {rank}; "
                             "put its own adapter_config.json beside it")
        noted_patterns = self.config.get(f"{half}.alpha_pattern")
        patterns = noted_patterns if isinstance(noted_patterns, dict) else {}
        for key in patterns:
            if not re.fullmatch(r"\^?[\w.]+", key):              # PEFT would match it; a stranger's may match for ever
                raise self.error(f"its PEFT settings have the pattern {key!r} in alpha_pattern; "
                                 "only names of layers are supported")
        short = name.removeprefix("text_model.")                # as transformers 5 calls the text encoder's layers
        own = [alpha for key, alpha in patterns.items()
               if (key[1:] in (name, short) if key.startswith("^") else f".{name}".endswith("." + key))]
        alpha = own[0] if own else self.config.get(f"{half}.lora_alpha", rank)
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise self.error(f"lora_alpha of {name} is {alpha!r} in the PEFT settings; save the LoRA again")
        return alpha / (rank ** 0.5 if self.config.get(f"{half}.use_rslora") else rank)

    def tensor(self, key: str) -> Tensor:
        try:
            value = self._get(key)
            if value.is_complex() or value.numel() > 1 and not value.is_floating_point():
                raise TypeError(f"it holds {value.dtype}")
            value = value.float()
        except Exception as error:                              # also dtypes that this torch does not know
            raise self.error(f"{key} cannot be read ({error}); save the LoRA as float16 or float32") from None
        if not value.isfinite().all():
            raise self.error(f"{key} holds NaN or infinity; the training failed or the file is damaged, use another")
        return value

    def error(self, why: str) -> ValueError:
        return ValueError(f"{self.path}: {printable(why, 600)}")

    def mismatch(self, why: str) -> ValueError:
        """For a key or a shape that this model does not have: with a guess which model the LoRA is for."""
        if family := _first(FAMILIES, self.described):
            return self.error(f"looks like a LoRA for {family}, this model is SD 1.5; use a LoRA for SD 1.5 ({why})")
        return Mismatch(self.error(f"{why}; use a LoRA that was trained on this kind of model"))


class Mismatch(ValueError):
    """A LoRA of another model, nobody knows which."""


def disguised(path: Path) -> str:
    """What a file is that is no safetensors file, where its first bytes tell; a sentence behind its name, or ""."""
    with path.open("rb") as file:
        head = file.read(40).lstrip()
    kinds = {b"version https://git-lfs": "is a Git LFS pointer, not the file; run git lfs pull, or give the hub id",
             b"<": "is a web page, not the file; the download needs a login or another address",
             b"\x89PNG": "is a picture; the settings of one are read with --from",
             b"GGUF": "is a GGUF file, which is not supported; use the .safetensors"}
    return next((what for start, what in kinds.items() if head.startswith(start)), "")


# What a pickle of tensors calls when it is loaded. Of the rest some run code, some make gigabytes of a few bytes.
CALLS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor(_v2)?|parameter)|torch(\.storage)? \w+Storage"
                   r"|torch (Size|device|b?float\d+|u?int\d+)|__builtin__ set")


class Ignored:
    """Stands for what checkpoints of 2022, SD 1.5's own .ckpt among them, hold beside tensors. Nothing of it is called."""

    def __new__(cls, *_, **__):
        return object.__new__(cls)

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state):
        pass


IGNORED = {f"{module} {name}": type(name, (Ignored,), {"__module__": module}) for module, name in (
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"), ("_codecs", "encode"), ("numpy", "dtype"),
    ("numpy", "ndarray"), ("numpy.core.multiarray", "scalar"), ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"), ("numpy._core.multiarray", "_reconstruct"))}


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a .ckpt, .pt or .bin, memory-mapped where it is an archive; the rest of what it holds is left out.

    ValueError, a sentence that goes behind the file's name: it calls something, claims more than it holds, is damaged.
    """
    called = ""
    try:
        with path.open("rb") as file:
            archive = zipfile.ZipFile(file) if file.read(2) == b"PK" else None
            file.seek(0)
            streams: list[IO[bytes]] = [file] * 4               # before PyTorch 1.6: magic number, version, system, tensors
            if archive:
                if any(entry.file_size > entry.compress_size for entry in archive.infolist()):
                    raise ValueError("is compressed; pack it again without compression")
                streams = [io.BytesIO(archive.read(name)) for name in archive.namelist() if name.endswith(".pkl")]
            for stream in streams:
                for code, what, _ in pickletools.genops(stream):
                    calls = code.name in ("GLOBAL", "INST", "STACK_GLOBAL")
                    if calls and not CALLS.fullmatch(str(what)) and what not in IGNORED:
                        called = f" ({str(what).replace(' ', '.')})" if what else ""
                        raise pickle.UnpicklingError
        with torch.serialization.safe_globals(list(IGNORED.values())):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive is not None)
        content = dict(content.get("state_dict", content))
    except pickle.UnpicklingError:
        raise ValueError(f"is a pickle that would run code when loaded{called}, or is damaged; convert it to safetensors "
                         "where you trust it") from None
    except Exception as error:                                  # a damaged file can raise anything at all
        raise ValueError(f"is damaged or no file of tensors ({error}); download it again") from None
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    for key, value in tensors.items():                          # strides of 0 would claim any shape with a few bytes
        if value.layout != torch.strided or value.device.type != "cpu" or \
                value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"is not usable: {key} is not a plain tensor; convert the file to safetensors")
    return tensors


def _read_layer(file: _File, half: str, name: str, parts: dict[str, str], weight: Tensor) -> LoRALayer:
    """Checks the shapes of one layer's parts against its weight, reads them, and makes low-rank factors of them."""
    out, width, *kernel = weight.shape
    unread = set(parts)

    def shape(part: str) -> tuple[int, ...]:
        if part not in parts:
            raise file.error(f"{max(parts.values())} has no {part} beside it; the file is incomplete, download it again")
        return file.shapes[parts[part]]

    def take(part: str, *wanted: int) -> Tensor:
        """The tensor, if this is its shape, up to ones and a flattened kernel."""
        def bare(*sizes: int) -> list[int]:
            return [n for n in sizes if n > 1]
        if bare(*shape(part)) not in (bare(*wanted), bare(*wanted[:1], math.prod(wanted[1:]))):
            raise file.mismatch(f"{parts[part]} has shape {list(shape(part))}, {name} needs {list(wanted)}")
        unread.discard(part)
        return file.tensor(parts[part]).reshape(wanted)

    def pair(a: str, b: str, core: str, rows: int, columns: int, kernel: list[int]) -> tuple[Tensor, Tensor]:
        """Factors [rows, r] and [r, columns, *kernel]; the core [r, r, *kernel] of Tucker's form is multiplied in."""
        if core not in parts:
            down = take(b, shape(b)[0], columns, *kernel)       # first: its width tells for which model the file is
            return take(a, rows, len(down)), down
        left, right = (*shape(core), 0)[:2]                     # 0: a core of one dimension, which fits nothing
        # LyCORIS stores it transposed; .contiguous() would leave the strides of a single row, which torch.kron refuses
        up = take(a, rows, left) if a == "up" else take(a, left, rows).T.clone(memory_format=torch.contiguous_format)
        return up, torch.einsum("ij...,jc->ic...", take(core, left, right, *kernel), take(b, right, columns)).contiguous()

    if any(part.startswith("hada") for part in parts):          # (A1 B1) * (A2 B2): every row of B1 times every row of B2
        (a1, b1), (a2, b2) = (pair(f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}", out, width, kernel) for n in (1, 2))
        rank = len(b1)
        if len(b1) * len(b2) <= out:
            up, down = (a1[:, :, None] * a2[:, None, :]).flatten(1), (b1[:, None] * b2[None]).flatten(0, 1)
        else:
            up, down = _dense((a1 @ b1.flatten(1)) * (a2 @ b2.flatten(1)), kernel)
    elif any(part.startswith("lokr") for part in parts):        # kron(A1 B1, A2 B2) = kron(A1, A2) kron(B1, B2)
        def factor(n: int, rows: int, columns: int, kernel: list[int]) -> tuple[Tensor, Tensor]:
            if f"lokr_w{n}" in parts:
                return _dense(take(f"lokr_w{n}", rows, columns, *kernel).flatten(1), kernel)
            a, b = pair(f"lokr_w{n}_a", f"lokr_w{n}_b", f"lokr_t{n}", rows, columns, kernel)
            return (a, b) if len(b) <= rows else _dense(a @ b.flatten(1), kernel)
        whole = "lokr_w1" in parts
        rows, columns = shape("lokr_w1" if whole else "lokr_w1_a")[0], shape("lokr_w1" if whole else "lokr_w1_b")[-1]
        if out % rows or width % columns:
            raise file.mismatch(f"{min(parts.values())}: a first factor [{rows}, {columns}] does not divide {name}")
        (a1, b1), (a2, b2) = factor(1, rows, columns, []), factor(2, out // rows, width // columns, kernel)
        up, down = torch.kron(a1, a2), torch.kron(b1.view(*b1.shape, *[1] * len(kernel)), b2)
        rank = next((shape(f"lokr_w{n}_b")[0] for n in (2, 1) if f"lokr_w{n}" not in parts), 0)
    else:
        up, down = pair("up", "down", "mid", out, width, kernel)
        rank = shape("down")[0]
    # alpha / rank goes into the factor that has the larger entries, of which half precision keeps more
    if not rank:                                                # LoKr of two whole matrices: alpha has no meaning
        unread.discard("alpha")
    elif "alpha" in parts:
        down = down * (take("alpha").item() / rank)             # 0: the layer does nothing, as in diffusers
    else:
        down = down * file.peft_scale(half, name, rank)

    length = next((part for part in ("dora_scale", "magnitude") if part in parts), "")
    of_columns = length == "dora_scale" and len(shape(length)) > 1 and shape(length)[0] == 1
    dora_scale = take(length, out) if length and not of_columns else None
    if of_columns:                                              # LyCORIS' other DoRA rescales columns: a full change
        old = weight.float().cpu()
        new = old + (up @ down.flatten(1)).view_as(old)
        lengths = new.transpose(0, 1).flatten(1).norm(dim=1).clamp_min(1e-38)       # [in]
        scale = (take(length, width) / lengths).view(-1, *[1] * len(kernel))
        up, down = _dense((new * scale - old).flatten(1), kernel)
    if unread:
        raise file.error(f"{parts[min(unread)]} does not fit the other keys of its layer; save the LoRA again")
    if not (up.isfinite().all() and down.isfinite().all()):     # of finite tensors: their product
        raise file.error(f"{min(parts.values())} and its layer's other keys give infinity; use another LoRA")
    return LoRALayer(down.contiguous(), up.contiguous(), dora_scale)


def _dense(delta: Tensor, kernel: list[int]) -> tuple[Tensor, Tensor]:
    """(up, down) of a full change [out, in * kh * kw]: it is one of the two factors, the identity is the other."""
    out, width = delta.shape[0], delta.shape[1] // math.prod(kernel)
    if math.prod(kernel) == 1 and width < out:
        return delta, torch.eye(width).view(width, width, *kernel)
    return torch.eye(out), delta.view(out, width, *kernel)


# --- what a file says about itself ----------------------------------------------------------------------------------

# kind of layer: how trainers name it, in flat names
LAYERS = {"attention": "attn", "feed-forward": "_ff_|mlp",
          "convolutions": "conv|proj_(in|out)|(in|out)_layers|skip_connection|input_blocks_0_0|_op$|^out_2$", "other": ""}


def describe(path: str | Path) -> dict[str, str]:
    """{heading: one printable line} of a LoRA for any model: keys, shapes and metadata are all that it looks at."""
    file = _File(Path(path))
    layers, ranks, alphas, widths = set[tuple[str, str]](), set[int](), set[float](), set[int]()
    for key, match in file.match_keys().items():
        if match is None:
            continue
        half, layer = match["half"] or "", _flat(match["layer"])
        part = PARTS.get(match["lora"], match["lora"]) or match["other"]
        text = "te" in half or (not half and re.search("text_model|self_attn", layer))
        layers.add(("text encoder" if text else "UNet", layer))
        if part in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b") and file.shapes[key]:
            ranks.add(file.shapes[key][0])
        if part == "alpha" and math.prod(file.shapes[key]) == 1:
            alphas.add(round(file.tensor(key).item(), 4))
        if part == "down" and re.search("attn2_to_[kv]$", layer):
            widths |= set(file.shapes[key][1:2])
    # PEFT's settings count; what kohya-ss notes of its training does not, without the keys
    peft = dict.fromkeys(str(file.config[f"{half}.lora_alpha"]) for half in ("unet", "text_encoder")
                         if f"{half}.lora_alpha" in file.config)
    trained = f" (its training says {said})" if (said := file.metadata.get("ss_network_alpha")) else ""
    counts = Counter((half, next(kind for kind, names in LAYERS.items() if re.search(names, name))) for half, name in layers)
    base = [file.metadata.get(key, "") for key in ("ss_base_model_version", "ss_sd_model_name", "modelspec.architecture")]
    lines = {
        "format": file.format(),
        "rank": ", ".join(map(str, sorted(ranks))) or "full",
        "alpha": ", ".join(f"{alpha:g}" for alpha in sorted(alphas))
                 or ", ".join(peft) or f"not in the file, so the rank{trained}",
        "layers": "; ".join(f"{half}: " + ", ".join(f"{counts[half, kind]} {kind}" for kind in LAYERS if counts[half, kind])
                            for half in ("UNet", "text encoder") if any(one == half for one, _ in counts)),
        "made for": _first(FAMILIES, file.described) or ("SD 1.x" if widths == {768} else ""),
        "trained on": ", ".join(dict.fromkeys(filter(None, base))),
        "name": ", ".join(dict.fromkeys(filter(None, map(file.metadata.get, ("ss_output_name", "modelspec.title"))))),
        "tags": file.metadata.get("modelspec.tags", ""),
        "usage": file.metadata.get("modelspec.usage_hint", ""),
        "trigger words": ", ".join(trigger_words(file.metadata)),
        "sha256": file.own_sha256}
    return {heading: line for heading, value in lines.items() if (line := printable(value, 200))}


def trigger_words(metadata: dict[str, str]) -> list[str]:
    """What the trainer noted, the likeliest first: the phrase of the model spec, then kohya's most frequent caption tags.

    Where neither is there: the names of kohya's training folders ("10_sks cat"), else the name that the file was given.
    """
    counts, folders = Counter[str](), list[str]()
    try:
        for folder, tags in json.loads(metadata.get("ss_tag_frequency", "{}")).items():     # one table per training folder
            folders += re.findall(r"^\d+_(.+)", folder)
            counts.update({tag: count for tag, count in tags.items() if isinstance(count, int)})
    except (ValueError, AttributeError, RecursionError):        # a stranger's file: anything may be written there
        pass
    phrase = metadata.get("modelspec.trigger_phrase", "").partition(",")[0]
    words = [phrase, *(tag for tag, _ in counts.most_common(5))]
    words = words if any(words) else folders[:5] or [metadata.get("ss_output_name", "")]
    return list(dict.fromkeys(filter(None, (printable(word, 60) for word in words))))


def is_pickle(path: Path) -> bool:
    """Whether a file is one of torch.save, whatever its name says: people rename them."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] != b"{" and (head[:2] == b"PK" or head[:1] == b"\x80")


def is_stream(path: Path) -> bool:
    """A device or a pipe, which must not be opened: to read it may take for ever."""
    return path.exists() and not path.is_file() and not path.is_dir()


def printable(text: str, limit: int) -> str:
    """One line that is safe on a terminal: no control characters, at most `limit` characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text[:10 * limit]).split())
    return text if len(text) <= limit else text[:limit - 4] + " ..."
