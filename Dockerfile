# Images of the project; both have what TorchX needs in an image, bash and torchrun:
#   docker build -t llmgr-rec:latest .                  CPU, the default
#   docker build -t llmgr-rec:gpu --target gpu .        CUDA
FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 LLMGR_CACHE=/opt/llmgr_cache
RUN useradd --create-home --uid 1000 llmgr && mkdir -p "$LLMGR_CACHE" /data && chown llmgr "$LLMGR_CACHE" /data
WORKDIR /data
CMD ["python", "-m", "llmgr_rec.doctor"]

FROM base AS wheel
WORKDIR /opt/llmgr
COPY pyproject.toml README.md LICENSE ./
COPY llmgr_rec llmgr_rec
COPY datagen datagen
COPY torchx_components torchx_components
RUN pip wheel --no-deps --wheel-dir /opt/wheels .

FROM base AS gpu
COPY requirements/gpu.txt /opt/requirements.txt
RUN pip install --no-deps -r /opt/requirements.txt
COPY --from=wheel /opt/wheels /opt/wheels
RUN pip install --no-deps /opt/wheels/*.whl
# What the container runtime of NVIDIA adds to a container; the drivers of the machine are not in the image.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER llmgr
# Converts the language model once instead of in each pod. Checks wait for a GPU: docker run --gpus all.
RUN python -c "from llmgr_rec.storage.pretrained import pretrained_folder; pretrained_folder('smollm2')"

FROM base AS cpu
# URL of PyTorch's CPU wheel index. The default index serves a CUDA build of torch.
ARG TORCH_INDEX
COPY requirements/cpu.txt /opt/requirements.txt
RUN pip install --no-deps -r /opt/requirements.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
COPY --from=wheel /opt/wheels /opt/wheels
RUN pip install --no-deps /opt/wheels/*.whl
USER llmgr
# The build fails if the image cannot train.
RUN python -m llmgr_rec.doctor \
    && python -c "from llmgr_rec.storage.pretrained import pretrained_folder; pretrained_folder('smollm2')"
