"""Text: prompts to CLIP embeddings, and words to token positions, so that nobody counts tokens by hand.

The tokenizer and the text model are those of transformers. Index 0 is the start token, as in every attention map.
Shapes: B prompts, T = 77 tokens, D text width.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class TextEncoder:
    def __init__(self, tokenizer: Any, model: nn.Module):
        self.tokenizer, self.model = tokenizer, model       # transformers' CLIPTokenizer and CLIPTextModel
        self.length: int = tokenizer.model_max_length       # 77

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], weights: dict[str, Tensor] | None = None,
               clip_skip: int | None = None) -> Tensor:
        """Prompts -> [B, T, D], cut or padded to 77 tokens.

        weights: parameters that stand in for the model's own, by name (a LoRA merged in; lora.merged_weights).
        clip_skip: leave out that many of the last layers; the final norm still applies, as in diffusers.
        """
        ids = self.tokenizer(list(prompts), padding="max_length", max_length=self.length, truncation=True,
                             return_tensors="pt").input_ids                         # [B, T]
        ids = ids.to(next(self.model.parameters()).device)
        out = torch.func.functional_call(self.model, weights or {}, (ids,),
                                         {"output_hidden_states": clip_skip is not None, "return_dict": True})
        if clip_skip is None:
            return out.last_hidden_state
        layers = len(out.hidden_states) - 1
        if not 0 <= clip_skip < layers:
            raise ValueError(f"clip_skip is {clip_skip}; this text encoder has {layers} layers, so use 0 to {layers - 1}")
        norm = getattr(self.model, "text_model", self.model).final_layer_norm
        return norm(out.hidden_states[-(clip_skip + 1)])

    def _ids(self, text: str) -> list[int]:
        """Token ids of a text without start and end token, uncut."""
        return self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids

    def positions(self, prompt: str, phrase: str) -> list[tuple[int, ...]]:
        """Token positions of every occurrence of a word or phrase in a prompt; [] if there is none.

        Whole words only, whatever their case. Positions beyond the 77th token are given too.
        """
        wanted, ids = self._ids(phrase), self._ids(prompt)
        added = self.tokenizer.get_added_vocab()                    # of textual inversion: words without an end mark
        ends = [token.endswith("</w>") or token in added for token in self.tokenizer.convert_ids_to_tokens(ids)]
        prompt = unicodedata.normalize("NFC", prompt)
        found, counted, n = [], 0, 0                                # n tokens before character `counted`
        # The text says what a whole word is: CLIP cuts "mk12" into mk, 1 and 2, and "cat" in "wildcat" can be a token of its
        # own. No token goes beyond the end of a word, so those of what stands before an occurrence are counted alone.
        for match in re.finditer(_whole(phrase), prompt, re.IGNORECASE) if wanted else ():
            n, counted = n + len(self._ids(prompt[counted:match.start()])), match.start()
            if ids[n:n + len(wanted)] == wanted and (n == 0 or ends[n - 1]):
                found.append(tuple(range(n + 1, n + 1 + len(wanted))))
        return found

    def find(self, prompt: str, phrase: str) -> tuple[int, ...]:
        """Token positions of a phrase that occurs exactly once among the tokens that CLIP reads.

        ValueError: it does not occur, it occurs more than once, or it was cut off.
        """
        found = self.positions(prompt, phrase)
        text = unicodedata.normalize("NFC", prompt)
        # more than are found: CLIP reads 'dog' in single quotes as 'd and og'
        written = len(re.findall(_whole(phrase), text, re.IGNORECASE)) if phrase.strip() else 0
        if not found:
            if written or phrase.strip() and phrase.lower() in prompt.lower():
                longer = re.search(rf"\w*{_spelled(phrase)}\w*", text, re.IGNORECASE)
                name = f'name "{longer[0]}" or ' if longer and longer[0].lower() != phrase.lower() else ""
                raise ValueError(f'"{phrase}" is no word of its own in the prompt "{prompt}"; {name}write spaces around it')
            raise ValueError(f'"{phrase}" is not in the prompt "{prompt}"; name the subject as the prompt does')
        if (times := max(len(found), written)) > 1:
            raise ValueError(f'"{phrase}" occurs {times} times in the prompt "{prompt}"; a subject must occur once')
        self.expect_read(phrase, found)
        return found[0]

    def expect_read(self, phrase: str, positions: Sequence[tuple[int, ...]]) -> None:
        """ValueError: a phrase at these positions was cut off, at least in part."""
        if any(at[-1] > self.length - 2 for at in positions):           # the last place is the end token's
            raise ValueError(f'"{phrase}" lies beyond the {self.length} tokens that CLIP reads; shorten the prompt')

    def truncated(self, prompt: str) -> str:
        """What CLIP does not read of a prompt, "" if it reads it all."""
        return self.tokenizer.decode(self._ids(prompt)[self.length - 2:]).strip()


def _whole(phrase: str) -> str:
    """A pattern of the phrase as words of their own."""
    return rf"(?<!\w){_spelled(unicodedata.normalize('NFC', phrase))}(?!\w)"


def _spelled(phrase: str) -> str:
    """A pattern of the phrase with any spaces within it."""
    return r"\s+".join(map(re.escape, phrase.split()))


def swap_words(prompt: str, replacements: Mapping[str, str]) -> str:
    """The prompt with every word replaced, all at once: whole words, whatever their case and the spaces within them.

    ValueError: a word is only part of a longer one, or of another of them.
    """
    prompt = unicodedata.normalize("NFC", prompt)                   # as CLIP's tokenizer does
    replacements = {unicodedata.normalize("NFC", word): replacement for word, replacement in replacements.items()}
    words = sorted(replacements, key=len, reverse=True)
    pattern = "|".join(f"({_spelled(word)})" for word in words)
    found = set[str]()

    def swap(match: re.Match) -> str:
        found.add(word := words[(match.lastindex or 1) - 1])
        return replacements[word]
    swapped = re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", swap, prompt, flags=re.IGNORECASE) if words else prompt
    for word in replacements:
        if word not in found:
            raise ValueError(f'"{word}" is no word of its own in the prompt "{prompt}"; write spaces around it')
    return swapped


def write_prompts(text: TextEncoder, prompt: str, subjects: Sequence[Any], method: str = "clora"
                  ) -> tuple[tuple[str, ...], tuple[tuple[tuple[int, int], ...], ...], tuple[tuple[int, ...], ...]]:
    """Prompts, concepts and words of a clora.Plan for clora.Subjects: every variant's prompt, and where its words are.

    ValueError: a word is not in the prompt or occurs twice, was cut off, or is given to two LoRAs.
    """
    words = [subject.word.lower() for subject in subjects]
    for subject in subjects:
        text.find(prompt, subject.word)
        if not subject.trigger.strip():
            raise ValueError(f'the trigger for "{subject.word}" is empty')
        if words.count(subject.word.lower()) > 1:
            raise ValueError(f'two LoRAs are given for the subject "{subject.word}"; each needs a word of its own')
    if method == "base" or not subjects:
        return (prompt,), (), ()
    # all at once, for CLoRA too: a word that overlaps another is refused
    everyone = swap_words(prompt, {subject.word: subject.trigger for subject in subjects})
    if method != "clora":
        for subject in subjects:
            text.expect_read(subject.trigger, text.positions(everyone, subject.trigger))
        return (everyone,) * (1 if method == "merge" else len(subjects)), (), ()
    for subject in subjects:
        for word in (other.word for other in subjects if other is not subject):
            if text.positions(subject.trigger, word):
                raise ValueError(f'the trigger "{subject.trigger}" holds "{word}", another LoRA\'s word; write it without')
    prompts = (prompt, *(swap_words(prompt, {subject.word: subject.trigger}) for subject in subjects))

    def tokens(v: int, k: int) -> tuple[int, ...]:
        return text.find(prompts[v], subjects[k].trigger if v == k + 1 else subjects[k].word)
    concepts = tuple(tuple((v, token) for v in range(len(prompts)) for token in tokens(v, k)) for k in range(len(subjects)))
    return prompts, concepts, tuple(tokens(k + 1, k) for k in range(len(subjects)))
