"""Text of the files beside the model; `write_context` replaces the words between @ signs."""

DOCKERIGNORE = """\
*
!requirements.txt
!app
"""

DOCKERFILE = """\
FROM python:@PYTHON@-slim-bookworm
ARG TORCH_INDEX=@TORCH_INDEX@
COPY requirements.txt /opt/app/requirements.txt
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" @TORCH@ \\
 && pip install --no-cache-dir --no-deps -r /opt/app/requirements.txt
COPY app /opt/app
ENV PYTHONPATH=/opt/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONWARNINGS=ignore \\
    HOME=/tmp MPLCONFIGDIR=/tmp nnUNet_extTrainer=@TRAINERS@
RUN useradd --uid 1000 --no-create-home user && mkdir -p /input /output /opt/ml/model && chown user /output
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["python", "-m", "nnunet_diffusion.container.entry"]
"""

ENGINE = """\
#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")"
# docker or podman, the first that works; ENGINE=podman chooses
for engine in ${ENGINE:-docker podman}; do
  if "$engine" info >/dev/null 2>&1; then break; fi
done
image=@NAME@
"""

BUILD = (
    ENGINE
    + """\
"$engine" build --tag "$image" "$@" .
"""
)

TEST = (
    ENGINE
    + """\
# the limits of Grand Challenge, and a root file system that cannot be written
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/model"
tar -xzf model.tar.gz -C "$scratch/model"
chmod -R a+rX "$scratch"
rm -rf test/output
mkdir -m 777 test/output
gpus=()
if @CUDA@ && nvidia-smi >/dev/null 2>&1; then gpus=(--gpus all); fi
"$engine" run --rm --network none --read-only --tmpfs /tmp --shm-size @SHARED@g --memory @MEMORY@g --memory-swap @MEMORY@g \\
  --pids-limit 128 --cap-drop ALL --security-opt no-new-privileges ${gpus[@]+"${gpus[@]}"} \\
  --volume "$PWD/test/input:/input:ro" --volume "$PWD/test/output:/output" --volume "$scratch/model:/opt/ml/model:ro" "$image"
find test/output -type f
"""
)

SAVE = (
    ENGINE
    + """\
"$engine" save "$image" | gzip -c > "$image.tar.gz"
echo "upload $PWD/$image.tar.gz as the container image and $PWD/model.tar.gz as its model"
"""
)

SCORE = """\
#!/usr/bin/env bash
# usage: ./score.sh OUTPUTS SCORES RATER1 RATER2 ...: outputs of this container, a new folder, and the label maps of each rater
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python -m nnunet_diffusion.container.score "$here/app/container.json" "$@"
"""

README = """\
# @NAME@

Segments @IMAGES@ into @CLASSES@, with the model @MODEL@ (fold @FOLDS@).

| file | content |
|---|---|
| `build.sh` | builds the image with docker or podman |
| `test.sh` | runs it on `test/input` within the limits below |
| `save.sh` | writes `@NAME@.tar.gz` |
| `Dockerfile`, `requirements.txt` | the image: Python @PYTHON@ and the packages with their versions |
| `app/` | the program, and `container.json`, its settings |
| `model.tar.gz` | the weights, unpacked in `/opt/ml/model` when it runs |

## Input and output

@INTERFACE@

Results have the size, spacing, origin and direction of the image. @RESULTS@

## Needs

@MEMORY@ GiB of memory, of which 1 is left to the system; built for @DEVICE@. No network, no root, nothing in `/dev/shm`,
one process with less than 128 threads; it writes to `/output` and `/tmp` only.@SECONDS@

Exit code 0: done. 1: some cases of a folder failed. 2: the input is wrong. 3: the model or the settings are wrong. 4: too
little memory. 5: the output cannot be written, or another error. Each error is one line on standard error. 137: the system
ended the container for lack of memory.
"""
