"""The page in a real Chromium whose microphone plays a file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.serving.browser import CHROMIUM, Tab, browser, tab
from tests.serving.fake_stream import FRAME, spoken_alone
from tests.serving.house import House, in_a_loop, serving
from transformers_moshi_flax.serving.gate import Gate

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]

CONNECTED = "document.querySelector('#status').textContent.startsWith('Connected')"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a browser whose microphone hears a sweep."""
    folder = tmp_path_factory.mktemp("browser")
    time = np.arange(3 * 24_000) / 24_000
    soundfile.write(folder / "user.wav", 0.4 * np.sin(2 * np.pi * (200 + 300 * time) * time), 24_000)
    with browser(folder / "profile", folder / "user.wav") as address:
        yield address


@pytest.fixture(autouse=True)
def same_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers_moshi_flax.serving.wishes.secrets.randbits", lambda bits: 1)


async def talk(page: Tab, house: House) -> None:
    await page.open(house.url + "/")
    await page.evaluate("document.querySelector('#talk').click()")


async def problem(page: Tab) -> str:
    await page.until("!document.querySelector('#problem').hidden")
    return await page.evaluate("document.querySelector('#problem').textContent")


@in_a_loop
async def test_one_button_to_talk_hear_read_and_save(address: str, tmp_path: Path):
    async with serving() as house, tab(house.session, address) as page:
        await page.open(house.url + "/")
        # by the keyboard alone
        await page.press("Tab", 9)
        assert await page.evaluate("document.activeElement.id") == "talk"
        for button in ("#save", "#save-text"):  # there is nothing yet
            assert await page.evaluate(f"document.querySelector('{button}').disabled")
        await page.press("Enter", 13)
        await page.until(CONNECTED)
        await page.until("document.querySelector('#transcript').textContent.includes('€ 7 8 9')")
        await page.until("document.querySelector('#moshi-level').value > 0.05")
        assert await page.evaluate("document.querySelector('#transcript time').textContent") == "0:00"
        assert house.figure("moshi_dialogues") == 1
        await page.evaluate("document.querySelector('#talk').click()")
        await page.until("document.querySelector('#status').textContent === 'Not connected.'")
        samples, rate = soundfile.read(await page.saved(tmp_path, "#save", "moshi.wav"), dtype="int16")
        assert rate == 24_000
        frames = samples.reshape(-1, FRAME, 2)
        # what came back is what the stream says to what was sent
        user, moshi = frames[..., 1], frames[..., 0]
        assert np.abs(user).max() > 3000
        assert np.array_equal(moshi, spoken_alone(user.astype(np.float32) / 32768, (1, 1)))
        text = (await page.saved(tmp_path, "#save-text", "moshi.txt")).read_text("utf-8")
        # as it was shown: the first frame's words, and those of as many frames as were said
        assert re.fullmatch(r"(\d+:\d\d .+\n)+", text) and text.startswith("0:00 € 7 8 9")
        shown = (
            "Array.from(document.querySelectorAll('#transcript span'), (line) => line.textContent.trim()).join(' ')"
        )
        assert " ".join(line.partition(" ")[2] for line in text.splitlines()) == await page.evaluate(shown)
        await house.until(lambda: house.figure("moshi_dialogues_ended_total", reason="left") == 1)
        assert page.hosts == {house.url.removeprefix("http://")} and not page.complaints


@in_a_loop
async def test_two_pages_and_no_place_for_a_third(address: str):
    async with serving(slots=2) as house, tab(house.session, address) as one, tab(house.session, address) as two:
        for page in (one, two):
            await talk(page, house)
            await page.until(CONNECTED)
        async with tab(house.session, address) as three:
            await talk(three, house)
            assert "all 2 places are taken" in await problem(three)
            assert await three.evaluate("document.querySelector('#talk').textContent") == "Talk"
        for page in (one, two):
            await page.until("document.querySelector('#transcript').textContent.includes('7 8 9')")


@in_a_loop
async def test_the_queue_is_shown(address: str):
    async with serving(slots=1, queue=2) as house, house.call() as speaks, house.call() as waits:
        await waits.receive_bytes()
        async with tab(house.session, address) as page:
            await talk(page, house)
            await page.until("document.querySelector('#status').textContent.includes('number 2 in the queue')")
            await waits.close()
            await page.until("document.querySelector('#status').textContent.includes('number 1 in the queue')")
            await speaks.close()
            await page.until(CONNECTED)
            await page.until("document.querySelector('#transcript').textContent.includes('7 8 9')")
            assert not page.complaints


@in_a_loop
async def test_a_lost_connection_comes_back(address: str):
    async with serving() as house, tab(house.session, address) as page:
        await talk(page, house)
        await page.until(CONNECTED)
        (caller,) = house.server.callers.values()
        caller._request.transport.abort()
        assert "The connection is lost; trying again" in await problem(page)
        await page.until(CONNECTED)
        assert await page.evaluate("document.querySelector('#problem').hidden")


@in_a_loop
async def test_what_is_wrong_is_said(address: str):
    async with serving(gate=Gate(["secret"])) as house, tab(house.session, address) as page:
        await talk(page, house)
        await page.until("!document.querySelector('#token-form').hidden")
        await page.evaluate("document.querySelector('#token').value = 'secret'")
        await page.evaluate("document.querySelector('#token-form').requestSubmit()")
        await page.until(CONNECTED)
        await page.evaluate("document.querySelector('#talk').click()")
        await page.evaluate("document.querySelector('#text_topk').value = 9999")
        await page.evaluate("document.querySelector('#talk').click()")
        assert "text_topk" in await problem(page)
        await page.evaluate(
            "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', 'NotFoundError'); }"
        )
        await page.evaluate("document.querySelector('#talk').click()")
        await page.until("document.querySelector('#problem').textContent.includes('There is no microphone')")


@in_a_loop
async def test_width_colours_and_names(address: str):
    async with serving() as house, tab(house.session, address) as page:
        house.server.about |= {"notice": "a small demo model", "recorded": True}
        await page.narrow()
        await page.open(house.url + "/")
        await page.until(
            "document.querySelector('#notice').textContent === 'a small demo model; what is said here is recorded'"
        )
        await page.evaluate("document.querySelector('details').open = true")
        named = await page.check_looks()
        buttons = {("button", name) for name in ("Talk", "Save the recording", "Save the transcript")}
        assert buttons | {("spinbutton", "Top-k of the audio")} <= named
