"""The garbage collector passes over what was imported, works again after that, and lets go of all at the end."""

import subprocess
import sys

from commands import ROOT


PROGRAM = """
import atexit, gc
gc.disable()
atexit.register(lambda: print(gc.get_freeze_count()))
kept = [[number] for number in range(10_000)]
from hnml_hf.common.collector import end_of_imports
end_of_imports()
print(gc.isenabled(), gc.get_freeze_count() > len(kept))
"""


def test_what_is_imported_is_passed_over_until_the_end():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.split() == ["True", "True", "0"] and not ended.stderr
