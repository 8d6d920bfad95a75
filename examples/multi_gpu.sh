#!/usr/bin/env bash
# Distil on every GPU of this machine: torchrun starts a process (a rank) for each.
#
#     bash examples/multi_gpu.sh                                        # all GPUs; without one, two ranks on the CPU
#     bash examples/multi_gpu.sh 2 --ipc 50 --out runs/two              # two ranks; the rest is `acs-fast distill`'s
#     bash examples/multi_gpu.sh 8 --preset imagewoof --ipc 50 --out runs/woof
#
# The run folder comes out that one process would write; run the same line again and it continues, with any number
# of ranks. --deterministic makes the images of one process byte by byte. Several machines, SLURM, and what happens
# when a rank dies: docs/cluster.md.
set -euo pipefail

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=${1:-$((gpus > 0 ? gpus : 2))}
shift || true

exec torchrun --standalone --nproc-per-node "$ranks" -m acs_fast distill "$@"
