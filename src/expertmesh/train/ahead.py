"""An iterator whose next item can be fetched before it is wanted."""

from collections.abc import Iterator
from typing import Any


class Ahead:
    """Yields what `source` does. After `fetch` the next item is there, or the error in its place, which `next` raises.

    A step waits for the device once; what the next step learns from is collated before, while the device works.
    """

    def __init__(self, source: Iterator[Any]):
        self.source = source
        self._fetched: list[tuple[Any, Exception | None]] = []

    def fetch(self) -> None:
        """Get the next item, unless it is there."""
        if not self._fetched:
            try:
                self._fetched.append((next(self.source), None))
            except Exception as error:  # StopIteration among them
                self._fetched.append((None, error))

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> Any:
        self.fetch()
        item, error = self._fetched.pop()
        if error is not None:
            raise error
        return item
