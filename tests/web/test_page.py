"""The page without a server, in a real Chromium whose microphone plays the embedded question."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from tests.random_model import RANDOM_MODEL
from tests.serving.browser import CHROMIUM, Tab, browser, tab
from tests.serving.house import in_a_loop
from tests.web.site import served
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.cli.checkpoints import EMBEDDED_MODEL, EMBEDDED_QUESTION
from transformers_moshi_flax.export import export_web
from transformers_moshi_flax.export.onnxruntime_web import PACKAGE, VERSION
from transformers_moshi_flax.export.web import FRAME_SIZE, SILENCE
from transformers_moshi_flax.runtime import OnnxMoshi

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]

READY = "document.querySelector('#status').textContent === 'Ready.' && !document.querySelector('#talk').disabled"
SHOWN = "Array.from(document.querySelectorAll('#transcript span'), (line) => line.textContent.trim()).join(' ')"


@pytest.fixture(scope="module")
def question() -> np.ndarray:
    return soundfile.read(EMBEDDED_QUESTION, dtype="float32")[0]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, question: np.ndarray) -> Iterator[str]:
    """Of a browser whose microphone hears the question, and four seconds of silence."""
    folder = tmp_path_factory.mktemp("browser")
    soundfile.write(folder / "user.wav", np.pad(question, (0, 4 * 24_000)), 24_000)
    with browser(folder / "profile", folder / "user.wav") as address:
        yield address


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, runtime_for_web: Path) -> Path:
    """A package onnxruntime-web, as npm installs it."""
    package = tmp_path_factory.mktemp("node_modules") / PACKAGE
    shutil.copytree(runtime_for_web, package / "dist")
    (package / "package.json").write_text(json.dumps({"name": PACKAGE, "version": VERSION}))
    return package


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, installed: Path, question: np.ndarray) -> Path:
    """A page with the embedded model. Not to be changed."""
    model = FlaxMoshiForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, dtype=jnp.float32)
    folder = tmp_path_factory.mktemp("pages") / "embedded"
    export_web(model, folder, EMBEDDED_MODEL, installed, "a small <b>model</b>", question)
    return folder


async def problem(page: Tab) -> str:
    await page.until("!document.querySelector('#problem').hidden")
    return await page.evaluate("document.querySelector('#problem').textContent")


async def recording(page: Tab, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """What was saved of both, as whole frames: Moshi, the user."""
    folder.mkdir()
    samples, rate = soundfile.read(await page.saved(folder, "#save", "moshi.wav"), dtype="float32")
    assert rate == 24_000 and len(samples) % FRAME_SIZE == 0
    return samples[:, 0], samples[:, 1]


def assert_it_says(site: Path, user: np.ndarray, moshi: np.ndarray, text: str) -> None:
    """What Python's runtime says to the same, which ``test_embedded.py`` holds against JAX."""
    model = OnnxMoshi(site / "model", threads=1)
    sound, text_ids = model.converse(user)
    assert text == model.text(text_ids) and len(text.split()) > 2
    # of 16 bits, and computed by another runtime
    np.testing.assert_allclose(moshi, np.clip(sound, -1, 1), atol=2e-4)
    assert np.abs(moshi).max() > 0.02


@in_a_loop
async def test_it_answers_the_recorded_question_and_needs_no_network(
    address: str, site: Path, question: np.ndarray, tmp_path: Path
) -> None:
    async with aiohttp.ClientSession() as session, tab(session, address) as page:
        with served(site) as url:
            await page.open(url)
            assert await page.evaluate("document.querySelector('#ask').disabled")
            await page.until(READY)
            assert await page.evaluate("document.querySelector('#notice').textContent") == "a small <b>model</b>"
            # by the keyboard alone
            await page.press("Tab", 9)
            assert await page.evaluate("document.activeElement.id") == "talk"
            await page.press("Tab", 9)
            await page.press("Enter", 13)
            await page.until("document.querySelector('#status').textContent.includes('hears the recorded question')")
            await page.until(READY)
            assert await page.evaluate("document.querySelector('#problem').hidden")
            moshi, user = await recording(page, tmp_path / "asked")
            frames = -(-len(question) // FRAME_SIZE) + SILENCE
            np.testing.assert_array_equal(user, np.pad(question, (0, frames * FRAME_SIZE - len(question))))
            said = await page.evaluate(SHOWN)
            assert_it_says(site, user, moshi, said)
            lines = (await page.saved(tmp_path, "#save-text", "moshi.txt")).read_text("utf-8").splitlines()
            assert " ".join(line.partition(" ")[2] for line in lines) == said and lines[0].startswith("0:0")
            await page.until("document.querySelector('#offline').textContent.includes('without a network')")
            assert page.hosts == {url.split("/")[2]}
        # nothing answers there any more
        await page.open(url)
        await page.until(READY)
        assert not page.complaints


@in_a_loop
async def test_it_answers_the_microphone(address: str, site: Path, tmp_path: Path) -> None:
    async with aiohttp.ClientSession() as session, tab(session, address) as page:
        with served(site) as url:
            await page.open(url)
            await page.until(READY)
            await page.evaluate("document.querySelector('#talk').click()")
            await page.until("document.querySelector('#status').textContent.startsWith('Listening')")
            await page.until("document.querySelector('#transcript').textContent.split(' ').length > 4")
            await page.until("document.querySelector('#moshi-level').value > 0")
            assert "of 80 ms" in await page.evaluate("document.querySelector('#figures').textContent")
            await page.evaluate("document.querySelector('#talk').click()")
            await page.until(READY)
            moshi, user = await recording(page, tmp_path / "spoken")
            assert np.abs(user).max() > 0.1
            assert_it_says(site, user, moshi, await page.evaluate(SHOWN))
            assert not page.complaints


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model/moshi_step.onnx.data", "flip", "moshi_step.onnx.data is damaged"),
        ("onnxruntime-web/ort-wasm-simd-threaded.wasm", "flip", "ort-wasm-simd-threaded.wasm is not the file"),
        ("worker.js", "flip", "worker.js is not the file"),
        ("moshi-onnx/onnx_moshi.js", "remove", "onnx_moshi.js cannot be loaded"),
        ("model/mimi_encode_step.onnx", "remove", "lacks mimi_encode_step.onnx"),
    ],
)
@in_a_loop
async def test_damaged_and_lost_files(
    address: str, site: Path, tmp_path: Path, name: str, change: str, words: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(site, copy, copy_function=os.link)
    content = bytearray((copy / name).read_bytes())
    (copy / name).unlink()
    if change == "flip":
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
    async with aiohttp.ClientSession() as session, tab(session, address) as page:
        with served(copy) as url:
            await page.open(url)
            assert words in await problem(page)
            for button in ("#talk", "#ask"):
                assert await page.evaluate(f"document.querySelector('{button}').disabled")


@in_a_loop
async def test_what_is_lacking_is_said(address: str, site: Path) -> None:
    async with aiohttp.ClientSession() as session, tab(session, address) as page:
        with served(site) as url:
            await page.open(url)
            await page.until(READY)
            await page.evaluate(
                "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', 'NotFoundError'); }"
            )
            await page.evaluate("document.querySelector('#talk').click()")
            assert "There is no microphone" in await problem(page)
            await page.until(READY)
            for change, words in (
                ("Object.defineProperty(globalThis, 'isSecureContext', { value: false })", "over https"),
                ("WebAssembly.validate = () => false", "no SIMD"),
                ("delete globalThis.WebAssembly", "no WebAssembly"),
            ):
                await page.ask("Page.addScriptToEvaluateOnNewDocument", source=change)
                await page.open(url)
                assert words in await problem(page)
                assert await page.evaluate("document.querySelector('#talk').disabled")


@in_a_loop
async def test_width_colours_and_names(address: str, installed: Path, tmp_path: Path) -> None:
    """Of a model that draws, whose numbers can be chosen."""
    model = FlaxMoshiForConditionalGeneration.from_pretrained(RANDOM_MODEL, dtype=jnp.float32)
    export_web(model, tmp_path / "page", RANDOM_MODEL, installed, context=8)
    async with aiohttp.ClientSession() as session, tab(session, address) as page:
        with served(tmp_path / "page") as url:
            await page.narrow()
            await page.open(url)
            await page.until(READY)
            await page.evaluate("document.querySelector('details').open = true")
            named = await page.check_looks()
            buttons = {("button", name) for name in ("Talk", "Save the recording", "Save the transcript")}
            assert buttons | {("spinbutton", "Top-k of the audio")} <= named
            assert not [name for role, name in named if role == "button" and "question" in name]
            await page.evaluate("document.querySelector('#top_k').value = 9999")
            await page.evaluate("document.querySelector('#talk').click()")
            assert "`top_k` must be" in await problem(page)
            await page.evaluate("document.querySelector('#top_k').value = 5")
            await page.evaluate("document.querySelector('#talk').click()")
            await page.until("document.querySelector('#transcript').textContent")
