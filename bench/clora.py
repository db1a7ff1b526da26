"""Times and weighs CLoRA at SD 1.5's size against a plain peer: python bench/clora.py

Both run the same random weights, LoRAs and latents with the same number of threads, one after the other in one
process, several times; before that they must agree on maps, loss and gradient. Peak memory is taken in a fresh process
for each figure. The peer, bench/peer.py, is CLoRA as it is written today with diffusers and PEFT.

    guidance    one latent update: maps of all variants, the loss, its gradient
    step        one denoising step without an update: noise and masks of all variants, both guidance halves
    image       counted: 50 steps, updates at steps 0 to 25, 20 refinements each at 0, 10 and 20. Ours (recipe paper)
                86 guidance passes and 50 steps; the peer 86 guidance passes and 24 steps, since it takes the noise
                of an updated step from the same forward. The VAE and the text encoder, under 3 %, are left out.
    fast image  ours with recipe fast, counted likewise, against the same image of the peer

`share` is ours: operations counted by PyTorch over the seconds, as a part of the rate at which this device multiplies
two 4096 x 4096 matrices of the same precision. With four or more numbers of LoRAs it ends with the cost of one more.
Prints a Markdown table and writes bench/results.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)                             # else "import clora" would find this very file
sys.path.append(str(ROOT / "bench"))
from common import DTYPES, make_loras, matrix_rate, operations, seconds  # noqa: E402

import clora  # noqa: E402
import lora  # noqa: E402
from recipe import RECIPES, Recipe  # noqa: E402
from unet import UNet, UNetConfig  # noqa: E402

PAPER, FAST = RECIPES["paper"], RECIPES["fast"]
GIB = 2 ** 30


class Ours:
    def __init__(self, unet: UNet, loras: list[lora.LoRA], context: Tensor, concepts, words, options: argparse.Namespace):
        lora.attach(unet, loras)
        variants, place = len(loras) + 1, {"device": context.device, "dtype": context.dtype}
        adapters = torch.cat([torch.zeros(1, len(loras)), torch.eye(len(loras))]).repeat(2, 1).to(**place)
        with torch.no_grad():
            keys = unet.text_keys(context, adapters)
        self.plan = clora.Plan(("",) * variants, context, adapters, concepts, words, keys=keys)
        self.unet, self.layers = unet, unet.map_layers(2)
        self.variants, self.low_memory = variants, options.low_memory

    def guidance(self, latents: Tensor, t: int) -> tuple[Tensor, Tensor]:
        return clora.contrast(self.unet, latents, t, self.plan, self.layers, PAPER, self.low_memory)

    @torch.inference_mode()
    def maps(self, latents: Tensor, t: int) -> Tensor:
        rows = range(self.variants, 2 * self.variants)
        _, probs = clora.predict(self.unet, latents, t, self.plan, rows, self.layers, stop_after_maps=True)
        return clora.read_maps(probs, latents.shape[2:], self.variants, "cond")[0]

    @torch.inference_mode()
    def step(self, latents: Tensor, t: int) -> Tensor:
        rows = range(2 * self.variants)                                             # unconditional, then conditional
        parts = [clora.predict(self.unet, latents, t, self.plan, part, self.layers)
                 for part in ([[row] for row in rows] if self.low_memory else [rows])]
        noise = torch.cat([noise for noise, _ in parts], dim=1)
        probs = [torch.cat(layer, dim=1) for layer in zip(*(probs for _, probs in parts))]
        maps = clora.read_maps(probs, latents.shape[2:], self.variants, "cond")
        masks = torch.stack([clora.variant_masks(one, self.plan.trigger_tokens, latents.shape[2:], PAPER) for one in maps])
        uncond, cond = (clora.blend(half, masks) for half in noise.split(self.variants, dim=1))
        return clora.guide(uncond, cond, PAPER)


class Theirs:
    def __init__(self, unet, loras: list[lora.LoRA], context: Tensor, concepts, size: tuple[int, int]):
        from peer import Peer
        for one in loras:
            state = {}
            for name, layer in one.unet.items():
                state |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
            unet.load_lora_adapter(state, adapter_name=one.name, prefix=None)
        unet.requires_grad_(False)
        self.peer = Peer(unet, [one.name for one in loras], *size)
        self.context, self.concepts = context, concepts

    def guidance(self, latents: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.peer.guidance(latents, t, self.context, self.concepts, PAPER.temperature)

    def step(self, latents: Tensor, t: int) -> tuple[Tensor, Tensor]:
        return self.peer.plain(latents, t, self.context)


def build(who: str, k: int, side: int, options: argparse.Namespace) -> tuple[dict, Tensor]:
    """-> ({"ours": ..., "peer": ...} as far as `who` asks, latents). Weights are shared between the two."""
    torch.manual_seed(0)
    device, dtype = options.device, DTYPES[options.dtype]
    h = side // 8
    variants = k + 1
    with torch.no_grad():
        if who == "ours":
            unet = UNet(UNetConfig()).eval().requires_grad_(False).to(device, dtype)
        else:
            import diffusers
            theirs = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8,
                                                    block_out_channels=(320, 640, 1280, 1280)).eval().requires_grad_(False)
            theirs.to(device, dtype)
            if device == "cuda":                        # as its users are advised to; on a CPU it stays as in the file
                theirs.to(memory_format=torch.channels_last)
            with torch.device("meta"):
                unet = UNet(UNetConfig()).eval()
            unet.load_state_dict(theirs.state_dict(), assign=True)
            unet.requires_grad_(False)
        unet.to(memory_format=torch.channels_last)      # as load_model has it
    generator = torch.Generator().manual_seed(2)
    context = torch.randn(2 * variants, 77, 768, generator=generator).to(device, dtype)
    latents = torch.randn(options.batch, 4, h, h, generator=generator).to(device, dtype)
    # each subject: one token in the other prompts, two (trigger and noun) in its own
    words = tuple((2 + 3 * n, 3 + 3 * n) for n in range(k))
    concepts = tuple(tuple((v, token) for v in range(variants) for token in (own if v == n + 1 else own[1:]))
                     for n, own in enumerate(words))
    loras = make_loras(unet, k)
    made: dict = {}
    if who != "peer":
        made["ours"] = Ours(unet, loras, context, concepts, words, options)
    if who != "ours":
        made["peer"] = Theirs(theirs, loras, context, concepts, (h, h))
    return made, latents


def check(made: dict, latents: Tensor, k: int) -> None:
    """Both must compute the same thing before their times mean anything. With one subject there is nothing to contrast."""
    tolerance = 1e-4
    loss, gradient = made["ours"].guidance(latents, 500)
    their_loss, their_gradient, their_maps = made["peer"].guidance(latents, 500)
    pairs = {"maps": (made["ours"].maps(latents, 500), their_maps)}
    if k > 1:
        pairs |= {"loss": (loss[0], their_loss), "gradient": (gradient, their_gradient)}
    for name, (mine, other) in pairs.items():
        error = ((mine.float() - other.float()).norm() / other.float().norm()).item()
        print(f"  {name} differ by {error:.1e}", file=sys.stderr)
        if not error < tolerance:
            raise SystemExit(f"{name} of ours and the peer differ by {error:.1e}, more than {tolerance}: nothing was timed")


def count_passes(recipe: Recipe) -> int:
    """Guidance passes of an image: updates and refinements (all of them: a stop may save some)."""
    updated = [i for i in range(recipe.steps) if i <= recipe.update_until and (i in recipe.refine_at
                                                                               or i % recipe.update_every == 0)]
    return len(updated) + recipe.refine_steps * len(set(updated) & set(recipe.refine_at))


def time_both(k: int, side: int, options: argparse.Namespace) -> tuple[dict, dict]:
    """Seconds of every call by name, alternating: {"ours guidance": [...], "peer guidance": [...], ...}, and of ours
    the operations."""
    who = "both" if side <= options.peer_up_to and options.batch == 1 else "ours"
    if who == "both":                                   # in exact float32: in half the peer's gradient is lost in rounding
        tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        made, latents = build(who, k, side, argparse.Namespace(**{**vars(options), "dtype": "float32"}))
        check(made, latents, k)
        torch.backends.cudnn.allow_tf32 = tf32
    if who != "both" or options.dtype != "float32":
        made, latents = build(who, k, side, options)
    calls = {f"{name} {what}": getattr(one, what) for what in ("guidance", "step") for name, one in made.items()}
    counted = {name: operations(call, latents, 500) for name, call in calls.items() if name.startswith("ours")}
    times: dict[str, list[float]] = {name: [] for name in calls}
    if options.compile:                                 # now: the counter sees no operation of a compiled program
        made["ours"].unet.compile(dynamic=False)
    for call in calls.values():                         # the first time is another: memory is new, kernels are chosen
        call(latents, 500)
    for _ in range(options.runs):
        for name, call in calls.items():
            times[name].append(seconds(call, latents, 500))
    return times, counted


def memory(who: str, what: str, k: int, side: int, options: argparse.Namespace) -> dict:
    """In a process of its own: bytes at the peak, and with weights and LoRAs loaded but nothing run."""
    command = [sys.executable, __file__, "--measure", who, what, str(k), str(side), "--device", options.device, "--dtype",
               options.dtype, "--threads", str(options.threads), "--batch", str(options.batch),
               *(["--low-memory"] if options.low_memory else []), *(["--compile"] if options.compile else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode < 0:                             # mostly by the kernel, for lack of memory
        return {"error": f"killed by signal {-done.returncode}"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["failed"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(who: str, what: str, k: int, side: int, options: argparse.Namespace) -> None:
    """What the process started by `memory` does."""
    made, latents = build(who, k, side, options)
    if options.compile and who == "ours":
        made[who].unet.compile(dynamic=False)
        getattr(made[who], what)(latents, 500)
    gc.collect()
    cuda = latents.is_cuda
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:                                               # the kernel's own count of the peak starts again at what is held now
        Path("/proc/self/clear_refs").write_text("5")

    def peak() -> int:
        if cuda:
            return torch.cuda.max_memory_allocated()
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
        # Windows has none
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before = peak()
    getattr(made[who], what)(latents, 500)
    print(json.dumps({"weights": before, "peak": peak()}))


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def images(times: dict, counted: dict) -> None:
    """Adds whole images to the seconds and to the operations."""
    for name, recipe in (("image", PAPER), ("fast image", FAST)):
        passes = count_passes(recipe)
        times[f"ours {name}"] = [passes * g + recipe.steps * s for g, s in zip(times["ours guidance"], times["ours step"])]
        counted[f"ours {name}"] = passes * counted["ours guidance"] + recipe.steps * counted["ours step"]
    if "peer step" in times:
        passes, plain = count_passes(PAPER), PAPER.steps - PAPER.update_until - 1
        times["peer image"] = [passes * g + plain * s for g, s in zip(times["peer guidance"], times["peer step"])]
        times["peer fast image"] = times["peer image"]


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    if options.measure:
        who, what, k, side = options.measure
        return measure(who, what, int(k), int(side), options)
    rows, results, rate = [], [], matrix_rate(options.device, DTYPES[options.dtype])
    facts = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if options.device == "cuda" else
             platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "dtype": options.dtype,
             "low_memory": options.low_memory, "batch": options.batch, "compile": options.compile,
             "runs": options.runs, "matrix_rate": rate, "results": results}
    for side in options.sizes:
        for k in options.loras:
            print(f"{side}x{side}, {k} LoRAs", file=sys.stderr)
            times, counted = time_both(k, side, options)
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()                # the processes that measure memory need it
            images(times, counted)
            held = {} if options.no_memory else {
                f"{who} {what}": memory(who, what, k, side, options)
                for who in ("ours", "peer") for what in ("guidance", "step") if f"{who} {what}" in times}
            results.append({"size": side, "loras": k, "seconds": times, "operations": counted, "memory": held})
            for what in ("guidance", "step", "image", "fast image"):
                mine, other = times[f"ours {what}"], times.get(f"peer {what}")
                ratio = f"{statistics.median(mine) / statistics.median(other):.2f}" if other else ""
                cells = [f"{side}", f"{k}", what, spread(mine), spread(other) if other else "not run", ratio,
                         f"{counted[f'ours {what}'] / statistics.median(mine) / rate:.0%}"]
                for who in ("ours", "peer"):
                    found = [one for name, one in held.items() if name.startswith(who)
                             and (what.endswith("image") or name.endswith(what))]
                    failed = [one["error"] for one in found if "error" in one]
                    cells.append(failed[0] if failed else
                                 f"{max(one['peak'] for one in found) / GIB:.2f}, "
                                 f"{max(one['peak'] - one['weights'] for one in found) / GIB:.2f}" if found else "not run")
                rows.append("| " + " | ".join(cells) + " |")
            Path(options.out).write_text(json.dumps(facts, indent=1) + "\n")       # now: the next may take hours
    print(f"matrix rate {rate / 1e12:.3g} TFLOP/s, {options.dtype}, {options.threads} threads\n")
    print("| size | LoRAs | what | ours, s | peer, s | ratio | share | ours: peak, beyond the weights, GiB "
          "| peer: the same |")
    print("|---" * 9 + "|")
    print("\n".join(rows))
    if len(options.loras) > 3:
        for side in options.sizes:
            at = {one["loras"]: statistics.median(one["seconds"]["ours image"]) for one in results if one["size"] == side}
            slope, start = np.polyfit([*at], [*at.values()], 1)
            worst = max(abs(start + slope * k - value) / value for k, value in at.items())
            print(f"\n{side}x{side}: an image takes {start:.1f} + {slope:.1f} K seconds (within {worst:.1%}); "
                  f"one variant of K = 1 takes {at[min(at)] / (min(at) + 1):.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 384, 512])
    parser.add_argument("--loras", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="the first card: choose another with CUDA_VISIBLE_DEVICES")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--low-memory", action="store_true", help="ours one variant at a time")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once: the seconds of all, and the peer is not run")
    parser.add_argument("--compile", action="store_true", help="ours through torch.compile")
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    parser.add_argument("--peer-up-to", type=int, default=384, help="largest size at which the peer is run too")
    parser.add_argument("--out", default=str(ROOT / "bench/results.json"))
    parser.add_argument("--measure", nargs=4, metavar=("WHO", "WHAT", "K", "SIZE"), help=argparse.SUPPRESS)
    main(parser.parse_args())
