"""The tiny policy that ships with the project, the tasks it was made for, and how it was made."""

from pathlib import Path

POLICY_DIR = Path(__file__).parent / "policy"
"""Weights, tokenizer and chat template, as `from_pretrained` reads them."""
