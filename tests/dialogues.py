"""A short dialogue, for tests of what changes what a model says."""

from __future__ import annotations

from typing import Any

import numpy as np


def spoken_codes(model: Any) -> np.ndarray:
    """The codes of six frames that a Moshi says in two slots, greedily, ``(frames, slots, codebooks)``."""
    user = np.random.default_rng(1).integers(0, model.config.audio_vocab_size, (6, 2, model.config.num_codebooks))
    stream = model.streaming(2, do_sample=False, depth_decoder_do_sample=False, return_audio_waveforms=False)
    state, said = stream.init(), []
    for codes in user:
        state, frame = stream.step(state, user_audio_codes=codes)
        said.append(np.asarray(frame.audio_codes))
    return np.stack(said)
