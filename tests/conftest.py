"""What all tests share: one thread, poisoned memory, fixed numbers of examples, seconds a file."""

from __future__ import annotations

import collections
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from backend import NAME, OnDevice, sized
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fixed",
    max_examples=sized(40, 10),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fixed")


def poison_new_memory() -> bool:
    """Lets torch fill every CPU tensor that it allocates with 0x7fedbeef: NaN in float32, in every other element of
    the 16-bit types, 1.7e308 in float64. An element that an op leaves unwritten then shows. False: no such switch."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    for name in ("FLAGS_caffe2_cpu_allocator_do_junk_fill", "_ZN3c1039FLAGS_caffe2_cpu_allocator_do_junk_fillE"):
        try:
            ctypes.c_bool.in_dll(library, name).value = True
        except ValueError:
            continue
        return True
    return False


class SecondsAFile:
    """Sums the time of each test file and prints the sums at the end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid.split("::")[0]] += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("seconds a file")
        for file, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            terminalreporter.write_line(f"{seconds:7.1f}  {file}")


_poisoned = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "core: reaches every kernel path; also run on each forced instruction set")
    config.addinivalue_line("markers", "attention: calls attention, which takes float64 on the CPU alone")
    config.pluginmanager.register(SecondsAFile())
    config.stash[_poisoned] = poison_new_memory()
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """float64 attention is the CPU's."""
    for item in items:
        named = getattr(item, "callspec", None)
        wide = named is not None and any(x in ("f64", torch.float64) for x in named.params.values() if x is not None)
        if NAME != "cpu" and wide and item.get_closest_marker("attention"):
            item.add_marker(pytest.mark.skip(reason=f"{NAME}: attention has no float64 kernel there"))


def pytest_report_header(config: pytest.Config) -> str:
    isa = os.environ.get("EFFOPS_CPU_ISA") or "the best of this processor"
    memory = "poisoned" if config.stash[_poisoned] else "not poisoned, for this torch has no switch for it"
    return f"effops: backend: {NAME}; instruction set: {isa}; new memory: {memory}; torch {torch.__version__}"


@pytest.fixture(autouse=True, scope="session")
def _on_device() -> Iterator[None]:
    if NAME != "cuda":
        yield
        return
    with OnDevice():
        yield


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    """A test may change the number of threads; the next one starts with one again."""
    yield
    torch.set_num_threads(1)
