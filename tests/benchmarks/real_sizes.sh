#!/usr/bin/env bash
# The comparison of documentation/results.md at nnU-Net's own sizes on one GPU: three plans side by side, resumable.
#   WORK=folder DATA=folder-of-raw-datasets bash tests/benchmarks/real_sizes.sh hippocampus_2d|hippocampus_3d|busi SECONDS
# Stops cleanly after SECONDS; the same command goes on from there.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
compare() { python3 "$here/compare.py" --workdir "$WORK" --time-limit $((end - $(date +%s))) "$@"; }
end=$(($(date +%s) + $2))
export nnUNet_compile=${nnUNet_compile:-f}  # ten epochs are too few to earn the compilation back

case $1 in
hippocampus_2d)
    common=(--dataset "$DATA/Dataset004_Hippocampus" --configuration 2d --epochs 10 --plans-name batch64
        --patch 56 40 --batch 64 --features 32 64 128 256 --tile-batch 256)
    variants=(
        'plain:{"corruption_probability": 0.0}'
        'presegstart:{"corruption_probability": 0.4, "presegmentation_start_probability": 0.4}'
        'slow:{"learning_rate": 3e-4}'
    )
    types=(logits x0 epsilon)
    control=30
    ;;
hippocampus_3d)
    common=(--dataset "$DATA/Dataset004_Hippocampus" --configuration 3d_fullres --epochs 10 --tile-batch 16)
    variants=()
    types=(logits)
    control=""
    ;;
busi)
    common=(--dataset "$DATA/Dataset105_BUSI" --configuration 2d --epochs 10 --plans-name batch12
        --patch 224 256 --batch 12 --features 32 64 128 256 512 512 --tile-batch 64)
    variants=('presegstart:{"corruption_probability": 0.4, "presegmentation_start_probability": 0.4}')
    types=(logits)
    control=25
    ;;
esac

train=("${common[@]}" --train-only)
compare "${train[@]}" --prediction-types || exit $?  # nnU-Net alone
jobs=()
for kind in "${types[@]}"; do compare "${train[@]}" --prediction-types "$kind" & jobs+=($!); done
for variant in "${variants[@]}"; do compare "${train[@]}" --prediction-types --variant "$variant" & jobs+=($!); done
all=(--prediction-types "${types[@]}")
for variant in "${variants[@]}"; do all+=(--variant "$variant"); done
if [ -n "$control" ]; then
    compare "${train[@]}" --prediction-types --controls longer --control-epochs "$control" & jobs+=($!)
    all+=(--controls longer --control-epochs "$control")
fi
for job in "${jobs[@]}"; do wait "$job" || echo "job $job ended with $?"; done
# the default and the controls first, the losers after
first=(--prediction-types "${types[0]}")
if [ -n "$control" ]; then first+=(--controls longer --control-epochs "$control"); fi
compare "${common[@]}" "${first[@]}" --presegmentation-weights 0.5
# the default and the controls first, the losers after
first=(--prediction-types "${types[0]}")
if [ -n "$control" ]; then first+=(--controls longer --control-epochs "$control"); fi
compare "${common[@]}" "${first[@]}" --presegmentation-weights 0.5
compare "${common[@]}" "${all[@]}" --presegmentation-weights 0.5
