"""The training of speech-language models on the trainer of Moshi: what differs is the data, the loss, the samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from ...checkpoints.configs import load_config
from ...checkpoints.files import Source
from ...checkpoints.writing import write_text
from ...modeling_flax_utils import FlaxPreTrainedModel
from ...models.speech_language.modeling_flax_speech_language import UNTRAINED
from ...models.speech_language.processing_speech_language import SpeechLanguageProcessor
from ..adapter import TrainedAdapter
from ..configuration import ConfigurationError
from ..data.loading import Loader
from ..train_state import TrainState, split_params
from ..train_step import make_eval_step
from ..trainer import Evaluation, Trainer, explained, in_all
from .examples import Examples, make_loader, read_examples, recordings_of
from .objective import ARRAYS, MASK, SpeechTextObjective
from .run_folder import SpeechTextRunFolder


class SpeechTextTrainer(Trainer):
    """A run that trains a speech-language model; see :class:`Trainer`."""

    folder_class = SpeechTextRunFolder
    counts = "tokens"

    @property
    def _objective(self) -> SpeechTextObjective:
        return SpeechTextObjective(ARRAYS if self.processor.whole_windows else (*ARRAYS, MASK))

    def _opened(self) -> Any:
        config = self.config
        explained("run.output_dir", lambda: self.folder.check(config))
        resumes = self.folder.has_checkpoints()
        key = "model.path" if config.model.path is not None else "model.config"
        source = explained(key, lambda: Source.locate(self.folder.model) if resumes else self._source())
        model = explained(key, lambda: self._without_params(source))
        self.processor = explained(key, lambda: SpeechLanguageProcessor.from_pretrained(source.folder or source.name))
        if self.processor.tokenizer.eos_token_id is None:
            raise ConfigurationError(f"`{key}`: the tokenizer has no end of text (eos_token), which ends answers")
        longest = model.text_config.max_position_embeddings
        if config.data.max_length > longest:
            raise ConfigurationError(
                f"`data.max_length`: {config.data.max_length} tokens are more than the model is made for "
                f"(max_position_embeddings = {longest}); give {longest} or less"
            )
        heard = self.processor.max_samples
        if heard is not None and config.data.max_seconds * self.processor.sampling_rate > heard:
            raise ConfigurationError(
                f"`data.max_seconds`: {config.data.max_seconds} s are more than the encoder hears at once; give "
                f"{heard / self.processor.sampling_rate:g} or less"
            )
        mesh, train, held_out = super()._opened()
        if share := config.data.evaluation_share:
            train, held_out = explained("data.evaluation_share", lambda: train.parted(share, config.run.seed))
        self._recordings = max(data.most_recordings for data in (train, held_out) if data is not None)
        return mesh, train, held_out

    def _without_params(self, source: Source) -> Any:
        model_class = self.folder.model_class(source)
        return model_class(load_config(model_class.known_configs(), source), _do_init=False)

    def _open(self, path: str) -> Examples:
        return read_examples(path, self.processor.audio_token)

    def _check(self, model: Any) -> None:
        pass  # all has been checked

    def _split(self, params: Any, adapter: TrainedAdapter | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        if adapter is not None:
            return adapter.split(params)
        never = [path for path in UNTRAINED if path in flatten_dict(dict(params), sep="/")]
        return split_params(params, (*self.config.model.freeze, *never))

    def _module(self, model: FlaxPreTrainedModel) -> Any:
        return model.module.clone(gradient_checkpointing=self.config.model.gradient_checkpointing)

    def _loader(self, model: FlaxPreTrainedModel, data: Examples, epochs: int | None) -> Loader:
        settings, run = self.config.data, self.config.run
        trains = epochs is None
        return make_loader(
            data,
            self.processor,
            # an evaluation runs as many rows at once as training does
            batch_size=settings.batch_size // (1 if trains else run.accumulation_steps),
            max_length=settings.max_length,
            max_seconds=settings.max_seconds,
            recordings=self._recordings,
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
                self._say(f"{key}: {len(data)} examples")

    def _evaluation(self, model: FlaxPreTrainedModel, shardings: Any) -> SpeechTextEvaluation:
        step = make_eval_step(self._module(model), self._objective, state_shardings=shardings)
        return SpeechTextEvaluation(self, model, step)


class SpeechTextEvaluation(Evaluation):
    """Losses of the held-out examples, and what the model answers to some of their prompts, greedily."""

    def _sample(self, state: TrainState, folder: Path, heed: Callable[[], None]) -> None:
        trainer, run = self._trainer, self._trainer.config.run
        if not run.samples:
            return
        held_out, params, lines = trainer._held_out, trainer._all_params(state), []
        rate, longest = trainer.processor.sampling_rate, trainer.config.data.max_seconds
        for example in held_out.lines[: run.samples]:
            heed()
            read = partial(recordings_of, example, rate, longest)
            heard = in_all(lambda read=read: explained("data.evaluation", read))
            inputs = trainer.processor(example.prompt, heard, rate)
            outputs = self._model.generate(
                **inputs,
                max_new_tokens=run.sample_tokens,
                eos_token_id=trainer.processor.tokenizer.eos_token_id,
                params=params,
            )
            new = np.asarray(outputs.sequences)[:, inputs["input_ids"].shape[1] :]
            said = trainer.processor.batch_decode(new)[0].strip()
            lines.append({"prompt": example.prompt, "answer": example.answer, "said": said})
        right = sum(line["said"] == line["answer"].strip() for line in lines)
        trainer._say(f"{folder.name}: {right} of {len(lines)} held-out answers are right")
        in_all(lambda: self._write(lines, folder) if trainer._is_first else None)

    def _write(self, lines: list[dict[str, str]], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "answers.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
