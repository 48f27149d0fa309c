"""What strangers may try with the page: names that are more than names, and other pages that would talk to it."""

from __future__ import annotations

import http.client
import re
import subprocess
from collections.abc import Callable
from urllib.parse import urlsplit

import harness
import pytest
from browsing import Page, Ui
from harness import Daemon, end_process, wait_gone
from selenium.webdriver.common.by import By
from ui_users import OURS

StartDaemon = Callable[..., Daemon]

pytestmark = pytest.mark.needs_root

NAMES = (
    "<img src=http://example.org/a.png onerror=alert(1)><script>document.title='b'</script><b>bold</b>",
    r"$\frac{1}{2}$ **fat** _thin_ ~gone~ `code` # head | cell :red[red] :smile: -- www.example.org/a a@example.org",
    "[link](http://example.org) ![picture](http://example.org/a.png) <http://example.org> &lt;b&gt;",
    "- one\n- two\n\n***\n    four",
    " blank ",
)
MADE = "b, i, em, s, img, script, a[href*=example], .katex, .math, del, hr, mark, [style*=color]:not(.stMarkdownBadge)"


def test_a_name_is_shown_as_it_is_wherever_it_stands(
    page: Page, start_daemon: StartDaemon, start_ui: Callable[..., Ui], run: str
) -> None:
    daemon = start_daemon(uid=OURS)
    ctl = [harness.needed_interpreter(OURS), "-m", "reaperd.ctl.main", f"--socket={daemon.socket}"]
    sessions = [
        subprocess.Popen(
            harness.as_user(OURS, [*ctl, "run", f"--name={name}", "--", "sleep", "60"]),
            env=harness.test_environment(run),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        for name in NAMES
    ]
    harness.repeat_until(
        lambda: len(daemon.sessions()) == len(NAMES) or None, 30, "the sessions have not begun"
    )
    page.open(f"{start_ui(daemon.socket, OURS).url}&view=Sessions")
    shown = [re.sub(" +", " ", name.replace("\n", "\\n")) for name in NAMES]  # HTML joins blanks
    page.wait("blank")

    def check(selector: str) -> None:
        for name in shown:
            assert name.strip() in page.text().replace("\u2060", "")
        made = page.browser.find_elements(
            By.CSS_SELECTOR, ", ".join(f"{selector} {one}" for one in MADE.split(", "))
        )
        assert not [one.get_attribute("outerHTML") for one in made]
        assert "*blank" not in page.text()

    check("[class*=st-key-session] [data-testid=stMarkdownContainer]")
    page.shoot("page-hostile")
    page.click("Stop")
    page.wait(r"Stop [\s\S]*\? It is asked to end")
    page.click("Yes, stop it")
    page.wait("was stopped", 60)
    assert page.browser.title == "Reaper"
    page.click("History")
    page.wait("registered")
    check("table")
    for one in sessions:
        one.terminate()
        one.wait(30)


def test_another_page_cannot_talk_to_it_and_its_server_ends_with_it(
    start_daemon: StartDaemon, start_ui: Callable[..., Ui]
) -> None:
    ui = start_ui(start_daemon(uid=OURS).socket, OURS)
    url = urlsplit(ui.url)
    own = f"http://{url.netloc}"
    assert opened(url.netloc, own) == http.client.SWITCHING_PROTOCOLS
    for origin in ("http://example.org", "http://example.org:8501", "https://127.0.0.1.example.org", "null"):
        assert opened(url.netloc, origin) == http.client.FORBIDDEN, origin
    servers = harness.children_of(ui.pid)
    assert servers
    assert end_process(ui.pid)  # SIGKILL leaves it no time to end anybody
    assert not wait_gone(servers, 30)


def opened(place: str, origin: str) -> int:
    """Return how the server answers a page of that origin which wants to talk to it."""
    connection = http.client.HTTPConnection(place, timeout=30)
    try:
        wanted = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        key = {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Origin": origin}
        connection.request("GET", "/_stcore/stream", headers={**wanted, **key})
        return connection.getresponse().status
    finally:
        connection.close()
