# An endpoint on a machine without GPUs: docs/how-to/keep-serving.md. It was never built where this was written.
FROM python:3.11-slim

RUN useradd --create-home --uid 1000 meanflow
WORKDIR /srv/meanflow-ray
COPY pyproject.toml constraints.txt LICENSE NOTICE README.md ./
COPY meanflow_core meanflow_core
COPY pipelines pipelines
COPY deploy deploy
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir --constraint constraints.txt .

USER 1000
EXPOSE 8000
ENTRYPOINT ["meanflow", "serve"]
