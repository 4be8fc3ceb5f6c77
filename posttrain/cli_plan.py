"""`posttrain plan`: who works on which devices, what does not fit, and a better split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def plan_command(
    config: Annotated[Path, typer.Argument(help="YAML file of settings.", metavar="CONFIG")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to override.", metavar="KEY.SUB=VALUE")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--from", help="Propose a better split from what this run measured."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")
    ] = False,
) -> None:
    """Estimate the memory of each role of CONFIG, and say what does not fit.

    Reads settings and the sizes of the models; neither data nor weights are loaded.
    """
    from posttrain.config import load
    from posttrain.plan import examine, policy_shape, propose

    settings = load(config, overrides or [])
    shape = policy_shape(settings.policy.model)
    report = examine(settings, shape)
    if run is not None:
        report["split"] = propose(settings, shape, run)
    if as_json:
        print(json.dumps(report))
        return
    print("\n".join(describe(report)))


def describe(report: dict[str, Any]) -> list[str]:
    """The report as lines for a person."""
    size = f"{report['gpu_gib']:.0f} GiB each" if report["gpu_gib"] else "size not known"
    lines = [
        f"{report['model']}: {report['parameters'] / 1e9:.2f} billion parameters",
        f"at the same time: {report['gpus']:g} GPUs ({size}) and {report['cpus']:g} CPUs",
        *(f"  {demand}" for demand in report["demands"]),
        "GiB on each device, estimated:",
    ]
    for role in report["roles"]:
        parts = " + ".join(f"{name} {gib:.1f}" for name, gib in role["parts"].items())
        there = "" if role["available"] is None else f" of {role['available']:.1f}"
        lines.append(f"  {role['role']:13} {role['needed']:6.1f}{there}: {parts} ({role['note']})")
    lines += [f"does not fit: {problem}" for problem in report["problems"]] or [
        "nothing is known not to fit"
    ]
    if "split" in report:
        lines += _describe_split(report["split"])
    return lines


def _describe_split(split: dict[str, Any]) -> list[str]:
    now, proposed = split["now"], split["proposed"]
    lines = [
        f"measured: {split['step_s']:.1f} s a step; learner idle "
        f"{split['learner_idle_share']:.0%}, engines idle {split['rollout_idle_share']:.0%}"
    ]
    if split["lock_step"]:
        lines.append("rl.max_lag=0 makes engines and learner wait for each other; try rl.max_lag=1")
    if proposed == now:
        return [*lines, "no other split of these devices would be faster"]
    gain = split["step_s"] / split["expected_step_s"]
    return [
        *lines,
        f"proposed: resources.rollout.replicas={proposed['replicas']} "
        f"resources.learner.ranks={proposed['ranks']} (now {now['replicas']} and {now['ranks']}): "
        f"{gain:.2f} × as many steps in the same time, if both scale with their devices",
    ]
