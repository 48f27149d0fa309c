"""A browser for all tests of this directory, and Streamlit servers for each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
from harness import Scratch

pytest.importorskip("streamlit", reason="`make test-ui` has Streamlit and a browser")
pytest.importorskip("selenium", reason="`make test-ui` has Streamlit and a browser")

from browsing import Page, Server, Ui, chromium
from ui_users import APPS

StartServer = Callable[..., Server]


@pytest.fixture(scope="session")
def browser() -> Iterator[Page]:
    with chromium() as found:
        yield Page(found)


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    yield browser
    browser.browser.get("about:blank")  # no page asks a server that has ended


@pytest.fixture
def start_server(run: str, scratch: Scratch) -> Iterator[StartServer]:
    """Start a Streamlit server with one of the apps, as a user with a home of their own."""
    with contextlib.ExitStack() as stack:

        def start(app: str, uid: int | None = None, **environment: str) -> Server:
            folder = scratch.directory("home", 0o777)
            if uid is not None:
                os.chown(folder, uid, uid)
            path = app if os.path.isabs(app) else os.path.join(APPS, app)
            server = Server(run, folder, path, uid, **environment)
            stack.callback(server.stop)
            return server.start()

        yield start


@pytest.fixture
def start_ui(run: str, scratch: Scratch) -> Iterator[Callable[..., Ui]]:
    with contextlib.ExitStack() as stack:

        def start(socket: str, uid: int | None = None, *options: str) -> Ui:
            folder = scratch.directory("home", 0o777)
            if uid is not None:
                os.chown(folder, uid, uid)
            one = Ui(run, folder, socket, uid, *options)
            stack.callback(one.stop)
            return one

        yield start
