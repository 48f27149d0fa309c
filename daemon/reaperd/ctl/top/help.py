"""The keys of the screen, for people."""

from __future__ import annotations

HELP = (
    "Moving",
    "  ↑ ↓  k j          one row up or down        PgUp PgDn   one page",
    "  Home End  g G     the first or last row     Tab         to the events and back",
    "  ← →  Space Enter  hide or show what hangs on a row      z  of all rows",
    "",
    "What is shown",
    "  /    only what has a text in it: a name, a pid, a framework, a user",
    "  o    only your own, or all that you may see",
    "  s    sort by CPU, memory, age or name in turn;  C M A N  by one of them",
    "  Esc  everything again",
    "",
    "About the row under the cursor",
    "  e    explain: how the process is judged, and on what evidence",
    "  p    protect: Reaper leaves the process alone;  u  no longer",
    "  r    release: a process that was stopped goes on, and is left alone",
    "  x    stop the session, or end the orphan",
    "",
    "  c    clean up: end the orphans that are shown",
    "  q    leave",
    "",
    "x and c say what they would do, and ask first. All is done by the daemon, with your own",
    "rights: what is another user's is not yours to end, and its command line is not shown.",
    "",
    "An orphan's state is what the daemon would do about it, and in how many minutes and seconds",
    "it is to be ended if it goes on as it does now. No time: no rule would have it ended.",
    "CPU is in percent of one core; memory counts pages shared by several processes in each.",
)
