"""What the settings mean for those who decide: users' names become uids, and so on."""

from __future__ import annotations

import logging
import os
import pwd

from reaperd.config import Config
from reaperd.model import ProcessId, Role
from reaperd.policy import Policy
from reaperd.signatures import Signature
from reaperd.verdicts import Fate, Rules

log = logging.getLogger(__name__)


def scan_rules(config: Config) -> Rules:
    """Return the rules that ``[scan]`` sets."""
    scan = config.scan
    return Rules(
        scan.orphan_age_limit_s,
        scan.cpu_threshold_percent,
        scan.cpu_window_s,
        scan.memory_threshold_bytes,
        Fate(scan.action),
        scan.quarantine_for_s,
        tuple(
            Signature(extra.name, Role(extra.role), "", tokens=extra.tokens)
            for extra in scan.extra_signatures
        ),
    )


def kill_policy(config: Config, untouchable: frozenset[ProcessId], spared: frozenset[ProcessId]) -> Policy:
    """Return how whoever is to end is ended, and who never is."""
    kill, protect = config.kill, config.protect
    return Policy(
        grace_s=kill.grace_s,
        exit_grace_s=kill.exit_grace_s,
        tracker_grace_s=kill.tracker_grace_s,
        reclaim_shm=kill.reclaim_shm,
        dry_run=kill.dry_run,
        max_per_uid=config.sessions.max_per_uid,
        untouchable=untouchable,
        daemon_pid=os.getpid(),
        only_uid=os.geteuid() or None,
        spared=spared,
        protected_uids=uids_of(protect.users, "[protect] users"),
        protected_names=frozenset(protect.names),
        # "nginx" is nginx.service, as for systemctl.
        protected_units=frozenset(unit if "." in unit else f"{unit}.service" for unit in protect.units),
    )


def uids_of(names: tuple[str, ...], where: str) -> frozenset[int]:
    """Return the uids of users that are named, or given by number; a name that nobody has is told of."""
    found = set()
    for name in names:
        try:
            found.add(int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid)
        except KeyError:
            log.warning("%s: there is no user %r, ignoring", where, name)
    return frozenset(found)
