"""CLoRA: several LoRAs in one Stable Diffusion image, at test time (arXiv 2403.19776).

    python clora.py --model FOLDER --prompt "a cat and a dog" --lora a.safetensors "cat=sks cat" --lora b.safetensors dog

The UNet runs on one latent once per *variant*: v = 0 is the base model with the base prompt; v = k adds LoRA k, and in
its prompt subject k is replaced by the LoRA's trigger. Every step
    1. reads the cross-attention maps of the variants                  attention_maps   section 3.1 of the paper
    2. contrasts them, grouped by concept (`contrast` groups)          info_nce_loss    section 3.2
    3. moves the latent against the gradient                           update_latents   section 3.2
    4. thresholds the maps of each LoRA's own words into a mask        concept_mask     section 3.3
    5. mixes the variants' noise predictions under the masks           blend            section 3.3
then does what every sampler does: guidance, one scheduler step.

Shapes: B pictures (seeds), V variants, K LoRA subjects, A adapters, h x w latent pixels, m x n map pixels (h/4 x w/4 in
SD 1.5), T = 77 tokens. In a batch for the UNet, the rows of a picture stand together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import lora as lora_module
from attention import TextKeys
from lora import LoRA
from recipe import Recipe, recipe_for
from scheduler import Generators, make_scheduler
from text import write_prompts
from unet import UNet
from weights import Model

METHODS = ("clora", "merge", "switch", "composite", "base")


# --- the method -----------------------------------------------------------------------------------------------------

def attention_maps(probs: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Mean over layers and heads of cross-attention probabilities, each [..., H, m*n, T] -> [..., m, n, T] (section 3.1)."""
    return torch.stack([layer.mean(dim=-3) for layer in probs]).mean(dim=0).unflatten(-2, size)


def info_nce_loss(groups: Sequence[Tensor], temperature: float = 0.5) -> Tensor:
    """Pulls the maps of a concept together and pushes concepts apart (section 3.2).

    groups: one [n_c, ...] tensor of maps per concept -> scalar, the mean over ordered positive pairs (j, j+) of
        -log( exp(sim(j, j+) / tau) / (exp(sim(j, j+) / tau) + sum over n in other groups of exp(sim(j, n) / tau)) )
    Constant-zero maps have similarity 0 with everything. One concept alone gives 0: it has nothing to be pushed from.
    """
    maps = torch.cat([group.flatten(1) for group in groups])                        # [M, P]
    label = torch.cat([torch.full((len(group),), c, device=maps.device) for c, group in enumerate(groups)])     # [M]
    directions = divide(maps, maps.norm(dim=1, keepdim=True))
    similarity = directions @ directions.T / temperature                            # [M, M]
    same = label[:, None] == label[None, :]
    negatives = similarity.masked_fill(same, float("-inf")).logsumexp(dim=1, keepdim=True)      # [M, 1]
    pair_loss = torch.logaddexp(similarity, negatives) - similarity                 # [M, M]
    positive = same & ~torch.eye(len(maps), dtype=torch.bool, device=maps.device)
    return (pair_loss * positive).sum() / positive.sum().clamp(min=1)


def rescale(maps: Tensor) -> Tensor:
    """Each map [..., m, n] scaled to 0..1 by its own minimum and maximum; a constant map becomes zero."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return divide(maps - low, high - low)


def divide(x: Tensor, y: Tensor) -> Tensor:
    """x / y for a norm or a range y, and x where that is 0: neither value nor gradient of a constant map is NaN."""
    return x / torch.where(y > 0, y, 1.0)


def update_latents(latents: Tensor, gradient: Tensor, alpha: float) -> Tensor:
    """z' = z - alpha * dL/dz (section 3.2)."""
    return (latents - alpha * gradient).to(latents.dtype)


def concept_mask(maps: Tensor, threshold: float, ties: bool = True) -> Tensor:
    """Union of the thresholded maps of a subject's words: [words, m, n] -> bool [m, n] (section 3.3).

    A pixel is in if any map reaches `threshold` times its own maximum there (`ties`: >=, else >).
    """
    bound = threshold * maps.amax((-2, -1), keepdim=True)
    return (maps >= bound if ties else maps > bound).any(dim=0)


def morphology(mask: Tensor, recipe: Recipe) -> Tensor:
    """3x3 dilate, erode, open and close, each if the recipe says so, in that order: bool [m, n] -> bool [m, n]."""
    def dilate(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, stride=1, padding=1)

    def erode(x: Tensor) -> Tensor:
        return -F.max_pool2d(-x, 3, stride=1, padding=1)

    x = mask[None, None].float()
    x = dilate(x) if recipe.dilate else x
    x = erode(x) if recipe.erode else x
    x = dilate(erode(x)) if recipe.open else x
    x = erode(dilate(x)) if recipe.close else x
    return x[0, 0] > 0.5


def variant_masks(maps: Tensor, trigger_tokens: Sequence[tuple[int, ...]], size: Sequence[int], recipe: Recipe) -> Tensor:
    """maps [V, m, n, T] -> float [V, h, w] of 0 and 1; the base variant has what no subject claims (section 3.3).

    trigger_tokens: for each subject k, where its trigger is in the prompt of variant k + 1.
    """
    masks = torch.stack([
        morphology(concept_mask(torch.stack([maps[k + 1, :, :, token] for token in tokens]), recipe.threshold,
                                recipe.mask_ties), recipe)
        for k, tokens in enumerate(trigger_tokens)])                                # [K, m, n]
    masks = F.interpolate(masks[None].float(), size=tuple(size), mode="nearest")[0]        # [K, h, w]
    return torch.cat([1 - masks.amax(dim=0, keepdim=True), masks])


def blend(noise: Tensor, masks: Tensor) -> Tensor:
    """eps = sum_v M_v eps_v / sum_v M_v: noise [B, V, C, h, w], masks [B, V, h, w] -> [B, C, h, w] (section 3.3)."""
    masks = masks[:, :, None].to(noise.dtype)                                       # [B, V, 1, h, w]
    return (masks * noise).sum(dim=1) / masks.sum(dim=1)


def guide(uncond: Tensor, cond: Tensor, recipe: Recipe) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598), then the rescaling of arXiv 2305.08891: [B, C, h, w] each."""
    noise = uncond + recipe.guidance * (cond - uncond)
    if recipe.guidance_rescale:
        axes = tuple(range(1, noise.dim()))
        matched = noise * (cond.std(dim=axes, keepdim=True) / noise.std(dim=axes, keepdim=True))
        noise = recipe.guidance_rescale * matched + (1 - recipe.guidance_rescale) * noise
    return noise


# --- what to compose ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Subject:
    """One LoRA and the word of the prompt that it draws."""

    lora: LoRA
    word: str                           # the subject as the base prompt names it
    trigger: str                        # what stands for it in this LoRA's own prompt
    weight: float | None = None         # None: 1, or 1/K where LoRAs are merged


@dataclass(frozen=True, eq=False)       # two are the same if they are one: tensors do not say yes or no
class Plan:
    """A prompt and its LoRAs, encoded. Rows of all tensors: V unconditional, then V conditional. Good for many images.

    Plans with different LoRAs may share a UNet in turn: `predict` attaches its plan's, and a call of your own must do so.
    """

    prompts: tuple[str, ...]                            # [V]
    context: Tensor                                     # [2V, T, D]
    adapters: Tensor                                    # [2V, A]
    concepts: tuple[tuple[tuple[int, int], ...], ...] = ()      # per subject: (variant, token) of every map of its group
    trigger_tokens: tuple[tuple[int, ...], ...] = ()    # per subject: where its trigger is in its own prompt
    in_turn: bool = False                               # method switch: the variants take turns
    keys: TextKeys | None = None                        # 2V rows: the context, as the UNet's layers read it (compose's)
    loras: tuple[LoRA, ...] | None = None               # [A] the columns of adapters; None: what the UNet has attached

    def rows(self, rows: Sequence[int], pictures: int) -> tuple[TextKeys | Tensor, Tensor]:
        """What the UNet is told in these rows, for each picture again: text and adapters [pictures * rows, A]."""
        # CUDA is not waited for; MPS, not waited for, might read memory that is free again
        device = self.context.device
        index = torch.tensor([*rows] * pictures).to(device, non_blocking=device.type != "mps")
        return (self.context if self.keys is None else self.keys)[index], self.adapters[index]


@torch.no_grad()
def make_plan(model: Model, prompt: str, subjects: Sequence[Subject] = (), style: tuple[LoRA, float] | None = None,
              negative: str = "", method: str = "clora", recipe: Recipe | None = None) -> Plan:
    """Writes the prompt of every variant, encodes it, finds its words, and attaches the LoRAs to the UNet.

    What a recipe says of text, clip_skip and text_lora, is done here and not by `compose` (None: the model's own recipe).
    ValueError: a subject that is not in the prompt, occurs twice, was cut off or is shared by two LoRAs.
    """
    recipe = recipe or recipe_for(model)
    if method not in METHODS:
        raise ValueError(f"there is no method called {method}; choose from {', '.join(METHODS)}")
    if recipe.uncond_from == "base" and method not in ("clora", "base"):
        raise ValueError(f"--uncond-from base is for --method clora: {method} has no variant without LoRAs")
    prompts, concepts, trigger_tokens = write_prompts(model.text, prompt, subjects, method)
    if method == "base":
        subjects, style = (), None                      # no layer adds what would count for nothing
    weights = [1.0 if subject.weight is None else subject.weight for subject in subjects]
    alone = [[weight * (i == k) for i in range(len(subjects))] for k, weight in enumerate(weights)]     # LoRA k by itself
    if method == "clora" or not subjects:
        strengths = [[0.0] * len(subjects), *alone]
    elif method == "merge":
        strengths = [merging_weights(subjects)]
    else:
        strengths = alone
    loras = tuple(subject.lora for subject in subjects)
    if style is not None:
        loras = *loras, style[0]
        strengths = [[*row, style[1]] for row in strengths]

    lora_module.attach(model.unet, loras)
    rows = [encode(model, [negative, text], list(zip(loras, row)), recipe) for text, row in zip(prompts, strengths)]
    context = torch.stack(rows, dim=1).flatten(0, 1)                                # [2V, T, D]
    adapters = torch.tensor(strengths * 2, device=context.device, dtype=context.dtype)      # [2V, A]
    return Plan(prompts, context, adapters, concepts, trigger_tokens, in_turn=method == "switch", loras=loras)


def merging_weights(subjects: Sequence[Subject]) -> list[float]:
    """What method merge adds the LoRAs with: 1/K each, unless it has a weight."""
    return [1 / len(subjects) if subject.weight is None else subject.weight for subject in subjects]


def encode(model: Model, texts: Sequence[str], loras: Sequence[tuple[LoRA, float]], recipe: Recipe) -> Tensor:
    """texts -> [len(texts), T, D], through the text encoder with these LoRAs at these strengths.

    clip_skip is for all of them, as in A1111 and ComfyUI; diffusers' pipeline skips nothing of the negative prompt.
    """
    active = [(lora, strength) for lora, strength in loras if strength and lora.text_encoder and recipe.text_lora]
    merged = lora_module.merged_weights(model.text.model, active) if active else None
    return model.text.encode(texts, merged, recipe.clip_skip)


def initial_noise(model: Model, height: int, width: int, seed: int) -> Tensor:
    """[1, 4, height/8, width/8]: what diffusers draws with a CPU generator of this seed, on every device."""
    factor = model.vae.config.factor
    if height % factor or width % factor or not 0 < min(height, width) <= max(height, width) <= 8192:
        raise ValueError(f"the size {width}x{height} does not fit: width and height must be multiples of {factor}, "
                         "at most 8192")
    shape = (1, model.unet.config.in_channels, height // factor, width // factor)
    like = next(model.unet.parameters())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype).to(like.device)


def step_generators(noise: Tensor, seeds: Sequence[int]) -> list[torch.Generator]:
    """For samplers that add noise: one per picture, past the draw of its initial noise [B, 4, h, w], as in diffusers."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for one, generator in zip(noise, generators, strict=True):
        torch.randn(one.shape, generator=generator, dtype=one.dtype)
    return generators


# --- the loop -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False, repr=False)
class Step:
    """The state after one denoising step. Its maps and masks are those that were read last."""

    index: int
    timestep: int
    latents: Tensor                     # [B, 4, h, w] after the step
    x0: Tensor                          # [B, 4, h, w] the pictures as estimated at this step, in latents
    noise: Tensor                       # [B, 4, h, w] blended and guided prediction
    maps: Tensor | None = None          # [B, V, m, n, T]
    masks: Tensor | None = None         # [B, V, h, w]
    losses: list[Tensor] = field(default_factory=list)      # [B] per update; none where nothing is to be parted
    updates: list[Tensor] = field(default_factory=list)     # latents [B, 4, h, w] after each
    moved: list[Tensor] = field(default_factory=list)       # bool [B] per update: others of the batch had stopped before

    def __repr__(self) -> str:                          # without the numbers of its tensors
        return f"Step({self.index}, timestep {self.timestep}, {len(self.latents)} pictures, {len(self.losses)} updates)"

    def picture(self, b: int) -> Step:
        """The state of picture b alone, as a batch of one, with its own updates."""
        b = range(len(self.latents))[b]                 # -1 is the last; IndexError beyond
        own = [n for n, moved in enumerate(self.moved) if moved[b]]

        def one(value):
            if isinstance(value, list):
                return [value[n][b:b + 1] for n in own]
            return None if value is None else value[b:b + 1]
        names = ("latents", "x0", "noise", "maps", "masks", "losses", "updates", "moved")
        return replace(self, **{name: one(getattr(self, name)) for name in names})


def contrast(unet: UNet, latents: Tensor, timestep: int, plan: Plan, layers: tuple[str, ...], recipe: Recipe,
             low_memory: bool = False, loss: Callable[..., Tensor] = info_nce_loss) -> tuple[Tensor, Tensor]:
    """The loss of the maps at latents [B, 4, h, w] and its gradient with respect to them: ([B], [B, 4, h, w]).

    The variants meet in the loss alone. So with `low_memory` the maps are made without a graph, the loss is
    differentiated with respect to them, and that is pushed back through one variant at a time: equal to rounding.
    """
    variants = range(len(plan.prompts))
    # half precision cannot hold the gradient's smallest entries: scale the loss up and the gradient down again
    kind = latents.device.type
    mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    automatic = torch.get_autocast_dtype(kind) if mixed else None
    scale = 4096.0 if torch.float16 in (unet.conv_in.weight.dtype, automatic) else 1.0

    def maps_of(chosen: Sequence[int]) -> Tensor:
        rows = [*chosen] if recipe.maps_from == "both" else []
        rows += [v + len(variants) for v in chosen]
        _, probs = predict(unet, z, timestep, plan, rows, layers, stop_after_maps=True,
                           checkpointing=low_memory and torch.is_grad_enabled())
        return read_maps(probs, z.shape[2:], len(chosen), recipe.maps_from)         # [B, chosen, m, n, T]

    def losses_of(maps: Tensor) -> Tensor:
        losses = []
        for one in maps:                                                            # [V, m, n, T]
            groups = [torch.stack([one[v, :, :, token] for v, token in concept]) for concept in plan.concepts]
            groups = [rescale(group) for group in groups] if recipe.rescale_maps else groups
            with torch.autocast(kind, enabled=False) if mixed else nullcontext():      # maps are float32, and so is the loss
                losses.append(value := loss(groups, recipe.temperature))
            if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
                raise ValueError("loss must return a scalar tensor that was computed from the maps")
        return torch.stack(losses)                                                  # [B]

    # a picture's loss knows no other picture, so the gradient of the sum holds the gradient of each
    with torch.inference_mode(False), torch.enable_grad():          # whatever mode the caller is in
        z = latents.detach().clone().requires_grad_()
        if not low_memory:
            losses = losses_of(maps_of(variants))
            gradient, = torch.autograd.grad(losses.sum() * scale, z)
        else:
            with torch.no_grad():
                maps = torch.cat([maps_of([v]) for v in variants], dim=1)           # [B, V, m, n, T]
            maps.requires_grad_()
            losses = losses_of(maps)
            upstream, = torch.autograd.grad(losses.sum() * scale, maps)
            gradient = torch.zeros_like(z)
            for v in variants:
                gradient += torch.autograd.grad(maps_of([v]), z, upstream[:, v:v + 1])[0]
    return losses.detach(), gradient.to(losses.dtype) / scale


def predict(unet: UNet, latents: Tensor, timestep: int, plan: Plan, rows: Sequence[int], layers: tuple[str, ...],
            **options) -> tuple[Tensor, list[Tensor]]:
    """Every picture in the given rows of the plan, as one batch -> (noise [B, R, 4, h, w], maps [B, R, H, m*n, T] by layer).

    options: what else UNet.forward takes; with stop_after_maps there is no noise and the first part is empty.
    """
    attach_loras(unet, plan)
    batch = latents.to(unet.conv_in.weight.dtype).repeat_interleave(len(rows), dim=0)           # [B * R, 4, h, w]
    # a tensor, for torch.compile would compile every number anew
    noise, probs = unet(batch, torch.tensor(timestep), *plan.rows(rows, len(latents)), layers, **options)
    apart = (len(latents), len(rows))
    noise = latents.new_empty(0) if noise is None else noise.unflatten(0, apart)
    return noise, [probs[name].unflatten(0, apart) for name in layers]


def attach_loras(unet: UNet, plan: Plan) -> None:
    """The plan's LoRAs, if others are attached: another plan was made since."""
    if plan.loras is not None and plan.loras != unet.attached:
        lora_module.attach(unet, plan.loras)


def read_maps(probs: Sequence[Tensor], size: Sequence[int], variants: int, maps_from: str) -> Tensor:
    """Probabilities [B, R, H, m*n, T] of V conditional rows or of both guidance halves -> maps [B, V, m, n, T]."""
    height, width = size
    while height * width > probs[0].shape[-2]:
        height, width = (height + 1) // 2, (width + 1) // 2
    maps = attention_maps(probs, (height, width))                                   # [B, R, m, n, T]
    if maps_from == "cond":
        return maps[:, -variants:]
    return maps.unflatten(1, (2, variants)).mean(dim=1)


@torch.no_grad()
def compose(model: Model, plan: Plan, recipe: Recipe, latents: Tensor, generator: Generators = None,
            low_memory: bool = False, loss: Callable[..., Tensor] = info_nce_loss,
            make_masks: Callable[..., Tensor] = variant_masks,
            update: Callable[..., Tensor] = update_latents) -> Iterator[Step]:
    """Denoises initial noise [B, 4, h, w] and yields every step; the last one's latents are the pictures'.

    Each picture has its own loss and masks, and where the sampler adds noise its own generator of the list: a batch gives
    what its pictures give alone, and `low_memory`, one variant after the other, gives the same result, both to rounding.
    To change the method: `loss`, `make_masks` (for one picture after the other) and `update` take what info_nce_loss,
    variant_masks and update_latents take and return such tensors (masks may be soft; no pixel without a variant); they may
    change what they are given. Other layers' maps: replace `unet.map_layers`; all must have one size. The functions are
    not told the step: steps are made one by one, so they may read what their caller noted after the last `yield`. With
    `refine_stop` an update that returns the latents as they are ends the repeats. A sampler is a Scheduler under a name of
    its own in SCHEDULERS. A step's latents may be changed in place: the next step starts from them (examples/).
    PNDM's second step alone starts again where its first did, as in diffusers. The plan is read once, at the start. A model
    serves one thread at a time, and is not to be loaded in inference mode.
    ValueError: steps that the scheduler cannot do, latents that became NaN (the step is named), masks of another shape.
    """
    scheduler = make_scheduler(model.scheduler_config, recipe.steps, recipe.scheduler, eta=recipe.eta)
    unet, variants = model.unet, len(plan.prompts)
    layers = unet.map_layers(model.map_level) if plan.concepts else ()
    if plan.concepts and not layers:
        raise ValueError(f"this UNet has no maps at map_level {model.map_level}; set model.settings[\"map_level\"]")
    guided = recipe.guidance != 1 or bool(layers) and recipe.maps_from == "both"    # at 1 the unconditional half cancels out
    shared = guided and recipe.uncond_from == "base"
    if recipe.uncond_from == "base" and variants > 1 and not plan.concepts:
        raise ValueError("--uncond-from base is for --method clora: this plan has no variant without LoRAs")
    attach_loras(unet, plan)
    adapters = plan.adapters.clone()                    # the same at every step, like the keys that were made with them
    plan = replace(plan, adapters=adapters, keys=unet.text_keys(plan.context, adapters))
    history: tuple = ()
    finite: list[Tensor] = []
    # in float32 whatever the UNet's precision: half would round away what a step or an update adds
    z = latents.to(torch.promote_types(latents.dtype, torch.float32)) * scheduler.init_noise_sigma
    contrasted = len(plan.concepts) > 1 or loss is not info_nce_loss                # of one concept the loss is always 0
    active = torch.ones(len(z), 1, 1, 1, device=z.device, dtype=torch.bool)         # pictures that are still updated
    maps: Tensor | None = None
    read_at = 0                                                                     # the step that read them
    masks = torch.ones(len(z), 1 if plan.in_turn else variants, *z.shape[2:], device=z.device)     # [B, V, h, w]
    for i, t in enumerate(scheduler.timesteps):
        # move the latent so that the concepts part (section 3.2)
        losses: list[Tensor] = []
        updates: list[Tensor] = []
        moved: list[Tensor] = []
        before = z                                      # the latent before the last update, for noise_from
        repeats = recipe.refine_steps if i in recipe.refine_at else 0
        due = i <= recipe.update_until and (repeats or i % recipe.update_every == 0)
        if plan.concepts and contrasted and due and (not recipe.update_stop or active.any()):
            moving = active
            for n in range(1 + repeats):
                value, gradient = contrast(unet, z, t, plan, layers, recipe, low_memory, loss)
                if recipe.refine_stop and n:
                    moving = moving & (losses[-1] - value > recipe.refine_stop * losses[-1].abs()).view(-1, 1, 1, 1)
                    if not moving.any():
                        break
                before = torch.where(moving, z, before)
                z = torch.where(moving, update(z.clone(), gradient, recipe.alpha), z)
                losses.append(value)
                updates.append(z)
                moved.append(moving.flatten())

        # one batch predicts the noise of all variants, both guidance halves
        at = z if recipe.noise_from == "after" else before
        computed = [i // recipe.switch_every % variants] if plan.in_turn else [*range(variants)]
        uncond_rows = [] if not guided else [0] if shared else computed                 # rows of the unconditional half
        rows = [*uncond_rows, *(variants + v for v in computed)]
        reading = layers if maps is None or i % recipe.mask_every == 0 or i == recipe.mask_from else ()
        with torch.inference_mode():
            batches = [[row] for row in rows] if low_memory else [rows]
            parts = [predict(unet, at, t, plan, batch, reading) for batch in batches]
        noise = torch.cat([noise for noise, _ in parts], dim=1)                     # [B, rows, 4, h, w]
        # uncond [B, V, 4, h, w], or of 1 variant (shared) or none (not guided); cond [B, V, 4, h, w], in turn of 1
        uncond, cond = noise.tensor_split([len(uncond_rows)], dim=1)

        # one mask per variant, then the blend (section 3.3)
        if reading:
            last = maps
            probs = [torch.cat(layer, dim=1) for layer in zip(*(probs for _, probs in parts))]
            maps = read_maps(probs, z.shape[2:], variants, recipe.maps_from)        # [B, V, m, n, T]
            del parts, probs                            # of every head, while the next step needs the memory
            if recipe.update_stop and last is not None:
                change = change_of(last, maps, plan) / (i - read_at)                # [B] of a step
                active = active & (change >= recipe.update_stop).view(-1, 1, 1, 1)
            read_at = i
            if i >= recipe.mask_from:
                tokens, size = plan.trigger_tokens, z.shape[2:]
                masks = torch.stack([make_masks(one.clone(), tokens, size, recipe) for one in maps]).to(z)
                expect_masks(masks, (variants, *z.shape[2:]), i)
        noise = blend(cond, masks)
        if guided:
            noise = guide(uncond[:, 0] if shared else blend(uncond, masks), noise, recipe)
        x0 = scheduler.predict_x0(noise, i, z)
        z, history = scheduler.step(noise, i, z, history, generator)
        finite.append(torch.isfinite(z).all())
        if z.device.type == "cpu":                      # a GPU would have to end what it does to answer: it is asked last
            expect_finite(finite)
        yield Step(i, t, z, x0, noise, maps, masks if plan.concepts else None, losses, updates, moved)
    expect_finite(finite)


def change_of(last: Tensor, maps: Tensor, plan: Plan) -> Tensor:
    """How far the concepts' maps moved, as a share of their length: [B, V, m, n, T] twice -> [B]."""
    v, tokens = zip(*(place for concept in plan.concepts for place in concept))
    # [places, B, m, n], as indices that stand apart put their axis first -> [B, places * m * n]
    before, now = (x[:, v, :, :, tokens].transpose(0, 1).flatten(1) for x in (last, maps))
    return (now - before).norm(dim=1) / before.norm(dim=1)


def expect_masks(masks: Tensor, shape: tuple[int, ...], i: int) -> None:
    if masks.shape[1:] != shape:
        raise ValueError(f"make_masks gave masks of shape {list(masks.shape[1:])}, and {shape[0]} variants need "
                         f"{list(shape)}, the base variant's first")
    if masks.device.type == "cpu" and not (masks.sum(dim=1) > 0).all():             # a GPU would have to be waited for
        raise ValueError(f"make_masks gave NaN or left pixels without a variant at step {i}")


def expect_finite(finite: Sequence[Tensor]) -> None:
    for i, one in enumerate(finite):
        if not one:
            raise ValueError(f"the latents became NaN at step {i}: try --dtype float32, a smaller --alpha or other weights")


def decode(model: Model, latents: Tensor, low_memory: bool = False) -> Tensor:
    """Latents [B, 4, h, w] -> pictures uint8 [B, H, W, 3]."""
    dtype = next(model.vae.parameters()).dtype
    with torch.no_grad():
        scaled = latents.to(dtype) / model.vae.config.scaling_factor
        picture = model.vae.decode(scaled, bands=8 if low_memory else 1)                    # [B, 3, H, W]
    if not picture.isfinite().all():
        raise ValueError("the VAE gave NaN: its weights are damaged, or --dtype is too narrow for them")
    return ((picture.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


if __name__ == "__main__":
    import sys

    from cli import start
    sys.exit(start())
