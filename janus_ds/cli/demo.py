"""`janus-ds demo`: a page on this machine that decodes in all ways, side by side, and shows every pass.

    janus-ds demo [--checkpoint RUN] [--port N]

The standard library's HTTP server, for this machine alone: it listens at 127.0.0.1 and answers only to that
name or localhost, so that pages of other sites cannot reach it under a name of their own. Texts are decoded
one after the other; an answer is a stream of JSON lines, one for each pass.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from time import perf_counter
from typing import Any

from janus_ds.cli.arguments import new_parser
from janus_ds.config.modes import with_decode
from janus_ds.data.text.tokenizer import MASK_TEXT
from janus_ds.decode.generator import Generator
from janus_ds.decode.infill import BLANK
from janus_ds.decode.load import load_run
from janus_ds.decode.text import checked_texts
from janus_ds.decode.watch import Pass, watched
from janus_ds.errors import JanusError, UsageError
from janus_ds.model.decoding.inference import prepare_for_inference

MODES = ("ar", "nar", "aux")
MOST_WAITING = 16
_MOST_BYTES = 1 << 16
_MOST_ITERATIONS = 20
_SECONDS = 30.0
"""Time for a browser to send a request, or to take a line of the answer."""

_Tell = Callable[[dict[str, Any]], None]


def main(arguments: Sequence[str]) -> int:
    """Serve the page until Ctrl-C."""
    parsed = _parser().parse_args(arguments)
    demo = Demo(parsed.checkpoint, parsed.device)
    with DemoServer(demo, parsed.port) as server:
        print(f"http://127.0.0.1:{server.server_port}/ decodes with {demo.name}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("demo", "A page on this machine: AR, NAR and AUX side by side, pass by pass.")
    add = parser.add_argument
    add(
        "--checkpoint",
        default="demo",
        metavar="RUN",
        help="a run or checkpoint (default: demo, of the package)",
    )
    add("--port", type=int, default=0, help="port at 127.0.0.1 (default: one that is free)")
    add("--device", help="cpu, cuda, ... (default: the first GPU, or else the CPU)")
    return parser


@dataclass(frozen=True)
class Request:
    """What the page asks for.

    Args:
        text: the source; a blank is `___`.
        target: an output with blanks, whose other text is kept; may be empty.
        iterations: of NAR.
    """

    text: str
    target: str = ""
    iterations: int = 4

    @classmethod
    def read(cls, body: bytes) -> Request:
        """The request in a body of JSON.

        Raises:
            ValueError: it is none; says what is wrong in a sentence.
        """
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            raise ValueError("The request is no JSON.") from None
        if not isinstance(given, dict) or not set(given) <= {"text", "target", "iterations"}:
            raise ValueError("The request must be an object with text, target and iterations.")
        asked = cls(**{"text": "", **given})
        if not isinstance(asked.text, str) or not isinstance(asked.target, str):
            raise ValueError("Text and target must be text.")
        if not asked.text.strip():
            raise ValueError("There is no text to decode.")
        if type(asked.iterations) is not int or not 0 <= asked.iterations <= _MOST_ITERATIONS:
            raise ValueError(f"Iterations must be a whole number from 0 to {_MOST_ITERATIONS}.")
        return cls(" ".join(asked.text.split()), " ".join(asked.target.split()), asked.iterations)


class Demo:
    """A run that decodes one text after the other."""

    def __init__(self, checkpoint: str | Path, device: str | None = None) -> None:
        self._run = load_run(checkpoint, None, device)
        self.name = str(checkpoint)
        self._codec = self._run.codec()
        self._fills = self._run.config.data.task == "denoise"
        prepare_for_inference(self._run.model, None)
        self._turn = threading.Lock()

    @property
    def hint(self) -> str:
        """What may be typed."""
        if self._fills:
            return "A text; write ___ for what is missing."
        return "A text to translate. To keep parts of an output, give it below, with ___ for what is missing."

    def decode(self, asked: Request, tell: _Tell) -> None:
        """Tell every pass of every mode, and each mode's end: its output, or why there is none."""
        tell({"waiting": self._turn.locked()})
        with self._turn:
            for mode in MODES:
                try:
                    tell({"mode": mode, **self._decode(mode, asked, tell)})
                except JanusError as error:
                    tell({"mode": mode, "error": f"{error.what}; {error.fix}"})

    def _decode(self, mode: str, asked: Request, tell: _Tell) -> dict[str, Any]:
        run, codec, number = self._run, self._codec, 0
        options = {"mode": mode} | ({"iterations": asked.iterations} if mode == "nar" else {})
        generator = Generator(run.model, codec, run.special, with_decode(run.config, options))
        text, given = asked.text, asked.target
        if self._fills:
            # The blanks of a text are the encoder's masks, and what NAR and AUX fill.
            given = given or (text if mode != "ar" and re.search(BLANK, text) else "")
            text = re.sub(BLANK, MASK_TEXT, text)
        checked_texts([text, given])
        lengths = (1, 2, 3) if len(re.findall(BLANK, given)) < 4 else (1,)
        target = generator.target(given, lengths) if given else None

        def show(made: Pass) -> None:
            nonlocal number
            number += 1
            tell({"mode": mode, "pass": number, "pieces": self._pieces(made)})

        with watched(show) as watch:
            start = perf_counter()
            found = generator.generate_ids([codec.encode(text)], targets=[target] if target else None)
            seconds = perf_counter() - start - watch.seconds
        best = found[0][0]
        output = target.text(best, codec) if target else codec.decode(best.tokens)
        return {"text": output, "passes": best.passes, "seconds": seconds}

    def _pieces(self, made: Pass) -> list[tuple[str, float, bool]]:
        """Text, sureness and newness of each token; spaces are where the whole text has them."""
        before, pieces, new = "", [], set(made.new)
        for place, sure in enumerate(made.sureness):
            text = self._codec.decode(made.tokens[: place + 1])
            piece = (
                text[len(before) :] if text.startswith(before) else self._codec.decode([made.tokens[place]])
            )
            pieces.append((piece, round(sure, 4), place in new))
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
        self.template = files("janus_ds").joinpath("assets/demo_page.html").read_text(encoding="utf-8")
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            fix = "give another to --port, or leave it out"
            raise UsageError(f"the port cannot be opened ({reason})", f"--port {port}", fix) from None
        self.names = {f"{host}:{self.server_port}" for host in ("127.0.0.1", "localhost")}


class _Handler(BaseHTTPRequestHandler):
    server: DemoServer
    server_version, sys_version, timeout = "janus-ds", "", _SECONDS

    def do_GET(self) -> None:
        if not self._is_ours():
            return
        if self.path.partition("?")[0] != "/":
            return self.send_error(HTTPStatus.NOT_FOUND, "There is only the page /.")
        demo, nonce = self.server.demo, secrets.token_urlsafe()
        page = self.server.template.replace("{{nonce}}", nonce).replace("{{most}}", str(_MOST_ITERATIONS))
        page = page.replace("{{hint}}", html.escape(demo.hint)).replace("{{run}}", html.escape(demo.name))
        own = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'"
        policy = f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        self._begin("text/html; charset=utf-8", {"Content-Security-Policy": policy})
        self.wfile.write(page.encode())

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
            asked = Request.read(self.rfile.read(int(length)))
        except ValueError as error:
            return self.send_error(HTTPStatus.BAD_REQUEST, str(error))
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
        origin = self.headers.get("Origin")
        ours = self.headers.get("Host") in self.server.names
        if ours and (origin is None or origin.removeprefix("http://") in self.server.names):
            return True
        self.send_error(
            HTTPStatus.FORBIDDEN, f"This page answers at http://127.0.0.1:{self.server.server_port}/ only."
        )
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
