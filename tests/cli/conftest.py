"""How the tests run the command: as a user does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.fixture
def run_cli():
    """Runs ``python [options] -m effops arguments`` with extra environment variables."""

    def run(*arguments: str, options: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *options, "-m", "effops", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)

    return run
