"""What XLA's CPU backend wants instead of the plain definitions; each function says why.

The figures behind these choices are in ``docs/notes/performance.md``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from .precision import at_least_float32
from .scales import Scales, float_scales, tiled_scales

# ----------------------------------------------------------------------------------------------- few rows of a product

CHUNK_BYTES = 704 * 1024
MAX_CHUNKS = 16

# where pairs of rows pay, found by measurement
PAIRED_BYTES = 1024 * 1024
MAX_TERMS = 16
MIN_SUMS = 64


def few_rows_dot(
    lhs: jax.Array, rhs: jax.Array, product: Callable[..., jax.Array], preferred_element_type: Any
) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """How one or two rows are multiplied with a matrix, or None where the plain product is as good.

    XLA gives each thread a range of the *columns* of such a product, so that every thread reads a short piece of every
    row. As a batch of chunks of rows, each thread reads memory from end to end, which is up to 1.6 times as fast. More
    than one row makes the library copy the matrix first: two are :func:`paired`, or multiplied one after another if
    the matrix is small; from three rows on, the copy pays.

    Args:
        lhs: ``(..., inputs)``.
        rhs: ``(inputs, outputs)``.
        product: ``lax.dot_general`` with precision and element type given.
        preferred_element_type: of ``product``.
    """
    inputs, size = rhs.shape[0], rhs.size * rhs.dtype.itemsize
    rows, chunks, terms = lhs.size // max(inputs, 1), chunk_count(inputs, size), term_count(inputs, size)
    if rows > 2 or rows * chunks <= 1:
        return None
    dtypes = {lhs.dtype, rhs.dtype, jnp.dtype(preferred_element_type or rhs.dtype)}
    has_complex = dtypes in ({jnp.dtype(jnp.float32)}, {jnp.dtype(jnp.float64)})
    if rows == 2 and terms > 1 and has_complex:
        return functools.partial(paired, terms=terms)

    def row_by_row(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        matrices = rhs.reshape(chunks, inputs // chunks, -1)
        products = [
            product(row.reshape(chunks, 1, -1), matrices, dimension_numbers=(((2,), (1,)), ((0,), (0,))))
            for row in lhs.reshape(rows, inputs)
        ]
        return jnp.stack([jnp.sum(pieces, axis=0)[0] for pieces in products]).reshape(*lhs.shape[:-1], rhs.shape[1])

    return row_by_row


def paired(lhs: jax.Array, rhs: jax.Array, terms: int) -> jax.Array:
    """Two rows times a matrix in one pass, as real and imaginary part of the same sums.

    XLA compiles the sums of ``terms`` products each to one loop that reads the matrix from end to end; as two real
    arrays they would be two loops. The last sum stays out of that loop if there are more than 32 of them.
    """
    inputs, outputs = rhs.shape
    rows = lhs.reshape(2, inputs // terms, terms, 1)
    matrix = rhs.reshape(inputs // terms, terms, outputs)
    real, imag = (sum(row[:, term] * matrix[:, term] for term in range(terms)) for row in rows)
    products = jnp.sum(lax.complex(real, imag), axis=0)
    return jnp.stack([products.real, products.imag]).reshape(*lhs.shape[:-1], outputs)


def term_count(inputs: int, size: int) -> int:
    """How many products of a matrix of ``size`` bytes are summed in one go: 1 where pairs don't pay."""
    terms = math.gcd(min(MAX_TERMS, inputs // MIN_SUMS), inputs)
    return terms if size >= PAIRED_BYTES and terms >= 8 else 1


def chunk_count(inputs: int, size: int) -> int:
    """Into how many chunks of rows a matrix of ``size`` bytes is cut: a power of 2 that divides its rows."""
    wanted = round(math.log2(max(size / CHUNK_BYTES, 1)))
    return math.gcd(min(2**wanted, MAX_CHUNKS), inputs)


def batched_dot(
    rows: Float[Array, "batch rows inputs"], matrices: Float[Array, "batch inputs outputs"], dtype: Any = None
) -> Float[Array, "batch rows outputs"]:
    """``rows @ matrices``, summed in ``dtype``; two rows are multiplied one after another, as the matrices would be
    copied else."""
    if rows.shape[1] != 2:
        return jnp.matmul(rows, matrices, preferred_element_type=dtype)
    product = functools.partial(jnp.einsum, "bi,bio->bo", preferred_element_type=dtype)
    return jnp.stack([product(rows[:, row], matrices) for row in range(2)], axis=1)


# -------------------------------------------------------------------------------------- products of quantized matrices

TILE_BYTES = 4 * 1024 * 1024
"""Of a tile in float32, which is to stay in the processor's cache."""

FEW_ROWS = 4
"""So many rows of outputs are fewer numbers to scale than the weights of a group."""


def tiled_dot(
    x: Float[Array, "*shape inputs"],
    codes: Shaped[Array, "rows outputs"],
    scales: Scales,
    numbers: Callable[[Array], list[Array]],
    offsets: Float[Array, "groups outputs"] | None = None,
) -> Float[Array, "*shape outputs"]:
    """One tile of rows after another is made floats and multiplied. As a whole, the matrix would be written to memory
    and read again as floats; and XLA would do so before a loop that it is used in, for all matrices at once.

    Args:
        x: is multiplied in float32 at least, so that bfloat16 costs no more.
        codes, scales, numbers: as of ``ops.quantization``; of one group, all rows have its scales.
        offsets: too; they are multiplied with the sums of ``x`` in each group.
    """
    outputs, inputs = codes.shape[1], x.shape[-1]
    groups, wide = scales.shape[0], at_least_float32(x.dtype)
    tiles = tile_count(codes.shape[0] if groups == 1 else groups, 4 * inputs * outputs)
    left = x.astype(wide).reshape(-1, tiles, inputs // tiles).swapaxes(0, 1)
    rows = left.shape[1]

    def add_tile(total: Array, tile: tuple[Array, Array, Scales | None, Array]) -> tuple[Array, None]:
        left, codes, tile_scales, is_first = tile
        factors, matrices = unscaled_tile(codes, scales if tile_scales is None else tile_scales, numbers, wide)
        total = jnp.where(is_first, jnp.zeros_like(total), total)
        for place, matrix in enumerate(matrices):
            own = left[:, place :: len(matrices)]
            if rows <= FEW_ROWS:
                products = batched_dot(own.reshape(rows, len(factors), -1).swapaxes(0, 1), matrix)
                total = total + jnp.sum(products * factors, axis=0)
            else:
                total = total + own @ (matrix * factors).reshape(-1, outputs)
        return total, None

    tile_scales = None if groups == 1 else tiled_scales(scales, tiles)
    tiled = left, codes.reshape(tiles, -1, outputs), tile_scales, jnp.arange(tiles) == 0
    total, _ = lax.scan(add_tile, meaningless(x, (rows, outputs), wide), tiled)
    if offsets is not None:
        total = total + offset_dot(x, offsets).reshape(rows, outputs)
    return total.reshape(*x.shape[:-1], outputs).astype(x.dtype)


def offset_dot(
    x: Float[Array, "*shape inputs"], offsets: Float[Array, "groups outputs"]
) -> Float[Array, "*shape outputs"]:
    """What the offsets of a quantized matrix add to a product, in float32 at least."""
    wide = at_least_float32(x.dtype)
    grouped = x.astype(wide).reshape(*x.shape[:-1], offsets.shape[0], -1)
    return jnp.sum(grouped, axis=-1) @ offsets.astype(wide)


def tiled_transposed_dot(
    y: Float[Array, "*shape outputs"],
    codes: Shaped[Array, "rows outputs"],
    scales: Scales,
    numbers: Callable[[Array], list[Array]],
    offsets: Float[Array, "groups outputs"] | None = None,
) -> Float[Array, "*shape inputs"]:
    """The product with the transposed matrix, by the tiles and with the arguments of :func:`tiled_dot`."""
    outputs, groups, wide = codes.shape[1], scales.shape[0], at_least_float32(y.dtype)
    inputs = codes.shape[0] * len(jax.eval_shape(numbers, codes))
    tiles = tile_count(codes.shape[0] if groups == 1 else groups, 4 * inputs * outputs)
    right = y.astype(wide).reshape(-1, outputs)
    rows = right.shape[0]

    def put_tile(found: Array, tile: tuple[Array, Scales | None, Array]) -> tuple[Array, None]:
        codes, tile_scales, place = tile
        factors, matrices = unscaled_tile(codes, scales if tile_scales is None else tile_scales, numbers, wide)
        parts = [right @ (matrix * factors).reshape(-1, outputs).T for matrix in matrices]
        return lax.dynamic_update_index_in_dim(found, jnp.stack(parts, axis=-1).reshape(rows, -1), place, 0), None

    tile_scales = None if groups == 1 else tiled_scales(scales, tiles)
    tiled = codes.reshape(tiles, -1, outputs), tile_scales, jnp.arange(tiles)
    found, _ = lax.scan(put_tile, meaningless(y, (tiles, rows, inputs // tiles), wide), tiled)
    found = found.swapaxes(0, 1).reshape(rows, inputs)
    if offsets is not None:
        found = found + jnp.repeat(right @ offsets.astype(wide).T, inputs // groups, axis=1)
    return found.reshape(*y.shape[:-1], inputs).astype(y.dtype)


def meaningless(x: Float[Array, "..."], shape: tuple[int, ...], dtype: Any) -> Array:
    """Numbers that a loop is to write over. Zeros that depend on nothing XLA makes for all loops at the beginning of a
    program, and keeps them until they are needed."""
    return jnp.broadcast_to(x.reshape(-1)[0].astype(dtype), shape)


def unscaled_tile(
    codes: Shaped[Array, "rows outputs"],
    scales: Scales,
    numbers: Callable[[Array], list[Array]],
    dtype: Any,
) -> tuple[Float[Array, "groups 1 outputs"], list[Float[Array, "groups members outputs"]]]:
    """The scales of a tile's groups, and what its codes stand for before they are scaled, as of ``numbers``."""
    factors = float_scales(scales).astype(dtype)[:, None]
    matrices = [matrix.astype(dtype).reshape(len(factors), -1, codes.shape[1]) for matrix in numbers(codes)]
    return factors, matrices


def tile_count(units: int, size: int) -> int:
    """Into how many tiles of rows a matrix of ``size`` bytes is cut: a power of 2 that divides its ``units`` of rows,
    and at least 2 where one does, as XLA takes a loop of one step for none."""
    return math.gcd(2 ** max(1, math.ceil(math.log2(max(size / TILE_BYTES, 1)))), units)


# ------------------------------------------------------------------------------------------ largest numbers

BLOCK_SIZE = 16
MIN_BLOCKS = 512


def argmax(x: Float[Array, "..."], axis: int) -> Int[Array, "..."]:
    """XLA compares one pair of number and index at a time, and takes maxima of floats, which must let NaN through,
    hardly faster. Maxima of integers in the same order are vectorised; so is the search for the first one."""
    integer = jnp.int32 if x.dtype == jnp.float32 else jnp.int64
    greatest = jnp.iinfo(integer).max
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0, x), integer)  # the two zeros are equal
    # of negative numbers, larger bits are smaller
    order = jnp.where(jnp.isnan(x), greatest, jnp.where(bits < 0, bits ^ greatest, bits))
    indices = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    is_greatest = order == jnp.max(order, axis=axis, keepdims=True)
    return jnp.min(jnp.where(is_greatest, indices, x.shape[axis] - 1), axis=axis)


def has_blocks(columns: int, number: int) -> bool:
    """Whether :func:`top_k` pays: in long rows, of which few numbers are wanted."""
    return columns >= MIN_BLOCKS * BLOCK_SIZE and number * BLOCK_SIZE <= columns // 2


def top_k(
    x: Float[Array, "rows columns"], number: int
) -> tuple[Float[Array, "rows {number}"], Int[Array, "rows {number}"]]:
    """The largest of a long row lie in those blocks that have the largest maxima, and maxima are vectorised: 0.03 ms
    instead of 0.1 ms for 64 of 32,000."""
    rows = x.shape[0]
    padding = ((0, 0), (0, -x.shape[-1] % BLOCK_SIZE))
    blocks = jnp.pad(x, padding, constant_values=-jnp.inf).reshape(rows, -1, BLOCK_SIZE)
    _, chosen = lax.top_k(jnp.max(blocks, axis=-1), number)
    chosen = jnp.sort(chosen, axis=-1)  # so that of equal numbers the first one comes first
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(rows, -1)
    columns = chosen[:, :, None] * BLOCK_SIZE + jnp.arange(BLOCK_SIZE, dtype=chosen.dtype)[None, None]
    values, places = lax.top_k(candidates, number)
    return values, jnp.take_along_axis(columns.reshape(rows, -1), places, axis=-1)


def take_group_rows(
    x: Shaped[Array, "groups members *rest"], members: Int[Array, "groups taken"]
) -> Shaped[Array, "groups taken *rest"]:
    """A chain of selections takes half the time of a gather."""
    chosen = members.reshape(*members.shape, *(1,) * (x.ndim - 2))
    taken = jnp.broadcast_to(x[:, :1], (*members.shape, *x.shape[2:]))
    for member in range(1, x.shape[1]):
        taken = jnp.where(chosen == member, x[:, member : member + 1], taken)
    return taken


# --------------------------------------------------------------------------------------------------------- attention

SLOTS_IN_USE = 256
"""Where at most so many slots of a large cache are in use, attention leaves out the others. It copies those in use on
the way, so that more of them, or several such steps, cost more than they spare."""

LARGE_CACHE = 1024
"""Slots of a large cache."""


def attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch slots kv_heads head_dim"],
    value: Float[Array, "batch slots kv_heads head_dim"],
    mask: Bool[Array, "#batch #queries slots"],
    weights_of: Callable[..., Array],
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch heads queries slots"]]:
    """With batch and heads as one axis, the batch dimension of the products: with two, XLA reshapes a cache after its
    update, fuses both, and then copies the whole cache several times in every step."""
    batch, queries, heads, head_dim = query.shape
    slots, kv_heads = key.shape[1:3]
    # the queries of one group of heads beside each other
    query = by_head(query).reshape(batch * kv_heads, -1, head_dim)
    key, value = by_head(key), by_head(value)

    def attend(used: int) -> tuple[Array, Array]:
        """Over the first ``used`` slots; the others get no weight."""
        scores = batched_dot(query, key[:, :used].swapaxes(1, 2), at_least_float32(query.dtype))
        weights = weights_of(scores.reshape(batch, heads, queries, used), mask[:, None, :, :used])
        mixed = batched_dot(weights.reshape(batch * kv_heads, -1, used), value[:, :used])
        return mixed, jnp.pad(weights, [(0, 0)] * 3 + [(0, slots - used)])

    if slots < LARGE_CACHE or queries >= slots:
        mixed, weights = attend(slots)
    else:
        few = ~jnp.any(mask[..., SLOTS_IN_USE:])
        branches = functools.partial(attend, SLOTS_IN_USE), functools.partial(attend, slots)
        mixed, weights = lax.cond(few, *branches)
    mixed = mixed.reshape(batch, heads, queries, head_dim)
    return mixed.transpose(0, 2, 1, 3), weights


def by_head(array: Float[Array, "batch steps heads head_dim"]) -> Float[Array, "batch_heads steps head_dim"]:
    batch, steps, heads, head_dim = array.shape
    return array.transpose(0, 2, 1, 3).reshape(batch * heads, steps, head_dim)


def write_rows(
    array: Float[Array, "batch_heads slots head_dim"],
    new: Float[Array, "batch_heads steps head_dim"],
    slot: Int[Array, "batch"],
) -> Float[Array, "batch_heads slots head_dim"]:
    """One row after another: a scatter becomes a loop."""
    heads = array.shape[0] // slot.shape[0]
    for row in range(slot.shape[0]):
        block = lax.slice_in_dim(new, row * heads, (row + 1) * heads)
        array = lax.dynamic_update_slice(array, block, (jnp.int32(row * heads), slot[row], jnp.int32(0)))
    return array


# ------------------------------------------------------------------------------------------------------- convolutions


def unfold(
    x: Float[Array, "batch padded channels"], width: int, stride: int, dilation: int
) -> Float[Array, "batch length width channels"]:
    """The inputs under the kernel at each of its positions."""
    batch, padded, channels = x.shape
    length = (padded - (width - 1) * dilation - 1) // stride + 1
    if dilation == 1 and width % stride == 0:
        # blocks of `stride` steps are contiguous: no strided reads
        shifts = width // stride
        blocks = x[:, : (length + shifts - 1) * stride].reshape(batch, length + shifts - 1, stride, channels)
        return jnp.concatenate([blocks[:, shift : shift + length] for shift in range(shifts)], axis=2)
    span = (length - 1) * stride + 1
    return jnp.stack([x[:, tap * dilation : tap * dilation + span : stride] for tap in range(width)], axis=2)


def conv1d(
    x: Float[Array, "batch padded in_channels"],
    kernel: Float[Array, "width in_per_group out_channels"],
    *,
    stride: int,
    dilation: int,
    groups: int,
) -> Float[Array, "batch length out_channels"]:
    """An unfold and one product: ``lax.conv`` is several times slower."""
    width, in_per_group, out_channels = kernel.shape
    together = outputs_together(kernel.shape, stride) if groups == dilation == 1 else 1
    if together > 1 and x.shape[1] >= width + (together - 1) * stride:
        return _conv1d_of_several(x, kernel, stride, together)
    patches = unfold(x, width, stride, dilation)
    batch, length = patches.shape[:2]
    if groups == 1:
        patches, kernel = patches.reshape(batch, length, -1), kernel.reshape(-1, out_channels)
        product = few_rows_dot(patches, kernel, lax.dot_general, None)
        return patches @ kernel if product is None else product(patches, kernel)
    patches = patches.reshape(batch, length, width, groups, in_per_group)
    kernel = kernel.reshape(width, in_per_group, groups, out_channels // groups)
    return jnp.einsum("btwgi,wigo->btgo", patches, kernel).reshape(batch, length, out_channels)


def outputs_together(shape: tuple[int, ...], stride: int) -> int:
    """How many neighbouring outputs one row of the product makes.

    With few channels the unfolded inputs are several times the inputs, and the product is narrow. Rows that make
    several outputs multiply with zeros in between, and still take less time, gradients included.
    """
    width, in_channels, out_channels = shape
    channels = max(in_channels, out_channels)
    if width == 1 or channels > 32:
        return 1
    return 8 if channels <= 8 and stride == 1 else 2


def _conv1d_of_several(
    x: Float[Array, "batch padded in_channels"],
    kernel: Float[Array, "width in_channels out_channels"],
    stride: int,
    together: int,
) -> Float[Array, "batch length out_channels"]:
    """A convolution as a product with the kernel at ``together`` places beside each other."""
    batch, padded, in_channels = x.shape
    width, _, out_channels = kernel.shape
    length = (padded - width) // stride + 1
    rows = -(-length // together)
    hop, span = together * stride, (together - 1) * stride + width
    shifts = -(-span // hop)
    x = x[:, : (rows + shifts - 1) * hop]
    x = jnp.pad(x, ((0, 0), (0, (rows + shifts - 1) * hop - x.shape[1]), (0, 0)))
    hops = x.reshape(batch, rows + shifts - 1, hop * in_channels)
    parts = [hops[:, s : s + rows, : (span - s * hop) * in_channels] for s in range(shifts)]
    places = [
        jnp.pad(kernel, ((place * stride, span - width - place * stride), (0, 0), (0, 0))) for place in range(together)
    ]
    band = jnp.stack(places, axis=2).reshape(span * in_channels, together * out_channels)
    return (jnp.concatenate(parts, axis=2) @ band).reshape(batch, rows * together, out_channels)[:, :length]


def conv_transpose1d(
    x: Float[Array, "batch length in_channels"],
    kernel: Float[Array, "width out_per_group in_channels"],
    *,
    stride: int,
    groups: int,
) -> Float[Array, "batch samples out_channels"]:
    """Products and an addition of what overlaps; ``width`` is a multiple of ``stride``."""
    batch, length, in_channels = x.shape
    width, out_per_group, _ = kernel.shape
    shifts = width // stride
    length -= shifts - 1
    kernel = kernel.reshape(shifts, stride, out_per_group, in_channels)
    if groups == 1 and in_channels <= 64 and batch * length >= in_channels:
        # the overlap is summed in the product
        inputs = jnp.concatenate([x[:, shifts - 1 - shift :][:, :length] for shift in range(shifts)], axis=2)
        kernel = kernel.transpose(0, 3, 1, 2).reshape(shifts * in_channels, stride * out_per_group)
        return (inputs @ kernel).reshape(batch, length * stride, out_per_group)
    if groups == 1 and batch * length >= in_channels:
        written = jnp.einsum("bti,swoi->btswo", x, kernel)
        overlapping = [written[:, shifts - 1 - shift :][:, :length, shift] for shift in range(shifts)]
        written = functools.reduce(jnp.add, overlapping)
        return written.reshape(batch, length * stride, out_per_group)

    # inputs[s] is `s` steps behind the samples, to which it writes the s-th `stride` rows of the kernel
    inputs = jnp.stack([x[:, shifts - 1 - shift :][:, :length] for shift in range(shifts)])
    if groups == in_channels and out_per_group == 1:
        written = jnp.sum(inputs[:, :, :, None] * kernel[:, None, None, :, 0], axis=0)
    elif groups > 1:
        inputs = inputs.reshape(shifts, batch, length, groups, -1)
        kernel = kernel.reshape(shifts, stride, out_per_group, groups, -1)
        written = jnp.sum(jnp.einsum("sbtgi,swogi->sbtwgo", inputs, kernel), axis=0)
    else:
        # few rows: with the kernel on the left, it is read as it lies; transposed before the sum, the product would be
        # turned around again, and the whole kernel with it
        inputs = inputs.reshape(shifts, batch * length, in_channels).transpose(0, 2, 1)
        kernel = kernel.reshape(shifts, stride * out_per_group, in_channels)
        written = jnp.sum(jnp.einsum("skc,sci->ski", kernel, inputs), axis=0).T
    return written.reshape(batch, length * stride, groups * out_per_group)


# --------------------------------------------------------------------------------------------------------- codebooks


def nearest_entries(
    embed_sum: Float[Array, "entries dim"],
    usage: Float[Array, "entries"],
    squares: Float[Array, "entries"],
    x: Float[Array, "rows dim"],
) -> Int[Array, "rows"]:
    """On the left of the product, the table is not transposed; for one row it is cut into chunks, as in
    :func:`few_rows_dot`."""
    entries, dim = embed_sum.shape
    chunks = chunk_count(entries, embed_sum.size * embed_sum.dtype.itemsize) if len(x) == 1 else 1
    products = lax.dot_general(
        embed_sum.reshape(chunks, -1, dim),
        jnp.broadcast_to(x, (chunks, *x.shape)),
        (((2,), (2,)), ((0,), (0,))),
        precision=lax.Precision.HIGHEST,
    ).reshape(entries, -1)
    distances = (squares[:, None] / usage[:, None] - 2 * products) / usage[:, None]
    return argmax(-distances, axis=0)


def squared_norms(embed_sum: Float[Array, "entries dim"]) -> Float[Array, "entries"]:
    """As a product, which sums faster than a reduction."""
    ones = jnp.ones((embed_sum.shape[-1], 1), embed_sum.dtype)
    return jnp.matmul(jnp.square(embed_sum), ones, precision=lax.Precision.HIGHEST)[:, 0]
