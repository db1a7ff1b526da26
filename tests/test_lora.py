"""LoRA files of every format against weights computed in float64, rows of one batch against merged weights, bad files."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from lora import attach, merged_weights, read_lora
from tests.lora_files import make

FORMS = ["kohya", "kohya-ldm", "peft", "down-up", "processor", "dora", "tucker", "loha", "lokr"]
GOLDEN = Path(__file__).parent / "golden"


def relative(ours, theirs) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def inputs(rows: int = 3):
    rng = torch.Generator().manual_seed(3)
    return torch.randn(rows, 4, 16, 12, generator=rng), 300, torch.randn(rows, 77, 32, generator=rng)


def by_hand(unet, deltas, x) -> torch.Tensor:
    """The UNet in float64 with the given changes of its weights."""
    double = {key: value.double() for key, value in unet.state_dict().items()}
    for name, delta in deltas.items():
        double[f"{name}.weight"] = double[f"{name}.weight"] + delta
    latents, t, context = x
    return functional_call(unet.double(), double, (latents.double(), t, context.double()))[0]


@pytest.mark.parametrize("form", FORMS)
def test_unet_of_every_format(form, tiny_unet, tmp_path):
    made = make(form, tiny_unet)
    lora = read_lora(made.save(tmp_path / "a.safetensors"), tiny_unet)
    assert lora.unet.keys() == made.deltas["unet"].keys()
    x = inputs()
    attach(tiny_unet, [lora])
    ours = tiny_unet(*x, torch.ones(3, 1))[0]
    plain = tiny_unet(*x)[0]
    assert relative(ours, plain) > 0.05, "the LoRA must matter for this to test anything"
    assert relative(ours, by_hand(tiny_unet, made.deltas["unet"], x)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_text_encoder_of_every_format(form, tiny_unet, tiny_text, tmp_path):
    made = make(form, tiny_unet, tiny_text)
    lora = read_lora(made.save(tmp_path / "a.safetensors"), tiny_unet, tiny_text)
    assert lora.text_encoder.keys() == made.deltas["text_encoder"].keys()
    merged = merged_weights(tiny_text, [(lora, 0.7)])
    for name, delta in made.deltas["text_encoder"].items():
        key = next(key for key in (f"{name}.weight", f"{name.removeprefix('text_model.')}.weight") if key in merged)
        assert relative(merged[key], tiny_text.state_dict()[key].double() + 0.7 * delta) < 1e-6


@pytest.mark.parametrize("form", ["kohya", "dora", "loha"])
def test_rows_of_one_batch_equal_merged_weights(form, tiny_unet, tmp_path):
    """K + 1 adapters on the rows of one batch, stacked and weighted, against each row alone on merged weights."""
    loras = [read_lora(make(f, tiny_unet, rank=r, seed=s).save(tmp_path / f"{s}.safetensors"), tiny_unet)
             for s, (f, r) in enumerate([(form, 4), ("peft", 2), ("kohya", 8)])]
    strengths = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0.6, 0], [0, 0, 1], [1, 0, 0.8], [1 / 3] * 3, [-0.5, 0, 0]])
    latents, t, context = inputs(len(strengths))
    attach(tiny_unet, loras)
    together = tiny_unet(latents, t, context, strengths)[0]
    assert torch.equal(together[0], tiny_unet(latents, t, context)[0][0]), "base rows are untouched to the last bit"
    for row, weights in enumerate(strengths):
        merged = merged_weights(tiny_unet, list(zip(loras, weights.tolist())), "unet")
        alone = functional_call(tiny_unet, merged, (latents[row:row + 1], t, context[row:row + 1]))[0]
        assert relative(together[row:row + 1], alone) < 1e-5, f"row {row}"


def test_attaching_leaves_the_checkpoint_keys_alone(tiny_unet, tmp_path):
    before = {key: value.clone() for key, value in tiny_unet.state_dict().items()}
    x = inputs()
    plain = tiny_unet(*x)[0]
    attach(tiny_unet, [read_lora(make("dora", tiny_unet).save(tmp_path / "a.safetensors"), tiny_unet)])
    assert tiny_unet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in tiny_unet.state_dict().items())
    attach(tiny_unet, [])
    assert torch.equal(tiny_unet(*x, torch.ones(3, 1))[0], plain)


def test_gradient_flows_through_the_factors_to_the_latents(tiny_unet, tmp_path):
    attach(tiny_unet, [read_lora(make("kohya", tiny_unet).save(tmp_path / "a.safetensors"), tiny_unet)])
    latents, t, context = inputs(1)
    gradients = []
    for strength in (0.0, 1.0):
        z = latents.clone().requires_grad_()
        gradients.append(torch.autograd.grad(tiny_unet(z, t, context, torch.tensor([[strength]]))[0].pow(2).sum(), z)[0])
    assert relative(gradients[1], gradients[0]) > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(dtype, tiny_unet, tmp_path):
    made = make("kohya", tiny_unet)
    made.state = {key: value.to(dtype) for key, value in made.state.items()}
    lora = read_lora(made.save(tmp_path / "a.safetensors"), tiny_unet)
    name = next(iter(lora.unet))
    assert lora.unet[name].down.dtype == torch.float32
    assert relative(lora.unet[name].up @ lora.unet[name].down.flatten(1), made.deltas["unet"][name].flatten(1)) < 1e-2


def test_ranks_may_differ_from_layer_to_layer(tiny_unet, tmp_path):
    low, high = make("kohya", tiny_unet, rank=2, alpha=1), make("kohya", tiny_unet, rank=6, alpha=6)
    names = sorted(low.deltas["unet"])
    mixed = low
    for name in names[::2]:
        key = f"lora_unet_{name.replace('.', '_')}."
        mixed.state |= {k: v for k, v in high.state.items() if k.startswith(key)}
        mixed.deltas["unet"][name] = high.deltas["unet"][name]
    lora = read_lora(mixed.save(tmp_path / "a.safetensors"), tiny_unet)
    attach(tiny_unet, [lora])
    x = inputs()
    assert relative(tiny_unet(*x, torch.ones(3, 1))[0], by_hand(tiny_unet, mixed.deltas["unet"], x)) < 1e-5


def test_alpha_of_peft_files_comes_from_their_config(tiny_unet, tmp_path):
    made = make("peft", tiny_unet, rank=4)
    name = next(iter(made.deltas["unet"]))
    settings = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {name.split(".", 1)[1]: 2}}
    path = made.save(tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    lora = read_lora(path, tiny_unet)
    for n, (key, delta) in enumerate(made.deltas["unet"].items()):
        ours = (lora.unet[key].up @ lora.unet[key].down.flatten(1)).view(delta.shape)
        assert relative(ours, delta * (0.5 if n == 0 else 2)) < 1e-6
    bare = {f"base_model.model.{key.removeprefix('unet.')}": value for key, value in made.state.items()}
    save_file(bare, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 12}))
    lora = read_lora(tmp_path / "adapter_model.safetensors", tiny_unet)
    assert relative(lora.unet[name].up @ lora.unet[name].down.flatten(1), 3 * made.deltas["unet"][name].flatten(1)) < 1e-6


@pytest.mark.parametrize("subject, strength", [("cat", 1.0), ("dog", 1.0), ("style", 1.0), ("cat", 0.5)])
@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_recorded_outputs_of_the_release(subject, strength, form):
    """UNet and text encoder with each LoRA, as diffusers 0.27 and peft 0.10 computed them."""
    from weights import load_model
    model, probes = load_model(GOLDEN / "model"), load_file(GOLDEN / "probes.safetensors")
    lora = read_lora(GOLDEN / f"loras/{subject}_{form}.safetensors", model.unet, model.text.model)
    attach(model.unet, [lora])
    suffix = f"_{subject}" + ("_w05" if strength == 0.5 else "")
    noise, _ = model.unet(probes["x"], probes["t"], probes["ctx"], torch.full((2, 1), strength))
    assert relative(noise, probes[f"unet{suffix}"]) < 1e-5
    texts = json.loads((GOLDEN / "probes.json").read_text())["texts_for_input_ids"]
    merged = merged_weights(model.text.model, [(lora, strength)])
    assert relative(model.text.encode(texts, merged), probes[f"te{suffix}"]) < 1e-5
    assert relative(model.text.encode(texts), probes["te_base"]) < 1e-5


def test_subject_and_style_on_one_row_equal_the_release():
    from weights import load_model
    model, probes = load_model(GOLDEN / "model"), load_file(GOLDEN / "probes.safetensors")
    loras = [read_lora(GOLDEN / f"loras/{name}_kohya.safetensors", model.unet, model.text.model)
             for name in ("cat", "style")]
    attach(model.unet, loras)
    noise, _ = model.unet(probes["x"], probes["t"], probes["ctx"], torch.tensor([[1, 0.8]] * 2))
    # two LoRAs on top of each other, recorded in float32 on sharpened attention: 1.2e-5 is rounding
    assert relative(noise, probes["unet_cat_style08"]) < 1e-4
    texts = json.loads((GOLDEN / "probes.json").read_text())["texts_for_input_ids"]
    merged = merged_weights(model.text.model, [(loras[0], 1.0), (loras[1], 0.8)])
    assert relative(model.text.encode(texts, merged), probes["te_cat_style08"]) < 1e-5


# --- bad files --------------------------------------------------------------------------------------------------------

def refused(path: Path, unet, text=None) -> str:
    with pytest.raises(ValueError) as caught:
        read_lora(path, unet, text)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_files_that_are_no_safetensors(tiny_unet, tmp_path):
    good = make("kohya", tiny_unet).save(tmp_path / "good.safetensors").read_bytes()
    path = tmp_path / "bad.safetensors"
    assert "no such file" in refused(path, tiny_unet)
    assert "folder" in refused(tmp_path, tiny_unet)
    for content, word in ((b"", "empty"), (good[:len(good) // 2], "damaged"), (good[:5], "damaged"),
                          (b"\xff" * 64, "damaged"), (b"not a lora at all, just text", "damaged"),
                          ((2 ** 60).to_bytes(8, "little") + good[8:], "damaged"), (b"PK\x03\x04 zip", "damaged")):
        path.write_bytes(content)
        assert word in refused(path, tiny_unet)


def test_a_pickle_that_would_run_code_is_not_loaded(tiny_unet, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))
    path = tmp_path / "evil.pt"
    torch.save({"lora_unet_conv_in.lora_down.weight": Evil()}, path)
    assert zipfile.is_zipfile(path) and "would run code" in refused(path, tiny_unet)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_tensors_is_read(tiny_unet, tmp_path):
    made = make("kohya", tiny_unet)
    torch.save(made.state, tmp_path / "a.pt")
    assert read_lora(tmp_path / "a.pt", tiny_unet).unet.keys() == made.deltas["unet"].keys()


@pytest.mark.parametrize("key, width, word", [
    ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight", 2048, "SDXL"),
    ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", 1280, "SDXL"),
    ("lora_unet_mid_block_attentions_0_transformer_blocks_7_attn1_to_q.lora_down.weight", 1280, "SDXL"),
    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", 1024, "SD 2"),
    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight", 1024, "SD 2"),
    ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", 3072, "Flux")])
def test_loras_of_other_families_are_named(key, width, word, tiny_unet, tmp_path):
    save_file({key: torch.zeros(4, width)}, tmp_path / "a.safetensors")
    assert word in refused(tmp_path / "a.safetensors", tiny_unet)


def test_keys_and_shapes_that_do_not_fit(tiny_unet, tmp_path):
    path, made = tmp_path / "a.safetensors", make("kohya", tiny_unet)
    name = "lora_unet_conv_nowhere.lora_down.weight"
    save_file({name: torch.zeros(2, 2)}, path)
    assert "holds no LoRA" in refused(path, tiny_unet)
    save_file({**made.state, name: torch.zeros(2, 2)}, path)
    assert name in refused(path, tiny_unet)
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({**made.state, f"{key}.lora_down.weight": torch.zeros(4, 33)}, path)
    assert "do not fit" in refused(path, tiny_unet)
    save_file({k: v for k, v in made.state.items() if k != f"{key}.lora_up.weight"}, path)
    assert "up is missing" in refused(path, tiny_unet)
    for bad in (float("nan"), float("inf")):
        save_file({**made.state, f"{key}.lora_up.weight": torch.full((32, 4), bad)}, path)
        assert f"{key}.lora_up.weight" in refused(path, tiny_unet)
    save_file({}, path)
    assert "holds no LoRA" in refused(path, tiny_unet)
