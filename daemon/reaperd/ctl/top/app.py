"""The screen of ``reaperctl top``: what the source tells goes into the widgets, and what the keys ask for to the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Footer, Input

from reaperd.ctl import DONE, CommandError
from reaperd.ctl.cleanup import Id
from reaperd.ctl.link import Link
from reaperd.ctl.text import Look, plain, wrapped
from reaperd.ctl.top import actions, layout, model, tty
from reaperd.ctl.top.actions import Answer, Question
from reaperd.ctl.top.dialogs import Ask, Panel
from reaperd.ctl.top.help import HELP
from reaperd.ctl.top.model import Kind, Row, Sort, View
from reaperd.ctl.top.source import Lost, News, Source
from reaperd.ctl.top.widgets import Block, Events, Filter, Table

_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
_WIDEST_PANEL = 110  # columns of text
_MOST_SAID = 2  # lines of an answer for which there is room without a panel


class Top(App[int]):
    """The screen; it ends with the exit code of the command."""

    TITLE = "reaperctl top"
    ENABLE_COMMAND_PALETTE = False
    CSS_PATH = "top.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("question_mark,h,f1", "help", "help", key_display="?"),
        Binding("slash", "filter", "filter", key_display="/"),
        Binding("s", "sort", "sort"),
        Binding("o", "own", "own or all", show=False),
        Binding("z", "fold_all", "fold all", show=False),
        Binding("e", "explain", "explain"),
        Binding("x", "stop", "stop"),
        Binding("c", "clean_up", "clean up"),
        Binding("p", "protect", "protect"),
        Binding("r", "release", "release"),
        Binding("q,ctrl+c", "quit", "quit", key_display="q"),
        Binding("ctrl+z", "suspend_process", "to the shell", show=False),
        Binding("u", "protect(True)", "protect no longer", show=False),
        Binding("C", "sort('cpu')", "sort by CPU", show=False),
        Binding("M", "sort('memory')", "sort by memory", show=False),
        Binding("A", "sort('age')", "sort by age", show=False),
        Binding("N", "sort('name')", "sort by name", show=False),
        Binding("escape", "calm", "no filter", show=False),
        Binding("tab,shift+tab", "other_part", "the other part", show=False),
    ]

    class Heard(Message):
        """The source has something to tell."""

        def __init__(self, told: News | Lost) -> None:
            super().__init__()
            self.told = told

    class Told(Message):
        """The daemon has answered what a key asked for."""

        def __init__(self, title: str, answer: Answer | Question, *, in_panel: bool) -> None:
            super().__init__()
            self.heading = title
            self.answer = answer
            self.in_panel = in_panel

    def __init__(
        self,
        link: Link,
        interval_s: float,
        *,
        gpu: Callable[[], Mapping[int, int]] = dict,
        uid: int | None = None,
        unicode: bool = True,
    ) -> None:
        # With any other theme than one of the terminal's own colours, shades of grey would be left.
        plain_colours = bool(os.environ.get("NO_COLOR"))
        super().__init__(ansi_color=plain_colours or None)
        if plain_colours:
            self.theme = "ansi-dark"
        self.animation_level = "none"
        self.link = link
        self.source = Source(link, interval_s, self._hear, gpu)
        self.seen = View()
        self.news: News | None = None
        self.lost = ""
        self._uid = os.geteuid() if uid is None else uid
        self._unicode = unicode

    def compose(self) -> ComposeResult:
        """Build it."""
        yield Block(id="small")
        yield Block(id="head")
        yield Block(id="titles")
        yield Table(id="table")
        yield Block(id="eventtitle")
        yield Events(id="events")
        yield Block(id="said")
        yield Filter(id="filter")
        yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        """Begin to look."""
        self.base.query_one("#filter").display = False
        self.base.query_one(Table).focus()
        if not self.is_headless:
            loop = asyncio.get_running_loop()
            for number in _ENDING:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup(1) leaves SIGHUP
                    loop.add_signal_handler(number, self.exit, 128 + number)
            tty.end_with(sys.stdin.fileno())
        self.app_resume_signal.subscribe(self, self._drawn_over)
        self.draw()
        self.source.start()

    def on_unmount(self) -> None:
        """Look no more."""
        self.source.close()

    # -- what is to be seen ------------------------------------------------------------------

    def _hear(self, told: News | Lost) -> None:
        """Take what the source found; in its thread."""
        with contextlib.suppress(RuntimeError):  # the screen has just been closed
            self.post_message(self.Heard(told))

    def on_top_heard(self, message: Heard) -> None:
        """Show what there is now."""
        told = message.told
        if isinstance(told, Lost):
            self.lost = told.reason
        else:
            self.news, self.lost = told, ""
        self.draw()

    def on_resize(self, event: events.Resize) -> None:
        """Lie otherwise, or say that there is too little room."""
        small = event.size.width < layout.LEAST_WIDTH or event.size.height < layout.LEAST_HEIGHT
        self.set_class(small, "too-small")
        self.call_after_refresh(self.draw)

    def draw(self) -> None:
        """Put what there is on the screen; what has not changed is left as it is."""
        if not self.screen_stack or not self.is_running:  # it is being closed
            return
        width = self.size.width
        found = self.news.found if self.news else None
        at = layout.layout(width, gpu=bool(found and found.sums.gpu_bytes), unicode=self._unicode)
        lines = model.lines(found, self.seen) if found else []
        self.base.query_one("#small", Block).show(layout.too_small(width, self.size.height, at))
        self.base.query_one("#head", Block).show(self._head(at, empty=not lines))
        self.base.query_one("#titles", Block).show([layout.titles(at, self.seen.sort)])
        self.base.query_one(Table).show(lines, at, stale=bool(self.lost))
        events = self.base.query_one(Events)
        self.base.query_one("#eventtitle", Block).show([layout.event_title(at, chosen=events.has_focus)])
        events.show(self.news.events if self.news else (), at)

    @property
    def base(self) -> Screen[Any]:
        """The screen below whatever has come over it."""
        return self.screen_stack[0]

    def _head(self, at: layout.Layout, *, empty: bool) -> list[layout.Pieces]:
        lines = layout.head(self.news.found, self.seen, at) if self.news else []
        if self.lost:
            lines += layout.lost(self.lost, self.news.found.at if self.news else None, at)
        elif self.news is None:
            lines = [layout.fitted([(" asking the daemon ...", "dim")], at.width, at.look)]
        elif not self.news.found.sessions and not self.news.found.orphans:
            lines.append(layout.nothing(at))
        elif empty:
            lines.append(layout.nothing_found(at))
        return lines

    def say(self, lines: Iterable[str], style: str = "") -> None:
        """Say something below the table, for as long as nothing else is to be said."""
        look = Look(self.size.width - 2, unicode=self._unicode)
        told = [part for line in lines for part in wrapped(plain(line), look)]
        block = self.base.query_one("#said", Block)
        block.show([layout.fitted([(f" {line}", style)], self.size.width, look) for line in told])

    # -- what the keys ask for ---------------------------------------------------------------

    def _choose(self, seen: View) -> None:
        self.seen = seen
        self.draw()

    def action_sort(self, by: str = "") -> None:
        """Sort by the next figure, or by this one."""
        self._choose(self.seen._replace(sort=Sort(by) if by else self.seen.sort.next()))

    def action_own(self) -> None:
        """Show all that may be seen, or one's own alone."""
        self._choose(self.seen._replace(only_uid=self._uid if self.seen.only_uid is None else None))

    def action_fold_all(self) -> None:
        """Hide all that hangs on something, or show it."""
        self._choose(self.seen._replace(fold_all=not self.seen.fold_all, folded=frozenset()))

    def on_table_folded(self, message: Table.Folded) -> None:
        """Hide or show what hangs on one row."""
        if message.fold is None or message.fold != self.seen.is_folded(message.key):
            self._choose(self.seen._replace(folded=self.seen.folded ^ {message.key}))

    def action_other_part(self) -> None:
        """Have the keys that move go to the events, or back to the rows."""
        parts = self.base.query_one(Table), self.base.query_one(Events)
        parts[parts[0].has_focus].focus()
        self.call_after_refresh(self.draw)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool:
        """Say whether a key means that now: while somebody types, most are text."""
        del parameters
        typing = bool(self.screen_stack) and isinstance(self.focused, Filter)
        return not typing or action in ("calm", "quit")

    def action_filter(self) -> None:
        """Let somebody type what to look for."""
        line = self.base.query_one("#filter", Filter)
        line.display = True
        line.value = self.seen.text
        line.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Show what has that in it."""
        if event.input.display:
            self._choose(self.seen._replace(text=plain(event.value)))

    def on_input_submitted(self) -> None:
        """Go back to the rows."""
        self._close_filter()

    def _close_filter(self) -> None:
        self.base.query_one("#filter").display = False
        self.base.query_one(Table).focus()

    def action_calm(self) -> None:
        """Show everything again, and say no more what was said last."""
        self._close_filter()
        self.say(())
        self._choose(self.seen._replace(text=""))

    def action_help(self) -> None:
        """Show all keys."""
        self.push_screen(Panel("The keys", HELP))

    def _drawn_over(self, _: object) -> None:
        """Draw all of it: the terminal was the shell's for a while."""
        self.refresh(layout=True)

    def action_suspend_process(self) -> None:
        """Give the terminal to the shell until that says `fg`."""
        if tty.has_shell():
            super().action_suspend_process()
        else:
            self.say(["no shell started this by itself: none could have it go on"], "yellow")

    async def action_quit(self) -> None:
        """Leave."""
        self.exit(DONE)

    # -- what the daemon is asked for --------------------------------------------------------

    def action_explain(self) -> None:
        """Show how a process is judged, and why."""
        row = self._process("explain")
        if row is not None:
            look = self._look_of_panel()
            self._ask(f"Explain pid {row.pid}", lambda: actions.explain(self.link, row, look), in_panel=True)

    def action_protect(self, undo: bool = False) -> None:
        """Have a process left alone, or no longer."""
        row = self._process("protect")
        if row is not None:
            self._ask("Protect", lambda: actions.protect(self.link, row, undo=undo))

    def action_release(self) -> None:
        """Let a process go on that was stopped."""
        row = self._process("release")
        if row is not None:
            self._ask("Release", lambda: actions.release(self.link, row))

    def action_stop(self) -> None:
        """End the session, or the orphan, once somebody has agreed."""
        row = self.base.query_one(Table).chosen
        if (
            row is not None
            and row.kind is Kind.ORPHAN
            and row.pid is not None
            and row.start_ticks is not None
        ):
            self._clean_up(frozenset([(row.pid, row.start_ticks)]))
        elif row is not None and row.kind is Kind.ORPHANS:
            self.action_clean_up()
        elif row is not None and (family := self._session_of(row)) is not None:
            self._ask("Stop", lambda: actions.stopping(self.link, family))

    def _session_of(self, row: Row) -> model.Family | None:
        sessions = self.news.found.sessions if self.news else ()
        wanted = (row.uid, row.session)
        return next((one for one in sessions if (one.head.uid, one.head.session) == wanted), None)

    def action_clean_up(self) -> None:
        """End the orphans, once somebody has agreed; where only some are shown, those."""
        only = None
        if self.seen.text:
            unfolded = self.seen._replace(folded=frozenset(), fold_all=False)
            shown = model.lines(self.news.found, unfolded) if self.news is not None else []
            rows = [line.row for line in shown if line.row.kind is Kind.ORPHAN]
            only = frozenset((row.pid or 0, row.start_ticks or 0) for row in rows)
        self._clean_up(only)

    def _clean_up(self, only: frozenset[Id] | None) -> None:
        look = self._look_of_panel()
        self._ask("Clean up", lambda: actions.cleaning(self.link, only, self.seen.only_uid, look))

    def _look_of_panel(self) -> Look:
        """Return what fits into a panel: nine tenths of the screen, less its frame."""
        return Look(min(self.size.width * 9 // 10 - 6, _WIDEST_PANEL), unicode=self._unicode)

    def _process(self, verb: str) -> Row | None:
        """Return the row under the cursor where that is a process, or stands for its leader."""
        row = self.base.query_one(Table).chosen
        if row is None or row.pid is None:
            self.say([f"choose a process to {verb}"], "yellow")
            return None
        return row

    def _ask(self, title: str, question: Callable[[], Answer | Question], *, in_panel: bool = False) -> None:
        """Ask the daemon in a thread of its own: the screen goes on meanwhile."""
        self.say([f"{title}: asking the daemon ..."], "dim")

        def run() -> None:
            # Where the mistake is ours: what was asked for may have been done all the same.
            answer: Answer | Question = Answer(
                (f"{title}: this has failed: nobody knows how far it went",), failed=True
            )
            try:
                answer = question()
            except CommandError as error:
                answer = Answer((str(error),), failed=True)
            finally:
                with contextlib.suppress(RuntimeError):  # the screen has been closed meanwhile
                    self.post_message(self.Told(title, answer, in_panel=in_panel))

        threading.Thread(target=run, name=title, daemon=True).start()

    def on_top_told(self, message: Told) -> None:
        """Show what the daemon has said, or ask first."""
        answer = message.answer
        self.say(())
        if isinstance(answer, Question):
            self._confirm(message.heading, answer)
            return
        self.source.poke()
        if message.in_panel and not answer.failed:
            self.push_screen(Panel(message.heading, answer.lines))
            return
        self.say(answer.lines[:_MOST_SAID], "bold red" if answer.failed else "green")
        if len(answer.lines) > _MOST_SAID:
            self.push_screen(Panel(f"{message.heading}: what became of it", answer.lines))

    def _confirm(self, title: str, question: Question) -> None:
        def answered(yes: bool | None) -> None:
            if yes:
                self._ask(title, question.act)
            else:
                self.say(["nothing was ended"])

        self.push_screen(Ask(question), answered)
