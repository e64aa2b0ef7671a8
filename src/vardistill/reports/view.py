"""A page to look at: a student's pictures beside its teacher's, in a browser on the same machine.

Both start from the same z ~ N(0, I) and labels: the student is evaluated once for each of its steps, the teacher 2n − 1
times in n steps of Heun's method (`samplers`), from σ z at its first time.

    GET /           the page, which loads nothing but
    GET /pictures   ?seed=&label=&count=&steps=, of text to image ?seed=&prompt=&guidance=&count=&steps=, JSON:
                    `student` and `teacher`, each with `picture` (a PNG as a data URI), `evaluations` and `seconds`;
                    `teacher` is null where there is none

The server listens on the loopback interface only, and answers requests to its own address only: a page of somebody
else, whose name was made to lead here (DNS rebinding), gets nothing.
"""

from __future__ import annotations

import base64
import io
import json
import math
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from string import Template
from typing import Any
from urllib.parse import parse_qsl

import torch
from PIL import Image
from torch import Tensor

from vardistill.diffusion.denoiser import Denoiser
from vardistill.diffusion.samplers import sample
from vardistill.domains.pictures.evaluate import even_labels
from vardistill.domains.pictures.figures import grid
from vardistill.domains.pictures.parts import TEACHER_STEPS, condition_of
from vardistill.errors import UsageError, unknown
from vardistill.reports.pages import masthead
from vardistill.students.network import NetworkStudent

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
"""What the server may be called by."""

MOST_PICTURES, MOST_STEPS, MOST_SEED = 64, 50, 2**32 - 1
LONGEST_PROMPT, MOST_GUIDANCE, MOST_PROMPTS = 1000, 20.0, 100

POLICY = (
    "default-src 'none'; img-src data:; style-src 'nonce-{0}'; script-src 'nonce-{0}'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may load: the style, script and pictures in itself, and further pictures from this server."""


@dataclass(frozen=True)
class Wish:
    """What pictures are asked for."""

    seed: int = 0
    """Fixes z."""
    label: int | None = None
    """Class of all pictures; None for all classes in turn."""
    count: int = 16
    """Pictures."""
    steps: int = TEACHER_STEPS
    """n of the teacher."""
    prompt: str = ""
    """Of all pictures; none for the first of the run."""
    guidance: float | None = None
    """Of the teacher; None for the run's."""


def parse_wish(query: str, classes: int, told: bool = False) -> Wish:
    """A wish from a URL's query; what it leaves out or empty has its default.

    Args:
        query: of the URL.
        classes: that there are.
        told: whether pictures are asked for by prompts.

    Raises:
        UsageError: for an unknown name, a value that is no number in its range, or too long a prompt.
    """
    ranges = {"seed": (0, MOST_SEED), "count": (1, MOST_PICTURES), "steps": (1, MOST_STEPS)}
    if classes and not told:
        ranges["label"] = (0, classes - 1)
    given: dict[str, Any] = dict(parse_qsl(query))
    words = {name: given.pop(name) for name in ("prompt", "guidance") if told and name in given}
    for name in given:
        if name not in ranges:
            raise unknown("parameter", name, (*ranges, *(("prompt", "guidance") if told else ())))
    if len(words.get("prompt", "")) > LONGEST_PROMPT:
        raise UsageError(f"the prompt must have at most {LONGEST_PROMPT} letters, but has {len(words['prompt'])}")
    if "guidance" in words:
        words["guidance"] = _number("guidance", words["guidance"], MOST_GUIDANCE)
    whole: dict[str, Any] = {name: _whole(name, text, *ranges[name]) for name, text in given.items()}
    return Wish(**whole, **words)


def _number(name: str, text: str, high: float) -> float:
    with suppress(ValueError):
        if len(text) <= 10 and 0 <= (value := float(text)) <= high:
            return value
    raise UsageError(f"{name} must be a number from 0 to {high:g}, but is {text[:20]!r}")


def _whole(name: str, text: str, low: int, high: int) -> int:
    if not (text.isdecimal() and len(text) <= 10 and low <= int(text) <= high):
        raise UsageError(f"{name} must be a whole number from {low} to {high}, but is {text[:20]!r}")
    return int(text)


@dataclass(frozen=True)
class Words:
    """What text to image has beside pictures.

    Attributes:
        under: a prompt and a guidance → the teacher for which, as for the student from then on, the label 0 is the
            prompt.
        decode: latents (n, C, h, w) → pictures (n, 3, H, W).
        prompts: of the run, the first of which is shown first.
        guidance: of the run.
    """

    under: Callable[[str, float], Denoiser]
    decode: Callable[[Tensor], Tensor]
    prompts: Sequence[str]
    guidance: float


@dataclass(frozen=True)
class Pair:
    """A student and its teacher.

    Attributes:
        name: of the run.
        student: x = g(z), in one step or several.
        teacher: E[x | x_t] with its guidance; None where it is not to be had.
        about: the teacher's source, or why there is none, as text.
        class_names: by label; () for an unconditional student.
        words: of text to image; None of others.
    """

    name: str
    student: NetworkStudent
    teacher: Denoiser | None
    about: str
    class_names: tuple[str, ...]
    words: Words | None = None

    @torch.no_grad()
    def pictures(self, wish: Wish) -> dict[str, dict[str, Any] | None]:
        """What `GET /pictures` answers."""
        student, teacher, device = self.student, self.teacher, next(self.student.parameters()).device
        words = self.words
        if words is not None:
            scale = words.guidance if wish.guidance is None else wish.guidance
            teacher = words.under(wish.prompt or words.prompts[0], scale)
            wish = replace(wish, label=0)
        rng = torch.Generator(device).manual_seed(wish.seed)
        z, renoise = student.latents(wish.count, rng), student.renoise(wish.count, rng)
        labels = even_labels(wish.count, student.classes)
        if wish.label is not None:
            labels = torch.full((wish.count,), wish.label)
        condition = condition_of(labels, device)
        student(z, renoise, **condition)  # the first evaluation of a shape is slow: it is not timed
        decode = (lambda x: x) if words is None else words.decode
        ours = _timed(lambda: student(z, renoise, **condition), student.steps, decode)
        if teacher is None:
            return {"student": ours, "teacher": None}
        sample(teacher, z, 1, **condition)
        theirs = _timed(lambda: sample(teacher, z, wish.steps, **condition), 2 * wish.steps - 1, decode)
        return {"student": ours, "teacher": theirs}


def _timed(draw: Callable[[], Tensor], evaluations: int, decode: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    started = time.perf_counter()
    pictures = draw().cpu()
    seconds = time.perf_counter() - started
    return {"picture": _data_uri(decode(pictures)), "evaluations": evaluations, "seconds": seconds}


def _data_uri(pictures: Tensor) -> str:
    """A grid of pictures, as nearly square as their number lets it be."""
    png = io.BytesIO()
    Image.fromarray(grid(pictures, columns=math.ceil(math.sqrt(len(pictures))))).save(png, format="PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode("ascii")


def page(pair: Pair, nonce: str) -> str:
    """The page; `nonce` marks the style and the script that its policy allows."""
    own = files("vardistill.reports")
    facts = {
        "teacher": pair.about if pair.teacher is not None else None,
        "size": "×".join(map(str, pair.student.data_shape)),
        "classes": (len(pair.class_names) or None) if pair.words is None else None,
        "parameters": f"{sum(p.numel() for p in pair.student.parameters()):,}",
    }
    classes = "".join(f'<option value="{i}">{escape(name)}</option>' for i, name in enumerate(pair.class_names))
    defaults = {field.name: field.default for field in fields(Wish)}
    words, prompts = pair.words, ""
    if words is not None:
        defaults |= {"prompt": escape(words.prompts[0]), "guidance": f"{words.guidance:g}"}
        prompts = "".join(f'<option value="{escape(text)}"></option>' for text in words.prompts[:MOST_PROMPTS])
    return Template(own.joinpath("templates", "view.html").read_text(encoding="utf-8")).substitute(
        defaults,
        nonce=nonce,
        title=escape(pair.name),
        style=own.joinpath("report.css").read_text(encoding="utf-8"),
        masthead=masthead("Student and teacher", pair.name, facts),
        classes=classes,
        unconditional="" if classes and words is None else "hidden",
        prompts=prompts,
        wordless="" if words is not None else "hidden disabled",
        longest=LONGEST_PROMPT,
        most_guidance=MOST_GUIDANCE,
        alone="" if pair.teacher is not None else "hidden",
        together="hidden" if pair.teacher is not None else "",
        why=escape(pair.about),
        most_seed=MOST_SEED,
        most_pictures=MOST_PICTURES,
        most_steps=MOST_STEPS,
    )


class Server(ThreadingHTTPServer):
    """Serves a pair; one request at a time has the networks.

    Args:
        pair: what is shown.
        port: where to listen; 0 for any that is free.

    Raises:
        UsageError: where the port cannot be had.
    """

    def __init__(self, pair: Pair, port: int) -> None:
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UsageError(f"cannot listen on port {port} ({error.strerror}): choose another --port") from error
        self.pair, self.networks = pair, threading.Lock()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if self.headers.get("Host") not in [f"{name}:{self.server.server_port}" for name in NAMES]:
            self._answer(403, "text/plain", f"this server answers at {self.server.url} only\n")
        elif path == "/":
            nonce = secrets.token_urlsafe(16)
            self._answer(200, "text/html", page(self.server.pair, nonce), POLICY.format(nonce))
        elif path == "/pictures":
            self._pictures(query)
        else:
            self._answer(404, "text/plain", "there are / and /pictures only\n")

    def _pictures(self, query: str) -> None:
        pair = self.server.pair
        try:
            wish = parse_wish(query, pair.student.classes, pair.words is not None)
        except UsageError as error:
            self._answer(400, "text/plain", f"{error}\n")
            return
        try:
            with self.server.networks:
                shown = pair.pictures(wish)
        except Exception as error:  # of the networks: out of memory, for example
            self._answer(500, "text/plain", f"{type(error).__name__}: {' '.join(str(error).split())}\n")
            return
        self._answer(200, "application/json", json.dumps(shown))

    def _answer(self, status: int, kind: str, text: str, policy: str = "default-src 'none'") -> None:
        body = text.encode()
        self.send_response(status)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        with suppress(BrokenPipeError, ConnectionResetError):  # the reader has left
            self.end_headers()
            self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing: the terminal is for mistakes."""
