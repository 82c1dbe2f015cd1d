"""A page in the browser: a pair of X-rays, the report on them, and what the prior did.

    python app.py --model assets/phantom

prints an address to open. Images stay in this process's memory and are never written.
"""

if __name__ == "__main__":
    import plumbing.start  # noqa: F401 (first of all)


import argparse
import asyncio
import io
import json
import re
import secrets
import socket
import sys
import threading
import traceback
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import anyio
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from data import FINDINGS_PROMPT, Study
from evaluation.metrics import WORDS_OF_CHANGE
from evaluation.prior import BETTER, WORSE
from page.safety import Guard, Impatient, TooLarge, content_security_policy, is_loopback, read_body
from page.work import Conversation, Job, Shelf, Worker, is_dicom, notes_to, one_line, show_warning
from plumbing.checkpoint import locate
from plumbing.cli import Parser, add_decoding_flags, add_model_flags, guard
from plumbing.download import HTTP, download
from plumbing.fields import Range, check_fields
from plumbing.image import load_image
from sample import DEFAULT_MODEL, Options, counterfactuals, load, options_of
from sources.mimic import with_context

HERE = Path(__file__).resolve().parent
IMAGE_BYTES, IMAGE_SECONDS = 64 * 2**20, 120  # the most that one upload may take
INCOMING_BYTES = 2**29  # of all uploads that are on their way
ASK_BYTES, ASK_SECONDS = 2**16, 20
IMAGES = dict(count=400, size=2**30, seconds=3600)  # kept in memory
CONNECTIONS = 300


# ------------------------------------------------------------------------------------------ what a browser asks


@dataclass(frozen=True)
class PageOptions(Options):
    """The decoding options within narrower bounds, because everybody waits for everybody."""

    max_new_tokens: Annotated[int, Range(1, 2048)] = 512
    num_beams: Annotated[int, Range(1, 20)] = 1
    num_return_sequences: Annotated[int, Range(1, 20)] = 1


Text = Annotated[str, Range(0, 4000)]


@dataclass(frozen=True)
class Question:
    """A question about one or two images (current, prior), or one that continues a conversation."""

    question: Annotated[str, Range(1, 4000)] = FINDINGS_PROMPT
    options: dict = field(default_factory=dict)
    # the first one of a conversation
    model: str = ""
    images: tuple[Text, ...] = ()
    circumstance: Literal["as given", "without the prior", "images exchanged"] = "as given"
    context: dict = field(default_factory=dict)  # the fields of Context that the page's user has filled in
    # a later one
    conversation: Text = ""


@dataclass(frozen=True)
class Context:
    indication: Text = ""
    history: Text = ""
    comparison: Text = ""
    technique: Text = ""


def checked(values, cls: type, what: str):
    """A dataclass from a JSON object. ValueError for unknown names and wrong values."""
    if not isinstance(values, dict):
        raise ValueError(f"{what} is not a JSON object")
    known = [field.name for field in fields(cls)]
    for name in values:
        if name not in known:
            raise ValueError(f"{what} has no {name}: it has {', '.join(known)}")
    return cls(**check_fields(values, cls, what))


class Gone(ValueError):
    """What a name stood for is no longer in memory."""


# ------------------------------------------------------------------------------------------ the application


class App:
    """The routes. A response is an image, a JSON object, or a stream of JSON objects, one a line."""

    def __init__(self, models: list[str], worker: Worker, defaults: Options):
        self.models, self.worker, self.defaults = models, worker, defaults
        self.page = (HERE / "page" / "index.html").read_text(encoding="utf-8")
        self.images = Shelf(**IMAGES)  # of Pictures
        self.jobs: dict[str, Job] = {}
        self.incoming = 0  # bytes of uploads on their way
        self.decoders = anyio.Semaphore(2)
        self.downloads = anyio.Semaphore(8)

    def routes(self) -> list[Route]:
        return [
            Route("/", self.index),
            Route("/about", self.about),
            Route("/examples/{name}", self.example),
            Route("/images", self.upload, methods=["POST"]),
            Route("/images/{name}", self.image),
            Route("/ask", self.ask, methods=["POST"]),
            Route("/stop/{name}", self.stop, methods=["POST"]),
        ]

    async def index(self, request: Request):
        return HTMLResponse(self.page)

    async def about(self, request: Request):
        """What the page must know of the server."""
        other = WORDS_OF_CHANGE - WORSE - BETTER
        words = {"worse": sorted(WORSE), "better": sorted(BETTER), "other": sorted(other)}
        about = {
            "models": self.models,
            "question": FINDINGS_PROMPT,
            "options": asdict(self.defaults),
            "published": asdict(Options()),
            "words": words,
        }
        return JSONResponse(about)

    # ---- images

    async def upload(self, request: Request):
        """The bytes of an image file, or {"address": …} -> the name, size and picture of what the model will see."""
        if request.headers.get("content-type") == "application/json":
            address = (await self._json(request)).get("address")
            # load_image would also open a file of this machine
            if not isinstance(address, str) or not HTTP.match(address):
                raise ValueError("an address begins with http:// or https://")
            source, limiter = address, self.downloads
        else:
            source, limiter = await self._receive(request), self.decoders
        async with limiter:
            picture = await anyio.to_thread.run_sync(read_picture, source)
        name = self.images.put(picture, len(picture.file) + len(picture.png))
        return JSONResponse({"name": name, "width": picture.width, "height": picture.height, "notes": picture.notes})

    async def _receive(self, request: Request) -> bytes:
        """An upload, in memory: a form (multipart) would be written to a temporary file."""
        size = request.headers.get("content-length", "")
        size = int(size) if size.isdecimal() else IMAGE_BYTES
        if size <= IMAGE_BYTES and self.incoming + size > INCOMING_BYTES:
            raise ValueError("many people are sending images: try again in a minute")
        self.incoming += size
        try:
            return bytes(await read_body(request, IMAGE_BYTES, IMAGE_SECONDS))
        except TooLarge:
            raise TooLarge(f"the image is larger than {IMAGE_BYTES // 2**20} MB") from None
        finally:
            self.incoming -= size

    async def image(self, request: Request):
        picture = self.images.get(request.path_params["name"])
        if picture is None:
            raise Gone("the image is no longer in memory: give it again")
        return Response(picture.png, media_type="image/png")

    async def example(self, request: Request):
        # a fixed table: no name from a request becomes a path
        files = {name: HERE / "assets" / f"{name}.png" for name in ("current", "prior")}
        name = request.path_params["name"]
        if name not in files:
            raise Gone(f"there is no example {name[:40]}")
        return Response(files[name].read_bytes(), media_type="image/png")

    # ---- questions

    async def ask(self, request: Request):
        """A question -> {"job": name}, then what the worker tells."""
        question = checked(await self._json(request), Question, "the question")
        options = Options(**asdict(self.defaults) | asdict(checked(question.options, PageOptions, "decoding options")))
        conversation, text = self._conversation(question)
        return StreamingResponse(self._answers(conversation, text, options), media_type="application/x-ndjson")

    def _conversation(self, question: Question) -> tuple[Conversation, str]:
        """The conversation that a question begins or continues, and the question with its clinical context."""
        # 1) a later question
        if question.conversation:
            conversation = self.worker.conversations.get(question.conversation)
            if conversation is None:
                raise Gone("the conversation is no longer in memory: ask for the report again")
            return conversation, question.question

        # 2) the first one
        pictures = [self.images.get(name) for name in question.images]
        if None in pictures:
            raise Gone("the image is no longer in memory: give it again")
        if not 1 <= len(pictures) <= 2:
            raise ValueError("give one or two images: the current one, then the prior")
        if question.model not in self.models:
            raise ValueError(f"there is no model {question.model[:60]}")
        studies = counterfactuals(Study(*[picture.file for picture in pictures]))
        if question.circumstance not in studies:
            raise ValueError(f"a question {question.circumstance} needs a prior")
        context = asdict(checked(question.context, Context, "the clinical context"))
        text = with_context(question.question, context)
        return Conversation(question.model, studies[question.circumstance]), text

    async def _answers(self, conversation: Conversation, question: str, options: Options):
        # the worker's thread writes, this coroutine reads
        events, loop = asyncio.Queue(), asyncio.get_running_loop()

        def tell(event: dict):
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        name, job = secrets.token_urlsafe(16), Job(conversation, question, options, tell)
        self.jobs[name] = job
        try:
            yield json.dumps({"job": name}) + "\n"
            self.worker.put(job)
            event = {}
            while not event.keys() & {"answer", "error", "stopped"}:
                event = await events.get()
                yield json.dumps(event) + "\n"
        except ValueError as error:
            yield json.dumps({"error": one_line(error)}) + "\n"
        finally:
            # the tab was closed, or all is said
            del self.jobs[name]
            self.worker.stop(job)

    async def stop(self, request: Request):
        job = self.jobs.get(request.path_params["name"])
        if job:
            self.worker.stop(job)
        return JSONResponse({})

    async def _json(self, request: Request) -> dict:
        body = await read_body(request, ASK_BYTES, ASK_SECONDS)
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise ValueError("the request is not a JSON object")
        return values


class Picture(NamedTuple):
    """An image in memory. file: what the model reads, PNG or DICOM; png: what is shown, with the same values."""

    file: bytes
    png: bytes
    width: int
    height: int
    notes: list[str]


def read_picture(source: bytes | str) -> Picture:
    """The bytes of an image file, or an http(s) address on the public internet. OSError, ValueError."""
    # 1) never a path
    if isinstance(source, str):
        try:
            source = download(source, public_only=True)
        except Exception as error:  # urllib, http.client and ssl raise errors of their own
            raise OSError(f"no image from {source} ({one_line(error)}): check the address") from None

    # 2) decode it
    notes: list[str] = []
    with notes_to(notes.append):
        image = load_image(source)
    # grey takes a third of the memory
    red, green, blue = image.split()
    if red.tobytes() == green.tobytes() == blue.tobytes():
        image = red

    # 3) one lossless picture for the viewer and the model. How a model takes DICOM, only the model knows
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    png = file.getvalue()
    return Picture(source if is_dicom(source) else png, png, *image.size, notes)


async def refusal(request: Request, error: Exception):
    """A mistake of the user, as a sentence."""
    status = {TooLarge: 413, Gone: 410, TimeoutError: 408}.get(type(error), 400)
    sentence = one_line(error) if status != 408 else "the request took too long"
    return JSONResponse({"error": sentence}, status)


async def failure(request: Request, error: Exception):
    """A mistake of ours."""
    traceback.print_exception(error)
    return JSONResponse({"error": f"the server failed: {type(error).__name__}"}, 500)


# ------------------------------------------------------------------------------------------ command line


def parse(arguments=None):
    about = "A page in the browser: a pair of X-rays, the report on them, and what the prior did."
    parser = Parser(prog="app.py", description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    help = "checkpoint: a folder or a hub id; several make a list, of which one is loaded at a time"
    add("--model", action="append", metavar="ID_OR_DIR", help=f"{help} (default: {DEFAULT_MODEL})")
    add("--host", default="127.0.0.1", help="address to bind to; beyond this machine a token is asked for")
    add("--port", type=int, default=7860, help="port to bind to; 0: any that is free")
    add("--token", metavar="TEXT", help="what others must show; default: a random one, if --host lets others in")
    add("--open", action="store_true", help="open the page in a browser")
    add_model_flags(add)
    add_decoding_flags(add)
    arguments = parser.parse_args(arguments)
    arguments.model = list(dict.fromkeys(arguments.model or [DEFAULT_MODEL]))
    if not 0 <= arguments.port <= 65535:
        parser.error(f"--port is {arguments.port}, expected 0 to 65535")
    if arguments.token is not None and not re.fullmatch(r"[\w.~-]{8,200}", arguments.token, re.ASCII):
        parser.error("--token has 8 to 200 letters, digits, or signs of -._~")
    return arguments


class Service(NamedTuple):
    """All that runs: server.run(sockets=[listener]) serves, worker.end() is due afterwards."""

    server: uvicorn.Server
    listener: socket.socket
    address: str  # to open
    worker: Worker
    app: App


def make_service(arguments) -> Service:
    """Checks the arguments, listens, and begins to load the first model."""
    # 1) what is quick to check
    defaults = options_of(arguments)
    for model in arguments.model:
        locate(model)
    host, token = arguments.host, arguments.token
    if not is_loopback(host):
        token = token or secrets.token_urlsafe(16)
        warnings.warn(f"{host} is open to other machines, and what they send is not encrypted", stacklevel=2)

    # 2) listen
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, arguments.port), family=family, backlog=128)
    port = listener.getsockname()[1]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    if token:
        address += f"?token={token}"

    # 3) the worker and the routes
    worker = Worker(lambda model, show: load(arguments, model, show), arguments.template)
    worker.start(arguments.model[0])
    app = App(arguments.model, worker, defaults)
    handlers = dict.fromkeys((ValueError, OSError, MemoryError, ClientDisconnect), refusal) | {Exception: failure}
    application = Starlette(routes=app.routes(), exception_handlers=handlers)
    application = Guard(application, host, token, content_security_policy(app.page))
    config = uvicorn.Config(
        application, http=Impatient, ws="none", lifespan="off", log_level="critical", access_log=False,
        server_header=False, limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=1,
    )  # fmt: skip
    return Service(uvicorn.Server(config), listener, address, worker, app)


def run(arguments):
    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = show_warning
    Image.init()
    service = make_service(arguments)
    print(f"Open {service.address} (Ctrl-C ends)", flush=True)
    if arguments.open:
        threading.Thread(target=open_browser, args=[service.address], daemon=True).start()
    try:
        service.server.run(sockets=[service.listener])
    finally:
        service.worker.end()


def open_browser(address: str):
    import webbrowser

    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return
    # a text browser would take this terminal
    if type(browser) is not webbrowser.GenericBrowser:
        browser.open(address)


def main(arguments) -> int:
    return guard("app.py", run, arguments)


if __name__ == "__main__":
    sys.exit(main(parse()))
