#!/usr/bin/env bash
# Encode ImageNet to latents: submits a Ray job and follows its log. Ctrl-C only stops following; the job continues.
#
#   export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 STORAGE=s3://BUCKET/imagenet
#   deploy/jobs/encode.sh                                       # arguments are passed to pipelines.encode
#   SUBMISSION_ID=encode-imagenet256-2 deploy/jobs/encode.sh    # after a failure: encodes what is missing
#
# Each submission id can be used only once. `ray job list`, `ray job logs -f ID` and `ray job stop ID` list, follow and
# stop jobs.
# The driver runs on the head, which is never preempted. It only assigns shards and needs at most 2 GB.
# --device gpu: a cluster that scales from zero has no GPU when the driver starts, so `auto` would choose CPUs.
set -euo pipefail
: "${STORAGE:?must be set to s3://BUCKET/imagenet or to a folder that every machine mounts}"

exec ray job submit \
    --submission-id "${SUBMISSION_ID:-encode-imagenet256}" \
    --runtime-env "${RUNTIME_ENV:-$(dirname "$0")/runtime_env.yaml}" \
    -- python -m pipelines.encode \
    --images "$STORAGE/ILSVRC/Data/CLS-LOC/train" --output "$STORAGE/latents" \
    --vae stabilityai/sd-vae-ft-mse --image-size 256 --device gpu --num-workers 8 "$@"
