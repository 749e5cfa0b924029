#!/usr/bin/env bash
# Whole training steps on all GPUs of this machine, stock Transformers beside expertmesh, and what the exchanges take alone.
#
#   benchmarks/eight_gpus.sh [folder for the results, default benchmarks/results]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
[ "$gpus" -gt 1 ] || { echo "This needs several GPUs, and there are $gpus." >&2; exit 2; }
kind=$(python -c "import torch; print(torch.cuda.get_device_name().split()[1].lower())")_x$gpus
commit=${COMMIT:-$(git rev-parse HEAD)}
# no NVLink multicast: a program that uses it can take the links of GPUs down that others share
export TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NCCL_NVLS_ENABLE=0
run() { torchrun --nproc-per-node "$gpus" "$@" --commit "$commit"; }
run benchmarks/two_gpus.py --arms --agreement --probe --out "$out/${kind}_exchanges.json"
run benchmarks/eight_gpus.py --work qwen3-30b-a3b --out "$out/${kind}_qwen3_30b_step.json"
run benchmarks/eight_gpus.py --work nemotron-3-nano --out "$out/${kind}_nemotron_3_nano_step.json"
