"""LoRA files as diffusers and PEFT write and apply them, against read_lora and attach, on a tiny random UNet."""

import copy
import dataclasses
import json
from pathlib import Path

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPTextConfig, CLIPTextModel

from lora import LoRA, attach, merged_weights
from unet import UNet, UNetConfig
from weights.lora import read_lora

TINY = UNetConfig(block_out_channels=(32, 64, 64, 64), norm_num_groups=8, cross_attention_dim=32, attention_head_dim=8)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LINEAR = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
ALL = (*LINEAR, "conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in",
       "conv_out", "time_embedding.linear_1")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.fixture(scope="module")
def ours() -> UNet:
    torch.manual_seed(0)
    return UNet(TINY).eval().requires_grad_(False)


@pytest.fixture
def theirs(ours) -> UNet2DConditionModel:
    config = {key: value for key, value in dataclasses.asdict(TINY).items() if key != "mid_block"}
    unet = UNet2DConditionModel(**config).eval().requires_grad_(False)
    unet.load_state_dict(ours.state_dict())
    return unet


@pytest.fixture
def text() -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                            bos_token_id=1, eos_token_id=2)
    return CLIPTextModel(config).eval().requires_grad_(False)


def randomize(model: nn.Module) -> None:
    """Random values in every adapter tensor: they begin at zero, or DoRA's at the length of the weight's rows."""
    generator = torch.Generator().manual_seed(2)
    for name, value in model.named_parameters():
        if any(word in name for word in ("lora_A", "lora_B", "hada_", "lokr_")):
            value.data = torch.randn(value.shape, generator=generator) / max(value[0].numel(), 4) ** 0.5
        if "magnitude" in name:
            value.data = value.data * (0.5 + torch.rand(value.shape, generator=generator))


INPUTS = (torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(3)), torch.tensor([1, 801]),
          torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(4)))
IDS = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(5))


def check(ours: UNet, lora: LoRA, theirs: nn.Module) -> None:
    """In float64 on both sides: with large adapters the rounding of float32 alone comes near the bound."""
    latents, timestep, context = INPUTS[0].double(), INPUTS[1], INPUTS[2].double()
    expected = theirs.double()(latents, timestep, context).sample
    ours = copy.deepcopy(ours).double()
    attach(ours, [lora])
    noise = ours(latents, timestep, context, torch.ones(2, 1).double())[0]
    assert relative(ours(latents, timestep, context)[0], expected) > 0.05       # the LoRA matters
    assert relative(noise, expected) < 1e-5


def names(theirs: nn.Module, ends: tuple[str, ...]) -> list[str]:
    return [n for n, m in theirs.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and n.endswith(ends)]


def random_lora(module: nn.Module, ends: tuple[str, ...], seed: int) -> dict[str, tuple[Tensor, Tensor, float]]:
    """{module name: (down, up, alpha)}; alpha is not the rank."""
    generator, layers = torch.Generator().manual_seed(seed), {}
    for name in names(module, ends):
        weight = module.get_submodule(name).weight
        down = torch.randn(4, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
        up = torch.randn(len(weight), 4, *[1] * (weight.dim() - 2), generator=generator) * 0.3
        layers[name] = down, up, 3.0
    return layers


def long(name: str) -> str:
    return f"text_model.{name.removeprefix('text_model.')}"


def kohya(unet: dict, text: dict) -> dict[str, Tensor]:
    tensors = {}
    for prefix, layers in (("lora_unet_", unet), ("lora_te_", text)):
        for name, (down, up, alpha) in layers.items():
            key = prefix + (long(name) if prefix == "lora_te_" else name).replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    return tensors


def processors(unet: dict, text: dict) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up, _) in unet.items():
        block, _, leaf = name.rpartition(".attn")
        key = f"unet.{block}.attn{leaf[0]}.processor.{leaf[2:].removesuffix('.0')}_lora"
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    for name, (down, up, _) in text.items():
        key = f"text_encoder.{long(name)}.lora_linear_layer"
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    return tensors


def lora_a_b(unet: dict, text: dict) -> dict[str, Tensor]:
    return {f"{half}.{name}.{part}.weight": value
            for half, layers in (("unet", unet), ("text_encoder", {long(name): layer for name, layer in text.items()}))
            for name, layer in layers.items() for part, value in zip(("lora_A", "lora_B"), layer)}


@pytest.mark.parametrize("write, ends", [(kohya, LINEAR), (kohya, ALL), (processors, ATTENTION), (lora_a_b, ALL)],
                         ids=["kohya", "kohya LoCon", "attention processors", "lora_A, lora_B"])
def test_files_that_diffusers_reads(write, ends, ours, theirs, text, tmp_path):
    tensors = write(random_lora(theirs, ends, 6), random_lora(text, TEXT if write is not processors else TEXT[:4], 7))
    path = tmp_path / "cat.safetensors"
    save_file(tensors, path)
    lora = read_lora(path, ours, text)
    merged = merged_weights(text, [(lora, 1.0)])
    hidden = functional_call(text, merged, (IDS,)).last_hidden_state
    plain = text(IDS).last_hidden_state

    state, alphas = Loader.lora_state_dict(str(path))
    if any("conv.in" in key for key in state):
        pytest.skip("this old diffusers splits kohya's conv_in into conv.in and leaves it out")
    Loader.load_lora_into_unet(state, alphas, theirs)
    check(ours, lora, theirs)
    Loader.load_lora_into_text_encoder(state, alphas, text, prefix="text_encoder")
    assert relative(plain, text(IDS).last_hidden_state) > 0.02
    assert relative(hidden, text(IDS).last_hidden_state) < 1e-5


@pytest.mark.parametrize("options", [
    {"lora_alpha": 6}, {"lora_alpha": 6, "use_rslora": True}, {"lora_alpha": 2, "use_dora": True},
    {"lora_alpha": 6, "rank_pattern": {"to_q": 2, "conv1": 7}, "alpha_pattern": {"attn1.to_k": 1, "conv1": 3}}],
    ids=["alpha", "rslora", "dora", "patterns"])
@pytest.mark.parametrize("saved_by", ["diffusers", "diffusers' UNet", "peft"])
def test_files_that_diffusers_and_peft_write(saved_by, options, ours, theirs, tmp_path):
    targets = names(theirs, ALL)
    config = peft.LoraConfig(r=4, target_modules=targets, **options)
    if saved_by == "peft":
        adapted = peft.get_peft_model(theirs, config)
        randomize(adapted)
        adapted.save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
    elif saved_by == "diffusers' UNet":
        theirs.add_adapter(config, "cat")
        randomize(theirs)
        theirs.save_lora_adapter(tmp_path, adapter_name="cat")
        path = tmp_path / "pytorch_lora_weights.safetensors"
    else:
        theirs.add_adapter(config, "cat")
        randomize(theirs)
        state = peft.get_peft_model_state_dict(theirs, adapter_name="cat")
        settings = config.to_dict()
        settings = json.loads(json.dumps(settings, default=list))
        Loader.save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=settings)
        path = tmp_path / "pytorch_lora_weights.safetensors"
    lora = read_lora(path, ours)
    assert sorted(lora.unet) == sorted(targets)
    check(ours, lora, theirs)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["plain", "dora", "rslora"])
@pytest.mark.parametrize("anchor", ["^", ""])
def test_alpha_patterns_of_a_text_encoder(anchor, options, ours, text, tmp_path):
    """PEFT's patterns are of the names that its transformers had; those of version 5 do not begin with text_model."""
    own = next(name for name in names(text, ("q_proj",)))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "fc1"], rank_pattern={"fc1": 2},
                             alpha_pattern={anchor + own: 1}, **options)
    plain = text(IDS).last_hidden_state
    adapted = peft.get_peft_model(copy.deepcopy(text), config)
    randomize(adapted)
    adapted.save_pretrained(tmp_path)
    lora = read_lora(tmp_path / "adapter_model.safetensors", ours, text)
    hidden = functional_call(text, merged_weights(text, [(lora, 1.0)]), (IDS,)).last_hidden_state
    expected = adapted(IDS).last_hidden_state
    assert relative(plain, expected) > 0.02 and relative(hidden - plain, expected - plain) < 1e-4


def test_a_layer_of_alpha_zero_does_nothing(ours, theirs, tmp_path):
    (name, *_), weights = names(theirs, ("attn1.to_q",)), dict(theirs.named_modules())
    down, up = torch.randn(4, weights[name].weight.shape[1]), torch.randn(len(weights[name].weight), 4)
    path = tmp_path / "cat.safetensors"
    save_file(kohya({name: (down, up, 0.0)}, {}), path)
    Loader.load_lora_into_unet(*Loader.lora_state_dict(str(path)), theirs)
    assert set(theirs.get_submodule(name).scaling.values()) == {0.0}
    assert not read_lora(path, ours).unet[name].down.any()


@pytest.mark.parametrize("algorithm", ["loha", "loha tucker", "lokr", "lokr decomposed", "lokr tucker"])
def test_lycoris_algorithms(algorithm, ours, theirs, tmp_path):
    """PEFT computes LoHa and LoKr as LyCORIS does; its tensors are written here under LyCORIS' names."""
    targets = names(theirs, ALL)
    if algorithm.startswith("loha"):
        config = peft.LoHaConfig(r=3, alpha=2, target_modules=targets, use_effective_conv2d="tucker" in algorithm)
    else:
        config = peft.LoKrConfig(r=3, alpha=2, target_modules=targets, decompose_both="decomposed" in algorithm,
                                 decompose_factor=8, use_effective_conv2d="tucker" in algorithm)
    adapted = peft.get_peft_model(theirs, config)
    randomize(adapted)
    adapted.save_pretrained(tmp_path)
    tensors = {}
    for key, value in load_file(tmp_path / "adapter_model.safetensors").items():
        name, _, part = key.removeprefix("base_model.model.").rpartition(".")
        name = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{name}.{part}": value, f"{name}.alpha": torch.tensor(2.0)}
    for name in {key.split(".")[0] for key in tensors}:         # PEFT also scales two whole matrices, by alpha / r
        if {f"{name}.lokr_w1", f"{name}.lokr_w2"} <= set(tensors):
            tensors[f"{name}.lokr_w1"] = tensors[f"{name}.lokr_w1"] * 2 / 3
    path = Path(tmp_path / "cat.safetensors")
    save_file(tensors, path)
    check(ours, read_lora(path, ours), theirs)
