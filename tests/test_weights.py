"""Loading models: folders, single files, the hub, and everything that can be wrong with them."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import weights
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from weights import find_lora, load_model
from weights.names import ldm_unet_name, ldm_vae_name

GOLDEN = Path(__file__).parent / "golden/model"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(GOLDEN, tmp_path / "model"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(source, **options) -> str:
    with pytest.raises(ValueError) as caught:
        load_model(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder(folder):
    model = load_model(folder)
    assert not model.unet.training and not any(p.requires_grad for p in model.unet.parameters())
    assert model.map_level == 2 and model.settings == {}
    stored = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, stored[key].float()) for key, value in model.unet.state_dict().items())


def test_a_unet_without_a_middle_block(folder):
    """As tiny-sd and BK-SDM have it."""
    edit(folder / "unet/config.json", mid_block_type=None)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    assert "mid_block" in refused(folder)
    save_file({key: value for key, value in load_file(file).items() if not key.startswith("mid_block.")}, file)
    assert load_model(folder).unet.mid_block is None


def test_a_text_encoder_of_more_tokens_is_refused(folder):
    """LongCLIP: other programs would read prompts to its end, and every row of the context counts in attention."""
    edit(folder / "text_encoder/config.json", max_position_embeddings=248)
    assert "max_position_embeddings is 248" in refused(folder)


def test_a_tokenizer_in_one_file(folder, monkeypatch):
    """transformers 5 saves no vocab.json and merges.txt."""
    from transformers import CLIPTokenizerFast
    text = "a Striped cat, and an unheard-of dog"
    whole = load_model(folder)
    CLIPTokenizerFast.from_pretrained(folder / "tokenizer").save_pretrained(folder / "saved")
    for name in ("vocab.json", "merges.txt"):
        (folder / "saved" / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tokenizer")
    (folder / "saved").rename(folder / "tokenizer")
    alone = load_model(folder)
    assert torch.equal(alone.text.encode([text]), whole.text.encode([text]))
    assert alone.text.positions(text, "dog") == whole.text.positions(text, "dog") != []
    assert folder / "tokenizer/tokenizer.json" in alone.files
    (folder / "tokenizer/tokenizer.json").unlink()
    assert "vocab.json is missing" in refused(folder)


@pytest.mark.parametrize("given", [{}, {"clip_sample": True}, {"clip_sample": True, "steps_offset": 0}])
def test_latents_are_not_clipped_whatever_the_folder_says(given, folder):
    """A folder that was saved with Euler or UniPC says nothing of clip_sample, and DDIM's own default is to clip."""
    path = folder / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text())
    del config["clip_sample"], config["steps_offset"]
    path.write_text(json.dumps({**config, "_class_name": "EulerDiscreteScheduler", **given}))
    config = load_model(folder).scheduler_config
    assert config["clip_sample"] is False and config["steps_offset"] == 1 and config["beta_start"] == 0.00085


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precisions(folder, dtype):
    model = load_model(folder, dtype=dtype)
    assert model.unet.conv_in.weight.dtype == dtype and next(model.text.model.parameters()).dtype == dtype
    # the VAE overflows in float16
    assert model.vae.quant_conv.weight.dtype == (torch.float32 if dtype == torch.float16 else dtype)


def test_weights_are_mapped_not_copied(folder):
    """In the file's own precision the parameters are the mapped file: they lie in no memory that Python allocated. The
    kernels, which lie channels last, are copied from a mapping that is given back."""
    unet = load_model(folder, dtype=torch.float16).unet
    assert unet.mid_block.resnets[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc to see mapped files")
    spans = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(path) in line]
    (start, end), = [[int(place, 16) for place in span] for span in spans]
    assert start <= unet.time_embedding.linear_1.weight.data_ptr() < end
    assert not start <= unet.mid_block.resnets[0].conv1.weight.data_ptr() < end


def test_the_hash_of_a_single_file_is_its_own():
    """As Civitai and A1111 show it."""
    path = GOLDEN / "unet/diffusion_pytorch_model.safetensors"
    model = load_model(GOLDEN)
    model.files = [path]
    assert model.hash == hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def test_the_hash_follows_the_weights(folder):
    first = load_model(folder).hash
    assert first == load_model(GOLDEN).hash and len(first) == 16
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({key: value + 1 if key == "quant_conv.bias" else value for key, value in state.items()}, path)
    assert load_model(folder).hash != first


def test_other_file_names(folder):
    expected = load_model(GOLDEN)
    unet = folder / "unet/diffusion_pytorch_model.safetensors"
    unet.rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    text = load_file(folder / "text_encoder/model.safetensors")
    (folder / "text_encoder/model.safetensors").unlink()
    torch.save(text, folder / "text_encoder/pytorch_model.bin")
    model = load_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.unet.parameters(), expected.unet.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(model.text.model.parameters(), expected.text.model.parameters()))


def test_old_names_of_the_vae_attention(folder):
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in load_file(path).items():
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        state[key] = value
    save_file(state, path)
    expected = load_model(GOLDEN).vae.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in load_model(folder).vae.state_dict().items())


def test_map_level_and_recipe_come_with_the_model(folder):
    (folder / "clora.json").write_text('{"map_level": 1, "recipe": {"alpha": 2.0}}')
    model = load_model(folder)
    assert model.map_level == 1 and model.settings["recipe"] == {"alpha": 2.0}


# --- another autoencoder ----------------------------------------------------------------------------------------------

@pytest.fixture
def other(folder):
    """A whole model's folder whose autoencoder differs."""
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({key: value * 0.9 for key, value in state.items()}, path)
    return folder


@pytest.mark.parametrize("kind", ["model", "folder", "diffusers' file", "LDM file", "LDM pickle", "LDM checkpoint"])
def test_another_vae(kind, other, tmp_path, monkeypatch):
    own, wanted = load_model(GOLDEN), load_model(other)
    monkeypatch.setattr(VAEConfig.__init__, "__defaults__", tuple(vars(own.vae.config).values()))
    monkeypatch.setattr(weights.from_ldm, "__defaults__", (own.unet.config, own.vae.config))
    ldm = {key.removeprefix("first_stage_model."): value.contiguous() for key, value in ldm_state(wanted).items()
           if key.startswith("first_stage_model.")} | {"loss.logvar": torch.zeros(())}
    source = {"model": other, "folder": other / "vae", "LDM file": tmp_path / "vae.safetensors",
              "diffusers' file": other / "vae/diffusion_pytorch_model.safetensors", "LDM pickle": tmp_path / "vae.ckpt",
              "LDM checkpoint": tmp_path / "model.safetensors"}[kind]
    if kind == "LDM file":
        save_file(ldm, source)
    elif kind == "LDM pickle":
        torch.save({"state_dict": ldm, "epoch": 1}, source)
    elif kind == "LDM checkpoint":
        save_file({key: value.contiguous() for key, value in ldm_state(wanted).items()}, source)
    model = load_model(GOLDEN, vae=source)
    for part, expected in (("unet", own.unet), ("vae", wanted.vae)):
        state, theirs = getattr(model, part).state_dict(), expected.state_dict()
        assert state.keys() == theirs.keys() and all(torch.equal(state[key], theirs[key]) for key in theirs)
    assert own.vae_hash is None and model.vae_hash and model.hash == own.hash != wanted.hash


@pytest.mark.parametrize("change, word", [
    ({"scaling_factor": 0.13025}, "SDXL"), ({"scaling_factor": 0.5}, "not of one family"),
    ({"_class_name": "AutoencoderTiny"}, "Tiny"), ({"shift_factor": 0.1}, "shift_factor")])
def test_vaes_of_other_families(change, word, other):
    edit(other / "vae/config.json", **change)
    with pytest.raises(ValueError, match=word):
        load_model(GOLDEN, vae=other / "vae")


def test_files_that_are_no_vae(tmp_path):
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "cat.safetensors")
    for source, word in (("cat.safetensors", "misses 248 tensors of this VAE"), (".", "config.json is missing"),
                         ("nothing.safetensors", "no such file"), ("nothing", "no such file")):
        with pytest.raises(ValueError, match=word) as caught:
            load_model(GOLDEN, vae=tmp_path / source)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "vae/"])
def test_a_vae_on_the_hub(prefix, other, tmp_path, monkeypatch):
    """Of its own repository or of a whole model's only what is used is fetched."""
    import fnmatch

    import huggingface_hub
    asked = {}
    hub = {"them/vae": {f"{prefix}{path.name}": path for path in (other / "vae").iterdir()},
           "us/model": {path.relative_to(GOLDEN).as_posix(): path for path in GOLDEN.rglob("*") if path.is_file()}}

    def download(repo, allow_patterns, local_files_only):
        asked[repo] = {name for name in hub[repo] if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)}
        for name in asked[repo]:
            (tmp_path / repo / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub[repo][name], tmp_path / repo / name)
        return str(tmp_path / repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, repo, **_: listing([*hub[repo]]))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model("us/model", vae="them/vae").vae_hash == load_model(GOLDEN, vae=other / "vae").vae_hash
    assert asked["them/vae"] == {f"{prefix}config.json", f"{prefix}diffusion_pytorch_model.safetensors"}


def test_a_vae_in_one_file_on_the_hub(other, monkeypatch):
    """A config.json beside it says what it is; a repository of files alone has to be told which."""
    import huggingface_hub
    files = ["ema.safetensors", "config.json"]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, repo, **_: listing(files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(other / "vae"))
    (other / "vae/diffusion_pytorch_model.safetensors").rename(other / "vae/ema.safetensors")
    model = load_model(GOLDEN, vae="them/vae-original:ema.safetensors")
    assert model.vae_files == [other / "vae/ema.safetensors", other / "vae/config.json"]
    edit(other / "vae/config.json", scaling_factor=0.13025)
    with pytest.raises(ValueError, match="SDXL"):
        load_model(GOLDEN, vae="them/vae-original:ema.safetensors")
    files.remove("config.json")
    with pytest.raises(ValueError, match="name a file of it as them/vae-original:FILE"):
        load_model(GOLDEN, vae="them/vae-original")


# --- single files -----------------------------------------------------------------------------------------------------

def ldm_state(model) -> dict[str, torch.Tensor]:
    """A model in the original layout, with what real checkpoints hold beside."""
    attends = tuple(bool(block.attentions) for block in model.unet.up_blocks)
    state = {"model.diffusion_model." + ldm_unet_name(key, model.unet.config.layers_per_block, attends): value
             for key, value in model.unet.state_dict().items()}
    for key, value in model.vae.state_dict().items():
        if ".attentions.0.to_" in key and value.dim() == 2:
            value = value[:, :, None, None]
        state["first_stage_model." + ldm_vae_name(key, len(model.vae.config.block_out_channels))] = value
    for key, value in model.text.model.state_dict().items():
        key = key if key.startswith("text_model.") else f"text_model.{key}"
        state[f"cond_stage_model.transformer.{key}"] = value
    return state | {"betas": torch.zeros(3), "model_ema.decay": torch.zeros(()),
                    "cond_stage_model.transformer.text_projection.weight": torch.zeros(2, 2),
                    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}


@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "safetensors in a .ckpt"])
def test_a_single_file_gives_the_same_model(kind, tmp_path, monkeypatch):
    expected = load_model(GOLDEN)
    config = json.loads((GOLDEN / "text_encoder/config.json").read_text())
    monkeypatch.setattr(weights, "SD15_TEXT", {key: config[key] for key in weights.SD15_TEXT if key in config})
    for name, cls in (("UNetConfig", expected.unet.config), ("VAEConfig", expected.vae.config)):
        monkeypatch.setattr(weights.from_ldm, "__defaults__", (expected.unet.config, expected.vae.config))
        part = name.removesuffix("Config")
        monkeypatch.setattr(weights, part, lambda config=cls, make=getattr(weights, part): make(config))
    state = {key: value.contiguous() for key, value in ldm_state(expected).items()}
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.ckpt")
    save_file(state, path) if "safetensors" in kind else torch.save({"state_dict": state, "global_step": 7}, path)
    shutil.copytree(GOLDEN / "tokenizer", tmp_path / "tokenizer")
    model = load_model(path)
    for part in ("unet", "vae"):
        ours, theirs = getattr(model, part).state_dict(), getattr(expected, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(model.text.encode(["a cat"]), expected.text.encode(["a cat"]))


def test_a_cache_without_the_tokenizer_is_not_taken_for_it(tmp_path, monkeypatch):
    """CLIP's own repository may be cached for its model alone."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, local_files_only, **__:
                        str(tmp_path if local_files_only else GOLDEN / "tokenizer"))
    assert weights._fetch_tokenizer(tmp_path / "m.safetensors") == GOLDEN / "tokenizer"


def test_every_name_has_one_ldm_name():
    with torch.device("meta"):
        unet, vae = UNet(UNetConfig()), VAE(VAEConfig())
    attends = tuple(bool(block.attentions) for block in unet.up_blocks)
    for names in ([ldm_unet_name(key, 2, attends) for key in unet.state_dict()],
                  [ldm_vae_name(key, 4) for key in vae.state_dict()]):
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("key, shape, word", [
    ("conditioner.embedders.0.weight", (1,), "SDXL"), ("cond_stage_model.model.ln.weight", (1,), "SD 2"),
    ("lora_unet_x.lora_down.weight", (1,), "LoRA"), ("something.weight", (1,), "no Stable Diffusion"),
    ("model.diffusion_model.input_blocks.0.0.weight", (320, 9, 3, 3), "inpainting"),
    ("model.diffusion_model.input_blocks.0.0.weight", (320, 4, 3, 3), "misses")])
def test_single_files_of_other_kinds(key, shape, word, tmp_path):
    decoder = {"first_stage_model.decoder.conv_in.bias": torch.zeros(1)}
    save_file({key: torch.zeros(shape), **decoder}, tmp_path / "m.safetensors")
    assert word in refused(tmp_path / "m.safetensors")


def test_single_files_without_a_vae_or_with_v_prediction(tmp_path):
    first = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}
    save_file(first, tmp_path / "m.safetensors")
    assert "give one, as --vae" in refused(tmp_path / "m.safetensors")
    assert "misses" in refused(tmp_path / "m.safetensors", vae=GOLDEN)              # of the UNet
    (tmp_path / "m.yaml").write_text("model:\n  params:\n    parameterization: 'v'\n")
    assert "predicts v" in refused(tmp_path / "m.safetensors", vae=GOLDEN)
    save_file(first | {"v_pred": torch.zeros(1)}, tmp_path / "comfy.safetensors")
    assert "predicts v" in refused(tmp_path / "comfy.safetensors", vae=GOLDEN)


def test_a_folder_without_a_vae(folder):
    shutil.rmtree(folder / "vae")
    assert "vae/config.json is missing" in refused(folder)
    assert load_model(folder, vae=GOLDEN).vae_hash == load_model(GOLDEN, vae=GOLDEN).vae_hash


def test_damaged_and_dangerous_single_files(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))
    path = tmp_path / "m.ckpt"
    torch.save({"state_dict": {"x": Evil()}}, path)
    assert "would run code" in refused(path) and not (tmp_path / "ran").exists()
    for name in ("m.ckpt", "m.safetensors"):
        for content in (b"", b"nonsense" * 9):
            (tmp_path / name).write_bytes(content)
            assert name in refused(tmp_path / name)


# --- what can be wrong with a folder ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
                                  "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
                                  "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    message = refused(folder)
    assert "missing" in message and Path(name).stem.removesuffix(".safetensors") in message


@pytest.mark.parametrize("change, word", [
    ({"use_linear_projection": True}, "SD 2"), ({"addition_embed_type": "text_time"}, "SDXL"),
    ({"in_channels": 9}, "inpainting"),
    ({"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
    ({"transformer_layers_per_block": [1, 2, 10]}, "SDXL"),
    ({"time_cond_proj_dim": 256}, "LCM"), ({"cross_attention_dim": 64}, "shape")])
def test_unets_of_other_families(folder, change, word):
    edit(folder / "unet/config.json", **change)
    assert word in refused(folder)


@pytest.mark.parametrize("version, given, size", [("0.6.0", 32, 64), ("0.8.1", 32, 64), ("0.9.0", 32, 32), (None, 32, 32),
                                                  ("0.10.2", 32, 32), ("0.6.0", 96, 96)])
def test_the_size_of_models_of_early_diffusers(version, given, size):
    """Conversions of 2022 say 32 and mean 64, as diffusers' pipeline knows (pipeline_stable_diffusion.py)."""
    config = {"sample_size": given, **({} if version is None else {"_diffusers_version": version})}
    assert UNetConfig.from_dict(config).sample_size == size


def test_other_vaes_and_pipelines(folder):
    edit(folder / "vae/config.json", _class_name="VQModel")
    assert "VQModel" in refused(folder)
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    assert "SDXL" in refused(folder)


def test_tensors_that_are_missing_or_unknown(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({key: value for key, value in state.items() if key != "conv_in.bias"}, path)
    assert "conv_in.bias" in refused(folder)
    save_file({**state, "extra.weight": torch.zeros(1)}, path)
    assert "extra.weight" in refused(folder)
    path.write_bytes(path.read_bytes()[:1000])
    assert "damaged" in refused(folder)


def test_a_source_that_is_nothing():
    assert "no such file" in refused("does/not/exist.safetensors")
    assert "no such file" in refused("nothing here")


# --- the hub ----------------------------------------------------------------------------------------------------------

REPO = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "v1-5-pruned.ckpt",
        "unet/diffusion_pytorch_model.non_ema.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors",
        "text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin", "safety_checker/model.safetensors",
        "safety_checker/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/added_tokens.json",
        "scheduler/scheduler_config.json"]


def listing(names: list[str]) -> SimpleNamespace:
    """What the hub tells of a repository, as far as we ask."""
    return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])


@pytest.mark.parametrize("dtype, mark", [(torch.float32, ""), (torch.float16, ".fp16"), (torch.bfloat16, ".fp16")])
def test_only_the_files_that_are_used_are_fetched(dtype, mark, monkeypatch):
    import fnmatch

    import huggingface_hub
    asked = {}

    def download(repo, allow_patterns, local_files_only):
        asked[repo] = [name for name in REPO if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)]
        return str(GOLDEN)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, repo, **_: listing(REPO))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_model("stable-diffusion-v1-5/stable-diffusion-v1-5", dtype=dtype)
    assert sorted(asked["stable-diffusion-v1-5/stable-diffusion-v1-5"]) == [
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
        f"text_encoder/model{mark}.safetensors", "tokenizer/added_tokens.json", "tokenizer/merges.txt",
        "tokenizer/vocab.json", "unet/config.json",
        f"unet/diffusion_pytorch_model{mark}.safetensors", "vae/config.json",
        f"vae/diffusion_pytorch_model{mark}.safetensors"]


def test_a_model_of_pickles_on_the_hub(folder, tmp_path, monkeypatch):
    import fnmatch

    import huggingface_hub
    for part, old in (("unet", "diffusion_pytorch_model.bin"), ("vae", "diffusion_pytorch_model.bin"),
                      ("text_encoder", "pytorch_model.bin")):
        path = next((folder / part).glob("*.safetensors"))
        torch.save(load_file(path), folder / part / old)
        path.unlink()
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    def download(repo, allow_patterns, local_files_only):
        for name in files:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / name, tmp_path / "got" / name)
        return str(tmp_path / "got")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, repo, **_: listing(files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model("someone/of-2022").hash == load_model(folder).hash


def test_single_files_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    files = ["a.safetensors", "b.ckpt", "README.md"]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, repo, **_: listing(files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert "name a file of it, as us/merges:a.safetensors" in refused("us/merges")
    save_file({"something.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert "a.safetensors is no Stable Diffusion checkpoint" in refused("us/merges:a.safetensors")
    files[:] = ["README.md"]
    assert "has no model_index.json" in refused("us/merges")


def test_the_hub_out_of_reach(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "someone/some-model" in refused("someone/some-model")


CAT = Path(__file__).parent / "golden/loras/cat_peft.safetensors"


def cache(folder: Path, repo: str, *names: str) -> Path:
    """A hub cache as huggingface_hub lays it out, with a LoRA under these names -> its snapshot."""
    root, commit = folder / f"models--{repo.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    snapshot = root / "snapshots" / commit
    for path in (root / "refs", root / "blobs", snapshot):
        path.mkdir(parents=True)
    (root / "refs/main").write_text(commit)
    shutil.copy(CAT, root / "blobs/cafe")
    for name in names:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(root / "blobs/cafe")
    return snapshot


@pytest.fixture
def offline(tmp_path, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def not_found(source: str) -> str:
    with pytest.raises(ValueError) as caught:
        find_lora(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_lora_in_the_hubs_cache(offline):
    one = cache(offline, "someone/cat-lora", "cat.safetensors")
    two = cache(offline, "someone/cats", "a.safetensors", "pytorch_lora_weights.safetensors", "old/b [1].safetensors")
    several = "".join(f"{n}.safetensors " for n in range(12)).split()
    cache(offline, "someone/many", *several)
    cache(offline, "someone/none", "README.md")
    assert find_lora("someone/cat-lora") == find_lora("someone/cat-lora:cat.safetensors") == one / "cat.safetensors"
    assert find_lora("someone/cats") == two / "pytorch_lora_weights.safetensors"
    assert find_lora("someone/cats:old/b [1].safetensors") == two / "old/b [1].safetensors"
    assert "0.safetensors, 1.safetensors, 10" in not_found("someone/many") and "..." in not_found("someone/many")
    assert "no .safetensors or .ckpt or .bin file" in not_found("someone/none")
    old = cache(offline, "someone/old", "README.md", "pytorch_lora_weights.bin", "optimizer.bin")
    assert find_lora("someone/old") == old / "pytorch_lora_weights.bin"
    for source in ("someone/else", "someone/cats:c.safetensors", "someone/else:c.safetensors", "a..b/--c"):
        assert source.split(":")[0] in not_found(source) and "cannot be reached" in not_found(source)


def test_a_file_wins_over_the_hub(offline):
    cache(offline, "someone/cats", "a.safetensors")
    Path("someone").mkdir()
    shutil.copy(CAT, "someone/cats")
    assert find_lora("someone/cats") == Path("someone/cats")
    for name in ("someone/cat.safetensors", "cat", "a/b/c", "x.safetensors", "someone/cat.pt",  # paths, if wrong ones
                 "someone/cat.safetensor"):
        assert find_lora(name) == Path(name)


def test_a_lora_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    asked = []

    def download(repo, allow_patterns, local_files_only):
        assert not local_files_only
        asked.append((repo, *allow_patterns))
        for name in allow_patterns:
            shutil.copy(CAT, tmp_path / name)
        return str(tmp_path)
    files = ["README.md", "a.safetensors", "b.safetensors", "b.bin"]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, repo, **_: listing(files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert "a.safetensors, b.safetensors" in not_found("someone/cats") and not asked
    assert "no file c.safetensors" in not_found("someone/cats:c.safetensors") and not asked
    assert find_lora("someone/cats:b.safetensors") == tmp_path / "b.safetensors"
    files.remove("b.safetensors")
    assert find_lora("someone/cats") == tmp_path / "a.safetensors"
    # a training's checkpoints lie in folders of their own
    files[:] = ["checkpoint-500/pytorch_lora_weights.safetensors", "pytorch_lora_weights.safetensors"]
    assert find_lora("someone/cats") == tmp_path / "pytorch_lora_weights.safetensors" and asked.pop()
    assert asked == [("someone/cats", f"{name}.safetensors", "adapter_config.json") for name in "ba"]
    files[:] = ["README.md", "dog/adapter_model.safetensors", "dog/adapter_config.json"]
    (tmp_path / "dog").mkdir()
    assert find_lora("someone/cats") == tmp_path / "dog/adapter_model.safetensors"
    assert asked[-1][1:] == ("dog/adapter_model.safetensors", "dog/adapter_config.json")      # PEFT's alpha is in there


@pytest.mark.parametrize("key", ["time_embedding_act_fn", "timestep_post_act"])
def test_an_activation_that_sd_15_has_not_is_refused(key):
    assert UNetConfig.from_dict({key: None}) == UNetConfig()
    with pytest.raises(ValueError, match=f"{key} is 'gelu'"):
        UNetConfig.from_dict({key: "gelu"})
