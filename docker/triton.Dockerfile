# syntax=docker/dockerfile:1
# A Triton server with one bundle in it. The build's context is the bundle:
#   docker build -f docker/triton.Dockerfile -t served bundles/vit_ti-ort
#   docker run --rm -p 127.0.0.1:8000-8002:8000-8002 served
# BACKEND: onnxruntime, openvino, or tensorrt where the bundle has engines for this release of TensorRT; then run with --gpus all.
# Name both bases by their digests where a build has to be repeatable: --build-arg TRITON=nvcr.io/nvidia/tritonserver@sha256:...
ARG BASE=docker.io/library/python:3.12-slim-bookworm
ARG TRITON=nvcr.io/nvidia/tritonserver:25.08-py3

FROM ${BASE} AS repository
ARG BACKEND=onnxruntime
COPY . /bundle
RUN python /bundle/serving/triton/make_repository.py /models --backend "${BACKEND}"

FROM ${TRITON}
COPY --from=repository /models /models
# The image's own user triton-server.
USER 1000
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=5s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
CMD ["tritonserver", "--model-repository=/models"]
