# docker build --target cpu -t nemo-align:cpu .
# docker build --target gpu --build-arg NEMO_IMAGE=<NVIDIA's NeMo image> -t nemo-align:gpu .
# Another package index, for torch without CUDA or behind a firewall: --build-arg PIP_EXTRA_INDEX_URL=...
ARG NEMO_IMAGE=scratch

FROM python:3.11-slim AS cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/nemo-align
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY aligner aligner
COPY recipes recipes
COPY executors executors
RUN pip install --no-cache-dir . --constraint requirements.lock
WORKDIR /workspace

# What NVIDIA's image brings, torch, Megatron-Core, Transformer Engine and NeMo, fits its GPUs and stays.
FROM ${NEMO_IMAGE} AS gpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /opt/nemo-align
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY aligner aligner
COPY recipes recipes
COPY executors executors
RUN pip install --no-cache-dir --no-deps . \
    && python -c "import importlib.util as u, sys; \
needed = {'filelock': 'filelock', 'docstring_parser': 'docstring_parser', 'tomli': 'tomli', 'docker': 'docker', \
'peft': 'peft', 'choix': 'choix', 'openai': 'openai', 'psutil': 'psutil', 'matplotlib': 'matplotlib', 'mediapy': 'mediapy'}; \
print('\n'.join(name for module, name in needed.items() if u.find_spec(module) is None))" > /tmp/missing.txt \
    && pip install --no-cache-dir --requirement /tmp/missing.txt --constraint requirements.lock
WORKDIR /workspace
