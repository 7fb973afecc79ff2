"""A local HTTP server that fails on purpose: errors, stalls, cut and flipped bytes, then recovers."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@dataclass
class BadServer:
    """What the server does, and what it was asked.

    Attributes:
        address: http://127.0.0.1:PORT
        plan: faults of a path, one for each request from the first on: "403", "500", "stall", "cut" (half of
            what was asked for), "flip" (one bit), "endless" (zeros without a length), "drip" (50 s of single
            bytes), "ok"; after them all is well.
        always: the fault of every request whose path ends so.
        asked: requests by path.
        sent: bytes sent by path.
        ranges: Range headers that were heard.
    """

    root: Path
    address: str = ""
    plan: dict[str, list[str]] = field(default_factory=dict)
    default: tuple[str, ...] = ()
    always: dict[str, str] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)
    heard: list[dict[str, str]] = field(default_factory=list)
    knows_ranges: bool = True
    released: threading.Event = field(default_factory=threading.Event)

    def fault(self, path: str) -> str:
        """What happens to this request."""
        number = self.asked[path]
        self.asked[path] += 1
        for end, fault in self.always.items():
            if path.endswith(end):
                return fault
        faults = self.plan.get(path, self.default)
        return faults[number] if number < len(faults) else "ok"


def _handler(state: BadServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(self.path.split("?")[0].lstrip("/"))
            state.heard.append(dict(self.headers.items()))
            fault = state.fault(path)
            file = state.root / path
            if fault in ("403", "500"):
                return self.send_error(int(fault))
            if fault in ("endless", "drip"):
                self.send_response(200)
                self.end_headers()
                piece, pause = (bytes(1 << 20), 0.0) if fault == "endless" else (b"{", 0.05)
                with suppress(OSError):
                    for _ in range(1000):
                        self.wfile.write(piece)
                        time.sleep(pause)
                return None
            if not file.is_file():
                return self.send_error(404)
            data = file.read_bytes()
            start, wanted = 0, self.headers.get("Range")
            if wanted and state.knows_ranges:
                state.ranges.append(wanted)
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
            body = bytearray(data[start:])
            if fault == "flip":
                body[len(body) // 2] ^= 16
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            stop = len(body) // 2 if fault in ("cut", "stall") else len(body)
            # Counted first: the reader may look as soon as it has the last byte.
            state.sent[path] += stop
            self.wfile.write(body[:stop])
            self.wfile.flush()
            if fault == "stall":
                state.released.wait(600)
            self.close_connection = True
            return None

        def log_message(self, *_: object) -> None:
            """Silence."""

    return Handler


@contextmanager
def serve(root: Path, **how: object) -> Iterator[BadServer]:
    """Serve a folder until the block ends."""
    state = BadServer(root, **how)  # type: ignore[arg-type]
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    server.daemon_threads = True
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
