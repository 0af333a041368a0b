"""The bar of a measurement on standard error: one line a stage, on the first rank only. Knows nothing of what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Bar = Callable[[str, int], AbstractContextManager[Callable[[], None]]]  # (what, how many) -> advance by one


@contextmanager
def bars(shown: bool) -> Iterator[Bar]:
    """`with bars(True) as bar: with bar("ops", 12) as advance: advance()`."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not shown, transient=True) as progress:

        @contextmanager
        def bar(what: str, total: int) -> Iterator[Callable[[], None]]:
            task = progress.add_task(f"measuring {what}", total=total)
            yield lambda: progress.advance(task)

        yield bar
