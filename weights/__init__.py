"""Loads a model of the SD 1.x family, wherever it lies:

    load_model("weights/toy")                                   a folder in diffusers' layout
    load_model("model.safetensors"), load_model("model.ckpt")   a single file in the original LDM layout
    load_model("stable-diffusion-v1-5/stable-diffusion-v1-5")   a hub id; only the files that are used are fetched

Weights are memory-mapped and become the modules' parameters without a second copy, but for the kernels of convolutions and
wherever precision or device change.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora import LoRA
from text import TextEncoder
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from weights.lora import disguised, is_pickle, is_stream, printable, read_lora, read_pickle
from weights.names import ldm_unet_name, ldm_vae_name

# What SD 1.5 publishes; a single file carries none of it.
SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "clip_sample": False, "trained_betas": None,
}
SD15_TEXT = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 768,
    "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1,
}
ENDINGS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
NOT_CACHED = "{} is no file or folder here, not in the local cache, and the hub cannot be reached or has no such repository"
TOKENIZER_ID = "openai/clip-vit-large-patch14"              # SD 1.5's tokenizer, for single files
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "tokenizer.json")
# names of the weights' files in each part's folder, without their endings: .safetensors and the older .bin
WEIGHTS = {"unet": ("diffusion_pytorch_model",) * 2, "vae": ("diffusion_pytorch_model",) * 2,
           "text_encoder": ("model", "pytorch_model")}
# What diffusers' StableDiffusionPipeline sets whatever the folder says: latents are no pictures between -1 and 1.
SCHEDULER_ALWAYS = {"clip_sample": False, "steps_offset": 1}


@dataclass
class Model:
    unet: UNet
    vae: VAE
    text: TextEncoder
    scheduler_config: dict
    name: str                                               # as the caller wrote it
    files: list[Path]                                       # that the hash covers: a folder's, or the single file
    settings: dict = field(default_factory=dict)            # the folder's clora.json: map_level, recipe
    vae_files: list[Path] = field(default_factory=list)     # of an autoencoder in the place of the model's

    @property
    def map_level(self) -> int:
        """Which maps the method reads: latent size / 2^level. 2 in SD 1.5 (16x16 of 64x64)."""
        return self.settings.get("map_level", 2)

    def lora(self, source: str | Path) -> LoRA:
        """A LoRA for this model: a file, or "user/repo[:file]" on the hub. ValueError: see find_lora and read_lora."""
        return read_lora(find_lora(source), self.unet, self.text.model)

    @cached_property                                        # gigabytes: read once
    def hash(self) -> str:
        """16 hex digits that change with any of its `files`. A single file's are the first of its SHA-256, as on Civitai."""
        return _hash(self.files)

    @cached_property
    def vae_hash(self) -> str | None:
        """The same of an autoencoder in the place of the model's."""
        return _hash(self.vae_files) if self.vae_files else None


def _hash(files: Sequence[Path]) -> str:
    digests = []
    for path in files:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return (digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest())[:16]


def load_model(source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, vae: str | Path | None = None
               ) -> Model:
    """A model in eval mode without gradients. ValueError, one line that names the file: missing, damaged, another family.

    vae: an autoencoder in the place of the model's: a folder in diffusers' layout (its own, or a whole model's), a single
    file, or on the hub "user/repo" or "user/repo:file". A file without its config.json beside it is taken for SD 1.x's.
    """
    path = _local(source)
    other = _load_vae(vae, device, dtype) if vae else None
    if path.is_dir():
        return _load_folder(path, str(source), device, dtype, other)
    if path.is_file():
        return _load_single_file(path, str(source), device, dtype, other)
    return _load_folder(_fetch(_hub_id(source), dtype), str(source), device, dtype, other)


def _local(source: str | Path) -> Path:
    """The path itself, or that of "user/repo:file" on the hub, which is a file like any other."""
    place = hub_place(source)
    return find_lora(source) if place and place[1] else Path(source)


def _hub_id(source: str | Path) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and Path(source).suffix not in ENDINGS:
        return str(source)
    raise ValueError(f"{source}: there is no such file or folder, and it is no hub id (user/name) either")


# --- a folder in diffusers' layout ------------------------------------------------------------------------------------

def _load_folder(folder: Path, name: str, device: str, dtype: torch.dtype, other: tuple[VAE, list[Path]] | None) -> Model:
    index = _read_json(folder / "model_index.json")
    if "XL" in str(index.get("_class_name", "")) or "text_encoder_2" in index:
        raise ValueError(f"{folder} looks like SDXL; this is an SD 1.x implementation")
    unet_config = _parse(UNetConfig.from_dict, folder / "unet/config.json")
    alone = other is not None and not (folder / "vae/config.json").exists()
    vae_config = VAEConfig() if alone else _parse(VAEConfig.from_dict, folder / "vae/config.json")
    unet_file = _weights_file(folder / "unet", "unet")
    unet = _fill(lambda: UNet(unet_config), lambda: read_state(unet_file), unet_file, device, dtype)
    vae, vae_files = _load_vae(folder / "vae", device, dtype) if other is None else other
    _expect_same_latents(vae.config, vae_config, vae_files[0])
    # the model's own VAE is part of its hash, with --vae too
    own = [path for path in (folder / "vae" / file for file in _weights_names("vae")) if path.is_file()][:1]
    text_config = _read_json(folder / "text_encoder/config.json")
    text_file = _weights_file(folder / "text_encoder", "text_encoder")
    text = _text_model(text_config, read_state(text_file), text_file, device, dtype)
    if text_config.get("hidden_size") != unet_config.cross_attention_dim:
        raise ValueError(f"{folder}: the text encoder is {text_config.get('hidden_size')} wide, "
                         f"the UNet reads {unet_config.cross_attention_dim}: they are not of one model")
    if vae_config.latent_channels != unet_config.in_channels:
        raise ValueError(f"{folder}: the VAE makes {vae_config.latent_channels} channels, "
                         f"the UNet reads {unet_config.in_channels}: they are not of one model")
    settings = _read_json(folder / "clora.json") if (folder / "clora.json").exists() else {}
    if unknown := settings.keys() - {"map_level", "recipe"}:
        raise ValueError(f"{folder / 'clora.json'}: {min(unknown)} is not known; it may hold map_level and recipe")
    level = settings.get("map_level", 2)
    if type(level) is not int or not 0 <= level < len(unet.down_blocks) or not unet.map_layers(level):
        raise ValueError(f"{folder / 'clora.json'}: this UNet has no maps at map_level {level!r}")
    beside = ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json",
              "clora.json", *(f"tokenizer/{file}" for file in TOKENIZER_FILES)]
    files = [unet_file, *own, text_file, *(folder / file for file in beside if (folder / file).is_file())]
    return Model(unet, vae, _text_encoder(folder / "tokenizer", text),
                 _read_json(folder / "scheduler/scheduler_config.json") | SCHEDULER_ALWAYS, name, files, settings,
                 [] if other is None else vae_files)


def _weights_names(part: str) -> tuple[str, str, str]:
    stem, old = WEIGHTS[part]
    return f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{old}.bin"


def _weights_file(folder: Path, part: str) -> Path:
    names = _weights_names(part)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder}: the weights are missing; one of {', '.join(names)} must be there")


def _load_vae(source: str | Path, device: str, dtype: torch.dtype) -> tuple[VAE, list[Path]]:
    """An autoencoder, and its files, the weights' first."""
    path = _local(source)
    if path.is_file():
        def read() -> dict[str, Tensor]:
            state = {key.removeprefix("first_stage_model."): value for key, value in read_state(path).items()}
            if any(key.startswith("decoder.mid_block.") for key in state):          # diffusers' names
                return _modern_vae(state)
            return from_ldm({f"first_stage_model.{key}": value for key, value in state.items()})["vae"]
        config, weights, files = VAEConfig(), path, [path]
        beside = path.with_name("config.json")
        if beside.is_file() and _read_json(beside).get("_class_name") == "AutoencoderKL":
            config, files = _parse(VAEConfig.from_dict, beside), [path, beside]
    else:
        folder = path if path.is_dir() else _fetch_vae(_hub_id(source), dtype)
        folder = folder if (folder / "config.json").is_file() or not (folder / "vae").is_dir() else folder / "vae"
        config, weights = _parse(VAEConfig.from_dict, folder / "config.json"), _weights_file(folder, "vae")
        files = [weights, folder / "config.json"]

        def read() -> dict[str, Tensor]:
            return _modern_vae(read_state(weights))
    return _fill(lambda: VAE(config), read, weights, device, _vae_dtype(dtype)), files


def _vae_dtype(dtype: torch.dtype) -> torch.dtype:
    # the decoder of SD 1.x overflows in half precision on some pictures; bfloat16 has the range
    return torch.float32 if dtype == torch.float16 else dtype


def _expect_same_latents(vae: VAEConfig, own: VAEConfig, path: Path) -> None:
    """ValueError: an autoencoder of another family, whose latents mean something else to the UNet."""
    for key in ("scaling_factor", "latent_channels", "factor"):
        if getattr(vae, key) != getattr(own, key):
            looks = " (it looks like SDXL's)" if vae.scaling_factor == 0.13025 else ""
            raise ValueError(f"{path}: this VAE's {key} is {getattr(vae, key)}, the model's {getattr(own, key)}: "
                             f"they are not of one family{looks}")


def _modern_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The attention of published SD 1.x VAEs has the names that diffusers used before 0.15, or LDM's 1x1 convolutions."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    out = {}
    for key, value in state.items():
        if ".mid_block.attentions.0." in key:
            parts = key.split(".")
            parts[-2] = old.get(parts[-2], parts[-2])
            key = ".".join(parts)
            value = value[:, :, 0, 0] if value.dim() == 4 else value
        out[key] = value
    return out


# --- a single file in the original layout -----------------------------------------------------------------------------

def _load_single_file(path: Path, name: str, device: str, dtype: torch.dtype, other: tuple[VAE, list[Path]] | None) -> Model:
    state = read_state(path)
    if any(key.startswith("conditioner.embedders") for key in state):
        raise ValueError(f"{path} looks like SDXL; this is an SD 1.x implementation")
    if any(key.startswith("cond_stage_model.model.") for key in state):
        raise ValueError(f"{path} looks like SD 2.x; this is an SD 1.x implementation")
    if any("lora_" in key or ".lora" in key for key in state):
        raise ValueError(f"{path} looks like a LoRA, not a model; give it with --lora")
    key = "model.diffusion_model.input_blocks.0.0.weight"
    first = state.get(key)
    if first is None:
        raise ValueError(f"{path} is no Stable Diffusion checkpoint in the LDM layout: {key} is missing")
    if first.shape[1] != 4:
        raise ValueError(f"{path} takes {first.shape[1]} channels; it looks like an inpainting or another special model")

    if other is None and not any(key.startswith("first_stage_model.decoder.") for key in state):
        raise ValueError(f"{path} holds no autoencoder; give one, as --vae stabilityai/sd-vae-ft-mse")
    yaml = path.with_suffix(".yaml")                        # as A1111 reads it; the key is ComfyUI's
    said = yaml.read_text(errors="replace") if yaml.is_file() else ""
    if "v_pred" in state or re.search(r"^\s*parameterization:\s*[\"']?v\b", said, re.MULTILINE):
        raise ValueError(f"{path} predicts v and not the noise, which is not supported")

    def part(name: str) -> dict[str, Tensor]:
        return from_ldm(state if is_pickle(path) else read_state(path))[name]

    unet = _fill(UNet, lambda: part("unet"), path, device, dtype)
    if other is None:
        other = _fill(VAE, lambda: part("vae"), path, device, _vae_dtype(dtype)), []
    else:
        _expect_same_latents(other[0].config, VAEConfig(), other[1][0])
    vae, vae_files = other
    text = _text_model(SD15_TEXT, part("text_encoder"), path, device, dtype)
    folder = path.parent / "tokenizer"
    if not _has_tokenizer(folder):
        folder = _fetch_tokenizer(path)
    return Model(unet, vae, _text_encoder(folder, text), SD15_SCHEDULER, name, [path], {}, vae_files)


def from_ldm(state: dict[str, Tensor], unet_config: UNetConfig = UNetConfig(), vae_config: VAEConfig = VAEConfig()
             ) -> dict[str, dict[str, Tensor]]:
    """Tensors of the original layout -> {"unet": ..., "vae": ..., "text_encoder": ...} under our names.

    What a checkpoint holds beside the three networks (moving averages, the noise schedule, a safety checker) is left out.
    """
    with torch.device("meta"):
        unet, vae = UNet(unet_config), VAE(vae_config)
    attends = tuple(bool(block.attentions) for block in unet.up_blocks)             # type: ignore[union-attr, arg-type]
    names = {"unet": {"model.diffusion_model." + ldm_unet_name(key, unet_config.layers_per_block, attends): key
                      for key in unet.state_dict()},
             "vae": {"first_stage_model." + ldm_vae_name(key, len(vae_config.block_out_channels)): key
                     for key in vae.state_dict()}}
    parts = {part: {ours: state[theirs] for theirs, ours in table.items() if theirs in state}
             for part, table in names.items()}
    prefix = "cond_stage_model.transformer."
    parts["text_encoder"] = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    parts["vae"] = _modern_vae(parts["vae"])
    return parts


# --- the hub ----------------------------------------------------------------------------------------------------------

def _fetch(repo: str, dtype: torch.dtype) -> Path:
    """Downloads what is used of a hub model, or finds it in the cache -> its folder."""
    wanted = ["model_index.json", "clora.json", "scheduler/scheduler_config.json"]
    wanted += [f"{part}/config.json" for part in ("unet", "vae", "text_encoder")]
    wanted += [f"tokenizer/{name}" for name in TOKENIZER_FILES]
    present = _list(repo)
    if present is not None and "model_index.json" not in present:
        files = sorted(name for name in present if name.endswith((".safetensors", ".ckpt")))
        raise ValueError(f"{repo} is no model in diffusers' layout; name a file of it, as {repo}:{files[0]}" if files else
                         f"{repo} is no model in diffusers' layout: it has no model_index.json")
    for part in WEIGHTS:
        wanted += _preferred([f"{part}/{name}" for name in _weights_names(part)], present, dtype)
    return _download(repo, wanted, offline=present is None)


def _fetch_vae(repo: str, dtype: torch.dtype) -> Path:
    """The same of an autoencoder's own repository, or of the vae/ of a whole model's."""
    present = _list(repo)
    folder = "vae/" if present is not None and "config.json" not in present else ""
    if present is not None and f"{folder}config.json" not in present:
        raise ValueError(f"{repo} has no VAE in diffusers' layout; name a file of it as {repo}:FILE")
    wanted = [f"{folder}config.json", *_preferred([folder + name for name in _weights_names("vae")], present, dtype)]
    return _download(repo, wanted, offline=present is None)


def _preferred(names: Sequence[str], present: set[str] | None, dtype: torch.dtype) -> list[str]:
    """Of the names of a part's weights the one to fetch; all of them where it is not known what there is."""
    if present is None:
        return [*names]
    preferred = names if dtype == torch.float32 else [names[1], names[0], names[2]]
    return [name for name in preferred if name in present][:1]


def split_weight(text: str) -> tuple[str, float | None]:
    """"cat.safetensors:0.8" -> ("cat.safetensors", 0.8); the weight is optional. A file that has such a name is meant.

    ValueError: what follows the name of a file is no weight, or one beyond 10,000.
    """
    if os.path.lexists(text):
        return text, None
    if match := re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)", text, re.IGNORECASE):
        if abs(float(match[2])) > 1e4:
            raise ValueError(f"{text}: the weight of a LoRA must be between -10000 and 10000")
        file, _, another = match[1].rpartition(":")
        if os.path.isfile(file) and not os.path.lexists(match[1]):
            raise ValueError(f"{text} has two weights; one is for UNet and text encoder alike: write {file}:{another}")
        return match[1], float(match[2])
    path, _, weight = text.rpartition(":")
    if path and os.path.isfile(path):
        raise ValueError(f'{path}: "{weight}" is no weight; write it as {path}:0.8')
    return text, None


def find_lora(source: str | Path) -> Path:
    """A LoRA's file: a path as it is, or "user/repo" or "user/repo:file.safetensors" on the hub or in its cache. In a folder
    it is the file that diffusers' or PEFT's training leaves there.

    A file that exists wins over a repository of that name. As everywhere with the hub its newest version is taken, and the
    cached one where the hub cannot be reached. Without a file name: pytorch_lora_weights.safetensors, else the only
    .safetensors, and where there is none of those the same with the older endings. ValueError: nothing like that there.
    """
    place = hub_place(source)
    if place is None:
        files = (Path(source) / f"{stem}{ending}" for stem in ("pytorch_lora_weights", "adapter_model")
                 for ending in ENDINGS)
        return next(filter(Path.is_file, files), Path(source))          # read_lora says what is wrong with it
    repo, name = place
    present = _list(repo)
    if name is None:
        names = present
        if names is None:
            folder = _download(repo, [f"*{ending}" for ending in ENDINGS], offline=True)
            names = {file.relative_to(folder).as_posix() for file in folder.rglob("*")}
        candidates = (sorted(file for file in names if file.endswith(ENDINGS[0]))
                      or sorted(file for file in names if file.endswith(ENDINGS)))
        usual = [file for file in candidates if file.rpartition(".")[0] == "pytorch_lora_weights"] or candidates
        if len(usual) != 1:
            if not candidates:
                raise ValueError(f"{repo} has no {' or '.join(ENDINGS[:3])} file; name a repository of a LoRA")
            several = ", ".join(candidates[:9]) + (" ..." if len(candidates) > 9 else "")
            raise ValueError(f"{repo} has several LoRAs: {several}; name one as {repo}:{candidates[0]}")
        name = usual[0]
    elif present is not None and name not in present:
        raise ValueError(f"{repo} has no file {name}; there are "
                         f"{', '.join(sorted(file for file in present if file.endswith(ENDINGS))[:9]) or 'no LoRAs'}")
    settings = Path(name).with_name("adapter_config.json").as_posix()               # PEFT notes alpha beside the weights
    file = _download(repo, [glob.escape(name), glob.escape(settings)], offline=present is None) / name
    if not file.is_file():
        raise ValueError(f"{repo} cannot be loaded: {NOT_CACHED.format(name)}")
    return file


def hub_place(source: str | Path) -> tuple[str, str | None] | None:
    """("user/repo", file or None) if that is what `source` means and not a path, mistyped ones included."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::(.+))?", str(source))
    if Path(source).exists() or match is None or (match[2] is None and Path(source).suffix in ENDINGS):
        return None
    if match[2] is None and Path(source).suffix and Path(source).parent.is_dir():           # loras/cat.safetensor
        return None
    return match[1], match[2]


def _list(repo: str) -> set[str] | None:
    """The files of a hub repository, or None where the hub does not tell: then whatever an earlier call fetched counts."""
    from huggingface_hub import HfApi
    try:
        return {file.rfilename for file in HfApi().model_info(repo, timeout=10).siblings or ()}
    except Exception:
        return None


def _download(repo: str, wanted: Sequence[str], offline: bool) -> Path:
    """The folder of a hub repository with these files of it, as far as it has them."""
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(repo, allow_patterns=list(wanted), local_files_only=offline))
    except Exception as error:
        reason = NOT_CACHED.format("it") if offline else error
        raise ValueError(f"{repo} cannot be loaded: {reason}") from None


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json"))


def _fetch_tokenizer(path: Path) -> Path:
    for offline in (True, False):                   # what is in the cache needs no hub
        with contextlib.suppress(ValueError):
            folder = _download(TOKENIZER_ID, TOKENIZER_FILES, offline)
            if _has_tokenizer(folder):
                return folder                       # else the cache has other files of that repository alone
    raise ValueError(f"{path} holds no tokenizer: put SD 1.5's folder tokenizer/ beside it, or let {TOKENIZER_ID} be "
                     "downloaded once")


# --- files and modules ------------------------------------------------------------------------------------------------

def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or of a pickle that holds nothing but tensors, memory-mapped where possible."""
    try:
        if path.stat().st_size == 0:
            raise ValueError("is empty; download it again")
        return read_pickle(path) if is_pickle(path) else load_file(path)
    except ValueError as error:
        reason = str(error)
    except Exception as error:                      # SafetensorError, or what a damaged header makes torch raise
        reason = path.is_file() and disguised(path) or f"is damaged or not a safetensors file ({error}); download it again"
    raise ValueError(f"{path} {printable(reason, 600)}")


def _fill(make: Callable[[], nn.Module], read: Callable[[], dict[str, Tensor]], path: Path, device: str,
          dtype: torch.dtype):
    """A module made without memory of its own, whose parameters are the tensors that `read` maps: as they lie in the file,
    but for the kernels of convolutions, which lie channels last: what convolutions are fastest with."""
    state = read()
    try:
        with torch.device("meta"):
            module = make()
    except Exception as error:                      # sizes that do not go together
        raise ValueError(f"{path.parent / 'config.json'} describes no model ({error})") from None
    wanted = {key: value.shape for key, value in module.state_dict().items()}
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        kind, names = ("misses", missing) if missing else ("has unknown", extra)
        raise ValueError(f"{path} {kind} {len(names)} tensors of this {type(module).__name__}: "
                         f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}")
    for key, shape in wanted.items():
        if state[key].shape != shape:
            raise ValueError(f"{path}: {key} has shape {list(state[key].shape)}, the config asks for {list(shape)}")
    if torch.device(device).type == "cpu" and not is_pickle(path):
        # copied from a mapping of their own, which ends here: pages of the other that nobody reads take no memory
        state = state | {key: value.contiguous(memory_format=torch.channels_last) for key, value in read().items()
                         if value.dim() == 4 and value.dtype == dtype
                         and not value.is_contiguous(memory_format=torch.channels_last)}
    module.load_state_dict({key: value.to(device, dtype) for key, value in state.items()}, assign=True)
    if torch.device(device).type != "mps":                  # whose backward pass is many times slower with it
        module.to(memory_format=torch.channels_last)        # type: ignore[call-overload]
    return module.eval().requires_grad_(False)


def _transformers(*names: str) -> list:
    """Classes of transformers. The import makes a million objects, and the garbage collector is not to look through them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        import transformers
        return [getattr(transformers, name) for name in names]
    finally:
        if collecting:
            gc.enable()


def _text_model(config: dict, state: dict[str, Tensor], path: Path, device: str, dtype: torch.dtype):
    config_class, model_class = _transformers("CLIPTextConfig", "CLIPTextModel")
    keep = {key: config[key] for key in (*SD15_TEXT, "attention_dropout") if key in config}
    _check(keep, {**SD15_TEXT, "attention_dropout": 0.0}, path.parent / "config.json")
    if keep.get("max_position_embeddings", 77) != 77:               # LongCLIP: other programs read prompts to its end
        raise ValueError(f"{path.parent / 'config.json'}: max_position_embeddings is {keep['max_position_embeddings']}; "
                         "only text encoders of 77 tokens are supported")
    with torch.device("meta"):
        nested = any(key.startswith("text_model.") for key in model_class(config_class(**keep)).state_dict())
    prefix = "text_model." if nested else ""
    state = {prefix + key.removeprefix("text_model."): value for key, value in state.items()
             if not key.endswith(("position_ids", "text_projection.weight"))}         # of other forms of the class
    model = _fill(lambda: model_class(config_class(**keep)), lambda: state, path, device, dtype)
    for module in model.modules():                  # buffers outside the state dict were made on the meta device
        if "position_ids" in module._buffers:
            module.position_ids = torch.arange(77, device=device)[None]
    return model


def _text_encoder(folder: Path, model: nn.Module) -> TextEncoder:
    """The tokenizer in this folder, with the text model that it must fit."""
    tokenizer, fast_tokenizer = _transformers("CLIPTokenizer", "CLIPTokenizerFast")
    missing = [folder / name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if missing and not (folder / "tokenizer.json").is_file():           # the one file that transformers 5 writes
        raise ValueError(f"{missing[0]} is missing")
    try:
        kind = fast_tokenizer if missing else tokenizer
        text = TextEncoder(kind.from_pretrained(folder, model_max_length=77), model)
        ids, size = text.tokenizer("a").input_ids, model.get_input_embeddings().num_embeddings
        if ids[0] != text.tokenizer.bos_token_id or ids[-1] != text.tokenizer.eos_token_id or len(ids) < 3:
            raise ValueError("it puts no start and end around a prompt")
        if max(text.tokenizer.get_vocab().values()) >= size:
            raise ValueError(f"it has more words than the text encoder, {size}")
        text.encode([""])
    except Exception as error:                      # transformers raises many kinds
        reason = printable(str(error), 500)
        raise ValueError(f"{folder}: the tokenizer is damaged or of another model ({reason})") from None
    return text


def _read_json(path: Path) -> dict:
    if is_stream(path):
        raise ValueError(f"{path} is a device or a pipe")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def _parse(from_dict: Callable, path: Path):
    values = _read_json(path)
    try:
        config = from_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    _check(vars(config), {name: field.default for name, field in type(config).__dataclass_fields__.items()}, path)
    return config


def _check(values: dict, like: dict, path: Path) -> None:
    """ValueError if a value is of another type than in `like`, or is a size that takes hours or all memory to build."""
    for name, value in values.items():
        several = isinstance(like[name], tuple)
        kind = type(like[name][0] if several else like[name])
        kinds = (int, float) if kind is float else (kind,)
        low = 0 if kind is float or name.endswith("_id") else 1
        high = 64 if "layers" in name else 100_000
        parts = value if isinstance(value, tuple) and (several or name == "attention_head_dim") else [value]
        if len(parts) > 16 or not all(
                type(part) in kinds and (kind in (str, bool) or low <= part <= high) for part in parts):
            raise ValueError(f"{path}: {name} cannot be {str(value)[:100]}")
