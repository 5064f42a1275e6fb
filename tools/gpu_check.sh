#!/usr/bin/env bash
# Checks the CUDA kernels on this machine's GPU: tools/gpu_check.sh OUTDIR [--rehearse]
# Builds the ops library with nvcc first, unless EFFOPS_LIBRARY names one that is built already. PYTHON is the
# interpreter with a CUDA build of torch (python3); it needs pytest and hypothesis too. Writes up to 8 files to OUTDIR in
# at most 9 minutes. --rehearse: what needs no GPU, with the kernels on the host machine (EFFOPS_SIMT_LIBRARY).
# Exit code: 0 all checks passed, 1 something failed, 2 no GPU here or bad arguments.
set -euo pipefail
cd "$(dirname "$0")/.."

rehearse=0
[[ $# -eq 2 && $2 == --rehearse ]] && rehearse=1
if [[ $# -ne $((1 + rehearse)) ]]; then
  echo "gpu_check: expected the folder for the results and perhaps --rehearse, got $# arguments" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="python${PYTHONPATH:+:$PYTHONPATH}"
[[ $rehearse -eq 1 ]] && exec "$python" tools/gpu_check.py "$out" --rehearse

# The architecture of GPU 0 as nvcc names it, or the reason why there is none.
if ! arch=$("$python" -c '
import torch
assert torch.cuda.is_available(), f"torch {torch.__version__} sees no GPU"
major, minor = torch.cuda.get_device_capability(0)
print(f"{major}{minor}" + "a" * (major == 9))' 2>"$out/no_gpu.txt"); then
  echo "gpu_check: no GPU: $(tail -n 1 "$out/no_gpu.txt")" >&2
  rm "$out/no_gpu.txt"
  exit 2
fi
rm "$out/no_gpu.txt"

if [[ -z "${EFFOPS_LIBRARY:-}" ]]; then
  echo "building for sm_$arch"
  cmake -S . -B "$out/build" -G Ninja -DEFFOPS_CUDA=on "-DEFFOPS_CUDA_ARCHS=$arch" \
    "-DPython_EXECUTABLE=$(command -v "$python")" >"$out/build.log"
  cmake --build "$out/build" --target effops_ops >>"$out/build.log"
  EFFOPS_LIBRARY=$(find "$out/build" -name libeffops.so -print -quit)
  export EFFOPS_LIBRARY
fi
exec "$python" tools/gpu_check.py "$out"
