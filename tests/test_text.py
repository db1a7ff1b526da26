"""Token positions of words, and embeddings, on a tokenizer that has no rare words: most are spelled in several tokens."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from weights import load_model

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def text():
    return load_model(GOLDEN / "model").text


def spelled(text, prompt: str, positions: tuple[int, ...]) -> str:
    """What stands at these positions of the tokenized prompt, the start token counted."""
    ids = text.tokenizer(prompt).input_ids
    return text.tokenizer.decode([ids[n] for n in positions]).strip()


def test_ids_and_embeddings_equal_the_recorded_ones(text):
    probes, facts = load_file(GOLDEN / "probes.safetensors"), json.loads((GOLDEN / "probes.json").read_text())
    texts = facts["texts_for_input_ids"]
    ids = text.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, probes["input_ids"])
    ours = text.encode(texts)
    assert ((ours - probes["te_base"]).norm() / probes["te_base"].norm()).item() < 1e-5


@pytest.mark.parametrize("prompt, phrase, expected", [
    ("a cat and a dog", "cat", [(2,)]), ("a cat and a dog", "dog", [(5,)]),
    ("a sks cat and a dog", "sks cat", [(2, 3)]),
    ("A CAT, and a Dog!", "cat", [(2,)]), ("a cat", "Cat", [(2,)]), ("cat", "cat", [(1,)]),
    ("a cat and a cat", "cat", [(2,), (5,)]), ("a dog", "cat", []), ("", "cat", []), ("a cat", "", [])])
def test_positions(text, prompt, phrase, expected):
    assert text.positions(prompt, phrase) == expected


@pytest.mark.parametrize("prompt, phrase", [
    ("a category of things", "cat"), ("a wildcat", "cat"), ("cats", "cat"), ("a hotdog", "dog"),
    ("the concatenation", "cat"), ("a cat1 and a dog", "cat"), ("a cat12", "cat1"), ("1cat", "cat"), ("a c4t5", "c4t")])
def test_parts_of_words_are_not_words(text, prompt, phrase):
    assert text.positions(prompt, phrase) == []


def test_words_with_digits(text):
    """CLIP makes every digit a token of its own, so the tokens alone do not say where such a word ends."""
    assert text.find("a cat1 and a cat12", "cat1") == (2, 3) and text.find("a cat1 and a cat12", "cat12") == (6, 7, 8)
    assert text.positions("a cat1 " * 1000, "cat1") == [(2 + 3 * n, 3 + 3 * n) for n in range(1000)]
    assert text.positions("a 🐱🐱 cat", "🐱") == [] and len(text.positions("a 🐱 cat", "🐱")) == 1
    for word in ("İstanbul", "ΌΣΟΣ"):
        assert text.find(f"{word} and a cat", word)[0] == 1 and len(text.positions(f"a {word} and {word}s", word)) == 1
    assert text.positions("a cat 1", "cat1") == [] and text.find("a cat 1", "cat 1") == (2, 3)


@pytest.mark.parametrize("prompt, phrase", [
    ("an umbrella in the rain", "umbrella"), ("a zebra, a yak and a gnu", "yak"), ("the café at noon", "café"),
    ("(umbrella:1.2) beside a zebra", "zebra"), ("a zebra's stripes", "zebra"), ("x  umbrella\n zebra", "umbrella"),
    ("a woman with an umbrella", "an umbrella"), ("子猫 and 犬", "犬")])
def test_words_of_several_tokens(text, prompt, phrase):
    (found,) = text.positions(prompt, phrase)
    assert spelled(text, prompt, found) == phrase
    assert found == tuple(range(found[0], found[0] + len(found)))
    assert text.find(prompt, phrase) == found


def test_words_beside_an_added_token():
    """Of textual inversion or Custom Diffusion: such a token has no mark of a word's end."""
    text = load_model(GOLDEN / "model").text
    text.tokenizer.add_tokens(["<new1>"])
    for phrase, expected in (("cat", (3,)), ("<new1>", (2,)), ("<new1> cat", (2, 3))):
        assert text.find("a <new1> cat and a dog", phrase) == expected


@pytest.mark.parametrize("prompt, phrase, word", [
    ("a cat and a dog", "bird", "not in the prompt"), ("a cat and a cat", "cat", "2 times"),
    ("the " * 76 + "cat", "cat", "77 tokens"), ("a 'dog' and a ball", "dog", "no word of its own"),
    ("a dog and a sign 'dog'", "dog", "2 times"), ("a 🐱🐶", "🐱", "no word of its own")])
def test_subjects_that_cannot_be_used(text, prompt, phrase, word):
    with pytest.raises(ValueError, match=word) as caught:
        text.find(prompt, phrase)
    assert f'"{phrase}"' in str(caught.value) and "\n" not in str(caught.value)


def test_the_last_token_that_is_read_still_counts(text):
    assert text.find("the " * 74 + "cat", "cat") == (75,)
    assert text.truncated("the " * 74 + "cat") == ""
    assert text.truncated("the " * 75 + "cat") == "cat"


def test_clip_skip_is_the_hidden_state_before(text):
    ids = text.tokenizer(["a cat"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    hidden = text.model(ids, output_hidden_states=True).hidden_states
    norm = getattr(text.model, "text_model", text.model).final_layer_norm
    for skip in (0, 1, 2):
        assert torch.allclose(text.encode(["a cat"], clip_skip=skip), norm(hidden[-1 - skip]), atol=1e-6)
    assert torch.allclose(text.encode(["a cat"], clip_skip=0), text.encode(["a cat"]), atol=1e-6)
    with pytest.raises(ValueError, match="clip_skip"):
        text.encode(["a cat"], clip_skip=9)
