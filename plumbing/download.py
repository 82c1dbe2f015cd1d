"""An http(s) address -> the bytes behind it, within limits, and on request only from the public internet."""

import http.client
import ipaddress
import re
import socket
import time
import urllib.request
from urllib.parse import quote

HTTP = re.compile(r"https?://", re.I)
URL_LETTERS = "!#$%&'()*+,/:;=?@[]~"  # that mean something in an address (RFC 3986)
URL_BYTES, URL_SECONDS = 64 * 2**20, 20  # the most that one download may take

# of IPv6, the unicast addresses that IANA gives out; the others include local ones and mapped IPv4 ones
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
# public by its number, but every virtual machine on Azure finds its host's services there
AZURE_HOST = ipaddress.ip_address("168.63.129.16")


def download(url: str, public_only: bool = False) -> bytes:
    """Returns what an http(s) address holds, after at most 5 redirects.

    public_only: refuse an address, also after a redirect, that is not on the public internet, such as this machine or
    its neighbours. Raises errors of ValueError, OSError, urllib, http.client and ssl.
    """
    handlers = [_Redirects]
    if public_only:
        # a proxy would look up the name itself, out of our sight
        handlers += [_PublicHTTP, _PublicHTTPS, urllib.request.ProxyHandler({})]
    opener = urllib.request.build_opener(*handlers)
    opener.addheaders = [("User-Agent", "nanolibra")]
    deadline, data = time.monotonic() + URL_SECONDS, bytearray()
    # piece by piece, because urllib limits neither the size nor the whole time, only each wait
    with opener.open(quote(url, safe=URL_LETTERS), timeout=URL_SECONDS) as response:
        while piece := response.read1(2**16):
            data += piece
            if len(data) > URL_BYTES or time.monotonic() > deadline:
                raise ValueError(f"more than {URL_BYTES // 2**20} MB or {URL_SECONDS} s")
        if response.length:
            raise ValueError(f"{response.length} bytes are missing")
    return bytes(data)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def redirect_request(self, request, response, code, message, headers, url):
        # urllib would read its body, however long
        response.close()
        # and it would follow an address to FTP
        if not HTTP.match(url):
            raise ValueError(f"it redirects to {url}")
        return super().redirect_request(request, response, code, message, headers, url)


class _PublicConnection(http.client.HTTPConnection):
    def connect(self):
        """Connects to the very address that was checked: a second look-up of the name could give another one."""
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        addresses = [place[0] for *_, place in found]
        for address in addresses:
            if not is_public(address):
                raise ValueError(f"{self.host} is {address}, which is not on the public internet")
        self.sock = socket.create_connection((addresses[0], self.port), self.timeout)


class _PublicSecureConnection(http.client.HTTPSConnection, _PublicConnection):
    """HTTPSConnection.connect calls that of the next class, which is ours, and then encrypts the connection."""


class _PublicHTTP(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(_PublicConnection, request)


class _PublicHTTPS(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(_PublicSecureConnection, request)


def is_public(address: str) -> bool:
    """Whether an IP address is one host on the public internet: not this machine, its network, or cloud metadata."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        # 6to4 and Teredo addresses contain an IPv4 address, which may be a local one
        is_tunnel = ip.sixtofour is not None or ip.teredo is not None
        return ip in GLOBAL_UNICAST and ip.is_global and not is_tunnel
    return ip.is_global and not ip.is_multicast and ip != AZURE_HOST
