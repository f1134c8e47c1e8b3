#!/usr/bin/env bash
# The comparison of documentation/experiments/stock_widths.md at nnU-Net's own widths on one GPU, resumable.
#   WORK=folder DATA=folder-of-raw-datasets bash tests/benchmarks/real_sizes.sh hippocampus_2d|hippocampus_3d|busi SECONDS
# Stops cleanly after SECONDS; the same command goes on from there.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
end=$(($(date +%s) + $2))
export nnUNet_compile=${nnUNet_compile:-f}  # ten epochs are too few to earn the compilation back
controls=() more=()
few=(--steps 1 5 --samples 1 --noise-steps 10 --no-repair)
full=(--steps 1 2 5 10 --samples 1 5 --presegmentation-weights 0.5)

case $1 in
hippocampus_2d)
    common=(--dataset "$DATA/Dataset004_Hippocampus" --configuration 2d --plans-name batch32
        --patch 56 40 --batch 32 --features 32 64 128 256 --tile-batch 256)
    more=(x0 epsilon)
    ;;
hippocampus_3d)
    common=(--dataset "$DATA/Dataset004_Hippocampus" --configuration 3d_fullres --tile-batch 16)
    ;;
busi)
    common=(--dataset "$DATA/Dataset105_BUSI" --configuration 2d --plans-name batch8
        --patch 224 256 --batch 8 --features 32 64 128 256 512 512 --tile-batch 32 --cases "${CASES:-125}")
    full=(--steps 1 5 --samples 1 5 --presegmentation-weights 0.5)
    ;;
esac
if [ -n "${CONTROL:-}" ]; then controls=(--controls longer --control-epochs "$CONTROL"); fi

compare() {
    python3 "$here/compare.py" --workdir "$WORK" --time-limit $((end - $(date +%s))) --epochs "${EPOCHS:-10}" "${common[@]}" "$@"
}
compare --train-only --prediction-types  # nnU-Net alone
jobs=()
for kind in logits "${more[@]}"; do compare --train-only --prediction-types "$kind" & jobs+=($!); done
if [ -n "${CONTROL:-}" ]; then compare --train-only --prediction-types "${controls[@]}" & jobs+=($!); fi
for job in "${jobs[@]}"; do wait "$job" || echo "a training ended with $?"; done
compare --prediction-types logits "${controls[@]}" "${full[@]}"
if [ -n "${more[*]}" ]; then compare --prediction-types logits "${more[@]}" "${few[@]}"; fi
