"""What SFT and DPO do around TRL: budgets told, checkpoints chosen, a fall in accuracy undone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.config import Settings
from posttrain.data.chat import ChatFormat
from posttrain.data.instructions import InstructionMix
from posttrain.data.pair_sets import load_pairs
from posttrain.data.prompts import make_prompt
from posttrain.data.sources import SourceSettings
from posttrain.errors import StarvationError
from posttrain.evaluation import PromptResult
from posttrain.run_dir import RunDir
from posttrain.stages import dpo as dpo_stage
from posttrain.stages import sft as sft_stage
from posttrain.stages import trl_stage
from posttrain.stages.context import StageContext
from posttrain.stages.trl_job import Trained
from posttrain.types import PreferencePair, SFTRow

HELD_OUT = [make_prompt(f"{n}+1=?", reference=str(n + 1), domain="sums") for n in range(4)]


@dataclass
class Log:
    records: list[dict[str, Any]] = field(default_factory=list)

    def append(self, record: dict[str, Any]) -> None:
        self.records.append(record)


class Pools:
    """Serves a policy by remembering which."""

    def __init__(self) -> None:
        self.scorer = None

    async def serving(self, model: str) -> str:
        return model


def results(correct: int, n: int = 8) -> list[PromptResult]:
    """`correct` of `n` for each prompt."""
    return [
        PromptResult(
            prompt_id=prompt.prompt_id,
            domain="sums",
            n=n,
            correct=correct,
            greedy_correct=None,
            outcomes={"correct": correct, "wrong": n - correct},
            tokens=n,
            instructions={},
        )
        for prompt in HELD_OUT
    ]


@pytest.fixture
def entered(tmp_path: Path) -> Path:
    policy = tmp_path / "entered"
    policy.mkdir()
    (policy / "model.safetensors").write_text("entered")
    return policy


@pytest.fixture
def make_context(tmp_path: Path, tiny_policy: Path) -> Any:
    def make(**changes: Any) -> StageContext:
        settings = Settings.model_validate(
            {
                "run": {"dir": str(tmp_path / "run")},
                "policy": {"model": "starter", "max_length": 64},
                "tasks": {"train": [], "held_out": []},
                "stages": ["sft", "dpo"],
                "sft": {"data": {"source": "unread"}},
                "dpo": {"mining": None, "data": {"source": "unread"}},
                "eval": {"max_tokens": 16},
            }
            | changes
        )
        row = SFTRow(row_id="r", prompt=HELD_OUT[0], completion="#1")
        pair = PreferencePair(
            prompt=HELD_OUT[0],
            system=None,
            chosen="#1",
            rejected="#2",
            corner_case="wrong",
            margin=None,
        )
        run = RunDir(tmp_path / "run")
        for stage in ("sft", "dpo"):
            run.stage_dir(stage).mkdir(parents=True)
        context: Any = SimpleNamespace(
            settings=settings,
            run=run,
            metrics=Log(),
            pools=Pools(),
            chat=ChatFormat(str(tiny_policy)),
            held_out=HELD_OUT,
            sft_rows=[row] * 10,
            pairs=[pair, pair],
            evaluations={},
            seed=0,
            instruction_mix=lambda salt: InstructionMix([], salt),
            policy_of=lambda stage: run.stage_dir(stage) / "policy",
            adapter_of=lambda stage: run.stage_dir(stage) / "adapter",
        )
        return context  # type: ignore[no-any-return]

    return make


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The jobs that were run; each leaves policies that say at which step they were saved."""
    run: list[Any] = []

    def run_job(job: Any, records: Any, *, on_record: Any, **_: Any) -> Trained:
        run.append((job, records))
        on_record({"step": 10, "max_steps": 10, "loss": 1.5})
        policies = {}
        for step in range(10, 10 * job.checkpoints + 1, 10):
            policy = Path(job.directory) / "checkpoints" / f"step-{step}" / "policy"
            policy.mkdir(parents=True)
            (policy / "model.safetensors").write_text(f"step {step}")
            policies[step] = policy
        return Trained(metrics={"train_loss": 1.0}, history=[], policies=policies)

    monkeypatch.setattr(trl_stage, "run_job", run_job)
    return run


def left(context: StageContext, stage: str) -> str:
    return (context.policy_of(stage) / "model.safetensors").read_text()


async def test_the_checkpoint_that_keeps_its_reach_stays(
    make_context: Any, jobs: list[Any], entered: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    context = make_context()
    context.evaluations[entered] = results(4)
    # pass@8 of 0 correct is 0, of any other number 1.
    found = {"step-10": 5, "step-20": 6, "step-30": 0}
    asked: list[tuple[str, int]] = []

    async def evaluate(prompts: Any, *, generator: str, settings: Any, **_: Any) -> Any:
        step = Path(generator).parent.name
        asked.append((step, settings.instruction_samples))
        return results(found[step])

    monkeypatch.setattr(sft_stage, "evaluate", evaluate)
    metrics = await sft_stage.sft(context, entered, None)
    assert asked == [("step-10", 0), ("step-20", 0), ("step-30", 0)]
    assert left(context, "sft") == "step 20"
    assert metrics["kept_step"] == 20
    assert metrics["checkpoints"]["entered"] == pytest.approx({"accuracy": 0.5, "reach": 1.0})
    assert metrics["checkpoints"]["30"] == {"accuracy": 0, "reach": 0, "over_constrained": True}
    assert not (context.run.stage_dir("sft") / "checkpoints").exists()
    said = capsys.readouterr().err
    assert "sft: step 20 stays" in said
    assert "over-constrained" in said
    told = {"stage": "sft", "step": 10, "max_steps": 10, "loss": 1.5}
    assert context.metrics.records == [told]
    assert "sft 10/10 · loss 1.500" in said


async def test_rows_that_screening_dropped_are_not_trained_on(
    make_context: Any, jobs: list[Any], entered: Path, capsys: Any
) -> None:
    context = make_context(
        sft={
            "data": {"source": "unread"},
            "checkpoints": {"count": 1},
            "budget": {"epochs": 4},
            "trainer": {"learning_rate": 0.25},
        }
    )
    metrics = await sft_stage.sft(context, entered, {"r"})
    ((job, records),) = jobs
    assert len(records) == 10
    assert (job.kind, job.model, job.checkpoints) == ("sft", str(entered), 1)
    assert job.trainer == {"max_length": 64, "learning_rate": 0.25, "num_train_epochs": 4.0}
    assert metrics["heavy"] is True
    assert metrics["passes"] == 4.0
    assert "4.0 passes over 10 rows are heavy" in capsys.readouterr().err


async def test_dpo_that_costs_too_much_is_undone(
    make_context: Any, jobs: list[Any], entered: Path, capsys: Any
) -> None:
    context = make_context()
    context.evaluations[entered] = results(4)
    trained = context.run.stage_dir("dpo") / "checkpoints" / "step-10" / "policy"
    context.evaluations[trained] = results(3)
    metrics = await dpo_stage.dpo(context, entered)
    assert metrics["kept"] is False
    assert metrics["pass@1_change"] == pytest.approx(-0.125)
    assert left(context, "dpo") == "entered"
    assert context.evaluations[context.policy_of("dpo")] == results(4)
    said = capsys.readouterr().err
    assert "held-out pass@1 fell by 0.125, more than dpo.guard.max_fall = 0.02" in said


@pytest.mark.parametrize(("correct", "max_fall"), [(4, 0.0), (5, 0.0), (3, 0.125)])
async def test_dpo_that_costs_no_more_than_it_may_stays(
    make_context: Any, jobs: list[Any], entered: Path, correct: int, max_fall: float
) -> None:
    own = {"mining": None, "data": {"source": "unread"}}
    context = make_context(dpo=own | {"guard": {"max_fall": max_fall}})
    context.evaluations[entered] = results(4)
    trained = context.run.stage_dir("dpo") / "checkpoints" / "step-10" / "policy"
    context.evaluations[trained] = results(correct)
    metrics = await dpo_stage.dpo(context, entered)
    assert metrics["kept"] is True
    assert metrics["pairs_by_case"] == {"wrong": 2}
    assert left(context, "dpo") == "step 10"
    assert context.evaluations[context.policy_of("dpo")] == results(correct)
    ((job, records),) = jobs
    assert job.trainer["precompute_ref_log_probs"] is True
    assert records[0]["rejected"] == [{"role": "assistant", "content": "#2"}]
    lines = (context.run.stage_dir("dpo") / "pairs.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["corner_case"] == "wrong"
    one = context.run.stage_dir("dpo") / "one.jsonl"
    one.write_text(lines[0])
    (again,) = load_pairs(SourceSettings(source=str(one)))
    assert (again.prompt.messages, again.chosen, again.rejected) == (
        HELD_OUT[0].messages,
        "#1",
        "#2",
    )


async def test_without_a_pair_there_is_nothing_to_mend(
    make_context: Any, jobs: list[Any], entered: Path
) -> None:
    context = make_context()
    context.pairs.clear()
    with pytest.raises(StarvationError, match="no pair found"):
        await dpo_stage.dpo(context, entered)
    assert jobs == []
