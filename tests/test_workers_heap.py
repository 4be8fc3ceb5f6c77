"""What the garbage collector is spared."""

import subprocess
import sys

SCRIPT = """
import gc, weakref
from posttrain.workers.heap import freeze_heap

class Node: pass

gc.disable()
cycle = Node()
cycle.itself = cycle
lost, kept = weakref.ref(cycle), [Node() for _ in range(1000)]
del cycle
freeze_heap()
new = Node()
looked_at = gc.get_objects()
print(lost() is None, any(kept[0] is o for o in looked_at), any(new is o for o in looked_at))
"""


def test_what_is_there_is_put_aside_without_its_garbage() -> None:
    """In a process of its own: for pytest's there would be no way back."""
    said = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == ["True", "False", "True"]
