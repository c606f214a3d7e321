"""The garbage collector passes over what was imported, and works again after that; a process ends without a murmur."""

import subprocess
import sys

from commands import ROOT


PROGRAM = """
import atexit, gc, os, sys
from hnml_hf.common.collector import end_of_imports, start_of_imports

class Imported:
    def __del__(self, write=os.write):
        write(2, b"taken apart ")

start_of_imports()
atexit.register(lambda: print("the last word", file=sys.stderr))
kept = [[number] for number in range(10_000)]
kept.append(kept)
print(gc.isenabled(), end=" ")
end_of_imports()
print(gc.isenabled(), gc.get_freeze_count() > len(kept))
sys.imported = Imported()  # `sys` is emptied last
sys.exit(3)
"""


def test_what_is_imported_is_passed_over():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.split() == ["False", "True", "True"]
    assert ended.stderr == "the last word\n" and ended.returncode == 3
