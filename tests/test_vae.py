"""vae.py: decoding in bands of rows. Parity with diffusers is in tests/parity/test_full_size.py."""

import pytest
import torch

from vae import VAE, VAEConfig, norm_conv


@pytest.mark.parametrize("bands", [2, 3, 8, 1000])
@pytest.mark.parametrize("size", [(1, 3), (5, 4), (7, 9)])
@torch.no_grad()
def test_bands_give_the_same_picture(bands, size):
    torch.manual_seed(0)
    vae = VAE(VAEConfig(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4)).double().eval()
    for parameter in vae.parameters():                  # norms and biases too: at ones and zeros a mistake would hide
        parameter.add_(0.1 * torch.randn_like(parameter))
    latents = torch.randn(2, 4, *size, dtype=torch.float64)
    whole, banded = vae.decode(latents), vae.decode(latents, bands)
    assert banded.shape == (2, 3, 4 * size[0], 4 * size[1])
    assert ((whole - banded).norm() / whole.norm()).item() < 1e-12


@torch.no_grad()
def test_bands_are_as_exact_as_the_whole_in_bfloat16():
    torch.manual_seed(0)
    norm, conv, x = torch.nn.GroupNorm(32, 64), torch.nn.Conv2d(64, 8, 3, padding=1), torch.randn(1, 64, 32, 32) + 5
    x = x.bfloat16()
    for parameter in (*norm.parameters(), *conv.parameters()):
        parameter.copy_(parameter.bfloat16())
    exact = norm_conv(norm, conv, x.float())
    half = norm.bfloat16(), conv.bfloat16()
    whole, banded = (((norm_conv(*half, x, bands) - exact).norm() / exact.norm()).item() for bands in (1, 8))
    assert banded < 1.2 * whole < 0.01, "rounding to bfloat16 before the norm's scale is several times as far off"
