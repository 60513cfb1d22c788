"""Pages of Ogg, the allowance of a caller, the text: what needs no socket."""

from __future__ import annotations

import numpy as np
import pytest
import sphn

from tests.serving.house import Tokenizer, speech
from transformers_moshi_flax.serving.caller import Allowance
from transformers_moshi_flax.serving.codecs import OggOpus, page_size
from transformers_moshi_flax.serving.protocol import ProtocolError
from transformers_moshi_flax.serving.words import Words


def page(*lengths: int) -> bytes:
    return b"OggS" + bytes(22) + bytes([len(lengths), *lengths]) + bytes(sum(lengths))


def test_a_page_is_as_long_as_its_segments_say():
    whole = page(255, 255, 3, 10)
    assert page_size(whole) == page_size(whole + b"OggS") == len(whole)
    assert all(page_size(whole[:cut]) is None for cut in range(len(whole)))


@pytest.mark.parametrize("data", [b"X", b"Ogg?", b"RIFF" * 10, page(*[1] * 101)])
def test_what_is_no_page_is_refused_at_once(data: bytes):
    with pytest.raises(ProtocolError):
        page_size(data)


def test_a_hundred_packets_are_a_page():
    assert page_size(page(*[1] * 100)) is not None


def test_pieces_come_page_by_page():
    writer, said = sphn.OpusStreamWriter(24_000), speech(3).astype(np.float32) / 32768
    data = b"".join(writer.append_pcm(frame) for frame in said)
    pieces = list(OggOpus(24_000).decode(data))
    reader = sphn.OpusStreamReader(24_000)
    assert len(pieces) == 6 and np.array_equal(np.concatenate(pieces), reader.append_bytes(data))


def test_samples_beyond_one_are_clipped_for_opus():
    loud = np.full(1920, 3.0, np.float32)
    assert OggOpus(24_000).encode(loud) == OggOpus(24_000).encode(np.ones(1920, np.float32))


def test_an_allowance_is_a_burst_and_twice_the_time():
    now = [0.0]
    allowance = Allowance(10.0, clock=lambda: now[0])
    allowance.spend(10.0)
    now[0] = 3.0
    allowance.spend(6.0)
    now[0] = 100.0
    allowance.spend(10.0)  # no more is saved up than the burst
    with pytest.raises(ProtocolError, match="too much"):
        allowance.spend(0.1)


def test_text_comes_in_whole_characters():
    words = Words(Tokenizer())
    assert [words.put(number) for number in (0, 3, 1, 2, -1, 300)] == [""] * 6
    assert [words.put(number) for number in (7, 4, 5, 6, 8)] == [" 7", "", "", "€", " 8"]
    # a character that is not complete is left out, and the next one is whole
    assert [words.put(number) for number in (4, 9, 4, 5, 6)] == ["", " 9", "", "", "€"]
