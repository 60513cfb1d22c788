"""Text and voices are laid on frames as documented, and ``generate`` takes and gives back what the processor makes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import HfApi
from transformers import AutoTokenizer, EncodecFeatureExtractor, ProcessorMixin

from tests.configs import tiny_moshi_config
from tests.hub_server import hub_server
from tests.random_model import RANDOM_MODEL
from tests.test_package import NO_TORCH, run
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.checkpoints.files import CheckpointNotFoundError
from transformers_moshi_flax.generation.utils import FlaxGreedySearchOutput
from transformers_moshi_flax.models.moshi.generation_flax_moshi import FlaxMoshiGenerateOutput
from transformers_moshi_flax.models.moshi.kyutai_flax_moshi import MIMI_NAME, MOSHI_NAME
from transformers_moshi_flax.models.moshi.processing_moshi import MoshiProcessor

FRAME, PAD, END_OF_PAD, START = 16, 3, 0, 270
YOU, TO = 17, 18
RATE = 24_000


@pytest.fixture(scope="module")
def processor() -> MoshiProcessor:
    """Of 16 samples a frame."""
    return MoshiProcessor.from_pretrained(RANDOM_MODEL, frame_size=FRAME)


def voice(samples: int, fill: float = 0.5) -> np.ndarray:
    return np.full(samples, fill, np.float32)


def filled(stream: np.ndarray) -> list[int]:
    """Where a waveform is not silent, ``[start, end]``; it must be one piece."""
    (places,) = np.nonzero(stream)
    assert len(places) == places[-1] - places[0] + 1
    return [int(places[0]), int(places[-1]) + 1]


def test_rows_of_different_length(processor: MoshiProcessor) -> None:
    inputs = processor(
        text=["you to", None, "you"],
        user_audio=[voice(40), voice(16), None],
        moshi_audio=[None, voice(65, 0.25), voice(1, 0.25)],
        sampling_rate=RATE,
    )
    assert inputs["input_ids"].tolist() == [
        [PAD, PAD, PAD, YOU, TO],
        [PAD, PAD, PAD, PAD, PAD],
        [PAD, PAD, PAD, PAD, YOU],
    ]
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
    user, moshi = inputs["user_input_values"], inputs["moshi_input_values"]
    assert user.shape == moshi.shape == (3, 1, 5 * FRAME)
    assert [filled(user[row, 0]) for row in (0, 1)] == [[2 * FRAME, 2 * FRAME + 40], [0, 16]]
    assert [filled(moshi[row, 0]) for row in (1, 2)] == [[0, 65], [4 * FRAME, 4 * FRAME + 1]]
    assert not user[2].any() and not moshi[0].any()
    assert set(np.unique(user)) == {0, 0.5} and set(np.unique(moshi)) == {0, 0.25}
    assert [array.dtype for array in inputs.values()] == [np.int32, np.float32, np.float32, np.int32]
    assert list(inputs) == processor.model_input_names


def test_padding_on_the_right(processor: MoshiProcessor) -> None:
    inputs = processor("you", [voice(32), voice(48)], sampling_rate=RATE, padding_side="right")
    assert inputs["input_ids"].tolist() == [[PAD, YOU, PAD], [PAD, PAD, YOU]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert [filled(row[0]) for row in inputs["user_input_values"]] == [[0, 32], [0, 48]]


@pytest.mark.parametrize(("samples", "frames"), [(1, 1), (FRAME, 1), (FRAME + 1, 2)])
def test_whole_frames(processor: MoshiProcessor, samples: int, frames: int) -> None:
    inputs = processor(moshi_audio=voice(samples), sampling_rate=RATE)
    assert inputs["moshi_input_values"].shape == (1, 1, frames * FRAME)
    assert inputs["input_ids"].tolist() == [[PAD] * frames]


def test_text_longer_than_audio(processor: MoshiProcessor) -> None:
    inputs = processor("you to you", voice(FRAME), sampling_rate=RATE)
    assert inputs["input_ids"].tolist() == [[YOU, TO, YOU]]
    assert filled(inputs["user_input_values"][0, 0]) == [0, FRAME]


def test_text_alone(processor: MoshiProcessor) -> None:
    inputs = processor(["you", "you to"])
    assert inputs["input_ids"].tolist() == [[PAD, YOU], [YOU, TO]]
    assert inputs["attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert inputs["user_input_values"].shape == (2, 1, 2 * FRAME) and not inputs["user_input_values"].any()


@pytest.mark.parametrize("ids", [[[YOU, PAD, TO], [START, YOU]], [np.array([YOU, PAD, TO]), np.array([START, YOU])]])
def test_ids_are_aligned_from_the_first_frame(processor: MoshiProcessor, ids: list[Any]) -> None:
    inputs = processor(input_ids=ids, user_audio=[voice(16), voice(64)], sampling_rate=RATE)
    assert inputs["input_ids"].tolist() == [[PAD, YOU, PAD, TO], [START, YOU, PAD, PAD]]
    assert inputs["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("ids", [np.array([[YOU, TO]] * 2), np.array([YOU, TO]), [YOU, TO]])
def test_ids_as_one_array(processor: MoshiProcessor, ids: Any) -> None:
    inputs = processor(input_ids=ids, user_audio=[voice(16)] * 2, sampling_rate=RATE)
    assert inputs["input_ids"].tolist() == [[YOU, TO]] * 2


@pytest.mark.parametrize(
    "audio",
    [[0.5, 0.5], np.full(2, 0.5), np.full(2, 0.5, np.float16), jnp.full(2, 0.5, jnp.bfloat16)],
    ids=["list", "float64", "float16", "bfloat16"],
)
def test_kinds_of_audio(processor: MoshiProcessor, audio: Any) -> None:
    for given in (audio, [audio]):
        values = processor(user_audio=given, sampling_rate=RATE)["user_input_values"]
        assert values.dtype == np.float32 and values[0, 0, :3].tolist() == [0.5, 0.5, 0]


def test_jax_arrays(processor: MoshiProcessor) -> None:
    inputs = processor("you", return_tensors="jax")
    assert all(isinstance(array, jax.Array) for array in inputs.values())
    assert inputs["input_ids"].tolist() == [[YOU]]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "row 0 has neither"),
    "empty text": ({"text": ["you", ""]}, "row 1 has neither"),
    "no rows": ({"text": []}, "'text': 0"),
    "both texts": ({"text": "you", "input_ids": [YOU]}, "`text` and `input_ids`"),
    "unknown character": ({"text": "you 中"}, "`text`.*中"),
    "batches differ": ({"text": ["you"] * 3, "user_audio": [voice(3)] * 2}, "'text': 3, 'user_audio': 2"),
    "no sampling rate": ({"user_audio": voice(3), "sampling_rate": None}, "`sampling_rate` is missing"),
    "other sampling rate": ({"user_audio": voice(3), "sampling_rate": 16_000}, "16000.*24000"),
    "stereo": ({"user_audio": np.zeros((2, 9), np.float32)}, r"`user_audio\[0\]`.*\(2, 9\): mono"),
    "stereo in a list": ({"moshi_audio": [voice(3), np.zeros((9, 2), np.float32)]}, r"`moshi_audio\[1\]`.*\(9, 2\)"),
    "empty audio": ({"moshi_audio": voice(0)}, r"`moshi_audio\[0\]`.*\(0,\)"),
    "integers": ({"user_audio": np.ones(3, np.int16)}, r"`user_audio\[0\]`.*int16"),
    "NaN": ({"user_audio": [voice(3), voice(3, np.nan)]}, r"`user_audio\[1\]`.*NaN"),
    "infinite": ({"user_audio": voice(3, -np.inf)}, r"`user_audio\[0\]`.*infinite"),
    "too large for float32": ({"user_audio": np.full(3, 1e300)}, r"`user_audio\[0\]`.*1e\+300"),
    "id above": ({"input_ids": [START + 1]}, "`input_ids`.*271"),
    "id below": ({"input_ids": [-1]}, "`input_ids`.*-1"),
    "ids are floats": ({"input_ids": np.ones(3)}, "`input_ids`.*float64"),
    "rank of ids": ({"input_ids": np.ones((1, 1, 3), np.int32)}, "`input_ids`"),
    "no ids": ({"input_ids": [np.ones(0, np.int32)]}, "`input_ids`"),
    "padding side": ({"text": "you", "padding_side": "top"}, "`padding_side`.*'top'"),
    "tensors": ({"text": "you", "return_tensors": "pt"}, "`return_tensors`.*'pt'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(processor: MoshiProcessor, name: str) -> None:
    arguments, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        processor(**{"sampling_rate": RATE, **arguments})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame_size": 0}, "`frame_size`.*0"),
        ({"pad_token_id": 270}, "`pad_token_id`=270.*270"),
        ({"end_of_pad_token_id": -1}, "`end_of_pad_token_id`=-1"),
    ],
)
def test_bad_options(processor: MoshiProcessor, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoshiProcessor(processor.feature_extractor, processor.tokenizer, **options)


def test_stereo_feature_extractor(processor: MoshiProcessor) -> None:
    with pytest.raises(ValueError, match="feature_size=2"):
        MoshiProcessor(EncodecFeatureExtractor(feature_size=2), processor.tokenizer)


def test_decode_leaves_out_what_is_no_word(processor: MoshiProcessor) -> None:
    ids = [START, PAD, END_OF_PAD, YOU, PAD, TO, START + 5, -100, 2, PAD]
    assert processor.decode(ids) == "you to"
    assert processor.decode(ids, skip_special_tokens=False) == "you to</s>"
    assert processor.batch_decode(np.array([ids, [PAD] * 10])) == ["you to", ""]
    with pytest.raises(ValueError, match=r"`token_ids`.*\(1, 10\).*batch_decode"):
        processor.decode(np.array([ids]))


def test_decode_outputs(processor: MoshiProcessor) -> None:
    outputs = FlaxMoshiGenerateOutput(
        sequences=jnp.array([[START, YOU, TO, TO], [START, PAD, YOU, TO]]),
        sequence_lengths=jnp.array([2, 4]),
        audio_sequences=jnp.arange(2 * 3 * FRAME, dtype=jnp.float32).reshape(2, 1, 3 * FRAME),
        audio_lengths=jnp.array([1, 3]),
    )
    assert processor.batch_decode(outputs) == ["you", "you to"]
    first, second = processor.decode_audio(outputs)
    np.testing.assert_array_equal(first, np.arange(FRAME))
    np.testing.assert_array_equal(second, np.arange(3 * FRAME, 6 * FRAME))
    assert first.dtype == second.dtype == np.float32
    assert processor.batch_decode(FlaxGreedySearchOutput(sequences=jnp.array([[YOU, TO, TO]]))) == ["you to to"]
    with pytest.raises(ValueError, match="return_audio_waveforms"):
        processor.decode_audio(FlaxMoshiGenerateOutput(sequences=outputs.sequences))


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(RANDOM_MODEL)
    extractor = EncodecFeatureExtractor(sampling_rate=16_000)
    saved = MoshiProcessor(extractor, tokenizer, frame_size=FRAME, pad_token_id=5, end_of_pad_token_id=6)
    saved.save_pretrained(tmp_path / "processor")
    loaded = MoshiProcessor.from_pretrained(tmp_path / "processor")
    assert isinstance(loaded, ProcessorMixin)
    assert loaded.to_dict() == saved.to_dict()
    assert (loaded.frame_size, loaded.pad_token_id, loaded.end_of_pad_token_id) == (FRAME, 5, 6)
    before = saved("you", voice(40), sampling_rate=16_000)
    after = loaded("you", voice(40), sampling_rate=16_000)
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])


def test_subfolder(processor: MoshiProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path / "part")
    assert MoshiProcessor.from_pretrained(tmp_path, subfolder="part").frame_size == FRAME


def test_a_save_that_fails_leaves_what_was_there(
    processor: MoshiProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, for one; and a link is replaced, so that what it leads to stays."""
    shared = tmp_path / "shared.json"
    processor.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/tokenizer.json").rename(shared)
    (tmp_path / "saved/tokenizer.json").symlink_to(shared)
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}

    def write_half(self: Any, path: str) -> None:
        Path(path).write_text("{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(ProcessorMixin, "to_json_file", write_half)
        processor.save_pretrained(tmp_path / "saved")
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    shared.write_text("{}")
    processor.save_pretrained(tmp_path / "saved")
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    assert shared.read_text() == "{}"
    with pytest.raises(ValueError, match=r"commit_message='done' has no effect without push_to_hub=True"):
        processor.save_pretrained(tmp_path / "saved", commit_message="done")


def test_keywords_of_loading(tmp_path: Path) -> None:
    assert (
        MoshiProcessor.from_pretrained(
            RANDOM_MODEL, trust_remote_code=False, use_fast=True, padding_side="left", proxies=None
        ).tokenizer.padding_side
        == "left"
    )
    with pytest.raises(ValueError, match=r"has no keyword argument 'frame_sise'; did you mean 'frame_size'\?"):
        MoshiProcessor.from_pretrained(RANDOM_MODEL, frame_sise=48)
    with pytest.raises(ValueError, match=r"MoshiProcessor\.from_kyutai has no keyword argument 'revison'; did you"):
        MoshiProcessor.from_kyutai(tmp_path, revison="main")
    with pytest.raises(ValueError, match=r"proxies=.* cannot be followed"):
        MoshiProcessor.from_pretrained(RANDOM_MODEL, proxies={"http": "http://localhost:9"})


def test_save_to_a_file(processor: MoshiProcessor, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        processor.save_pretrained(tmp_path / "file")


def test_checkpoint_without_its_own_configuration(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(RANDOM_MODEL / name, tmp_path)
    loaded = MoshiProcessor.from_pretrained(tmp_path)
    assert (loaded.frame_size, loaded.pad_token_id, loaded.end_of_pad_token_id) == (1920, PAD, END_OF_PAD)

    # with a model beside it, its Mimi tells the frame size
    tiny_moshi_config().save_pretrained(tmp_path)
    assert MoshiProcessor.from_pretrained(tmp_path).frame_size == FRAME
    assert MoshiProcessor.from_pretrained(tmp_path, frame_size=32).frame_size == 32


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_files_of_another_codec(tmp_path: Path, file: str) -> None:
    """What lies beside a Mimi must make the audio that it hears."""
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(RANDOM_MODEL / name, tmp_path)
    config = tiny_moshi_config()
    config.save_pretrained(tmp_path)
    if file == "preprocessor_config.json":
        values, message = {"sampling_rate": 16_000}, f"sampling rate 16000.*{config.sampling_rate}"
    else:
        values, message = {"frame_size": 48}, f"frame size 48.*{FRAME}"
    path = tmp_path / file
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **values}))
    with pytest.raises(ValueError, match=message):
        MoshiProcessor.from_pretrained(tmp_path)
    # a configuration that is no model of ours says nothing about it
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    (tmp_path / "processor_config.json").write_text('{"frame_size": 48}')
    assert MoshiProcessor.from_pretrained(tmp_path).frame_size == 48


def test_hub(processor: MoshiProcessor, tmp_path: Path) -> None:
    with hub_server() as hub, hub.client(tmp_path / "home"):
        processor.save_pretrained(tmp_path / "saved", push_to_hub=True, private=True, token=hub.token)
        assert hub.files("tester/saved") == {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
        first = processor.push_to_hub("tester/pushed", private=True, token=hub.token).oid
        MoshiProcessor(processor.feature_extractor, processor.tokenizer, frame_size=48).push_to_hub(
            "tester/pushed", token=hub.token
        )
        with pytest.raises(OSError, match="tester/pushed"):
            MoshiProcessor.from_pretrained("tester/pushed")
        found = {
            revision: MoshiProcessor.from_pretrained("tester/pushed", revision=revision, token=hub.token).frame_size
            for revision in ("main", first)
        }
        assert found == {"main": 48, first: FRAME}
        again = MoshiProcessor.from_pretrained("tester/pushed", use_auth_token=hub.token, cache_dir=tmp_path / "new")
        assert again.frame_size == 48
        again = MoshiProcessor.from_pretrained("tester/pushed", revision=first, local_files_only=True)
        assert again.to_dict() == processor.to_dict()


def test_what_is_to_be_private_is_not_published(processor: MoshiProcessor, tmp_path: Path) -> None:
    with hub_server() as hub, hub.client(tmp_path / "home"):
        processor.push_to_hub("tester/saved", token=hub.token, use_temp_dir=True, tags=["speech"])
        before = dict(hub.repos["tester/saved"].heads)
        with pytest.raises(ValueError, match=r"private=True, but .*'tester/saved' is public"):
            processor.push_to_hub("tester/saved", token=hub.token, private=True, revision="draft")
        with pytest.raises(ValueError, match=r"private=True, but .*'tester/saved' is public"):
            processor.save_pretrained(tmp_path / "saved", push_to_hub=True, private=True, token=hub.token)
        with pytest.raises(ValueError, match=r"tags='' is no tag"):
            processor.push_to_hub("tester/other", token=hub.token, tags=[""])
        with pytest.raises(ValueError, match=r"revision='a draft' is no name"):
            processor.push_to_hub("tester/other", token=hub.token, revision="a draft")
        assert hub.repos["tester/saved"].heads == before and set(hub.repos) == {"tester/saved"}


def test_why_there_is_no_processor(tmp_path: Path) -> None:
    with hub_server() as hub, hub.client(tmp_path / "home"):
        with pytest.raises(OSError, match=r"'tester/none' gives no processor: .* is not in the cache, and the Hub is"):
            MoshiProcessor.from_pretrained("tester/none", local_files_only=True)
        with pytest.raises(OSError, match=r"'tester/none' is neither a directory here nor a repository of the Hub"):
            MoshiProcessor.from_pretrained("tester/none")


def test_upstream_checkpoint_on_the_hub(tmp_path: Path) -> None:
    with hub_server() as hub, hub.client(tmp_path):
        api = HfApi(token=hub.token)
        api.create_repo("tester/moshiko", private=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
            api.upload_file(repo_id="tester/moshiko", path_in_repo=f"part/{name}", path_or_fileobj=RANDOM_MODEL / name)
        config = tiny_moshi_config().to_json_string().encode()
        api.upload_file(repo_id="tester/moshiko", path_in_repo="part/config.json", path_or_fileobj=config)
        loaded = MoshiProcessor.from_pretrained("tester/moshiko", subfolder="part", token=hub.token)
    assert loaded.frame_size == FRAME
    assert loaded.decode([YOU, PAD, TO]) == "you to"


@pytest.mark.parametrize("lost", ["tokenizer.json", "preprocessor_config.json"])
def test_missing_part(tmp_path: Path, lost: str) -> None:
    for name in {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} - {lost}:
        shutil.copy(RANDOM_MODEL / name, tmp_path)
    with pytest.raises((OSError, ValueError), match=str(tmp_path)):
        MoshiProcessor.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def generate() -> Callable[..., FlaxMoshiGenerateOutput]:
    """Greedy generation of three frames by the embedded checkpoint."""
    model = FlaxMoshiForConditionalGeneration.from_pretrained(RANDOM_MODEL)

    def reply(inputs: Any) -> FlaxMoshiGenerateOutput:
        return model.generate(**inputs, max_new_tokens=3, do_sample=False, depth_decoder_do_sample=False)

    return reply


def test_generate(generate: Callable[..., FlaxMoshiGenerateOutput]) -> None:
    processor = MoshiProcessor.from_pretrained(RANDOM_MODEL)
    text, frame = ["you to", "you"], processor.frame_size
    inputs = processor(text, [voice(3 * frame), voice(frame)], sampling_rate=RATE)
    outputs = generate(inputs)
    sequences = np.asarray(outputs.sequences)
    np.testing.assert_array_equal(sequences[:, 1:4], inputs["input_ids"])
    assert sequences.shape == (2, 7)
    assert all(whole.startswith(prompt) for whole, prompt in zip(processor.batch_decode(outputs), text))
    assert any(processor.batch_decode(sequences[:, 4:]))
    audio = processor.decode_audio(outputs)
    # in the columns of the text; the padding is silent
    assert [samples.shape for samples in audio] == [((3 + 3 - 1) * frame,)] * 2
    assert not np.any(audio[1][: 2 * frame]) and np.any(audio[1][2 * frame :])
    for samples, row in zip(audio, outputs.audio_sequences[:, 0]):
        np.testing.assert_array_equal(samples, row[: samples.size])
        assert not np.any(row[samples.size :])

    # what stands in the text stream of a padded frame makes no difference to the reply
    padded = inputs["attention_mask"] == 0
    assert padded.tolist() == [[False] * 3, [True, True, False]]
    other = generate({**inputs, "input_ids": np.where(padded, TO, inputs["input_ids"])})
    np.testing.assert_array_equal(other.sequences[:, 4:], sequences[:, 4:])
    np.testing.assert_array_equal(other.audio_sequences, outputs.audio_sequences)


WITHOUT_TORCH = """
import sys
import numpy as np
from transformers_moshi_flax.models.moshi.kyutai_flax_moshi import MIMI_NAME, MOSHI_NAME
from transformers_moshi_flax.models.moshi.processing_moshi import MoshiProcessor
processor = MoshiProcessor.from_pretrained(sys.argv[1])
inputs = processor("you", np.ones(1921), sampling_rate=24000)
assert inputs["input_ids"].tolist() == [[3, 17]]
processor.save_pretrained("processor")
assert not any(name.partition(".")[0] == "torch" for name in sys.modules)
"""


def test_without_torch(tmp_path: Path) -> None:
    run(NO_TORCH + WITHOUT_TORCH, str(RANDOM_MODEL), cwd=tmp_path)
    assert (tmp_path / "processor" / "processor_config.json").is_file()


def test_kyutais_files_without_a_tokenizer(tmp_path: Path) -> None:
    for name in (MOSHI_NAME, MIMI_NAME):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointNotFoundError, match=r"has no tokenizer: add tokenizer_spm_32k_3\.model"):
        MoshiProcessor.from_kyutai(tmp_path)
