"""LoRA files of the formats that diffusers reads, loaded by diffusers and peft, against ours."""

import pytest
import torch
from safetensors.torch import load_file

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402

from lora import attach, read_lora  # noqa: E402
from tests.lora_files import make  # noqa: E402
from unet import UNet, UNetConfig  # noqa: E402


@pytest.mark.parametrize("form, conv", [("kohya", False), ("kohya", True), ("peft", True), ("down-up", True),
                                        ("processor", False)])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_unet_with_a_lora(form, conv, strength, tmp_path):
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(
        sample_size=16, cross_attention_dim=32, attention_head_dim=4, layers_per_block=1, norm_num_groups=8,
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2).eval()
    ours = UNet(UNetConfig.from_dict(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict())
    path = make(form, ours, rank=4, alpha=1.0, conv=conv).save(tmp_path / "a.safetensors")
    latents, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 32)

    state, alphas = StableDiffusionPipeline.lora_state_dict(load_file(path), unet_config=theirs.config)[:2]
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, theirs, adapter_name="a")
    theirs.set_adapters(["a"], [strength])
    attach(ours, [read_lora(path, ours)])
    with torch.no_grad():
        plain = ours(latents, 11, context)[0]
        expected = theirs(latents, 11, context).sample
        noise = ours(latents, 11, context, torch.full((2, 1), strength))[0]
    assert (expected - plain).norm() / plain.norm() > 0.02, "the LoRA must matter for this to test anything"
    assert ((noise - expected).norm() / expected.norm()).item() < 1e-5
