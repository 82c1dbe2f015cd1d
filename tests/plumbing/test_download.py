"""The oracles: IANA's registries of special addresses (IPv4, IPv6), and a server that counts who asks."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import GOLDEN

from plumbing import download
from plumbing.download import is_public
from plumbing.image import load_image

PNG = (GOLDEN / "images" / "0.png").read_bytes()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append(self.path)
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/image.png")
            self.send_header("Content-Length", "0")
        elif self.path == "/image.png":
            self.send_response(200)
            self.send_header("Content-Length", str(len(PNG)))
        else:
            self.send_response(404, "\x1b]0;title\x07\x1b[31mred\x9b")
            self.send_header("Content-Length", "0")
        self.end_headers()
        if self.path == "/image.png":
            self.wfile.write(PNG)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.seen, server.url = [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()


LOCAL = """0.0.0.0 10.1.2.3 100.64.0.1 100.100.100.200 127.0.0.1 127.8.8.8 168.63.129.16 169.254.169.254 172.16.0.1
    192.0.0.192 192.0.2.1 192.168.1.1 198.18.0.1 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 :: ::1 ::ffff:127.0.0.1
    ::ffff:8.8.8.8 64:ff9b::7f00:1 2001:db8::1 2002:7f00:1:: 2001:0:4136:e378:8000:63bf:3fff:fdd2 fc00::1 fd00:ec2::254
    fe80::1 fe80::1%1 fec0::1 ff02::1"""


@pytest.mark.parametrize("address", LOCAL.split())
def test_a_special_address_is_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2606:4700:4700::1111", "2a00:1450:4001:80f::200e"])
def test_an_address_of_the_internet_is_public(address):
    assert is_public(address)


HOSTS = ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0.0.0.0", "[::1]", "[::]"]
HOSTS += ["[::ffff:127.0.0.1]", "127.0.0.1.", "LOCALHOST"]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_public_only_asks_no_local_address_however_it_is_written(server, scheme, host):
    with pytest.raises(OSError, match="no image from") as caught:
        load_image(f"{scheme}://{host}:{server.server_port}/image.png", public_only=True)
    assert server.seen == [] and "\n" not in str(caught.value)


def test_without_public_only_a_local_address_is_asked(server):
    assert load_image(server.url + "/redirect").size
    assert server.seen == ["/redirect", "/image.png"]


def test_public_only_checks_the_address_behind_a_redirect(server, monkeypatch):
    answers = iter([True])
    monkeypatch.setattr(download, "is_public", lambda address: next(answers, False))
    with pytest.raises(OSError, match="not on the public internet"):
        load_image(server.url + "/redirect", public_only=True)
    assert server.seen == ["/redirect"]


def look_up(*addresses):
    """A getaddrinfo that finds these addresses."""
    kind = socket.AF_INET, socket.SOCK_STREAM, 6, ""
    return lambda host, port, *_, **__: [(*kind, (address, port)) for address in addresses]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_public_only_connects_to_the_address_that_it_checked(monkeypatch, scheme):
    asked = []

    def connect(address, timeout):
        asked.append(address)
        raise OSError("stop")

    monkeypatch.setattr(download.socket, "getaddrinfo", look_up("93.184.215.14"))
    monkeypatch.setattr(download.socket, "create_connection", connect)
    with pytest.raises(OSError, match="stop"):
        load_image(f"{scheme}://rebinding.example:8080/image.png", public_only=True)
    assert asked == [("93.184.215.14", 8080)]


def test_public_only_refuses_a_name_with_any_local_address(monkeypatch):
    monkeypatch.setattr(download.socket, "getaddrinfo", look_up("93.184.215.14", "10.0.0.1"))
    with pytest.raises(OSError, match=r"rebinding\.example is 10\.0\.0\.1, which is not on the public internet"):
        load_image("http://rebinding.example/image.png", public_only=True)


def test_public_only_uses_no_proxy(server, monkeypatch):
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setattr(download, "is_public", lambda address: True)  # the proxy's, too
    monkeypatch.setattr(download.socket, "getaddrinfo", look_up("127.0.0.1"))
    with pytest.raises(OSError, match="no image from"):
        load_image("http://example.org:1/image.png", public_only=True)
    assert server.seen == []


def test_a_servers_words_reach_the_message_without_control_characters(server):
    with pytest.raises(OSError, match="HTTP Error 404") as caught:
        load_image(server.url + "/missing")
    assert str(caught.value).isprintable() and "red" in str(caught.value)
