"""`janus-ds demo` over real HTTP: every pass, refusals in sentences, one text at a time."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from janus_ds.cli import demo as demo_module
from janus_ds.cli.demo import Demo, DemoServer
from janus_ds.decode.generator import Generator
from janus_ds.errors import CheckpointError, UsageError
from tests.support.chromium import Page, chromium
from tests.support.packed_data import run_config
from tests.support.tiny_run import write_run

TEXT = "Der Hund schläft unter dem Tisch."
Events = list[dict[str, Any]]


PNG = "JANUS_DEMO_PNG"
"""Variable of the environment: the file that gets a picture of the page."""


@pytest.fixture(scope="module")
def server() -> Iterator[DemoServer]:
    yield from serving("demo")


def serving(checkpoint: str | Path) -> Iterator[DemoServer]:
    with DemoServer(Demo(checkpoint)) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield served
        served.shutdown()
        thread.join()


def ask(
    server: DemoServer, path: str, body: bytes | None = None, method: str | None = None, **headers: str
) -> tuple[int, http.client.HTTPMessage, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=900)
    connection.request(method or ("POST" if body is not None else "GET"), path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.msg, answer.read().decode()


def decode(server: DemoServer, **asked: object) -> Events:
    status, _, text = ask(server, "/decode", json.dumps(asked).encode())
    assert status == 200, text
    return [json.loads(line) for line in text.splitlines()]


def passes(events: Events, mode: str) -> list[list[tuple[str, float, bool]]]:
    return [event["pieces"] for event in events if event.get("mode") == mode and "pass" in event]


def ends(events: Events) -> dict[str, dict[str, Any]]:
    return {event["mode"]: event for event in events if "text" in event or "error" in event}


def test_every_way_shows_its_passes_and_what_the_generator_says(server):
    events = decode(server, text=f"  {TEXT}\n", iterations=3)
    assert events[0] == {"waiting": False}
    found = ends(events)
    for mode in ("ar", "nar", "aux"):
        iterations = {"iterations": 3} if mode == "nar" else {}
        alone = Generator.from_checkpoint("demo", mode, **iterations).generate(TEXT)[0]
        assert (found[mode]["text"], found[mode]["passes"]) == (alone.text, alone.passes)
        assert found[mode]["seconds"] > 0
        for shown in passes(events, mode):
            assert all(0 <= sure <= 1 for _, sure, _ in shown)
    # AR grows by a token a pass, the last one of which is the end; NAR and AUX write all at once.
    beams = passes(events, "ar")
    assert [len(shown) for shown in beams] == list(range(1, len(beams) + 1))
    assert all([new for _, _, new in shown] == [False] * (len(shown) - 1) + [True] for shown in beams)
    parallel = passes(events, "nar")
    assert len(parallel) == 4
    assert all(new for _, _, new in parallel[0])
    assert not all(new for _, _, new in parallel[-1])
    assert "".join(piece for piece, _, _ in parallel[-1]) == found["nar"]["text"]
    assert "".join(piece for piece, _, _ in passes(events, "aux")[-1]) == found["aux"]["text"]


def test_given_outputs_are_kept_and_ar_says_why_it_cannot(server):
    found = ends(decode(server, text=TEXT, target="A ___ is sleeping on the ___ .", iterations=2))
    for mode in ("nar", "aux"):
        assert re.fullmatch(r"A .+ is sleeping on the .+ \.", found[mode]["text"])
    assert "cannot keep to a given target" in found["ar"]["error"]
    assert all(
        "no blank" in end["error"]
        for m, end in ends(decode(server, text=TEXT, target="A dog")).items()
        if m != "ar"
    )


def test_blanks_are_typed_into_the_text_of_pretrained_runs(tiny, tmp_path):
    text = "the old dog saw ___ garden ."
    run = write_run(tmp_path / "run", tiny, run_config(), 0.1)
    for server in serving(run):
        found = ends(decode(server, text=text, iterations=2))
        assert "text" in found["ar"]
        for mode in ("nar", "aux"):
            assert re.fullmatch(r"the old dog saw .* garden \.", found[mode]["text"])
            assert "___" not in found[mode]["text"]
    for server in serving("denoiser"):
        found = ends(decode(server, text="The old man went ___ ."))
        assert found["ar"]["text"].startswith("The old man went ")
        assert "not trained to decode in mode 'aux'" in found["aux"]["error"]


def test_texts_are_queued(server, monkeypatch):
    inside, most = 0, 0
    generate = Generator.generate_ids

    def counted(self: Generator, *given: Any, **more: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        try:
            return generate(self, *given, **more)
        finally:
            inside -= 1

    monkeypatch.setattr(Generator, "generate_ids", counted)
    answers: list[Events] = []
    threads = [
        threading.Thread(target=lambda: answers.append(decode(server, text=TEXT, iterations=1)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    texts = [{mode: end["text"] for mode, end in ends(events).items()} for events in answers]
    assert len(texts) == 4
    assert all(text == texts[0] for text in texts)
    with monkeypatch.context() as full:
        full.setattr(server, "places", threading.BoundedSemaphore(1))
        server.places.acquire()
        assert ask(server, "/decode", b'{"text": "a"}')[::2] == (
            503,
            f"{demo_module.MOST_WAITING} texts wait already.\n",
        )


def test_a_browser_that_leaves_holds_nobody_up(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=900)
    connection.request("POST", "/decode", json.dumps({"text": TEXT * 8}).encode())
    connection.close()
    assert ends(decode(server, text=TEXT))["ar"]["text"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{", "Invalid JSON: "),
        (b"[" * 9000, "Invalid JSON: recursion limit"),
        (b'{"text": "\\ud800"}', "Invalid JSON: "),
        (b"[1]", "Input should be an object"),
        (b'{"text": "a", "beam": 2}', "beam: Unexpected keyword argument"),
        (
            b'{"text": 3, "target": 4}',
            "text: Input should be a valid string; target: Input should be a valid string",
        ),
        (b'{"text": " \\n"}', "There is no text to decode."),
        (b'{"text": "a", "iterations": 21}', "iterations: Input should be less than or equal to 20"),
        (b'{"text": "a", "iterations": true}', "iterations: Input should be a valid integer"),
    ],
)
def test_bad_requests_get_a_sentence(server, body, sentence):
    status, headers, text = ask(server, "/decode", body)
    assert (status, text[: len(sentence)], text.count("\n")) == (400, sentence, 1)
    assert headers["Content-Type"].startswith("text/plain")


def test_what_else_is_refused(server):
    own = f"127.0.0.1:{server.server_port}"
    only = f"This page answers at http://{own}/ only.\n"
    for headers in ({"Host": "evil.example"}, {"Host": "127.0.0.1"}, {"Origin": "http://evil.example"}):
        assert ask(server, "/", **headers)[::2] == (403, only)
        assert ask(server, "/decode", b'{"text": "a"}', **headers)[::2] == (403, only)
    assert ask(server, "/", Host=f"localhost:{server.server_port}", Origin=f"http://{own}")[0] == 200
    assert ask(server, "/etc/passwd")[::2] == (404, "There is only the page /.\n")
    assert ask(server, "/", b"{}")[::2] == (404, "Texts are sent to /decode.\n")
    # Refused by its length: nobody reads the rest, so that who sends it may find the connection closed.
    assert ask(server, "/decode", b"", **{"Content-Length": "70000"})[0] == 413
    assert ask(server, "/", method="DELETE")[::2] == (501, "Unsupported method ('DELETE')\n")
    # Texts beyond the position table are the run's to refuse, way by way.
    assert all(end["error"] for end in ends(decode(server, text="Hund " * 600)).values())
    with pytest.raises(UsageError, match="the port cannot be opened"):
        DemoServer(server.demo, server.server_port)
    with pytest.raises(UsageError, match="the port cannot be opened"):
        DemoServer(server.demo, 70_000)
    with pytest.raises(CheckpointError):
        Demo("nowhere")


def test_the_page_is_one_file_that_runs_its_own_script_alone(server, monkeypatch):
    monkeypatch.setattr(server.demo, "name", "<script>alert(1)</script>")
    status, headers, page = ask(server, "/?a=1")
    assert status == 200
    assert page.count("<script") == 1
    assert "&lt;script&gt;alert(1)" in page
    nonce = re.search("script-src 'nonce-([^']+)'", headers["Content-Security-Policy"])
    assert nonce
    assert f'<script nonce="{nonce[1]}">' in page
    assert nonce[1] not in ask(server, "/")[2]
    assert "innerHTML" not in page
    assert "{{" not in page
    assert not re.findall("(?:src|href)=", page)


@pytest.mark.heavy
def test_a_real_browser_shows_it(server):
    """JANUS_DEMO_PNG=docs/figures/demo_page.png makes the picture of the README anew."""
    text = "Der Hund schläft unter dem Tisch, weil es draußen regnet."
    elements = "document.querySelectorAll(':not(li, li *)').length"
    with chromium(f"http://127.0.0.1:{server.server_port}/") as page:
        for _ in range(2):
            type_and_wait(page, text, 4)
        for mode, shown in (("ar", 10), ("nar", 5), ("aux", 2)):
            assert page.value(f"document.querySelectorAll('#{mode} li').length") >= shown
            options = {"iterations": 4} if mode == "nar" else {}
            alone = Generator.from_checkpoint("demo", mode, **options).generate(text)[0].text
            assert page.value(f"document.querySelector('#{mode} .output').textContent") == alone
            figures = page.value(f"document.querySelector('#{mode} small').textContent")
            assert re.fullmatch(r"[0-9]+ passes, [0-9]+ ms", figures)
        picture = base64.b64decode(page.screenshot(1180, 700))
        assert picture.startswith(b"\x89PNG")
        if os.environ.get(PNG):
            from PIL import Image

            Image.open(io.BytesIO(picture)).quantize(48).save(os.environ[PNG], optimize=True)
        # What is typed or decoded is text and nothing else, in the browser too.
        before = page.value(elements)
        type_and_wait(page, "<img src=x onerror=alert(1)>", 0, "<b>___</b> <script>alert(1)</script>")
        assert page.value(elements) == before
        assert page.value("document.querySelectorAll('li b, .output b, img, li script').length") == 0
        assert "<b>" in page.value("document.querySelector('#nar .output').textContent")
        assert "left to right" in page.value("document.querySelector('#ar .error').textContent")
        type_and_wait(page, " ", 4)
        assert page.value("document.getElementById('state').textContent") == "There is no text to decode.\n"
        assert page.faults() == []


def type_and_wait(page: Page, text: str, iterations: int, target: str = "") -> None:
    page.value("document.querySelector('form').reset(); 1")
    for name, typed in (("text", text), ("target", target)):
        page.value(f"document.getElementById('{name}').focus(); 1")
        page.send("Input.insertText", text=typed)
    page.value(
        f"document.getElementById('iterations').value = {iterations};"
        "document.getElementById('iterations').dispatchEvent(new Event('input'));"
        "document.getElementById('go').click(); document.activeElement.blur(); 1"
    )
    page.wait("!document.getElementById('go').disabled")
