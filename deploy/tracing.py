"""Sends traces of the endpoint's requests to an OpenTelemetry collector. Off unless the variables are set.

    pip install --constraint constraints.txt --editable '.[tracing]'
    RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH=deploy.tracing:otlp RAY_SERVE_TRACING_SAMPLING_RATIO=0.1 \\
        OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318 meanflow serve runs/demo/generator

Ray Serve makes the spans: proxy, HTTP API, generator. A request with a `traceparent` header (W3C Trace Context) joins the
caller's trace, and follows the caller's decision whether to record it.
"""

from typing import Any


def otlp() -> list[Any]:
    """Span processors that send to OTEL_EXPORTER_OTLP_ENDPOINT, over HTTP. Ray Serve calls this in each of its processes.

    Raises ImportError without the package opentelemetry-exporter-otlp-proto-http, which the extra `tracing` installs.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]
