"""evaluate.py: a sweep that can stop anywhere, its verdicts and intervals, and bad input."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import cli
import evaluate
from weights.toy.judge import Seen

ROOT = Path(__file__).parents[1]
FAST = ["--prompts", "2", "--seeds", "0-1", "--methods", "merge,base", "--set", '{"steps": 2}', "--quiet", "--no-scores"]


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """The command line from tmp_path, in this process: starting one takes longer than most of these tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "TOY", Path(os.path.relpath(ROOT / "weights/toy")))

    def call(*arguments: str, **environment: str) -> SimpleNamespace:
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            code = evaluate.main(arguments)
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)
    return call


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "evaluate.py"), *arguments], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, **environment})


def results(folder: Path) -> dict:
    return {(line["column"], line["set"], line["seed"]): line.get("seen") for line in evaluate.read_results(folder)}


def test_a_sweep_is_resumed_and_split_without_a_difference(tmp_path):
    whole = run(*FAST, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert "| merge | 4 |" in whole.stdout and (tmp_path / "whole/grid.png").exists()
    lines = (tmp_path / "whole/results-0.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    # cut in the middle of a batch and of a line, as a kill would
    part = tmp_path / "part/results-0.jsonl"
    part.parent.mkdir()
    part.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    again = run(*FAST, "--out", "part", cwd=tmp_path)
    assert again.returncode == 0 and results(tmp_path / "part") == results(tmp_path / "whole")
    assert part.read_bytes().startswith(b"".join(lines[:3])), "what was made is not made again"
    for rank in ("1", "0"):
        split = run(*FAST, "--out", "split", cwd=tmp_path, RANK=rank, WORLD_SIZE="2")
        assert split.returncode == 0, split.stderr
    assert results(tmp_path / "split") == results(tmp_path / "whole")
    # each image says how it was made, clora.py makes it again
    image = tmp_path / "whole/images/merge-0-1.png"
    assert cli.main(["--from", str(image), "--out", str(tmp_path / "again"), "--quiet"]) == 0
    with Image.open(image) as first, Image.open(tmp_path / "again/merge-1.png") as second:
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 1
    figures = [[row.rsplit("|", 2)[0] for row in done.stdout.splitlines()] for done in (whole, again, split)]
    assert figures[0] == figures[1] == figures[2], "the table is the same for any split (but for the seconds)"


@pytest.mark.parametrize("arguments, word", [
    (["--methods", "magic"], "magic"), (["--seeds", ""], "--seeds"), (["--seeds", "9-1"], "9-1"),
    (["--sets", "nowhere.json"], "nowhere.json"), (["--sets", "bad.json"], "cat.safetensors"),
    (["--set", '{"nonsense": 1}'], "nonsense"), (["--model", "nowhere"], "nowhere"),
    (["--batch", "0"], "--batch"), (["--curve", "curve"], ".png"),
    (["--prompts", "0"], "--prompts"), (["--device", "quantum"], "quantum"),
    (["--set", "{"], "--set"), (["--model", str(ROOT / "tests/golden/model")], "--sets")])
def test_bad_input(arguments, word, here, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps([{"prompt": "a cat", "loras": [["cat.safetensors", "cat"]]}]))
    done = here(*FAST, *arguments)
    assert done.returncode == 2 and word in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


LORA = str(ROOT / "weights/toy/loras/zib.safetensors")
GOOD = {"prompt": "a ball", "loras": [[LORA, "ball=zib ball"]]}


@pytest.mark.parametrize("content, word", [
    ("{", "cannot be read"), ("[" * 10 ** 5, "cannot be read"), ("[]", "must hold a list"), ('{"prompt": "x"}', "must hold"),
    ([1], "set 0 needs"), ([{**GOOD, "refrences": []}], "refrences is not known"), ([{**GOOD, "truth": 5}], "truth must"),
    ([GOOD, {"prompt": "a"}], "set 1 needs"), ([{**GOOD, "prompt": 3}], "prompt is no text"),
    ([{**GOOD, "loras": LORA}], "loras must be"), ([{**GOOD, "loras": [LORA]}], "loras must be"),
    ([{**GOOD, "loras": [[LORA, 1]]}], "loras must be"), ([{**GOOD, "loras": [[LORA]]}], "loras must be"),
    ([{**GOOD, "loras": [["no.safetensors", "ball"]]}], "no.safetensors does not exist"), ([{**GOOD, "style": 1}], "style"),
    ([{**GOOD, "style": ""}], "leave it out"), ([{**GOOD, "prompt": "\ud800"}], "prompt is no text"),
    ([{**GOOD, "loras": [[LORA, "ball=\ud800 ball"]]}], "trigger is no text"),
    ([{**GOOD, "style": "no.safetensors:0.5"}], "no.safetensors:0.5 does not exist"),
    ([{**GOOD, "references": []}], "references must be"), ([{**GOOD, "references": "x"}], "references must be"),
    ([{**GOOD, "references": ["nowhere"]}], "no pictures in the references nowhere"),
    ([{**GOOD, "references": ["."]}], "no pictures in the references ."), ([{**GOOD, "references": [1]}], "references 1")])
def test_sets_that_are_refused(content, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match="^sets.json") as caught:
        evaluate.read_sets(Path("sets.json"))
    assert word in str(caught.value) and len(str(caught.value).splitlines()) == 1
    (tmp_path / "sets.json").write_text(json.dumps([GOOD]))
    assert evaluate.read_sets(Path("sets.json")) == [GOOD]


@pytest.mark.parametrize("change, words", [
    ({"prompt": "a fish"}, ["set 1", '"ball" is not in the prompt']),
    ({"loras": [[LORA, "=zib ball"]]}, ["set 1", "names no subject"]),
    ({"loras": [[LORA, "ball=zib ball"], [LORA, "Ball"]]}, ["set 1", "two LoRAs are given"]),
    ({"loras": [[LORA, "ball=zib a zib"]], "prompt": "zib a zib ball"}, ["set 1", '"zib a zib" occurs 2 times']),
    ({"loras": [[LORA, "ball=" + "zib " * 80]]}, ["set 1", "77 tokens"]),
    ({"loras": [["broken.safetensors", "ball"]]}, ["set 1", "broken.safetensors", "damaged"]),
    ({"style": LORA, "--style": LORA}, ["set 1", "style of its own"]),
    ({"references": ["refs"]}, ["sets.json", "refs/a.png cannot be read as a picture"])])
def test_sets_that_cannot_be_drawn_are_refused_before_the_first_image(change, words, here, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs/a.png").write_text("no picture")
    style = [f"--style={change.pop('--style')}"] if "--style" in change else []
    (tmp_path / "sets.json").write_text(json.dumps([GOOD, {**GOOD, **change}]))
    done = here("--sets", "sets.json", "--quiet", "--no-scores", "--out", "r", *style)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "r").exists(), done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_flags_that_change_nothing_are_named(here, tmp_path):
    (tmp_path / "sets.json").write_text(json.dumps([GOOD]))
    done = here("--sets", "sets.json", "--quiet", "--no-scores", "--methods", "base", "--seeds", "0",
                "--set", '{"steps": 1}', "--prompts", "9", "--clip", "x")
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and len(lines) == 2 and "--prompts" in lines[0] and "--clip" in lines[1]
    done = here(*FAST, "--methods", "no-update,merge", "--set", '{"uncond_from": "base"}', "--out", "s")
    assert done.returncode == 2 and "not for merge" in done.stderr and not (tmp_path / "s").exists()


@pytest.mark.parametrize("clip", ["other", "broken"])
def test_scoring_models_that_cannot_score_are_refused(clip, here, tmp_path):
    """A text model in a CLIP's place, and a CLIP whose weights are cut off."""
    shutil.copytree(ROOT / "weights/toy/clip", tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").write_bytes((tmp_path / "broken/model.safetensors").read_bytes()[:5000])
    shutil.copytree(ROOT / "weights/toy/text_encoder", tmp_path / "other")
    for path in [*(ROOT / "weights/toy/tokenizer").iterdir(), ROOT / "weights/toy/clip/preprocessor_config.json"]:
        shutil.copy(path, tmp_path / "other")
    done = here("--seeds", "0", "--methods", "base", "--quiet", "--clip", clip, "--out", "r")
    assert done.returncode == 2 and "scoring models cannot be used" in done.stderr and not (tmp_path / "r").exists()
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_process_holds_its_results_while_it_loads(here, tmp_path, monkeypatch):
    """Else another one would think that all is done, and write the table."""
    seen, make = [], evaluate.Maker

    def loading(args):
        seen.append(evaluate.others_write(tmp_path / "r", rank=1))
        return make(args)
    monkeypatch.setattr(evaluate, "Maker", loading)
    assert here(*FAST, "--out", "r").returncode == 0 and seen == [True]


def test_references_that_change_are_not_mixed(here, tmp_path):
    (tmp_path / "refs").mkdir()
    pictures = evaluate.lesson_pictures("zib")
    Image.fromarray(pictures[0]).save(tmp_path / "refs/a.png")
    (tmp_path / "sets.json").write_text(json.dumps([{**GOOD, "references": ["refs"]}]))
    once = ["--sets", "sets.json", "--methods", "base", "--set", '{"steps": 1}', "--quiet"]
    assert here(*once, "--seeds", "0").returncode == 0
    Image.fromarray(pictures[1]).save(tmp_path / "refs/a.png")
    done = here(*once, "--seeds", "0-1")
    assert done.returncode == 2 and "another references for set 0" in done.stderr


def test_references_are_read_as_a_viewer_shows_them(tmp_path):
    """Photographs of a phone lie on their side and say so; transparent pictures hide colours that nobody sees."""
    picture = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6                                                # turn by 90 degrees, clockwise
    Image.fromarray(np.rot90(picture).copy()).save(tmp_path / "a.png", exif=exif)
    alpha = np.full((24, 16, 1), 255, np.uint8)
    alpha[:12] = 0
    Image.fromarray(np.concatenate([picture, alpha], 2)).save(tmp_path / "b.png")
    Image.fromarray(picture).convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    turned, transparent, printed = evaluate.read_pictures(str(tmp_path))
    assert (turned == picture).all()
    assert (transparent[:12] == 255).all() and (transparent[12:] == picture[12:]).all() and printed.shape == picture.shape
    Image.fromarray(np.arange(384, dtype=np.uint16).reshape(24, 16)).save(tmp_path / "d.png")
    with pytest.raises(ValueError, match=r"d\.png cannot be read as a picture \(it has more than 8 bits"):
        evaluate.read_pictures(str(tmp_path))


def test_references_with_the_name_of_an_embedded_lora(tmp_path, monkeypatch):
    """A folder "zib" is not the lesson zib: the scores of one must not be taken for the other's."""
    (tmp_path / "zib").mkdir()
    Image.fromarray(evaluate.lesson_pictures("pel")[0]).save(tmp_path / "zib/a.png")
    monkeypatch.setattr(evaluate, "TOY", ROOT / "weights/toy")      # seen from elsewhere
    monkeypatch.chdir(tmp_path)
    one = {"loras": [[LORA, "ball=zib ball"]]}
    clip = str(ROOT / "weights/toy/clip")
    picture, scores = evaluate.lesson_pictures("zib")[0], []
    for order in ((one, {**one, "references": ["zib"]}), ({**one, "references": ["zib"]}, one)):
        scorer = evaluate.Scorer(clip, clip, "cpu")
        scores.append({"references" in some: scorer.score(picture, "", evaluate.references_of(some))["dino_avg"]
                       for some in order})
    assert scores[0] == scores[1] and scores[0][False] != scores[0][True]


def test_prompts_are_added_to_a_folder(here, tmp_path):
    """A longer list goes on where a shorter one ended, and a shorter one reads its part; another prompt is refused."""
    short = ["--seeds", "0", "--methods", "base", "--quiet", "--no-scores", "--set", '{"steps": 1}', "--out", "r"]
    assert here(*short, "--prompts", "1").returncode == 0
    before = (tmp_path / "r/results-0.jsonl").read_bytes()
    done = here(*short, "--prompts", "2")
    after = (tmp_path / "r/results-0.jsonl").read_bytes()
    assert done.returncode == 0 and "| base | 2 |" in done.stdout and after.startswith(before) and after.count(b"\n") == 2
    done = here(*short, "--prompts", "1")
    assert done.returncode == 0 and "| base | 1 |" in done.stdout
    done = here(*short, "--prompts", "1", "--split", "tune")
    assert done.returncode == 2 and "another prompt, words or files for set 0" in done.stderr
    assert (tmp_path / "r/results-0.jsonl").read_bytes() == after


def test_images_that_failed_with_other_settings_are_no_obstacle(here, tmp_path, monkeypatch):
    short = ["--prompts", "1", "--seeds", "0", "--methods", "base", "--quiet", "--no-scores", "--out", "r"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Maker, "make", lambda *_: 1 / 0)
        assert here(*short, "--set", '{"steps": 2}').returncode == 1
    done = here(*short, "--set", '{"steps": 1}')
    assert done.returncode == 0 and "| base | 1 |" in done.stdout and "failed" not in done.stdout


@pytest.mark.parametrize("changes, word", [
    ('{"clip_skip": 99}', "base: clip_skip is 99"), ('{"scheduler": "lcm", "steps": 60}', "base: ")])
def test_settings_that_this_model_cannot_do_are_refused_before_the_first_image(changes, word, here, tmp_path):
    done = here(*FAST[:-2], "--methods", "base", "--out", "r", "--set", changes)
    assert done.returncode == 2 and word in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_what_a_prompt_cannot_say_is_named(here, tmp_path):
    """Merging's prompt holds every trigger, so its end is cut off first: a comparison must not hide that."""
    prompt = "a ball and a ring " + "in the snow " * 22 + "at night at night"
    sets = [{"prompt": prompt, "loras": [[LORA, "ball=zib ball"], [LORA.replace("zib", "pel"), "ring=pel ring"]]},
            {"prompt": "a (ball:1.2)", "loras": [[LORA, "ball=zib ball"]]}]
    (tmp_path / "sets.json").write_text(json.dumps(sets))
    done = here("--sets", "sets.json", "--seeds", "0", "--set", '{"steps": 1}', "--no-scores", "--quiet", "--methods",
                "merge,base")
    assert done.returncode == 0
    cut, foreign, *more = done.stderr.splitlines()
    assert "set 0: CLIP reads 77 tokens" in cut and "zib ball" in cut and cut.endswith('this is cut off: "at night"')
    assert 'set 1: "(ball:1.2)" is read as plain words' in foreign and not [line for line in more if "set 0" in line]


def test_a_damaged_image_and_a_reader_that_is_gone_do_not_cost_the_table(here, tmp_path, monkeypatch):
    short = ["--prompts", "1", "--seeds", "0", "--methods", "base", "--quiet", "--no-scores", "--set", '{"steps": 1}']
    assert here(*short, "--out", "r").returncode == 0
    (tmp_path / "r/images/base-0-0.png").write_bytes(b"")
    done = here(*short, "--out", "r")
    assert done.returncode == 0 and "| base | 1 |" in done.stdout
    again = subprocess.Popen([sys.executable, str(ROOT / "evaluate.py"), *short, "--out", "r"], cwd=tmp_path, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    again.stdout.close()
    assert again.wait() == 0 and not again.stderr.read()


def test_memory_that_ends_while_the_models_load(here, tmp_path, monkeypatch):
    def load(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(evaluate, "Maker", load)
    (tmp_path / "mine").mkdir()
    for out in ("r", "mine"):                           # a folder of the user's stays
        done = here(*FAST, "--out", out)
        assert done.returncode == 2 and "out of memory" in done.stderr and len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and not list((tmp_path / "mine").iterdir())


def test_references_of_all_loras_or_of_none(tmp_path):
    pel = LORA.replace("zib", "pel")
    own = shutil.copy(LORA, tmp_path / "zib.safetensors")
    for loras, names in (([[LORA + ":0.9", "ball"], [pel, "ring"]], ["lesson zib", "lesson pel"]),
                         ([[str(own), "ball"], [pel, "ring"]], []), ([[LORA.replace("zib", "ink"), "ball"]], [])):
        assert [name for name, _ in evaluate.references_of({"loras": loras})] == names


def at(number: int) -> dict:
    """What a line of results says of where it belongs."""
    return {"set": number, "group": number, "seed": 0, "seconds": 1.0}


def test_an_interval_is_of_figures_that_differ():
    lines = [{"column": "clora", **at(number), "success": number > 1, "leak": False,
              "clip": 0.1} for number in range(6)]
    _, success, leak, clip = evaluate.table(lines, ["clora"]).splitlines()[2].split(" | ")[1:5]
    assert success.startswith("67% (") and (leak, clip) == ("0% (0% to 46%)", "0.100")       # 1 - 0.025 ** (1 / 6)


def test_subjects_are_read_as_the_command_line_does():
    maker = SimpleNamespace(lora=lambda name: name)
    one, = evaluate.Maker.subjects(maker, {"loras": [["a.safetensors:0.5", " ball = zib ball "]]})
    assert (one.lora, one.word, one.trigger, one.weight) == ("a.safetensors", "ball", "zib ball", 0.5)


def test_sets_with_loras_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def find(source):
        asked.append(source)
        if source == "someone/else":
            raise ValueError("someone/else cannot be loaded")
        return Path(LORA if source == "someone/cats:zib.safetensors" else source)
    monkeypatch.setattr(evaluate, "find_lora", find)
    one = {"prompt": "a ball", "loras": [["someone/cats:zib.safetensors:0.5", "ball"]]}
    (tmp_path / "sets.json").write_text(json.dumps([one, one]))
    assert evaluate.read_sets(tmp_path / "sets.json") == [one, one] and asked == ["someone/cats:zib.safetensors"]
    (tmp_path / "sets.json").write_text(json.dumps([one, {**one, "style": "someone/else"}]))
    with pytest.raises(ValueError, match=r"sets.json: set 1: someone/else cannot be loaded"):
        evaluate.read_sets(tmp_path / "sets.json")


@pytest.mark.parametrize("changes, word", [
    ({"steps": "9"}, "steps"), ({"steps": 0}, "--steps"), ({"alpha": float("nan")}, "--alpha"), ({"eta": True}, "eta"),
    ({"scheduler": "euler"}, "euler"), ({"refine_at": 3}, "refine_at"), ({"refine_at": ["x"]}, "refine_at"),
    ({"dilate": 1}, "dilate"), ([1], "object"), ({"nonsense": 1}, "nonsense")])
def test_settings_that_are_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        evaluate.recipe_of("clora", {}, changes)
    with pytest.raises(ValueError, match=word):
        evaluate.recipe_of("clora", {"recipe": changes}, {})
    assert evaluate.recipe_of("no-mask", {}, {"refine_at": [1], "clip_skip": 1, "alpha": 2}).refine_at == (1,)


def test_lines_that_are_no_results_are_passed_over(tmp_path):
    good = {"column": "base", "set": 0, "group": 0, "seed": 1, "stamp": {}}
    lines = [b"{}", b"[]", b"12", b"\xff\xfe", b"[" * 10 ** 5,
             *(json.dumps(line).encode() for line in ({**good, "set": "0"}, good)), json.dumps(good).encode()[:-9]]
    (tmp_path / "results-0.jsonl").write_bytes(b"\n".join(lines))
    assert evaluate.read_results(tmp_path) == [good]


def test_results_of_other_settings_are_not_mixed(here, tmp_path):
    short = ["--prompts", "1", "--seeds", "0", "--methods", "base", "--quiet", "--no-scores", "--out", "r"]
    for same in ('{"steps": 2, "guidance": 2}', '{"steps": 2, "guidance": 2.0}'):
        assert here(*short, "--set", same).returncode == 0
    before = (tmp_path / "r/results-0.jsonl").read_bytes()
    done = here(*short, "--set", '{"steps": 3}')
    assert done.returncode == 2 and "changes" in done.stderr
    done = here(*short, "--set", same, "--low-memory")
    assert done.returncode == 2 and "another low_memory (False, now True)" in done.stderr
    assert (tmp_path / "r/results-0.jsonl").read_bytes() == before


def test_results_of_another_judge_are_not_mixed(here, monkeypatch):
    short = [*FAST, "--prompts", "1", "--seeds", "0", "--methods", "base", "--out", "r"]
    assert here(*short).returncode == 0
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b" " * (path.name == "judge.py"))
    done = here(*short)
    assert done.returncode == 2 and "another code" in done.stderr


def test_results_that_another_process_makes_meanwhile_with_other_settings(here, tmp_path, monkeypatch):
    """Two processes of one sweep, started together: each looks at what is there before the other has written anything."""
    arguments = ["--prompts", "1", "--seeds", "0-1", "--batch", "1", "--methods", "base", "--quiet", "--no-scores"]
    write = evaluate.append_line

    def and_the_other(path: Path, line: dict) -> None:
        write(path, line)
        other = {**line, "seed": 1 - line["seed"], "stamp": {**line["stamp"], "changes": {"steps": 3}}}
        write(tmp_path / "r/results-1.jsonl", other)
    monkeypatch.setattr(evaluate, "append_line", and_the_other)
    done = here(*arguments, "--out", "r", "--set", '{"steps": 2}', RANK="0", WORLD_SIZE="2")
    assert done.returncode == 2 and "another changes" in done.stderr and not (tmp_path / "r/table.md").exists()


def test_the_same_sweep_by_other_words(here, tmp_path, monkeypatch):
    """From another folder, and with the other name of the precision: nothing is another, so it goes on."""
    arguments = ["--prompts", "1", "--seeds", "0", "--methods", "base", "--quiet", "--set", '{"steps": 2}', "--style"]
    arguments += [os.path.relpath(ROOT / "weights/toy/loras/ink.safetensors"), "--curve", "r/new/curve.png", "--out"]
    assert here(*arguments, "r").returncode == 0 and (tmp_path / "r/new/curve.png").exists()
    before = (tmp_path / "r/results-0.jsonl").read_bytes()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    monkeypatch.setattr(evaluate, "TOY", Path(os.path.relpath(ROOT / "weights/toy")))
    arguments[-4] = os.path.relpath(ROOT / "weights/toy/loras/ink.safetensors")
    assert here(*arguments, "../r", "--dtype", "fp32").returncode == 0
    assert (tmp_path / "r/results-0.jsonl").read_bytes() == before


def test_scores_of_other_weights_are_not_mixed(here, tmp_path):
    shutil.copytree(ROOT / "weights/toy/clip", tmp_path / "clip")
    arguments = ["--prompts", "1", "--seeds", "0", "--methods", "base", "--quiet", "--set", '{"steps": 1}', "--clip", "clip",
                 "--out", "r"]
    assert here(*arguments).returncode == 0
    state = load_file(tmp_path / "clip/model.safetensors")
    save_file({**state, "text_projection.weight": -state["text_projection.weight"]}, tmp_path / "clip/model.safetensors",
              {"format": "pt"})
    done = here(*arguments)
    assert done.returncode == 2 and "another scores" in done.stderr


def test_peft_settings_beside_a_lora_count(here, tmp_path):
    """Where they are read: the first LoRA is kohya's, the second PEFT's."""
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"base_model.model.{name}.lora_{part}.weight": torch.ones(shape) for part, shape in
               (("A", (2, 48)), ("B", (48, 2)))}, tmp_path / "peft.safetensors")
    (tmp_path / "sets.json").write_text(json.dumps([{"prompt": "a ball", "loras": [["zib.safetensors", "ball=zib ball"]]}]))
    shutil.copy(LORA, tmp_path / "zib.safetensors")
    arguments = ["--sets", "sets.json", "--seeds", "0", "--methods", "base", "--quiet", "--set", '{"steps": 1}']
    assert here(*arguments, "--out", "r").returncode == 0
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 32}')
    assert here(*arguments, "--out", "r").returncode == 0
    shutil.copy(tmp_path / "peft.safetensors", tmp_path / "zib.safetensors")
    assert here(*arguments, "--out", "s").returncode == 0
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 16}')
    done = here(*arguments, "--out", "s")
    assert done.returncode == 2 and "another loras" in done.stderr


def test_verdicts():
    truth = [["ball", "zib"], ["star", "tam"]]

    def seen(*pairs):
        return [Seen(kind, look, 0.0, 0.0, 9) for kind, look in pairs]
    assert evaluate.verdict(seen(("ball", "zib"), ("star", "tam")), truth)["success"]
    assert evaluate.verdict(seen(("ball", "zib"), ("star", "red")), truth)["missing"]
    assert evaluate.verdict(seen(("ball", "zib"), ("star", "zib")), truth)["leak"]
    both = evaluate.verdict(seen(("ball", "zib"), ("star", "tam"), ("box", "zib")), truth)
    assert both["leak"] and both["extra"] and not both["success"] and not both["missing"]
    double = evaluate.verdict(seen(("ball", "zib"), ("ball", "zib"), ("star", "tam")), truth)
    assert double["leak"] and not double["success"] and not double["missing"]
    plain = evaluate.verdict(seen(("ball", "zib"), ("star", "tam"), ("box", "red")), truth)
    assert plain["success"] and plain["extra"], "an object more, in a look of its own, is no failure"


def test_verdicts_in_a_style_count_kinds_and_the_style():
    truth = [["ball", "zib"], ["star", "tam"]]
    ball, star = Seen("ball", "red", 0.0, 0.0, 9), Seen("star", "zib", 0.0, 0.0, 9)
    assert evaluate.verdict([ball, star], truth, ("duotone", "duotone"))["success"]
    plain = evaluate.verdict([ball, star], truth, ("duotone", ""))
    assert not plain["success"] and not plain["styled"] and not plain["missing"]
    assert evaluate.verdict([ball], truth, ("duotone", "duotone"))["missing"]
    assert not evaluate.verdict([ball], truth, ("duotone", "duotone"))["success"]


def test_tuning_and_test_prompts_share_no_pair():
    def pairs(split):
        return {tuple(sorted(look for _, look in one["truth"])) for one in evaluate.embedded_sets(split, 40, 2)}
    assert not pairs("tune") & pairs("test")


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_the_interval_covers_the_mean(spread):
    """Also where groups differ in what they can do: an interval over images alone would cover it in 60 of 100 cases."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        groups = np.repeat(np.arange(20), 15)
        shares = 0.4 + spread * rng.choice([-1, 1], 20)             # what each group can do
        values = (rng.random(300) < shares[groups]).astype(float)
        mean, low, high = evaluate.bootstrap(values, groups, rounds=200)
        assert low <= mean <= high
        covered += low <= 0.4 <= high
    assert covered >= 88


def test_the_interval_is_that_of_plain_loops():
    rng = np.random.default_rng(1)
    groups = rng.permutation(np.repeat([4, 7, 1, 0], [10, 3, 1, 6]))
    values = rng.random(20)
    rng, means = np.random.default_rng(0), []
    members = [values[groups == g] for g in (0, 1, 4, 7)]
    for _ in range(100):
        drawn = [members[n] for n in rng.integers(0, 4, 4)]
        means.append(np.mean([one for some in drawn for one in rng.choice(some, len(some))]))
    expected = [values.mean(), *np.percentile(means, [2.5, 97.5])]
    assert evaluate.bootstrap(values, groups, rounds=100) == pytest.approx(expected, rel=1e-12)


def test_table_pairs_every_method_with_merge_and_clora():
    lines = [{"column": column, **at(number), "success": column == "clora" or number < 2}
             for column in ("clora", "merge") for number in range(5)]
    lines += [{"column": "clora", **at(9), "success": False}]       # merge has no such image
    heading, _, clora, merge, *note = (line.split(" | ") for line in evaluate.table(lines, ["clora", "merge"]).splitlines())
    assert "over 6 combinations" in note[1][0]
    assert heading[3:5] == ["success less merge's", "success less clora's"]
    assert clora[2].startswith("83% (") and clora[3].startswith("+60% (") and not clora[4].strip()
    assert merge[2].startswith("40% (") and not merge[3].strip() and merge[4].startswith("-60% (")
    assert "clora's" not in evaluate.table([line for line in lines if line["column"] == "merge"], ["merge"])


def test_table_without_a_judge():
    """With models and prompts of one's own there is no success, and masks are CLoRA's alone."""
    lines = [{"column": column, **at(number), "clip": 0.25, **own} for number in range(5)
             for column, own in (("clora", {"mask": 0.3, "dino_avg": 0.5}), ("merge", {"dino_avg": 0.25} if number else {}))]
    heading, _, clora, merge, *_ = (line.split(" | ") for line in evaluate.table(lines, ["clora", "merge"]).splitlines())
    assert heading[2:9] == ["mask of a subject", "DINO avg", "CLIP", "DINO avg less merge's", "CLIP less merge's",
                            "DINO avg less clora's", "CLIP less clora's"]
    assert clora[2].startswith("30%") and clora[5:7] == ["+0.250", "+0.000 (none differs)"]
    assert merge[2] == "" and merge[3] == "0.250"
    bare = [{key: value for key, value in line.items() if key in ("column", "set", "group", "seed", "seconds")}
            for line in lines]
    assert "| merge | 5 | 1.0 |" in evaluate.table(bare, ["clora", "merge"])
    failed = [{"column": "clora", **at(9), "error": "x"}]
    assert "| clora | 5 of 6 |" in evaluate.table(lines + failed, ["clora", "merge"])
    said = evaluate.table(lines + failed, ["clora", "merge"])
    assert "1 images failed and are in no figure; the first, of clora: x" in said
    assert evaluate.table(failed, ["clora"]).splitlines()[0] == "no image was made"
    merge = [line for line in lines + failed if line["column"] == "clora"] + [{**failed[0], "column": "merge"}]
    assert "| merge | 0 of 1 |" in evaluate.table(merge, ["clora", "merge"])        # a row all the same


def test_table_pairs_faults_with_clora_too():
    lines = [{"column": column, **at(number), "success": not bad, "absent": bad, "leak": False}
             for column, bad in (("clora", False), ("switch", True)) for number in range(5)]
    heading, _, clora, switch, *_ = (line.split(" | ") for line in evaluate.table(lines, ["clora", "switch"]).splitlines())
    assert heading[5:8] == ["success less clora's", "an object is absent less clora's", "a texture leaks less clora's"]
    # five images that agree leave a bound, as for a share: Clopper and Pearson's of 52 %
    assert switch[5:8] == ["-100% (-100% to -48%)", "+100% (+48% to +100%)", "+0% (none differs)"]
    assert clora[5:8] == ["", "", ""]


def judged(sets: int, seeds: int, right=lambda number: number > 0, groups: int = 1000) -> list[dict]:
    return [{"column": "base", **at(number), "group": number % groups, "seed": seed, "success": right(number)}
            for number in range(sets) for seed in range(seeds)]


def test_few_combinations_are_drawn_by_prompt_and_few_prompts_not_at_all():
    drawn = "In brackets: 95 % intervals over 5 "
    for sets, groups, expected, note in (
            (4, 4, "75%", "No intervals: 5 combinations of LoRAs, or 5 prompts, are needed for them."),
            (5, 5, "80% (40% to 100%)", f"{drawn}combinations of LoRAs and the images of each."),
            (5, 1, "80% (40% to 100%)", f"{drawn}prompts and the images of each, for these LoRAs alone.")):
        *_, row, _, said = evaluate.table(judged(sets, 20, groups=groups), ["base"]).splitlines()
        assert row.startswith(f"| base | {20 * sets} | {expected}") and said.startswith(note)
        assert ("(" in row) == (sets == 5)


def test_a_unanimous_figure_is_no_surer_for_more_images_of_the_same_loras():
    """Else 50 images of five pairs that can do it would promise 93 % for a sixth pair, which was never seen."""
    for seeds in (1, 10):
        assert "| 100% (48% to 100%) |" in evaluate.table(judged(5, seeds, right=lambda number: True), ["base"])


def test_the_table_does_not_depend_on_the_order_of_the_lines():
    """Processes write their lines into files of their own, a resumed sweep behind those that are there."""
    rng = np.random.default_rng(0)
    lines = [{**line, "success": bool(rng.random() < 0.6), "clip": float(rng.random())} for line in judged(40, 3)]
    lines += [{**line, "column": "merge", "success": bool(rng.random() < 0.4)} for line in lines]
    expected = evaluate.table(lines, ["base", "merge"])
    for _ in range(5):
        rng.shuffle(lines)
        assert evaluate.table(lines, ["base", "merge"]) == expected


def test_prompts_with_the_same_loras_are_drawn_together():
    values = [{"column": "base", "set": n, "group": n, "seed": seed, "seconds": 1.0, "success": n < 30}
              for n in range(60) for seed in (0, 1)]
    alone, paired = ([*values], [{**line, "group": line["set"] // 10} for line in values])
    assert "50% (38% to 62%)" in evaluate.table(alone, ["base"]) and "50% (17% to 83%)" in evaluate.table(paired, ["base"])


@pytest.mark.parametrize("split, subjects", [("test", 2), ("tune", 2), ("test", 3)])
def test_no_prompt_occurs_twice(split, subjects):
    prompts = [one["prompt"] for one in evaluate.embedded_sets(split, 30, subjects)]
    assert len(set(prompts)) == 30


def test_more_prompts_than_there_are():
    alone = evaluate.embedded_sets("test", 32, 1)
    assert len(alone) == 32 and all(one["prompt"].startswith(f"a {one['truth'][0][0]} ") for one in alone)
    with pytest.raises(ValueError, match="there are only 32 different"):
        evaluate.embedded_sets("test", 48, 1)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("columns", [1, 2, 3, 6])
def test_every_process_makes_an_equal_share_of_every_column(columns, world):
    ranks = np.array([evaluate.rank_of(n, columns, world) for n in range(12 * columns)]).reshape(12, columns)
    for rank in range(world):
        assert ((ranks == rank).sum(axis=0) == 12 // world).all()


def test_scores_by_the_embedded_clip():
    """A picture is nearest to its own kind, and a caption that names it scores above one that does not."""
    clip = str(ROOT / "weights/toy/clip")
    scorer = evaluate.Scorer(clip, clip, "cpu")
    zib, pel = (evaluate.lesson_pictures(name) for name in ("zib", "pel"))
    references = [("zib", lambda: zib[8:]), ("pel", lambda: pel[8:])]
    right, wrong = (scorer.score(zib[0], text, references) for text in ("a zib ball", "a pel ring"))
    assert right["clip"] > wrong["clip"] and right["dino_min"] < right["dino_avg"] < right["dino_max"]
    assert scorer.score(zib[0], "a ball", references[:1])["dino_avg"] == right["dino_max"]
    each = [scorer.score(zib[0], "a ball", [(f"zib {n}", lambda n=n: zib[n:n + 1])])["dino_avg"] for n in range(8, len(zib))]
    assert len(set(each)) > 1 and right["dino_max"] == pytest.approx(np.mean(each), abs=1e-4)   # all references count alike
    assert len(scorer.score(zib[0], "a ball", [references[0]] * 2)) == 4 and len(scorer.score(zib[0], "a ball", [])) == 1


def test_pictures_are_prepared_as_the_scoring_model_says(tmp_path):
    """DINOv2 and others enlarge the picture beyond what they then cut out of its middle."""
    from transformers import ViTConfig, ViTModel
    vit = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16,
                             patch_size=8), add_pooling_layer=False).eval()
    vit.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16},
        "resample": 3, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3]}))
    scorer = evaluate.Scorer(str(tmp_path), str(ROOT / "weights/toy/clip"), "cpu")
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    middle = np.array(Image.fromarray(picture).resize((20, 20), Image.Resampling.BICUBIC))[2:18, 2:18] / 255
    pixels = torch.from_numpy((middle - [0.4, 0.5, 0.6]) / [0.1, 0.2, 0.3]).float().permute(2, 0, 1)
    with torch.no_grad():
        vector = vit(pixel_values=pixels[None]).last_hidden_state[:, 0]
    assert torch.allclose(scorer.look([picture]), vector / vector.norm(), atol=1e-5)


def test_merging_at_full_weight(here, tmp_path):
    (one,) = evaluate.embedded_sets("test", 1, 2)
    given = {**one, "loras": [[f"{file}:{weight}", words] for (file, words), weight in zip(one["loras"], ("1", "0.5"))]}
    bare = {**one, "loras": [one["loras"][0], given["loras"][1]]}
    for name, some in (("plain", one), ("given", given), ("bare", bare)):
        (tmp_path / f"{name}.json").write_text(json.dumps([some]))
        made = here("--sets", f"{name}.json", "--seeds", "0", "--methods", "merge,merge-full", "--set", '{"steps": 2}',
                    "--no-scores", "--quiet", "--out", name)
        assert made.returncode == 0 and "success less merge-full's" in made.stdout
    pictures = {(name, column): np.asarray(Image.open(tmp_path / name / f"images/{column}-0-0.png"))
                for name in ("plain", "given", "bare") for column in ("merge", "merge-full")}
    assert np.array_equal(pictures["given", "merge-full"], pictures["given", "merge"]), "a weight that is given stays"
    assert np.array_equal(pictures["bare", "merge-full"], pictures["given", "merge"]), "and 1 is what the others get"
    assert not np.array_equal(pictures["plain", "merge-full"], pictures["plain", "merge"])
    assert cli.main(["--from", str(tmp_path / "plain/images/merge-full-0-0.png"), "--out", "again", "--quiet"]) == 0
    again = np.asarray(Image.open(tmp_path / "again/merge-0.png"))
    assert np.abs(again.astype(int) - pictures["plain", "merge-full"]).max() <= 1


def test_a_failed_seed_does_not_take_its_batch_with_it(monkeypatch):
    maker = evaluate.Maker.__new__(evaluate.Maker)

    def make(one, column, recipe, seeds):
        if 1 in seeds:
            raise OSError("seed 1 is bad")
        return [(None, {"seed": seed}) for seed in seeds]
    monkeypatch.setattr(maker, "make", make, raising=False)
    facts = [facts for _, facts in maker.attempt({}, "clora", evaluate.Recipe(), (0, 1, 2))]
    assert facts == [{"seed": 0}, {"error": "seed 1 is bad"}, {"seed": 2}]


def test_a_gpu_that_fails_is_one_line(monkeypatch, capsys):
    def fail(*_):
        raise torch.AcceleratorError("CUDA error: ECC\nmore")
    # which PyTorch 2.6 has not
    monkeypatch.setattr(torch, "AcceleratorError", type("AcceleratorError", (RuntimeError,), {}), raising=False)
    monkeypatch.setattr(evaluate, "evaluate", fail)
    assert evaluate.main(["--quiet"]) == 1
    assert capsys.readouterr().err == "evaluate: the GPU failed (CUDA error: ECC); started again, it goes on where it was\n"


def test_own_sets_lora_files_that_change_and_ranks(here, tmp_path):
    """As with a model of one's own: no judge; and a LoRA that was exchanged under its name is not mixed with the old one."""
    lora = tmp_path / "mine.safetensors"
    shutil.copy(LORA, lora)
    sets = [{"prompt": "a ball and a ring", "loras": [[str(lora), "ball=zib ball"],
                                                      [LORA.replace("zib", "pel"), "ring=pel ring"]]}]
    (tmp_path / "sets.json").write_text(json.dumps(sets))
    own = ["--sets", "sets.json", "--seeds", "0-1", "--set", '{"steps": 2}', "--quiet", "--no-scores"]
    waiting = subprocess.Popen([sys.executable, str(ROOT / "evaluate.py"), *own, "--methods", "merge,clora"], cwd=tmp_path,
                               env={**os.environ, "RANK": "1", "WORLD_SIZE": "2"})
    deadline = time.time() + 60
    while not (tmp_path / "runs/evaluate/results-1.jsonl").exists() and time.time() < deadline:
        time.sleep(0.05)
    done = here(*own, "--methods", "merge,clora", RANK="0", WORLD_SIZE="2")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "| merge | 2 |" in done.stdout and "| clora | 2 |" in done.stdout and waiting.wait() == 0
    assert (tmp_path / "runs/evaluate/grid.png").exists()
    shutil.copy(LORA.replace("zib", "tam"), lora)
    done = here(*own, "--methods", "merge,clora")
    assert done.returncode == 2 and "another loras" in done.stderr
    half = here(*own, "--methods", "merge,base", "--out", "half", RANK="0", WORLD_SIZE="2")
    assert half.returncode == 0 and "2 of 4 images are still to be made" in half.stderr
    for ranks in ({"RANK": "3", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "0"}, {"RANK": "x"}):
        done = here(*own, **ranks)
        assert done.returncode == 2 and "RANK" in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_image_made_twice_counts_once_in_the_curve():
    lines = [{"column": column, **at(number), "seconds": 1.0 + number, "success": number == 0}
             for column in ("clora", "merge") for number in range(3)]
    once, twice = (np.asarray(evaluate.curve(some, ["clora", "merge"])) for some in (lines, lines + lines[:1]))
    assert (once == twice).all()
