"""From "please" to "stuck": the stages of ending one process, as a total table. Pure."""

from __future__ import annotations

import enum

from reaperd.model import SIGKILL, SIGSTOP, SIGTERM


class Stage(enum.Enum):
    """How far we have gone with a process."""

    FOUND = "found"
    ASKED = "asked"  # SIGTERM sent
    FROZEN = "frozen"  # SIGSTOP sent: it multiplied while it was being ended
    KILLED = "killed"  # SIGKILL sent
    STUCK = "stuck"  # SIGKILL did not end it: state D
    TRUSTED = "trusted"  # a tracker: it ends by itself once its workers are gone
    GONE = "gone"


class Event(enum.Enum):
    """What happens to a process that is being ended."""

    DUE = "due"  # its time in this stage is over
    MULTIPLIED = "multiplied"  # its session keeps growing while it is being ended
    EXITED = "exited"


NEXT = {
    (Stage.FOUND, Event.DUE): Stage.ASKED,
    (Stage.FOUND, Event.MULTIPLIED): Stage.FROZEN,
    (Stage.FOUND, Event.EXITED): Stage.GONE,
    (Stage.ASKED, Event.DUE): Stage.KILLED,
    (Stage.ASKED, Event.MULTIPLIED): Stage.FROZEN,
    (Stage.ASKED, Event.EXITED): Stage.GONE,
    (Stage.FROZEN, Event.DUE): Stage.KILLED,
    (Stage.FROZEN, Event.MULTIPLIED): Stage.FROZEN,
    (Stage.FROZEN, Event.EXITED): Stage.GONE,
    (Stage.KILLED, Event.DUE): Stage.STUCK,
    (Stage.KILLED, Event.MULTIPLIED): Stage.KILLED,
    (Stage.KILLED, Event.EXITED): Stage.GONE,
    (Stage.STUCK, Event.DUE): Stage.STUCK,
    (Stage.STUCK, Event.MULTIPLIED): Stage.STUCK,
    (Stage.STUCK, Event.EXITED): Stage.GONE,
    (Stage.TRUSTED, Event.DUE): Stage.KILLED,
    (Stage.TRUSTED, Event.MULTIPLIED): Stage.TRUSTED,
    (Stage.TRUSTED, Event.EXITED): Stage.GONE,
    (Stage.GONE, Event.DUE): Stage.GONE,
    (Stage.GONE, Event.MULTIPLIED): Stage.GONE,
    (Stage.GONE, Event.EXITED): Stage.GONE,
}

# The signal that takes a process into a stage.
SIGNAL = {Stage.ASKED: SIGTERM, Stage.FROZEN: SIGSTOP, Stage.KILLED: SIGKILL, Stage.STUCK: SIGKILL}
