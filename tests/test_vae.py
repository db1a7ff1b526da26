"""vae.py: decoding in bands of rows. Parity with diffusers is in tests/parity/test_full_size.py."""

import pytest
import torch

from vae import VAE, VAEConfig


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
