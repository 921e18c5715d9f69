# Trainer and tests for Ascend NPUs, on an image that has CANN. Choose the tag for your NPU and driver:
# https://quay.io/repository/ascend/cann
#   docker build -f ci/docker/ascend.Dockerfile --build-arg CANN=8.5.0-910b-ubuntu22.04-py3.11 -t torchspec-ascend .
#   docker run --device /dev/davinci0 --device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc \
#       -v /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro --ipc host torchspec-ascend
ARG CANN=8.5.0-910b-ubuntu22.04-py3.11
FROM quay.io/ascend/cann:${CANN}

RUN pip install --no-cache-dir "tox>=4.30"
ENV PROMISED=npu
# As root: the device nodes that `docker run --device` passes on belong to it on the host.
WORKDIR /torchspec
COPY . .
# CANN's variables belong to the shell that starts the cell.
SHELL ["/bin/bash", "-c"]
CMD ["/bin/bash", "-c", "source /usr/local/Ascend/ascend-toolkit/set_env.sh && ci/matrix npu-hf"]
