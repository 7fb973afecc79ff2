"""`janus-ds demo`: a page on this machine that decodes in all ways, side by side, and shows every pass.

    janus-ds demo [--checkpoint RUN] [--port N]

The standard library's HTTP server, for this machine alone: it listens at 127.0.0.1 and answers only to that
name or localhost, so that pages of other sites cannot reach it under a name of their own. Texts are decoded
one after the other; an answer is a stream of JSON lines, one for each pass.
"""

from __future__ import annotations

import html
import json
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from janus_ds.cli.arguments import new_parser
from janus_ds.cli.decode import Capitals
from janus_ds.config.fields import STRICT
from janus_ds.config.locations import DEMO, packaged_model
from janus_ds.config.modes import with_decode
from janus_ds.data.text.tokenizer import MASK_TEXT
from janus_ds.decode.generator import Generator
from janus_ds.decode.infill import BLANK
from janus_ds.decode.load import load_run, prepare_for_inference
from janus_ds.decode.text import checked_texts
from janus_ds.decode.watch import Pass, watched
from janus_ds.errors import JanusError, UsageError

MODES = ("ar", "nar", "aux")
MOST_WAITING = 16
_MOST_BYTES = 1 << 16
_MOST_ITERATIONS = 20
_SECONDS = 30.0
"""Time for a browser to send a request, or to take a line of the answer."""

_Tell = Callable[[dict[str, Any]], None]
_OneLine = Annotated[str, AfterValidator(lambda text: " ".join(text.split()))]


def main(arguments: Sequence[str]) -> int:
    """Serve the page until Ctrl-C."""
    parser = new_parser("demo", "A page on this machine: AR, NAR and AUX side by side, pass by pass.")
    run = "a run or checkpoint (default: demo, of the package)"
    parser.add_argument("--checkpoint", metavar="RUN", help=run)
    port = "port at 127.0.0.1 (default: one that is free); from elsewhere: ssh -L PORT:127.0.0.1:PORT HOST"
    parser.add_argument("--port", type=int, default=0, help=port)
    parser.add_argument("--device", help="cpu, cuda, ... (default: the first GPU, or else the CPU)")
    parsed = parser.parse_args(arguments)
    demo = Demo(parsed.checkpoint, parsed.device)
    with DemoServer(demo, parsed.port) as server, suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_port}/ decodes with {demo.name}; Ctrl-C ends it", flush=True)
        server.serve_forever()
    return 0


@dataclass(frozen=True, config=STRICT)
class Request:
    """What the page asks for, as JSON."""

    text: _OneLine
    """The source; a blank is `___`."""
    target: _OneLine = ""
    """An output with blanks, whose other text is kept; may be empty."""
    iterations: Annotated[int, Field(ge=0, le=_MOST_ITERATIONS)] = 4
    """Of NAR."""


class Demo:
    """A run, or the package's own model, that decodes one text after the other."""

    def __init__(self, checkpoint: str | Path | None, device: str | None = None) -> None:
        self._run = load_run(checkpoint or packaged_model(DEMO), None, device)
        self.name = str(checkpoint or DEMO)
        self._codec = self._run.codec()
        self._fills = self._run.config.data.task == "denoise"
        prepare_for_inference(self._run.model, None)
        self._turn, self._capitals = threading.Lock(), Capitals(self._run)
        self.hint = "A text; write ___ for what is missing."
        if not self._fills:
            blanks = "To keep parts of an output, give it below, with ___ for what is missing."
            self.hint = f"A text to translate. {blanks}"

    def decode(self, asked: Request, tell: _Tell) -> None:
        """Tell every pass of every mode, and each mode's end: its output, or why there is none."""
        tell({"waiting": self._turn.locked()})
        with self._turn:
            self._capitals.look([asked.text])
            for mode in MODES:
                try:
                    tell({"mode": mode, **self._decode(mode, asked, tell)})
                except JanusError as error:
                    tell({"mode": mode, "error": f"{error.what}; {error.fix}"})

    def _decode(self, mode: str, asked: Request, tell: _Tell) -> dict[str, Any]:
        run, codec, number = self._run, self._codec, 0
        options = {"mode": mode} | ({"iterations": asked.iterations} if mode == "nar" else {})
        generator = Generator(run.model, codec, with_decode(run.config, options))
        text, given = asked.text, asked.target
        if self._fills:
            # The blanks of a text are the encoder's masks, and what NAR and AUX fill.
            given = given or (text if mode != "ar" and re.search(BLANK, text) else "")
            text = re.sub(BLANK, MASK_TEXT, text)
        checked_texts([text, given])
        lengths = (1, 2, 3) if len(re.findall(BLANK, given)) < 4 else (1,)
        targets = generator.targets(given, lengths) if given else None

        def show(made: Pass) -> None:
            nonlocal number
            number += 1
            tell({"mode": mode, "pass": number, "pieces": self._pieces(made)})

        with watched(show) as watch:
            start = perf_counter()
            found = generator.generate_ids([codec.encode(text)], targets=targets)
            seconds = perf_counter() - start - watch.seconds
        best = generator.with_text(found, targets)[0][0]
        return {"text": best.text, "passes": best.passes, "seconds": seconds}

    def _pieces(self, made: Pass) -> list[tuple[str, float, bool]]:
        """Text, sureness and newness of each token; spaces are where the whole text has them."""
        before, pieces = "", []
        for place, sure in enumerate(made.sureness):
            text = self._codec.decode(made.tokens[: place + 1])
            goes_on = text.startswith(before)
            piece = text[len(before) :] if goes_on else self._codec.decode([made.tokens[place]])
            pieces.append((piece, round(sure, 4), place in made.new))
            before = text
        return pieces


class DemoServer(ThreadingHTTPServer):
    """The page and its decoder at 127.0.0.1.

    Raises:
        UsageError: the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, demo: Demo, port: int = 0) -> None:
        self.demo = demo
        self.places = threading.BoundedSemaphore(MOST_WAITING)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            fix = "give another to --port, or leave it out"
            raise UsageError(f"the port cannot be opened ({reason})", f"--port {port}", fix) from None
        self.names = {f"{host}:{self.server_port}" for host in ("127.0.0.1", "localhost")}

    def page(self, nonce: str) -> str:
        """The page; the nonce marks its own script and style."""
        text = files("janus_ds").joinpath("assets/demo_page.html").read_text(encoding="utf-8")
        values = {
            "nonce": nonce,
            "most": str(_MOST_ITERATIONS),
            "hint": self.demo.hint,
            "run": self.demo.name,
        }
        return re.sub(r"\{\{(\w+)\}\}", lambda found: html.escape(values[found[1]]), text)


class _Handler(BaseHTTPRequestHandler):
    server: DemoServer
    server_version, sys_version, timeout = "janus-ds", "", _SECONDS

    def do_GET(self) -> None:
        if not self._is_ours():
            return
        if self.path.partition("?")[0] != "/":
            return self.send_error(HTTPStatus.NOT_FOUND, "There is only the page /.")
        nonce = secrets.token_urlsafe()
        own = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'"
        policy = f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        self._begin("text/html; charset=utf-8", {"Content-Security-Policy": policy})
        self.wfile.write(self.server.page(nonce).encode())

    def do_POST(self) -> None:
        if not self._is_ours():
            return
        if self.path != "/decode":
            return self.send_error(HTTPStatus.NOT_FOUND, "Texts are sent to /decode.")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > _MOST_BYTES:
            what = f"The request must say its length, at most {_MOST_BYTES:,} bytes."
            return self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, what)
        try:
            asked = TypeAdapter(Request).validate_json(self.rfile.read(int(length)))
        except ValidationError as error:
            faults = [(*map(str, fault["loc"]), fault["msg"]) for fault in error.errors()]
            return self.send_error(HTTPStatus.BAD_REQUEST, "; ".join(map(": ".join, faults)))
        if not asked.text:
            return self.send_error(HTTPStatus.BAD_REQUEST, "There is no text to decode.")
        if not self.server.places.acquire(blocking=False):
            return self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, f"{MOST_WAITING} texts wait already.")
        try:
            self._begin("application/x-ndjson", {})
            self.server.demo.decode(asked, self._tell)
        except OSError:
            self.close_connection = True  # The browser has gone, or takes nothing any more.
        finally:
            self.server.places.release()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """A sentence as plain text; also for what the standard library refuses."""
        self._begin("text/plain; charset=utf-8", {}, code)
        self.wfile.write(f"{message or HTTPStatus(code).phrase}\n".encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal keeps the address."""

    def _is_ours(self) -> bool:
        """Refuse other names of this machine, and pages of other sites."""
        origin = self.headers.get("Origin", f"http://{self.headers.get('Host')}")
        if {self.headers.get("Host"), origin.removeprefix("http://")} <= self.server.names:
            return True
        only = f"This page answers at http://127.0.0.1:{self.server.server_port}/ only."
        self.send_error(HTTPStatus.FORBIDDEN, only)
        return False

    def _begin(self, kind: str, more: dict[str, str], code: int = HTTPStatus.OK) -> None:
        self.close_connection = True
        self.send_response(code)
        headers = {"Content-Type": kind, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        for name, value in {**headers, "Referrer-Policy": "no-referrer", **more}.items():
            self.send_header(name, value)
        self.end_headers()

    def _tell(self, event: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(event).encode() + b"\n")
        self.wfile.flush()
