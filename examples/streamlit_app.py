"""A Streamlit app that trains: it starts the training as a process of its own, and shows how it is.

    pip install 'reaperd[ui,train]'
    streamlit run examples/streamlit_app.py

Close the page, restart the app, or have the training killed: the panel says what is true, and no worker is left.
"""

from __future__ import annotations

import os
import sys

import streamlit as st

import agent.streamlit as reaper

NAME = "risk model"
HERE = os.path.dirname(os.path.abspath(__file__))


def forget(button: str) -> None:
    """Begin anew after a clean-up or a stop, as the page did before any training."""
    st.toast("Stopped." if button == "stop" else "Cleaned up.")


st.set_page_config(page_title="Risk model", page_icon=":material/model_training:")
st.title("Risk model")

training = reaper.find_training(NAME)  # also one from before this server was restarted
view = reaper.training_panel(training, title="Training", reset_keys=["workers"], on_reset=forget)

with st.container(border=True):
    workers = st.slider("Workers at most", 1, 8, 4, key="workers", disabled=view.active)
    if st.button("Train", type="primary", icon=":material/play_arrow:", disabled=view.active):
        folder = os.path.join(os.path.dirname(reaper.default_status_file(NAME)), "risk-models")
        script = os.path.join(HERE, "risk_model.py")
        command = [sys.executable, script, "--model-dir", folder, f"--max-workers={workers}"]
        try:
            reaper.start_training(command, name=NAME, max_workers=workers)
        except reaper.LaunchError as error:  # somebody else was quicker, in another tab
            st.error(str(error))
        else:
            st.rerun()
