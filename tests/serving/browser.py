"""A real Chromium without a screen, with a microphone that plays a file, spoken to by its own protocol (CDP)."""

from __future__ import annotations

import asyncio
import itertools
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    "--remote-debugging-port=0",
)


@contextmanager
def browser(folder: Path, microphone: Path) -> Iterator[str]:
    """A browser, as the address of its protocol; ``microphone`` is a WAV, which it repeats."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--use-file-for-fake-audio-capture={microphone}", f"--user-data-dir={folder}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    try:
        seen = []
        for line in process.stderr:
            seen.append(line)
            if found := re.search(r"DevTools listening on ws://([\d.:]+)/", line):
                break
        else:
            raise AssertionError("".join(seen))
        yield f"http://{found[1]}"
    finally:
        process.terminate()
        process.wait(60)
        process.stderr.close()


@dataclass
class Tab:
    """A page of the browser.

    Attributes:
        socket: of its protocol.
        hosts: that it has asked for anything.
        complaints: errors of its scripts.
    """

    socket: aiohttp.ClientWebSocketResponse
    hosts: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _waiting: dict[int, asyncio.Future] = field(default_factory=dict)

    async def listen(self) -> None:
        """Take what the browser says."""
        async for received in self.socket:
            event = received.json()
            if "id" in event:
                self._waiting.pop(event["id"]).set_result(event)
            elif event["method"] == "Network.requestWillBeSent":
                self.hosts.add(event["params"]["request"]["url"].split("/")[2])
            elif event["method"] == "Runtime.exceptionThrown":
                self.complaints.append(str(event["params"]["exceptionDetails"]))

    async def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """A command, and what it returns."""
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self.socket.send_json({"id": number, "method": method, "params": params})
        event = await answer
        assert "error" not in event, event
        return event["result"]

    async def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = await self.ask("Runtime.evaluate", expression=script, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, script: str) -> None:
        """Wait until an expression is true."""
        try:
            async with asyncio.timeout(120):
                while not await self.evaluate(f"Boolean({script})"):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            text = await self.evaluate("document.body.innerText")
            raise AssertionError(f"never: {script}\n{text}\n{self.complaints}") from None

    async def open(self, url: str) -> None:
        """Go to a page."""
        for part in ("Network", "Runtime", "Page", "Accessibility"):
            await self.ask(f"{part}.enable")
        await self.ask("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && document.querySelector('#talk')")

    async def saved(self, folder: Path, button: str, name: str) -> Path:
        """The file that the page saves by a button."""
        await self.ask("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        await self.evaluate(f"document.querySelector('{button}').click()")
        async with asyncio.timeout(60):
            while not (folder / name).exists():
                await asyncio.sleep(0.1)
        return folder / name

    async def narrow(self) -> None:
        """As wide as a telephone."""
        await self.ask("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)

    async def check_looks(self) -> set[tuple[str, str]]:
        """That a page fits a telephone, has a dark and a light ground, and that nothing that can be used lacks a name.

        Returns:
            Roles and names of all that has one.
        """
        assert await self.evaluate("document.documentElement.scrollWidth") <= 360
        grounds = set()
        for scheme in ("light", "dark"):
            await self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            grounds.add(await self.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(grounds) == 2
        nodes = (await self.ask("Accessibility.getFullAXTree"))["nodes"]
        kinds = ("button", "spinbutton", "textbox", "meter", "progressbar")
        assert all(node["name"]["value"] for node in nodes if node["role"]["value"] in kinds)
        return {(node["role"]["value"], node["name"]["value"]) for node in nodes if "name" in node}

    async def press(self, key: str, code: int) -> None:
        """A key, down and up."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            await self.ask("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)


@asynccontextmanager
async def tab(session: aiohttp.ClientSession, address: str) -> AsyncIterator[Tab]:
    """A new page."""
    async with session.put(f"{address}/json/new?about:blank") as answer:
        target = await answer.json()
    async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
        page = Tab(socket)
        listening = asyncio.create_task(page.listen())
        try:
            yield page
        finally:
            async with session.get(f"{address}/json/close/{target['id']}"):
                listening.cancel()
