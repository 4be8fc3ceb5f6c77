"""Imports point one way, heavy packages stay in their corner, and the command line starts fast."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up. A unit is a module or a package with all that is in it. It may import units
# of lower layers; units of one layer never import one another.
LAYERS = [
    layer.split()
    for layer in (
        "posttrain.types posttrain.errors posttrain.kinds",
        # What is computed and what stands on disk, each on its own.
        "judges rewards curricula posttrain.losses"
        " posttrain.advantages posttrain.packing posttrain.progress posttrain.stage_order"
        " posttrain.atomic posttrain.metrics posttrain.ledger_schema posttrain.lease"
        " posttrain.settings_errors posttrain.console",
        # Tasks that are made are checked by the verifier that will score them.
        "posttrain.data posttrain.teaching",
        "posttrain.online posttrain.evaluation posttrain.report posttrain.starter"
        " posttrain.ledger posttrain.audit posttrain.run_dir"
        " posttrain.rollout_log posttrain.prompt_table posttrain.pair_table"
        " posttrain.metric_sinks"
        " posttrain.dependencies posttrain.model_shape posttrain.split",
        "posttrain.workers",
        # Every component's settings come together, then what they name is read.
        "posttrain.config",
        "posttrain.inputs posttrain.doctor posttrain.prune posttrain.roles posttrain.remote_run"
        " posttrain.inspect posttrain.cards",
        "posttrain.rerun posttrain.memory",
        "posttrain.stages posttrain.reward_file posttrain.plan",
        "posttrain.pipeline posttrain.cli_prune posttrain.cli_reward posttrain.cli_plan"
        " posttrain.cli_teach posttrain.cli_inspect",
        "posttrain.cli",
    )
]
# The starter's tasks are made of prompts, and they are one of the sources of prompts.
UPWARDS = {("posttrain.data.sources", "posttrain.starter.tasks")}

CLUSTER = {"ray", "vllm", "deepspeed", "trl", "peft", "accelerate"}
"""Imported in these two packages only, wherever in a module it is."""
CLUSTER_USERS = {"posttrain.workers", "posttrain.stages"}

SLOW = CLUSTER | {
    "torch",
    "transformers",
    "datasets",
    "pyarrow",
    "reasoning_gym",
    "math_verify",
    "sympy",
    "polars",
    "altair",
}
"""Outside these units only inside functions."""
SLOW_USERS = CLUSTER_USERS | {"posttrain.losses", "posttrain.inspect"}
SCRIPTS = {"posttrain.starter.train", "posttrain.starter.evaluate"}
"""Started by hand and imported by nothing of ours."""


class Import(NamedTuple):
    target: str
    line: int
    at_load: bool


def packages() -> list[str]:
    """Top-level packages, as pyproject.toml finds them."""
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    return sorted(name for name in found if name != "tests")


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file."""
    files = (path for package in packages() for path in (ROOT / package).rglob("*.py"))
    return {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
        for p in files
    }


@cache
def imports_of(module: str) -> list[Import]:
    """Every import, those for type checking and those inside functions included."""

    def walk(node: ast.AST, at_load: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, at_load) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}, line {child.lineno}: a relative import"
                for alias in child.names:
                    below = f"{child.module}.{alias.name}"
                    target = below if below in modules() else str(child.module)
                    yield Import(target, child.lineno, at_load)
            else:
                deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(
                    child.test
                )
                yield from walk(child, at_load and not deferred and not typing_only)

    return list(walk(ast.parse(modules()[module].read_text()), at_load=True))


def unit_of(module: str) -> str | None:
    units = {unit for layer in LAYERS for unit in layer}
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in units), None)


def layer_of(unit: str) -> int:
    return next(height for height, layer in enumerate(LAYERS) if unit in layer)


def test_every_module_has_its_place() -> None:
    homeless = [m for m in modules() if unit_of(m) is None and m != "posttrain"]
    assert not homeless, f"say in LAYERS where they stand: {homeless}"
    gone = [u for layer in LAYERS for u in layer if u not in modules()]
    assert not gone, f"LAYERS names what is not there: {gone}"


def test_the_package_itself_imports_nothing() -> None:
    assert imports_of("posttrain") == []


@pytest.mark.parametrize("module", sorted(m for m in modules() if m != "posttrain"))
def test_imports_point_down(module: str) -> None:
    unit = unit_of(module)
    assert unit is not None
    wrong = []
    for target, line, _ in imports_of(module):
        if target.split(".")[0] not in packages() or target == "posttrain":
            continue
        other = unit_of(target)
        assert other is not None, f"{module}, line {line} imports {target}, which has no place"
        if (module, target) in UPWARDS or other == unit:
            continue
        if layer_of(other) >= layer_of(unit):
            wrong.append(f"{module}, line {line}: {unit} may not import {other}")
    assert not wrong


def test_the_leaves_of_the_contract_import_nothing_of_ours() -> None:
    for module in LAYERS[0]:
        assert not [i for i in imports_of(module) if i.target.split(".")[0] in packages()]


@pytest.mark.parametrize("module", sorted(modules()))
def test_heavy_packages_stay_in_their_corner(module: str) -> None:
    wrong = []
    for target, line, at_load in imports_of(module):
        package = target.split(".")[0]
        if package in CLUSTER and unit_of(module) not in CLUSTER_USERS:
            wrong.append(f"{module}, line {line}: {package} belongs into {sorted(CLUSTER_USERS)}")
        allowed = unit_of(module) in SLOW_USERS or module in SCRIPTS
        if at_load and package in SLOW and not allowed:
            wrong.append(f"{module}, line {line}: import {package} inside a function")
    assert not wrong


def test_scripts_are_imported_by_nothing() -> None:
    targets = {i.target for m in modules() if m not in SCRIPTS for i in imports_of(m)}
    assert not targets & SCRIPTS


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )


HELP = """
import sys
from posttrain.cli import main
sys.argv = ["posttrain", "--help"]
try:
    main()
except SystemExit as done:
    assert not done.code
"""


@pytest.mark.parametrize(
    "code",
    [
        "import posttrain.types, posttrain.errors",
        HELP,
        # Settings and inputs pull in every judge, reward and curriculum.
        "import posttrain.inputs, posttrain.online.controller, rewards.pool",
    ],
    ids=["contract", "help", "settings"],
)
def test_loads_nothing_slow(code: str) -> None:
    show = "\nimport sys; print(sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(ast.literal_eval(run_python(code + show).stdout.splitlines()[-1]))
    assert "posttrain" in loaded
    assert not loaded & SLOW


def test_a_run_is_looked_at_without_the_machinery_that_made_it() -> None:
    code = "import posttrain.inspect.page, posttrain.inspect.charts, posttrain.inspect.terminal"
    show = "\nimport sys; print(sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(ast.literal_eval(run_python(code + show).stdout.splitlines()[-1]))
    assert {"polars", "altair"} <= loaded
    assert not loaded & (SLOW - {"polars", "altair", "pyarrow"})


def cpu_seconds(code: str) -> float:
    """The best of three, without the time that a busy machine made it wait."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_python(code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    return min(once() for _ in range(3))


def test_starts_within_half_a_second_over_bare_python() -> None:
    bare = cpu_seconds("pass")
    assert cpu_seconds("import posttrain") - bare <= 0.5
    assert cpu_seconds(HELP) - bare <= 0.5
