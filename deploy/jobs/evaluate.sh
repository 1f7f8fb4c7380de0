#!/usr/bin/env bash
# Evaluate the trained model, and promote it to champion if it is better: submits a Ray job and follows its log. Ctrl-C only stops following; the job continues.
# The report is written to /mnt/shared and to the MLflow run that trained the model.
#
#   export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 STORAGE=s3://BUCKET/imagenet
#   deploy/jobs/evaluate.sh                                 # arguments are passed to pipelines.evaluate
#   SUBMISSION_ID=evaluate-xl2-2 deploy/jobs/evaluate.sh    # to evaluate again
#
# Each submission id can be used only once. `ray job list`, `ray job logs -f ID` and `ray job stop ID` list, follow and
# stop jobs.
# The driver runs on a CPU machine because its own computation is heavy: square roots of 2048x2048 matrices and distances
# between two sets of 10,000 features. Memory is in bytes (16 GiB). Remove the label selector if no machine has this label.
set -euo pipefail
: "${STORAGE:?must be set to s3://BUCKET/imagenet or to a folder that every machine mounts}"

exec ray job submit \
    --submission-id "${SUBMISSION_ID:-evaluate-xl2}" \
    --runtime-env "${RUNTIME_ENV:-$(dirname "$0")/runtime_env.yaml}" \
    --entrypoint-num-cpus 4 --entrypoint-memory 17179869184 \
    --entrypoint-label-selector '{"meanflow/pool": "cpu"}' \
    -- python -m pipelines.evaluate \
    --model models:/meanflow-xl2@candidate --promote --reference "$STORAGE/imagenet256.npz" \
    --extractor inception --steps 1 2 --labels random --device gpu --num-workers 8 \
    --output /mnt/shared/reports/xl2 "$@"
