#!/usr/bin/env bash
# Train MeanFlow-XL/2 on the latents: submits a Ray job and follows its log. Ctrl-C only stops following; the job continues.
#
#   export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 STORAGE=s3://BUCKET/imagenet
#   deploy/jobs/train.sh                              # arguments are passed to pipelines.train
#   SUBMISSION_ID=train-xl2-2 deploy/jobs/train.sh    # after a stop or a failure: resumes from the latest checkpoint
#
# Each submission id can be used only once. `ray job list`, `ray job logs -f ID` and `ray job stop ID` list, follow and
# stop jobs; stopping writes a checkpoint first.
# The driver runs on the head, which is never preempted, because Ray Train's controller stops with the driver. It needs
# 8 GB at the end to write the generator.
set -euo pipefail
: "${STORAGE:?must be set to s3://BUCKET/imagenet or to a folder that every machine mounts}"

exec ray job submit \
    --submission-id "${SUBMISSION_ID:-train-xl2}" \
    --runtime-env "${RUNTIME_ENV:-$(dirname "$0")/runtime_env.yaml}" \
    -- python -m pipelines.train xl2 \
    --data "$STORAGE/latents" --storage "$STORAGE/runs" --run-name xl2 --vae stabilityai/sd-vae-ft-mse \
    --device gpu --num-workers 32 --min-workers 8 --samples-per-pass 8 --precision tf32 --compile \
    --cache-dir /local/latents --checkpoint-interval-steps 2500 "$@"
