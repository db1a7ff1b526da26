"""The examples run as they are, on the embedded model with few steps, and each changes what it says it changes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from examples import filmstrip, other_loss, other_sampler, own_column, own_masks
from scheduler import SCHEDULERS, make_scheduler
from weights.toy.judge import load_judge

SD15 = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1}
EXAMPLES = Path(other_loss.__file__).parent


def test_they_are_short():
    assert all(len(path.read_text().splitlines()) < 60 for path in EXAMPLES.glob("*.py"))


def test_another_loss(tmp_path):
    left, right = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
    left[..., :2], right[..., 2:] = 1, 1
    assert other_loss.overlap_loss([left, right], 0.5) == 0 and other_loss.overlap_loss([left, left * 3], 0.5) == 1
    assert other_loss.overlap_loss([left], 0.5) == 0
    seen = other_loss.main(steps=2, out=str(tmp_path / "a.png"))
    losses = [loss.item() for step in seen for loss in step.losses]
    assert len(losses) == 2 and all(0 < loss < 1 for loss in losses)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (128, 128)


@pytest.fixture
def euler():
    yield other_sampler.Euler
    SCHEDULERS.pop("euler", None)


def test_another_sampler_is_ddim(euler):
    """Euler's step in x = z / sqrt(a) over sigma is DDIM's without noise, where the timesteps are the same."""
    generator = torch.Generator().manual_seed(0)
    z, noise = (torch.randn(1, 4, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    ours, theirs = euler(SD15, 50), make_scheduler(SD15 | {"clip_sample": False}, 50, "ddim")
    for i in (0, 20, 49):
        assert torch.allclose(ours.step(noise, i, z)[0], theirs.step(noise, i, z)[0], rtol=1e-9)


def test_another_sampler_runs(euler, tmp_path):
    seen = other_sampler.main(steps=2, out=str(tmp_path / "a.png"))
    assert len(seen) == 2 and all(step.latents.abs().max() <= 4 for step in seen) and (tmp_path / "a.png").exists()


def test_masks_from_a_picture(tmp_path):
    picture = Image.new("RGB", (8, 4))
    picture.paste((255, 0, 0), (0, 0, 2, 4))
    picture.paste((0, 0, 255), (4, 0, 8, 4))
    picture.save(tmp_path / "masks.png")
    seen = own_masks.main(steps=2, masks=tmp_path / "masks.png", out=str(tmp_path / "a.png"))
    expected = torch.zeros(1, 3, 16, 16)
    expected[0, 0, :, 4:8], expected[0, 1, :, :4], expected[0, 2, :, 8:] = 1, 1, 1
    assert all(torch.equal(step.masks, expected) and not step.losses for step in seen)
    for x, colour in enumerate([(255, 255, 255), (255, 255, 0), (255, 0, 255), (0, 0, 0)]):
        picture.putpixel((x, 0), colour)
    clear = picture.convert("RGBA")
    clear.putpixel((0, 1), (255, 0, 0, 0))
    clear.save(tmp_path / "more.png")
    more = own_masks.read_masks(tmp_path / "more.png", 4, 8)
    assert more[:, 0, :4].T.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 1], [1, 0, 0]]       # white, yellow, violet, black
    assert more[:, 1, :2].T.tolist() == [[1, 0, 0], [0, 1, 0]]                              # clear, red
    assert own_masks.read_masks(own_masks.MASKS, 16, 16).sum((1, 2)).min() > 20


def test_the_masks_that_ship_do_what_they_say(tmp_path):
    own_masks.main(out=str(tmp_path / "a.png"))
    with Image.open(tmp_path / "a.png") as image:
        (seen,) = load_judge().look(np.asarray(image)[None])
    assert [(one.kind, one.look) for one in seen] == [("ball", "zib"), ("ring", "pel")]


def test_a_column_of_ones_own(tmp_path, monkeypatch, capsys):
    for name, value in (("COLUMNS", dict(evaluate.COLUMNS)), ("CODE", [])):
        monkeypatch.setattr(evaluate, name, value)
    flags = ["--prompts", "1", "--seeds", "0", "--set", '{"steps": 2}', "--no-scores", "--quiet",
             "--out", str(tmp_path / "a")]
    assert own_column.main(*flags) == 0
    shares = {line["column"]: line["shares"] for line in evaluate.read_results(tmp_path / "a")}
    assert shares["halves"] == [0, 0.5, 0.5] and shares["no-update"] != shares["halves"]
    with Image.open(tmp_path / "a/images/halves-0-0.png") as image:
        assert image.info["column"] == "halves" and "command" not in image.info, "clora.py could not make it again"
    # another version of this file is another column
    copy = tmp_path / "own_column.py"
    copy.write_text(Path(own_column.__file__).read_text() + "# changed")
    monkeypatch.setattr(evaluate, "CODE", [])
    monkeypatch.setattr(own_column, "__file__", str(copy))
    assert own_column.main(*flags) == 2 and "another code" in capsys.readouterr().err


def test_the_method_as_a_strip(tmp_path):
    seen = filmstrip.main(steps=2, out=str(tmp_path / "a.png"))
    assert len(seen) == 2 and seen[0].losses
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (7 * 128, 4 * 128)
        columns = [image.crop((128 * n, 0, 128 * n + 128, 512)).tobytes() for n in (0, 6)]
    assert columns[0] != columns[1]
