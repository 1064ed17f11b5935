# MaxNano in a container, for a CPU, for NVIDIA GPUs or for a TPU:
#
#   docker build --target cpu -t maxnano:cpu .         or gpu, or tpu
#   docker run --rm maxnano:cpu train --help           any program; compose.yaml runs the server
#
# setup.sh installs pinned packages, whose hashes are checked; nothing else is downloaded. The programs run
# as the user maxnano (1000), who can write to runs/, data/ and the home folder. "Containers" in docs/clients.md
# says more.
FROM python:3.12-slim-bookworm AS base
ENV MAXNANO_QUIET=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 \
    HOME=/home/maxnano PATH=/maxnano/.venv/bin:$PATH
WORKDIR /maxnano
# The folders are those of volumes, and belong to any user that docker run --user names.
RUN useradd --uid 1000 --home-dir $HOME --create-home maxnano \
    && install -d -m 1777 runs data $HOME/.cache $HOME/.local/state
# What setup.sh reads: packages are installed again only when one of these files changes.
COPY setup.sh setup.py pyproject.toml constraints.txt README.md LICENSE ./
COPY MaxNano/__init__.py MaxNano/
ENTRYPOINT ["maxnano"]
CMD ["--help"]
EXPOSE 8000

FROM base AS tpu
RUN DEVICE=tpu EXTRAS=serve,export bash setup.sh
COPY . .
RUN python -m compileall -q MaxNano
USER 1000

# The machine has the driver, 580 or newer, and the NVIDIA Container Toolkit; CUDA 13 is in the image.
FROM base AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN DEVICE=gpu EXTRAS=serve,export bash setup.sh
COPY . .
RUN python -m compileall -q MaxNano
USER 1000

# The last target is the default of docker build.
FROM base AS cpu
RUN DEVICE=cpu EXTRAS=serve,export bash setup.sh
COPY . .
RUN python -m compileall -q MaxNano
USER 1000
