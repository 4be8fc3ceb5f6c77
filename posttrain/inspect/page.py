"""HTML of a run: the table that a notebook shows, and the report as one file that opens offline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.atomic import write_atomically
from posttrain.errors import SettingsError
from posttrain.inspect.columns import FRAMES
from posttrain.inspect.findings import findings
from posttrain.inspect.run import Run
from posttrain.progress import duration


class Section(NamedTuple):
    """Charts under a heading; `question` is what they answer."""

    heading: str
    question: str
    charts: Sequence[Callable[[Run], Any]]


def sections() -> list[Section]:
    from posttrain.inspect import charts

    return [
        Section(
            "Accuracy",
            "What did each stage bring, and where is it still hard?",
            [charts.domain_accuracy, charts.accuracy_by_time],
        ),
        Section(
            "Difficulty and pruning",
            "How hard were the prompts, what was dropped for it, was the judge right?",
            [charts.pass_rate_histogram, charts.pruned_by_domain, charts.calibration],
        ),
        Section(
            "The curriculum during RL",
            "What was drawn, how much of it carried a signal, what became of the prompts?",
            [
                charts.trainable_share,
                charts.difficulty_by_step,
                charts.pool_by_bucket,
                charts.bucket_moves,
                charts.where_prompts_went,
            ],
        ),
        Section(
            "The loop",
            "Who waited for whom, how stale was what was trained on, and what did that cost?",
            [charts.idle_shares, charts.staleness],
        ),
        Section(
            "Co-distillation", "How much did the teacher weigh?", [charts.distillation_weights]
        ),
    ]


def run_summary(run: Run) -> str:
    """A small table for notebooks: stages, findings, and what the frames hold."""
    frames = [
        (f"<code>.{name}</code>", f"{len(getattr(run, name)):,}", escape(frame.row))
        for name, frame in FRAMES.items()
        if name != "answers"
    ]
    frames.append(("<code>.answers</code>", "lazy", escape(FRAMES["answers"].row)))
    return (
        f"<h4>{escape(run.name)}</h4>{_findings(run)}{_stages(run)}"
        f"{_table(['frame', 'rows', 'a row is'], frames)}{_problems(run)}"
    )


def write_report(run: Run, path: Path) -> None:
    """The report as one self-contained file of about a megabyte; needs no network to be read.

    Raises SettingsError if the package that holds the charts' JavaScript is not installed.
    """
    body = "".join(
        f"<section><h2>{escape(section.heading)}</h2><p>{escape(section.question)}</p>"
        + "".join(f'<div class="chart" id="{chart.__name__}"></div>' for chart in section.charts)
        + "</section>"
        for section in sections()
    )
    write_atomically(
        path,
        _PAGE.format(
            title=escape(run.name),
            head=f"{_findings(run)}{_problems(run)}{_stages(run)}",
            body=body,
            path=escape(str(run.path)),
            script=_script(_specs(run)),
        ),
    )


def _specs(run: Run) -> dict[str, Any]:
    """The charts as Vega-Lite, by name, with their data whatever their size: the page is read by a
    browser, which takes more rows than Altair lets into a notebook."""
    import altair

    with altair.data_transformers.enable("default", max_rows=None):
        return {c.__name__: c(run).to_dict() for section in sections() for c in section.charts}


def _script(specs: dict[str, Any]) -> str:
    try:
        import vl_convert
    except ImportError as error:
        raise SettingsError(
            "a report that opens offline needs the package vl-convert-python: pip install"
            " vl-convert-python"
        ) from error
    # Inside a script element only `</` could end it early.
    data = json.dumps(specs).replace("</", "<\\/")
    bundle = _bundle(vl_convert.javascript_bundle)
    return (
        f"{bundle}\nfor (const [id, spec] of Object.entries({data}))\n"
        "  window.vegaEmbed('#' + id, spec, {actions: false, renderer: 'svg'});\n"
    )


@cache
def _bundle(javascript_bundle: Callable[[str, str], str]) -> str:
    """What draws charts: the same for every report, and seconds to put together."""
    import altair

    major, minor, *_ = altair.SCHEMA_VERSION.removeprefix("v").split(".")
    return javascript_bundle("window.vegaEmbed = vegaEmbed;", f"{major}.{minor}")


def _findings(run: Run) -> str:
    if run.is_empty:
        return "<p>Nothing was recorded yet.</p>"
    rows = [(f"<b>{escape(f.question)}</b>", escape(f.answer)) for f in findings(run)]
    return _table([], rows, "findings")


def _stages(run: Run) -> str:
    rows = [
        (
            escape(row["stage"]),
            escape(row["state"]),
            "" if row["seconds"] is None else duration(row["seconds"]),
            "" if row["pass@1"] is None else f"{row['pass@1']:.3f}",
        )
        for row in run.stages.iter_rows(named=True)
    ]
    return _table(["stage", "state", "time", "held-out pass@1"], rows)


def _problems(run: Run) -> str:
    if not run.problems:
        return ""
    rows = [(escape(p.source.name), escape(p.message)) for p in run.problems]
    return f"<p><b>Could not be read and is left out:</b></p>{_table([], rows)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML. Notebooks would set them to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag} {_LEFT}>{cell}</{tag}>' for cell in cells)}</tr>"

    top = line(head, "th") if head else ""
    body = "".join(line(row, "td") for row in rows)
    return f'<table class="{kind}">{top}{body}</table>'


_LEFT = 'style="text-align: left"'

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title} · posttrain</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 62rem;
       padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; margin-bottom: 0; }}
h2 {{ font-size: 1.2rem; margin: 2.2rem 0 0; border-top: 1px solid #ddd; padding-top: 1rem; }}
p {{ margin: .2rem 0 .8rem; color: #555; }}
table {{ border-collapse: collapse; margin: .8rem 0; }}
td, th {{ text-align: left; padding: .25rem 1.2rem .25rem 0; vertical-align: top; }}
th {{ font-weight: normal; color: #777; border-bottom: 1px solid #ddd; }}
table.findings td {{ border-bottom: 1px solid #eee; }}
table.findings td:first-child {{ white-space: nowrap; }}
.chart {{ margin: 1rem 0 1.6rem; overflow-x: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{path}</p>
{head}
{body}
<script type="module">
{script}
</script>
</body>
</html>
"""
