"""The ten lines of docs/backends.md that stop one CUDA thread in gdb do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not there")
@pytest.mark.skipif(not (BIN / "ninja").exists(), reason="no build tools beside this Python")
def test_a_kernel_in_gdb():
    (script,) = re.findall(
        r"^```bash\n(.*?)^```$", (ROOT / "docs" / "backends.md").read_text(), re.MULTILINE | re.DOTALL
    )
    lines = [line for line in script.splitlines() if line.strip()]
    assert len(lines) <= 10
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    done = subprocess.run(
        ["bash", "-ec", script], cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "thread 13: row 1, keys 0 to 32" in said and "$1 = {0, 0, 0, 0}" in said, said
    assert "effops::device::scalar_attention<64>" in said, said
