"""A panel for one's own Streamlit app: how a training is, and the buttons that clean up after it, look again, and stop it.

    import agent.streamlit as reaper

    if st.button("Train"):
        st.session_state.training = reaper.start_training([sys.executable, "train.py"], name="risk")
    reaper.training_panel(st.session_state.get("training") or reaper.find_training("risk"))

``pip install 'reaperd[ui]'`` brings Streamlit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

try:
    import streamlit as st
except ImportError as error:
    raise ImportError("agent.streamlit needs Streamlit: pip install 'reaperd[ui]'") from error

from agent import launch, panel, status, stopping
from agent.cleanup import CleanupError, CleanupReport, emergency_cleanup
from agent.jobs import Job
from agent.launch import LaunchError, Training, default_status_file, find_training, start_training
from agent.panel import View, as_markdown, bold
from agent.stopping import StopError, Stopped

__all__ = [
    "LaunchError",
    "Training",
    "View",
    "default_status_file",
    "find_training",
    "start_training",
    "training_panel",
]

CLEANUP, STOP = "cleanup", "stop"
_BUSY_REFRESH_S = 0.5  # while something is being done
_BADGES = {
    "none": ("No training yet", "gray", ":material/hourglass_empty:"),
    "starting": ("Starting", "blue", ":material/pending:"),
    "running": ("Running", "green", ":material/play_arrow:"),
    "restarting": ("Restarting", "blue", ":material/restart_alt:"),
    "finishing": ("Finishing", "blue", ":material/pending:"),
    "completed": ("Completed", "green", ":material/check:"),
    "failed": ("Failed", "red", ":material/error:"),
    "interrupted": ("Stopped", "orange", ":material/stop:"),
    "killed": ("Killed", "red", ":material/dangerous:"),
    "unknown": ("Not known", "gray", ":material/help:"),
}


def training_panel(
    training: Training | None = None,
    *,
    status_file: str | os.PathLike[str] | None = None,
    title: str = "Training",
    socket: str | None = None,
    refresh_s: float = 2.0,
    log_lines: int = 20,
    reset_keys: Iterable[str] = (),
    on_reset: Callable[[str], None] | None = None,
    key: str = "reaper",
) -> View:
    """Draw the panel of a training, and return how it is at this run of the script.

    ``training`` is what ``start_training()`` returned; for one that was started otherwise, ``status_file`` is its
    ``training_session()``'s. The panel draws itself anew every ``refresh_s`` seconds, and has the whole script run again when the
    state changes. After a clean-up or a stop ``reset_keys`` are taken out of ``st.session_state``, then ``on_reset`` is called
    with "cleanup" or "stop". Two panels in one app need a ``key`` each. ``socket`` is as for ``register()``.
    """
    if not 0.2 <= refresh_s <= 3600:
        raise ValueError(f"refresh_s: must be 0.2 to 3600 s, got {refresh_s!r}")
    drawn = _Panel(
        training,
        os.path.abspath(status_file) if status_file is not None else None,
        title=title,
        socket=socket,
        log_lines=log_lines,
        reset_keys=tuple(reset_keys),
        on_reset=on_reset,
        key=key,
    )
    every_s = min(refresh_s, _BUSY_REFRESH_S) if drawn.job is not None else refresh_s
    st.fragment(drawn.draw, run_every=every_s)()
    return drawn.view


class _Panel:
    """The panel at one run of the script; what outlives it is in ``st.session_state``, under keys that begin with ``key``."""

    def __init__(self, training: Training | None, status_file: str | None, **options: Any) -> None:
        self._training, self._status_file = training, status_file
        self._title: str = options["title"]
        self._socket: str | None = options["socket"]
        self._log_lines: int = options["log_lines"]
        self._reset_keys: tuple[str, ...] = options["reset_keys"]
        self._on_reset: Callable[[str], None] | None = options["on_reset"]
        self._key: str = options["key"]
        self.view = View(panel.NONE)

    @property
    def job(self) -> tuple[str, Job[Any]] | None:
        """What is being done, and which button began it."""
        found: tuple[str, Job[Any]] | None = st.session_state.get(self._own("job"))
        return found

    def _own(self, name: str) -> str:
        return f"{self._key}.{name}"

    # -- one drawing -------------------------------------------------------------------------

    def draw(self) -> None:
        """Draw the panel; as a fragment, again and again by itself."""
        self._take_result()
        before = st.session_state.get(self._own("state"))
        watch = st.session_state.setdefault(self._own("watch"), panel.Watch())
        self.view = view = panel.look(self._training, self._status_file, self._socket, watch)
        with st.container(border=True, key=f"{self._key}-panel"):
            self._draw_head(view)
            self._draw_figures(view)
            self._draw_notes(view)
            self._draw_buttons(view)
            self._draw_outcome()
            self._draw_log()
        st.session_state[self._own("state")] = view.state
        if before not in (None, view.state):
            st.rerun()  # the whole app: what else it shows may depend on it

    def _draw_head(self, view: View) -> None:
        label, colour, icon = _BADGES.get(view.state, _BADGES["unknown"])
        with st.container(horizontal=True, vertical_alignment="center"):
            named = f"{self._title}: {view.name}" if view.name else self._title
            st.markdown(bold(named), width="content")
            st.badge(label, color=colour, icon=icon)

    def _draw_figures(self, view: View) -> None:
        share, words = panel.share_of(view.progress), panel.progress_in_words(view.progress)
        if share is not None:
            st.progress(share, text=as_markdown(f"{int(share * 100)} %, {words}"))
        elif words:
            st.caption(as_markdown(words))
        if view.elapsed_s is None:
            return
        with st.container(horizontal=True, gap="medium"):
            st.metric("Elapsed", panel.span(view.elapsed_s), width="content")
            if view.state == "running":
                st.metric("Workers", "-" if view.workers is None else view.workers, width="content")
                cpu = "-" if view.cpu_percent is None else f"{view.cpu_percent:.0f} %"
                st.metric("CPU", cpu, width="content", help="100 % is one core")
                st.metric("Memory", panel.size(view.rss_bytes), width="content")

    def _draw_notes(self, view: View) -> None:
        if view.error:
            st.error(as_markdown(view.error), icon=":material/error:")
        if view.state == "killed":
            st.warning(panel.killed_in_words(view.told))
        if view.state == "restarting":
            st.caption(
                "Its last attempt has failed. It is started again, unless that was the last it may have."
            )
        elif view.state == "finishing":
            st.caption("It has ended, and what it has left behind is being ended.")
        if view.stuck:
            st.warning(
                f"It looks stuck: no CPU used and no progress told for {panel.span(view.idle_s)}. "
                "Stop it, or look where it waits with `py-spy dump`."
            )
        if view.orphans:
            which = "is 1 worker" if view.orphans == 1 else f"are {view.orphans} workers"
            st.warning(f"There {which} of yours without a parent: **Cleanup Processes** ends them.")
        if view.no_daemon:
            st.caption(
                f"No Reaper daemon answers ({as_markdown(view.no_daemon)}). The panel works by itself; "
                "what a killed training leaves behind is ended by **Cleanup Processes** alone."
            )

    def _draw_buttons(self, view: View) -> None:
        busy = self.job is not None
        with st.container(horizontal=True):
            if st.button(
                "Cleanup Processes",
                key=self._own("cleanup"),
                icon=":material/cleaning_services:",
                disabled=busy,
                help="End your workers that lost their parent, and remove what they left in memory. "
                "A pool that is in use is never touched.",
            ):
                self._begin(CLEANUP, Job("Cleaning up", lambda: emergency_cleanup(self._where())))
            if st.button(
                "Refresh Status", key=self._own("refresh"), icon=":material/refresh:", help="Look again now."
            ):
                st.rerun()
            if st.button(
                "Stop Training",
                key=self._own("stop"),
                icon=":material/stop_circle:",
                disabled=busy or not view.active,
                help="Ask it to end, then end it with all its workers. This app goes on.",
            ):
                self._begin(STOP, Job("Stopping the training", self._stop_work(view)))
        if (job := self.job) is not None:
            st.info(f"{job[1].what} … {panel.span(job[1].lasted_s)}", icon=":material/pending:")

    def _draw_log(self) -> None:
        text = self._training.log(self._log_lines) if self._training is not None else ""
        if text:
            with st.expander("Log", icon=":material/notes:"):
                st.code(text, language=None, wrap_lines=True)

    # -- what the buttons do -----------------------------------------------------------------

    def _where(self) -> str | None:
        return self._socket or (self._training.socket if self._training else None)

    def _stop_work(self, view: View) -> Callable[[], Stopped]:
        training, socket = self._training, self._where()
        above = (training.pid, training.start_ticks) if training is not None and training.supervised else None

        def work() -> Stopped:
            told, owner = view.told, view.owner
            ran = told is not None and told.state == status.RUNNING
            # It had just been started, or may have been started again.
            if not ran and training is not None and launch.wait_begun(training) is not None:
                told, owner = status.read_owned_status(training.status_file)
            if told is None:
                raise StopError("the training has not begun")
            if told.state != status.RUNNING and training is not None and above is not None:
                return stopping.stop_supervisor(told, above, training.status_file)
            return stopping.stop(told, above, owner=owner, socket=socket)

        return work

    def _begin(self, button: str, job: Job[Any]) -> None:
        st.session_state[self._own("job")] = button, job
        st.session_state.pop(self._own("outcome"), None)
        st.rerun()  # with the buttons off, and more often

    def _take_result(self) -> None:
        """Where a job has come to its end, say what came of it, and begin the app anew."""
        job = self.job
        if job is None or not job[1].over:
            return
        button, work = job
        failed = work.failed_in_words(CleanupError, StopError, OSError, ValueError)
        st.session_state[self._own("outcome")] = ("error", failed) if failed else _in_words(work.result())
        # The job goes last: a page that is drawn anew in the middle of this comes here once more. Where it was on_reset that raised,
        # or had the page drawn anew, it would come here for ever.
        if st.session_state.get(self._own("resetting")) is work:
            del st.session_state[self._own("job")]
        st.session_state[self._own("resetting")] = work
        for name in (*self._reset_keys, self._own("watch"), self._own("state")):
            if name in st.session_state:
                del st.session_state[name]
        if self._on_reset is not None:
            self._on_reset(button)
        st.session_state.pop(self._own("job"), None)
        st.rerun()

    def _draw_outcome(self) -> None:
        outcome = st.session_state.get(self._own("outcome"))
        if outcome is not None:
            draw = {"success": st.success, "warning": st.warning}.get(outcome[0], st.error)
            draw(as_markdown(outcome[1]))


def _in_words(found: Stopped | CleanupReport) -> tuple[str, str]:
    """Return how well it went, and what was done."""
    return _stopped(found) if isinstance(found, Stopped) else _cleaned(found)


def _stopped(found: Stopped) -> tuple[str, str]:
    by = " No daemon answered, so this app did it." if found.without_daemon else ""
    if found.left:
        pids = ", ".join(map(str, found.left))
        return "warning", f"The training was stopped, but some of it is still there: pid {pids}.{by}"
    workers = found.ended - 1
    rest = "" if workers < 1 else f", with {workers} other process{'' if workers == 1 else 'es'} of its own"
    return "success", f"The training was stopped{rest}. Nothing of it is left.{by}"


def _cleaned(found: CleanupReport) -> tuple[str, str]:
    if not found:
        return "success", "There was nothing to clean up."
    killed, removed = len(found.killed), len(found.reclaimed)
    held = sum(one.rss_bytes for one in found.killed) + sum(one.size_bytes for one in found.reclaimed)
    text = (
        f"{killed} process{'' if killed == 1 else 'es'} ended, {removed} leftover{'' if removed == 1 else 's'} "
        f"removed, {panel.size(held)} given back."
    )
    left = len(found.denied) + len(found.remaining)
    return ("warning", f"{text} {left} could not be ended or removed.") if left else ("success", text)
