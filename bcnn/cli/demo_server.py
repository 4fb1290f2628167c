"""The web server of `bcnn demo`: a page, and an address that answers an image with JSON."""

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from bcnn.utils.errors import UserError

MEGABYTES = 50  # of an upload
UPLOADS = 4  # at once: each is held in memory
SECONDS = 60  # until an upload is complete
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # and what a browser on this machine opens

HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
POLICY = (
    "default-src 'none'; img-src data:; connect-src 'self'; style-src 'nonce-{0}'; "
    "script-src 'nonce-{0}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Answer = Callable[[bytes], Any]  # content of an image file → JSON, or UserError


def listen(host: str, port: int) -> socket.socket:
    """Open a socket at an address of this machine; browsers wait until it is served.

    Raises:
        UserError: the address is not of this machine, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen at --host {host} --port {port}: {error}") from error


def where(listener: socket.socket) -> list[str]:
    """Return sentences that say where the page is."""
    host, port = listener.getsockname()[:2]
    local = EVERYWHERE.get(host, f"[{host}]" if ":" in host else host)
    sentences = [f"drop images on http://{local}:{port} (Ctrl-C ends it)"]
    if host in EVERYWHERE:
        sentences.append(f"open to everybody in your network: http://{_own_address()}:{port}")
    return sentences


def build_server(host: str, page: str, nonce: str, answer: Answer) -> uvicorn.Server:
    """Return a server whose `run([listener])` serves until a signal ends it.

    Args:
        host: of `listen`.
        page: HTML.
        nonce: of its style and script.
        answer: called for one image at a time.
    """
    own = socket.gethostname()
    names = ["localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host]
    config = uvicorn.Config(
        application(page, nonce, answer, [*names, own, f"{own}.local", _own_address()]),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(config)


def application(page: str, nonce: str, answer: Answer, hosts: list[str]) -> Starlette:
    """Return the application: the page at `/`, JSON for an image that is posted to `/image`.

    Args:
        page, nonce, answer: as for `build_server`.
        hosts: of this machine. A page elsewhere can have its own name lead here ("DNS rebinding"):
            requests for other names are refused.
    """
    uploads = asyncio.Semaphore(UPLOADS)
    worker = ThreadPoolExecutor(1)  # Python waits for it at exit: PyTorch must not be left midway

    async def show(request: Request) -> Response:
        policy = {"Content-Security-Policy": POLICY.format(nonce)}
        return HTMLResponse(page, headers=HEADERS | policy)

    async def look(request: Request) -> Response:
        origin, host = request.headers.get("origin"), request.headers["host"]
        if origin not in (None, f"http://{host}", f"https://{host}"):
            raise HTTPException(403, "requests from other sites are refused")
        if uploads.locked():
            raise HTTPException(503, "other images are being looked at: try again in a moment")
        async with uploads:
            content = await _read(request)
            found = await asyncio.get_running_loop().run_in_executor(worker, answer, content)
        return JSONResponse(found, headers=HEADERS)

    return Starlette(
        routes=[Route("/", show), Route("/image", look, methods=["POST"])],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        exception_handlers={HTTPException: _error, UserError: _error},
    )


async def _read(request: Request) -> bytes:
    """Read an upload, whatever length it claims to have."""
    content = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > MEGABYTES * 1e6:
                    raise HTTPException(413, f"an image may have {MEGABYTES} MB: choose a smaller one")
    except TimeoutError:
        raise HTTPException(408, f"the upload took longer than {SECONDS} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the upload was broken off") from None
    return bytes(content)


async def _error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, HEADERS)
    return JSONResponse({"error": str(error)}, 422, HEADERS)


def _own_address() -> str:
    """Return the address of this machine in its network, or its name without one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: finds the interface that leads outside
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
