# syntax=docker/dockerfile:1
# Check and cut without PyTorch: what a device or a gate in front of it needs.
#   docker build -f docker/edge.Dockerfile -t patchslim-edge .
#   docker run --rm -v "$PWD/bundles/vit_ti-ort:/bundle:ro" patchslim-edge validate /bundle
# Name the base by its digest where a build has to be repeatable: --build-arg BASE=python:3.12-slim-bookworm@sha256:...
ARG BASE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE} AS build
ENV UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never
WORKDIR /app
RUN pip install --no-cache-dir uv==0.13.9
COPY pyproject.toml uv.lock README.md CHANGELOG.md LICENSE ./
COPY weights/pyproject.toml weights/
COPY patchslim patchslim
COPY validate validate
COPY graph_passes graph_passes
COPY slimming slimming
COPY export export
# Exactly what uv.lock names, each file by its digest; only the build backends of our own packages are not in it.
RUN uv sync --locked --no-default-groups --no-editable --extra edge

# Clients that ask a server and compare its answers: --target load.
FROM ${BASE} AS load
RUN pip install --no-cache-dir numpy==2.3.5 "tritonclient[grpc,http]==2.73.0" \
    && useradd --create-home --uid 10001 patchslim
COPY docker/load.py /app/load.py
USER 10001
ENTRYPOINT ["python", "/app/load.py"]

FROM ${BASE}
RUN useradd --create-home --uid 10001 patchslim
COPY --from=build /app/.venv /app/.venv
ENV PATH=/app/.venv/bin:${PATH} PYTHONUNBUFFERED=1
USER 10001
WORKDIR /srv
ENTRYPOINT ["patchslim"]
CMD ["validate", "/bundle"]
