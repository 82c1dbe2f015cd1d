"""The contract of `fuzz.py` is the oracle: a few inputs of its cheap kinds, of which `make test-fuzz` runs 2,000."""

import subprocess
import sys

from conftest import ROOT

CHEAP = ("records", "scores", "score_files", "tables", "hospitals", "flags")


def test_bad_inputs_end_in_one_line_and_leave_nothing_behind():
    command = [sys.executable, ROOT / "tests" / "fuzz.py", "--inputs", "40", "--kind", *CHEAP]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
