import re
import sys
from pathlib import Path

import jaxlib
from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
PACKAGE = "transformers_moshi_flax"

# read, not imported: an import would need the dependencies
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "src" / PACKAGE / "__init__.py").read_text("utf-8"), re.M)[1]

# The ranges; `make requirements` chooses from them the exact versions in requirements/ that the tests run with.
CORE = [
    "flax>=0.12.7,<0.13",
    "huggingface_hub>=1.31,<3",
    "jax>=0.10,<0.12",
    "jaxtyping>=0.3.3",
    "numpy>=2.0",
    "optax>=0.2.5",
    "rich>=13.8",
    "safetensors>=0.8",
    "soundfile>=0.12",
    "soxr>=0.5",
    "transformers>=5.23,<6",
    "typer>=0.26",
]
# The upper bound keeps an installed CPU wheel in place; an open one downloads the newest CUDA build.
TORCH = ["torch>=2.6,<2.14"]
TRAIN = ["grain>=0.2.10", "orbax-checkpoint>=0.12,<0.13", "pyyaml>=6.0", "tensorboardX>=2.6.2"]
# intelligibility of speech, and a recognizer of words
SPEECH = ["pocketsphinx>=5.1", "pystoi>=0.4"]
# pictures of dialogues
PICTURE = ["matplotlib>=3.9"]
# dialogues over the network: HTTP and websockets, Ogg/Opus, figures to watch
SERVE = ["aiohttp>=3.14", "prometheus_client>=0.26", "sphn>=0.2,<0.3"]
# weights for candle
GGUF = ["gguf>=0.19"]
# graphs that run without JAX
ONNX = ["onnx>=1.23", "onnxruntime>=1.32"]
QUALITY = ["import-linter>=2.3", "mypy>=1.15", "ruff>=0.9", "uv>=0.9"]
DOCS = ["mkdocs>=1.6,<2", "mkdocstrings[python]>=1.0"]
# torch is the oracle, with bounds of its own. einops and sentencepiece are what Kyutai's package needs, which the
# Makefile adds without its pins; protobuf is what transformers reads Kyutai's tokenizers with.
TEST = [
    "torch>=2.13,<2.14",
    *TRAIN,
    *SPEECH,
    *PICTURE,
    *SERVE,
    *GGUF,
    *ONNX,
    "beartype>=0.19",
    "einops>=0.8",
    "hypothesis>=6.100",
    "pytest>=8.0",
]
TEST += ["pytest-xdist>=3.6", "espeakng-loader>=0.2.4", "protobuf>=6.31.1", "sentencepiece>=0.2", "wandb>=0.20"]
# the client of OpenAI's realtime events
TEST += ["openai[realtime]>=2.8"]
# before, the axes of three-dimensional weights were taken for each other
TEST += ["peft>=0.21"]

# Called by XLA through its C interface. What cannot be compiled is left out: the package computes the same without it.
NATIVE = Extension(
    f"{PACKAGE}.ops._cpu_native",
    sources=[f"src/{PACKAGE}/ops/cpu_native.cc"],
    include_dirs=[str(Path(jaxlib.__file__).parent / "include")],
    extra_compile_args=[] if sys.platform == "win32" else ["-O3", "-std=c++17"],
    language="c++",
    optional=True,
)

setup(
    name="transformers-moshi-flax",
    version=VERSION,
    description="Moshi in Flax: full-duplex speech-text generation for JAX, with the API of transformers",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    package_dir={"": "src"},
    packages=find_packages("src"),
    ext_modules=[NATIVE],
    package_data={PACKAGE: ["py.typed", "assets/*", "assets/*/*", "serving/page/*", "web/*/*"]},
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require={
        "torch": TORCH,
        "train": TRAIN,
        "speech": SPEECH,
        "picture": PICTURE,
        "serve": SERVE,
        "gguf": GGUF,
        "onnx": ONNX,
        "test": TEST,
        "quality": QUALITY,
        "docs": DOCS,
        "all": [*TEST, *QUALITY, *DOCS],
    },
    entry_points={
        "console_scripts": [
            "moshi-flax = transformers_moshi_flax.cli:main",
            "moshi-onnx = transformers_moshi_flax.runtime.command:main",
        ]
    },
)
