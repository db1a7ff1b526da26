"""The page that explains a run: what is in it, against the run's trace, and what a browser makes of it."""

import base64
import html
import io
import json
import math
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from safetensors.torch import load_file

import cli
import clora
import report
from weights import load_model

GOLDEN = Path(__file__).parent / "golden"
CAT, DOG, STYLE = (str(GOLDEN / f"loras/{name}.safetensors") for name in ("cat_peft", "dog_kohya", "style_peft"))
HOSTILE = """a cat and a dog </script><img src=x onerror="hacked = 1"> <!-- <script> ' " \\ &lt; {{data}} \u2028 ${1} """
HOSTILE += "w" * 70
RUN = ["--model", str(GOLDEN / "model"), "--prompt", HOSTILE, "--height", "64", "--width", "96", "--steps", "5", "--quiet",
       "--lora", CAT, "cat=sks cat", "--lora", f"{DOG}:0.9", "dog=<b>dog</b>", "--refine-at", "1", "--refine-steps", "3",
       "--update-until", "2"]


class Page(HTMLParser):
    """A page's tags with their attributes, and its script and style elements with their text."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=False)
        self.tags: list[tuple[str, dict]] = []
        self.code: list[tuple[dict, str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(next(text for attributes, text in self.code if attributes.get("id") == "data"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.code.append((self.tags[-1][1], data))


def picture(uri: str) -> np.ndarray:
    kind, _, data = uri.partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
        assert image.format == "WEBP"
        return np.asarray(image.convert("RGB"))


def numbers(text: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), np.uint8).reshape(shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds in one batch with a page and a trace each, and the first seed by the two other methods."""
    out = tmp_path_factory.mktemp("report")
    flags = ["--seeds", "3-4", "--batch", "2", "--report", "--trace", str(out / "t.safetensors")]
    assert cli.main([*RUN, *flags, "--out", str(out)]) == 0
    for method in ("merge", "base"):
        assert cli.main([*RUN, "--seed", "3", "--method", method, "--out", str(out)]) == 0
    return out


def test_a_page_for_every_seed_and_nothing_else(folder):
    names = [f"clora-{seed}.{kind}" for seed in (3, 4) for kind in ("html", "png")] + [f"t-{n}.safetensors" for n in (3, 4)]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "merge-3.png", "base-3.png"])


def test_the_page_needs_no_other_file(folder):
    page = Page(folder / "clora-3.html")
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2 and not {"link", "iframe", "base", "object", "embed"} & {*tags}
    assert not {"src", "href", "srcset", "data", "action"} & {name for _, attributes in page.tags for name in attributes}
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in policy and "http" not in policy
    (_, style), (_, script) = [one for one in page.code if one[0].get("id") != "data"]
    assert "url(" not in style and "@import" not in style
    assert not re.search(r"fetch|XMLHttp|WebSocket|import|innerHTML|insertAdjacent|document\.write|eval", script)
    assert re.findall(r"\w+://[\w./]+", style + script) == ["http://www.w3.org/2000/svg"]      # a name, not an address


@pytest.mark.parametrize("seed", [3, 4])
def test_what_the_page_says_of_every_step_is_what_the_run_computed(seed, folder):
    data, trace = Page(folder / f"clora-{seed}.html").data, load_file(folder / f"t-{seed}.safetensors")
    assert [step["timestep"] for step in data["steps"]] == trace["timestep"].tolist() and len(data["steps"]) == 5
    assert [len(step["losses"]) for step in data["steps"]] == [1, 4, 1, 0, 0]
    assert [loss for step in data["steps"] for loss in step["losses"]] == trace["loss"].tolist()
    assert data["mask_size"] == [*trace["masks"].shape[2:]] and data["map_size"] == [*trace["maps"].shape[2:4]]
    find = load_model(GOLDEN / "model").text.find
    for step, maps, masks in zip(data["steps"], trace["maps"].double().numpy(), trace["masks"].numpy()):
        shown = numbers(step["maps"], 3, 2, *maps.shape[1:3])
        for v, prompt in enumerate(data["prompts"]):
            for k, phrase in enumerate([("cat", "dog"), ("sks cat", "dog"), ("cat", "<b>dog</b>")][v]):
                own = maps[v][:, :, list(find(prompt, phrase))]
                one = (own / own.max((0, 1))).max(-1)                       # what is compared with the threshold
                assert abs(255 * (one - one.min()) / (one.max() - one.min()) - shown[v, k]).max() <= 0.51
        bits = numbers(step["masks"], *masks.shape[1:])
        assert np.array_equal(bits & 1, masks[1]) and np.array_equal(bits >> 1, masks[2])
        assert step["areas"] == pytest.approx(masks.mean((1, 2)))
        assert step["overlap"] == pytest.approx((masks[1] * masks[2]).mean())


def test_the_pictures_are_those_of_the_three_methods(folder):
    data = Page(folder / "clora-3.html").data
    assert list(data["results"]) == ["clora", "merge", "base"]
    for method, uri in data["results"].items():
        with Image.open(folder / f"{method}-3.png") as image:
            assert abs(picture(uri).astype(int) - np.asarray(image)).max() <= 1, method     # a batch gives them to rounding
    assert list(data["estimates"]) == ["0", "1", "2", "3", "4"]
    assert {picture(uri).shape for uri in data["estimates"].values()} == {(64, 96, 3)}


def test_only_so_many_estimates_are_decoded(monkeypatch):
    """SD 1.5 at 512x512 with 50 steps: the decoder is the dear part of a page."""
    monkeypatch.setattr(report, "decode", lambda model, latents, low_memory: latents.new_zeros(1, 8, 8, 3))
    def steps(count, side):
        blank = torch.zeros(1, 4, side, side)
        return [clora.Step(i, 0, blank, blank, blank) for i in range(count)]
    assert list(report.estimates(None, steps(50, 64))) == list(range(0, 50, 4))
    assert list(report.estimates(None, steps(50, 16))) == list(range(50))
    assert list(report.estimates(None, steps(3, 512))) == [0]


def test_settings_command_and_hostile_words(folder, tmp_path):
    """What is written in the page is what was asked for, and its command makes the same page again."""
    data = Page(folder / "clora-3.html").data
    assert data["settings"]["prompt"] == HOSTILE and data["subjects"][1]["trigger"] == "<b>dog</b>"
    assert data["settings"]["recipe"]["name"] == "paper" and len(data["settings"]["loras"][0]["sha256"]) == 64
    words = shlex.split(data["settings"]["command"])
    assert words[:2] == ["python", "clora.py"]
    assert cli.main([*words[2:], "--out", str(tmp_path), "--quiet"]) == 0
    again = Page(tmp_path / "clora-3.html").data
    assert again["settings"] == data["settings"] and again["results"].keys() == data["results"].keys()


@pytest.mark.parametrize("flags", [["--no-panel", "--low-memory"], ["--dtype", "bfloat16"], ["--mask-from", "2"],
                                   ["--update-until", "-1"], ["--style", f"{STYLE}:0.5", "--panel"]])
def test_other_runs_have_a_page_too(flags, tmp_path):
    assert cli.main([*RUN, *flags, "--steps", "3", "--report", "--out", str(tmp_path)]) == 0
    data = Page(tmp_path / "clora-0.html").data
    assert len(data["steps"]) == 3 and (tmp_path / "clora-0-panel.png").exists() == ("--panel" in flags)
    if "--mask-from" in flags:
        assert [step["areas"] for step in data["steps"][:2]] == [[1, 1, 1]] * 2


@pytest.mark.parametrize("flags", [["--method", "merge"], ["--method", "base"]])
def test_a_page_needs_maps(flags, tmp_path, capsys):
    assert cli.main([*RUN, *flags, "--report", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "--report" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


# --- in a browser -----------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt install chromium")
LISTEN = """<script>const errors = [];
addEventListener("error", event => errors.push(event.message), true);
addEventListener("securitypolicyviolation", event => errors.push(event.blockedURI));
console.error = (...words) => errors.push(words.join(" "));</script>"""


def browse(page: Path, folder: Path, script: str, width: int = 1200, dark: bool = False) -> dict:
    """Opens a copy of the page in headless Chromium -> what `script`, the body of an async function, returns there.

    In a frame, because a window cannot be made narrower than 500 pixels.
    """
    text = page.read_text(encoding="utf-8").replace("<title>", LISTEN + "<title>", 1)
    (folder / "copy.html").write_text(text.replace("</body>", f"""<script>
        (async () => {{ {script} }})().catch(String).then(value => parent.postMessage(value, "*"))</script></body>"""))
    (folder / "frame.html").write_text(f"""<html style="color-scheme: light dark"><pre></pre><script>
        onmessage = event => document.querySelector("pre").textContent = JSON.stringify(event.data);
        </script><iframe src="copy.html" width="{width}" height="800" style="border: 0"></iframe></html>""")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-component-update",
             "--disable-background-networking", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000",
             f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    for _ in range(3):              # on a busy machine it may end before the frame is there
        done = subprocess.run([CHROMIUM, *flags, "--dump-dom", (folder / "frame.html").as_uri()], capture_output=True,
                              text=True, timeout=120)
        if found := re.search("<pre>(.+?)</pre>", done.stdout, re.DOTALL):
            break
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    value = json.loads(html.unescape(found[1]))
    assert isinstance(value, dict), value
    return value


LOOK = """
const luminance = text => text.match(/[\\d.]+/g).slice(0, 3).map(c => c / 255)
  .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
const style = element => getComputedStyle(element), paper = luminance(style(document.body).backgroundColor);
const contrast = [document.querySelector("h1"), document.querySelector("p.small")].map(element => {
  const ink = luminance(style(element).color);
  return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
});
const look = {errors, paper, contrast, dark: matchMedia("(prefers-color-scheme: dark)").matches, width: innerWidth,
              scroll: document.documentElement.scrollWidth, pictures: [...document.images].map(one => one.naturalWidth)};
"""
SLIDE = """
const slider = document.querySelector("input[type=range]"), states = [];
const pixels = canvas => [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
for (let i = +slider.min; i <= +slider.max; i++) {
  slider.value = i;
  slider.dispatchEvent(new Event("input", {bubbles: true}));
  const image = document.querySelector(".estimate"), canvas = document.createElement("canvas");
  await image.decode();
  Object.assign(canvas, {width: 96, height: 64}).getContext("2d").drawImage(image, 0, 0);
  states.push({estimate: pixels(canvas), maps: [...document.querySelectorAll(".variant canvas")].map(pixels),
               masks: pixels(document.getElementById("masks")), where: document.getElementById("where").textContent,
               areas: [...document.querySelectorAll("#areas td:last-child")].map(cell => cell.textContent),
               now: +document.querySelector("#loss .now").getAttribute("x1")});
}
return {...look, states, hacked: !!window.hacked, heading: document.querySelector("h1").textContent, title: document.title,
        command: document.getElementById("command").textContent, label: slider.labels.length, images: document.images.length,
        unnamed: document.querySelectorAll("img:not([alt])").length, dots: document.querySelectorAll("#loss .dot").length,
        curve: document.querySelector("#loss .curve").getAttribute("points").split(" ").length,
        shaded: document.querySelectorAll("#loss .refined").length};
"""


@in_a_browser
def test_the_slider_shows_every_step_on_a_phone(folder, tmp_path):
    data = Page(folder / "clora-3.html").data
    seen = browse(folder / "clora-3.html", tmp_path, LOOK + SLIDE, width=360)
    assert seen["errors"] == [] and not seen["hacked"] and not seen["dark"]
    assert seen["heading"] == HOSTILE and HOSTILE[:15] in seen["title"] and seen["command"] == data["settings"]["command"]
    assert seen["width"] == 360 and seen["scroll"] <= 360 and min(seen["contrast"]) >= 4.5
    assert seen["images"] == 3 + 2 + 6 and set(seen["pictures"]) == {96} and seen["unnamed"] == 0 and seen["label"] == 1
    assert (seen["dots"], seen["curve"], seen["shaded"]) == (3, 6, 1)
    colours, values = np.array(report.COLOURS), []
    for i, (state, step) in enumerate(zip(seen["states"], data["steps"], strict=True)):
        assert state["where"] == f"{i} of 4"
        estimate = np.reshape(state["estimate"], (64, 96, 4))[..., :3]
        assert abs(estimate - picture(data["estimates"][str(i)]).astype(int)).max() <= 3
        maps = np.reshape(state["maps"], (6, *data["map_size"], 4))
        assert abs(maps[..., 3] - 0.9 * numbers(step["maps"], 6, *data["map_size"])).max() <= 1
        masks = np.reshape(state["masks"], (*(-1, data["mask_size"][1] * 21), 4))           # 256 / 12 pixels for one
        bits = numbers(step["masks"], *data["mask_size"]).repeat(21, 0).repeat(21, 1)
        assert np.array_equal(masks[..., 3] > 0, bits > 0)
        for k in (0, 1):
            near = abs(masks[..., :3] - colours[k]).max(-1) <= 2                            # alpha is kept premultiplied
            assert near[bits == 1 << k].all() and not near[bits == 2 - k].any()
            assert not (bits == 3).any() or 0.4 < near[bits == 3].mean() < 0.6              # hatched half and half
        shares = [100 * share for share in (*step["areas"][1:], step["overlap"], step["areas"][0])]
        assert [float(text.split()[0]) for text in state["areas"]] == pytest.approx(shares, abs=0.51)
        values.append(state["now"])
    assert np.all(np.diff(values) > 0)
    assert len({json.dumps([state["estimate"], state["maps"]]) for state in seen["states"]}) == 5


@in_a_browser
@pytest.mark.parametrize("flags, shown, unsaid", [
    (["--style", STYLE, "--dilate"], ["then dilate.", "Two LoRAs and a style", "Style alone", "kept by the style alone",
                                        "style of style_peft"], ["Base model “", "kept by the base"]),
    (["--mask-from", "9"], ["variants averaged", "None before step 9", "claimed by several –", "which this run has none of"],
     ["inside its own mask", "100 %", "draw where its own words look", "The framed ones become"])])
def test_what_the_page_says_is_so(flags, shown, unsaid, tmp_path):
    assert cli.main([*RUN, "--report", *flags, "--out", str(tmp_path)]) == 0
    seen = browse(tmp_path / "clora-0.html", tmp_path, """
        return {text: document.body.innerText.replace(/\\s+/g, " "), errors,
                labels: [...document.querySelectorAll("[aria-label]")].map(one => one.ariaLabel)}""")
    assert not seen["errors"] and all(words in seen["text"] for words in shown), seen["text"]
    assert not any(words in seen["text"] for words in unsaid)
    assert not any("without a LoRA" in label for label in seen["labels"])


def test_soft_masks_are_shown_as_who_draws():
    """Masks of one's own may be soft or above 1: bits of one subject must not become those of another."""
    soft = torch.tensor([[0.1, 0.0, 0.5], [0.9, 2.0, 0.0], [0.0, 3.0, 0.4]]).view(1, 3, 1, 3)         # base, two subjects
    step = clora.Step(0, 1, *[torch.zeros(1, 4, 1, 3)] * 3, torch.rand(1, 3, 1, 3, 77), soft)
    concepts = tuple(tuple((v, token) for v in range(3)) for token in (1, 2))
    plan = clora.Plan(("",) * 3, torch.zeros(6, 77, 8), torch.zeros(6, 2), concepts, ((1,), (2,)))
    facts = report._step_facts(step, plan)
    assert list(base64.b64decode(facts["masks"])) == [0b01, 0b11, 0b10]
    assert facts["areas"] == pytest.approx([1 / 3, 2 / 3, 2 / 3]) and facts["overlap"] == pytest.approx(1 / 3)
    subjects = [clora.Subject(load_model(GOLDEN / "model").lora(CAT), "cat", "cat")] * 2
    picture = np.zeros((8, 24, 3), np.uint8)
    one, other = (report.panel(picture, picture, replace(step, masks=masks), ((1,), (2,)), subjects)
                  for masks in (torch.full_like(soft, 1.01), torch.ones_like(soft)))
    assert np.array_equal(one, other)


def test_no_label_of_the_panel_is_cut_and_eight_tiles_stand_in_a_row():
    lora, trigger = load_model(GOLDEN / "model").lora(CAT), "a very long trigger of a tall picture"
    picture = np.zeros((64, 16, 3), np.uint8)
    step = clora.Step(0, 1, *[torch.zeros(1, 4, 8, 2)] * 3, torch.rand(1, 5, 4, 1, 77), torch.ones(1, 5, 8, 2))

    def drawn(k: int) -> np.ndarray:
        subjects = [clora.Subject(lora, "cat", trigger, weight) for weight in (0.5, None, None, None)[:k]]
        return report.panel(picture, picture, step, [(1,)] * k, subjects)
    font = ImageFont.load_default(15)
    labels = ['map of "a very long trigger of a tall picture"', "its mask: 100%", "CLoRA", "merged, at 0.5"]
    assert drawn(1).shape == (256 + 26 + 8, sum(max(64, math.ceil(font.getlength(text))) for text in labels) + 8 * 5, 3)
    assert drawn(3).shape[0] == 290 and drawn(4).shape[0] == 2 * 290            # 8 tiles, 10 tiles
    assert report.merging_weights([clora.Subject(lora, "cat", "cat", weight) for weight in (0.5, None)]) == [0.5, 0.5]


def test_the_panel_of_a_step_without_masks(tmp_path, monkeypatch):
    """It says so above the pictures, and the command line tells it where masks begin: the panel is of step 2."""
    drawn, panel = [], report.panel

    def both(*arguments):
        assert len(arguments) == 6
        drawn.append(arguments[5])
        with_masks, without = (panel(*arguments[:5], masked)[:24] for masked in (True, False))
        assert not np.array_equal(with_masks, without)
        return panel(*arguments)
    monkeypatch.setattr(report, "panel", both)
    for start in ("0", "2", "3", "9"):
        assert cli.main([*RUN, "--panel", "--mask-from", start, "--out", str(tmp_path)]) == 0
    assert drawn == [True, True, False, False]


@in_a_browser
def test_it_is_dark_where_the_reader_wants_it(folder, tmp_path):
    seen = browse(folder / "clora-3.html", tmp_path, LOOK + "return look;", dark=True)
    assert seen["errors"] == [] and seen["dark"] and seen["paper"] < 0.05 and min(seen["contrast"]) >= 4.5
