"""Times one forward of the bare UNet and one VAE decode, ours against diffusers: python bench/unet.py

Same random weights, inputs and threads; the two alternate in one process; diffusers uses its own default, PyTorch's
fused attention, and on a CPU weights as they lie in the file (--channels-last: in the layout of ours). Prints a Markdown
table; `share` is ours, as in bench/clora.py. On CUDA it is timed by device events.

`--lora` times our UNet with a LoRA instead: its factors applied in every layer, as clora.py does it, against a UNet with
the LoRA merged into its weights, and how long such a merging takes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import diffusers
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)                             # else "import unet" would find this very file
sys.path.append(str(ROOT / "bench"))
from common import DTYPES, make_loras, matrix_rate, operations, seconds  # noqa: E402

import lora  # noqa: E402
from unet import UNet, UNetConfig  # noqa: E402
from vae import VAE, VAEConfig  # noqa: E402


def pair(theirs: torch.nn.Module, make, options: argparse.Namespace) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours with the weights of theirs."""
    theirs = theirs.eval().requires_grad_(False).to(options.device, DTYPES[options.dtype])
    with torch.device("meta"):
        ours = make().eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    if options.device == "cuda" or options.channels_last:
        theirs.to(memory_format=torch.channels_last)
    return ours.requires_grad_(False).to(memory_format=torch.channels_last), theirs         # as load_model has it


def alternate(calls: dict, latents: torch.Tensor, runs: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(runs + 1):
        for name, call in calls.items():
            took = seconds(call, latents)
            if run:                                     # the first is for warming up
                times[name].append(took)
    return times


@torch.inference_mode()
def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, dtype = options.device, DTYPES[options.dtype]
    names = ("applied", "merged") if options.lora else ("ours", "diffusers")
    rate = matrix_rate(device, dtype)
    print(f"| what | size | rows | {names[0]}, s | {names[1]}, s | ratio | share |\n|---|---|---|---|---|---|---|")

    def report(what: str, side: int, latents: torch.Tensor, calls: dict) -> None:
        out = [call(latents) for call in calls.values()]
        error = ((out[0] - out[1]).float().norm() / out[1].float().norm()).item()
        if error > (1e-4 if dtype == torch.float32 else 5e-2):
            raise SystemExit(f"{what}: the two differ by {error:.1e}; nothing was timed")
        times = alternate(calls, latents, options.runs)
        share = operations(calls[names[0]], latents) / statistics.median(times[names[0]]) / rate
        middle = [statistics.median(values) for values in times.values()]
        cells = [f"{statistics.median(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in times.values()]
        cells += [f"{middle[0] / middle[1]:.3f}", f"{share:.0%}"]
        print(f"| {what} | {side}x{side} | {len(latents)} | {' | '.join(cells)} |", flush=True)

    theirs = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8,
                                            block_out_channels=(320, 640, 1280, 1280))
    ours, theirs = pair(theirs, lambda: UNet(UNetConfig()), options)
    if options.lora:
        one, = make_loras(ours, 1)
        start = time.perf_counter()
        changed = lora.merged_weights(ours, [(one, 1.0)], "unet")
        merging = time.perf_counter() - start
        with torch.device("meta"):
            merged = UNet(UNetConfig()).eval().requires_grad_(False)
        merged.load_state_dict({**ours.state_dict(), **changed}, assign=True)
        merged.to(memory_format=torch.channels_last)
        lora.attach(ours, [one])
    for side in options.sizes:
        for rows in options.rows:
            latents = torch.randn(rows, 4, side // 8, side // 8, device=device, dtype=dtype)
            context = torch.randn(rows, 77, 768, device=device, dtype=dtype)
            if options.lora:
                strengths = context.new_ones(rows, 1)
                report("UNet, LoRA", side, latents, {
                    "applied": lambda x: ours(x, 500, context, adapters=strengths)[0],              # noqa: B023
                    "merged": lambda x: merged(x, 500, context)[0]})                                # noqa: B023
                continue
            report("UNet", side, latents, {"ours": lambda x: ours(x, 500, context)[0],              # noqa: B023
                                           "diffusers": lambda x: theirs(x, 500, context).sample})  # noqa: B023
    if options.lora:
        return print(f"\nmerging the LoRA into the weights took {merging:.2f} s")
    del ours, theirs
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4)
    ours, theirs = pair(theirs, lambda: VAE(VAEConfig()), options)
    for side in options.sizes:
        latents = torch.randn(1, 4, side // 8, side // 8, device=device, dtype=dtype)
        report("VAE decode", side, latents, {"ours": ours.decode, "diffusers": lambda x: theirs.decode(x).sample})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 384, 512])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="the first card: choose another with CUDA_VISIBLE_DEVICES")
    parser.add_argument("--channels-last", action="store_true", help="diffusers too (on CUDA always)")
    parser.add_argument("--lora", action="store_true", help="a LoRA applied against the same LoRA merged")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    main(parser.parse_args())
