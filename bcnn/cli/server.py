"""One page, and an address that a photograph is sent to: what a browser on this machine talks to.

That is within the standard library's server; a framework for it (Gradio) would bring forty packages,
and have browsers fetch fonts and scripts from elsewhere.
"""

import json
import re
import secrets
import socket
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from socketserver import ThreadingTCPServer
from typing import Any

from bcnn.utils.errors import UserError

MEGABYTES = 50  # that a photograph may have
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # and where this machine finds itself

HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Server(ThreadingTCPServer):
    """Listens from the start, and answers in `serve_forever`; browsers wait until then.

    Args:
        host: an address or name of this machine.
        port: 0: one that is free.

    Attributes:
        nonce: what styles and scripts of the page have to bear.
        page: HTML.
        answer: makes JSON of a photograph's file, or raises UserError.
    """

    allow_reuse_address = True
    daemon_threads = True
    page: str
    answer: Callable[[bytes], Any]

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.host = host
        self.nonce = secrets.token_urlsafe()
        super().__init__((host, port), Handler)

    @property
    def address(self) -> str:
        """What to open in a browser on this machine."""
        host = EVERYWHERE.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}"

    def is_meant(self, host: str) -> bool:
        """Whether a request with this `Host` means this server.

        A page from elsewhere can have a name of its own lead here ("DNS rebinding"), but not an
        address, nor the names of this machine.
        """
        name = re.sub(":[0-9]*$", "", host).strip("[]").lower()
        own = socket.gethostname().lower()
        return name in ("localhost", self.host.lower(), own, f"{own}.local") or _is_address(name)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # by which browsers leave
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """The page at `/`, and JSON for a photograph that is posted to `/photograph`."""

    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds that a sender may pause
    server: Server

    def do_GET(self) -> None:
        """Send the page."""
        if self._refused("/"):
            return
        nonce = f"'nonce-{self.server.nonce}'"
        policy = (
            f"default-src 'none'; img-src data:; connect-src 'self'; style-src {nonce}; "
            f"script-src {nonce}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        page = self.server.page.encode()
        self._send(200, "text/html; charset=utf-8", page, {"Content-Security-Policy": policy})

    def do_POST(self) -> None:
        """Answer to a photograph."""
        if self._refused("/photograph"):
            return
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,15}", length):
            return self._say(411, "the request does not say how long the photograph is")
        if int(length) > MEGABYTES * 1e6:
            return self._say(413, f"a photograph may have {MEGABYTES} MB: choose a smaller one")
        content = self.rfile.read(int(length))
        try:
            answer = self.server.answer(content)
        except UserError as error:
            return self._say(422, str(error))
        self._send(200, "application/json", json.dumps(answer).encode())

    def _refused(self, path: str) -> bool:
        """Whether the request is for another path, or another site is behind it; it is told so."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if not self.server.is_meant(host) or origin not in (None, f"http://{host}", f"https://{host}"):
            self._say(403, f"requests by way of other sites are refused: open {self.server.address}")
        elif self.path != path:
            self._say(404, f"there is nothing here: open {self.server.address}")
        else:
            return False
        return True

    def _say(self, status: int, sentence: str) -> None:
        self.close_connection = True  # what came with the request may not have been read
        self._send(status, "application/json", json.dumps({"error": sentence}).encode())

    def _send(
        self, status: int, kind: str, content: bytes, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        size = {"Content-Type": kind, "Content-Length": str(len(content))}
        for name, value in (HEADERS | size | (headers or {})).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def version_string(self) -> str:
        """As little as possible."""
        return "bcnn"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the page says what there is to say."""


def listening(host: str, port: int) -> Server:
    """A server at an address.

    Raises:
        UserError: it cannot listen there.
    """
    if not host or not 0 <= port <= 65535:
        raise UserError(
            f"host={host} port={port}: an address of this machine, and a number from 0 to 65535"
        )
    try:
        return Server(host, port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen at host={host} port={port} ({reason}): try another port (0: one that is "
            "free), or the usual host"
        ) from error


def own_address() -> str:
    """Of this machine in its network; its name where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect(("192.0.2.1", 9))  # sends nothing: it asks for the way there
            return str(way.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _is_address(name: str) -> bool:
    try:
        return bool(ip_address(name))
    except ValueError:
        return False
