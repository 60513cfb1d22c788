"""The tables of text that models have: reading and setting them, and another size of the vocabulary.

Upstream's names (``get_input_embeddings``, ``resize_token_embeddings``, …). Moshi's tables of inputs have a row more
than the vocabulary, for the start token, which is always the last.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from .checkpoints.configs import override_config
from .input_checks import check_ids, is_whole
from .modeling_flax_utils import FlaxPreTrainedModel
from .nn.embedding import IGNORE_INDEX

NOISE = 1e-9
"""Share of the covariance that new rows have around the mean of the old ones, as upstream."""

ROWS_AT_ONCE = 256


@flax.struct.dataclass
class FlaxTextEmbeddings:
    """A table of inputs, ``table(ids)``; what upstream has as ``nn.Embedding``.

    Attributes:
        weight: a row for each id, that of the start token of Moshi is the last, ``(rows, hidden_size)``.
        dtype: of the results.
        scale: by which rows are multiplied, or None.
    """

    weight: Shaped[Array, "rows hidden"]
    dtype: DTypeLike = flax.struct.field(pytree_node=False, default=jnp.float32)
    scale: float | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def num_embeddings(self) -> int:
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.weight.shape[1]

    def __call__(self, input_ids: Int[ArrayLike, "*shape"]) -> Float[Array, "*shape hidden"]:
        """The rows of ids; zeros for -100. ValueError for others."""
        check_ids("input_ids", input_ids, self.num_embeddings, allowed=(IGNORE_INDEX,))
        ids = jnp.asarray(input_ids)
        rows = jnp.take(self.weight.astype(self.dtype), jnp.maximum(ids, 0), axis=0)
        if self.scale is not None:
            rows = rows * jnp.asarray(self.scale, rows.dtype)
        return jnp.where((ids == IGNORE_INDEX)[..., None], jnp.zeros((), rows.dtype), rows)


@flax.struct.dataclass
class FlaxTextHead:
    """A head for text, ``head(hidden_states)``; what upstream has as ``nn.Linear`` without a bias.

    Attributes:
        kernel: ``(hidden_size, vocab_size)``.
        dtype: of the results.
    """

    kernel: Shaped[Array, "hidden vocab"]
    dtype: DTypeLike = flax.struct.field(pytree_node=False, default=jnp.float32)

    @property
    def weight(self) -> Shaped[Array, "vocab hidden"]:
        """As in PyTorch: a row for each token."""
        return self.kernel.T

    @property
    def in_features(self) -> int:
        return self.kernel.shape[0]

    @property
    def out_features(self) -> int:
        return self.kernel.shape[1]

    def __call__(self, hidden_states: Float[ArrayLike, "*shape hidden"]) -> Float[Array, "*shape vocab"]:
        return jnp.asarray(hidden_states, self.dtype) @ self.kernel.astype(self.dtype)


class FlaxTextEmbeddingsMixin(FlaxPreTrainedModel):
    """Access to the tables of a model.

    Class attributes that a model sets:
        input_tables: paths of the tables of inputs; the first is the one that is returned.
        output_table: path of the head's kernel, or of the table of inputs if that is the head, too; None without a
            head for text.
        extra_input_ids: rows of the tables of inputs behind the vocabulary.
    """

    input_tables: ClassVar[tuple[str, ...]]
    output_table: Any = None
    extra_input_ids: Any = 0

    @property
    def embedding_scale(self) -> float | None:
        """By which the rows of the tables of inputs are multiplied."""
        return None

    @property
    def _is_tied(self) -> bool:
        return self.output_table in self.input_tables

    def get_input_embeddings(self) -> FlaxTextEmbeddings:
        """The embeddings of text: ``model.get_input_embeddings()(input_ids)`` are ``inputs_embeds``."""
        table = flatten_dict(self.params, sep="/")[self.input_tables[0]]
        return FlaxTextEmbeddings(table, self.dtype, self.embedding_scale)

    def set_input_embeddings(self, value: Any) -> None:
        """Puts another table in its place, an array or embeddings of the same shape; ValueError for another one."""
        self._set_table(self.input_tables[0], getattr(value, "weight", value))

    def get_output_embeddings(self) -> FlaxTextHead | None:
        """The head for text, None without one; ValueError if it is quantized."""
        if self.output_table is None:
            return None
        self._refuse_quantized_head("get_output_embeddings")
        kernel = flatten_dict(self.params, sep="/")[self.output_table]
        return FlaxTextHead(kernel.T if self._is_tied else kernel, self.dtype)

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Puts another head in its place: one, or its weight as in PyTorch, ``(vocab_size, hidden_size)``.

        Raises:
            ValueError: another shape, a model without a head, or one that is quantized.
        """
        if self.output_table is None:
            raise ValueError(f"{type(self).__name__} has no head for text, so none can be set")
        self._refuse_quantized_head("set_output_embeddings")
        is_head = isinstance(new_embeddings, FlaxTextHead)
        weight = new_embeddings.weight if is_head else jnp.asarray(new_embeddings)
        self._set_table(self.output_table, weight if self._is_tied else weight.T)

    def _refuse_quantized_head(self, what: str) -> None:
        if self.output_table is not None and tuple(self.output_table.split("/")) not in self.required_params:
            self._refuse_quantized(what)

    def _set_table(self, path: str, table: ArrayLike) -> None:
        flat = flatten_dict(self.params, sep="/")
        if np.shape(table) != flat[path].shape:
            raise ValueError(
                f"`{path}` has the shape {flat[path].shape}, but what is to be set has {np.shape(table)}: change the "
                "vocabulary with `resize_token_embeddings`"
            )
        self.params = unflatten_dict({**flat, path: jnp.asarray(table, flat[path].dtype)}, sep="/")

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> FlaxTextEmbeddings:
        """Another number of text tokens: all tables and heads of text grow or shrink, and ``config.vocab_size``.

        New tokens come after the old ones. The start token of Moshi, whose id is ``vocab_size``, keeps its row under
        its new id; ``pad_token_id``, ``bos_token_id`` and ``eos_token_id`` that name it follow it. The configuration
        is a new object, so that other models of the old one keep theirs.

        Args:
            new_num_tokens: tokens without the start token; None for as many as there are.
            pad_to_multiple_of: round them up.
            mean_resizing: draw new rows close to the mean of the old ones, so that new tokens are not likelier than
                others. False draws them as those of a new model.

        Returns:
            As :meth:`get_input_embeddings`.

        Raises:
            ValueError: no whole number of at least 1, a part of a larger model, a quantized head, or parameters on a
                mesh over which the new rows cannot be spread.
        """
        for name, value in (("new_num_tokens", new_num_tokens), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and (not is_whole(value) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1, but is {value!r}")
        if self._whole is not None:
            raise ValueError(
                f"this {type(self).__name__} is a part of a {type(self._whole).__name__}, whose other parts have the "
                "same vocabulary: resize that one"
            )
        old = self.config.vocab_size
        new = int(old if new_num_tokens is None else new_num_tokens)
        new = -(-new // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
        if new != old:
            self._refuse_quantized_head("resize_token_embeddings")
            self._resize(old, new, mean_resizing)
        return self.get_input_embeddings()

    def _resize(self, old: int, new: int, mean_resizing: bool) -> None:
        flat = flatten_dict(self.params, sep="/")
        random = np.random.default_rng(self._seed)
        std = None if mean_resizing else self.config.initializer_range

        def replaced(path: str, rows: np.ndarray) -> jax.Array:
            try:
                return jax.device_put(rows.astype(flat[path].dtype), flat[path].sharding)
            except ValueError as error:
                raise ValueError(
                    f"`{path}` of {new} tokens cannot be spread as it was: choose `pad_to_multiple_of` ({error})"
                ) from error

        tables = {}
        for path in self.input_tables:
            rows = np.asarray(flat[path])
            tables[path] = replaced(path, np.concatenate([resized(rows[:old], new, random, std), rows[old:]]))
        if self.output_table is not None and not self._is_tied:
            rows = np.asarray(flat[self.output_table]).T
            tables[self.output_table] = replaced(self.output_table, resized(rows, new, random, std).T)
        self._rebuild(override_config(self.config, self._fields_of_vocabulary(new)))
        if self.extra_input_ids:
            for name, value in with_start_at(self.generation_config, old, new).items():
                setattr(self.generation_config, name, value)
        self.params = unflatten_dict({**flat, **tables}, sep="/")

    def _fields_of_vocabulary(self, size: int) -> dict[str, Any]:
        """What another vocabulary changes in the configuration."""
        moved = with_start_at(self.config, self.config.vocab_size, size) if self.extra_input_ids else {}
        return {"vocab_size": size, **moved}


def with_start_at(config: Any, old: int, new: int) -> dict[str, Any]:
    """Those of a configuration's special ids that name the start token, as its id is now."""
    found = {}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        moved = [new if token == old else token for token in value] if isinstance(value, list) else value
        moved = new if value == old else moved
        if moved != value:
            found[name] = moved
    return found


def resized(
    rows: Shaped[np.ndarray, "tokens hidden"], number: int, random: np.random.Generator, std: float | None
) -> Float[np.ndarray, "number hidden"]:
    """The first ``number`` rows, and new ones behind them if there are less.

    Args:
        rows: the old ones.
        number: of rows.
        random: draws the new ones.
        std: of new rows around 0; None for rows around the mean of the old ones.
    """
    rows = rows.astype(np.float32 if rows.dtype.itemsize < 8 else np.float64)
    added = number - len(rows)
    if added <= 0:
        return rows[:number]
    if std is not None:
        new = std * random.standard_normal((added, rows.shape[1]))
    else:
        # sums of the old rows' deviations with normal factors have their covariance
        mean = rows.mean(axis=0)
        deviations = (rows - mean) * np.sqrt(NOISE / len(rows))
        steps = range(0, added, ROWS_AT_ONCE)
        factors = (random.standard_normal((min(ROWS_AT_ONCE, added - step), len(rows))) for step in steps)
        new = mean + np.concatenate([factor.astype(rows.dtype) @ deviations for factor in factors])
    return np.concatenate([rows, new.astype(rows.dtype)])
