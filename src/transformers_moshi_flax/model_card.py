"""The ``README.md`` of an uploaded checkpoint: what it is, how large, how to load it here and in PyTorch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

ARCHITECTURE_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "ffn_dim",
    "intermediate_size",
    "vocab_size",
    "audio_vocab_size",
    "num_codebooks",
    "codebook_size",
    "num_quantizers",
    "sliding_window",
    "max_position_embeddings",
    "sampling_rate",
    "frame_rate",
)


def model_card(
    model: Any,
    params: Mapping[str, Any],
    folder: Path,
    files: Sequence[str],
    repo_id: str,
    *,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    base_model: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """A model card with YAML front matter.

    Args:
        model: whose checkpoint it is.
        params: its parameters.
        folder: where the files to upload lie.
        files: their names.
        repo_id: where they go.
        license, language, base_model, tags: of the front matter; what is None is left out, but ``base_model`` is then
            where the model was loaded from, if that is on the Hub.

    Returns:
        The text of ``README.md``.
    """
    from huggingface_hub import ModelCardData  # only here: it imports the HTTP client

    from . import __version__

    loaded_from = model.name_or_path
    if base_model is None and loaded_from and loaded_from.count("/") == 1 and not Path(loaded_from).exists():
        base_model = loaded_from
    data = ModelCardData(
        license=license,
        language=[language] if isinstance(language, str) else list(language or []) or None,
        base_model=base_model,
        library_name="transformers-moshi-flax",
        pipeline_tag="audio-to-audio",
        tags=list(dict.fromkeys([model.config.model_type, "flax", "jax", "speech", *tags])),
    )
    name = type(model).__name__
    in_torch = name.removeprefix("Flax")
    to_pt = "model.safetensors" in files or "model.safetensors.index.json" in files
    parts: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for path, leaf in flatten_dict(params, sep="/").items():
        parts[path.split("/")[0]] += leaf.size
        dtypes[str(leaf.dtype)] += leaf.size
    fields = [(field, getattr(model.config, field, None)) for field in ARCHITECTURE_FIELDS]
    weights = [file for file in sorted(files) if file.endswith((".safetensors", ".msgpack"))]
    lines = [
        "---",
        data.to_yaml().strip(),
        "---",
        "",
        f"# {repo_id.split('/')[-1]}",
        "",
        f"`{in_torch}` saved by [transformers-moshi-flax](https://pypi.org/project/transformers-moshi-flax/) "
        f"{__version__}, {'in the layout of PyTorch' if to_pt else 'in the layout of Flax'}.",
        f"The weights were loaded from `{loaded_from}` and may have been changed since."
        if loaded_from
        else "The weights were not loaded from a checkpoint: random, or trained from random ones.",
        "",
        "## Load it",
        "",
        "```python",
        f"from transformers_moshi_flax import {name}",
        "",
        f'model = {name}.from_pretrained("{repo_id}")',
        "```",
        "",
        "In PyTorch:" if to_pt else "In PyTorch, after a conversion:",
        "",
        *([] if to_pt else ["```sh", f"moshi-flax convert {repo_id} converted --to pt", "```", ""]),
        "```python",
        f"from transformers import {in_torch}",
        "",
        f'model = {in_torch}.from_pretrained("{repo_id if to_pt else "converted"}")',
        "```",
        "",
        "## Architecture",
        "",
        "| | |",
        "|---|---|",
        *(f"| {field} | {value} |" for field, value in fields if value is not None),
        "",
        "## Parameters",
        "",
        "| part | numbers |",
        "|---|---|",
        *(f"| {part} | {count:,} |" for part, count in parts.items()),
        f"| in all | {sum(parts.values()):,} |",
        "",
        f"Types: {', '.join(f'{dtype} ({count:,})' for dtype, count in dtypes.most_common())}.",
        "",
        "## Files",
        "",
        "| file | bytes | SHA-256 |",
        "|---|---|---|",
        *(f"| {file} | {(folder / file).stat().st_size:,} | `{_sha256(folder / file)}` |" for file in weights),
        "",
    ]
    return "\n".join(lines)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
