"""Puts leaders into control groups of their own, one after the other, by a helper: systemd is asked, and may let us wait."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from agent import wire
from reaperd.isolation import NotIsolated, Place, path_of_scope, place_below, place_by_systemd, scope_name
from reaperd.linux import helper, pidfd, transient
from reaperd.linux.cgroups import CGroups
from reaperd.linux.exhaustion import reason_of
from reaperd.linux.procfs import ProcessGone
from reaperd.model import Session, SessionKey
from reaperd.observer import Observer
from reaperd.poller import Poller

log = logging.getLogger(__name__)

WITHIN_S = 4.0  # a script waits for it
_MOST_WAITING, _MOST_OF_ONE_UID = 256, 16

Done = Callable[[str | None, str], None]  # the scope, None and why where there is none


class _Wish(NamedTuple):
    """A session that waits for its scope."""

    session: Session
    handle: int  # a pidfd of its leader, ours
    done: Done
    asked_at_s: float


class _Run(NamedTuple):
    """A helper at work for one session."""

    wish: _Wish
    helper: helper.Helper


class Isolator:
    """Owns the helper, and the groups that were made without systemd."""

    def __init__(self, poller: Poller, observer: Observer, socket: str, *, system: bool) -> None:
        """``socket`` is the daemon's; ``system`` says whose systemd is asked: the system's, or that of the user that it is."""
        self._poller = poller
        self._observer = observer
        self._socket = socket
        self._system = system
        self._cgroups = CGroups()
        self._waiting: deque[_Wish] = deque()
        self._running: _Run | None = None

    @property
    def deadline_s(self) -> float | None:
        """When there is something to do though no helper has ended, None for never."""
        if self._running is None:
            return 0.0 if self._waiting else None
        return self._running.wish.asked_at_s + WITHIN_S

    def ask(self, session: Session, handle: int, done: Done) -> None:
        """Give ``session`` a scope of its own, and call ``done`` when that is over; ``handle`` is a pidfd of its leader."""
        ours = sum(1 for wish in self._waiting if wish.session.uid == session.uid)
        if ours >= _MOST_OF_ONE_UID or len(self._waiting) >= _MOST_WAITING:
            done(None, "too many others wait for it")
            return
        self._waiting.append(_Wish(session, os.dup(handle), done, time.monotonic()))
        self._start_next()

    def step(self) -> None:
        """Go on where a helper is done, or has taken too long."""
        run = self._running
        if run is None:  # what ran out in the middle of a step has kept the next one from being begun
            self._start_next()
            return
        late = time.monotonic() >= run.wish.asked_at_s + WITHIN_S
        if pidfd.has_exited(run.helper.pidfd) or late:
            self._poller.unwatch(run.helper.pidfd)
            told = helper.finish_helper(run.helper)
            self._running = None
            self._finish(run.wish, told, late=late)
            self._start_next()

    def scope_in(self, key: SessionKey, cgroup: str) -> str | None:
        """Return the session's own control group where ``cgroup`` is that or below it, None where it is not, or is not ours.

        Users name the groups that are theirs as they like, and what is theirs they thaw, and move others into.
        """
        scope = path_of_scope(key, cgroup, self._socket)
        return scope if scope is not None and self._cgroups.owner(scope) == os.geteuid() else None

    def let_go(self, session: Session) -> None:
        """The session is over: remove its group, where systemd does not do so."""
        if session.scope is None or transient.is_running():
            return
        try:
            self._cgroups.remove(session.scope)
        except OSError as error:
            log.debug("cannot remove cgroup %r: %s", session.scope, error.strerror)

    def close(self) -> None:
        """End the helper; who waits still is isolated at no time."""
        if self._running is not None:
            self._poller.unwatch(self._running.helper.pidfd)
            helper.finish_helper(self._running.helper)
            os.close(self._running.wish.handle)
            self._running = None
        while self._waiting:
            os.close(self._waiting.popleft().handle)

    # -- one session -------------------------------------------------------------------------

    def _start_next(self) -> None:
        while self._running is None and self._waiting:
            wish = self._waiting.popleft()
            try:
                work = self._work_for(wish.session)
                started = helper.start_helper(work, keep=(wish.handle,))
            except NotIsolated as reason:
                self._end(wish, None, str(reason))
            except ProcessGone:
                self._end(wish, None, "it has ended")
            except (OSError, MemoryError) as error:
                self._end(wish, None, f"cannot start a helper: {reason_of(error)}")
            else:
                self._running = _Run(wish, started)
                self._poller.watch(started.pidfd, lambda: None)

    def _work_for(self, session: Session) -> Callable[[], Any]:
        """Return what a helper is to do, which keeps a pidfd of the leader; NotIsolated, ProcessGone, OSError."""
        pid = session.leader.pid
        if not self._observer.is_beside_us(pid):
            raise NotIsolated("it runs in a container, whose control group it would leave")
        memberships = self._observer.proc.cgroup(pid)
        cgroup = wire.parse_cgroup(memberships)
        if not transient.is_running():
            own = self._own_subtree(cgroup)
            path = f"{own}/{scope_name(session.key, self._socket)}"
            return functools.partial(_make_group, self._cgroups, path, pid)
        place = place_by_systemd(cgroup, session.uid, system=self._system)
        if left := self._cgroups.limits_left(memberships, place.above):
            raise NotIsolated(f"it would leave a limit: {left}")
        address = transient.SYSTEM_BUS if self._system else transient.user_bus(session.uid)
        wanted = self._scope_for(session, place, memberships)
        return functools.partial(_start_scope, wanted, address)

    def _scope_for(self, session: Session, place: Place, memberships: str) -> transient.Wanted:
        return transient.Wanted(
            scope_name(session.key, self._socket),
            place.slice,
            place.part_of,
            f"Reaper's session {session.id}",  # no text of the user's: systemd writes it into a file
            session.leader.pid,
            self._cgroups.most_tasks(memberships, place.above),
        )

    def _own_subtree(self, cgroup: str) -> str:
        own = self._observer.cgroup_path(os.getpid())
        family = {os.getpid(), *self._observer.proc.children(os.getpid())}
        own = place_below(own, cgroup, self._cgroups.residents_of_one(own), family)
        if self._cgroups.owner(own) != os.geteuid():
            raise NotIsolated(f"there is no systemd here, and {own} does not belong to the daemon")
        return own

    def _finish(self, wish: _Wish, told: Any, *, late: bool) -> None:
        session = wish.session
        if pidfd.has_exited(wish.handle):
            # Who got its pid may be in there now.
            self._end(wish, None, "it has ended")
            return
        scope = None
        # OSError: descriptors have run out; its marks must do.
        with contextlib.suppress(ProcessGone, OSError):
            scope = self.scope_in(session.key, self._observer.cgroup_path(session.leader.pid))
        if scope is not None:
            self._end(wish, scope, "")
        elif isinstance(told, str) and told:
            self._end(wish, None, told)
        else:
            self._end(
                wish, None, f"systemd has not done it within {WITHIN_S:g} s" if late else "its helper failed"
            )

    def _end(self, wish: _Wish, scope: str | None, why: str) -> None:
        os.close(wish.handle)
        wish.done(scope, why)


def _start_scope(wanted: transient.Wanted, address: str) -> str:
    """Return why there is no scope, "" where there is."""
    try:
        transient.start_scope(wanted, address, helper.FIRST_KEPT, within_s=WITHIN_S)
    except transient.ScopeRefused as reason:
        return f"systemd does not do it: {reason}"
    except ImportError as error:
        return f"{error.name} is not installed"
    return ""


def _make_group(cgroups: CGroups, path: str, pid: int) -> str:
    if pidfd.has_exited(helper.FIRST_KEPT):
        return "it has ended"  # and its pid may be another's
    try:
        cgroups.make(path, pid)
        if pidfd.has_exited(helper.FIRST_KEPT):  # nobody would remove the group
            cgroups.remove(path)
    except OSError as error:
        return f"cannot make {path}: {error.strerror}"
    return ""
