"""The page itself: Streamlit runs this file anew at every look. It lets nobody in who lacks the secret of the address."""

from __future__ import annotations

import hmac
import json
import os
from typing import Any

import streamlit as st

from agent.panel import as_markdown
from reaperd.ctl.ui import drawing
from reaperd.ctl.ui.recorder import Recorder, of_this_process
from reaperd.ctl.ui.serve import VARIABLE

REFRESH_S, BUSY_REFRESH_S = 3.0, 0.5
_FIRST = "Overview"
# It looks again every few seconds: what fades meanwhile, and Streamlit's own button "Stop", would flicker.
_STYLE = """<style>
[data-testid="stMainBlockContainer"] { padding-top: 3rem; max-width: 1200px; }
[data-testid="stMetricValue"] { font-size: 1.6rem; }
[data-testid="stHeading"] h3 { font-size: 1.15rem; padding: 0.6rem 0 0.3rem; }
[data-testid="stStatusWidget"] { display: none; }
[data-stale="true"] { opacity: 1 !important; }
[data-testid="stMarkdownContainer"] table { display: block; overflow-x: auto; font-size: 0.9rem; }
.st-key-events td:first-child { white-space: nowrap; }
.st-key-events td:last-child { min-width: 15rem; }
button:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
@media (max-width: 480px) { [data-testid="stButtonGroup"] button { padding: 0 0.45rem; font-size: 0.85rem; } }
</style>"""


def is_admitted() -> bool:
    """Say whether whoever looks has the secret; once is enough for a visit."""
    secret = str(_told().get("token", ""))
    given = str(st.query_params.get("token", ""))
    if secret and hmac.compare_digest(secret.encode(), given.encode("utf-8", "replace")):
        st.session_state["admitted"] = True
    return bool(secret and st.session_state.get("admitted"))


def _told() -> dict[str, Any]:
    """Return what `reaperctl ui` has told its server; nothing where somebody else has started it."""
    return dict(json.loads(os.environ.get(VARIABLE) or "{}"))


def start_recorder() -> Recorder:
    """Begin to keep what the daemon says, once for this server."""
    told = _told()
    return of_this_process(told["sockets"], told["timeout_s"]).start()


def chosen_view() -> str:
    """Return the view that is looked at: the address keeps it, so that it is there again after a reload."""
    if "view" not in st.session_state:
        asked = str(st.query_params.get("view", _FIRST))
        st.session_state["view"] = asked if asked in drawing.VIEWS else _FIRST
    found = st.segmented_control("View", list(drawing.VIEWS), key="view", label_visibility="collapsed")
    # None: somebody has clicked the one that was chosen already.
    view = str(found or st.session_state.get("view before", _FIRST))
    st.session_state["view before"] = view
    if st.query_params.get("view") != view:
        st.query_params["view"] = view
    return view


def main() -> None:
    """Draw the page."""
    st.set_page_config(page_title="Reaper", page_icon=":material/agriculture:", layout="wide")
    st.html(_STYLE)
    if not is_admitted():
        st.title("Reaper", anchor=False)
        st.error(
            "This page is its owner's. Open the address that `reaperctl ui` has printed, with its token."
        )
        return
    recorder = st.cache_resource(show_spinner=False)(start_recorder)()
    with st.container(horizontal=True, vertical_alignment="center"):
        st.title("Reaper", anchor=False, width="content")
        who = "root, who sees and ends everybody's" if os.geteuid() == 0 else drawing.who(os.geteuid())
        st.caption(f"as {as_markdown(who)}", width="content")
    view = chosen_view()

    def draw() -> None:
        drawing.draw_deeds()
        drawing.VIEWS[view](recorder)
        st.caption(f"{drawing.stamp()}, looks again by itself")

    st.fragment(draw, run_every=BUSY_REFRESH_S if drawing.is_working() else REFRESH_S)()


main()
