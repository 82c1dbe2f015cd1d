"""Who may ask the page's server, what it says to browsers, and how long a client may take."""

import base64
import hashlib
import ipaddress
import re
import secrets
import socket
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

import anyio
from starlette.responses import PlainTextResponse, RedirectResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 10  # until the header of a request is complete
STALL_SECONDS = 30  # for which a client may read nothing of a response
COOKIE = "nanolibra_token"
HOST = re.compile(r"(\[[\da-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?")


def is_loopback(host: str) -> bool:
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def content_security_policy(page: str) -> str:
    """Only the script and the style that stand in the page, known by their hashes; no other host."""
    hashes = {}
    for tag in ("script", "style"):
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        hashes[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    rules = {
        "default-src": "'none'",
        "script-src": hashes["script"],
        "style-src": hashes["style"],
        "img-src": "'self' blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


class Guard:
    """Stands before an ASGI application: refuses strangers, and adds headers to every response.

    host: the address that the server is bound to; token: what a client must show, by a cookie, by an Authorization
    header or in the address of the page; None: nothing.
    """

    def __init__(self, app, host: str, token: str | None, policy: str):
        self.app, self.host, self.token = app, host, token
        self.headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            # a client that asks slowly for the second time is not waited for
            "Connection": "close",
        }

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                headers = [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        request = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        respond = self._refuse(scope, request) or self.app
        await respond(scope, receive, send_with_headers)

    def _refuse(self, scope, headers: dict[str, str]):
        """The response for a request that the application must not see, or None."""
        if not self._knows_host(headers.get("host", "")):
            return PlainTextResponse("This server has another name: open the address that it printed.", 403)
        if scope["method"] not in ("GET", "HEAD") and not self._is_same_origin(headers):
            return PlainTextResponse("This request comes from another page.", 403)
        if self.token is None:
            return None
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if scope["path"] == "/" and self._is_token(query.get("token", [""])[0]):
            cookie = f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/"
            return RedirectResponse("/", 303, {"Set-Cookie": cookie})
        if not self._is_token(self._token_of(headers)):
            return PlainTextResponse("This page asks for a token: open the address that the server printed.", 401)
        return None

    def _knows_host(self, header: str) -> bool:
        """DNS rebinding brings a name of the attacker's. The port may be another one, as in a tunnel."""
        match = HOST.fullmatch(header)
        if not match:
            return False
        name = match[1].strip("[]").lower()
        if is_loopback(self.host):
            return name in {"localhost", "127.0.0.1", "::1", self.host}
        return is_address(name) or name in {"localhost", socket.gethostname().lower(), self.host.lower()}

    def _is_same_origin(self, headers: dict[str, str]) -> bool:
        """Browsers name the page that sends; other programs need not."""
        if "origin" in headers:
            return urlsplit(headers["origin"]).netloc.lower() == headers["host"].lower()
        return headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")

    def _token_of(self, headers: dict[str, str]) -> str:
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return token
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return ""
        return cookies[COOKIE].value if COOKIE in cookies else ""

    def _is_token(self, token: str) -> bool:
        return secrets.compare_digest(token.encode(), self.token.encode())


class TooLarge(ValueError):
    pass


async def read_body(request, limit: int, seconds: float) -> bytearray:
    """The body of a request, in memory. TooLarge before more than limit bytes are read; TimeoutError if it is late."""
    size = request.headers.get("content-length", "0")
    body = bytearray()
    if not size.isdecimal() or int(size) > limit:
        raise TooLarge
    with anyio.fail_after(seconds):
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise TooLarge
    return body


class Impatient(H11Protocol):
    """uvicorn's HTTP/1.1, which would wait forever: it hangs up on who does not ask, and on who does not listen."""

    stalled = None

    def connection_made(self, transport):
        super().connection_made(transport)
        self.loop.call_later(REQUEST_SECONDS, self._hang_up_without_request)

    def _hang_up_without_request(self):
        if self.cycle is None:
            self.transport.abort()

    def on_response_complete(self):
        super().on_response_complete()
        self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def pause_writing(self):
        super().pause_writing()
        self.stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self):
        super().resume_writing()
        if self.stalled:
            self.stalled.cancel()
