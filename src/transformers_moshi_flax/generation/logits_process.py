"""Logits processors and warpers: the classes of the names that ``transformers`` 4 had for Flax.

Each is called as ``processor(input_ids, scores, cur_len) -> scores``: the history ``(rows, capacity)`` int32, of which
``cur_len`` columns are in use, and the scores ``(rows, vocab)`` of the next token. The computation is in
:mod:`.logits`; the semantics are those of the PyTorch classes in ``transformers`` 5.23 without the prefix ``Flax``.

They are pytrees. Numbers and token ids are operands, so that a compiled program serves other values; only sizes (of an
n-gram, of a list of ids) are part of the program. Write your own as a class with that call, or pass a function.
"""

from __future__ import annotations

import abc
import dataclasses
import numbers
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast, dataclass_transform

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, SequenceKey

from ..input_checks import is_traced, is_whole
from . import logits
from .arrays import on_device
from .logits import NEGATIVE_INFINITY, History, Length, Scores

T = TypeVar("T")

WHOLE_LIMIT = 2**31
"""Above the whole numbers that programs take: they are int32."""

DIVISORS = (1e-30, 1e30)
"""What scores may be divided by: float32 takes much less for 0, and the quotients overflow before."""

LARGEST_BIAS = float(np.finfo(np.float32).max)


# --------------------------------------------------------------------------------------------- checks


def check(name: str, value: Any, good: bool, rule: str) -> None:
    """Raises ``ValueError`` unless ``good``."""
    if not good:
        raise ValueError(f"`{name}` must be {rule}, but is {value!r}.")


def is_real(value: Any) -> bool:
    """Whether ``value`` is a single number."""
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim == 0 and any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.integer, jnp.floating))
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_divisor(value: Any) -> bool:
    """Whether scores may be divided by the number ``value``."""
    smallest, largest = DIVISORS
    return bool(smallest <= value <= largest)


def real(name: str, value: Any, good: Callable[[Any], bool], rule: str) -> jax.Array:
    """``value`` as a float32 scalar.

    Raises:
        ValueError: if it is no number, or its value is known and not ``good``.
    """
    check(name, value, is_real(value) and (is_traced(value) or bool(good(value))), rule)
    return on_device(value, np.float32)


def check_whole(name: str, value: Any, minimum: int) -> None:
    """Raises ``ValueError`` unless ``value`` is a whole number of int32 and of at least ``minimum``."""
    good = is_whole(value) and minimum <= value < WHOLE_LIMIT
    check(name, value, good, f"a whole number of at least {minimum} and below 2**31")


def whole(name: str, value: Any, minimum: int) -> jax.Array:
    """``value`` as an int32 scalar; what is traced is taken as it is.

    Raises:
        ValueError: if it is no whole number of at least ``minimum``, or none of int32.
    """
    if is_traced(value):
        return value.astype(jnp.int32)
    check_whole(name, value, minimum)
    return on_device(int(value), np.int32)


def token_list(name: str, value: Any, vocab_size: int | None = None) -> list[int]:
    """One id or several as a list.

    Raises:
        ValueError: unless they are whole numbers in ``[0, vocab_size)``, or in ``[0, 2**31)`` without ``vocab_size``.
    """
    ids = np.asarray(value).tolist() if isinstance(value, np.ndarray | jax.Array) else value
    ids = [ids] if is_whole(ids) else ids
    limit = WHOLE_LIMIT if vocab_size is None else vocab_size
    good = isinstance(ids, list | tuple | set | range) and all(is_whole(i) and 0 <= i < limit for i in ids)
    rule = "token ids of at least 0" if vocab_size is None else f"token ids in [0, {vocab_size})"
    check(name, value, good, f"{rule}: one or a list")
    return [int(i) for i in ids]


def token_ids(name: str, value: Any) -> jax.Array:
    """One id or several as a vector of int32; what is traced is taken as it is.

    Behind them stands what is no token, so that lists of similar length share programs.

    Raises:
        ValueError: unless they are whole numbers of at least 0.
    """
    if is_traced(value):
        return jnp.atleast_1d(value).astype(jnp.int32)
    ids = token_list(name, value)
    return on_device([*ids, *[WHOLE_LIMIT - 1] * (-len(ids) % 4)], np.int32)


def biased_sequences(name: str, value: Any, vocab_size: int | None = None) -> dict[tuple[int, ...], float]:
    """``{(id, …): bias}`` of such a dictionary, or of upstream's ``[[[id, …], bias], …]``.

    Raises:
        ValueError: for anything else, for ids outside the vocabulary, and for biases that are NaN or above float32.
    """
    pairs = list(value.items()) if isinstance(value, dict) else value
    rule = "a dictionary {(id, …): bias} or a list of [[id, …], bias], not empty"
    numbers_rule = "made of biases that are finite, or -inf for what never comes"
    check(name, value, isinstance(pairs, list | tuple) and len(pairs) > 0, rule)
    for pair in pairs:
        check(name, value, isinstance(pair, list | tuple) and len(pair) == 2, rule)
        check_sequence(name, pair[0], vocab_size)
        check(name, value, is_real(pair[1]) and not is_traced(pair[1]), rule)
        check(name, value, bool(pair[1] <= LARGEST_BIAS), numbers_rule)
    return {tuple(int(i) for i in sequence): float(bias) for sequence, bias in pairs}


def check_sequence(name: str, value: Any, vocab_size: int | None = None) -> None:
    """Raises ``ValueError`` unless ``value`` is a list of token ids that is not empty."""
    limit = WHOLE_LIMIT if vocab_size is None else vocab_size
    good = isinstance(value, list | tuple) and len(value) > 0 and all(is_whole(i) and 0 <= i < limit for i in value)
    rule = "of at least 0" if vocab_size is None else f"in [0, {vocab_size})"
    check(name, value, good, f"made of lists of token ids {rule}, none of them empty")


def bad_words(name: str, value: Any, vocab_size: int | None = None) -> list[list[int]]:
    """Lists of token ids.

    Raises:
        ValueError: for anything else, an empty list, and ids outside the vocabulary.
    """
    rule = "a list of lists of token ids, not empty"
    check(name, value, isinstance(value, list | tuple) and len(value) > 0, rule)
    for word in value:
        check_sequence(name, word, vocab_size)
    return [[int(i) for i in word] for word in value]


# --------------------------------------------------------------------------------------- pytrees of operands


def static(**kwargs: Any) -> Any:
    """A field that is part of the program, as with ``flax.struct.field(pytree_node=False)``."""
    return flax.struct.field(pytree_node=False, **kwargs)


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static,))
def operands(cls: type[T]) -> type[T]:
    """Makes ``cls`` a frozen dataclass and a pytree, whose leaves are the fields that are not :func:`static`.

    Unlike ``flax.struct.dataclass`` it does not construct when JAX puts a tree together: JAX also fills trees with
    placeholders, which a constructor that checks its arguments would refuse.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cast(Any, cls))
    leaves = [field.name for field in fields if field.metadata.get("pytree_node", True)]
    statics = [field.name for field in fields if field.name not in leaves]

    def flatten(item: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        return [(GetAttrKey(name), getattr(item, name)) for name in leaves], tuple(getattr(item, n) for n in statics)

    def unflatten(aux: tuple[Any, ...], children: Iterable[Any]) -> Any:
        item = object.__new__(cls)
        for name, value in [*zip(leaves, children), *zip(statics, aux)]:
            object.__setattr__(item, name, value)
        return item

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


def set_fields(item: Any, **values: Any) -> None:
    """Sets fields of a frozen dataclass that is being constructed."""
    for name, value in values.items():
        object.__setattr__(item, name, value)


class FlaxLogitsProcessor(abc.ABC):
    """What changes the scores of the next token."""

    @abc.abstractmethod
    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        """The changed scores.

        Args:
            input_ids: the history, ``(rows, capacity)`` int32; columns from ``cur_len`` on do not count.
            scores: of the next token, ``(rows, vocab)``.
            cur_len: columns in use, an int or a traced scalar.
        """


class FlaxLogitsWarper(FlaxLogitsProcessor):
    """A processor that only sampling uses."""


@jax.tree_util.register_pytree_with_keys_class
class FlaxLogitsProcessorList(list):
    """Processors that are applied one after another.

    A pytree of those members that are pytrees; the others (functions) are part of the program.
    """

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        """Applies all of them; arguments as in :meth:`FlaxLogitsProcessor.__call__`.

        Raises:
            ValueError: one returns something else than scores of the same shape.
        """
        for processor in self:
            changed = processor(input_ids, scores, cur_len)
            if jnp.shape(changed) != scores.shape:
                raise ValueError(
                    f"`logits_processor`: {processor!r} must return scores of the shape {scores.shape}, but returned "
                    f"{jnp.shape(changed)}."
                )
            scores = changed
        return scores

    def merged_with(self, custom: Iterable[Callable]) -> FlaxLogitsProcessorList:
        """This list and then ``custom``; one of ``custom`` takes the place of that of its own class in this list."""
        custom = list(custom)
        first_of_class = {type(processor): processor for processor in reversed(custom)}
        merged = [first_of_class.get(type(own), own) for own in self]
        merged += [processor for processor in custom if not any(processor is other for other in merged)]
        return FlaxLogitsProcessorList(merged)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        """Members that are pytrees, and the others at their places."""
        trees = [(SequenceKey(index), item) for index, item in enumerate(self) if not is_leaf(item)]
        return trees, tuple(item if is_leaf(item) else None for item in self)

    @classmethod
    def tree_unflatten(cls, others: tuple[Any, ...], trees: Iterable[Any]) -> FlaxLogitsProcessorList:
        """The list of :meth:`tree_flatten_with_keys`."""
        trees = iter(trees)
        return cls(next(trees) if other is None else other for other in others)


def is_leaf(item: Any) -> bool:
    return jax.tree_util.all_leaves([item])


# --------------------------------------------------------------------------------------------- warpers


TEMPERATURES = "above 0 and in [1e-30, 1e30] (for greedy search use `do_sample=False`)"
PENALTIES = "above 0 and in [1e-30, 1e30], 1 for none"


@operands
class FlaxTemperatureLogitsWarper(FlaxLogitsWarper):
    """Divides the scores by ``temperature``.

    Raises:
        ValueError: unless ``temperature`` is in [1e-30, 1e30].
    """

    temperature: Any

    def __post_init__(self) -> None:
        set_fields(self, temperature=real("temperature", self.temperature, is_divisor, f"a number {TEMPERATURES}"))

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        return scores / self.temperature.astype(scores.dtype)


@operands
class FlaxTopKLogitsWarper(FlaxLogitsWarper):
    """Keeps the ``top_k`` largest scores, and what equals the smallest of them.

    Attributes:
        top_k: a whole number of at least 1; an operand.
        filter_value: of what is not kept.
        min_tokens_to_keep: a lower limit of ``top_k``.
        bound: the largest ``top_k`` that the compiled program serves, a power of two of at least 64.

    Raises:
        ValueError: for numbers that are not whole, below 1 or beyond int32.
    """

    top_k: Any
    filter_value: float = static(default=NEGATIVE_INFINITY)
    min_tokens_to_keep: int = static(default=1)
    bound: int = static(default=0)

    def __post_init__(self) -> None:
        check_whole("top_k", self.top_k, 1)
        check_kept(self.min_tokens_to_keep)
        top_k = max(int(self.top_k), self.min_tokens_to_keep)
        set_fields(self, top_k=on_device(top_k, np.int32), bound=max(self.bound, top_k_bound(top_k)))

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        return logits.filter_top_k(scores, self.top_k, self.bound, self.filter_value)


def top_k_bound(top_k: int) -> int:
    """The number of candidates of a program that serves ``top_k``: a power of two of at least 64."""
    return max(64, 1 << (top_k - 1).bit_length())


def check_kept(min_tokens_to_keep: Any) -> None:
    check_whole("min_tokens_to_keep", min_tokens_to_keep, 1)


@operands
class FlaxTopPLogitsWarper(FlaxLogitsWarper):
    """Keeps the fewest largest scores that have the probability ``top_p`` together.

    Attributes:
        top_p: a number in [0, 1]; an operand.
        filter_value: of what is not kept.
        min_tokens_to_keep: so many are kept in any case.

    Raises:
        ValueError: for numbers out of range.
    """

    top_p: Any
    filter_value: float = static(default=NEGATIVE_INFINITY)
    min_tokens_to_keep: int = static(default=1)

    def __post_init__(self) -> None:
        check_kept(self.min_tokens_to_keep)
        set_fields(self, top_p=real("top_p", self.top_p, lambda p: 0 <= p <= 1, "a number in [0, 1]"))

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        return logits.filter_top_p(scores, self.top_p, self.min_tokens_to_keep, self.filter_value)


@operands
class FlaxMinPLogitsWarper(FlaxLogitsWarper):
    """Keeps the tokens that have at least ``min_p`` times the probability of the likeliest.

    Attributes:
        min_p: a number in [0, 1]; an operand.
        filter_value: of what is not kept.
        min_tokens_to_keep: so many are kept in any case.

    Raises:
        ValueError: for numbers out of range.
    """

    min_p: Any
    filter_value: float = static(default=NEGATIVE_INFINITY)
    min_tokens_to_keep: int = static(default=1)

    def __post_init__(self) -> None:
        check_kept(self.min_tokens_to_keep)
        set_fields(self, min_p=real("min_p", self.min_p, lambda p: 0 <= p <= 1, "a number in [0, 1]"))

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        return logits.filter_min_p(scores, self.min_p, self.min_tokens_to_keep, self.filter_value)


@operands
class FlaxTypicalLogitsWarper(FlaxLogitsWarper):
    """Keeps the tokens whose surprise is nearest to the entropy until they have the probability ``mass`` together.

    Attributes:
        mass: a number above 0 and below 1 (``typical_p``); an operand.
        filter_value: of what is not kept.
        min_tokens_to_keep: so many are kept in any case.

    Raises:
        ValueError: for numbers out of range.
    """

    mass: Any = 0.9
    filter_value: float = static(default=NEGATIVE_INFINITY)
    min_tokens_to_keep: int = static(default=1)

    def __post_init__(self) -> None:
        check_kept(self.min_tokens_to_keep)
        set_fields(self, mass=real("mass", self.mass, lambda p: 0 < p < 1, "a number above 0 and below 1"))

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        return logits.filter_typical(scores, self.mass, self.min_tokens_to_keep, self.filter_value)


@operands
class FlaxEpsilonLogitsWarper(FlaxLogitsWarper):
    """Keeps the tokens that have at least the probability ``epsilon``.

    Attributes:
        epsilon: a number above 0 and below 1 (``epsilon_cutoff``); an operand.
        filter_value: of what is not kept.
        min_tokens_to_keep: so many are kept in any case.

    Raises:
        ValueError: for numbers out of range.
    """

    epsilon: Any
    filter_value: float = static(default=NEGATIVE_INFINITY)
    min_tokens_to_keep: int = static(default=1)

    def __post_init__(self) -> None:
        check_kept(self.min_tokens_to_keep)
        set_fields(self, epsilon=real("epsilon", self.epsilon, lambda e: 0 < e < 1, "a number above 0 and below 1"))

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        return logits.filter_epsilon(scores, self.epsilon, self.min_tokens_to_keep, self.filter_value)


@operands
class FlaxEtaLogitsWarper(FlaxLogitsWarper):
    """Keeps the tokens that have at least the probability ``min(epsilon, sqrt(epsilon) * exp(-entropy))``.

    Attributes:
        epsilon: a number above 0 and below 1 (``eta_cutoff``); an operand.
        filter_value: of what is not kept.
        min_tokens_to_keep: so many are kept in any case.

    Raises:
        ValueError: for numbers out of range.
    """

    epsilon: Any
    filter_value: float = static(default=NEGATIVE_INFINITY)
    min_tokens_to_keep: int = static(default=1)

    def __post_init__(self) -> None:
        check_kept(self.min_tokens_to_keep)
        set_fields(self, epsilon=real("epsilon", self.epsilon, lambda e: 0 < e < 1, "a number above 0 and below 1"))

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        return logits.filter_eta(scores, self.epsilon, self.min_tokens_to_keep, self.filter_value)


# ------------------------------------------------------------------------------------------- processors


@operands
class FlaxMinLengthLogitsProcessor(FlaxLogitsProcessor):
    """No end before the sequence, prompt included, has ``min_length`` tokens.

    Attributes:
        min_length: a whole number of at least 0; an operand.
        eos_token_id: one id or several; operands.

    Raises:
        ValueError: for a length or an id below 0.
    """

    min_length: Any
    eos_token_id: Any

    def __post_init__(self) -> None:
        eos = token_ids("eos_token_id", self.eos_token_id)
        set_fields(self, min_length=whole("min_length", self.min_length, 0), eos_token_id=eos)

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        return jnp.where(cur_len < self.min_length, logits.suppress(scores, self.eos_token_id), scores)


@operands
class FlaxMinNewTokensLengthLogitsProcessor(FlaxLogitsProcessor):
    """No end before ``min_new_tokens`` tokens follow the prompt.

    Attributes:
        prompt_length_to_skip: tokens of the prompt; an operand.
        min_new_tokens: a whole number of at least 0; an operand.
        eos_token_id: one id or several; operands.

    Raises:
        ValueError: for a length or an id below 0.
    """

    prompt_length_to_skip: Any
    min_new_tokens: Any
    eos_token_id: Any

    def __post_init__(self) -> None:
        set_fields(
            self,
            prompt_length_to_skip=whole("prompt_length_to_skip", self.prompt_length_to_skip, 0),
            min_new_tokens=whole("min_new_tokens", self.min_new_tokens, 0),
            eos_token_id=token_ids("eos_token_id", self.eos_token_id),
        )

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        early = cur_len - self.prompt_length_to_skip < self.min_new_tokens
        return jnp.where(early, logits.suppress(scores, self.eos_token_id), scores)


@operands
class FlaxForcedBOSTokenLogitsProcessor(FlaxLogitsProcessor):
    """The token after a history of one token is ``bos_token_id``.

    Raises:
        ValueError: for an id below 0.
    """

    bos_token_id: Any

    def __post_init__(self) -> None:
        set_fields(self, bos_token_id=token_ids("bos_token_id", self.bos_token_id))

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        return jnp.where(cur_len == 1, logits.force(scores, self.bos_token_id), scores)


@operands
class FlaxForcedEOSTokenLogitsProcessor(FlaxLogitsProcessor):
    """The last token of ``max_length`` is ``eos_token_id``.

    Attributes:
        max_length: tokens of the sequence, prompt included; an operand.
        eos_token_id: one id or several, between which the scores are equal; operands.

    Raises:
        ValueError: for a length or an id below 0.
    """

    max_length: Any
    eos_token_id: Any

    def __post_init__(self) -> None:
        eos = token_ids("eos_token_id", self.eos_token_id)
        set_fields(self, max_length=whole("max_length", self.max_length, 0), eos_token_id=eos)

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        return jnp.where(cur_len == self.max_length - 1, logits.force(scores, self.eos_token_id), scores)


@operands
class FlaxSuppressTokensLogitsProcessor(FlaxLogitsProcessor):
    """The tokens ``suppress_tokens`` never come.

    Raises:
        ValueError: for ids below 0.
    """

    suppress_tokens: Any

    def __post_init__(self) -> None:
        set_fields(self, suppress_tokens=token_ids("suppress_tokens", self.suppress_tokens))

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        return logits.suppress(scores, self.suppress_tokens)


@operands
class FlaxSuppressTokensAtBeginLogitsProcessor(FlaxLogitsProcessor):
    """The tokens ``begin_suppress_tokens`` do not follow the first ``begin_index`` tokens.

    Raises:
        ValueError: for an index or ids below 0.
    """

    begin_suppress_tokens: Any
    begin_index: Any

    def __post_init__(self) -> None:
        ids = token_ids("begin_suppress_tokens", self.begin_suppress_tokens)
        set_fields(self, begin_suppress_tokens=ids, begin_index=whole("begin_index", self.begin_index, 0))

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        suppressed = logits.suppress(scores, self.begin_suppress_tokens)
        return jnp.where(cur_len == self.begin_index, suppressed, scores)


@operands
class FlaxForceTokensLogitsProcessor(FlaxLogitsProcessor):
    """Certain tokens at certain positions.

    Attributes:
        force_token_map: ``{position: token}`` or pairs of them; a token of None forces nothing. Kept as a vector with
            one entry per position, -1 where nothing is forced.

    Raises:
        ValueError: for anything else, and for positions or tokens below 0.
    """

    force_token_map: Any

    def __post_init__(self) -> None:
        given = self.force_token_map
        if isinstance(given, jax.Array):
            return
        pairs = list(given.items()) if isinstance(given, dict) else given
        good = isinstance(pairs, list | tuple) and all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs)
        good = good and all(is_whole(p) and p >= 0 and (t is None or (is_whole(t) and t >= 0)) for p, t in pairs)
        check("force_token_map", given, good and len(pairs) > 0, "pairs of a position and a token, none below 0")
        tokens = np.full(max(position for position, _ in pairs) + 1, -1, dtype=np.int32)
        for position, token in pairs:
            tokens[position] = -1 if token is None else token
        set_fields(self, force_token_map=on_device(tokens))

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        positions = self.force_token_map.shape[0]
        token = self.force_token_map[jnp.minimum(cur_len, positions - 1)]
        forced = (cur_len < positions) & (token >= 0)
        return jnp.where(forced, logits.force(scores, jnp.maximum(token, 0)[None]), scores)


@operands
class FlaxNoRepeatNGramLogitsProcessor(FlaxLogitsProcessor):
    """No n-gram comes twice in a sequence.

    Attributes:
        ngram_size: tokens of an n-gram, at least 1; part of the program.

    Raises:
        ValueError: for another size.
    """

    ngram_size: int = static()

    def __post_init__(self) -> None:
        good = is_whole(self.ngram_size) and self.ngram_size >= 1
        check("ngram_size", self.ngram_size, good, "a whole number of at least 1")

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        return logits.forbid_repeated_ngrams(scores, input_ids, cur_len, self.ngram_size)


@operands
class FlaxRepetitionPenaltyLogitsProcessor(FlaxLogitsProcessor):
    """Makes tokens of the history less likely, or likelier.

    Attributes:
        penalty: positive scores are divided by it, negative ones multiplied; above 0, an operand.
        prompt_ignore_length: so many leading columns of the history do not count: one number, or one per row of the
            prompt, such as the length of the padding. An operand, or None.

    Raises:
        ValueError: for numbers out of range.
    """

    penalty: Any
    prompt_ignore_length: Any = None

    def __post_init__(self) -> None:
        set_fields(self, penalty=real("penalty", self.penalty, is_divisor, f"a number {PENALTIES}"))
        ignored = self.prompt_ignore_length
        if ignored is None:
            return
        name = "prompt_ignore_length"
        if not is_whole(ignored):
            good = isinstance(ignored, np.ndarray | jax.Array) and ignored.ndim <= 1
            good = good and jnp.issubdtype(ignored.dtype, jnp.integer)
            check(name, ignored, good, "a whole number of at least 0, or an array of one per row")
            set_fields(self, prompt_ignore_length=on_device(ignored, np.int32))
        else:
            set_fields(self, prompt_ignore_length=whole(name, ignored, 0))

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        return logits.penalize_repetition(scores, input_ids, cur_len, self.penalty, self.prompt_ignore_length)


@operands
class FlaxSequenceBiasLogitsProcessor(FlaxLogitsProcessor):
    """Adds biases to the tokens that would complete certain sequences.

    Attributes:
        sequence_bias: ``{(id, …): bias}`` or ``[[[id, …], bias], …]``. Kept as pairs of ids ``(sequences, length)``
            and biases ``(sequences,)``, one for every length; their numbers are part of the program.

    Raises:
        ValueError: for anything else, and at the call for ids outside the vocabulary.
    """

    sequence_bias: Any

    def __post_init__(self) -> None:
        set_fields(self, sequence_bias=by_length(biased_sequences("sequence_bias", self.sequence_bias)))

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        for sequences, bias in self.sequence_bias:
            if not is_traced(sequences):
                check_vocabulary("sequence_bias", sequences, scores.shape[-1])
            scores = logits.bias_sequences(scores, input_ids, cur_len, sequences, bias)
        return scores


def by_length(biases: dict[tuple[int, ...], float]) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Sequences of token ids of the same length and their biases, as arrays."""
    lengths = sorted({len(sequence) for sequence in biases})
    groups = [[(s, bias) for s, bias in biases.items() if len(s) == length] for length in lengths]
    return tuple(
        (
            on_device([sequence for sequence, _ in group], np.int32),
            on_device([bias for _, bias in group], np.float32),
        )
        for group in groups
    )


def check_vocabulary(name: str, sequences: jax.Array, vocab_size: int) -> None:
    largest = int(np.max(np.asarray(sequences), initial=0))
    check(name, largest, largest < vocab_size, f"made of token ids in [0, {vocab_size})")


@operands
class FlaxNoBadWordsLogitsProcessor(FlaxLogitsProcessor):
    """Certain sequences of tokens never come.

    Attributes:
        bad_words_ids: ``[[id, …], …]``. Kept as ids and biases as in :class:`FlaxSequenceBiasLogitsProcessor`.
        eos_token_id: one id or several; words that are only one of these are left out, as ends must be possible.

    Raises:
        ValueError: for anything else, and at the call for ids outside the vocabulary.
    """

    bad_words_ids: Any
    eos_token_id: Any = static(default=None)

    def __post_init__(self) -> None:
        words = bad_words("bad_words_ids", self.bad_words_ids)
        ends = [] if self.eos_token_id is None else token_list("eos_token_id", self.eos_token_id)
        biases = {tuple(word): NEGATIVE_INFINITY for word in words if word not in [[end] for end in ends]}
        # the ends have done their work, and would be ids in the program
        set_fields(self, bad_words_ids=by_length(biases), eos_token_id=None)

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        for sequences, bias in self.bad_words_ids:
            if not is_traced(sequences):
                check_vocabulary("bad_words_ids", sequences, scores.shape[-1])
            scores = logits.bias_sequences(scores, input_ids, cur_len, sequences, bias)
        return scores


@operands
class FlaxExponentialDecayLengthPenalty(FlaxLogitsProcessor):
    """Makes the end ever likelier after a number of new tokens.

    Attributes:
        exponential_decay_length_penalty: ``(start, factor)``: from ``start`` new tokens on, the score of the end grows
            by its magnitude times ``factor ** (new tokens - start) - 1``. Operands.
        eos_token_id: one id or several; operands.
        input_ids_seq_length: tokens of the prompt; an operand.

    Raises:
        ValueError: for anything else, and for lengths or ids below 0.
    """

    exponential_decay_length_penalty: Any
    eos_token_id: Any
    input_ids_seq_length: Any

    def __post_init__(self) -> None:
        name = "exponential_decay_length_penalty"
        start, factor = decay(name, self.exponential_decay_length_penalty)
        set_fields(
            self,
            exponential_decay_length_penalty=(start, factor),
            eos_token_id=token_ids("eos_token_id", self.eos_token_id),
            input_ids_seq_length=whole("input_ids_seq_length", self.input_ids_seq_length, 0),
        )

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        start, factor = self.exponential_decay_length_penalty
        steps = cur_len - (start + self.input_ids_seq_length)
        return logits.encourage_tokens(scores, self.eos_token_id, factor, steps)


def decay(name: str, value: Any) -> tuple[jax.Array, jax.Array]:
    """``(start, factor)`` as arrays.

    Raises:
        ValueError: unless ``start`` is a whole number of int32, at least 0, and ``factor`` a number above 0.
    """
    rule = "a pair (start, factor) of a whole number of at least 0 and below 2**31, and a number above 0"
    check(name, value, isinstance(value, list | tuple) and len(value) == 2, rule)
    start, factor = value
    check(name, value, is_whole(start) and 0 <= start < WHOLE_LIMIT and is_real(factor) and bool(factor > 0), rule)
    return on_device(start, np.int32), on_device(factor, np.float32)


@operands
class FlaxInfNanRemoveLogitsProcessor(FlaxLogitsProcessor):
    """NaN becomes 0, and infinities the largest and the smallest number."""

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        limits = jnp.finfo(scores.dtype)
        return jnp.nan_to_num(scores, nan=0.0, posinf=float(limits.max), neginf=float(limits.min))


@operands
class FlaxLogitNormalization(FlaxLogitsProcessor):
    """Scores become log-probabilities."""

    def __call__(self, input_ids: History, scores: Scores, cur_len: Length) -> Scores:
        return jax.nn.log_softmax(scores, axis=-1)
