"""Damaged and hostile input, by the thousand: each ends in one clear line and exit code 2, or in a picture.

Nothing here may end in a traceback, a hang or a crash, run code, leave a file behind, or take memory because a file
says so. All of it is drawn from fixed seeds; pytest's last lines say how many inputs were tried.
"""

import contextlib
import io
import json
import os
import pickle
import random
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save, save_file
from torch import Tensor

import cli
from lora import attach
from tests.conftest import TINY_UNET
from unet import UNet
from weights import load_model
from weights.lora import read_lora

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
TRIED: Counter = Counter()              # kind of input -> how many; conftest.py prints it
LAYER, CONV = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q", "down_blocks.0.resnets.0.conv1"


def every(kind: str, cases: Iterable[tuple], attempt: Callable) -> None:
    """Tries all cases, each (name, what `attempt` takes...), and reports every one that failed."""
    failures = []
    for name, *case in cases:
        TRIED[kind] += 1
        try:
            attempt(*case)
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    assert not failures, f"{len(failures)} {kind} failed\n" + "\n".join(failures[:25])


def refusal(action: Callable) -> str | None:
    """The ValueError's message, checked to be one line of bearable length; None if there was nothing to refuse."""
    try:
        action()
    except ValueError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and len(message) < 1000, message
        return message
    return None


def whole(path: Path) -> bool:
    with Image.open(path) as image:
        image.load()
        return image.mode == "RGB"


def command(out: Path, *argv: str) -> int:
    """Runs the command line: pictures and exit code 0, or one line, exit code 2 and nothing left behind."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            code = cli.main([*argv, "--out", str(out), "--quiet"])
        except SystemExit as stop:
            code = stop.code
    try:
        check_end(code, stdout.getvalue(), stderr.getvalue(), out)
    finally:
        if os.path.isdir(out):
            shutil.rmtree(out)
    return code


def check_end(code: int, stdout: str, stderr: str, out: Path) -> None:
    lines = [line for line in stderr.splitlines() if not line.startswith("clora: warning: ")]
    assert len(stderr) < 2000, f"{len(stderr)} characters: {stderr[:200]}"
    left = sorted(out.iterdir(), key=lambda path: path.stem) if os.path.isdir(out) else []
    if code == 0:
        assert not lines and left and stdout == "".join(f"{path}\n" for path in left), (lines, stdout)
        assert all(map(whole, left))
    else:
        assert code == 2 and len(lines) == 1 and lines[0].startswith("clora: "), (code, lines)
        assert not stdout and not left, (lines, stdout, left)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder that is loaded and run in no time: the recorded runs' text encoder and VAE, a smaller UNet."""
    path = Path(shutil.copytree(GOLDEN / "model", tmp_path_factory.mktemp("fuzz") / "model"))
    torch.manual_seed(0)
    config = json.loads((path / "unet/config.json").read_text())
    changes = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(TINY_UNET).items()}
    (path / "unet/config.json").write_text(json.dumps({**config, **changes}))
    save_file(UNet(TINY_UNET).state_dict(), path / "unet/diffusion_pytorch_model.safetensors")
    (path / "clora.json").write_text('{"map_level": 1, "recipe": {"alpha": 2.0, "steps": 1, "refine_steps": 0}}')
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def loras(folder, model) -> list[str]:
    """Arguments for two LoRAs that fit the model."""
    words = []
    for seed, name in enumerate(("cat", "dog")):
        path = folder.parent / f"{name}.safetensors"
        save_file(tensors_of("LoRA", seed), path)
        words += ["--lora", str(path), f"{name}=sks {name}"]
    return words


# --- LoRA files -------------------------------------------------------------------------------------------------------

def tensors_of(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """A small LoRA file of each algorithm, on a linear layer [32, 32] and a 3x3 convolution [32, 32, 3, 3]."""
    generator = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.1
    parts: dict[str, dict[str, Tensor]] = {"": {}, "conv": {}}
    for layer, kernel in (("", ()), ("conv", (3, 3))):
        ones = (1,) * len(kernel)
        if kind in ("LoRA", "DoRA", "PEFT"):
            parts[layer] = {"lora_down.weight": r(4, 32, *kernel), "lora_up.weight": r(32, 4, *ones)}
        if kind == "DoRA":
            parts[layer]["dora_scale"] = r(32, 1, *ones).abs() + 0.5
        if kind == "LoHa":
            parts[layer] = {f"hada_w{n}_{side}": r(*shape) for n in (1, 2)
                            for side, shape in (("a", (32, 2)), ("b", (2, 32 * 3 ** len(kernel))))}
        if kind == "LoKr":
            parts[layer] = {"lokr_w1": r(8, 4), "lokr_w2_a": r(4, 2), "lokr_w2_b": r(2, 8, *kernel)}
    if kind == "Tucker":
        parts["conv"] = {"lora_down.weight": r(4, 32, 1, 1), "lora_up.weight": r(32, 4, 1, 1),
                         "lora_mid.weight": r(4, 4, 3, 3)}
    keys = {"": "lora_unet_" + LAYER.replace(".", "_"), "conv": "lora_unet_" + CONV.replace(".", "_")}
    tensors = {f"{keys[layer]}.{part}": value for layer, some in parts.items() for part, value in some.items()}
    if kind == "PEFT":
        names = {keys[""]: f"unet.{LAYER}", keys["conv"]: f"unet.{CONV}"}
        return {f"{names[key.split('.')[0]]}.lora_{'A' if 'down' in key else 'B'}.weight": v for key, v in tensors.items()}
    return tensors | {f"{key}.alpha": torch.tensor(2.0) for layer, key in keys.items() if parts[layer]}


KINDS = ("LoRA", "PEFT", "DoRA", "LoHa", "LoKr", "Tucker")


@pytest.fixture
def try_lora(tiny_unet, tmp_path) -> Callable[[bytes], None]:
    """Reads these bytes as a LoRA: refused with the file's name, or factors that the UNet runs with."""
    path, inputs = tmp_path / "bad.safetensors", (torch.randn(1, 4, 8, 8), 1, torch.randn(1, 7, 32))
    taken = []

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        message = refusal(lambda: taken.append(read_lora(path, tiny_unet)))
        assert message is None or message.startswith(str(path)), message
        if message is None:
            lora = taken.pop()
            assert lora.unet and all(x.isfinite().all() for layer in lora.unet.values() for x in (layer.down, layer.up))
            attach(tiny_unet, [lora])
            with torch.inference_mode():
                assert tiny_unet(*inputs, torch.ones(1, 1))[0].shape == (1, 4, 8, 8)
            attach(tiny_unet, [])
    return attempt


def flip(content: bytes, rng: random.Random, count: int, end: int | None = None) -> bytes:
    damaged = bytearray(content)
    for _ in range(count):
        damaged[rng.randrange(end or len(content))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def test_damaged_bytes_of_lora_files(try_lora):
    def cases():
        rng = random.Random(0)
        for kind in KINDS:
            content = save(tensors_of(kind))
            head = 8 + struct.unpack("<Q", content[:8])[0]
            for n in range(25):
                yield f"{kind} cut {n}", content[:rng.randrange(len(content))]
                yield f"{kind} flips in the header {n}", flip(content, rng, rng.choice((1, 1, 3)), head)
                yield f"{kind} flips {n}", flip(content, rng, rng.choice((1, 8, 64)))
                at, size = rng.randrange(len(content)), rng.randrange(200)
                yield f"{kind} overwritten {n}", content[:at] + rng.randbytes(size) + content[at + size:]
                yield f"{kind} with a hole {n}", content[:at] + content[at + size + 1:]
            for n, length in enumerate((0, 1, head - 9, head - 7, len(content), 2 ** 31, 2 ** 32 - 1, 2 ** 62, 2 ** 64 - 1)):
                yield f"{kind} header length {n}", struct.pack("<Q", length) + content[8:]
        for n in range(60):
            yield f"noise {n}", rng.randbytes(rng.randrange(400))
            yield f"noise after a header's length {n}", struct.pack("<Q", 40) + b"{" + rng.randbytes(100)
    every("damaged LoRA bytes", cases(), try_lora)


HOSTILE_JSON = (None, True, -1, 0, 2 ** 31, 2 ** 63, 10 ** 30, 1.5, "", "F32", "F64", "I64", "F8_E4M3", "BF16", "x" * 999,
    [],
                {}, [-1], [2 ** 62, 2 ** 62], [[1]], [0], [0, 0], [0, 10 ** 15], {"a": []}, "\u202e", [1] * 99)


def test_headers_that_lie(try_lora):
    def cases():
        rng = random.Random(1)
        for n in range(300):
            content = save(tensors_of(rng.choice(KINDS)), {"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 2}'})
            size = struct.unpack("<Q", content[:8])[0]
            header, body = json.loads(content[8:8 + size]), content[8 + size:]
            key = rng.choice([key for key in header if key != "__metadata__"])
            kind = rng.randrange(5)
            if kind == 0:
                header[key][rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(HOSTILE_JSON)
            elif kind == 1:
                header[key] = rng.choice(HOSTILE_JSON)
            elif kind == 2:
                name = rng.choice(("", "\n", "lora_unet_", key + ".weight", "x" * 5000, "🐈.lora_down.weight"))
                header[name] = header.pop(key)
            elif kind == 3:
                note = rng.choice(('{"unet.lora_alpha": 1e999}', "[]", "[[]]", "[1]", "null", "9", "{", "[" * 10 ** 5,
                                   '{"unet.lora_alpha": ' + "9" * 400 + "}", '{"unet.alpha_pattern": {"": 1, "^": 2}}',
                                   '{"unet.alpha_pattern": {"to_q": "x"}}', '{"unet.alpha_pattern": [1]}',
                                   '{"unet.lora_alpha": true, "unet.use_rslora": "x"}', '{"unet.lora_alpha": [1]}'))
                header["__metadata__"] = {"lora_adapter_metadata": note}
            else:
                other = rng.choice([name for name in header if name != "__metadata__"])
                header[key]["data_offsets"], header[other]["shape"] = header[other]["data_offsets"], header[key]["shape"]
            text = json.dumps(header).encode()
            yield f"header {n}", struct.pack("<Q", len(text)) + text + body
    every("LoRA headers that lie", cases(), try_lora)


def damage(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    """One thing wrong with one tensor: its values, type, shape or name."""
    tensors = dict(tensors)
    key = rng.choice(sorted(tensors))
    value = tensors[key]
    other = rng.choice([torch.int8, torch.int64, torch.bool, torch.float64, torch.float16, torch.bfloat16, torch.uint8,
                        torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
    number = rng.choice((float("nan"), float("inf"), -float("inf"), 1e38, -3e38, 1e-45, 0.0))
    changed = rng.choice((
        lambda: value.to(other), lambda: torch.full_like(value, number),
        lambda: torch.where(torch.rand(value.shape) < 0.05, number, value),
        lambda: value.T.contiguous() if value.dim() == 2 else value.flatten(), lambda: value[None],
        lambda: value[..., None], lambda: value.reshape(-1)[:0], lambda: torch.cat([value.reshape(-1)] * 2),
        lambda: torch.tensor(1.0), lambda: value.flatten()[:1], lambda: torch.ones(1, 1, 1, 1, 1, 1, 1)))()
    name = rng.choice((key, key, key, key, key + ".weight", key.replace("weight", "bias"), key.upper(), "x" + key, key[:-3],
                       key.replace("_blocks_0", "_blocks_9"), key.replace("unet", "te"), key.replace("lora_", "lora__")))
    if rng.random() < 0.15:
        del tensors[key]
        return tensors
    return {name if k == key else k: changed if k == key else v for k, v in tensors.items()}


def test_tensors_that_are_wrong(try_lora):
    rng = random.Random(2)
    torch.manual_seed(0)
    cases = ((f"{n}", save(damage(tensors_of(KINDS[n % len(KINDS)]), rng))) for n in range(480))
    every("LoRA tensors that are wrong", cases, try_lora)


# --- pickles ----------------------------------------------------------------------------------------------------------

def payloads(canary: Path) -> dict[str, bytes]:
    """Pickles that make a file, or take memory or time, when they are loaded without care."""
    touch = f"open({str(canary)!r}, 'w')"

    class Call:
        def __init__(self, function: Callable, *arguments):
            self.what = function, arguments

        def __reduce__(self):
            return self.what
    calls = {"os.system": Call(os.system, f"touch '{canary}'"), "eval": Call(eval, touch), "exec": Call(exec, touch),
             "Path.touch": Call(Path.touch, canary), "subprocess": Call(subprocess.run, ["touch", str(canary)]),
             "getattr": Call(getattr, "", "join"), "torch.load": Call(torch.load, str(canary)),
             "import": Call(__import__, "antigravity"), "open": Call(open, str(canary), "w")}
    made = {f"{name}, protocol {protocol}": pickle.dumps({"x": call}, protocol)
            for name, call in calls.items() for protocol in (0, 2, 4)}
    made["a name of builtins"] = b"\x80\x02cbuiltins\neval\nX" + struct.pack("<I", len(touch)) + touch.encode() + b"\x85R."
    made["bytearray of 2 GB"] = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x80\x00\x85R."
    made["a string of 2 GB"] = b"\x80\x02X\xff\xff\xff\x7f."
    made["lists in lists"] = b"\x80\x02" + b"]" * 10 ** 5 + b"a" * (10 ** 5 - 1) + b"."
    made["doubling"] = b"\x80\x02]q\x00" + b"".join(b"(h%ch%ct0q%c" % (n, n, n + 1) for n in range(100)) + b"."
    return made


def zipped(content: bytes, compress: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compress, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return stream.getvalue()


def legacy(content: bytes) -> bytes:
    """The layout of torch.save before 1.6: magic number, protocol, system, then the object."""
    parts = (0x1950a86a20f9469cfc6c, 1001, {"protocol_version": 1001, "little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in parts) + content


def test_pickles(tiny_unet, tmp_path):
    """As a LoRA and as a model: nothing runs, whatever the archive around it and whatever bits are flipped."""
    canary, rng = tmp_path / "ran", random.Random(3)

    def attempt(content: bytes) -> None:
        for path, load in ((tmp_path / "x.ckpt", load_model), (tmp_path / "x.pt", lambda path: read_lora(path, tiny_unet))):
            path.write_bytes(content)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                message = refusal(lambda path=path, load=load: load(path))
            assert message and path.name in message, message
            assert not canary.exists(), "code was run"

    def cases():
        for name, content in payloads(canary).items():
            for form in (bytes, zipped, legacy):
                yield f"{name}, {form.__name__}", form(content)
            for n in range(2):
                form = rng.choice((bytes, zipped, legacy))
                yield f"{name}, flipped {n}", flip(form(content), rng, 2)
    every("pickles", cases(), attempt)


def test_damaged_checkpoints(tiny_unet, tmp_path):
    stream, old = io.BytesIO(), io.BytesIO()
    torch.save(tensors_of("LoRA"), stream)
    torch.save({"state_dict": tensors_of("DoRA")}, old, _use_new_zipfile_serialization=False)
    rng = random.Random(4)

    def attempt(content: bytes) -> None:
        for path, load in ((tmp_path / "x.pt", lambda path: read_lora(path, tiny_unet)), (tmp_path / "x.ckpt", load_model)):
            path.write_bytes(content)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                message = refusal(lambda path=path, load=load: load(path))
            assert message is None and path.suffix == ".pt" or path.name in message

    def cases():
        for name, content in (("zip", stream.getvalue()), ("legacy", old.getvalue())):
            for n in range(60):
                yield f"{name} cut {n}", content[:rng.randrange(len(content))]
                yield f"{name} flips {n}", flip(content, rng, rng.choice((1, 4, 40)))
    every("damaged checkpoints", cases(), attempt)


HUGE = """
    import resource, sys
    from pathlib import Path
    import torch
    from weights.lora import read_lora
    from weights import load_model
    from tests.conftest import TINY_UNET
    from unet import UNet
    torch.set_num_threads(1)
    unet, before = UNet(TINY_UNET), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in sys.argv[1:]:
        for load in (lambda path: read_lora(path, unet), load_model):
            try:
                load(Path(name))
                print(name, "was loaded")
            except ValueError as error:
                pass
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if now - before > 2 ** 20 // (1 if sys.platform == "linux" else 1024):
            print(name, "took", (now - before) // 1024, "MiB")
            before = now
"""


def test_files_that_claim_to_be_huge(folder, tmp_path):
    """In a process of its own, whose peak of memory is measured: less than 1 GB above where it began, for all together."""
    key = "lora_unet_" + LAYER.replace(".", "_") + ".lora_down.weight"
    files = {}
    for n, shape in enumerate(([10 ** 9, 32], [4, 10 ** 9], [2 ** 40], [2 ** 32, 2 ** 32], [1] * 10 ** 4, [4, 32])):
        size = 4
        for length in shape:
            size *= length
        for end in (size, 512):
            header = json.dumps({key: {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
            files[f"{n}-{end % 97}.safetensors"] = struct.pack("<Q", len(header)) + header + bytes(512)
    files["bomb.pt"] = zipped(bytes(5 * 2 ** 28), zipfile.ZIP_DEFLATED)
    for name, content in payloads(tmp_path / "ran").items():
        if any(word in name for word in ("GB", "lists", "doubling")):
            files |= {f"{name} {form.__name__}.pt": form(content) for form in (bytes, zipped, legacy)}
    stream = io.BytesIO()
    torch.save({key: torch.ones(1, 1).expand(10 ** 9, 32), "conv_in.weight": torch.ones(1).expand(2 ** 40)}, stream)
    files["expanded.pt"] = stream.getvalue()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for n, (file, change) in enumerate([
            ("unet", {"layers_per_block": 10 ** 9}), ("unet", {"block_out_channels": [10 ** 9, 10 ** 9]}),
            ("unet", {"cross_attention_dim": 10 ** 12}), ("text_encoder", {"num_hidden_layers": 10 ** 9}),
            ("text_encoder", {"vocab_size": 10 ** 12}), ("text_encoder", {"max_position_embeddings": 10 ** 11}),
            ("vae", {"layers_per_block": 10 ** 8}), ("vae", {"block_out_channels": [32] * 10 ** 5})]):
        broken = Path(shutil.copytree(folder, tmp_path / f"model{n}"))
        path = broken / file / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        files[broken.name] = b""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(HUGE), *(str(tmp_path / name) for name in files)], cwd=ROOT,
                          capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    TRIED["files that claim to be huge"] += 2 * len(files)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr[-2000:]


# --- model folders ----------------------------------------------------------------------------------------------------

VALUES = (None, True, -1, 0, 7, 10 ** 9, 10 ** 400, 1e308, float("nan"), float("inf"), "", "x" * 2000, "\n", [], [[]], [1,
    "x"], {},
          {"a": 1})


def test_damaged_model_folders(folder, tmp_path):
    """Every key of every JSON file gets hostile values, and the files are cut and flipped."""
    rng, broken, out = random.Random(5), Path(shutil.copytree(folder, tmp_path / "model")), tmp_path / "out"
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".json", ".txt")]
    tensors = [path.relative_to(folder) for path in folder.rglob("*.safetensors")]

    def attempt(file: Path, content: bytes) -> None:
        (broken / file).write_bytes(content)
        try:
            command(out, "--model", str(broken), "--prompt", "a cat", "--method", "base", "--height", "32", "--width", "32")
        finally:
            shutil.copyfile(folder / file, broken / file)

    def cases():
        for file in files:
            content = (folder / file).read_bytes()
            for n in range(2):
                yield f"{file} cut {n}", file, content[:rng.randrange(len(content))]
                yield f"{file} flipped {n}", file, flip(content, rng, rng.choice((1, 8)))
            for n, text in enumerate((b"", b"[]", b"null", b"{}", b"[" * 10 ** 5, b"\xff\xfe", b"{" + b" " * 10 ** 6)):
                yield f"{file} text {n}", file, text
            if file.suffix == ".json" and file.name != "vocab.json":
                values = json.loads(content)
                for key in values:
                    value = rng.choice(VALUES)
                    yield f"{file} {key} {str(value)[:20]}", file, json.dumps({**values, key: value}).encode()
        for file in tensors:
            content = (folder / file).read_bytes()
            for n in range(3):
                yield f"{file} cut {n}", file, content[:rng.randrange(len(content))]
                yield f"{file} flipped {n}", file, flip(content, rng, 9, rng.choice((2000, None)))
            if "unet" not in str(file):                     # the UNet's are in test_cli.py: the step is named
                state = load_file(folder / file)
                for n, key in enumerate(rng.sample(sorted(state), 3)):
                    yield f"{file} NaN {n}", file, save({**state, key: torch.full_like(state[key], float("nan"))})
    every("damaged model folders", cases(), attempt)


# --- the command line -------------------------------------------------------------------------------------------------

PROMPTS = ("", " ", "\n", "\t\r\n", "🐈 and 🐕", "👩‍👩‍👧‍👦 cat and dog", "קאט cat and dog כלב", "\u202ecat and dog\u202c",
    "\u200bcat\u200b and dog",
           "c\u0301at and dog", "cat" + "\u0336" * 500 + " dog", "猫 cat 犬 dog", "<|endoftext|> cat dog",
        "<|startoftext|>cat and dog",
           "cat dog" + " very" * 10_000, "very " * 10_000 + "cat dog", "cat" * 10_000, "cat, dog" + "!" * 5000,
        "a cat; rm -rf / dog",
           "$(touch ran) cat dog", "%s%n%x cat dog", "cat\x00dog", "cat\x1b[31m dog", "cat \udce9 dog", "'\"cat\" dog'",
        "--help cat dog",
           "cat dog \u2028 next \x85 line", "CAT DOG", "cat/dog", "cat_dog", "cat=dog", "\ufeffcat dog", "ﬁ cat dog",
        "cat dog \U0010ffff")
FLAGS = {
    "seed": ("-1", str(2 ** 63), str(2 ** 64), str(-2 ** 63 - 1), "9" * 5000, "1.5", "nan", "", "0x10", "١٢"),
    "seeds": ("", ",", "0-99999999", "5-1", "-3", "0--1", "1,,2", "9" * 30, "0-99999,0-99999", "a-b", "0-0", "²", "1-2-3"),
    "height": ("0", "-8", "7", "99999999", str(8 * 10 ** 12), "8192000", "nan", "1e3", "", "9" * 400),
    "width": ("0", "-8", "12", "8200", str(2 ** 62), "64.0"),
    "steps": ("0", "-1", "1001", "99999999999", "nan", "1e2", ""), "batch": ("0", "-1", "x", "nan"),
    "guidance": ("nan", "inf", "-inf", "0", "1e999", "1e5", ""), "alpha": ("nan", "inf", "1e999", "-1e7", "x"),
    "temperature": ("nan", "0", "-1", "1e-300", "inf"), "threshold": ("nan", "-0.1", "1.1", "inf"), "eta": ("nan", "2",
        "-1"),
    "guidance-rescale": ("nan", "2", "-1"), "refine-steps": ("-1", "99999", "x"), "refine-stop": ("nan", "2"),
    "refine-at": ("x", "0-999999", "-", "5-1"), "switch-every": ("0", "-1"), "update-every": ("0", "-5"),
    "update-stop": ("nan", "-1"), "mask-every": ("0", "1001"), "clip-skip": ("-1", "99", "x"),
    "scheduler": ("", "euler", "DDIM", "ddim "), "maps-from": ("", "x\ny"), "method": ("", "magic\nmagic", "🐈"),
        "recipe": ("", "x"),
    "device": ("", "quantum", "cuda:99", "mps", "cpu:0", "meta", "cuda:-1"), "dtype": ("int8", "", "float64", "fp8"),
    "model": ("", ".", "/", "/dev/null", "/proc/self/mem", "nobody", "a\nb", "x" * 5000, "\x00", "\udce9", "../..",
        "/proc/self/environ"),
    "lora": ("", ".", "/dev/null", "/proc/self/mem", "x" * 5000, "\x00", ":", ":1", "a:b:c", "\udce9", "🐈.safetensors",
        "a\nb"),
    "style": ("", "/dev/null", "x" * 300, "\x00", "a\nb", ":0.5"),
    "vae": (".", "/dev/null", "/proc/self/mem", "nobody", "x" * 5000, "\x00", "\udce9", "a\nb", "../.."),
    "trace": ("/", "/proc/self/x.safetensors", "/nowhere/x.safetensors", ".", "x.png"),
    "nonsense": ("1",), "no\nsense": ("",), "": ("",)}
WEIGHTS = ("nan", "inf", "1e999", "9" * 400, "99999", "-99999", "", "x", "0x1", "1:2")
WORDS = ("", "=", "=cat", "cat=", "cat=dog", "dog=cat", "cat=\n", "🐈=🐈", "fox", "cat=" + "very " * 10_000,
    "cat=" + "x" * 5000,
         "cat and=sks", "cat==", "ca", "cat=<|endoftext|>", "\udce9=x", "cat=\x00", " cat = sks  cat ", "cat=sks cat dog")


@pytest.fixture
def quick(model, folder, loras, tmp_path, monkeypatch) -> Callable:
    """The command line on the loaded small model: one step, 32x32, two LoRAs; what follows overrules."""
    monkeypatch.setattr(cli, "load_model", lambda source, *_: model if source == str(folder) else load_model(source))
    monkeypatch.chdir(tmp_path)
    # a hub id would be looked for in the network
    monkeypatch.setattr("weights._fetch", lambda repo, _: (_ for _ in ()).throw(ValueError(f"{repo} is out of reach")))
    start = ("--model", str(folder), "--prompt", "a cat and a dog", *loras, "--height", "32", "--width", "32")
    return lambda *argv, out=None: command(out or tmp_path / "out", *start, *argv)


def test_hostile_arguments(quick, loras, tmp_path):
    before = set(tmp_path.iterdir())

    def cases():
        for flag, values in FLAGS.items():
            for value in values:
                words = [value, "cat=x"] if flag == "lora" else [value]
                yield (f"--{flag} {value[:20]!r}", f"--{flag}", *words)
                if flag != "lora":
                    yield (f"--{flag}={value[:20]!r}", f"--{flag}={value}")
        for weight in WEIGHTS:
            yield f"style:{weight[:20]}", "--style", f"{loras[1]}:{weight}"
            yield f"LoRA:{weight[:20]}", "--prompt", "a cat, a dog, a fox", "--lora", f"{loras[1]}:{weight}", "fox=sks fox"
    every("hostile arguments", cases(), quick)
    assert set(tmp_path.iterdir()) == before, "something was written outside the output folder"


def test_hostile_text(quick, loras, tmp_path):
    def cases():
        for n, prompt in enumerate(PROMPTS):
            yield f"prompt {n}", f"--prompt={prompt}"
            yield f"negative {n}", f"--negative={prompt}"
        for n, words in enumerate(WORDS):
            yield f"subject {n}", "--prompt", "a cat, a dog, a fox", "--lora", loras[1], words
        rng = random.Random(6)
        for n in range(25):
            text = "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xd800), rng.randrange(0xe000, 0x110000))))
                           for _ in range(rng.randrange(120)))
            yield f"characters {n}", "--prompt", "cat dog " + text, "--panel"
    every("hostile text", cases(), quick)


def test_settings_of_images(quick, folder, loras, tmp_path):
    """--from with what a stranger may have written into an image: other values, other types, other letters."""
    assert cli.main(["--model", str(folder), "--prompt", "a cat and a dog", *loras, "--height", "32", "--width", "32",
                     "--steps", "1", "--out", str(tmp_path / "first"), "--quiet"]) == 0
    with Image.open(tmp_path / "first/clora-0.png") as image:
        chunks, picture = dict(image.text), image.copy()
    rng = random.Random(8)
    values = (None, 3, -1.5, True, "", "cat", "\x00", [], {}, [3], [None], {"hash": 5}, [{"subject": 1, "sha256": "x"}],
              "9" * 5000)

    def changed(value, depth: int = 0):
        """The value with one part of it replaced."""
        if depth and rng.random() < 0.4 or not isinstance(value, (dict, list)) or not value:
            return rng.choice(values)
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key, copy = rng.choice(keys), value.copy()
        copy[key] = changed(value[key], depth + 1)
        return copy

    def cases():
        for n in range(120):
            info, new = PngImagePlugin.PngInfo(), dict(chunks)
            key = rng.choice(("model", "loras", "style", "recipe", "command", "command"))
            if key == "command":
                words, place = shlex.split(new[key]), rng.randrange(2, len(shlex.split(new[key])))
                words[place:place + rng.randrange(2)] = [rng.choice(("", "x", "-1", "--steps", "2", "999", "--lora", "🐈"))]
                new[key] = shlex.join(words)
            else:
                new[key] = json.dumps(changed(json.loads(new[key])))
            for name, text in new.items():
                info.add_text(name, text)
            path = tmp_path / f"{n}.png"
            picture.save(path, pnginfo=info)
            yield f"{key} {n}: {new[key][:200]}", path
    every("settings of images", cases(), lambda path: command(tmp_path / "out", "--from", str(path)))


def test_read_only_folders(quick):
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        Path(name, "a.safetensors").touch()
        os.chmod(name, 0o555)
        if root:                                    # whom no such folder stops
            os.seteuid(65534)
        try:
            for argv in (("--out", name), ("--out", f"{name}/below"), ("--out", "/tmp", "--trace", f"{name}/a.safetensors")):
                TRIED["names of files"] += 1
                stderr = io.StringIO()
                with contextlib.redirect_stderr(stderr):
                    assert cli.main([*argv, "--quiet"]) == 2
                assert stderr.getvalue() == f"clora: cannot write to {argv[-1]}: Permission denied\n"
        finally:
            if root:
                os.seteuid(0)
            os.chmod(name, 0o755)
        assert [path.name for path in Path(name).iterdir()] == ["a.safetensors"]


def test_folders_of_every_name(quick, loras, tmp_path):
    (tmp_path / "file").write_text("in the way")

    def cases():
        for n, name in enumerate(("a b", "it's", 'a "b"', "🐈", "קאט", "-x", "--help", "a\nb", "a\tb", "$HOME", "*", "x;y",
        "a:0.5", "~",
                                  "deep/er/still", "x" * 200, "\u202eabc", "%d", "a\\b")):
            target = tmp_path / "names" / name
            yield f"out {n}", target, ()
            target.mkdir(parents=True, exist_ok=True)
            style = str(shutil.copyfile(loras[1], target / "c a't.safetensors"))
            yield f"LoRA in {n}", tmp_path / "out", ("--style", style)
            yield f"LoRA and weight in {n}", tmp_path / "out", ("--style", f"{style}:0.5")
        for path in ("file", "file/below", "/proc/x", "/dev/null", "/proc/self/fd/x", "/sys/x", "x" * 300):
            yield f"out {path[:9]}", tmp_path / path, ()
    every("names of files", cases(), lambda out, argv: quick(*argv, out=out))
    assert (tmp_path / "file").read_text() == "in the way"
