"""System instructions that change the form of the starter policy's answers."""

from __future__ import annotations

from posttrain.types import SystemInstruction

BRIEF = SystemInstruction(name="brief", text="Answer only.", pattern=r"#[^#\[\]]+")
STEPS = SystemInstruction(name="steps", text="Show steps.", pattern=r"[^#]+#[^#\[\]]+")
BRACKETS = SystemInstruction(name="brackets", text="Use brackets.", pattern=r"[^#]*#\[[^#\[\]]+\]")

SYSTEM_INSTRUCTIONS: tuple[SystemInstruction, ...] = (BRIEF, STEPS, BRACKETS)
