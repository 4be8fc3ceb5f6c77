"""The settings in configs/: each is read and checked as `--dry-run` does, and fits the devices that
it is written for, by the dimensions that the models have."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from posttrain.cli import main
from posttrain.config import load
from posttrain.memory import role_memory
from posttrain.model_shape import ModelShape, shape_of
from posttrain.roles import demands
from posttrain.workers.demand import Node, why_too_small

CONFIGS = Path(__file__).parent.parent / "configs"
VOCABULARY = 151_936


class Recipe(NamedTuple):
    """`billions` of parameters; `hosts` of so many GPUs."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    experts: int
    billions: float
    hosts: list[int]


RECIPES = {
    "one_gpu": Recipe(28, 1024, 3072, 16, 8, 0, 0.75, [1]),
    "one_host": Recipe(36, 4096, 12288, 32, 8, 0, 8.19, [8]),
    "cluster": Recipe(48, 2048, 768, 32, 4, 128, 30.53, [8, 8, 8, 8]),
}


def shape(recipe: Recipe) -> ModelShape:
    """Of a Qwen3 checkpoint with these dimensions, tensor by tensor."""
    hidden, width = recipe.hidden, recipe.feed_forward
    tensors = {
        "model.embed_tokens.weight": [VOCABULARY, hidden],
        "lm_head.weight": [VOCABULARY, hidden],
        "model.norm.weight": [hidden],
    }
    mlp = {"gate_proj": [width, hidden], "up_proj": [width, hidden], "down_proj": [hidden, width]}
    for number in range(recipe.layers):
        layer = f"model.layers.{number}"
        for name, heads in (("q", recipe.heads), ("k", recipe.kv_heads), ("v", recipe.kv_heads)):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = [heads * 128, hidden]
        tensors[f"{layer}.self_attn.o_proj.weight"] = [hidden, recipe.heads * 128]
        for name, norm in (("q_norm", 128), ("k_norm", 128), ("in", hidden), ("post", hidden)):
            tensors[f"{layer}.{name}.weight"] = [norm]
        if recipe.experts:
            tensors[f"{layer}.mlp.gate.weight"] = [recipe.experts, hidden]
        for name, size in mlp.items():
            for expert in range(recipe.experts):
                tensors[f"{layer}.mlp.experts.{expert}.{name}.weight"] = size
            if not recipe.experts:
                tensors[f"{layer}.mlp.{name}.weight"] = size
    config = SimpleNamespace(
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=128,
        num_hidden_layers=recipe.layers,
        hidden_size=hidden,
        vocab_size=VOCABULARY,
    )
    return shape_of(tensors, config)


def test_every_recipe_is_looked_at() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*RECIPES, "quickstart"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_where_it_is_meant_to(name: str) -> None:
    recipe = RECIPES[name]
    settings = load(CONFIGS / f"{name}.yaml")
    model = shape(recipe)
    assert model.parameters / 1e9 == pytest.approx(recipe.billions, abs=0.01)
    roles = role_memory(settings, model, settings.resources.gpu_gib)
    assert {role.demand.role: role.fits for role in roles} == dict.fromkeys(
        [role.demand.role for role in roles], True
    ), [(role.demand.role, role.needed, role.available, role.parts) for role in roles]
    hosts = [Node(name=str(i), cpus=64, gpus=gpus) for i, gpus in enumerate(recipe.hosts)]
    assert why_too_small(demands(settings), hosts) is None
    asked = sum(d.count * d.each.gpus for d in demands(settings))
    assert asked == sum(recipe.hosts)  # nothing lies idle
    assert why_too_small(demands(settings), hosts[:-1]) is not None


@pytest.mark.parametrize("name", [*RECIPES, "quickstart"])
def test_a_recipe_passes_a_dry_run(
    name: str,
    tmp_path: Path,
    tiny_policy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a policy and data that are here."""

    def write(kind: str, **row: Any) -> str:
        path = tmp_path / f"{kind}.jsonl"
        path.write_text(json.dumps(row))
        return str(path)

    overrides = [f"run.dir={tmp_path / 'run'}"]
    if name != "quickstart":
        train = write("train", question="1+1=?", answer="#### 2")
        held_out = write("held_out", question="0+2=?", answer="#### 2")
        rows = write("sft", question="3-1=?", completion="#2", answer="2")
        overrides += [
            f"policy.model={tiny_policy}",
            f'tasks.train=[{{source: {train}, answer_after: "####"}}]',
            f'tasks.held_out=[{{source: {held_out}, answer_after: "####"}}]',
            f"sft.data={{source: {rows}}}",
        ]
    config = str(CONFIGS / f"{name}.yaml")
    monkeypatch.setattr(
        sys, "argv", ["posttrain", "run", config, *overrides, "--dry-run", "--json"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    assert not ended.value.code, captured.err
    plan = json.loads(captured.out)
    assert plan["stages"] == load(Path(config)).stages
    assert plan["does_not_fit"] == []
    assert not (tmp_path / "run").exists()
