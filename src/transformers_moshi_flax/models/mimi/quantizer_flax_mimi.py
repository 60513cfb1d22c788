"""Mimi's split residual vector quantizer, and its codebooks made ready for coding frame by frame.

The codebook buffers are leaves of the parameter tree, without gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from transformers import MimiConfig

from ...ops.codebook import nearest_entries, squared_norms
from ...ops.precision import at_least_float32
from .layers_flax_mimi import FlaxMimiKernel

Params = Any


# ----------------------------------------------------------------------------------------------------------- modules


class Codebook(NamedTuple):
    """A table of entries as the files keep it: entry i is ``embed_sum[i] / usage[i]``.

    What is computed from it divides afterwards: the whole table is larger than anything that a frame needs.
    """

    embed_sum: Float[Array, "entries dim"]
    usage: Float[Array, "entries"]
    squares: Float[Array, "entries"] | None = None  # :func:`squared_norms` of ``embed_sum``, if they are known

    def nearest(self, x: Float[Array, "*shape dim"]) -> Int[Array, "*shape"]:
        """Index of the nearest entry (Euclidean), the first of equally near ones; int32."""
        squares = squared_norms(self.embed_sum) if self.squares is None else self.squares
        return nearest_entries(self.embed_sum, self.usage, squares, x)

    def entries(self, codes: Int[Array, "*shape"]) -> Float[Array, "*shape dim"]:
        """Those with these indices."""
        return self.embed_sum[codes] / self.usage[codes][..., None]


class FlaxMimiEuclideanCodebook(nn.Module):
    """Entries of a codebook from running sums; upstream ``MimiEuclideanCodebook``.

    The three leaves are upstream's buffers, so no gradient flows into them. They start as upstream's do, with all
    entries zero. A fourth, ``squares``, is used where :func:`prepared_for_frames` has put it.
    """

    config: MimiConfig
    dtype: DTypeLike = jnp.float32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self) -> Codebook:
        """The table in at least float32."""
        size, dim = self.config.codebook_size, self.config.codebook_dim
        self.param("initialized", nn.initializers.ones, (1,), jnp.float32)
        usage = self.param("cluster_usage", nn.initializers.ones, (size,), jnp.float32)
        embed_sum = self.param("embed_sum", nn.initializers.zeros, (size, dim), jnp.float32)
        usage, embed_sum = (
            lax.stop_gradient(leaf.astype(at_least_float32(self.dtype))) for leaf in (usage, embed_sum)
        )
        return Codebook(embed_sum, jnp.maximum(usage, self.epsilon), self.get_variable("params", "squares"))


class FlaxMimiVectorQuantization(nn.Module):
    """One stage of the residual quantizer; upstream ``MimiVectorQuantization``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.codebook = FlaxMimiEuclideanCodebook(self.config, self.dtype)

    def encode(self, x: Float[Array, "*shape dim"]) -> Int[Array, "*shape"]:
        return self.codebook().nearest(x)

    def decode(self, codes: Int[Array, "*shape"]) -> Float[Array, "*shape dim"]:
        return self.codebook().entries(codes)


class FlaxMimiQuantizerLayers(nn.Module):
    """The numbered stages of :class:`FlaxMimiResidualVectorQuantizer`; returns the tables of the first ``number``."""

    config: MimiConfig
    num_quantizers: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, number: int | None) -> tuple[Codebook, ...]:
        stages = [
            FlaxMimiVectorQuantization(self.config, self.dtype, name=str(index))
            for index in range(self.num_quantizers if number is None or self.is_initializing() else number)
        ]
        return tuple(stage.codebook() for stage in stages)[:number]


class FlaxMimiResidualVectorQuantizer(nn.Module):
    """Each stage quantizes what the stages before it left over; upstream ``MimiResidualVectorQuantizer``.

    Channels last, in at least float32.
    """

    config: MimiConfig
    num_quantizers: int
    dtype: DTypeLike = jnp.float32

    def setup(self):
        config, inner = self.config, self.config.vector_quantization_hidden_dimension
        wide = at_least_float32(self.dtype)
        self.layers = FlaxMimiQuantizerLayers(config, self.num_quantizers, self.dtype)
        self.input_proj = self.output_proj = None
        if inner != config.hidden_size:
            self.input_proj = FlaxMimiKernel((1, config.hidden_size, inner), dtype=wide)
            self.output_proj = FlaxMimiKernel((1, inner, config.hidden_size), dtype=wide)

    def _weights(self, number: int | None):
        """Both projections, so that a call of either direction reaches every parameter, and the first tables."""
        if self.input_proj is None:
            return None, None, self.layers(number)
        return self.input_proj()[0][0], self.output_proj()[0][0], self.layers(number)

    def encode(
        self, latents: Float[Array, "batch frames hidden_size"], num_quantizers: int | None = None
    ) -> Int[Array, "batch num_quantizers frames"]:
        """The codes of the first ``num_quantizers`` stages, of all if None."""
        projection, _, tables = self._weights(num_quantizers)
        residual = latents.astype(at_least_float32(self.dtype))
        if projection is not None:
            residual = jnp.matmul(residual, projection, precision=lax.Precision.HIGHEST)
        codes = [jnp.zeros((latents.shape[0], 0, latents.shape[1]), jnp.int32)]
        for table in tables:
            chosen = table.nearest(residual)
            residual = residual - table.entries(chosen)
            codes.append(chosen[:, None])
        return jnp.concatenate(codes, axis=1)

    def decode(self, codes: Int[Array, "batch num_quantizers frames"]) -> Float[Array, "batch frames hidden_size"]:
        """The sum of the entries, projected back."""
        _, projection, tables = self._weights(codes.shape[1])
        shape = (codes.shape[0], codes.shape[2], self.config.codebook_dim)
        total = jnp.zeros(shape, at_least_float32(self.dtype))
        for index in range(codes.shape[1]):
            total = total + tables[index].entries(codes[:, index])
        return total if projection is None else total @ projection


class FlaxMimiSplitResidualVectorQuantizer(nn.Module):
    """Semantic and acoustic codebooks, both quantizing the latents; upstream ``MimiSplitResidualVectorQuantizer``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        config = self.config
        semantic = config.num_semantic_quantizers
        self.semantic_residual_vector_quantizer = FlaxMimiResidualVectorQuantizer(config, semantic, self.dtype)
        self.acoustic_residual_vector_quantizer = FlaxMimiResidualVectorQuantizer(
            config, config.num_quantizers - semantic, self.dtype
        )

    def encode(
        self, latents: Float[Array, "batch frames hidden_size"], num_quantizers: int | None = None
    ) -> Int[Array, "batch num_quantizers frames"]:
        """Codes of all or the first ``num_quantizers`` codebooks, int32.

        Raises:
            ValueError: more than there are, or fewer than the semantic ones.
        """
        most, least = self.config.num_quantizers, self.config.num_semantic_quantizers
        number = most if num_quantizers is None else num_quantizers
        if not least <= number <= most:
            raise ValueError(
                f"`num_quantizers` is {number}, but this Mimi has {most} codebooks, of which the {least} semantic are "
                f"always used: choose from {least} to {most}."
            )
        semantic = self.semantic_residual_vector_quantizer.encode(latents)
        acoustic = self.acoustic_residual_vector_quantizer.encode(latents, number - least)
        return jnp.concatenate([semantic, acoustic], axis=1)

    def decode(self, codes: Int[Array, "batch num_quantizers frames"]) -> Float[Array, "batch frames hidden_size"]:
        """Latents of the codes. Codes outside the codebook are clamped: the models check what is not traced."""
        semantic = self.config.num_semantic_quantizers
        latents = self.semantic_residual_vector_quantizer.decode(codes[:, :semantic])
        return latents + self.acoustic_residual_vector_quantizer.decode(codes[:, semantic:])


# ----------------------------------------------------------------------------------------------- frame by frame


def codebooks_for_frames(params: Params, config: MimiConfig, num_quantizers: int) -> dict[tuple[str, str], Params]:
    """The parameters of the first codebooks, by the names of quantizer and layer."""
    semantic = config.num_semantic_quantizers
    numbers = {"semantic": semantic, "acoustic": num_quantizers - semantic}
    return {
        (name, index): params["quantizer"][name]["layers"][index]["codebook"]
        for name, number in ((f"{kind}_residual_vector_quantizer", number) for kind, number in numbers.items())
        for index in map(str, range(number))
    }


def norms_for_frames(
    codebooks: dict[tuple[str, str], Params], dtype: DTypeLike
) -> dict[tuple[str, str], Float[Array, "entries"]]:
    """The norms of all entries, which every frame would compute from the whole tables."""
    wide = at_least_float32(dtype)
    return {place: squared_norms(codebook["embed_sum"].astype(wide)) for place, codebook in codebooks.items()}


def with_norms(
    params: Params, codebooks: dict[tuple[str, str], Params], norms: dict[tuple[str, str], Float[Array, "entries"]]
) -> Params:
    """The parameters with these codebooks alone, and the norms of their entries."""
    quantizer = dict(params["quantizer"])
    for name in {name for name, _ in codebooks}:
        layers = {
            index: {"codebook": {**codebook, "squares": norms[other, index]}}
            for (other, index), codebook in codebooks.items()
            if other == name
        }
        quantizer[name] = {**quantizer[name], "layers": layers}
    return {**params, "quantizer": quantizer}


def prepared_for_frames(params: Params, config: MimiConfig, num_quantizers: int, dtype: DTypeLike) -> Params:
    """The parameters of a Mimi for coding with ``num_quantizers`` codebooks, frame by frame."""
    codebooks = codebooks_for_frames(params, config, num_quantizers)
    return with_norms(params, codebooks, norms_for_frames(codebooks, dtype))
