"""Rewards of one's own, as the settings name them."""

from __future__ import annotations

from posttrain.types import Outcome, Prompt
from rewards.score import Score

NUMBER = 5


def short(prompt: Prompt, text: str) -> float:
    return 1.0 if len(text) < 10 else 0.25


def found(prompt: Prompt, text: str) -> Score:
    return Score(correctness=0.5, outcome=Outcome.WRONG, explanation=f"{prompt.domain}: half")


def says(prompt: Prompt, text: str) -> object:
    return {"high": 1.5, "nan": float("nan"), "none": None, "true": True}[text]


def one_argument(text: str) -> float:
    return 1.0


async def asynchronous(prompt: Prompt, text: str) -> float:
    return 1.0
