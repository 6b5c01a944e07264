# CPU image of the project: docker build -t llmgr-rec:latest .
# Contains what TorchX needs in an image: bash and torchrun.
FROM python:3.11-slim

# URL of PyTorch's CPU wheel index. The default index serves a CUDA build of torch.
ARG TORCH_INDEX
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 LLMGR_CACHE=/opt/llmgr_cache

WORKDIR /opt/llmgr
COPY requirements/cpu.txt requirements/cpu.txt
RUN pip install --no-deps -r requirements/cpu.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}

COPY pyproject.toml README.md LICENSE ./
COPY llmgr_rec llmgr_rec
COPY datagen datagen
COPY torchx_components torchx_components
RUN pip install --no-deps --no-build-isolation .

RUN useradd --create-home --uid 1000 llmgr && mkdir -p "$LLMGR_CACHE" /data && chown llmgr "$LLMGR_CACHE" /data
USER llmgr
# Converts the language model once instead of in each pod, and fails the build if the image cannot train.
RUN cd /tmp && python -m llmgr_rec.doctor \
    && python -c "from llmgr_rec.data.pretrained import pretrained_folder; pretrained_folder('smollm2')"

WORKDIR /data
CMD ["python", "-m", "llmgr_rec.doctor"]
