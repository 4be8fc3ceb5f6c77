"""What every stage is given: settings, data, the run's directory and ledger, the pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.config import Settings
from posttrain.data.chat import ChatFormat
from posttrain.data.instructions import InstructionMix
from posttrain.evaluation import PromptResult
from posttrain.ledger import Ledger
from posttrain.metrics import MetricsLog
from posttrain.remote_run import RemoteCopy
from posttrain.run_dir import RunDir
from posttrain.types import PreferencePair, Prompt, SFTRow
from posttrain.workers.pools import Pools


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """Shared by the stages of one run; each of its parts has its own owner."""

    settings: Settings
    run: RunDir
    ledger: Ledger
    metrics: MetricsLog
    pools: Pools
    chat: ChatFormat
    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    sft_rows: Sequence[SFTRow]
    pairs: Sequence[PreferencePair]
    copy: RemoteCopy | None
    teacher: Path | None
    evaluations: dict[Path, list[PromptResult]] = field(default_factory=dict)
    """Of the policies that were measured on all held-out tasks (`posttrain.stages.held_out`)."""

    @property
    def seed(self) -> int:
        return self.settings.run.seed

    def instruction_mix(self, salt: int) -> InstructionMix:
        """A mix of its own for each user, so that none changes what another draws."""
        return InstructionMix(self.settings.system_instructions, self.seed * 1000 + salt)

    async def keep(self) -> None:
        """Whatever is on disk by now goes to the run's URL, if it has one."""
        if self.copy is not None:
            self.ledger.flush()
            await self.copy.push()

    def policy_of(self, stage: str) -> Path:
        """Where a stage leaves its policy."""
        return self.run.stage_dir(stage) / "policy"

    def adapter_of(self, stage: str) -> Path:
        """Where a stage that trains an adapter leaves it, besides the merged policy."""
        return self.run.stage_dir(stage) / "adapter"

    def left_by(self, stage: str) -> list[Path]:
        """What a stage has left, as its artifacts."""
        policy, adapter = self.policy_of(stage), self.adapter_of(stage)
        return [policy, adapter] if adapter.is_dir() else [policy]
