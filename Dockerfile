# The trainer and all it needs. Any BuildKit builds it:
#   docker build -t syncbn .
#   docker run syncbn norm=local seed=1            # --gpus all, where there are some
# BASE_IMAGE: Debian or Ubuntu with Python 3.11 or newer (the versions of constraints.txt were made on 3.11).
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS base
# Triton and torch.compile call a C++ compiler as they run; tini passes signals on and reaps what loses its parent
# hadolint ignore=DL3008
RUN apt-get update -qq && \
    apt-get install -y -qq --no-install-recommends g++ tini && \
    rm -rf /var/lib/apt/lists/*

# What is to be installed, by itself: only if that changes is anything installed again
FROM base AS requirements
WORKDIR /src
COPY pyproject.toml .
RUN python3 -c 'import tomllib; \
p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*p["dependencies"], *p["optional-dependencies"]["train"], sep="\n")' > requirements.txt

FROM base AS packages
WORKDIR /src
COPY --from=requirements /src/requirements.txt .
COPY constraints.txt .
# An index of your own: docker build --secret id=pip,src=$HOME/.config/pip/pip.conf
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /venv && \
    /venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
    'setuptools>=77' --requirement requirements.txt

FROM base
ARG VERSION=unknown REVISION=unknown
LABEL org.opencontainers.image.title="syncbn" \
      org.opencontainers.image.description="Distributed training with synchronised batch norm" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=packages /venv /venv
# A home that anyone may write to: docker run --user $(id -u) has no entry in /etc/passwd
RUN useradd --non-unique --uid 1000 --create-home syncbn && chmod 1777 /home/syncbn && \
    install -d -o syncbn -g syncbn /app /app/runs /app/data
ENV PATH=/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 \
    HOME=/home/syncbn USER=syncbn \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
WORKDIR /app
COPY . .
# The libraries of C, beside their sources
RUN python3 setup.py --quiet build_ext --inplace && rm -rf build
USER 1000:1000
HEALTHCHECK --interval=60s --timeout=10s --start-period=10m CMD ["launch/healthy.sh"]
ENTRYPOINT ["tini", "--", "python", "train.py"]
