"""Small random models that many tests share."""

import sys

import pytest
import torch

import cli  # noqa: F401  before anything is computed: it asks MKL for the same bytes every time
from unet import UNet, UNetConfig

TINY_UNET = UNetConfig(block_out_channels=(32, 64), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",) * 2,
                       up_block_types=("CrossAttnUpBlock2D",) * 2, cross_attention_dim=32, attention_head_dim=4,
                       norm_num_groups=8, sample_size=16)


@pytest.fixture
def tiny_unet() -> UNet:
    torch.manual_seed(0)
    return UNet(TINY_UNET).eval().requires_grad_(False)


@pytest.fixture
def tiny_text():
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(1)
    return CLIPTextModel(CLIPTextConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=4, max_position_embeddings=77)).eval().requires_grad_(False)


def pytest_terminal_summary(terminalreporter):
    """How many inputs test_fuzz.py tried."""
    fuzz = sys.modules.get("tests.test_fuzz")
    if fuzz is not None and fuzz.TRIED:
        listed = ", ".join(f"{count} {kind}" for kind, count in fuzz.TRIED.items())
        terminalreporter.write_line(f"hostile inputs tried: {fuzz.TRIED.total()} ({listed})")
