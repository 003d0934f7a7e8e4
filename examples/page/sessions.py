"""The state of each session: the running generations, which can be cancelled, and a folder for files."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


class Sessions:
    """The state of all sessions. In Gradio, each browser tab is a session."""

    def __init__(self):
        self._lock = threading.Lock()
        self._running: dict[str, dict[threading.Event, str]] = {}
        self._folder = TemporaryDirectory(prefix="ssr-page-")

    @contextmanager
    def generating(self, session: str, kind: str) -> Iterator[threading.Event]:
        """Registers a running generation inside the context. Yields an event that is set when the generation has to stop."""
        event = threading.Event()
        with self._lock:
            self._running.setdefault(session, {})[event] = kind
        try:
            yield event
        finally:
            with self._lock:
                del self._running[session][event]
                if not self._running[session]:
                    del self._running[session]

    def cancel(self, session: str, kind: str | None = None) -> int:
        """Stops the running generations of a session, or only those of a kind, and returns their number."""
        with self._lock:
            running = self._running.get(session, {})
            events = [event for event, other in running.items() if kind in (None, other)]
        for event in events:
            event.set()
        return len(events)

    def file(self, session: str, name: str) -> Path:
        """Returns the path of a file of the session. A later file with the same name overwrites it."""
        folder = Path(self._folder.name) / session
        folder.mkdir(exist_ok=True)
        return folder / name

    def close(self, session: str) -> None:
        """Stops the generations of a session and deletes its files, after its browser tab was closed."""
        self.cancel(session)
        shutil.rmtree(Path(self._folder.name) / session, ignore_errors=True)
