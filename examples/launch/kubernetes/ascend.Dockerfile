# The same for Ascend NPUs, on an image that has CANN; choose its tag for your NPU and driver:
# https://quay.io/repository/ascend/cann
#   docker build -f examples/launch/kubernetes/ascend.Dockerfile -t torchspec:ascend .
ARG CANN=8.5.0-910b-ubuntu22.04-py3.11
FROM quay.io/ascend/cann:${CANN} AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM quay.io/ascend/cann:${CANN}
USER 0
RUN apt-get update \
    && apt-get install -y --no-install-recommends libcurl4 libibverbs1 libnuma1 wget \
    && rm -rf /var/lib/apt/lists/*
ARG RAY=2.60.0
COPY ci/requirements/npu.txt /tmp/npu.txt
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir -r /tmp/npu.txt \
    && pip install --no-cache-dir "ray==$RAY" "$(ls /wheels/torchspec-*.whl)[ray,mooncake]" \
    && useradd --create-home --uid 1000 torchspec \
    && install -d -o torchspec /data
# CANN's variables, for every process: pods start `torchspec` and `ray` without a shell.
ENV ASCEND_HOME_PATH=/usr/local/Ascend/ascend-toolkit/latest
ENV ASCEND_TOOLKIT_HOME=$ASCEND_HOME_PATH ASCEND_OPP_PATH=$ASCEND_HOME_PATH/opp \
    LD_LIBRARY_PATH=$ASCEND_HOME_PATH/lib64:/usr/local/Ascend/driver/lib64:/usr/local/Ascend/driver/lib64/driver:/usr/local/Ascend/driver/lib64/common \
    PYTHONPATH=$ASCEND_HOME_PATH/python/site-packages:$ASCEND_HOME_PATH/opp/built-in/op_impl/ai_core/tbe
USER 1000
WORKDIR /data
CMD ["torchspec", "doctor"]
