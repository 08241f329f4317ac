"""The tests of the fused programs, run where there is no GPU: by Triton's interpreter, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Fewer would mean that tests were not found, or skipped.
_AT_LEAST = 1050


def test_the_programs_pass_their_tests_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # Numpy computes the side of a choice that is not taken, too, and warns of its overflows.
    quiet = ["-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider", "-q"]
    command = [sys.executable, "-m", "pytest", str(root / "tests/kernels/interpreted"), *quiet]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None, output
    assert int(passed[1]) >= _AT_LEAST, output
