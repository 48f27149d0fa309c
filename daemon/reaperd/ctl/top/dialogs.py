"""What comes over the screen: a text to read, and a question that must be answered before anything is ended."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Static

from reaperd.ctl.top.actions import Question

_Result = TypeVar("_Result")
_FRAME_LINES = 8  # of the screen that are not the body's


def _plain(lines: Iterable[str]) -> Text:
    """Return lines as they are: whatever looks like markup in them is text."""
    return Text("\n".join(lines))


class _Dialog(ModalScreen[_Result]):
    """A frame with a heading, a body that scrolls where there is not enough room, and a last line."""

    BINDINGS = [
        Binding("up,k", "scroll(-1)", "up", show=False),
        Binding("down,j", "scroll(1)", "down", show=False),
    ]

    def on_resize(self) -> None:
        """Leave room for what is above and below the body: nobody agrees to what he cannot see the end of."""
        self.query_one("#body").styles.max_height = max(3, self.app.size.height - _FRAME_LINES)

    def action_scroll(self, by: int) -> None:
        """Scroll by a line."""
        self.query_one("#body").scroll_relative(y=by, animate=False)


class Panel(_Dialog[None]):
    """A text, and the keys that close it."""

    BINDINGS = [
        Binding("escape,q,e,question_mark,enter,ctrl+c", "close", "close"),
    ]

    def __init__(self, title: str, lines: Iterable[str]) -> None:
        super().__init__()
        self.heading = title
        self.lines = tuple(lines)

    def compose(self) -> ComposeResult:
        """Build it."""
        with Vertical(classes="dialog"):
            yield Static(_plain([self.heading]), classes="heading", markup=False)
            with VerticalScroll(id="body"):
                yield Static(_plain(self.lines), markup=False)
            yield Static(_plain(["Esc closes this, Up and Down scroll"]), classes="keys", markup=False)

    def action_close(self) -> None:
        """Go away."""
        self.dismiss(None)


class Ask(_Dialog[bool]):
    """A question; unless somebody says yes, nothing is done."""

    BINDINGS = [
        Binding("y", "answer(True)", "yes"),
        Binding("n,escape,q,ctrl+c", "answer(False)", "no"),
        Binding("left,right", "app.focus_next", "the other", show=False),
    ]

    AUTO_FOCUS = "#no"

    def __init__(self, question: Question) -> None:
        super().__init__()
        self.question = question

    def compose(self) -> ComposeResult:
        """Build it."""
        with Vertical(classes="dialog asks"):
            yield Static(_plain([self.question.title]), classes="heading", markup=False)
            with VerticalScroll(id="body", can_focus=False):
                yield Static(_plain(self.question.lines), markup=False)
            with Horizontal(classes="buttons"):
                yield Button("Yes (y)", id="yes", variant="error", compact=True)
                yield Button("No (n)", id="no", variant="default", compact=True)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Take the answer."""
        self.dismiss(event.button.id == "yes")

    def action_answer(self, yes: bool) -> None:
        """Take the answer."""
        self.dismiss(yes)
