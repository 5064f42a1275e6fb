"""What the benchmarks' tests share."""

from __future__ import annotations

import pytest
from effops.bench import roof, runner


@pytest.fixture
def tiny(monkeypatch):
    """No retries for an unsteady machine and little memory: these tests time nothing."""
    monkeypatch.setattr(roof, "MAX_DRIFT", 2.0)
    monkeypatch.setattr(roof, "GEMMS", ((64, 64, 64),))
    monkeypatch.setattr(runner, "QUICK_BUFFER_BYTES", 1 << 20)
