# syntax=docker/dockerfile:1
# One file, a target per image:
#
#   exporter   `flip-obs serve` beside a FLIP server
#   server     an FL server: NVFLARE with this package, for a provisioned kit mounted at /workspace
#   demo       the demo's hub, and its FL server that needs no kit
#   collector  the OpenTelemetry Collector of collector/manifest.yaml
#   s3         a small S3 service on a folder, for the demo
#
#   docker build --target exporter --tag flip-observability/exporter .
#   docker build --build-arg PYTHON_IMAGE=python:3.12-slim@sha256:... --target exporter .
#
# None runs as root: user and group are 10001, and all that is written lies in /data, /ledger or /workspace.

# What the images stand on. `make digests` looks up the digests of these, where their registry can be reached.
ARG PYTHON_IMAGE=python:3.12.11-slim-bookworm
ARG GO_IMAGE=golang:1.26.8
ARG BUSYBOX_IMAGE=busybox:1.37.0

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/flip/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# -- Python packages, in a virtual environment that the images copy: those of the locks, nothing else --------------------

FROM base AS wheel
WORKDIR /src
COPY requirements/build.txt requirements/build.txt
RUN pip install --require-hashes --requirement requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheel .

FROM base AS build
RUN python -m venv /opt/flip
COPY requirements/run.txt /requirements/run.txt
RUN pip install --require-hashes --requirement /requirements/run.txt
COPY --from=wheel /wheel /wheel
RUN pip install --no-deps /wheel/*.whl \
    && python -m compileall -q /opt/flip/lib

FROM build AS build-demo
COPY requirements/demo.txt /requirements/demo.txt
RUN pip install --require-hashes --requirement /requirements/demo.txt \
    && python -m compileall -q /opt/flip/lib

FROM base AS runtime
# A named volume takes over the owner of the folder that it is mounted on.
RUN groupadd --gid 10001 flip \
    && useradd --uid 10001 --gid flip --home-dir /data --no-create-home --shell /usr/sbin/nologin flip \
    && install --directory --owner flip --group flip --mode 0700 /data /ledger /workspace
ENV HOME=/data \
    FLIP_OBSERVABILITY_DIR=/ledger
WORKDIR /data
USER 10001:10001

# -- images of the package ---------------------------------------------------------------------------------------------

FROM runtime AS exporter
COPY --from=build /opt/flip /opt/flip
EXPOSE 9464
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9464/healthz', timeout=4)"]
CMD ["flip-obs", "serve", "--host", "0.0.0.0"]

FROM runtime AS server
COPY --from=build /opt/flip /opt/flip
# Clients and administrators; the observer's /metrics.
EXPOSE 8002 8003 9464
# The observer lives in the server's own process (`flip-obs install` puts it there): when it answers, the server lives.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9464/healthz', timeout=4)"]
CMD ["bash", "/workspace/startup/sub_start.sh"]

FROM runtime AS demo
COPY --from=build-demo /opt/flip /opt/flip
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, time; assert time.time() - os.stat('/data/demo/alive').st_mtime < 60"]
CMD ["python", "-m", "flip_observability.demo.server", "--folder", "/data/demo", "--every", "300"]

# -- images of programs in Go, built from their modules ----------------------------------------------------------------

FROM ${GO_IMAGE} AS build-go
ENV CGO_ENABLED=0

FROM build-go AS build-collector
WORKDIR /build
COPY collector/manifest.yaml ./
# The builder has the version of what it builds.
RUN version=$(awk '$1 == "version:" { print $2; exit }' manifest.yaml) \
    && go install "go.opentelemetry.io/collector/cmd/builder@v$version" \
    && builder --config=manifest.yaml

FROM build-go AS build-s3
RUN go install github.com/versity/versitygw/cmd/versitygw@v1.8.0

# busybox has what a health check needs, and little else.
FROM ${BUSYBOX_IMAGE} AS small
RUN install -d -o 10001 -g 10001 -m 0700 /data
COPY --from=build-go /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
USER 10001:10001

FROM small AS collector
COPY --from=build-collector /build/dist/flip-otelcol /usr/local/bin/flip-otelcol
COPY otel-collector.yaml /etc/otelcol/otel-collector.yaml
COPY collector/tls.yaml /etc/otelcol/tls.yaml
ENV FLIP_COLLECTOR_HOST=0.0.0.0
EXPOSE 4317 4318
HEALTHCHECK --interval=15s --timeout=5s --start-period=10s --retries=3 \
    CMD ["wget", "-q", "-O", "/dev/null", "http://127.0.0.1:13133/"]
ENTRYPOINT ["/usr/local/bin/flip-otelcol"]
CMD ["--config=/etc/otelcol/otel-collector.yaml"]

FROM small AS s3
COPY --from=build-s3 /go/bin/versitygw /usr/local/bin/versitygw
EXPOSE 7070
HEALTHCHECK --interval=15s --timeout=5s --start-period=10s --retries=3 \
    CMD ["wget", "-q", "-O", "/dev/null", "http://127.0.0.1:7070/health"]
ENTRYPOINT ["/usr/local/bin/versitygw"]
CMD ["--health", "/health", "--quiet", "posix", "/data"]
