"""What the README says of the files is true, and its example runs as it is printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def lines_of(name: str) -> int:
    path = ROOT / name
    return sum(len(file.read_text().splitlines()) for file in (path.rglob("*.py") if path.is_dir() else [path]))


def test_the_table_of_files():
    rows = re.findall(r"^\| (\[`.*) \| ([\d+ ]+) \|", README, re.MULTILINE)
    assert len(rows) > 12
    for names, counts in rows:
        files = re.findall(r"\]\(([^)]+)\)", names)
        assert [int(count) for count in counts.split("+")] == [lines_of(file) for file in files], names


def test_the_example_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "weights").symlink_to(ROOT / "weights")            # it writes into the folder where it runs
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "composed.png") as picture:
        assert picture.size == (128, 128)
    assert len(done.stdout.splitlines()) == 20 and "tensor" in done.stdout


def test_citation():
    """The keys that the format requires (citation-file-format 1.2.0), and the paper."""
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"authors", "cff-version", "message", "title"} <= said.keys() and said["cff-version"] == "1.2.0"
    assert "2403.19776" in said["preferred-citation"]["journal"] and len(said["preferred-citation"]["authors"]) == 4
