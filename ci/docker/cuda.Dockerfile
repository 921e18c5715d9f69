# Trainer and tests for NVIDIA GPUs:
#   docker build -f ci/docker/cuda.Dockerfile -t torchspec-cuda .
#   docker run --gpus all --ipc host torchspec-cuda ci/matrix cuda-hf cuda-vllm cuda-sglang
# --ipc host: engines hand features over in shared memory. Engines are installed into environments of their own by the
# cells, at run time; keep them with `-v torchspec-engines:/torchspec/.engines`.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential git libcurl4 libibverbs1 libnuma1 python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/tox && /opt/tox/bin/pip install --no-cache-dir "tox>=4.30"
ENV PATH=/opt/tox/bin:$PATH PROMISED=cuda

# A volume that is new takes its owner from the folder it is mounted on.
RUN useradd --create-home --uid 1001 ci && install -d -o ci -g ci /torchspec /torchspec/.engines
USER 1001
WORKDIR /torchspec
COPY --chown=ci:ci . .
CMD ["ci/matrix", "cuda-hf"]
