"""The page beside which a student and its teacher are looked at: what it answers, what it refuses, and in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_models import tiny_pipeline_folder, tiny_unet
from vardistill.cli import main as cli
from vardistill.cli.view import load_pair
from vardistill.denoisers.diffusers import from_diffusers
from vardistill.diffusion import Denoiser
from vardistill.diffusion.samplers import sample
from vardistill.domains.pictures.config import PicturesConfig
from vardistill.domains.pictures.evaluate import even_labels
from vardistill.domains.pictures.figures import grid
from vardistill.domains.pictures.parts import draw
from vardistill.errors import UsageError
from vardistill.reports.view import LONGEST_PROMPT, MOST_PICTURES, Pair, Server, Wish, Words, parse_wish
from vardistill.runs.config import Config
from vardistill.students.network import NetworkStudent
from vardistill.training import config_files

CLASSES = 3
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def save_run(folder: Path, classes: int | None = CLASSES, teacher: str | None = None, steps: int = 1) -> Path:
    """A finished run whose student is its teacher's network, unchanged."""
    source = tiny_pipeline_folder(folder / "pipeline", tiny_unet(classes))
    run = folder / "<b>run"
    NetworkStudent.from_teacher(from_diffusers(source), steps=steps).save_pretrained(run / "generator")
    config_files.write(Config(PicturesConfig(teacher or str(source))), run / "config.yaml")
    return run


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load_pair(save_run(tmp_path_factory.mktemp("view")))


@contextmanager
def serving(pair: Pair) -> Iterator[Server]:
    with Server(pair, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server(pair: Pair) -> Iterator[Server]:
    with serving(pair) as server:
        yield server


def get(server: Server, path: str, host: str | None = None) -> tuple[HTTPResponse, str]:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response, text


def ask(server: Server, query: str) -> dict[str, Any]:
    response, text = get(server, f"/pictures?{query}")
    assert response.status == 200
    answer: dict[str, Any] = json.loads(text)
    return answer


def decoded(part: dict[str, Any]) -> np.ndarray:
    head, data = part["picture"].split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_both_pictures_are_of_the_same_noise_and_classes(server: Server, pair: Pair) -> None:
    answer = ask(server, "seed=5&count=4&steps=3")
    labels = even_labels(4, CLASSES)
    z = pair.student.latents(4, torch.Generator().manual_seed(5))
    assert labels is not None
    assert pair.teacher is not None
    assert (decoded(answer["student"]) == grid(draw(pair.student, 4, 5, labels), columns=2)).all()
    assert (decoded(answer["teacher"]) == grid(sample(pair.teacher, z, 3, labels=labels), columns=2)).all()


def test_an_answer_tells_evaluations_and_seconds(server: Server) -> None:
    answer = ask(server, "count=2&steps=3")
    assert answer.keys() == {"student", "teacher"}
    assert answer["student"]["evaluations"] == 1
    assert answer["teacher"]["evaluations"] == 5  # 2n − 1
    assert answer["student"]["seconds"] > 0
    assert answer["teacher"]["seconds"] > 0


def test_evaluations_are_those_that_the_teacher_had(pair: Pair) -> None:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    assert isinstance(pair.teacher, torch.nn.Module)
    hook = pair.teacher.register_forward_pre_hook(count)
    shown = pair.pictures(Wish(count=1, steps=4))
    hook.remove()
    assert shown["teacher"] is not None
    assert shown["teacher"]["evaluations"] == calls - 1  # the first one warms the network, untimed


def test_a_student_of_several_steps_draws_them_all(tmp_path: Path) -> None:
    run = save_run(tmp_path, steps=3)
    pair = load_pair(run)
    shown, labels = pair.pictures(Wish(seed=5, count=4, steps=2)), even_labels(4, CLASSES)
    assert shown["student"] is not None
    assert shown["student"]["evaluations"] == 3
    assert (decoded(shown["student"]) == grid(draw(pair.student, 4, 5, labels), columns=2)).all()


def test_the_seed_fixes_the_pictures(server: Server) -> None:
    a, b, c = (ask(server, f"seed={seed}&count=2&steps=2") for seed in (1, 1, 2))
    for name in ("student", "teacher"):
        assert a[name]["picture"] == b[name]["picture"]
        assert a[name]["picture"] != c[name]["picture"]


def test_the_label_is_that_of_every_picture(server: Server, pair: Pair) -> None:
    answers = [ask(server, f"label={label}&count=2&steps=2") for label in range(CLASSES)]
    for name in ("student", "teacher"):
        assert len({answer[name]["picture"] for answer in answers}) == CLASSES
    assert (decoded(answers[2]["student"]) == grid(draw(pair.student, 2, 0, torch.tensor([2, 2])), columns=2)).all()


def test_steps_change_the_teachers_pictures_only(server: Server) -> None:
    a, b = (ask(server, f"count=2&steps={steps}") for steps in (1, 4))
    assert a["student"]["picture"] == b["student"]["picture"]
    assert a["teacher"]["picture"] != b["teacher"]["picture"]


def test_what_is_left_out_has_its_default() -> None:
    assert parse_wish("", CLASSES) == Wish()
    assert parse_wish("label=&seed=7", CLASSES) == Wish(seed=7)


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("label=1", "unknown parameter 'label'"),
        ("prompt=" + "x" * (LONGEST_PROMPT + 1), f"at most {LONGEST_PROMPT} letters"),
        ("guidance=nan", "guidance must be a number from 0 to 20, but is 'nan'"),
        ("guidance=-1", "guidance must be"),
        ("guidance=x", "guidance must be"),
    ],
)
def test_bad_prompts_get_one_line(query: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse_wish(query, CLASSES, told=True)


def test_prompts_take_the_place_of_labels(pair: Pair) -> None:
    """And are escaped on the page; what is asked for reaches the networks with its guidance."""
    asked = []

    def under(prompt: str, guidance: float) -> Denoiser:
        asked.append((prompt, guidance))
        assert pair.teacher is not None
        return pair.teacher

    words = Words(under, lambda latents: latents, ("a <dog>", "a cat"), 2.5)
    with serving(replace(pair, words=words, class_names=())) as server:
        _, text = get(server, "/")
        assert 'value="a &lt;dog&gt;"' in text
        assert '<option value="a cat"></option>' in text
        answer = ask(server, "seed=3&count=2&steps=2&prompt=a+bird&guidance=4")
        ask(server, "seed=3&count=2&steps=2")
    assert asked == [("a bird", 4.0), ("a <dog>", 2.5)]
    own = draw(pair.student, 2, 3, torch.zeros(2, dtype=torch.int64))
    assert (decoded(answer["student"]) == grid(own, columns=2)).all()


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("seed=-1", "seed must be a whole number from 0"),
        ("seed=" + "9" * 5000, "seed must be"),
        ("seed=one%0Atwo", "'one\\ntwo'"),
        ("count=0", f"count must be a whole number from 1 to {MOST_PICTURES}, but is '0'"),
        (f"count={MOST_PICTURES + 1}", "count must be"),
        ("steps=1.5", "steps must be"),
        (f"label={CLASSES}", "label must be a whole number from 0 to 2, but is '3'"),
        ("labels=1", "unknown parameter 'labels': did you mean label?"),
    ],
)
def test_bad_parameters_get_one_line(query: str, told: str, server: Server) -> None:
    response, text = get(server, f"/pictures?{query}")
    assert response.status == 400
    assert response.headers.get_content_type() == "text/plain"
    (line,) = text.splitlines()
    assert told in line


def test_a_mistake_of_the_networks_gets_one_line(pair: Pair) -> None:
    """And leaves the server, and the lock on the networks, as they were."""

    class Broken(Pair):
        """Fails for one seed."""

        def pictures(self, wish: Wish) -> dict[str, dict[str, Any] | None]:
            if wish.seed == 1:
                raise RuntimeError("out of memory:\ntried 3 GB")
            return super().pictures(wish)

    broken = Broken(pair.name, pair.student, None, "none", pair.class_names)
    with serving(broken) as server:
        response, text = get(server, "/pictures?seed=1")
        assert (response.status, text) == (500, "RuntimeError: out of memory: tried 3 GB\n")
        assert ask(server, "seed=2&count=1")["teacher"] is None


def test_a_reader_who_leaves_is_no_mistake(
    pair: Pair, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It closes its connection before its pictures are drawn, and what was sent is reset."""

    class Slow(Pair):
        """Waits until its reader has left."""

        def pictures(self, wish: Wish) -> dict[str, dict[str, Any] | None]:
            assert left.wait(30)
            return {"student": {"picture": "x" * 10_000_000}, "teacher": None}

    left, answered = threading.Event(), threading.Event()

    def shutdown_request(request: socket.socket) -> None:
        request.close()
        answered.set()

    with serving(Slow(pair.name, pair.student, None, "none", pair.class_names)) as server:
        monkeypatch.setattr(server, "shutdown_request", shutdown_request)
        with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
            connection.sendall(f"GET /pictures HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n".encode())
        left.set()
        assert answered.wait(30)
    assert capsys.readouterr().err == ""


def test_an_unconditional_student_takes_no_label() -> None:
    with pytest.raises(UsageError, match="unknown parameter 'label'"):
        parse_wish("label=0", 0)


@pytest.mark.parametrize("path", ["/favicon.ico", "/pictures/", "/../config.yaml", "//[", "/templates/view.html"])
def test_there_is_nothing_else(path: str, server: Server) -> None:
    assert get(server, path)[0].status == 404


@pytest.mark.parametrize(
    "host", ["example.org", "example.org:{port}", "localhost", "localhost:1", "127.0.0.1.nip.io:{port}"]
)
@pytest.mark.parametrize("path", ["/", "/pictures"])
def test_a_foreign_name_gets_nothing(host: str, path: str, server: Server) -> None:
    response, text = get(server, path, host.format(port=server.server_port))
    assert response.status == 403
    assert text == f"this server answers at {server.url} only\n"


def test_the_server_answers_by_both_its_names(server: Server) -> None:
    for name in ("localhost", "127.0.0.1"):
        assert get(server, "/", f"{name}:{server.server_port}")[0].status == 200


def test_nobody_else_on_the_network_reaches_it(server: Server) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def named(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def test_the_page_allows_its_own_script_only(server: Server) -> None:
    response, text = get(server, "/")
    policy = response.headers["Content-Security-Policy"]
    (nonce,) = set(re.findall(r"'nonce-([\w-]+)'", policy))
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert [tag["nonce"] for tag in Tags(text).named("script", "style")] == [nonce, nonce]
    assert nonce not in get(server, "/")[1]


def test_every_field_has_its_label_and_every_picture_its_text(server: Server) -> None:
    page = Tags(get(server, "/")[1])
    fields = page.named("input", "select")
    assert {field["name"] for field in fields} == {"seed", "label", "count", "steps", "prompt", "guidance"}
    assert {field["id"] for field in fields} == {label["for"] for label in page.named("label")}
    assert all(image["alt"] for image in page.named("img"))


def test_names_are_escaped(pair: Pair) -> None:
    with serving(replace(pair, class_names=("<i>cat", "b", "c"))) as server:
        text = get(server, "/")[1]
    assert "<h1>&lt;b&gt;run</h1>" in text
    assert '<option value="0">&lt;i&gt;cat</option>' in text


def test_a_student_whose_teacher_is_gone_is_shown_alone(tmp_path: Path) -> None:
    alone = load_pair(save_run(tmp_path, teacher=str(tmp_path / "gone")))
    with serving(alone) as server:
        answer, text = ask(server, "count=2"), get(server, "/")[1]
    assert answer["teacher"] is None
    assert decoded(answer["student"]).shape == (8, 17, 3)
    assert '<p class="card" ><b>The student alone.</b>' in text
    assert '<figure class="card truth" id="teacher" hidden>' in text


def test_a_teacher_of_other_classes_is_not_the_students(tmp_path: Path) -> None:
    other = tiny_pipeline_folder(tmp_path / "other", tiny_unet(CLASSES + 1))
    pair = load_pair(save_run(tmp_path, teacher=str(other)))
    assert pair.teacher is None
    assert "has other shapes or classes than the student" in pair.about


def test_an_unconditional_student_has_no_picker(tmp_path: Path) -> None:
    with serving(load_pair(save_run(tmp_path, classes=None))) as server:
        answer, text = ask(server, "count=2&steps=2"), get(server, "/")[1]
    assert answer["teacher"]["evaluations"] == 3
    assert re.search(r'<div hidden>\s*<label for="label">', text)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "view needs a run folder before its flags"),
        (["no-such-run"], "no-such-run is not a run folder"),
        (["run", "--port", "80"], "port must be 0 or from 1024 to 65535, but is 80"),
        (["run", "--prot", "8000"], "did you mean port?"),
    ],
)
def test_mistakes_get_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["view", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom vardistill.cli.main import run\n"
        "try:\n    run(['view', '--help'])\nfinally:\n    assert 'torch' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "--open" in out


def test_a_port_in_use_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.run(["view", str(run), "--port", str(port), "--no-open"]) == 2
    captured = capsys.readouterr()
    assert f"cannot listen on port {port} (Address already in use): choose another --port" in captured.err
    assert captured.out == ""


def test_the_command_serves_until_ctrl_c(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def interrupted(server: Server) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    monkeypatch.setattr("webbrowser.open", opened.append)
    run = save_run(tmp_path)
    assert cli.run(["view", str(run), "--port", "0", "--no-open"]) == 0
    assert opened == []
    assert cli.run(["view", str(run), "--port", "0"]) == 0
    (url,) = opened
    assert f"{run} is shown at {url} until Ctrl-C" in capsys.readouterr().out


def test_a_browser_shows_both_pictures_and_their_times(server: Server, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} is found")
    offline = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    headless = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    words = [browser, *headless, *offline, "--virtual-time-budget=10000", "--dump-dom", server.url]
    dom = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    pictures = ask(server, "")
    for name, evaluations in (("student", "1</b> evaluation"), ("teacher", "35</b> evaluations")):
        figure = re.search(rf'<figure [^>]*id="{name}".*?</figure>', dom, re.DOTALL)
        assert figure is not None
        assert f'src="{pictures[name]["picture"]}"' in figure[0]
        assert f'alt="16 pictures of the {name}, all classes in turn, seed 0"' in figure[0]
        assert re.search(rf"<b>{evaluations} · <b>[\d.]+ m?s</b>", figure[0])
    assert re.search(r"The teacher took [\d.]+ times as long as the student\.", dom)
