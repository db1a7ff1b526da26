"""What a run leaves behind: pictures that carry their settings, the panel and the page that explain one, the trace.

Everything is written under a temporary name and moved into place, so that no half-written file is ever seen.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import save_file

from clora import Plan, Step, Subject, decode, divide, merging_weights, rescale
from weights import Model
from weights.lora import is_stream

COLOURS = ((230, 60, 50), (40, 110, 230), (40, 170, 90), (240, 170, 30),
           (160, 70, 200), (20, 180, 190), (230, 90, 160), (140, 90, 50))
LONGEST_COMMAND = 500_000                   # characters; to read a longer one takes seconds


@contextlib.contextmanager
def in_place(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; moved onto it when the block ends without an error.

    OSError, with the name of `path` and not the temporary one: the folder or the disk does not allow it.
    """
    name = ""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
        yield Path(name)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)      # mkstemp makes private files; results are the user's to share
        os.replace(name, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if name:
            Path(name).unlink(missing_ok=True)


def remove_temporaries(folder: Path, names: Collection[str], age: float = 0) -> None:
    """Removes what `in_place` left behind for these names without ending when it was killed, `age` seconds ago or more."""
    for path in folder.glob(".*-????????.*"):               # .name-xxxxxxxx.png
        with contextlib.suppress(OSError):                  # gone already, or somebody else's
            if path.name[1:].rpartition("-")[0] in names and time.time() - path.stat().st_mtime >= age:
                path.unlink()


def save_picture(path: Path, picture: np.ndarray, settings: dict) -> None:
    """uint8 [H, W, 3] as PNG; `settings` go in as text chunks, one per key, JSON where not a string."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in settings.items():
        chunks.add_text(key, value if isinstance(value, str) else json.dumps(value))
    with in_place(path) as temporary:
        Image.fromarray(picture).save(temporary, pnginfo=chunks)


def load_settings(path: Path) -> dict[str, str]:
    """The text chunks of a PNG as they are. ValueError: no PNG, damaged, or without settings of this program."""
    if is_stream(path):
        raise ValueError(f"{path} is a device or a pipe; name an image")
    try:
        with warnings.catch_warnings(action="error"), Image.open(path, formats=["PNG"]) as image:
            chunks = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no PNG image; name one that clora.py made") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from None
    except Exception as error:                      # Pillow raises many kinds for damaged or enormous content
        raise ValueError(f"{path} is damaged or no image of clora.py ({error})") from None
    if "command" not in chunks:
        raise ValueError(f"{path} carries no settings of clora.py; other programs leave them out when they save an image")
    if len(chunks["command"]) > LONGEST_COMMAND:
        raise ValueError(f"{path} is no image of clora.py: its command has {len(chunks['command']):,} characters")
    return chunks


def save_trace(path: Path, steps: Sequence[Step]) -> None:
    """Everything a run computed for one picture, as safetensors. S steps, E latent updates in all:

    timestep [S], latents [S, 4, h, w] (after the step), noise [S, 4, h, w], maps [S, V, m, n, T], masks [S, V, h, w],
    loss [E], update_step [E], updated_latents [E, 4, h, w]. What a method does not have is left out.
    ValueError: the steps of a batch; Step.picture gives those of one picture.
    """
    if any(len(step.latents) != 1 for step in steps):
        raise ValueError("a trace is of one picture; give [step.picture(b) for step in steps]")
    tensors = {"timestep": torch.tensor([step.timestep for step in steps]),
               "latents": torch.cat([step.latents for step in steps]),
               "noise": torch.cat([step.noise for step in steps])}
    for key in ("maps", "masks"):
        if getattr(steps[0], key) is not None:
            tensors[key] = torch.cat([getattr(step, key) for step in steps])
    if losses := [loss for step in steps for loss in step.losses]:
        tensors["loss"] = torch.cat(losses)
        tensors["update_step"] = torch.tensor([step.index for step in steps for _ in step.losses])
        tensors["updated_latents"] = torch.cat([latents for step in steps for latents in step.updates])
    with in_place(path) as temporary:
        try:
            save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, temporary)
        except SafetensorError as error:                # a full disk
            raise OSError(f"{path} cannot be written ({error})") from None


def _tile(array: np.ndarray, side: int, smooth: bool = False) -> np.ndarray:
    """uint8 [h, w, 3] -> [side, side * w / h, 3]."""
    size = (round(side * array.shape[1] / array.shape[0]), side)
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST))


def heat(values: np.ndarray) -> np.ndarray:
    """[h, w] -> uint8 [h, w, 3], from dark blue (lowest) over orange to pale yellow (highest)."""
    t = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    stops = np.array([[12, 12, 48], [110, 30, 110], [225, 90, 50], [252, 200, 90], [255, 252, 215]], float)
    return np.stack([np.interp(t, np.linspace(0, 1, len(stops)), stops[:, c]) for c in range(3)], -1).astype(np.uint8)


def subject_map(maps: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """Where a subject's words look, as its mask is made of it: the highest of their maps [m, n, T], each as a share of its
    own maximum -> [m, n]. Pixels at the threshold or above are the mask, before morphology."""
    own = maps[..., list(tokens)].float()
    return divide(own, own.amax((0, 1))).amax(-1)


def where_drawn(masks: torch.Tensor) -> torch.Tensor:
    """Masks [V, h, w] -> bool [V, h, w]: who draws a pixel; of soft masks all that have at least half of the most there."""
    return masks >= 0.5 * masks.amax(dim=0)


def panel(result: np.ndarray, merged: np.ndarray, step: Step, trigger_tokens: Sequence[tuple[int, ...]],
          subjects: Sequence[Subject], masked: bool = True, side: int = 256) -> np.ndarray:
    """One picture that explains a run: per subject its map and mask at `step`, then the result beside plain merging.

    result, merged: uint8 [H, W, 3]; trigger_tokens: of every subject; masked: whether the step has masks yet.
    Eight tiles stand in a row. -> uint8 [rows * (label + side), ..., 3].
    """
    assert step.maps is not None and step.masks is not None
    tiles, labels = [], []
    picture = _tile(result, side, smooth=True)
    grey = picture.mean(-1, keepdims=True) * 0.6 + 80
    for k, (subject, tokens) in enumerate(zip(subjects, trigger_tokens)):
        attention = subject_map(step.maps[0, k + 1], tokens).cpu().numpy()              # [m, n]
        tiles.append(_tile(heat(attention), side, smooth=True))
        labels.append(f'map of "{subject.trigger}"')
        mask = where_drawn(step.masks[0])[k + 1].cpu().numpy()                          # [h, w]
        mask = _tile((mask * np.uint8(255))[..., None].repeat(3, -1), side) > 127
        colour = np.array(COLOURS[k % len(COLOURS)])
        tiles.append(np.where(mask, 0.55 * picture + 0.45 * colour, grey).astype(np.uint8))
        labels.append(f"its mask: {mask.mean():.0%}" if masked else "no masks at this step")
    tiles += [picture, _tile(merged, side, smooth=True)]
    plain = all(subject.weight is None for subject in subjects)
    weights = f"each at 1/{len(subjects)}" if plain else f"at {', '.join(f'{w:.2g}' for w in merging_weights(subjects))}"
    labels += ["CLoRA", f"merged, {weights}"]
    gap, strip, a_row, font = 8, 26, 8, ImageFont.load_default(15)
    rows = [list(zip(tiles, labels))[n:n + a_row] for n in range(0, len(tiles), a_row)]
    widths = [[max(tile.shape[1], math.ceil(font.getlength(label))) for tile, label in row] for row in rows]
    width = max(sum(row) + gap * (len(row) + 1) for row in widths)
    sheet = Image.new("RGB", (width, (side + strip + gap) * len(rows)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        x, y = gap, r * (side + strip + gap)
        for (tile, label), wide in zip(row, widths[r]):
            sheet.paste(Image.fromarray(tile), (x, y + strip))
            draw.text((x, y + 5), label, fill=(30, 30, 30), font=font)
            x += wide + gap
    return np.asarray(sheet)


def estimates(model: Model, steps: Sequence[Step], low_memory: bool = False) -> dict[int, np.ndarray]:
    """The finished picture as single steps expect it: {step index: uint8 [H, W, 3]}, for steps of one picture.

    They are x0, decoded by the VAE itself. That is the dear part of a page, so only every n-th step is decoded: all of
    them while their latents have 2^16 pixels in all (the embedded model), every fourth of 50 at 512x512 in SD 1.5.
    """
    every = math.ceil(len(steps) * steps[0].x0[0, 0].numel() / 2 ** 16)
    return {step.index: decode(model, step.x0, low_memory)[0].numpy() for step in steps[::every]}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _data_uri(picture: np.ndarray, side: int | None = None, **options) -> str:
    """uint8 [H, W, 3] -> a WebP image for the page, no more than `side` pixels wide and high."""
    image, buffer = Image.fromarray(picture), io.BytesIO()
    if side is not None:
        image.thumbnail((side, side))
    image.save(buffer, "WEBP", **options)
    return f"data:image/webp;base64,{_base64(buffer.getvalue())}"


def _step_facts(step: Step, plan: Plan) -> dict:
    """What the page shows of a step, as JSON has it. Two fields are bytes in base64:

    maps [V, K, m, n], the `subject_map` of a subject's words in a variant, scaled to 0..255 by its minimum and maximum;
    masks [h, w], bit k set where subject k draws.
    """
    assert step.maps is not None and step.masks is not None
    masks = where_drawn(step.masks[0]).cpu()                                        # bool [V, h, w]
    maps = torch.stack([torch.stack([subject_map(step.maps[0, v], [token for u, token in concept if u == v])
                                     for concept in plan.concepts]) for v in range(len(masks))])      # [V, K, m, n]
    bits = sum(mask.to(torch.uint8) << k for k, mask in enumerate(masks[1:]))
    return {"timestep": step.timestep, "losses": [loss.item() for loss in step.losses],
            "areas": masks.float().mean((1, 2)).tolist(), "overlap": (masks[1:].sum(0) > 1).float().mean().item(),
            "maps": _base64((rescale(maps) * 255).round().byte().cpu().numpy().tobytes()),
            "masks": _base64(bits.numpy().tobytes())}


def save_page(path: Path, results: dict[str, np.ndarray], pictures: dict[int, np.ndarray], steps: Sequence[Step], plan: Plan,
              subjects: Sequence[Subject], settings: dict) -> None:
    """A run as one HTML file that needs no other: report.html, with the run in it as JSON.

    results: the finished picture of each method, uint8 [H, W, 3], the page's own first; pictures: see `estimates`;
    steps: all steps of one picture, with maps and masks. What `settings` says is shown, and the command in it can be copied.
    """
    first, result = steps[0], next(iter(results.values()))
    assert first.maps is not None and first.masks is not None
    data = {"settings": settings, "prompts": plan.prompts, "height": result.shape[0], "width": result.shape[1],
            "subjects": [{"word": subject.word, "trigger": subject.trigger, "lora": subject.lora.name, "colour": colour,
                          "merged": f"{weight:.2g}"}
                         for subject, colour, weight in zip(subjects, COLOURS, merging_weights(subjects))],
            "results": {method: _data_uri(picture, lossless=True) for method, picture in results.items()},
            "estimates": {index: _data_uri(picture, 256, quality=80) for index, picture in pictures.items()},
            "map_size": first.maps.shape[2:4], "mask_size": first.masks.shape[2:],
            "steps": [_step_facts(step, plan) for step in steps]}
    # "<" is the one character that could end the script element; in JSON it occurs inside strings alone
    text = json.dumps(data).replace("<", "\\u003c")
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8").replace("{{data}}", text, 1)
    with in_place(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
