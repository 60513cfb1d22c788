"""The training of language models on the trainer of Moshi: what differs is the data, the loss, and the samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from ...checkpoints.configs import load_config
from ...checkpoints.files import Source
from ...checkpoints.writing import write_text
from ...modeling_flax_utils import FlaxPreTrainedModel
from ..configuration import ConfigurationError
from ..data.loading import Loader
from ..evaluation import Heeding
from ..train_state import TrainState
from ..train_step import make_eval_step
from ..trainer import Evaluation, Trainer, explained, in_all
from .objective import TextObjective
from .packing import PackingPlan, make_loader
from .run_folder import TextRunFolder
from .texts import Texts, tokenized

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class TextTrainer(Trainer):
    """A run that trains a language model; see :class:`Trainer`."""

    folder_class = TextRunFolder
    counts = "tokens"

    @property
    def _objective(self) -> TextObjective:
        return TextObjective()

    def _opened(self) -> Any:
        config = self.config
        explained("run.output_dir", lambda: self.folder.check(config))
        resumes = self.folder.has_checkpoints()
        key = "model.path" if config.model.path is not None else "model.config"
        source = explained(key, lambda: Source.locate(self.folder.model) if resumes else self._source())
        model = explained(key, lambda: self._without_params(source))
        place = source if resumes else explained("model.tokenizer", lambda: self._companions(source))
        self._tokenizer = explained("model.tokenizer", lambda: read_tokenizer(place))
        self._vocab_size = model.config.vocab_size
        self._start = self._vocab_size if model.extra_input_ids else None
        longest = model.config.max_position_embeddings
        if config.data.max_length > longest:
            raise ConfigurationError(
                f"`data.max_length`: {config.data.max_length} tokens are more than the model is made for "
                f"(max_position_embeddings = {longest}); give {longest} or less"
            )
        if config.model.scan_layers and len(set(getattr(model.cache_sizes, "layers", ()))) > 1:
            raise ConfigurationError(
                "`model.scan_layers`: one layer is run in a loop, but this model has several kinds (`layer_types`); "
                "leave it false"
            )
        self.prompts = [self._prompt_ids(prompt, longest) for prompt in config.run.prompts]
        mesh, train, held_out = super()._opened()
        if share := config.data.evaluation_share:
            train, held_out = explained("data.evaluation_share", lambda: train.parted(share, config.run.seed))
        return mesh, train, held_out

    def _without_params(self, source: Source) -> Any:
        model_class = self.folder.model_class(source)
        return model_class(load_config(model_class.known_configs(), source), _do_init=False)

    def _companions(self, source: Source) -> Source:
        given = self.config.model.tokenizer
        return source if given is None else Source.locate(given)

    def _prompt_ids(self, prompt: str, longest: int) -> Int[np.ndarray, "1 tokens"]:
        ids = self._tokenizer.encode(prompt, add_special_tokens=self._start is None)
        ids = ids if self._start is None else [self._start, *ids]
        if not ids:
            raise ConfigurationError(f"`run.prompts`: {prompt!r} has no tokens; give some words")
        if len(ids) + self.config.run.sample_tokens > longest:
            raise ConfigurationError(
                f"`run.prompts`: {prompt!r:.80} has {len(ids)} tokens, which with run.sample_tokens = "
                f"{self.config.run.sample_tokens} are more than max_position_embeddings = {longest}; give less"
            )
        return np.array([ids], np.int32)

    def _open(self, path: str) -> Texts:
        return tokenized(path, self._tokenizer, self._vocab_size, self._start)

    def _check(self, model: Any) -> None:
        pass  # all has been checked

    def _loader(self, model: FlaxPreTrainedModel, data: Texts, epochs: int | None) -> Loader:
        settings, run = self.config.data, self.config.run
        trains = epochs is None
        return make_loader(
            data,
            # an evaluation runs as many rows at once as training does
            batch_size=settings.batch_size // (1 if trains else run.accumulation_steps),
            max_length=settings.max_length,
            seed=run.seed,
            shuffle=settings.shuffle and trains,
            epochs=epochs,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=settings.workers if trains else 0,
        )

    def _tell_dropped(self, loader: Loader) -> None:
        for key, data in (("data.train", self._train_data), ("held out", self._held_out)):
            if data is not None:
                self._say(f"{key}: {len(data)} texts, {len(data.tokens)} tokens")
        plan: PackingPlan = loader.plan
        filled = plan.length.sum() / (plan.rows * plan.max_length)
        self._say(f"an epoch has {plan.rows} rows, {filled:.1%} of them filled, in {plan.batches_per_epoch} steps")

    def _evaluation(self, model: FlaxPreTrainedModel, shardings: Any) -> TextEvaluation:
        step = make_eval_step(self._module(model), self._objective, state_shardings=shardings)
        return TextEvaluation(self, model, step)

    def decoded(self, ids: Int[np.ndarray, "tokens"]) -> str:
        """The text of tokens."""
        return self._tokenizer.decode([token for token in ids.tolist() if token != self._start])


class TextEvaluation(Evaluation):
    """Losses of the held-out texts, and what the model makes of ``run.prompts``."""

    def _sample(self, state: TrainState, folder: Path, heed: Callable[[], None]) -> None:
        trainer, run = self._trainer, self._trainer.config.run
        samples = run.sample_temperature > 0
        texts = []
        for number, ids in enumerate(trainer.prompts):
            heed()
            generated = self._model.generate(
                ids,
                max_new_tokens=run.sample_tokens,
                num_beams=1,
                do_sample=samples,
                **({"temperature": run.sample_temperature} if samples else {}),
                prng_key=jax.random.fold_in(jax.random.key(run.seed), number),
                params=trainer._all_params(state),
                # several processes must heed at the same places
                streamer=Heeding(heed) if jax.process_count() == 1 else None,
            )
            texts.append(trainer.decoded(np.asarray(generated.sequences)[0]))
        in_all(lambda: self._write(texts, folder) if trainer._is_first and texts else None)

    def _write(self, texts: list[str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number, text in enumerate(texts):
            write_text(folder / f"{number}.txt", text + "\n")


def read_tokenizer(source: Source) -> Any:
    """The tokenizer that lies at ``source``; ValueError if there is none."""
    if not any(map(source.find, TOKENIZER_FILES)):
        raise ValueError(
            source.absence(*TOKENIZER_FILES)
            or f"{source.name!r} has no tokenizer; name the directory of one, or its id on the Hub"
        )
    from transformers import AutoTokenizer  # only here: it imports a lot

    return AutoTokenizer.from_pretrained(source.folder or source.name)
