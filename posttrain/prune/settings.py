"""Everything that `posttrain prune` reads."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from judges.judge import JudgeSettings
from judges.selection import SelectionSettings
from posttrain.config import RewardPoolSettings
from posttrain.data.overlap import WORDS
from posttrain.prune.columns import ColumnSettings
from posttrain.workers.settings import RolloutPoolSettings
from rewards.shaping import RewardSettings


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceChoice(_Section):
    """`path` is a file, a directory or what `datasets` knows by that name; `split` and `subset`
    are those of `datasets`. `limit` takes the first rows, `sample` as many at random."""

    path: str = Field(min_length=1)
    split: str = "train"
    subset: str | None = None
    columns: ColumnSettings = ColumnSettings()
    limit: int | None = Field(default=None, gt=0)
    sample: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_cut(self) -> Self:
        if self.limit is not None and self.sample is not None:
            raise ValueError("limit and sample exclude one another")
        return self


class OtherChoice(_Section):
    """A set that rows are compared with: as in `SourceChoice`, but without a `split` it is all of
    them. A text alone is its `path`."""

    path: str = Field(min_length=1)
    split: str | None = None
    subset: str | None = None
    columns: ColumnSettings = ColumnSettings()

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given

    @property
    def name(self) -> str:
        said = [part for part in (self.subset, self.split) if part is not None]
        return f"{self.path} ({', '.join(said)})" if said else self.path


class OverlapSettings(_Section):
    """Rows that share `words` words in a row with a set of `held_out` are dropped; with one of
    `compare` they are counted."""

    held_out: list[OtherChoice] = []
    compare: list[OtherChoice] = []
    words: int = Field(default=WORDS, gt=0)

    @property
    def paths(self) -> list[str]:
        return [other.path for other in (*self.held_out, *self.compare)]

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        names = Counter(other.name for other in (*self.held_out, *self.compare))
        name, times = next(iter(names.most_common(1)), ("", 0))
        if times > 1:  # it could not be said which of them a row shares text with
            raise ValueError(f"{name} is named {times} times; once is enough")
        return self


class CriticSettings(_Section):
    """The model that judges. `max_length` is what it takes, prompt and answer, in tokens; `system`
    the text of a system message that is put before every prompt."""

    model: str = Field(min_length=1)
    max_length: int = Field(default=2048, gt=0)
    system: str | None = None


class PruneResources(_Section):
    """Engines and scorer processes, as in a run's `resources`."""

    rollout: RolloutPoolSettings = RolloutPoolSettings()
    rewards: RewardPoolSettings = RewardPoolSettings()
    deadline_s: float = Field(default=300.0, gt=0)

    @field_validator("rollout")
    @classmethod
    def _as_long_as_the_critic(cls, pool: RolloutPoolSettings) -> RolloutPoolSettings:
        return pool.without_own_length()


class PruneSettings(_Section):
    """`method` is how rows are judged: by the critic's own answers (`critic`), by the grade that it
    gives to the row's answer (`grade`), or by how much the prompt helps it to predict that answer
    (`ifd`); the last two are experimental. `format` is what rows are written as: one table of
    Parquet shards, or JSON lines, which stay as they stand."""

    source: SourceChoice
    critic: CriticSettings
    method: Literal["critic", "grade", "ifd"] = "critic"
    judge: JudgeSettings = JudgeSettings()
    selection: SelectionSettings = SelectionSettings(drop_easiest=0.5)
    rewards: RewardSettings = RewardSettings()
    overlap: OverlapSettings = OverlapSettings()
    resources: PruneResources = PruneResources()
    seed: int = Field(default=0, ge=0)
    strict: bool = False
    format: Literal["parquet", "jsonl"] = "parquet"

    @model_validator(mode="after")
    def _metric_suits_the_method(self) -> Self:
        metric = self.selection.metric
        if metric != self.method and not (self.method == "critic" and self.selection.is_rate):
            raise ValueError(f"method {self.method} has no {metric} to select by")
        return self

    @model_validator(mode="after")
    def _as_many_answers_as_are_read(self) -> Self:
        k, most = self.selection.k or 1, self.judge.max_samples
        if not self.judge.adaptive and k > most:
            raise ValueError(
                f"selection.metric = pass@{k} cannot be estimated from the fixed number of"
                f" judge.max_samples = {most} answers"
            )
        return self

    @model_validator(mode="after")
    def _answers_fit(self) -> Self:
        if self.method == "critic" and self.judge.max_tokens >= self.critic.max_length:
            raise ValueError(
                f"judge.max_tokens = {self.judge.max_tokens} leaves no room for a prompt in "
                f"critic.max_length = {self.critic.max_length}"
            )
        return self
