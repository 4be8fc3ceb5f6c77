"""Programs that try to pass without being right."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import dedent

import pytest
from sandbox_cases import EXPECTED, Case, check
from sandbox_helpers import INSTALLED, close_all, open_or_skip

from posttrain.types import Outcome
from rewards.sandbox import Sandbox
from rewards.sandbox_client import Program

WRONG, LIMIT = Outcome.WRONG, Outcome.LIMIT
CALLS = {"function": "f", "cases": [{"args": [1], "expected": EXPECTED}]}


@pytest.fixture(scope="module", autouse=True)
def _closed_at_the_end() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture(params=INSTALLED)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return open_or_skip(request.param)


FORGED = {
    "exit": Case("import sys; sys.exit(0)", WRONG, "before the function returned"),
    "exit-when-called": Case("import os\ndef f(x): os._exit(0)", WRONG, "before the function"),
    "exit-in-thread": Case(
        "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()\nf = id", WRONG
    ),
    "always-equal": Case(
        """
        class Always(str):
            def __eq__(self, other): return True
            def __hash__(self): return 0
        def f(x): return Always('x')
        """,
        WRONG,
        "returned '\"x\"'",
    ),
    "an-object": Case("def f(x): return object()", LIMIT, "cannot be compared"),
    "patched-builtins": Case(
        """
        import builtins
        for name in ('all', 'any', 'len', 'map', 'print', 'sorted'):
            setattr(builtins, name, lambda *a, **k: True)
        def f(x): return 'x'
        """,
        WRONG,
    ),
    "patched-json": Case(
        """
        import json
        json.dumps = json.loads = lambda *a, **k: 'true'
        json.JSONEncoder.encode = lambda *a: 'true'
        def f(x): return 'x'
        """,
        WRONG,
    ),
    "patched-unittest": Case(
        """
        import sys, types, unittest
        unittest.TestCase.assertEqual = lambda *a: None
        unittest.TestResult.wasSuccessful = lambda self: True
        sys.modules['unittest'] = sys.modules['pytest'] = types.ModuleType('unittest')
        def f(x): return 'x'
        """,
        WRONG,
    ),
    "patched-harness": Case(
        """
        import sys
        harness = sys.modules['rewards.sandbox_program']
        harness._write = lambda fd, data: None
        harness.json = harness._find = None
        for name in list(sys.modules): del sys.modules[name]
        def f(x): return 'x'
        """,
        LIMIT,
    ),
    "at-exit": Case(
        "import atexit, os\natexit.register(os.write, 3, b'true')\ndef f(x): return 'x'",
        WRONG,
        "cannot be read",
    ),
    "wrote-the-result": Case(
        "import os\nos.write(3, b'{\"passed\": true}'); os._exit(0)\nf = id", WRONG, "passed"
    ),
    "wrote-rubbish": Case("import os\nos.write(3, b'\\xff[' * 999); os._exit(0)", WRONG, "cannot"),
    "nested-result": Case("import os\nos.write(3, b'[' * 10**6); os._exit(0)", WRONG, "cannot"),
    "endless-result": Case("import os\nwhile True: os.write(3, b'1' * 2**20)", LIMIT, "wrote more"),
    "closed-the-result": Case(
        "import os\nos.closerange(0, 64)\ndef f(x): return 'x'", LIMIT, "exit code 1"
    ),
    "swapped-the-result": Case(
        "import os\nos.dup2(1, 3)\ndef f(x): return 'x'", WRONG, "before the function returned"
    ),
    "rewound-the-result": Case(
        """
        import os
        keep = os.dup(3)
        os.ftruncate(keep, 0)
        def f(x): return 'x'
        """,
        WRONG,
    ),
    "searched-the-frames": Case(
        """
        import gc, sys
        def f(x):
            found, frame = [], sys._getframe()
            while frame:
                found += [frame.f_locals, frame.f_globals]
                frame = frame.f_back
            for thing in found + gc.get_objects():
                if isinstance(thing, dict):
                    for key, value in list(thing.items()):
                        if key == 'expected' or isinstance(value, str) and value[:5] == '4213-':
                            return value
        """,
        WRONG,
        "returned 'null'",
    ),
    "searched-the-files": Case(
        """
        import os, sys
        python = os.path.realpath(sys.base_prefix)
        def f(x):
            for top in ('/tmp', '/dev', '/proc', '/home', '/var', '/etc', '/old'):
                for directory, below, files in os.walk(top):
                    below[:] = [n for n in below if os.path.join(directory, n) != python]
                    for name in files:
                        path = os.path.join(directory, name)
                        if os.path.isfile(path) and b'4213-' in open(path, 'rb').read():
                            return path
            for fd in range(64):
                try:
                    if b'4213-' in os.pread(fd, 10**6, 0):
                        return str(fd)
                except OSError:
                    pass
        """,
        WRONG,
        "returned 'null'",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_pass_cannot_be_forged(sandbox: Sandbox, name: str) -> None:
    check(sandbox, FORGED[name], CALLS)


def test_what_is_expected_is_never_sent(sandbox: Sandbox) -> None:
    """The search above finds its own input, so it would have found more."""
    program = dedent(FORGED["searched-the-frames"].program).replace("4213-", "seek-")
    run = sandbox.run(Program(source=program, function="f", arguments=("seek-me",)))
    assert run.result == b'"seek-me"'
