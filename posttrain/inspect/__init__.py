"""See what happened in a run, from its files alone: frames, charts, a report.

>>> from posttrain.inspect import charts, load_run
>>> run = load_run("runs/quickstart")                    # doctest: +SKIP
>>> run.draws.group_by("outcome").len()                  # doctest: +SKIP
>>> charts.pass_rate_histogram(run)                      # doctest: +SKIP
"""

from posttrain.inspect.columns import describe
from posttrain.inspect.problems import Problem
from posttrain.inspect.run import Run, load_run, load_runs, stacked

__all__ = ["Problem", "Run", "describe", "load_run", "load_runs", "stacked"]
