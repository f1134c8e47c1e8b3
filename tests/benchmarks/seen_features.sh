#!/usr/bin/env bash
# Does it matter that a denoiser with `condition: presegmentor` learns from features of cases that nnU-Net was trained on?
# An nnU-Net is trained on the first half of fold 0's training cases; one denoiser then on the same half, one on the other.
#   nnUNet_raw=... nnUNet_preprocessed=... nnUNet_results=... tests/benchmarks/seen_features.sh DATASET_NAME PLANS
# The plans are those of compare.py, preprocessed. Needs nnUNet_extTrainer; writes beside the two folders.
set -euo pipefail
dataset=$1 plans=$2 shared=$nnUNet_preprocessed results=$nnUNet_results
number=$((10#$(cut -c8-10 <<< "$dataset")))

for half in 0 1; do
    export nnUNet_preprocessed=${shared}_half$half nnUNet_results=${results}_half$half
    mkdir -p "$nnUNet_preprocessed" "$nnUNet_results"
    [ -d "$nnUNet_preprocessed/$dataset" ] || cp -rL "$shared/$dataset" "$nnUNet_preprocessed/"
    python - "$shared/$dataset" "$nnUNet_preprocessed/$dataset" "$half" "$plans" << 'PYTHON'
import json, sys
from pathlib import Path

source, target, half, name = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
split = json.loads((source / "splits_final.json").read_text())[0]
cases = sorted(split["train"])
middle = len(cases) // 2
train = (cases[:middle], cases[middle:])[half]
(target / "splits_final.json").write_text(json.dumps([{"train": train, "val": split["val"]}]))
plans = json.loads((source / f"{name}.json").read_text())
plans["plans_name"] = f"{name}_features"
plans["configurations"]["2d"]["diffusion"] = {
    "process": {"prediction_type": "logits", "signal_scale": 0.1},
    "network": {"condition": "presegmentor"},
    "training": {"precision": "bfloat16"},
}
(target / f"{name}_features.json").write_text(json.dumps(plans))
PYTHON
    if [ "$half" = 0 ]; then
        nnUNetv2_train "$number" 2d 0 -tr nnUNetTrainer_10epochs -p "$plans" -device cpu
        export nnUNet_diffusion_presegmentor="$nnUNet_results/$dataset/nnUNetTrainer_10epochs__${plans}__2d"
    fi
    nnUNetv2_train "$number" 2d 0 -tr DiffusionTrainer_5epochs -p "${plans}_features" -device cpu
    nnunet_diffusion diagnose -d "$number" -c 2d -tr DiffusionTrainer_5epochs -p "${plans}_features" -f 0 -device cpu --cases 20
done
