"""What the screen is made of: a block of lines, the table, and the events. They draw plain text in pieces, never markup.

Once a second most stays as it was: each draws, and has the terminal told, only what has changed in a line.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Input

from reaperd.ctl.top import layout, model
from reaperd.ctl.top.layout import Layout, Pieces

_style = functools.lru_cache(256)(Style.parse)


def changed(before: Strip, after: Strip) -> tuple[int, int]:
    """Return the columns from which on and up to which two lines of the same width differ; nothing differs: (0, 0)."""
    old, new = list(before), list(after)
    start = _alike(zip(old, new, strict=False))
    if start == after.cell_length:
        return 0, 0
    return start, after.cell_length - _alike(zip(reversed(old), reversed(new), strict=False))


def _alike(pairs: Iterable[tuple[Segment, Segment]]) -> int:
    """Return how many columns the pieces take that are the same, up to the first that is not."""
    width = 0
    for one, other in pairs:
        if one != other:
            break
        width += one.cell_length
    return width


class _Lines(Widget):
    """Lines; of those that have changed, the columns that have are drawn again."""

    def __init__(self, *, id: str) -> None:  # noqa: A002 - as Textual has it
        super().__init__(id=id)
        # By line on the screen: what its look depends on, and it.
        self._drawn: dict[int, tuple[object, Strip]] = {}
        self._base: Style | None = None  # the widget's own style, once it is known; to find it out takes long

    def what_is_at(self, y: int) -> object:
        """Return all that the look of line ``y`` depends on besides the widget's own style, None where there is none."""
        raise NotImplementedError

    def draw(self, y: int) -> Pieces:
        """Return line ``y``, which there is."""
        raise NotImplementedError

    def redraw_changed(self) -> None:
        """Draw what has changed since it was drawn; what has never been drawn is due anyway."""
        top, width = self.scroll_offset.y, self.size.width
        for place in [place for place in self._drawn if place < self.size.height]:
            before = self._drawn[place][1]
            after = self._line(place, top)
            if after is before:
                continue
            start, end = (0, width) if before.cell_length != width else changed(before, after)
            if end > start:
                self.refresh(Region(start, place, end - start, 1))

    def _line(self, place: int, top: int) -> Strip:
        if self._base is None:
            self._base = self.rich_style
        here, width = (self.what_is_at(top + place), self._base), self.size.width
        known = self._drawn.get(place)
        if known is not None and known[1].cell_length == width and known[0] == here:
            return known[1]
        pieces = self.draw(top + place) if here[0] is not None else []
        segments = [Segment(text, self._base + _style(words)) for text, words in pieces]
        strip = Strip(segments).adjust_cell_length(width, self._base)
        self._drawn[place] = here, strip
        return strip

    def notify_style_update(self) -> None:
        """Find out anew what it looks like."""
        self._base = None
        super().notify_style_update()

    def render_line(self, y: int) -> Strip:
        """Return the line that is ``y`` below the upper edge."""
        return self._line(y, self.scroll_offset.y)


class Block(_Lines):
    """Lines that are given to it, as many rows as there are."""

    DEFAULT_CSS = "Block { height: auto; }"

    def __init__(self, *, id: str) -> None:  # noqa: A002 - as Textual has it
        super().__init__(id=id)
        self._lines: list[Pieces] = []

    def show(self, lines: list[Pieces]) -> None:
        """Show these from now on."""
        if lines != self._lines:
            taller = len(lines) != len(self._lines)
            self._lines = lines
            if taller:
                self.refresh(layout=True)
            else:
                self.redraw_changed()

    @property
    def text(self) -> list[str]:
        """What is to be read, line by line."""
        return ["".join(text for text, _ in line) for line in self._lines]

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Return how many lines there are."""
        del container, viewport, width
        return len(self._lines)

    def what_is_at(self, y: int) -> object:
        """Return line ``y``."""
        return self._lines[y] if y < len(self._lines) else None

    def draw(self, y: int) -> Pieces:
        """Return line ``y``."""
        return self._lines[y]


class _Scrolled(_Lines, ScrollView):
    """Lines of which some are to be seen."""

    def resize_to(self, count: int) -> None:
        """Have so many lines."""
        size = Size(0, count)
        if size != self.virtual_size:
            self.virtual_size = size


class Table(_Scrolled, can_focus=True):
    """The rows, one of them under the cursor: that stays on what it is about, wherever that moves to."""

    BINDINGS = [
        Binding("up,k", "move(-1)", "up", show=False),
        Binding("down,j", "move(1)", "down", show=False),
        Binding("pageup", "page(-1)", "page up", show=False),
        Binding("pagedown", "page(1)", "page down", show=False),
        Binding("home,g", "to(0)", "first", show=False),
        Binding("end,G", "to(-1)", "last", show=False),
        Binding("left", "fold(True)", "fold", show=False),
        Binding("right", "fold(False)", "unfold", show=False),
        Binding("space,enter", "fold", "fold or unfold", show=False),
    ]

    class Folded(Message):
        """The rows below one are to be hidden, or shown (None: the other way round)."""

        def __init__(self, key: model.Key, fold: bool | None) -> None:
            super().__init__()
            self.key = key
            self.fold = fold

    def __init__(self, *, id: str) -> None:  # noqa: A002 - as Textual has it
        super().__init__(id=id)
        self.lines: list[model.Line] = []
        self.cursor = 0
        self._at = layout.layout(80, gpu=False)
        self._stale = False
        self._holds = False  # somebody has put the cursor where it is

    @property
    def chosen(self) -> model.Row | None:
        """The row under the cursor."""
        return self.lines[self.cursor].row if self.lines else None

    def show(self, lines: list[model.Line], at: Layout, *, stale: bool) -> None:
        """Show these rows from now on; the one under the cursor stays where it is on the screen, if it is still there."""
        before, place = self.chosen, self.cursor - self.scroll_offset.y
        self.lines, self._at, self._stale = lines, at, stale
        self.resize_to(len(lines))
        found = self._find(before.key) if before is not None and self._holds else None
        if found is None:  # it has gone, or nobody has chosen it: whoever has taken its place
            found = min(self.cursor, max(0, len(lines) - 1))
        elif found != self.cursor and self.is_scrolled:
            self.scroll_to(y=found - place, animate=False, force=True)
        self.cursor = found
        self._keep_in_view()
        self.redraw_changed()

    @property
    def is_scrolled(self) -> bool:
        """Whether the first row is out of sight: who is at the top wants to see what comes there."""
        return self.scroll_offset.y > 0

    def _find(self, key: model.Key) -> int | None:
        return next((place for place, line in enumerate(self.lines) if line.row.key == key), None)

    def _keep_in_view(self) -> None:
        top, height = self.scroll_offset.y, self.size.height
        if self.cursor < top:
            self.scroll_to(y=self.cursor, animate=False, force=True)
        elif height and self.cursor >= top + height:
            self.scroll_to(y=self.cursor - height + 1, animate=False, force=True)

    def _go(self, place: int) -> None:
        self.cursor = max(0, min(place, len(self.lines) - 1))
        self._holds = self.cursor > 0
        self._keep_in_view()
        self.redraw_changed()

    def action_move(self, by: int) -> None:
        """Move the cursor."""
        self._go(self.cursor + by)

    def action_page(self, by: int) -> None:
        """Move the cursor by a screen."""
        self._go(self.cursor + by * max(1, self.size.height - 1))

    def action_to(self, place: int) -> None:
        """Move the cursor to the first row, or the last."""
        self._go(place if place >= 0 else len(self.lines) - 1)

    def action_fold(self, fold: bool | None = None) -> None:
        """Hide or show what is below the row, or below the one that it hangs on."""
        place = self.cursor
        while 0 < place < len(self.lines) and self.lines[place].folded is None:
            place -= 1
        if self.lines:
            if fold is not False:
                self._go(place)
            self.post_message(self.Folded(self.lines[place].row.key, fold))

    def on_click(self, event: events.Click) -> None:
        """Move the cursor there; a second click folds."""
        place = self.scroll_offset.y + event.y
        if place < len(self.lines):
            again = place == self.cursor
            self._go(place)
            if again and self.lines[place].folded is not None:
                self.action_fold()

    def what_is_at(self, y: int) -> object:
        """Return all that the look of line ``y`` depends on."""
        if y >= len(self.lines):
            return None
        return self.lines[y], self._at, self._stale, y == self.cursor

    def draw(self, y: int) -> Pieces:
        """Return line ``y``."""
        style = "reverse" if y == self.cursor else "dim" if self._stale else None
        return [(text, style or own) for text, own in layout.row(self.lines[y], self._at)]


class Events(_Scrolled, can_focus=True):
    """What happened: the last lines, unless somebody has scrolled up to read."""

    def __init__(self, *, id: str) -> None:  # noqa: A002 - as Textual has it
        super().__init__(id=id)
        self.events: tuple[dict[str, object], ...] = ()
        self._at = layout.layout(80, gpu=False)

    def show(self, events: tuple[dict[str, object], ...], at: Layout) -> None:
        """Show these from now on."""
        if (events, at) == (self.events, self._at):
            return
        follows = self.scroll_offset.y >= self.max_scroll_y
        self.events, self._at = events, at
        self.resize_to(len(events))
        if follows:
            self.to_end()
        self.redraw_changed()

    def to_end(self) -> None:
        """Show the last ones."""
        self.scroll_to(y=max(0, len(self.events) - self.size.height), animate=False, force=True)

    def on_resize(self) -> None:
        """Stay at the end."""
        self.to_end()

    def what_is_at(self, y: int) -> object:
        """Return all that the look of line ``y`` depends on."""
        return (self.events[y], self._at) if y < len(self.events) else None

    def draw(self, y: int) -> Pieces:
        """Return line ``y``."""
        return layout.event(self.events[y], self._at)


class Filter(Input):
    """Where somebody types what to look for."""

    BINDINGS = [
        Binding("enter", "submit", "keep the filter"),
        Binding("escape", "app.calm", "show everything again"),
    ]

    def __init__(self, *, id: str) -> None:  # noqa: A002 - as Textual has it
        super().__init__(id=id, placeholder="a name, a pid, a framework, a user", compact=True)
