"""The soak of examples/bench/serve, a short one: many clients, good and bad, and nothing stays behind."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "bench" / "serve" / "soak.py"


def test_clients_of_all_kinds_for_a_few_seconds():
    command = [sys.executable, str(SCRIPT), "--seconds", "6", "--clients", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "answered with 500: 0; wrong: 0" in done.stdout
