"""One thread computes for everybody who uses the page: a queue, the model that is loaded, the conversations."""

import gc
import json
import secrets
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

from data import Study
from model import Libra
from plumbing.cli import warn
from sample import Chat, Options, Stopped

CONVERSATIONS = dict(count=200, size=2**30, seconds=3600)  # kept for follow-up questions
CACHES = 4  # the newest conversations keep their keys and values; the others compute them anew
WAITING = 200  # jobs in the queue


class Shelf:
    """Values in memory under names that nobody can guess.

    Those that were not used for the longest time go when there are too many, when they are too large together (bytes),
    and after some seconds without use.
    """

    def __init__(self, count: int, size: int, seconds: float):
        self.count, self.size, self.seconds = count, size, seconds
        self.values: OrderedDict[str, tuple] = OrderedDict()  # name -> (value, bytes, time of last use)
        self.lock = threading.Lock()

    def put(self, value, size: int) -> str:
        name = secrets.token_urlsafe(16)
        with self.lock:
            self.values[name] = (value, size, time.monotonic())
        self.tidy()
        return name

    def get(self, name: str):
        """The value of a name; None if it is no longer here."""
        self.tidy()
        with self.lock:
            if name not in self.values:
                return None
            value, size, _ = self.values[name]
            self.values[name] = (value, size, time.monotonic())
            self.values.move_to_end(name)
            return value

    def tidy(self):
        with self.lock:
            oldest_allowed = time.monotonic() - self.seconds
            total = sum(size for _, size, _ in self.values.values())
            for name, (_, size, used) in list(self.values.items()):
                # the newest may be as large as it likes
                too_many = len(self.values) > 1 and (len(self.values) > self.count or total > self.size)
                if used >= oldest_allowed and not too_many:
                    break
                del self.values[name]
                total -= size


_thread = threading.local()


@contextmanager
def notes_to(tell: Callable[[str], None]):
    """Warnings of this thread are told, not printed, once `show_warning` is Python's showwarning."""
    _thread.tell = tell
    try:
        yield
    finally:
        del _thread.tell


def show_warning(message, *_, **__):
    tell = getattr(_thread, "tell", lambda note: warn("app.py", note))
    tell(str(message))


def print_event(event: dict):
    """What is told where nobody has asked."""
    for text in event.values():
        if text is not True:
            print(f"app.py: {text}", file=sys.stderr)


def is_dicom(data: bytes) -> bool:
    return data[128:132] == b"DICM"  # PS3.10, 7.1


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or "there is not enough memory"


@dataclass(eq=False)
class Conversation:
    """What a follow-up question needs. chat: with its cache, while it belongs to the newest."""

    model: str
    study: Study
    turns: list[tuple[str, str]] = field(default_factory=list)
    chat: Chat | None = None


@dataclass(eq=False)
class Job:
    """One question of one person. tell(event) is called in the worker's thread and must return at once."""

    conversation: Conversation
    question: str
    options: Options
    tell: Callable[[dict], None]
    stopped: threading.Event = field(default_factory=threading.Event)
    ahead: int | None = None  # jobs before this one, as told


class Worker:
    """Answers jobs one after the other, in the order in which they come.

    What a job is told, one dict each: {"ahead": jobs before it}, {"loading": percent}, {"reading": true}
    when its computation begins, {"text": new text}, {"note": a warning}; and at the end one of {"answer": what `--json`
    prints, "conversation": name, "was_stopped": …}, {"error": a sentence}, {"stopped": true}.
    """

    def __init__(self, load: Callable[..., Libra], template: str | None = None):
        """load(model, progress) -> Libra; template: of the conversation, instead of the model's."""
        self.load, self.template = load, template
        self.model: str | None = None
        self.libra: Libra | None = None
        self.is_over = False
        self.percent = 0  # of the model that is being loaded
        self.waiting: list[Job] = []
        self.current: Job | None = None
        self.changed = threading.Condition()
        self.conversations = Shelf(**CONVERSATIONS)
        self.cached: list[Conversation] = []  # oldest first

    def start(self, model: str):
        """Begins to work, and loads a model before anybody asks."""
        self.thread = threading.Thread(target=self._work, args=[model], daemon=True)
        self.thread.start()

    # ---- called by everybody

    def put(self, job: Job):
        """Queues a job. ValueError if too many are waiting."""
        with self.changed:
            if len(self.waiting) >= WAITING:
                raise ValueError(f"{WAITING} questions are waiting already: try again later")
            self.waiting.append(job)
            self.changed.notify()
            self._tell_places()

    def stop(self, job: Job):
        """Ends a job, wherever it is; one that has text gives what it has."""
        job.stopped.set()
        with self.changed:
            if job in self.waiting:
                self.waiting.remove(job)
                job.tell({"stopped": True})
                self._tell_places()

    def end(self):
        """Ends all jobs and the thread: Python must not end in the middle of a computation."""
        with self.changed:
            self.is_over = True
            jobs = [*self.waiting, self.current]
            self.changed.notify()
        for job in filter(None, jobs):
            self.stop(job)
        self.thread.join(timeout=10)

    def _tell_places(self):
        for place, job in enumerate(self.waiting):
            ahead = place + (self.current is not None)
            if ahead != job.ahead:
                job.ahead = ahead
                job.tell({"ahead": ahead})

    # ---- the thread

    def _work(self, first_model: str):
        self._run(None, first_model)
        while not self.is_over:
            with self.changed:
                if not self.waiting:
                    self.changed.wait(timeout=60)
                    self.conversations.tidy()
                    continue
                self.current = self.waiting.pop(0)
                self._tell_places()
            self._run(self.current, self.current.conversation.model)
            with self.changed:
                self.current = None

    def _run(self, job: Job | None, model: str):
        """Answers a job, or only loads a model. Whatever happens, the next one has its turn."""
        tell = job.tell if job else print_event
        try:
            with notes_to(lambda note: tell({"note": note})):
                begin = time.monotonic()
                self._use(model)
                if job:
                    self._answer(job, time.monotonic() - begin)
        except Stopped:
            tell({"stopped": True})
        except (ValueError, OSError, MemoryError) as error:
            tell({"error": one_line(error)})
        except Exception as error:
            # such as a full GPU
            traceback.print_exc()
            tell({"error": f"the computation failed: {type(error).__name__}"})

    def _use(self, model: str):
        """Loads a model, if it is another one than before; that one goes first."""
        if model == self.model:
            return
        for conversation in self.cached:
            conversation.chat = None
        self.cached, self.libra, self.model = [], None, None
        gc.collect()
        self.libra = self.load(model, self._show_loading)
        self.model = model

    def _show_loading(self, done: int, total: int):
        if self.is_over or (self.current and self.current.stopped.is_set()):
            raise Stopped
        percent = 100 * done // max(total, 1)
        if percent == self.percent:
            return
        self.percent = percent
        with self.changed:
            for job in [self.current, *self.waiting]:
                if job:
                    job.tell({"loading": percent})

    def _answer(self, job: Job, load_seconds: float):
        # 1) continue from the cache, if the conversation still has one
        conversation = job.conversation
        if conversation in self.cached:
            self.cached.remove(conversation)
        else:
            conversation.chat = Chat(self.libra, conversation.study, self.template)
            conversation.chat.turns = conversation.turns
        self.cached.append(conversation)
        while len(self.cached) > CACHES:
            self.cached.pop(0).chat = None

        # 2) answer
        study, display = conversation.study, self.libra.pixels.dicom_display
        images = [image for image in (study.current, study.prior) if image]
        if display != "standard" and any(map(is_dicom, images)):
            job.tell({"note": f'this model was trained on DICOM in the display "{display}", unlike the one shown'})
        job.tell({"reading": True})
        on_text = lambda text: job.tell({"text": text})
        answer = conversation.chat.answer(job.question, job.options, on_text, job.stopped.is_set)
        answer.seconds = {"load": load_seconds} | answer.seconds

        # 3) keep the conversation for the next question
        name = self.conversations.put(conversation, sum(map(len, images)))
        job.tell({"answer": json.dumps(answer.as_json()), "conversation": name, "was_stopped": job.stopped.is_set()})
