# docker build -t moshi-flax .
# docker run --rm -v "$PWD:/work" moshi-flax generate --user-audio question.wav --output answer.wav
FROM python:3.11-slim AS build
WORKDIR /source
# for ops/cpu_native.cc
RUN apt-get update && apt-get install --yes --no-install-recommends g++
RUN python -m venv /opt/moshi-flax
ENV PATH=/opt/moshi-flax/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# what it depends on is a layer of its own, which a change of the sources does not touch
COPY requirements/tested.txt requirements/tested.txt
COPY setup.py pyproject.toml README.md LICENSE ./
COPY src/transformers_moshi_flax/__init__.py src/transformers_moshi_flax/__init__.py
COPY src/transformers_moshi_flax/ops/cpu_native.cc src/transformers_moshi_flax/ops/cpu_native.cc
RUN pip install --constraint requirements/tested.txt .
COPY src src
RUN pip install --no-deps --force-reinstall .

FROM python:3.11-slim
RUN useradd --create-home --uid 1000 moshi
COPY --from=build /opt/moshi-flax /opt/moshi-flax
ENV PATH=/opt/moshi-flax/bin:$PATH
USER moshi
WORKDIR /work
ENTRYPOINT ["moshi-flax"]
CMD ["--help"]
