"""The frames of a run: what a row is, and each column's type, meaning and unit.

The frames are made from these tables, so what stands here is what they hold. Absent is null.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import polars as pl

from posttrain.types import Outcome

TIME = pl.Datetime("us", "UTC")
Column = tuple[pl.DataType | type[pl.DataType], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """`row` says what one row is; `patterns` what further columns a frame may have."""

    row: str
    columns: dict[str, Column]
    patterns: dict[str, str] = field(default_factory=dict)

    @property
    def schema(self) -> dict[str, pl.DataType | type[pl.DataType]]:
        return {name: dtype for name, (dtype, _) in self.columns.items()}

    @property
    def names(self) -> list[str]:
        return list(self.columns)

    def empty(self) -> pl.DataFrame:
        return pl.DataFrame(schema=self.schema)


PROMPTS = Frame(
    row="a prompt of the run: trained on, held out, or of the SFT set",
    columns={
        "prompt_id": (pl.String, "hash of its turns"),
        "domain": (pl.String, "capability it belongs to; null if the run did not keep it"),
        "in_train": (pl.Boolean, "RL draws from it"),
        "in_held_out": (pl.Boolean, "evaluation only"),
        "in_sft": (pl.Boolean, "has a row in the SFT set"),
        "screened_rate": (pl.Float64, "share of right answers in its last verdict before RL"),
        "label": (pl.String, "of its last verdict: easy, medium, hard, unsolved"),
        "num_draws": (pl.Int64, "draws that RL opened for it"),
        "num_trained": (pl.Int64, "of those, how many were trained on"),
        "num_right": (pl.Int64, "right answers over its draws"),
        "num_scored": (pl.Int64, "scored answers over its draws"),
        "fate": (pl.String, "see posttrain.inspect.fates.FATES; null if RL cannot draw it"),
        "text": (pl.String, "its turns, `role: content` each"),
        "reference": (pl.String, "the answer wanted, as JSON"),
    },
)

VERDICTS = Frame(
    row="a judge's verdict on the surviving lineage about a prompt, oldest first, and what was"
    " decided on it",
    columns={
        "seq": (pl.Int64, "number among all events of the run"),
        "at": (TIME, "when it was recorded"),
        "prompt_id": (pl.String, "see `prompts`"),
        "domain": (pl.String, "of the prompt"),
        "judge": (pl.String, "kind of judge"),
        "critic": (pl.String, "fingerprint of the judging checkpoint, or stage:attempt.step"),
        "step": (pl.Int64, "policy step that judged; null for a checkpoint before RL"),
        "num_samples": (pl.Int64, "scored answers"),
        "num_correct": (pl.Int64, "of those, right ones"),
        "pass_rate": (pl.Float64, "num_correct / num_samples"),
        "alpha": (pl.Float64, "posterior of the pass rate: Beta(alpha, beta)"),
        "beta": (pl.Float64, "likewise"),
        "label": (pl.String, "easy, medium, hard or unsolved"),
        "decided_by": (pl.String, "why sampling stopped"),
        **{str(o): (pl.Int64, f"answers with outcome {o}") for o in Outcome},
        "stage": (pl.String, "whose decision rests on it: sft, rl; null for none"),
        "action": (pl.String, "keep, drop or retest"),
        "rule": (pl.String, "what decided"),
        "reason": (pl.String, "in words"),
    },
)

DRAWS = Frame(
    row="a draw on the surviving lineage: a prompt, answered a group of times; in order of opening",
    columns={
        "draw_id": (pl.String, "d, the attempt that drew it first, and its number"),
        "prompt_id": (pl.String, "see `prompts`"),
        "domain": (pl.String, "of the prompt"),
        "system": (pl.String, "name of the system instruction it was drawn with; null for none"),
        "stage": (pl.String, "that drew or judged"),
        "attempt": (pl.Int64, "start of the run that opened it last"),
        "drawn_at_step": (pl.Int64, "policy step that the engines served then"),
        "drawn_at": (TIME, "when it was opened"),
        "outcome": (
            pl.String,
            "trained, zero_advantage, stale, errored, cancelled, unused or in_flight",
        ),
        "reason": (pl.String, "why it was not trained: all_correct, none_correct, …"),
        "step": (pl.Int64, "step whose record it counts in; null in flight"),
        "num_scored": (pl.Int64, "scored answers"),
        "num_correct": (pl.Int64, "of those, right ones"),
        "ended_at": (TIME, "when it ended; a trained one with its step"),
    },
)

STEPS = Frame(
    row="an optimizer step of a stage on the surviving lineage",
    columns={
        "stage": (pl.String, "sft, rl or dpo"),
        "step": (pl.Int64, "from 1"),
        "attempt": (pl.Int64, "start of the run that did it"),
        "elapsed_s": (pl.Float64, "seconds of the stage's loop up to and with it"),
        "step_s": (pl.Float64, "seconds since the step before"),
        "reward_mean": (pl.Float64, "over all answers that came in, rejected groups included"),
        "pass@1": (pl.Float64, "share of right answers, likewise"),
        "zero_advantage_share": (pl.Float64, "share of the groups that carried no signal"),
        "signal_share": (pl.Float64, "share that could be trained on; the rest was not scored"),
        "lag_mean": (pl.Float64, "optimizer steps between a group's oldest token and its training"),
        "lag_max": (pl.Float64, "likewise, the worst group"),
        "trained_tokens": (pl.Float64, "completion tokens of the step"),
        "trained_tokens_per_s": (pl.Float64, "completion tokens"),
        "generated_tokens_per_s": (pl.Float64, "completion tokens, rejected groups included"),
        "learner_busy_share": (pl.Float64, "share of step_s inside the learner"),
        "learner_idle_share": (pl.Float64, "share of step_s waiting for groups"),
        "rollout_idle_share": (pl.Float64, "share of the engines' time without a request"),
        "judge_idle_share": (pl.Float64, "likewise, of engines that re-screen alone"),
        "judge_tokens_per_s": (pl.Float64, "completion tokens of re-screening"),
        "teacher_idle_share": (pl.Float64, "share of the teacher's time without a group to read"),
        "teacher_tokens_per_s": (pl.Float64, "prompt and completion tokens that it read"),
        "publish_s": (pl.Float64, "seconds to bring the weights to the engines"),
    },
    patterns={
        "reward/DOMAIN, pass@1/DOMAIN": "of all answers of a domain that came in",
        "pass@K, pass@K/DOMAIN": "for 2, 4, … up to the answers of a group, over whole groups",
        "lag/STEPS": "trained groups by their lag",
        "queue/generating, queue/scoring, queue/ready": "draws that are being worked on, or wait",
        "instruction/SYSTEM": "share of answers that follow a system instruction",
        "draws/OUTCOME, ended/REASON/DOMAIN, trained/DOMAIN": "draws that ended in the step",
        "seats_passed_on": "places in batches that went from fruitless domains to others",
        "quota/DOMAIN": "share of the next batches that is planned for a domain",
        "pool/DOMAIN/BUCKET": "prompts of the curriculum by difficulty, and `dropped`",
        "learner/…, publish/…": "what these parts report; k3 and clipped_fraction also by age",
        "trainer/…": "what TRL logged in sft and dpo",
    },
)

RESCREENS = Frame(
    row="a re-screening: prompts that were judged again during RL",
    columns={
        "stage": (pl.String, "that drew or judged"),
        "step": (pl.Int64, "policy step after which"),
        "prompts": (pl.Int64, "judged"),
        "samples": (pl.Int64, "answers used"),
        "discarded": (pl.Int64, "answers that two versions of the weights wrote"),
        "dropped": (pl.Int64, "prompts that left the pool"),
        "restored": (pl.Int64, "prompts that came back"),
    },
)

EVALS = Frame(
    row="a held-out prompt as a stage's policy answered it, without system instruction",
    columns={
        "stage": (pl.String, "the policy after it; start: the one that came in"),
        "prompt_id": (pl.String, "see `prompts`"),
        "domain": (pl.String, "of the prompt"),
        "num_samples": (pl.Int64, "scored answers"),
        "num_correct": (pl.Int64, "of those, right ones"),
        "pass_rate": (pl.Float64, "num_correct / num_samples"),
        "greedy_correct": (pl.Boolean, "the answer at temperature 0"),
        "tokens": (pl.Float64, "mean tokens an answer"),
        "unparsable": (pl.Int64, "answers"),
        "truncated": (pl.Int64, "answers"),
    },
)

ACCURACY = Frame(
    row="a metric on held-out tasks with its interval: after a stage, or during RL",
    columns={
        "stage": (pl.String, "start: the policy that came in"),
        "step": (pl.Int64, "during a stage: after this step; null: at its end"),
        "elapsed_s": (pl.Float64, "seconds of work of the run up to then"),
        "domain": (pl.String, "`all` for all"),
        "metric": (pl.String, "pass@1, pass@8, greedy, tokens, ignored/SYSTEM, …"),
        "mean": (pl.Float64, "over prompts"),
        "low": (pl.Float64, "95% bootstrap interval over prompts"),
        "high": (pl.Float64, "likewise"),
    },
)

PAIRS = Frame(
    row="a preference pair that DPO was trained on",
    columns={
        "prompt_id": (pl.String, "see `prompts`"),
        "domain": (pl.String, "of the prompt"),
        "system": (pl.String, "name of the system instruction; null for none"),
        "corner_case": (pl.String, "what it mends: wrong, malformed, overlong, instruction"),
        "margin": (pl.Float64, "difference of the rewards; null if they were not scored"),
        "chosen": (pl.String, "text"),
        "rejected": (pl.String, "text"),
    },
)

STAGES = Frame(
    row="a stage that the settings name, in their order, up to the first that is not done",
    columns={
        "stage": (pl.String, "start: evaluation of the policy that came in"),
        "state": (pl.String, "running or done"),
        "seconds": (pl.Float64, "with its evaluation, of all attempts; null until it is done"),
        "pass@1": (pl.Float64, "held-out, after it"),
        "metrics": (pl.String, "what it reports, as JSON"),
    },
)

ANSWERS = Frame(
    row="an answer of a group as it was trained or rejected (lazy: `collect()` what you need)",
    columns={
        "draw_id": (pl.String, "d, the attempt that drew it first, and its number"),
        "prompt_id": (pl.String, "see `prompts`"),
        "domain": (pl.String, "of the prompt"),
        "system": (pl.String, "name of the system instruction; null for none"),
        "outcome": (pl.String, "of its draw"),
        "text": (pl.String, "as it was written"),
        "num_tokens": (pl.Int64, "end of turn included"),
        "finish_reason": (pl.String, "stop or length"),
        "reward": (pl.Float64, "what trained; null if unscored"),
        "correctness": (pl.Float64, "the verifier's score in [0, 1]"),
        "reward_outcome": (pl.String, "correct, wrong, unparsable, truncated, limit, …"),
        "components": (pl.String, "terms of the reward, as JSON"),
        "oldest_version": (pl.String, "attempt.step of the weights that wrote its first token"),
        "newest_version": (pl.String, "likewise, its last"),
        "version_spans": (pl.String, "[first token, end, version] of each, as JSON; null if old"),
        "sampling": (pl.String, "how it was drawn, as JSON; null in logs of old versions"),
        "attempt": (pl.Int64, "start of the run that generated it"),
    },
)

FRAMES = {
    "stages": STAGES,
    "prompts": PROMPTS,
    "verdicts": VERDICTS,
    "draws": DRAWS,
    "steps": STEPS,
    "rescreens": RESCREENS,
    "evals": EVALS,
    "accuracy": ACCURACY,
    "pairs": PAIRS,
    "answers": ANSWERS,
}


def describe(frame: str) -> pl.DataFrame:
    """The columns of a frame: `column`, `type`, `meaning`.

    >>> describe("pairs")["column"].to_list()[:3]
    ['prompt_id', 'domain', 'system']
    """
    found = FRAMES[frame]
    rows = [(name, str(dtype), meaning) for name, (dtype, meaning) in found.columns.items()]
    rows += [(name, "Float64", meaning) for name, meaning in found.patterns.items()]
    return pl.DataFrame(rows, schema=["column", "type", "meaning"], orient="row")
