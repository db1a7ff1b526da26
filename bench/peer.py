"""CLoRA the way it is written today with diffusers and PEFT: what bench/clora.py measures against.

The structure is that of the authors' release: an attention processor that computes the probabilities of every layer in
the open and stores those of the cross-attention at the wanted size; set_adapters before each variant; both guidance
halves of a variant in one forward; the whole UNet under one live graph; torch.autograd.grad for the latents. It is kept
as fast as that structure allows: weights and LoRAs need no gradient, and a step whose latents were just updated takes
its noise from that same forward, as the release does.
"""

from __future__ import annotations

import diffusers
import torch
from torch import Tensor


class StoringProcessor:
    """diffusers' attention with explicit probabilities, kept where they are [B, H, size, T]."""

    def __init__(self, store: list[Tensor], size: int):
        self.store, self.size = store, size

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, **_) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key, value = attn.head_to_batch_dim(attn.to_k(context)), attn.head_to_batch_dim(attn.to_v(context))
        probs = attn.get_attention_scores(query, key, attention_mask)               # [B * H, N, T]
        if encoder_hidden_states is not None and probs.shape[1] == self.size:
            self.store.append(probs.unflatten(0, (len(hidden_states), -1)))
        out = attn.batch_to_head_dim(probs @ value)
        return attn.to_out[1](attn.to_out[0](out))


class Peer:
    def __init__(self, unet: diffusers.UNet2DConditionModel, adapters: list[str], height: int, width: int):
        """height, width: of the latents. adapters: names already loaded, one per LoRA variant."""
        self.unet, self.adapters = unet, adapters
        self.store: list[Tensor] = []
        self.map_size = (height // 4, width // 4)
        unet.set_attn_processor(StoringProcessor(self.store, self.map_size[0] * self.map_size[1]))

    def variants(self, latents: Tensor, t: int, context: Tensor) -> tuple[Tensor, Tensor]:
        """latents [1, 4, h, w], context [2V, T, D] (unconditional, then conditional) -> noise [V, 2, 4, h, w] and
        conditional maps [V, m, n, T]."""
        count = len(context) // 2
        noises, maps = [], []
        for v in range(count):
            if v == 0:
                self.unet.disable_lora()
            else:
                self.unet.enable_lora()
                self.unet.set_adapters(self.adapters[v - 1])
                self.unet.requires_grad_(False)         # set_adapters turns it on again, which would keep more memory
            self.store.clear()
            noises.append(self.unet(torch.cat([latents, latents]), t, context[[v, v + count]]).sample)
            maps.append(torch.stack([probs[1].mean(0) for probs in self.store]).mean(0).unflatten(0, self.map_size))
            self.store.clear()
        return torch.stack(noises), torch.stack(maps)

    def guidance(self, latents: Tensor, t: int, context: Tensor, concepts, temperature: float
                 ) -> tuple[Tensor, Tensor, Tensor]:
        """One latent update's worth: (loss, gradient [1, 4, h, w], maps [V, m, n, T])."""
        latents = latents.detach().requires_grad_()
        with torch.enable_grad():
            _, maps = self.variants(latents, t, context)
            loss = self.loss([[maps[v, :, :, token] for v, token in concept] for concept in concepts], temperature)
            gradient, = torch.autograd.grad(loss, latents)
        return loss.detach(), gradient, maps.detach()

    @torch.no_grad()
    def plain(self, latents: Tensor, t: int, context: Tensor) -> tuple[Tensor, Tensor]:
        """A step without an update: noise and maps, which the masks are made from."""
        return self.variants(latents, t, context)

    @staticmethod
    def loss(groups: list[list[Tensor]], temperature: float) -> Tensor:
        """InfoNCE over all ordered pairs of maps of one concept, pair by pair."""
        flat = [(c, one.flatten()) for c, group in enumerate(groups) for one in group]
        terms = []
        for i, (c, one) in enumerate(flat):
            similar = [torch.cosine_similarity(one, other, dim=0) / temperature for _, other in flat]
            negative = sum(s.exp() for (d, _), s in zip(flat, similar) if d != c)         # 0 with one concept alone
            terms += [-torch.log(s.exp() / (s.exp() + negative))
                      for j, ((d, _), s) in enumerate(zip(flat, similar)) if d == c and i != j]
        return torch.stack(terms).mean()
