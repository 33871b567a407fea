# A container with `zimage serve`. By default it draws on the CPU with ONNX Runtime:
#
#   docker build -t zimage .
#
# For NVIDIA GPUs, first build a wheel with the CUDA backend (`make wheel`), then install it instead of the sources:
#
#   docker build -t zimage:cuda --build-arg PACKAGE='dist/*-cp312-*.whl' --build-arg EXTRAS=cuda,cli,server .
#
# docs/serving.md has the rest.

FROM python:3.12-slim AS build
# Only the compiler of `_core`; CMake and Ninja come from PyPI.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
# A path in the build context: `.` compiles the sources.
ARG PACKAGE=.
ARG EXTRAS=onnxruntime,cli,server
# No quotes around PACKAGE: its pattern becomes the wheel's name.
# hadolint ignore=SC2086
RUN python3 -m venv /opt/zimage \
    && set -- ${PACKAGE} \
    && /opt/zimage/bin/pip install --no-cache-dir "$1[${EXTRAS}]" \
    && /opt/zimage/bin/zimage --version

FROM python:3.12-slim
COPY --from=build /opt/zimage /opt/zimage
# The user has the same number in every image, so that the volumes fit.
RUN groupadd --gid 10001 zimage \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin zimage \
    && mkdir /bundles /data \
    && chown zimage:zimage /data
# NVIDIA's container runtime gives the GPU to images that ask for it.
ENV PATH=/opt/zimage/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /data
VOLUME ["/bundles", "/data"]
EXPOSE 8188
# The service drains on SIGTERM: give `docker stop` more than its `drain_seconds`.
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=180s --start-interval=2s --interval=10s --timeout=5s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8188/readyz', timeout=4)"]
ENTRYPOINT ["zimage"]
# It listens for other machines (host = "0.0.0.0" in that file), so it needs a key before it starts.
CMD ["serve", "--config", "/etc/zimage/service.toml"]
