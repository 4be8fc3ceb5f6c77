import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_entries import NONE_DRAWN, draw, end

from posttrain.audit import audit, prompt_history
from posttrain.ledger import Ledger, LedgerReader
from posttrain.types import DrawOutcome

ROOT = Path(__file__).parent.parent


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from([*["open", "end"] * 3, *["step"] * 2, "commit", "resume", "crash"]),
        st.integers(0, 10**6),
    ),
    max_size=60,
)


class Model:
    """What a checkpoint holds, kept in plain dictionaries: the ledger has to agree."""

    def __init__(self):
        self.open, self.ended = {}, {}
        self.step = 0
        self.checkpoints = {0: ({}, {})}
        self.durable = {0}

    def counts(self):
        ends = list(self.ended.values())
        return {o: ends.count(o) for o in DrawOutcome} | {"in_flight": len(self.open)}

    def advance(self):
        self.step += 1
        self.checkpoints[self.step] = (dict(self.open), dict(self.ended))

    def resume(self, step):
        self.step = step
        self.checkpoints = {s: c for s, c in self.checkpoints.items() if s <= step}
        self.durable = {s for s in self.durable if s <= step}
        self.open, self.ended = map(dict, self.checkpoints[step])


@settings(max_examples=60)
@given(OPERATIONS)
def test_any_history_agrees_with_a_simple_model(operations):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "ledger.sqlite")
        ledger, model = Ledger(path), Model()
        attempt = ledger.open_attempt("rl", 0)
        number = 0
        for operation, choice in operations:
            if operation == "open":
                # ids start over with the attempt's step: voided ones are used again
                number += 1
                draw_id = f"{model.step}-{len(model.open) + len(model.ended)}"
                if draw_id not in model.open and draw_id not in model.ended:
                    draw(ledger, draw_id, attempt, at=model.step, prompt_id=f"p{number}")
                    model.open[draw_id] = f"p{number}"
            elif operation == "end" and model.open:
                draw_id = sorted(model.open)[choice % len(model.open)]
                outcome = list(DrawOutcome)[choice % 6]
                end(ledger, draw_id, model.step + 1, outcome)
                del model.open[draw_id]
                model.ended[draw_id] = outcome
            elif operation == "step":
                model.advance()
            elif operation == "commit":
                ledger.commit_step(model.step)
                model.durable.add(model.step)
            elif operation in ("resume", "crash"):
                if operation == "crash":
                    LedgerReader.close(ledger)  # without a flush: what was not written is lost
                    ledger = Ledger(path)
                step = sorted(model.durable)[choice % len(model.durable)]
                model.resume(step)
                attempt = ledger.open_attempt("rl", step)
                again = {d.draw_id: d.prompt_id for d in ledger.open_draws(attempt)}
                assert again == model.open
                for draw_id in sorted(again)[: choice % 5]:
                    draw(ledger, draw_id, attempt, at=step, prompt_id=again[draw_id])
            assert ledger.draw_counts() == model.counts()
        ledger.close()
        report = audit(path)
        assert report.ok, report.describe()
        assert report.counts == model.counts()


DRIVER = """
    # Each step draws five groups and ends the four oldest; a checkpoint every three steps.
    import sys, time
    from pathlib import Path
    from posttrain.atomic import write_atomically
    from posttrain.ledger import Ledger
    from posttrain.types import DrawOutcome
    path, pointer = Path(sys.argv[1]), Path(sys.argv[2])
    ledger = Ledger(path)
    step = int(pointer.read_text()) if pointer.exists() else 0
    attempt = ledger.open_attempt("rl", step)
    queue, number = [], 0

    def open_draw(draw_id, prompt_id):
        ledger.open_draw(draw_id=draw_id, prompt_id=prompt_id, domain="d", system=None,
                         attempt=attempt, drawn_at_step=step)
        queue.append(draw_id)

    for draw in ledger.open_draws(attempt):
        open_draw(draw.draw_id, draw.prompt_id)
    while True:
        for _ in range(5):
            open_draw(f"{attempt}-{number:06}", f"p{number % 50}")
            number += 1
        for _ in range(4):
            ledger.close_draw(queue.pop(0), DrawOutcome.TRAINED, step=step + 1,
                              num_scored=8, num_correct=4)
        step += 1
        if step % 3 == 0:
            ledger.commit_step(step)
            write_atomically(pointer, str(step))
            print(step, flush=True)
"""


def test_a_driver_killed_at_any_moment_resumes_with_nothing_lost_and_nothing_twice(path, tmp_path):
    pointer = tmp_path / "latest"
    chance = random.Random(0)
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(DRIVER), path, pointer],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        ) as driver:
            assert driver.stdout.readline()
            time.sleep(chance.uniform(0.0, 0.2))
            driver.send_signal(signal.SIGKILL)
        report = audit(path)
        assert report.ok, report.describe()
    step = int(pointer.read_text())
    assert step >= 9
    with Ledger(path) as ledger:
        assert ledger.open_attempt("rl", step) == 4
        assert len(ledger.open_draws()) == step
        expected = NONE_DRAWN | {"trained": 4 * step, "in_flight": step}
        assert ledger.draw_counts() == expected
    report = audit(path)
    assert report.ok, report.describe()
    assert (report.counts, report.num_provisional) == (expected, 0)


def test_speed(path):
    num_draws, num_prompts = 200_000, 5_000
    with Ledger(path) as ledger:
        attempt = ledger.open_attempt("rl", 0)
        started = time.process_time()
        for i in range(num_draws):
            draw(ledger, f"1-{i:07}", attempt, at=i // 64, prompt_id=f"p{i % num_prompts}")
            end(ledger, f"1-{i:07}", i // 64 + 1)
        ledger.flush()
        per_second = num_draws / (time.process_time() - started)
        assert per_second >= 20_000, f"{per_second:.0f} draws opened and ended a second"
        started = time.process_time()
        events = prompt_history(path, "p77")
        seconds = time.process_time() - started
    assert len(events) == 2 * num_draws / num_prompts
    assert seconds <= 0.05
