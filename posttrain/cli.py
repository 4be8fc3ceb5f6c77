"""The commands: they parse, call and print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli_inspect import inspect_command
from posttrain.cli_plan import plan_command
from posttrain.cli_prune import prune_command
from posttrain.cli_reward import reward_command
from posttrain.cli_teach import teach_command
from posttrain.errors import DataError, Interrupted, PosttrainError, StageError

if TYPE_CHECKING:
    from posttrain.config import Settings
    from posttrain.inputs import Inputs

app = typer.Typer(
    help="Difficulty screening → light SFT → asynchronous online RL → light DPO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Argument(help="YAML file of settings.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to override.", metavar="KEY.SUB=VALUE")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]


@app.command("run")
def run_command(
    config: ConfigPath,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="Delete the run and start over.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything, start nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Run the stages of CONFIG. The same command again resumes."""
    from posttrain.inputs import check_learner
    from posttrain.remote_run import check_place
    from posttrain.rerun import refuse_own_output
    from posttrain.stages.trl_settings import check_trainers

    settings, inputs = _prepare(config, overrides)
    check_trainers(settings)
    check_place(settings.run)
    refuse_own_output(settings)
    check_learner(settings, inputs)
    if dry_run:
        _emit(_plan(settings, inputs), as_json)
        return
    from posttrain import pipeline

    result = pipeline.run(settings, inputs, fresh=fresh)
    if as_json:
        print(
            json.dumps(
                {
                    "policy": str(result.policy),
                    "evaluations": result.evaluations,
                    "seconds": result.seconds,
                }
            )
        )
        return
    from posttrain.console import stdout_console
    from posttrain.report import print_report

    # A table that is piped into a file must not be cut to 80 columns.
    console = stdout_console()
    print_report(result.evaluations, result.seconds, str(result.policy), console, result.metrics)


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, hub name or `starter`.")],
    config: ConfigPath,
    overrides: Overrides = None,
    k: Annotated[str | None, typer.Option(help="Comma-separated k of pass@k.")] = None,
    as_json: Json = False,
) -> None:
    """Measure pass@k of MODEL on the held-out tasks of CONFIG, by domain."""
    changed = [*(overrides or []), f"policy.model={json.dumps(model, ensure_ascii=False)}"]
    settings, inputs = _prepare(config, changed + ([f"eval.k=[{k}]"] if k else []))
    from posttrain.pipeline import evaluate_models

    (summary,) = evaluate_models(settings, inputs, [inputs.model])
    if as_json:
        print(json.dumps(summary))
        return
    from posttrain.console import stdout_console
    from posttrain.report import print_evaluation

    print_evaluation(summary, stdout_console())


@app.command("audit")
def audit_command(
    run: Annotated[Path, typer.Argument(help="Directory of a run, or of prune.", metavar="RUN")],
    prompt: Annotated[str | None, typer.Option(help="The life of one prompt, by id.")] = None,
    texts: Annotated[
        bool, typer.Option("--texts", help="With --prompt: what was asked and answered.")
    ] = False,
) -> None:
    """Prove that every draw of RUN ended exactly once, or tell one prompt's life.

    In a directory of `posttrain prune`, --prompt takes a row's number too.
    """
    from posttrain.audit import audit
    from posttrain.prune.history import history, is_prune_dir
    from posttrain.run_dir import RunDir

    if is_prune_dir(run):
        if prompt is None:
            raise DataError(f"{run} was made by `posttrain prune` and has no draws: give --prompt")
        print("\n".join(history(run, prompt)))
        return
    run_dir = RunDir(run)
    run_dir.config()  # raises if this is no run
    if prompt is not None:
        from posttrain.inspect.timeline import timeline

        lines = timeline(run_dir, prompt, texts=texts)
        if not lines:
            raise DataError(f"--prompt {prompt}: {run} has never judged or drawn such a prompt")
        print("\n".join(lines))
        return
    report = audit(run_dir.ledger_path)
    print(report.describe())
    if not report.ok:
        raise typer.Exit(StageError.exit_code)


app.command("inspect")(inspect_command)
app.command("plan")(plan_command)
app.command("prune")(prune_command)
app.command("reward")(reward_command)
app.command("teach")(teach_command)


@app.command("doctor")
def doctor_command(as_json: Json = False) -> None:
    """Say what works on this machine: engines, DeepSpeed, sandbox, GPUs, versions."""
    from posttrain.doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps({"findings": [finding.as_dict() for finding in findings]}))
    else:
        for finding in findings:
            mark = {True: "ok", False: "MISSING", None: "-"}[finding.works]
            print(f"{mark:8}{finding.name:24}{finding.detail}")
    if any(finding.works is False for finding in findings):
        raise typer.Exit(3)


def _prepare(path: Path, overrides: list[str] | None) -> tuple[Settings, Inputs]:
    from posttrain.config import load
    from posttrain.inputs import load_inputs

    settings = load(path, overrides or [])
    return settings, load_inputs(settings)


def _plan(settings: Settings, inputs: Inputs) -> dict[str, Any]:
    """What a run would do, without doing it."""
    from posttrain.plan import examine, policy_shape
    from posttrain.rerun import outlook

    name = None if inputs.teacher is None else str(inputs.teacher)
    teacher = settings.teacher.model_copy(update={"model": name})
    located = settings.model_copy(update={"teacher": teacher, "rewards": inputs.rewards})
    needs = examine(located, policy_shape(str(inputs.model)))
    return {
        "stages": outlook(settings, inputs),
        "run": settings.run.dir,
        "policy": str(inputs.model),
        "teacher": str(inputs.teacher or "none"),
        "train_prompts": len(inputs.train),
        "held_out_prompts": len(inputs.held_out),
        "sft_rows": len(inputs.sft_rows),
        **_answers(settings, inputs),
        "asked_for_at_once": needs["demands"],
        "gib_on_each_device": [_memory(role) for role in needs["roles"]],
        "does_not_fit": needs["problems"],
        "prompts_sharing_text": [
            f"{pair}: {count}" for pair, count in inputs.prompts_sharing_text().items()
        ],
    }


def _answers(settings: Settings, inputs: Inputs) -> dict[str, int]:
    """How many the stages of this run ask for, as far as that is known beforehand."""
    from posttrain.data.prompts import each_once

    answers: dict[str, int] = {}
    rl = settings.rl
    if "screen" in settings.stages:
        screened = each_once([*inputs.train, *(row.prompt for row in inputs.sft_rows)])
        answers["screening_answers_at_most"] = len(screened) * settings.screen.judge.max_samples
    if "rl" in settings.stages:
        answers["rl_trained_answers"] = rl.num_steps * rl.groups_per_step * rl.group_size
    return answers


def _memory(role: dict[str, Any]) -> str:
    there = "" if role["available"] is None else f" of {role['available']:.1f}"
    return f"{role['role']} {role['needed']:.1f}{there}"


def _emit(record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(record))
        return
    for name, value in record.items():
        if isinstance(value, list):
            value = ", ".join(value) or "none"
        print(f"{name.replace('_', ' '):28}{value}")


@contextlib.contextmanager
def _signals_end_the_run() -> Iterator[None]:
    """SIGTERM ends like Ctrl-C: pools are stopped, the exit code says that it can be resumed.

    A signal raises SystemExit, because asyncio and many a library swallow other exceptions that
    come out of nowhere. What arrives here may be another one: Ray makes its own of it.
    """
    received: list[int] = []

    def stop(number: int, _: Any) -> None:
        received.append(number)
        raise SystemExit(number)

    previous = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except BaseException:
        if not received:
            raise
        name = signal.Signals(received[0]).name
        raise Interrupted(
            f"stopped by {name}; the same command goes on from the last stage or checkpoint"
        ) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main() -> None:
    """Entry point. 0 done, 2 bad input, 3 failed, 4 stopped by a signal."""
    try:
        with _signals_end_the_run():
            app()
    except PosttrainError as error:
        print(f"posttrain: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        sys.exit(StageError.exit_code)


if __name__ == "__main__":
    main()
