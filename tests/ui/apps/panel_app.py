"""An app with a panel, as one writes it: the training that UI_COMMAND says, with its status in UI_STATUS_FILE."""

from __future__ import annotations

import json
import os

import streamlit as st

import agent.streamlit as reaper

STATUS_FILE = os.environ["UI_STATUS_FILE"]

st.set_page_config(page_title="An app")
state = st.session_state


def note(button: str) -> None:
    state.resets = [*state.get("resets", []), button]


training = reaper.find_training(status_file=STATUS_FILE)
view = reaper.training_panel(
    training, status_file=STATUS_FILE, refresh_s=0.5, reset_keys=["clicks"], on_reset=note
)
if st.button("Start", disabled=view.active):
    try:
        reaper.start_training(
            json.loads(os.environ["UI_COMMAND"]), name="grid search", status_file=STATUS_FILE
        )
    except reaper.LaunchError as error:
        st.error(str(error))
    else:
        st.rerun()
if st.button("Count"):
    state.clicks = state.get("clicks", 0) + 1
st.text(f"clicks={state.get('clicks', 0)} resets={state.get('resets', [])} state={view.state}")
