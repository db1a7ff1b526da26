"""Small random models that many tests share."""

import os
import sys
from collections import Counter

import pytest
import torch

# One thread for each worker, also in the commands that it starts: more would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

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


TRIED: Counter = Counter()                  # what test_fuzz.py and test_survival.py tried, in all processes


def tried_here() -> dict[str, int]:
    fuzz = sys.modules.get("tests.test_fuzz")
    return {} if fuzz is None else dict(fuzz.TRIED)


def pytest_sessionfinish(session):
    """A worker of pytest-xdist hands over what it counted."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = tried_here()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    TRIED.update(getattr(node, "workeroutput", {}).get("tried", {}))


def pytest_terminal_summary(terminalreporter):
    TRIED.update(tried_here())
    if TRIED:
        listed = ", ".join(f"{count} {kind}" for kind, count in TRIED.items())
        terminalreporter.write_line(f"hostile inputs tried: {TRIED.total()} ({listed})")
