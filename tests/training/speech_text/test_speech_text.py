"""Training on recordings, prompts and answers: examples, batches, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import soundfile
from transformers import Wav2Vec2FeatureExtractor

from tests.configs import tiny_speech_language_config
from tests.training.text.runs import WORDS, write_tokenizer
from transformers_moshi_flax import (
    FlaxSpeechLanguageModel,
    LoraConfig,
    SpeechLanguageConfig,
    SpeechLanguageProcessor,
)
from transformers_moshi_flax.training.configuration import ConfigurationError, build_configuration
from transformers_moshi_flax.training.run_folder import export_checkpoint
from transformers_moshi_flax.training.speech_text.examples import Examples, make_loader, read_examples
from transformers_moshi_flax.training.speech_text.objective import ARRAYS, MASK, SpeechTextObjective
from transformers_moshi_flax.training.trainer import make_trainer

RATE, KINDS = 16_000, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A joined model with its processor, and tones whose pitch is the answer; the last example has two."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = write_tokenizer(folder / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<audio>"]})
    config = tiny_speech_language_config("wav2vec2", audio_token_id=WORDS, stack_factor=4, stack_stride=None)
    for name in ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop"):
        setattr(config.audio_config, name, 0.0)
    config.audio_config.mask_time_prob = 0.0
    config.save_pretrained(folder / "model")
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    SpeechLanguageProcessor.for_model(config, extractor, tokenizer).save_pretrained(folder / "model")
    lines = []
    for number in range(12):
        kind = number % KINDS
        tone = 0.5 * np.sin(2 * np.pi * 400 * (1 + kind) * np.arange(320 + 10 * number) / RATE)
        soundfile.write(folder / f"{number}.wav", tone, RATE)
        lines.append({"audio": f"{number}.wav", "prompt": "<audio> w1", "answer": f"w{kind + 2}"})
    lines.append({"audio": ["0.wav", "1.wav"], "prompt": "<audio> w1 <audio>", "answer": "w2 w3"})
    write_lines(folder / "train.jsonl", lines)
    return folder


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def values(folder: Path, **overrides: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "task": "speech_text",
        "model": {"config": str(folder / "model")},
        "data": {"train": str(folder / "train.jsonl"), "evaluation_share": 0.2, "max_length": 24, "batch_size": 4}
        | {"max_seconds": 0.03},
        "optimizer": {"learning_rate": 3e-3, "schedule": "constant"},
        "run": {"output_dir": str(folder / "run"), "steps": 12, "log_every": 4, "samples": 2, "sample_tokens": 3},
    }
    for name, value in overrides.items():
        section, _, key = name.partition("__")
        found.setdefault(section, {})[key] = value
    return found


def test_batches(folder: Path):
    """Answers alone have labels, a token before; what is not there has no tokens."""
    processor = SpeechLanguageProcessor.from_pretrained(folder / "model")
    examples = read_examples(folder / "train.jsonl", "<audio>")
    options = {"batch_size": 8, "max_length": 24, "max_seconds": 0.03, "recordings": 2, "shuffle": False, "epochs": 1}
    first, second = make_loader(examples, processor, **options)
    assert first["audio"].shape == first["audio_attention_mask"].shape == (8, 2, 480)
    counts = [processor.num_audio_tokens(320 + 10 * number) for number in range(8)]
    np.testing.assert_array_equal(first["audio_counts"], [[count, 0] for count in counts])
    for row, count in enumerate(counts):
        ids, labels = first["input_ids"][row].tolist(), first["labels"][row].tolist()
        assert ids[: count + 2] == [WORDS] * count + [1, 2 + row % KINDS]
        assert labels[: count + 3] == [-100] * count + [2 + row % KINDS, 0, -100]
        assert (first["audio_attention_mask"][row].sum(axis=1) == [320 + 10 * row, 480]).all()
    assert second["audio_counts"][4].all() and not second["audio_counts"][5:].any()
    assert (second["labels"][5:] == -100).all()
    kept, held = examples.parted(0.2, 0)
    assert len(kept) == 10 and len(held) == 3 and {*kept.lines, *held.lines} == {*examples.lines}


def test_loss(folder: Path):
    """That of what the model says itself where answers are, also of rows with room for more recordings."""
    processor = SpeechLanguageProcessor.from_pretrained(folder / "model")
    examples = Examples(read_examples(folder / "train.jsonl", "<audio>").lines[:3])
    options = {"batch_size": 4, "max_length": 24, "max_seconds": 0.03, "recordings": 2, "shuffle": False, "epochs": 1}
    batch = next(make_loader(examples, processor, **options))
    model = FlaxSpeechLanguageModel(SpeechLanguageConfig.from_pretrained(folder / "model"))
    objective = SpeechTextObjective((*ARRAYS, MASK))
    loss, sums = jax.jit(lambda params, batch: objective.loss(model.module, params, batch))(model.params, batch)
    heard = {"input_values": batch["audio"][:3, 0], "audio_attention_mask": batch["audio_attention_mask"][:3, 0]}
    logits = np.asarray(model(batch["input_ids"][:3], **heard).logits, np.float64)
    rows, places = np.nonzero(batch["labels"][:3] != -100)
    chances = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    expected = -np.log(chances[rows, places, batch["labels"][rows, places]]).mean()
    assert sums["tokens"] == 6
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_run_and_an_adapter_of_its_model(folder: Path):
    """What it exports answers; then an adapter beside quantized weights, with the projector."""
    metrics = make_trainer(build_configuration(values(folder))).train()
    log = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "grad_norm" in line]
    assert losses[-1] < losses[0] and metrics["tokens"] >= 6
    answers = (folder / "run" / "samples" / "step-12" / "answers.jsonl").read_text().splitlines()
    assert [*json.loads(answers[0])] == ["prompt", "answer", "said"] and len(answers) == 2
    export = folder / "run" / "export"
    assert export_checkpoint(folder / "run", folder / "mine") == 12
    assert type(FlaxSpeechLanguageModel.from_pretrained(folder / "mine").config) is SpeechLanguageConfig
    overrides = {"model__quantization": "nf4", "model__quantization_group_size": 2, "run__steps": 1, "run__samples": 0}
    config = values(folder, **overrides, run__output_dir=str(folder / "adapter"))
    config["model"].pop("config")
    config["model"]["path"] = str(export)
    config["adapter"] = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]}
    make_trainer(build_configuration(config)).train()
    model = FlaxSpeechLanguageModel.from_pretrained(export)
    model.load_adapter(folder / "adapter" / "export", verify_base=False)
    assert isinstance(model.peft_config["default"], LoraConfig)
    changed = model.adapter_leaves()["multi_modal_projector/linear_1/kernel"]
    assert np.abs(np.asarray(changed - model.params["multi_modal_projector"]["linear_1"]["kernel"])).max() > 1e-4
    inputs = SpeechLanguageProcessor.from_pretrained(export)("<audio> w1", np.zeros(400, np.float32), RATE)
    assert model.generate(**inputs, max_new_tokens=2).sequences.shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 1: no JSON"),
        ({"prompt": "<audio>", "answer": "w1"}, "line 1: `audio` must be a path or a list of paths"),
        ({"audio": "0.wav", "prompt": "<audio>"}, "line 1: `prompt` and `answer` must be texts"),
        ({"audio": "0.wav", "prompt": "w1", "answer": "w1"}, "`prompt` has 0 '<audio>', but there are 1"),
        ({"audio": "gone.wav", "prompt": "<audio>", "answer": "w1"}, "gone.wav' is no file; paths are relative"),
    ],
)
def test_lines_that_are_refused(line: Any, message: str, folder: Path, tmp_path: Path):
    path = tmp_path / "train.jsonl"
    path.write_text(line if isinstance(line, str) else json.dumps(line))
    (tmp_path / "0.wav").write_bytes((folder / "0.wav").read_bytes())
    with pytest.raises(ValueError, match=message):
        read_examples(path, "<audio>")
    for other, told in ((tmp_path / "none.jsonl", "is no file"), (write_lines(path, []), "has no lines")):
        with pytest.raises(ValueError, match=told):
            read_examples(other, "<audio>")


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"model__scan_layers": True}, "`model.scan_layers`: the layers of a joined model cannot be scanned"),
        ({"data__max_seconds": 0.0}, "`data.max_seconds`: 0.0 seconds have no audio"),
        ({"data__evaluation_share": 0.0}, "`run.samples`: held-out prompts are answered; set data.evaluation"),
        ({"data__max_length": 500}, "`data.max_length`: 500 tokens are more than the model is made for"),
        ({"model__config": "nowhere"}, "`model.config`"),
        ({"model__freeze": [".*"]}, "`model.freeze`.*leaves no parameter to train"),
        ({"data__max_length": 4}, "more than data.max_length = 4; raise it"),
    ],
)
def test_runs_that_are_refused(overrides: dict[str, Any], message: str, folder: Path, tmp_path: Path):
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(build_configuration(values(folder, **overrides, run__output_dir=str(tmp_path / "run")))).train()


def test_one_example_cannot_be_parted(folder: Path):
    one = Examples(read_examples(folder / "train.jsonl", "<audio>").lines[:1])
    with pytest.raises(ValueError, match="there is one only; give more"):
        one.parted(0.5, 0)
