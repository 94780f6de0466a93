import signal
import subprocess
import sys

import pytest

from evidence.recipes import ROOT


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send to another process")
def test_ctrl_c_reports_what_was_finished(tmp_path):
    recipe = ROOT / "recipes" / "regularization" / "dropout.py"
    process = subprocess.Popen(
        [sys.executable, recipe, "--seeds", "5", "--epochs", "1", "--limit", "64", "--save", tmp_path / "name"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts its background jobs with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stdout:
        if line.startswith("seed 1, "):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "no dropout" in output
    assert "dropout 0.8" in output
    assert "Interrupted. Finished runs" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["name.json", "name.svg"]
