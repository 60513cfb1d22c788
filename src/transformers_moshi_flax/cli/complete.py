"""``moshi-flax complete``: a language model goes on with a text."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer
from jaxtyping import Int
from rich.console import Console

from transformers_moshi_flax.cli.checkpoints import (
    Dtype,
    load_with_tokenizer,
    name_of,
    read_config,
    source_of,
    with_notice,
)
from transformers_moshi_flax.cli.compilation_cache import use_compilation_cache
from transformers_moshi_flax.cli.console import progress_bar
from transformers_moshi_flax.cli.errors import UserMistake, as_mistake
from transformers_moshi_flax.cli.generate import lines
from transformers_moshi_flax.cli.options import (
    DtypeOption,
    Model,
    Seed,
    Temperature,
    TopK,
    TopP,
    sampling_options,
)
from transformers_moshi_flax.cli.timing import compilation_time
from transformers_moshi_flax.cli.watching import Watcher, stopped_by_interrupt

MOST_TOKENS = 1_000_000


def complete(
    model: Model = None,
    prompt: Annotated[str | None, typer.Option(help="How the text begins.")] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Ask line by line for how a text begins.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens to generate at most.")] = 64,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache",
            help="Run the whole text anew for every token, to see what the cache spares; draws are other ones.",
        ),
    ] = False,
    dtype: DtypeOption = None,
) -> None:
    """Complete a text with a language model: words are printed as they come, then tokens a second."""
    sampling = sampling_options(temperature, top_k, top_p, None, None)
    if (prompt is None) != interactive:
        raise UserMistake("--prompt, --interactive: give one of them")
    source = source_of(model)
    check_language_model(source)

    notes = Console(stderr=True, highlight=False)
    use_compilation_cache()
    with progress_bar(notes) as bar:
        stage = bar.add_task(f"loading {with_notice(source, name_of(source))}", total=None)
        writer = Writer.load(source, dtype)
        bar.remove_task(stage)
    if prompt is not None:
        _turn(writer, prompt, max_new_tokens, sampling, seed, no_cache, notes)
        return
    notes.print("Type how a text begins; quit ends.")
    for turn, line in enumerate(lines(notes)):
        if not _turn(writer, line, max_new_tokens, sampling, seed + turn, no_cache, notes):
            return


def check_language_model(source: str) -> None:
    """Raises ``UserMistake`` if ``source`` is no checkpoint of a language model."""
    from transformers_moshi_flax import FLAX_MODEL_FOR_CAUSAL_LM_MAPPING

    model_type = read_config("--model", source).get("model_type")
    known = FLAX_MODEL_FOR_CAUSAL_LM_MAPPING.model_types
    if model_type not in known:
        raise UserMistake(
            f"--model: {source!r} is a {model_type!r} checkpoint; give a language model ({', '.join(known)})"
        )


class Printer(Watcher):
    """Prints words as soon as they are whole, and counts tokens."""

    def __init__(self, tokenizer: Any):
        from transformers import TextStreamer

        super().__init__(lambda: None, self._count)
        self.tokens = 0
        self._words = TextStreamer(tokenizer, skip_prompt=False, skip_special_tokens=True)

    def _count(self, tokens: int) -> None:
        self.tokens += tokens

    def put(self, value: np.ndarray) -> None:
        if value.ndim == 1:
            self._words.put(value)
        super().put(value)

    def finish(self) -> None:
        """Prints what is left."""
        self._words.end()


@dataclass(frozen=True)
class Writer:
    """A loaded language model with its tokenizer."""

    source: str
    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, source: str, dtype: Dtype | None) -> Writer:
        """As :func:`~transformers_moshi_flax.cli.checkpoints.load_with_tokenizer`."""
        from transformers_moshi_flax import FlaxAutoModelForCausalLM

        return cls(source, *load_with_tokenizer(FlaxAutoModelForCausalLM, source, dtype))

    def prompt_ids(self, prompt: str) -> Int[np.ndarray, "1 tokens"]:
        """The ids of ``prompt``, behind the start token that the model has.

        Raises:
            UserMistake: there are none.
        """
        if self.model.extra_input_ids:
            ids = [self.model.config.vocab_size, *self.tokenizer.encode(prompt, add_special_tokens=False)]
        else:
            ids = self.tokenizer.encode(prompt)
        if not ids:
            raise UserMistake(f"--prompt: {prompt!r} has no tokens; give some words")
        return np.array([ids], np.int32)

    def write(
        self,
        ids: Int[np.ndarray, "1 tokens"],
        max_new_tokens: int,
        sampling: dict[str, Any],
        seed: int,
        no_cache: bool,
        printer: Printer,
    ) -> None:
        """Go on with ``ids``; ``printer`` gets the tokens and may end it early.

        Raises:
            UserMistake: an option does not fit the model.
        """
        import jax

        from transformers_moshi_flax.generation import StopGeneration

        key = jax.random.PRNGKey(seed)
        with as_mistake("cannot generate", ValueError):
            if not no_cache:
                self.model.generate(ids, max_new_tokens=max_new_tokens, prng_key=key, streamer=printer, **sampling)
                return
            ends = self.model.generation_defaults().eos_token_id
            ends = [] if ends is None else np.atleast_1d(ends).tolist()
            for number in range(max_new_tokens):
                step = jax.random.fold_in(key, number)
                ids = np.asarray(self.model.generate(ids, max_new_tokens=1, prng_key=step, **sampling).sequences)
                try:
                    printer.put(ids[:, -1])
                except StopGeneration:
                    return
                if ids[0, -1] in ends:
                    return


def _turn(
    writer: Writer,
    prompt: str,
    max_new_tokens: int,
    sampling: dict[str, Any],
    seed: int,
    no_cache: bool,
    notes: Console,
) -> bool:
    """Complete one text and say how fast; returns whether another may be begun."""
    ids = writer.prompt_ids(prompt)
    printer = Printer(writer.tokenizer)
    begin = time.perf_counter()
    with compilation_time() as compilation, stopped_by_interrupt(printer):
        writer.write(ids, max_new_tokens, sampling, seed, no_cache, printer)
    seconds = time.perf_counter() - begin - compilation.seconds
    printer.finish()
    told = (
        f"{printer.tokens} tokens, {printer.tokens / seconds:.1f} tokens/s {'without' if no_cache else 'with'} the "
        f"cache, after {compilation.seconds:.0f} s of compilation"
    )
    notes.print(with_notice(writer.source, told), soft_wrap=True)
    return not printer.terminated
