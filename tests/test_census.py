import subprocess
import sys

from conftest import ROOT


def test_no_size_exceeds_its_limit():
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "census.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
