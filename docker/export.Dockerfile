# syntax=docker/dockerfile:1
# From weights to a bundle, with PyTorch. On a CPU as it is; on a GPU with --gpus all, and --build-arg EXTRAS="export rtx" for TensorRT-RTX.
#   docker build -f docker/export.Dockerfile -t patchslim-export .
#   docker run --rm -v "$PWD/bundles:/bundles" -v patchslim-work:/work patchslim-export export --model vit_ti --output /bundles/vit_ti-ort
# Name the base by its digest where a build has to be repeatable: --build-arg BASE=python:3.12-slim-bookworm@sha256:...
ARG BASE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE} AS build
ARG EXTRAS=export
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never
WORKDIR /app
RUN pip install --no-cache-dir uv==0.13.9
COPY pyproject.toml uv.lock README.md CHANGELOG.md LICENSE ./
COPY weights weights
COPY patchslim patchslim
COPY validate validate
COPY graph_passes graph_passes
COPY slimming slimming
COPY export export
# Exactly what uv.lock names, each file by its digest; only the build backends of our own packages are not in it.
RUN for extra in ${EXTRAS}; do set -- "$@" --extra "${extra}"; done \
    && uv sync --locked --no-default-groups --no-editable "$@"

FROM ${BASE}
RUN useradd --create-home --uid 10001 patchslim \
    && mkdir /bundles /work \
    && chown patchslim /bundles /work
COPY --from=build /app/.venv /app/.venv
ENV PATH=/app/.venv/bin:${PATH} PATCHSLIM_WORK=/work PYTHONUNBUFFERED=1
USER 10001
WORKDIR /bundles
VOLUME /work
ENTRYPOINT ["patchslim"]
CMD ["--help"]
