# syntax=docker/dockerfile:1
# Two images from one file:
#   docker build --target proxy -t lightning-proxy .        forwards and records; no torch
#   docker build --target train -t lightning-proxy-train .  also trains; CUDA comes with torch's own wheels
# `--build-arg EXTRA=gpu` puts vLLM into the second one too, for `serve --model`.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY scripts/requirements.py scripts/
COPY lightning_proxy lightning_proxy
ARG EXTRA=train
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
 && python scripts/requirements.py providers compression > /wheels/core.txt \
 && python scripts/requirements.py "${EXTRA}" > /wheels/extra.txt

FROM python:${PYTHON}-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --uid 10001 --create-home lightning \
 && install -d -o lightning -g lightning /data
WORKDIR /data
EXPOSE 8080
ENTRYPOINT ["lightning-proxy"]

FROM base AS proxy
COPY --from=build /wheels/core.txt /tmp/core.txt
RUN pip install --no-cache-dir -r /tmp/core.txt
COPY --from=build /wheels/*.whl /tmp/
RUN pip install --no-cache-dir --no-deps /tmp/*.whl
USER 10001
VOLUME /data
# Alive, not ready: a proxy whose engine is still loading must not be restarted for that.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
CMD ["serve", "--host", "0.0.0.0"]

FROM base AS train
# Triton compiles its launchers with the C compiler when a kernel first runs.
# hadolint ignore=DL3008 # a pinned gcc disappears from Debian's index with its next point release
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /wheels/extra.txt /tmp/extra.txt
RUN pip install --no-cache-dir -r /tmp/extra.txt
COPY --from=build /wheels/*.whl /tmp/
RUN pip install --no-cache-dir --no-deps /tmp/*.whl
USER 10001
VOLUME /data
CMD ["train"]
