"""Streamlit servers of a test's own, and a real Chromium that looks at them and clicks."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import harness
import pytest
from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    NoSuchElementException,
    StaleElementReferenceException,
    WebDriverException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

SHOTS = os.path.join(harness.ROOT, "build", "shots")
SHOWN_WITHIN_S = 30.0
UP_WITHIN_S = 60.0
DESKTOP, PHONE = (1280, 900), (390, 844)
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # Its own /dev/shm files would look like a training's.
    *("--disable-dev-shm-usage", "--force-device-scale-factor=1"),
)


@contextlib.contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """Give a Chromium of Debian's with a profile of its own."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs Debian's chromium and chromium-driver: apt-get install chromium chromium-driver")
    profile = tempfile.mkdtemp(prefix="rp-chromium-")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()
        shutil.rmtree(profile, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A Streamlit server with one app, run by ``uid`` (None: by who runs the tests)."""

    def __init__(self, run: str, folder: str, app: str, uid: int | None, **environment: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = os.path.join(folder, f"streamlit-{self.port}.log")
        self._uid, self._app, self._run = uid, app, run
        self._environment = {"HOME": folder, "XDG_STATE_HOME": folder, "TMPDIR": folder, **environment}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def start(self) -> Server:
        """Start it and return when it answers."""
        command = [harness.needed_interpreter(self._uid), "-m", "streamlit", "run", self._app]
        command += ["--server.address=127.0.0.1", f"--server.port={self.port}", "--server.headless=true"]
        command += ["--browser.gatherUsageStats=false", "--server.fileWatcherType=none"]
        self._start(harness.as_user(self._uid, command))
        return self

    def _start(self, command: Sequence[str]) -> None:
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=harness.test_environment(self._run, **self._environment),
                start_new_session=True,
            )
        harness.repeat_until(self._answers, UP_WITHIN_S, f"no answer from {self.url}")

    def _answers(self) -> bool | None:
        assert self._process is not None, "the server was not started"
        if self._process.poll() is not None:
            raise AssertionError(f"the server ended with {self._process.returncode}:\n{self.read_log()}")
        try:
            with urllib.request.urlopen(f"{self.url}/_stcore/health", timeout=1) as reply:
                return True if reply.status == 200 else None
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
            return None

    def stop(self) -> None:
        """End the server, and it alone."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def kill(self) -> None:
        """End the server at once, as the kernel does where memory runs out."""
        assert self._process is not None, "the server was not started"
        self._process.kill()
        self._process.wait()

    def lives(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def read_log(self) -> str:
        with open(self.log, encoding="utf-8", errors="replace") as file:
            return file.read()


class Ui:
    """`reaperctl ui`, run by ``uid``, for the daemon on ``socket``."""

    def __init__(self, run: str, folder: str, socket: str, uid: int | None, *options: str) -> None:
        self.log = os.path.join(folder, "ui.log")
        command = [harness.needed_interpreter(uid), "-m", "reaperd.ctl.main", f"--socket={socket}", "ui"]
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                harness.as_user(uid, [*command, "--port=0", *options]),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=harness.test_environment(run, HOME=folder, TMPDIR=folder),
                start_new_session=True,
            )
        self.url = self._read_line()

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode().strip()
        if not line:
            with open(self.log, encoding="utf-8", errors="replace") as file:
                raise AssertionError(f"reaperctl ui ended with {self._process.wait()}:\n{file.read()}")
        return line

    @property
    def pid(self) -> int:
        return self._process.pid

    def lives(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> int:
        """End it as Ctrl-C does, and return its exit code."""
        if self.lives():
            self._process.send_signal(signal.SIGINT)
        try:
            return self._process.wait(30)
        finally:
            self._process.kill()
            assert self._process.stdout is not None
            self._process.stdout.close()


class Page:
    """One page in the browser; what it shows is waited for."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser

    def open(self, url: str, *, dark: bool = False, size: tuple[int, int] = DESKTOP) -> Page:
        """Go there as a new visitor, with a screen of that size in pixels."""
        self.browser.get("about:blank")
        self.look(dark=dark, size=size)
        self.browser.get(url)
        return self

    @contextlib.contextmanager
    def second_tab(self) -> Iterator[Callable[[], None]]:
        """Open a second tab, with what it shows cut loose from the first; what is given goes from one to the other."""
        first = self.browser.current_window_handle
        self.browser.switch_to.new_window("tab")
        second = self.browser.current_window_handle

        def change() -> None:
            self.browser.switch_to.window(first if self.browser.current_window_handle == second else second)

        try:
            yield change
        finally:
            self.browser.switch_to.window(second)
            self.browser.close()
            self.browser.switch_to.window(first)

    def look(self, *, dark: bool = False, size: tuple[int, int] = DESKTOP) -> None:
        """Prefer light or dark, on a screen of that size."""
        width, height = size
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def text(self) -> str:
        """Return all that a person can read now."""
        with contextlib.suppress(StaleElementReferenceException, NoSuchElementException):
            return str(self.browser.find_element(By.TAG_NAME, "body").text)
        return ""

    def wait(self, pattern: str, within_s: float = SHOWN_WITHIN_S) -> re.Match[str]:
        """Return once the page shows what the regular expression says."""
        found = self._until(lambda: re.search(pattern, self.text()), within_s)
        assert found is not None, f"the page does not show {pattern!r}:\n{self.text()}"
        return found  # type: ignore[no-any-return]

    def wait_without(self, pattern: str, within_s: float = SHOWN_WITHIN_S) -> None:
        """Return once the page does not show that any more."""
        gone = self._until(lambda: (text := self.text()) and not re.search(pattern, text), within_s)
        assert gone, f"the page still shows {pattern!r}:\n{self.text()}"

    def wait_drawn(self, selector: str, count: int) -> None:
        """Return once the page has so many elements that a CSS selector finds."""
        found = self._until(
            lambda: len(self.browser.find_elements(By.CSS_SELECTOR, selector)) >= count, SHOWN_WITHIN_S
        )
        assert found, f"the page has no {count} of {selector!r}:\n{self.text()}"

    def click(self, label: str, nth: int = 0) -> None:
        """Click a button, once it is there and on."""

        def clicked() -> bool:
            found = [one for one in self.buttons(label) if one.is_enabled()]
            if len(found) <= nth:
                return False
            found[nth].click()
            return True

        assert self._until(clicked, SHOWN_WITHIN_S), f"no button {label!r} to click:\n{self.text()}"

    def click_if_on(self, label: str) -> None:
        """Click a button unless it is off, or gone."""
        with contextlib.suppress(WebDriverException):
            for one in self.buttons(label)[:1]:
                if one.is_enabled():
                    one.click()

    def click_beginning(self, start: str) -> None:
        """Click the first button whose text begins so, once it is there and on."""

        def clicked() -> bool:
            found = [one for one in self.buttons_beginning(start) if one.is_enabled()]
            if found:
                found[0].click()
            return bool(found)

        assert self._until(clicked, SHOWN_WITHIN_S), f"no button {start!r} to click:\n{self.text()}"

    def buttons(self, label: str) -> list[Any]:
        """Return what can be clicked and whose text ends with ``label``: an icon's name may stand before it."""
        found = self.browser.find_elements(By.CSS_SELECTOR, "[data-testid='stApp'] :is(button, summary)")
        return [one for one in found if one.text.split("\n")[-1].strip() == label]

    def buttons_beginning(self, start: str) -> list[Any]:
        """Return the buttons whose text begins so, behind the name of an icon."""
        found = self.browser.find_elements(By.CSS_SELECTOR, "[data-testid='stApp'] button")
        return [one for one in found if one.text.split("\n")[-1].strip().startswith(start)]

    def press_enter(self) -> None:
        """Press what has the focus."""
        self.browser.switch_to.active_element.send_keys(Keys.ENTER)

    def is_on(self, label: str) -> bool:
        """Say whether there is such a button that can be clicked."""
        try:
            return any(one.is_enabled() for one in self.buttons(label))
        except StaleElementReferenceException:
            return self.is_on(label)

    def tab_to(self, label: str, most: int = 60) -> None:
        """Go to a button with the Tab key, as who has no mouse does."""
        seen = []
        for _ in range(most):
            self.browser.switch_to.active_element.send_keys(Keys.TAB)
            active = self.browser.switch_to.active_element
            seen.append(active.text)
            if active.text.split("\n")[-1].strip() == label:
                return
        raise AssertionError(f"no way to {label!r} by the Tab key: {seen}")

    def shoot(self, name: str) -> str:
        """Keep a picture of the page in build/shots, once it is drawn to its end."""
        unfinished = 'document.querySelector(\'[data-testid="stSkeleton"], [data-stale="true"]\')'
        self._until(lambda: not self.browser.execute_script(f"return {unfinished} !== null"), 5.0)
        # Where the pointer rests something is lit up, and tells what it is for.
        pointer = {"type": "mouseMoved", "x": 1, "y": 1}
        self.browser.execute_cdp_cmd("Input.dispatchMouseEvent", pointer)
        self._until(lambda: not self.browser.find_elements(By.CSS_SELECTOR, "[role=tooltip]"), 3.0)
        os.makedirs(SHOTS, exist_ok=True)
        path = os.path.join(SHOTS, f"{name}.png")
        self.browser.save_screenshot(path)
        return path

    def is_dark(self) -> bool:
        """Say whether what is written is brighter than what is behind it."""
        style = "getComputedStyle(document.querySelector('[data-testid=stApp]'))"
        shown = self.browser.execute_script(f"return [{style}.color, {style}.backgroundColor]")
        text, behind = (sum(int(part) for part in re.findall(r"\d+", one)[:3]) for one in shown)
        return text > behind

    def is_wider_than_screen(self) -> bool:
        """Say whether one would have to scroll sideways."""
        root = "document.documentElement"
        return bool(self.browser.execute_script(f"return {root}.scrollWidth > {root}.clientWidth + 1"))

    def _until(self, attempt: Callable[[], Any], within_s: float) -> Any:
        ignored = (
            StaleElementReferenceException,
            ElementClickInterceptedException,
            NoSuchElementException,
            WebDriverException,
        )
        waiting = WebDriverWait(self.browser, within_s, poll_frequency=0.1, ignored_exceptions=ignored)
        with contextlib.suppress(WebDriverException):
            return waiting.until(lambda _: attempt())
        return None
