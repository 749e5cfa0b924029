#!/usr/bin/env bash
# mamba_ssm's Triton kernels without a compiler, to measure stock Transformers' Nemotron with them:
#
#     benchmarks/mamba_ssm.sh FOLDER      # needs pip and torch; PYTHON names another interpreter than .venv's
#     PYTHONPATH=FOLDER TRITON_CACHE_AUTOTUNING=1 expertmesh bench --work nemotron-3-nano --arms stock,expertmesh
#
# Its scans tune themselves for more than a minute; with that variable Triton (3.4 and later) keeps what a first run has
# found. causal_conv1d is CUDA alone: without it stock convolves by PyTorch and cannot run mamba_ssm's fusion with it.
set -euo pipefail
folder=${1:?name a folder, new or empty}
python=${PYTHON:-.venv/bin/python}
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
mkdir -p "$folder"
"$python" -m pip install -q --no-deps --target "$folder" einops==0.8.1
MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
  "$python" -m pip wheel -q --no-deps --no-build-isolation --wheel-dir "$wheels" mamba-ssm==2.2.6.post3
"$python" -m pip install -q --no-deps --target "$folder" "$wheels"/mamba_ssm-*-py3-none-any.whl
: >"$folder/mamba_ssm/__init__.py" # imports a CUDA extension
echo 'del mamba_split_conv1d_scan_combined  # needs causal_conv1d' >>"$folder/mamba_ssm/ops/triton/ssd_combined.py"
PYTHONPATH=$folder "$python" -c "from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined"
