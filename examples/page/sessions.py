"""What the page keeps of each visitor: the drawings under way, so that they can be cancelled, and a folder for files."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


class Sessions:
    """By session, which is what Gradio calls a browser tab."""

    def __init__(self):
        self._lock = threading.Lock()
        self._running: dict[str, set[threading.Event]] = {}
        self._folder = TemporaryDirectory(prefix="ssr-page-")

    @contextmanager
    def drawing(self, session: str) -> Iterator[threading.Event]:
        """While a drawing is under way: an event that is set when it is to stop."""
        event = threading.Event()
        with self._lock:
            self._running.setdefault(session, set()).add(event)
        try:
            yield event
        finally:
            with self._lock:
                self._running[session].discard(event)
                if not self._running[session]:
                    del self._running[session]

    def cancel(self, session: str) -> int:
        """Stop a session's drawings; how many there were."""
        with self._lock:
            events = list(self._running.get(session, ()))
        for event in events:
            event.set()
        return len(events)

    def file(self, session: str, name: str) -> Path:
        """A file of a session; the next one of that name takes its place."""
        folder = Path(self._folder.name) / session
        folder.mkdir(exist_ok=True)
        return folder / name

    def close(self, session: str) -> None:
        """A browser tab was closed."""
        self.cancel(session)
        shutil.rmtree(Path(self._folder.name) / session, ignore_errors=True)
