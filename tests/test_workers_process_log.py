"""The cause of a failed start, found in what the processes wrote."""

import subprocess
import sys

SCRIPT = """
import os, sys
from posttrain.workers.process_log import ProcessLog
print("ValueError: long before", flush=True)
log = ProcessLog()
print("all is well", flush=True)
print(log.last_error(), file=sys.__stderr__, flush=True)
os.system("echo 'vllm.exceptions.ShapeError: [3] is not [64]' >&2")
os.system("echo 'RuntimeError: Engine core initialization failed. See root cause above.'")
print(log.last_error(), file=sys.__stderr__, flush=True)
"""


def test_the_last_line_that_names_a_cause(tmp_path):
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        subprocess.run([sys.executable, "-c", SCRIPT], stdout=out, stderr=err, check=True)
    lines = (tmp_path / "err").read_text().splitlines()
    assert lines[0] == "None"  # what was written before does not count
    assert lines[-1] == "vllm.exceptions.ShapeError: [3] is not [64]"


def test_a_pipe_has_been_seen_by_whoever_reads_it():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == "None"
