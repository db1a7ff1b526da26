"""LoRA files of every format against float64 written out by hand, the layers, and the message of every error."""

import hashlib
import json
import math
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPTextConfig, CLIPTextModel

from lora import LoRA, LoRAConv2d, attach, merged_weights
from unet import UNet, UNetConfig
from weights import find_lora, load_model
from weights.lora import read_lora, read_pickle

GOLDEN = Path(__file__).parent / "golden"
TINY = UNetConfig(block_out_channels=(32, 64, 64, 64), norm_num_groups=8, cross_attention_dim=32, attention_head_dim=8)
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
# module name -> what kohya writes in LDM's block names (SD 1.5's own numbering, by hand)
LDM = {
    "conv_in": "input_blocks_0_0", "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0", "time_embedding.linear_2": "time_embed_2",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_1_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0": "input_blocks_2_1_transformer_blocks_0_attn2_to_out_0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.1.resnets.0.time_emb_proj": "input_blocks_4_0_emb_layers_1",
    "down_blocks.2.attentions.1.proj_in": "input_blocks_8_1_proj_in",
    "down_blocks.3.resnets.1.conv1": "input_blocks_11_0_in_layers_2",
    "mid_block.resnets.0.conv1": "middle_block_0_in_layers_2",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": "middle_block_1_transformer_blocks_0_ff_net_0_proj",
    "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_1_conv", "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
    "up_blocks.3.attentions.2.proj_out": "output_blocks_11_1_proj_out",
    "up_blocks.2.attentions.0.transformer_blocks.0.ff.net.2": "output_blocks_6_1_transformer_blocks_0_ff_net_2",
}
ATTENTION = {f"{BLOCK}.{attn}.{leaf}": f"{BLOCK}.{attn}.processor.{leaf.removesuffix('.0')}"
             for attn in ("attn1", "attn2") for leaf in ("to_q", "to_k", "to_v", "to_out.0")}
TEXT = [f"text_model.encoder.layers.{n}.{leaf}" for n in (0, 1)
        for leaf in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(TINY).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def text() -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                            bos_token_id=1, eos_token_id=2)
    return CLIPTextModel(config).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def clean(unet):
    yield
    attach(unet, [])


def weight_of(module: nn.Module, name: str) -> Tensor:
    if hasattr(module, "text_model") or not name.startswith("text_model."):
        return module.get_submodule(name).weight
    return module.get_submodule(name.removeprefix("text_model.")).weight


def random_factors(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """(down, up) of the size that nearly doubles the weight, so that mistakes show."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *weight.shape[1:], generator=generator) / math.prod(weight.shape[1:]) ** 0.5
    up = torch.randn(len(weight), rank, generator=generator) * 0.3
    return down, up.view(*up.shape, *[1] * (weight.dim() - 2))


def by_hand(down: Tensor, up: Tensor, scale: float, weight: Tensor) -> Tensor:
    return (scale * up.double().flatten(1) @ down.double().flatten(1)).view(weight.shape)


def change(lora: LoRA, module: nn.Module, name: str, which: str = "unet") -> Tensor:
    """W' - W of one layer, through merged_weights."""
    short = name if which == "unet" or hasattr(module, "text_model") else name.removeprefix("text_model.")
    return merged_weights(module, [(lora, 1.0)], which)[f"{short}.weight"].double() - weight_of(module, name).double()


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return path


def flat(name: str) -> str:
    return name.replace(".", "_")


# How each format names a layer's down and up (and alpha), for the UNet and the text encoder
FORMATS = {
    "kohya": (LDM, lambda n: f"lora_unet_{flat(n)}.lora_down.weight", lambda n: f"lora_te_{flat(n)}.lora_down.weight"),
    "kohya te1": (ATTENTION, lambda n: f"lora_unet_{flat(n)}.lora_down.weight",
                  lambda n: f"lora_te1_{flat(n)}.lora_down.weight"),
    "kohya ldm": (LDM, lambda n: f"lora_unet_{LDM[n]}.lora_down.weight", lambda n: f"lora_te_{flat(n)}.lora_down.weight"),
    "peft ldm": (LDM, lambda n: f"diffusion_model.{re.sub(r'(?<=[a-z])_(?=[0-9])|(?<=[0-9])_', '.', LDM[n])}.lora_A.weight",
                 lambda n: f"text_encoder.{n}.lora_A.weight"),
    "comfyui": (LDM, lambda n: FORMATS["peft ldm"][1](n).replace("lora_A", "lora_down"),
                lambda n: f"text_encoders.clip_l.transformer.{n}.lora_down.weight"),
    "kohya with dots": (LDM, lambda n: f"lora_unet.{n}.lora_down.weight", lambda n: f"lora_te.{n}.lora_down.weight"),
    "diffusers old": (ATTENTION, lambda n: f"unet.{ATTENTION[n]}_lora.down.weight",
                      lambda n: f"text_encoder.{n.replace('_proj', '').replace('attn.', 'attn.to_')}_lora.down.weight"
                      if "attn" in n else f"text_encoder.{n}.lora_linear_layer.down.weight"),
    "diffusers bare": (ATTENTION, lambda n: f"{ATTENTION[n]}_lora.down.weight",
                       lambda n: f"text_encoder.{n}.lora.down.weight"),
    "diffusers": (LDM, lambda n: f"unet.{n}.lora.down.weight", lambda n: f"text_encoder.{n}.lora_linear_layer.down.weight"),
    "peft": (LDM, lambda n: f"unet.{n}.lora_A.weight", lambda n: f"text_encoder.{n}.lora_A.weight"),
    "peft default": (LDM, lambda n: f"base_model.model.{n}.lora_A.default.weight",
                     lambda n: f"base_model.model.{n}.lora_A.weight"),
    "peft prefix": (LDM, lambda n: f"unet.base_model.model.{n}.lora_A.weight",
                    lambda n: f"text_encoder.base_model.model.{n.removeprefix('text_model.')}.lora_A.weight"),
}


def make(format: str, unet: nn.Module, text: nn.Module, alpha: float | None = 3.0, rank: int = 4
         ) -> tuple[dict[str, Tensor], dict[tuple[str, str], Tensor]]:
    """(file contents, {(half, module name): the change by hand}) of one LoRA in this format."""
    names, unet_key, text_key = FORMATS[format]
    tensors, expected = {}, {}
    for seed, (half, name) in enumerate([*(("unet", n) for n in names), *(("text_encoder", n) for n in TEXT)]):
        weight = weight_of(unet if half == "unet" else text, name)
        r = rank + seed % 2                                         # ranks differ within a file
        down, up = random_factors(weight, r, seed)
        key = (unet_key if half == "unet" else text_key)(name)
        tensors[key] = down
        tensors[key.replace("lora_down", "lora_up").replace(".down.", ".up.").replace("lora_A", "lora_B")] = up
        if alpha is not None:
            stem = key.split(".lora_")[0].split(".lora.")[0].removesuffix(".down.weight")
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        expected[half, name] = by_hand(down, up, 1.0 if alpha is None else alpha / r, weight)
    return tensors, expected


@pytest.mark.parametrize("alpha", [3.0, None])
@pytest.mark.parametrize("format", FORMATS)
def test_every_naming(format, alpha, unet, text, tmp_path):
    tensors, expected = make(format, unet, text, alpha)
    lora = read_lora(save(tmp_path / "cat.safetensors", tensors), unet, text)
    assert {("unet", n) for n in lora.unet} | {("text_encoder", n) for n in lora.text_encoder} == set(expected)
    assert lora.name == "cat" and lora.format.startswith(format.split()[0]) and lora.ranks == (4, 5)
    for (half, name), delta in expected.items():
        assert relative(change(lora, unet if half == "unet" else text, name, half), delta) < 1e-5, name


def test_text_encoder_of_transformers_4(unet, text, tmp_path):
    class Old(nn.Module):               # its modules began with text_model., as they still do where 4 is installed
        def __init__(self):
            super().__init__()
            self.text_model = getattr(text, "text_model", text)
    tensors, expected = make("kohya", unet, text)
    lora = read_lora(save(tmp_path / "cat.safetensors", tensors), unet, Old())
    assert sorted(lora.text_encoder) == sorted(TEXT)
    merged = merged_weights(Old(), [(lora, 1.0)])
    assert set(merged) == {f"{name}.weight" for name in TEXT}
    delta = merged[f"{TEXT[0]}.weight"].double() - weight_of(text, TEXT[0]).double()
    assert relative(delta, expected["text_encoder", TEXT[0]]) < 1e-5


def test_without_a_text_encoder_that_half_is_left_unread(unet, text, tmp_path):
    tensors, _ = make("kohya", unet, text)
    lora = read_lora(save(tmp_path / "cat.safetensors", tensors), unet, None)
    assert not lora.text_encoder and len(lora.unet) == len(LDM)


def test_a_small_alpha_costs_half_precision_nothing(unet, text, tmp_path):
    """kohya's default, alpha 1, at a high rank: 1/128 of `up` would lie where float16 has few digits."""
    name = next(iter(ATTENTION))
    weight = unet.get_submodule(name).weight
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(128, weight.shape[1], generator=generator) * 0.03
    up = (torch.randn(weight.shape[0], 128, generator=generator) * 3e-4).half().float()
    key = f"lora_unet_{flat(name)}"
    path = save(tmp_path / "cat.safetensors", {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up,
                                               f"{key}.alpha": torch.tensor(1.0)})
    layer = read_lora(path, unet, text).unet[name]
    assert relative(layer.up.half().float() @ layer.down.half().float(), up @ down / 128) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_other_precisions(dtype, unet, text, tmp_path):
    tensors, _ = make("kohya", unet, text)
    path = save(tmp_path / "cat.safetensors", {key: value.to(dtype) for key, value in tensors.items()})
    lora, name = read_lora(path, unet, text), next(iter(LDM))
    down, up = (tensors[f"lora_unet_{flat(name)}.lora_{part}.weight"].to(dtype) for part in ("down", "up"))
    assert lora.unet[name].down.dtype == torch.float32
    assert relative(change(lora, unet, name), by_hand(down, up, 3 / 4, unet.conv_in.weight)) < 1e-5


def test_pickles_of_tensors_alone(unet, text, tmp_path):
    tensors, expected = make("diffusers old", unet, text)
    for legacy, content in ((False, tensors), (True, tensors), (False, {"state_dict": tensors, "epoch": 3})):
        torch.save(content, tmp_path / "cat.bin", _use_new_zipfile_serialization=not legacy)
        lora = read_lora(tmp_path / "cat.bin", unet, text)
        name = next(iter(ATTENTION))
        assert relative(change(lora, unet, name), expected["unet", name]) < 1e-5


# --- alpha of PEFT files -------------------------------------------------------------------------------------------

def peft_file(folder: Path, unet: nn.Module, key: str, metadata: dict[str, str] | None = None
              ) -> tuple[Path, dict[str, Tensor]]:
    tensors, deltas = {}, {}
    for seed, name in enumerate(ATTENTION):
        down, up = random_factors(weight_of(unet, name), 4, seed)
        tensors |= {key.format(name, "A"): down, key.format(name, "B"): up}
        deltas[name] = by_hand(down, up, 1.0, weight_of(unet, name))
    return save(folder / "adapter_model.safetensors", tensors, metadata), deltas


@pytest.mark.parametrize("config, scale", [
    ({"r": 4, "lora_alpha": 6}, 6 / 4), ({"lora_alpha": 6, "use_rslora": True}, 6 / 2), ({}, 1.0),
    ({"lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 1, "to_k": 2, f"^{BLOCK}.attn2.to_q": 12, "^to_v": 99}}, None)])
@pytest.mark.parametrize("place", ["metadata", "of the UNet alone", "beside"])
def test_alpha_from_peft_settings(place, config, scale, unet, tmp_path):
    if place == "metadata":
        note = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()} | {"unet.r": 4})}
        path, deltas = peft_file(tmp_path, unet, "unet.{}.lora_{}.weight", note)
    elif place == "of the UNet alone":              # as diffusers' UNet.save_lora_adapter writes it
        note = {"lora_adapter_metadata": json.dumps(config | {"r": 4})}
        path, deltas = peft_file(tmp_path, unet, "{}.lora_{}.weight", note)
    else:
        path, deltas = peft_file(tmp_path, unet, "base_model.model.{}.lora_{}.weight")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lora = read_lora(path, unet)
    for name, delta in deltas.items():
        alphas = {"attn1.to_q": 1, "attn1.to_k": 2, "attn2.to_k": 2, "attn2.to_q": 12}
        own = scale or alphas.get(name[len(BLOCK) + 1:], 6) / 4
        assert relative(change(lora, unet, name), delta * own) < 1e-5


@pytest.mark.parametrize("alpha", [torch.tensor(2), torch.tensor([2]), torch.tensor([2.0])])
def test_alpha_of_other_shapes_and_kinds(alpha, unet, tmp_path):
    tensors = pair() | {f"{Q}.alpha": alpha}
    plain = read_lora(save(tmp_path / "a.safetensors", pair() | {f"{Q}.alpha": torch.tensor(1.0)}), unet)
    lora = read_lora(save(tmp_path / "b.safetensors", tensors), unet)
    assert all(torch.equal(lora.unet[name].down, 2 * plain.unet[name].down) for name in plain.unet)


@pytest.mark.parametrize("pattern", ["down_blocks.*to_q", r".*\.to_q", "(a+)+$", "attn1|attn2"])
def test_alpha_by_regular_expressions_is_refused(pattern, unet, tmp_path):
    path, _ = peft_file(tmp_path, unet, "base_model.model.{}.lora_{}.weight")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "alpha_pattern": {pattern: 64}}))
    assert f"the pattern {pattern!r} in alpha_pattern" in refused(path, unet)


def test_lycoris_own_prefix(unet, tmp_path):
    tensors = {f"lycoris_{flat(LINEAR)}.lora_{part}.weight": torch.ones(shape)
               for part, shape in (("down", (2, 64)), ("up", (64, 2)))}
    lora = read_lora(save(tmp_path / "a.safetensors", tensors), unet)
    assert lora.format == "lycoris LoRA" and len(lora.unet) == 1


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_adapters_that_also_changed_the_base_model_are_refused(start, unet, tmp_path):
    path, _ = peft_file(tmp_path, unet, "base_model.model.{}.lora_{}.weight")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "init_lora_weights": start}))
    assert f"was trained from {start}, which changes the base model" in refused(path, unet)
    for harmless in (True, False, "gaussian"):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "init_lora_weights": harmless}))
        assert read_lora(path, unet).unet


def test_settings_of_another_half_or_file_are_not_used(unet, tmp_path):
    path, deltas = peft_file(tmp_path, unet, "unet.{}.lora_{}.weight",
                             {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 9})})
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 7}')
    name = next(iter(deltas))
    assert relative(change(read_lora(path, unet), unet, name), deltas[name]) < 1e-5


# --- algorithms ----------------------------------------------------------------------------------------------------

LINEAR, WIDE, CONV1 = f"{BLOCK}.attn1.to_q", f"{BLOCK}.ff.net.0.proj", "down_blocks.1.resnets.0.conv_shortcut"
BIG3 = "down_blocks.1.resnets.0.conv1"          # [64, 32, 3, 3]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.4


def read_one(tmp_path: Path, unet: nn.Module, name: str, parts: dict[str, Tensor]) -> LoRA:
    return read_lora(save(tmp_path / "one.safetensors", {f"lora_unet_{flat(name)}.{k}": v for k, v in parts.items()}), unet)


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ijkl,ip,jr->prkl", core.double(), a.double(), b.double())


def test_locon_in_tucker_form(unet, tmp_path):
    parts = {"lora_down.weight": randn(5, 32, 1, 1, seed=1), "lora_up.weight": randn(64, 5, 1, 1, seed=2),
             "lora_mid.weight": randn(5, 5, 3, 3, seed=3), "alpha": torch.tensor(2.0)}
    up, down = parts["lora_up.weight"][:, :, 0, 0], parts["lora_down.weight"][:, :, 0, 0]
    delta = tucker(parts["lora_mid.weight"], up.T, down) * 2 / 5
    assert relative(change(read_one(tmp_path, unet, BIG3, parts), unet, BIG3), delta) < 1e-5


@pytest.mark.parametrize("name", [LINEAR, WIDE, CONV1, BIG3])
def test_a_layer_of_alpha_zero_does_nothing(name, unet, tmp_path):
    """As in diffusers, where its scaling is alpha / rank too (tests/parity)."""
    down, up = random_factors(weight_of(unet, name), 4, 0)
    lora = read_one(tmp_path, unet, name, {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(0.0)})
    assert not change(lora, unet, name).any()


@pytest.mark.parametrize("rank", [3, 20])                   # 9 ranks, and 400: more than the layer has
@pytest.mark.parametrize("name", [LINEAR, WIDE, CONV1, BIG3])
def test_loha(name, rank, unet, tmp_path):
    weight = weight_of(unet, name)
    out, inner = len(weight), weight[0].numel()
    a1, a2 = randn(out, rank, seed=1), randn(out, rank, seed=2)
    b1, b2 = randn(rank, inner, seed=3), randn(rank, inner, seed=4)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(2.0)}
    lora = read_one(tmp_path, unet, name, parts)
    delta = ((a1.double() @ b1.double()) * (a2.double() @ b2.double()) * 2 / rank).view(weight.shape)
    assert lora.format == "kohya LoHa" and lora.ranks[0] <= out
    assert relative(change(lora, unet, name), delta) < 1e-5


def test_loha_in_tucker_form(unet, tmp_path):
    sides = {n: (randn(3, 64, seed=n), randn(3, 32, seed=n + 5), randn(3, 3, 3, 3, seed=n + 9)) for n in (1, 2)}
    parts = {f"hada_{key}": value for n, (a, b, t) in sides.items()
             for key, value in ((f"w{n}_a", a), (f"w{n}_b", b), (f"t{n}", t))} | {"alpha": torch.tensor(2.0)}
    delta = tucker(sides[1][2], *sides[1][:2]) * tucker(sides[2][2], *sides[2][:2]) * 2 / 3
    assert relative(change(read_one(tmp_path, unet, BIG3, parts), unet, BIG3), delta) < 1e-5


@pytest.mark.parametrize("rank", [1, 3])
def test_lokr_in_tucker_form(rank, unet, tmp_path):
    """Of rank 1 too: the transpose of a single row has strides that not every function takes."""
    shapes = (rank, 16), (rank, 8), (rank, rank, 3, 3), (4, 4)
    a, b, core, first = (randn(*shape, seed=n) for n, shape in enumerate(shapes))
    parts = {"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": core, "alpha": torch.tensor(2.0)}
    delta = torch.kron(first.double()[:, :, None, None], tucker(core, a, b).contiguous()) * 2 / rank
    assert relative(change(read_one(tmp_path, unet, BIG3, parts), unet, BIG3), delta) < 1e-5


@pytest.mark.parametrize("first", ["whole", "factors"])
@pytest.mark.parametrize("name, second", [
    *((name, second) for name in (LINEAR, WIDE, CONV1, BIG3) for second in ("whole", "factors", "flattened")),
    (CONV1, "tucker"), (BIG3, "tucker")])       # linear layers have no Tucker form
def test_lokr(name, first, second, unet, tmp_path):
    weight = weight_of(unet, name)
    kernel = list(weight.shape[2:])
    a, c, r = 8, 4, 3
    b, d = len(weight) // a, weight.shape[1] // c
    parts, scale = {"alpha": torch.tensor(2.0)}, 2 / r
    if first == "whole":
        w1 = parts["lokr_w1"] = randn(a, c, seed=1)
    else:
        parts |= {"lokr_w1_a": randn(a, r, seed=1), "lokr_w1_b": randn(r, c, seed=2)}
        w1 = parts["lokr_w1_a"].double() @ parts["lokr_w1_b"].double()
    if second == "whole":
        w2 = parts["lokr_w2"] = randn(b, d, *kernel, seed=3)
        scale = 1.0 if first == "whole" else scale          # LyCORIS: nothing to divide by without a rank
    elif second == "tucker":
        parts |= {"lokr_w2_a": randn(r, b, seed=3), "lokr_w2_b": randn(r, d, seed=4)}
        parts["lokr_t2"] = randn(r, r, *kernel, seed=5)
        w2 = tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        parts |= {"lokr_w2_a": randn(b, r, seed=3), "lokr_w2_b": randn(r, d, *kernel, seed=4)}
        w2 = (parts["lokr_w2_a"].double() @ parts["lokr_w2_b"].double().flatten(1)).view(b, d, *kernel)
        if second == "flattened":
            parts["lokr_w2_b"] = parts["lokr_w2_b"].flatten(1)
    w1 = w1.double().view(a, c, *[1] * len(kernel))
    lora = read_one(tmp_path, unet, name, parts)
    assert lora.format == "kohya LoKr"
    assert relative(change(lora, unet, name), torch.kron(w1, w2.double().contiguous()) * scale) < 1e-5


def test_lokr_of_two_ranks(unet, tmp_path):
    """alpha is divided by the second factor's rank, as ComfyUI reads it: LyCORIS writes one rank in both."""
    parts = {"lokr_w1_a": randn(8, 2, seed=1), "lokr_w1_b": randn(2, 4, seed=2), "alpha": torch.tensor(2.0),
             "lokr_w2_a": randn(8, 5, seed=3), "lokr_w2_b": randn(5, 16, seed=4)}
    w1, w2 = (parts[f"lokr_w{n}_a"].double() @ parts[f"lokr_w{n}_b"].double() for n in (1, 2))
    assert relative(change(read_one(tmp_path, unet, LINEAR, parts), unet, LINEAR), torch.kron(w1, w2) * 2 / 5) < 1e-5


@pytest.mark.parametrize("form, key", [
    *((form, key) for form in ("flat", "column", "conv") for key in ("dora_scale", "lora_magnitude_vector.weight")),
    ("peft conv", "lora_magnitude_vector.weight")])     # of a dora_scale, [1, n] would mean columns
@pytest.mark.parametrize("name", [LINEAR, WIDE, CONV1, BIG3])
def test_dora(name, form, key, unet, tmp_path):
    weight = weight_of(unet, name).double()
    down, up = random_factors(weight, 4, 1)
    length = randn(len(weight), seed=2).abs() + 0.2
    shaped = length.view({"flat": [-1], "column": [-1, 1], "conv": [-1, 1, 1, 1], "peft conv": [1, -1, 1, 1]}[form])
    parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0), key: shaped}
    lora = read_one(tmp_path, unet, name, parts)
    new = weight + by_hand(down, up, 2 / 4, weight)
    new = new * (length.double() / new.flatten(1).norm(dim=1)).view(-1, *[1] * (weight.dim() - 1))
    assert lora.format == "kohya DoRA"
    assert relative(change(lora, unet, name), new - weight) < 1e-5
    merged = merged_weights(unet, [(lora, 0.4)], "unet")[f"{name}.weight"]
    assert relative(merged.double() - weight, 0.4 * (new - weight)) < 1e-5


@pytest.mark.parametrize("name", [LINEAR, WIDE, CONV1, BIG3])
def test_dora_of_columns(name, unet, tmp_path):
    weight = weight_of(unet, name).double()
    down, up = random_factors(weight, 4, 1)
    length = randn(1, weight.shape[1], *[1] * (weight.dim() - 2), seed=2).abs() + 0.2
    lora = read_one(tmp_path, unet, name, {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": length})
    new = weight + by_hand(down, up, 1.0, weight)
    norms = new.pow(2).sum(dim=[n for n in range(new.dim()) if n != 1], keepdim=True).sqrt()
    assert relative(change(lora, unet, name), new * length.double() / norms - weight) < 1e-5


@pytest.mark.parametrize("name", [LINEAR, WIDE, CONV1, BIG3])
@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_dora_of_other_algorithms(kind, name, unet, tmp_path):
    weight = weight_of(unet, name).double()
    out, inner = len(weight), weight[0].numel()
    if kind == "LoHa":
        a, b = [randn(out, 3, seed=n) for n in (1, 2)], [randn(3, inner, seed=n) for n in (3, 4)]
        parts = {f"hada_w{n + 1}_{side}": one[n] for n in (0, 1) for side, one in (("a", a), ("b", b))}
        delta = (a[0].double() @ b[0].double()) * (a[1].double() @ b[1].double()) * 2 / 3
    else:
        parts = {"lokr_w1": randn(8, 4, seed=1), "lokr_w2_a": randn(out // 8, 3, seed=2),
                 "lokr_w2_b": randn(3, weight.shape[1] // 4, *weight.shape[2:], seed=3)}
        w2 = (parts["lokr_w2_a"].double() @ parts["lokr_w2_b"].double().flatten(1)).view(out // 8, -1, *weight.shape[2:])
        delta = torch.kron(parts["lokr_w1"].double().view(8, 4, *[1] * (weight.dim() - 2)), w2.contiguous()) * 2 / 3
    length = randn(out, 1, *[1] * (weight.dim() - 2), seed=7).abs() + 0.2
    lora = read_one(tmp_path, unet, name, {**parts, "alpha": torch.tensor(2.0), "dora_scale": length})
    new = weight + delta.view(weight.shape)
    new = new * (length.flatten().double() / new.flatten(1).norm(dim=1)).view(-1, *[1] * (weight.dim() - 1))
    assert relative(change(lora, unet, name), new - weight) < 1e-5


# --- layers --------------------------------------------------------------------------------------------------------

@pytest.fixture
def several(unet, text, tmp_path) -> list[LoRA]:
    """A LoRA on all kinds of layers, a LoKr, a DoRA and a LoRA on attention alone."""
    loras = [read_lora(save(tmp_path / "a.safetensors", make("kohya", unet, text)[0]), unet, text)]
    parts = {"lokr_w1": randn(8, 4, seed=1), "lokr_w2_a": randn(8, 3, seed=3), "lokr_w2_b": randn(3, 8, 3, 3, seed=4),
             "alpha": torch.tensor(2.0)}
    loras.append(read_one(tmp_path, unet, BIG3, parts))
    tensors = make("kohya", unet, text, rank=2)[0]
    for name in LDM:
        size = len(weight_of(unet, name))
        tensors[f"lora_unet_{flat(name)}.dora_scale"] = randn(size, 1, seed=size).abs() + 0.5
    loras.append(read_lora(save(tmp_path / "c.safetensors", tensors), unet, text))
    loras.append(read_lora(save(tmp_path / "d.safetensors", make("diffusers old", unet, text, rank=1)[0]), unet, text))
    return loras


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return randn(rows, 4, 16, 24, seed=1), torch.arange(rows) * 100 + 1, randn(rows, 7, 32, seed=2)


def test_rows_of_one_batch_equal_merged_models(unet, several):
    strengths = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0.5], [0.7, 0.2, 0.3, -1]])
    x, t, context = inputs(len(strengths))
    attach(unet, several)
    together = unet(x, t, context, strengths)[0]
    attach(unet, [])
    for row, strength in enumerate(strengths.tolist()):
        merged = merged_weights(unet, list(zip(several, strength)), "unet")
        alone = functional_call(unet, merged, (x[row:row + 1], t[row:row + 1], context[row:row + 1]))[0]
        assert relative(together[row:row + 1], alone) < 1e-5, row
        if row:
            assert relative(together[row:row + 1], unet(x[row:row + 1], t[row:row + 1], context[row:row + 1])[0]) > 1e-3


def test_base_rows_are_equal_to_the_last_bit(unet, several):
    x, t, context = inputs(4)
    plain = unet(x, t, context)[0]
    attach(unet, several)
    strengths = torch.zeros(4, 4)
    assert torch.equal(unet(x, t, context, strengths)[0], plain)
    strengths[2] = 1
    changed = unet(x, t, context, strengths)[0]
    assert torch.equal(changed[[0, 1, 3]], plain[[0, 1, 3]]) and not torch.equal(changed[2], plain[2])


def test_attach_leaves_the_state_dict_and_detaches(unet, several):
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    x, t, context = inputs(1)
    plain = unet(x, t, context)[0]
    attach(unet, several)
    after = unet.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    attach(unet, several[1:2])
    assert unet.conv_in.down is None and unet.get_submodule(BIG3).down is not None
    attach(unet, [])
    assert torch.equal(unet(x, t, context)[0], plain)
    assert all(getattr(module, "down", None) is None for module in unet.modules())


def test_attach_to_a_half_precision_unet(unet, several):
    half = UNet(TINY).eval().requires_grad_(False)
    half.load_state_dict(unet.state_dict())
    half.to(torch.bfloat16)
    attach(half, several)
    assert half.conv_in.down.dtype == half.conv_in.gain.dtype == torch.bfloat16
    assert merged_weights(half, [(several[2], 1.0)], "unet")["conv_in.weight"].dtype == torch.bfloat16


def test_attach_to_another_model_is_refused(several):
    small = UNet(UNetConfig(block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D",) * 2, norm_num_groups=8,
                            up_block_types=("CrossAttnUpBlock2D",) * 2, cross_attention_dim=32, attention_head_dim=8))
    with pytest.raises(ValueError, match="has no layer"):
        attach(small, several)


def in_float64(conv: LoRAConv2d, x: Tensor) -> Tensor:
    return nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double(), conv.stride, conv.padding)


@pytest.mark.parametrize("rows, size", [(1, (6, 6)), (3, (5, 9)), (2, (1, 1)), (1, (22, 23))])
def test_kernels_larger_than_the_picture_are_read_as_they_lie(rows, size, monkeypatch):
    """The matrix product that stands for such a convolution: the same result, and for the same gradient."""
    torch.manual_seed(0)
    conv = LoRAConv2d(512, 24, 3, padding=1).to(memory_format=torch.channels_last).requires_grad_(False)
    x = torch.randn(rows, 512, *size, requires_grad=True)
    weights = torch.randn(rows, 24, *size)
    expected = in_float64(conv, x)
    gradient, = torch.autograd.grad((expected * weights).sum(), x)
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", None)          # else this could be any convolution
    out = conv(x)
    ours, = torch.autograd.grad((out * weights).sum(), x)
    assert out.shape == expected.shape and relative(out, expected) < 1e-6 and relative(ours, gradient) < 1e-6
    assert torch.equal(conv(x.to(memory_format=torch.channels_last)), out)


def test_other_convolutions_stay_as_they_are(monkeypatch):
    """Strides, no padding, kernels in the published layout, few channels, large pictures: all at nn.Conv2d."""
    calls: list[int] = []
    plain = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda *inputs: calls.append(1) or plain(*inputs))
    lying = {"memory_format": torch.channels_last}
    for conv, size in ((LoRAConv2d(512, 8, 3, stride=2, padding=1).to(**lying), 6), (LoRAConv2d(512, 8, 3).to(**lying), 6),
                       (LoRAConv2d(512, 8, 1).to(**lying), 6), (LoRAConv2d(512, 8, 3, padding=1), 6),
                       (LoRAConv2d(64, 8, 3, padding=1).to(**lying), 4), (LoRAConv2d(512, 8, 3, padding=1).to(**lying), 23)):
        x = torch.randn(1, conv.in_channels, size, size)
        with torch.no_grad():
            assert relative(conv(x), in_float64(conv, x)) < 1e-5
    assert len(calls) == 6


def test_gradient_reaches_the_latents_through_adapters(unet, several):
    x, t, context = inputs(2)
    attach(unet, several)
    x.requires_grad_()
    unet(x, t, context, torch.tensor([[1.0, 0, 0, 0], [0, 0, 1.0, 0]]))[0].square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.flatten(1).norm(dim=1).min() > 0


# --- recorded outputs of another implementation (tests/golden/README.md) -------------------------------------------

@pytest.fixture(scope="module")
def golden():
    return load_model(GOLDEN / "model"), load_file(GOLDEN / "probes.safetensors")


@pytest.mark.parametrize("probe, rows", [
    ("base", {}), ("cat", {"cat": 1.0}), ("dog", {"dog": 1.0}), ("style", {"style": 1.0}),
    ("cat_w05", {"cat": 0.5}), ("cat_style08", {"cat": 1.0, "style": 0.8})])
@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_recorded_probes(form, probe, rows, golden):
    model, probes = golden
    loras = [read_lora(GOLDEN / f"loras/{name}_{form}.safetensors", model.unet, model.text.model) for name in rows]
    attach(model.unet, loras)
    strengths = torch.tensor([list(rows.values())] * 2).view(2, -1)
    with torch.no_grad():
        noise = model.unet(probes["x"], probes["t"], probes["ctx"], strengths)[0]
        merged = merged_weights(model.text.model, list(zip(loras, rows.values())))
        hidden = functional_call(model.text.model, merged, (probes["input_ids"],)).last_hidden_state
    attach(model.unet, [])
    # The recorded float32 is itself up to 1.6e-5 (cat_style08) away from the same model in float64.
    assert relative(noise, probes[f"unet_{probe}"]) < 3e-5
    assert relative(hidden, probes[f"te_{probe}"]) < 1e-5


# --- errors --------------------------------------------------------------------------------------------------------

Q = f"lora_unet_{flat(LINEAR)}"
K2 = f"lora_unet_{flat(BLOCK)}_attn2_to_k"


def pair(key: str = Q, inner: int = 64, out: int = 64, rank: int = 4) -> dict[str, Tensor]:
    return {f"{key}.lora_down.weight": torch.ones(rank, inner), f"{key}.lora_up.weight": torch.ones(out, rank)}


def without(tensors: dict[str, Tensor], end: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if not key.endswith(end)}


NAN = torch.tensor([[math.nan] + [0.0] * 63] * 4)
BAD_FILES = {
    "SDXL by its second text encoder": (pair() | pair("lora_te2_text_model_encoder_layers_0_self_attn_q_proj"),
                                        ["LoRA for SDXL, this model is SD 1.5", "lora_te2_text"]),
    "SDXL by width": (pair(K2, inner=2048), ["LoRA for SDXL, this model is SD 1.5", f"{K2}.lora_down.weight", "2048"]),
    "SDXL by depth": (pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q"), ["LoRA for SDXL"]),
    "SDXL by depth, LDM": (pair("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"), ["LoRA for SDXL"]),
    "SDXL, PEFT": ({f"unet.{BLOCK}.attn2.to_k.lora_A.weight": torch.ones(4, 2048),
                    f"unet.{BLOCK}.attn2.to_k.lora_B.weight": torch.ones(64, 4)}, ["LoRA for SDXL"]),
    "SDXL, and incomplete": (without(pair(K2, inner=2048), "up.weight"), ["LoRA for SDXL"]),
    "SD 2": (pair(K2, inner=1024), ["LoRA for SD 2, this model is SD 1.5", "1024"]),
    "Flux": (pair("lora_unet_double_blocks_0_img_attn_qkv"), ["Flux", "this model is SD 1.5"]),
    "Flux, diffusers": (pair("transformer.transformer_blocks.1.attn.to_q"), ["Flux"]),
    "SD 1.5's width in another model": (pair(K2, inner=768), [f"{K2}.lora_down.weight has shape [4, 768]", "needs [4, 32]"]),
    "up of another shape": (pair(out=32), [f"{Q}.lora_up.weight has shape [32, 4]", "needs [64, 4]"]),
    "ranks that differ": (pair() | {f"{Q}.lora_up.weight": torch.ones(64, 5)}, [f"{Q}.lora_up.weight has shape [64, 5]"]),
    "3x3 for a linear layer": (pair() | {f"{Q}.lora_down.weight": torch.ones(4, 64, 3, 3)}, ["has shape [4, 64, 3, 3]"]),
    "rank 0": (pair(rank=0), ["has shape [0, 64]", "damaged"]),
    "down without up": (without(pair(), "up.weight") | {f"{Q}.alpha": torch.tensor(1.0)},
                        [f"{Q}.lora_down.weight has no up", "incomplete"]),
    "up without down": (without(pair(), "down.weight"), [f"{Q}.lora_up.weight has no down"]),
    "alpha alone": (pair() | {f"{K2}.alpha": torch.tensor(1.0)}, [f"{K2}.alpha has no down"]),
    "alpha of two numbers": (pair() | {f"{Q}.alpha": torch.ones(2)}, [f"{Q}.alpha has shape [2]"]),
    "unknown layers": (pair() | {f"lora_unet_nowhere_{n}.lora_down.weight": torch.ones(1) for n in range(5)},
                       ["5 of 7 keys match nothing", "nowhere_0.lora_down.weight, ", "nowhere_2.lora_down.weight, ..."]),
    "an unknown part": (pair() | {f"{Q}.lora_left.weight": torch.ones(1)}, ["1 of 3 keys match nothing", f"{Q}.lora_left"]),
    "OFT": ({f"{Q}.oft_blocks": torch.ones(4, 16, 16), f"{Q}.alpha": torch.tensor(1.0)}, ["holds OFT", f"{Q}.oft_blocks"]),
    "OFT alone, PEFT": ({f"unet.{LINEAR}.oft_R.weight": torch.ones(4, 120)}, ["holds OFT", "oft_R"]),
    "OFT with dashes": ({f"{Q}.oft_diag": torch.ones(4)}, ["holds OFT"]),
    "IA3 alone": ({f"{K2}.weight": torch.ones(64), f"{K2}.on_input": torch.tensor(False)}, ["holds IA3", "on_input"]),
    "IA3 alone, PEFT": ({f"unet.{LINEAR}.ia3_l": torch.ones(64, 1)}, ["holds IA3", "ia3_l"]),
    "VeRA alone": ({f"unet.{LINEAR}.vera_lambda_b": torch.ones(64)}, ["holds VeRA"]),
    "differences alone": ({f"{K2}.diff": torch.ones(64, 32)}, ["holds differences of layers"]),
    "a name of its own": ({f"unet.{LINEAR}.lora_{x}.cat.weight": torch.ones(4, 4) for x in "AB"}, ["PEFT adapter", "A.cat"]),
    "a scalar": (pair() | {f"{Q}.scalar": torch.tensor(1.0)}, ["holds LyCORIS' scalar", f"{Q}.scalar"]),
    "motion": (pair() | pair("lora_unet_down_blocks_0_motion_modules_0_proj_in"), ["AnimateDiff"]),
    "the VAE": (pair() | pair("lora_vae_decoder_conv_in"), ["layers of the VAE", "lora_vae"]),
    "SDXL's size": (pair() | pair("lora_unet_add_embedding_linear_1"), ["SDXL"]),
    "an embedding beside": (pair() | {"bundle_emb.cat.clip_l": torch.ones(2, 8)}, ["holds embeddings"]),
    "Wan": (pair("diffusion_model.blocks.0.self_attn.q"), ["a transformer model"]),
    "OFT, PEFT": (pair() | {f"unet.{LINEAR}.oft_R.weight": torch.ones(4, 120)}, ["holds OFT", "oft_R"]),
    "OFT, kohya": (pair() | {f"oft_unet_{flat(LINEAR)}.oft_blocks": torch.ones(4, 16, 16)}, ["holds OFT", "oft_unet"]),
    "IA3": (pair() | {f"{K2}.weight": torch.ones(64), f"{K2}.on_input": torch.tensor(False)},
            ["holds IA3", f"{K2}.on_input"]),
    "GLoRA": (pair() | {f"{K2}.{part}.weight": torch.ones(4, 4) for part in ("a1", "a2", "b1", "b2")},
              ["holds GLoRA", "a1"]),
    "a whole difference": (pair() | {f"{K2}.diff": torch.ones(64, 32)}, ["holds differences of layers", f"{K2}.diff"]),
    "a difference of a bias": (pair() | {f"{Q}.diff_b": torch.ones(64)}, ["holds differences of biases", f"{Q}.diff_b"]),
    "a bias, PEFT": (pair(f"unet.{LINEAR}") | {f"unet.{LINEAR}.lora_B.bias": torch.ones(64)}, ["biases", "lora_B.bias"]),
    "a norm": (pair() | {"lora_unet_conv_norm_out.w_norm": torch.ones(32), "lora_unet_conv_norm_out.b_norm": torch.ones(32)},
               ["holds differences of norms", "w_norm"]),
    "a token embedding": (pair() | {"lora_te_text_model_embeddings_token_embedding.lora_down.weight": torch.ones(4, 32),
                                    "lora_te_text_model_embeddings_token_embedding.lora_up.weight": torch.ones(50, 4)},
                          ["holds embeddings", "token_embedding"]),
    "a bundled embedding": (pair() | {"bundle_emb.sks.string_to_param.*": torch.ones(2, 768)},
                            ["holds embeddings", "bundle_emb"]),
    "factors whose product overflows": (
        pair() | {f"{Q}.lora_down.weight": torch.full((4, 64), 9.0), f"{Q}.alpha": torch.tensor(3e38)},
        ["give infinity", Q]),
    "complex alpha": (pair() | {f"{Q}.alpha": torch.tensor(1j)}, [f"{Q}.alpha cannot be read", "complex"]),
    "two names for one layer": (pair() | pair(f"unet.{LINEAR}"), ["are for the same layer", Q, f"unet.{LINEAR}"]),
    "LoHa with a part missing": ({f"{Q}.hada_w1_a": torch.ones(64, 2), f"{Q}.hada_w1_b": torch.ones(2, 64),
                                  f"{Q}.hada_w2_a": torch.ones(64, 2)}, ["has no hada_w2_b"]),
    "LoHa with one core": ({f"{Q}.hada_{key}": torch.ones(2, 64) for key in ("w1_a", "w1_b", "w2_a", "w2_b")}
                           | {f"{Q}.hada_t1": torch.ones(2, 2)}, [f"{Q}.hada_w2_a has shape"]),
    "LoKr that does not divide": ({f"{Q}.lokr_w1": torch.ones(7, 4), f"{Q}.lokr_w2": torch.ones(8, 16)},
                                  ["does not divide"]),
    "LoKr with a part missing": ({f"{Q}.lokr_w1": torch.ones(8, 8)}, [f"{Q}.lokr_w1 has no lokr_w2_b"]),
    "parts of two kinds": (pair() | {f"{Q}.lokr_w1": torch.ones(8, 8), f"{Q}.lokr_w2": torch.ones(8, 8)},
                           ["does not fit the other keys"]),
    "DoRA of another length": (pair() | {f"{Q}.dora_scale": torch.ones(63, 1)}, [f"{Q}.dora_scale has shape [63, 1]"]),
    "NaN": (pair() | {f"{Q}.lora_down.weight": NAN}, [f"{Q}.lora_down.weight holds NaN or infinity"]),
    "infinite alpha": (pair() | {f"{Q}.alpha": torch.tensor(math.inf)}, [f"{Q}.alpha holds NaN or infinity"]),
    "integers": (pair() | {f"{Q}.lora_down.weight": torch.ones(4, 64, dtype=torch.int8)}, [f"{Q}.lora_down.weight", "int8"]),
    "no keys": ({}, ["has no LoRA keys"]),
    "a checkpoint": ({f"model.diffusion_model.out.2.{part}": torch.ones(4) for part in ("weight", "bias")},
                     ["has no LoRA keys", "looks like a checkpoint"]),
    "a diffusers UNet": ({"conv_in.weight": torch.ones(4), "conv_in.bias": torch.ones(4)},
                         ["has no LoRA keys", "looks like a checkpoint"]),
    "Custom Diffusion": ({f"unet.{LINEAR}.processor.to_k_custom_diffusion.weight": torch.ones(4, 4)}, ["Custom Diffusion"]),
    "T-LoRA": ({f"{Q}.{part}_layer.weight": torch.ones(4, 4) for part in ("q", "p")}, ["T-LoRA"]),
    "a name without end": ({f"lora_unet_{'attn2to_k' * 60}.lora_down.weight": torch.ones(4, 4)}, ["than 500 characters"]),
    "a VAE": ({"encoder.conv_in.bias": torch.ones(4), "decoder.conv_in.bias": torch.ones(4)}, ["looks like a checkpoint"]),
    "a text encoder": ({"text_model.embeddings.token_embedding.weight": torch.ones(4, 4),
                        "text_model.encoder.layers.0.mlp.fc1.bias": torch.ones(4)}, ["looks like a checkpoint"]),
    "an embedding": ({"emb_params": torch.ones(2, 768)}, ["has no LoRA keys", "textual inversion embedding"]),
}


def refused(path: Path, unet: nn.Module, text: nn.Module | None = None) -> str:
    """The message of the ValueError, which is one line and names the file."""
    with pytest.raises(ValueError) as caught:
        read_lora(path, unet, text)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path)), message
    return message


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_are_refused(case, unet, text, tmp_path):
    tensors, words = BAD_FILES[case]
    message = refused(save(tmp_path / "bad.safetensors", tensors), unet, text)
    assert all(word in message for word in words), message


def header(claim: dict, length: int | None = None) -> bytes:
    text = json.dumps(claim).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


HUGE = {f"{Q}.lora_down.weight": {"dtype": "F32", "shape": [10**9, 64], "data_offsets": [0, 256 * 10**9]}}
BAD_BYTES = {
    "empty": (b"", "is empty"),
    "text": (b"a long line of text", "not a safetensors file"),
    "three bytes": (b"abc", "not a safetensors file"),
    "header longer than the file": (header({}, 10**6), "not a safetensors file"),
    "header of 2^60 bytes": (header({}, 2**60), "not a safetensors file"),
    "header that ends early": (header(HUGE, 20), "not a safetensors file"),
    "huge claimed shape": (header(HUGE) + bytes(64), "not a safetensors file"),
    "shape that overflows": (header({"x": {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 4]}}) + bytes(4),
                             "not a safetensors file"),
    "broken zip": (b"PK\x03\x04" + bytes(100), "damaged"),
    "broken pickle": (b"\x80\x02}q\x00", "damaged"),
    "bytes that are a pickle of nothing": (b"\x80\x02N.", "damaged"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "run git lfs pull"),
    "web page": (b"\n<!DOCTYPE html><html>", "is a web page"), "GGUF": (b"GGUF" + bytes(99), "GGUF"),
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_bytes_that_are_refused(case, unet, tmp_path):
    content, words = BAD_BYTES[case]
    (tmp_path / "bad.safetensors").write_bytes(content)
    assert words in refused(tmp_path / "bad.safetensors", unet)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_pickles_of_2022_hold_beside_tensors_is_ignored(legacy, unet, tmp_path):
    """SD 1.5's own .ckpt names a class of PyTorch Lightning, which need not be there, and numbers of NumPy."""
    import numpy as np
    module = type(sys)("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(sys.modules, name, module)
        content = {"state_dict": pair(), "callbacks": {module.ModelCheckpoint: {"best": np.float64(0.5), "at": {1, 2}}},
                   "saved": module.ModelCheckpoint(), "numbers": np.arange(3.0)}
        torch.save(content, tmp_path / "cat.ckpt", _use_new_zipfile_serialization=not legacy)
    tensors = read_pickle(tmp_path / "cat.ckpt")
    assert tensors.keys() == pair().keys() and all(torch.equal(value, pair()[key]) for key, value in tensors.items())


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapter_model.bin"])
def test_a_folder_of_a_training(name, tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / name).touch()
    assert find_lora(tmp_path) == tmp_path / name
    assert find_lora(tmp_path / "checkpoint-500") == tmp_path / "checkpoint-500"


def test_every_truncation_is_refused(unet, tmp_path):
    content = save(tmp_path / "good.safetensors", pair()).read_bytes()
    for size in range(0, len(content), 7):
        (tmp_path / "cut.safetensors").write_bytes(content[:size])
        refused(tmp_path / "cut.safetensors", unet)


def test_missing_file_and_folder(unet, tmp_path):
    assert "no such file" in refused(tmp_path / "none.safetensors", unet)
    assert "directory" in refused(tmp_path, unet)


def test_pickles_with_code_or_tricks_are_refused(unet, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)
    torch.save(pair() | {"x": Evil()}, tmp_path / "evil.pt")
    assert "would run code when loaded (__builtin__.getattr)" in refused(tmp_path / "evil.pt", unet)
    assert not (tmp_path / "ran").exists()
    torch.save(pair() | {f"{Q}.lora_down.weight": torch.ones(1, 1).expand(10**9, 64)}, tmp_path / "huge.pt")
    assert "lora_down.weight is not a plain tensor" in refused(tmp_path / "huge.pt", unet)
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    assert "no file of tensors" in refused(tmp_path / "list.pt", unet)


def test_damaged_peft_settings_are_refused(unet, tmp_path):
    path, _ = peft_file(tmp_path, unet, "unet.{}.lora_{}.weight", {"lora_adapter_metadata": "{"})
    assert "PEFT settings" in refused(path, unet)
    path, _ = peft_file(tmp_path, unet, "unet.{}.lora_{}.weight", {"lora_adapter_metadata": '{"unet.lora_alpha": "x"}'})
    assert "lora_alpha" in refused(path, unet)
    path, _ = peft_file(tmp_path, unet, "base_model.model.{}.lora_{}.weight")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOKR"}')
    assert "a PEFT adapter of the kind LOKR" in refused(path, unet)
    (tmp_path / "adapter_config.json").write_text('{"r": 64, "lora_alpha": 64, "task_type": "CAUSAL_LM", "peft_type": null}')
    assert "are of another LoRA: they say r = 64" in refused(path, unet)
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 64, "peft_type": null}')
    assert read_lora(path, unet).unet


def test_the_hash_is_of_the_file(unet, text, tmp_path):
    path = save(tmp_path / "cat.safetensors", make("kohya", unet, text)[0], {"ss_network_dim": "4"})
    lora = read_lora(path, unet, text)
    assert lora.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and lora.metadata == {"ss_network_dim": "4"}


def test_the_hash_follows_the_settings_beside_the_file(unet, tmp_path):
    path, _ = peft_file(tmp_path, unet, "base_model.model.{}.lora_{}.weight")
    hashes = [read_lora(path, unet).sha256]
    assert hashes == [hashlib.sha256(path.read_bytes()).hexdigest()]
    for alpha in (4, 32, 4):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        hashes.append(read_lora(path, unet).sha256)
    assert hashes[1] == hashes[3] and len(set(hashes)) == 3
