"""How long work tells how far it is; what is shown of that is the caller's business."""

from typing import Protocol


class Progress(Protocol):
    """Called now and then with how much is done."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Take the news: ``done`` of ``total`` units, and a few words, e.g. ``"3 bad"``."""
        ...


def silent(done: int, total: int, note: str = "") -> None:
    """Show nothing."""
