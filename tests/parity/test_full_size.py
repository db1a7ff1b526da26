"""UNet and VAE at full SD 1.5 size, random weights, against diffusers with explicit attention."""

import gc

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from unet import UNet, UNetConfig  # noqa: E402
from vae import VAE, VAEConfig  # noqa: E402


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def shake(module: torch.nn.Module) -> None:
    """Random norms and biases too: with the usual ones and zeros a swapped layer could pass."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        elif "to_q" in name or "to_k" in name:
            parameter.data.mul_(3)          # peaked attention, so that a wrong head order shows in the maps


class Explicit:
    """diffusers' attention written out, keeping the probabilities."""

    def __init__(self, name: str, kept: dict):
        self.name, self.kept = name, kept

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, **_):
        context = x if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (attn.head_to_batch_dim(layer(y)) for layer, y in
                             ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context)))
        probs = attn.get_attention_scores(query, key)                               # [B * H, N, T]
        if encoder_hidden_states is not None:
            self.kept[self.name] = probs.unflatten(0, (len(x), -1))
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(probs @ value)))


@pytest.fixture(scope="module")
def unets():
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, layers_per_block=2,
        block_out_channels=(320, 640, 1280, 1280)).eval()
    shake(theirs)
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_dict(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)      # strict: the names are the checkpoint's
    kept: dict = {}
    theirs.set_attn_processor({name: Explicit(name, kept) for name in theirs.attn_processors})
    yield ours, theirs, kept
    del ours, theirs
    gc.collect()


@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=["square", "wide"])
@torch.no_grad()
def test_unet_output_and_every_map(unets, size):
    ours, theirs, kept = unets
    generator = torch.Generator().manual_seed(1)
    latents, context = torch.randn(2, 4, *size, generator=generator), torch.randn(2, 77, 768, generator=generator)
    expected = theirs(latents, 421, context).sample
    names = tuple(name.removesuffix(".transformer_blocks.0.attn2.processor") for name in kept)
    assert len(names) == 16
    noise, maps = ours(latents, 421, context, maps_at=names)
    assert relative(noise, expected) < 1e-5
    for name in names:
        assert relative(maps[name], kept[f"{name}.transformer_blocks.0.attn2.processor"]) < 1e-5, name
    plain, none = ours(latents, torch.tensor([421, 421]), context)                  # fused attention everywhere
    assert relative(plain, expected) < 1e-5 and not none


@torch.no_grad()
def test_stopping_after_the_maps_gives_the_same_maps(unets):
    ours, _, _ = unets
    latents, context = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 768)
    layers = ours.map_layers(2)
    assert layers == ("down_blocks.2.attentions.0", "down_blocks.2.attentions.1", "up_blocks.1.attentions.0",
                      "up_blocks.1.attentions.1", "up_blocks.1.attentions.2")
    _, whole = ours(latents, 7, context, maps_at=layers)
    noise, short = ours(latents, 7, context, maps_at=layers, stop_after_maps=True)
    assert noise is None and all(torch.equal(whole[name], short[name]) for name in layers)


@pytest.mark.parametrize("levels", [3, 4])
@torch.no_grad()
def test_small_models_without_a_middle(levels):
    """tiny-sd and BK-SDM, in small: one layer a block, no middle, attention down to the last level where there are three."""
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(
        sample_size=64, cross_attention_dim=48, attention_head_dim=4, layers_per_block=1, mid_block_type=None,
        block_out_channels=(32, 64, 96, 96)[:levels], norm_num_groups=8,
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")[:levels],
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)[-levels:]).eval()
    shake(theirs)
    ours = UNet(UNetConfig.from_dict(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict())
    latents, context = torch.randn(2, 4, 16, 24), torch.randn(2, 77, 48)
    noise, maps = ours(latents, 421, context, maps_at=ours.map_layers(2))
    assert relative(noise, theirs(latents, 421, context).sample) < 1e-5
    assert {probs.shape[2] for probs in maps.values()} == {4 * 6} and len(maps) == 3


@torch.no_grad()
def test_vae_encode_and_decode():
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4).eval()
    shake(theirs)
    ours = VAE(VAEConfig.from_dict(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict())
    generator = torch.Generator().manual_seed(1)
    picture, latents = torch.randn(1, 3, 128, 192, generator=generator), torch.randn(1, 4, 24, 16, generator=generator)
    mean, logvar = ours.encode(picture)
    expected = theirs.encode(picture).latent_dist
    assert relative(mean, expected.mean) < 1e-5 and relative(logvar, expected.logvar) < 1e-5
    assert relative(ours.decode(latents), theirs.decode(latents).sample) < 1e-5
