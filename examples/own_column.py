"""A column of one's own in evaluate.py: the first LoRA draws the left half, the second the right one, without updates.

    python -m examples.own_column               from the repository's folder; takes the flags of evaluate.py
"""

import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import evaluate
from clora import Plan, Recipe, Step, compose, step_generators


def halves(maps: Tensor, tokens: Sequence[tuple[int, ...]], size: Sequence[int], recipe: Recipe) -> Tensor:
    """Masks [3, h, w] of two subjects side by side, whatever the maps say; the base model has no part."""
    left = torch.arange(size[1], device=maps.device).expand(*size) < size[1] / 2    # [h, w]
    return torch.stack([torch.zeros_like(left), left, ~left])


class Maker(evaluate.Maker):
    def steps(self, one: dict, column: str, plan: Plan, recipe: Recipe, noise: Tensor, seeds: Sequence[int]
              ) -> Iterator[Step]:
        if column == "halves":
            return compose(self.model, plan, recipe, noise, step_generators(noise, seeds), make_masks=halves)
        return super().steps(one, column, plan, recipe, noise, seeds)


def main(*flags: str) -> int:
    evaluate.COLUMNS["halves"] = ("clora", "paper", {"update_until": -1})           # method, recipe, what it changes
    evaluate.CODE.append(__file__)                  # so that results of another version of this file are not mixed
    return evaluate.main(["--methods", "no-update,halves", "--out", "runs/own-column", *flags], Maker)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
