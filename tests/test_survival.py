"""Sweeps that are killed at any moment, two processes in one folder, and the same bytes from the same command.

Every test runs in a process of its own that imports everything once and then forks, so that a run that is killed
after a moment has not spent it on importing PyTorch:  python -m tests.test_survival TEST FOLDER
"""

import contextlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import cli
import evaluate
import weights
from tests.test_fuzz import FLAGS, PROMPTS, TRIED
from weights.toy import judge

ROOT = Path(__file__).parents[1]
SWEEP = ["--prompts", "2", "--seeds", "0-2", "--methods", "merge,base", "--batch", "2", "--set", '{"steps": 1}',
         "--no-scores", "--quiet"]
WANTED = {(column, number, seed) for column in ("merge", "base") for number in range(2) for seed in range(3)}
CLORA = ["--steps", "2", "--refine-steps", "0", "--quiet", "--no-panel", "--no-report"]


def fork(program: str, argv: list[str], log: Path, before: Callable = lambda: None) -> int:
    """Starts `python program argv` in a copy of this process, its output in `log` -> process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        before()
        sys.argv = [program, *argv]
        runpy.run_path(str(ROOT / program), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def end(pid: int) -> int:
    """Waits -> exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def images(folder: Path) -> dict[str, bytes]:
    """What is in images/, by name, every picture whole."""
    found = {}
    for path in (folder / "images").iterdir():
        with Image.open(path) as image:
            image.load()
        found[path.name] = path.read_bytes()
    return found


def check_whole(folder: Path, expected: dict[str, bytes]) -> None:
    """One line and one picture for each image, the bytes of a sweep that nobody disturbed, and nothing else."""
    lines = [json.loads(line) for line in (folder / "results-0.jsonl").read_text().splitlines() if not damaged(line)]
    assert sorted((line["column"], line["set"], line["seed"]) for line in lines) == sorted(WANTED), "lost or doubled"
    assert images(folder) == expected
    assert {path.name for path in folder.iterdir()} == {"images", "results-0.jsonl", "table.md", "grid.png"}


def damaged(line: str) -> bool:
    try:
        json.loads(line)
        return False
    except ValueError:
        return True


def dies_at_a_move(after: bool) -> Callable:
    """The process kills itself at its second move of a file into place: before it, or after it and before the line."""
    def prepare() -> None:
        move, count = os.replace, [0]

        def replace(source, target):
            count[0] += 1
            if count[0] == 2 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            move(source, target)
            if count[0] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        os.replace = replace
    return prepare


def kills(base: Path) -> None:
    log, rng = base / "log", random.Random(0)
    start = time.time()
    assert end(fork("evaluate.py", [*SWEEP, "--out", str(base / "whole")], log)) == 0, log.read_text()
    length, expected = time.time() - start, images(base / "whole")
    check_whole(base / "whole", expected)
    assert len(expected) == len(WANTED)
    killed, sweeps, temporaries, torn = 0, 0, 0, 0
    while killed < 50:
        folder = base / f"sweep{sweeps}"
        while True:
            pid = fork("evaluate.py", [*SWEEP, "--out", str(folder)], log,
                       dies_at_a_move(killed % 8 == 1) if killed % 4 == 1 else lambda: None)
            if killed % 4 != 1:
                time.sleep(rng.uniform(0, 0.7 * length))
                os.kill(pid, signal.SIGKILL)            # it may have ended: a process not waited for is still there
            code = end(pid)
            if code == 0:
                break
            assert code == -signal.SIGKILL, log.read_text()
            killed += 1
            temporaries += any(path.name.startswith(".") for path in folder.glob("images/*"))
            results = folder / "results-0.jsonl"
            if killed % 6 == 5 and results.exists() and results.stat().st_size:     # as if killed within the write
                results.write_bytes(results.read_bytes()[:-rng.randrange(1, 60)])
                torn += 1
        check_whole(folder, expected)
        sweeps += 1
    print(f"{killed} kills")
    assert temporaries and torn and sweeps > 1, "the kills met nothing that could be damaged"


def two_sweeps(base: Path) -> None:
    """The second one says so and ends; the first goes on undisturbed. Then ranks: each has a file of its own."""
    folder, logs = base / "same", [base / "log0", base / "log1"]
    first = fork("evaluate.py", [*SWEEP, "--out", str(folder)], logs[0])
    while not (folder / "results-0.jsonl").exists() or not (folder / "results-0.jsonl").stat().st_size:
        time.sleep(0.005)
    os.kill(first, signal.SIGSTOP)                      # in the middle of its sweep, however slow this machine is
    code = end(fork("evaluate.py", [*SWEEP, "--out", str(folder)], logs[1]))
    os.kill(first, signal.SIGCONT)
    message = logs[1].read_text()
    assert code == 2 and message.count("\n") == 1, message
    assert f"another process is writing to {folder / 'results-0.jsonl'}" in message
    assert end(first) == 0, logs[0].read_text()
    check_whole(folder, images(folder))

    def rank(n: int) -> Callable:
        return lambda: os.environ.update(RANK=str(n), WORLD_SIZE="2")
    ranks = [fork("evaluate.py", [*SWEEP, "--out", str(base / "ranks")], logs[n], rank(n)) for n in range(2)]
    assert [end(pid) for pid in ranks] == [0, 0], [log.read_text() for log in logs]
    lines = evaluate.read_results(base / "ranks")
    assert sorted((line["column"], line["set"], line["seed"]) for line in lines) == sorted(WANTED)
    assert images(base / "ranks") == images(folder)


def two_pictures(base: Path) -> None:
    """clora.py thrice at once with one seed in one folder: whole pictures, the same bytes, nothing left over."""
    pids = [fork("clora.py", [*CLORA, "--out", str(base / "out")], base / f"log{n}") for n in range(3)]
    assert [end(pid) for pid in pids] == [0] * 3, (base / "log0").read_text()
    (path,) = (base / "out").iterdir()
    assert end(fork("clora.py", [*CLORA, "--out", str(base / "alone")], base / "log")) == 0
    assert path.name == "clora-0.png" and path.read_bytes() == (base / "alone/clora-0.png").read_bytes()
    # and a process that was not forked, with the same number of threads
    subprocess.run([sys.executable, str(ROOT / "clora.py"), *CLORA, "--out", str(base / "fresh")], check=True,
                   capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert path.read_bytes() == (base / "fresh/clora-0.png").read_bytes()


def commands(base: Path) -> None:
    """Hostile arguments as real processes, from sys.argv to the exit code."""
    rng = random.Random(0)
    words = [[f"--{flag}", value] for flag, values in FLAGS.items() for value in values if flag not in ("lora", "")]
    cases = rng.sample(words, 36) + [["--prompt", text, "--method", "base"] for text in rng.sample(PROMPTS, 6)]
    for n, argv in enumerate(cases):
        log = base / f"log{n}"
        brief = ["--quiet", "--steps", "1", "--no-panel", "--no-report"]
        code = end(fork("clora.py", [*brief, "--out", str(base / f"out{n}"), *argv], log))
        lines = [line for line in log.read_text(errors="replace").splitlines() if not line.startswith("clora: warning: ")]
        left = list(base.glob(f"out{n}/*"))
        if code == 0:
            assert len(left) == len(lines) == 1, (argv, lines)
        else:
            assert code == 2 and len(lines) == 1 and lines[0].startswith("clora: ") and not left, (argv, code, lines)
    print(f"{len(cases)} commands")


TESTS = {"commands": commands, "kills": kills, "two_sweeps": two_sweeps, "two_pictures": two_pictures}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", TESTS)
def test_survival(name, tmp_path):
    done = subprocess.run([sys.executable, "-m", "tests.test_survival", name, str(tmp_path)], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    if name == "commands":
        TRIED["commands in processes of their own"] += int(done.stdout.split()[-2])
    if name == "kills":
        TRIED["kills of a sweep"] += (killed := int(done.stdout.split()[0]))
        assert killed >= 50


if __name__ == "__main__":
    torch.set_num_threads(1)                            # a pool of threads would not survive a fork
    model, seen = weights.load_model(str(cli.TOY)), judge.load_judge()
    weights.load_model = lambda *_: model
    judge.load_judge = lambda *_: seen
    TESTS[sys.argv[1]](Path(sys.argv[2]))
