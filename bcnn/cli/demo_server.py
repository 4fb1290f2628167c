"""The web server of `bcnn demo`: a page, and an address that answers an image with JSON."""

import asyncio
import io
import math
import secrets
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from torch import Tensor
from torch.utils.data import DataLoader

from bcnn.data.image_io import decode, open_image, reason
from bcnn.evaluation import answers
from bcnn.evaluation.explain import SIDE, see
from bcnn.evaluation.heatmap import overlay, scaled
from bcnn.evaluation.inference import validate_finite
from bcnn.evaluation.neighbours import descriptors, nearest
from bcnn.evaluation.predictions import COVERAGE
from bcnn.evaluation.report import template, thumbnail
from bcnn.models.attribution import shares
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.calibration import prediction_sets
from bcnn.utils.console import track
from bcnn.utils.errors import UserError

SHOWN = 6  # classes, and nearest images
PIXELS = 50e6  # of an image; a JPEG, which is decoded at a fraction of its size, may have more
MEGABYTES = 50  # of an upload
UPLOADS = 4  # at once: each is held in memory
SECONDS = 60  # until an upload is complete
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
POLICY = (
    "default-src 'none'; img-src data:; connect-src 'self'; style-src 'nonce-{0}'; "
    "script-src 'nonce-{0}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

# (path, label) of the images to show the nearest of, and batches of their descriptors.
Gallery = tuple[Sequence[tuple[str, int]], Sequence[Tensor]]


def compute_gallery(model: BCNN, samples: Sequence[tuple[str, int]], batches: DataLoader) -> Gallery:
    """Return the gallery of the samples, whose images `batches` loads in this order."""
    found: list[Tensor] = []
    for batch in track(descriptors(model, batches), "computing descriptors", len(batches), "batches"):
        validate_finite(batch, ["a training image"] * len(batch))
        found.append(batch.half().cpu())
    return samples, found


def build_server(model: BCNN, gallery: Gallery, title: str, host: str) -> uvicorn.Server:
    """Return a server of the page, whose `run([listener])` serves until a signal ends it."""
    nonce = secrets.token_urlsafe()
    facts = {"classes": len(model.classes), "size": model.preprocessing.size}
    page = template("demo.html").render(
        name=title, nonce=nonce, megabytes=MEGABYTES, images=len(gallery[0]), **facts
    )
    headers = HEADERS | {"Content-Security-Policy": POLICY.format(nonce)}
    uploads = asyncio.Semaphore(UPLOADS)
    worker = ThreadPoolExecutor(1)  # Python waits for it at exit: PyTorch must not be left midway

    async def show(request: Request) -> Response:
        return HTMLResponse(page, headers=headers)

    async def look(request: Request) -> Response:
        origin, host = request.headers.get("origin"), request.headers["host"]
        if origin not in (None, f"http://{host}", f"https://{host}"):
            raise HTTPException(403, "requests from other sites are refused")
        if uploads.locked():
            raise HTTPException(503, "other images are being looked at: try again in a moment")
        async with uploads:
            content, loop = await _read(request), asyncio.get_running_loop()
            found = await loop.run_in_executor(worker, answer, model, gallery, content)
        return JSONResponse(found, headers=HEADERS)

    handlers = dict.fromkeys((HTTPException, UserError, ClientDisconnect), _error)
    routes = [Route("/", show), Route("/image", look, methods=["POST"])]
    app = Starlette(routes=routes, exception_handlers=handlers)
    # A page elsewhere can have its own name lead here ("DNS rebinding"): other names are refused.
    own = socket.gethostname()
    hosts = ["localhost", "127.0.0.1", "[::1]", host, own, f"{own}.local"]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    return uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5))


def answer(model: BCNN, gallery: Gallery, content: bytes) -> dict[str, Any]:
    """Return what the page shows of an image file, in plain values; pictures are data URIs."""
    seen = see(model, _decoded(content, model.preprocessing.side))
    top = seen.probabilities.topk(min(SHOWN, len(model.classes)))
    labels = top.indices.to(seen.logits.device)
    maps = torch.cat([shares(model, seen.maps, label[None]) for label in labels]).cpu()
    # What speaks for the likeliest class; then for it and against each of the others.
    maps = torch.cat([maps[:1], maps[:1] - maps[1:]])
    validate_finite(torch.cat([seen.probabilities, maps.flatten()])[None], ["the image"])
    small = seen.image.copy()
    small.thumbnail((SIDE, SIDE))
    box = scaled(seen.box, small.width / seen.image.width)
    drawn = [overlay(small, box, m.numpy(), float(m.abs().max()) or 1.0) for m in maps]
    threshold = model.calibration.threshold(COVERAGE) if model.calibration else math.inf
    in_set = prediction_sets(seen.probabilities[None], threshold)[0]
    classes = []
    for p, label, evidence, picture in zip(*map(Tensor.tolist, top), maps, drawn, strict=True):
        numbers = {"probability": p, "logits": float(evidence.sum())}
        if model.calibration:
            numbers["in_set"] = bool(in_set[label])
        classes.append({"name": model.classes[label], "picture": thumbnail(picture, SIDE), **numbers})
    sure = model.taxonomy and answers.answer(seen.probabilities, [], model.taxonomy)
    neighbours = []
    distances, indices = nearest(seen.descriptor, gallery[1], SHOWN)
    for index, distance in zip(indices[0], distances[0].tolist(), strict=True):
        path, label = gallery[0][index]
        facts = {"file": Path(path).name, "distance": distance}
        neighbours.append({"name": model.classes[label], "picture": thumbnail(path), **facts})
    return {
        "image": thumbnail(small, SIDE),
        "ratio": seen.image.width / seen.image.height,
        "crop": [edge / side for edge, side in zip(seen.crop, seen.image.size * 2, strict=True)],
        "classes": classes,
        "nearest": neighbours,
        "unlike_training": seen.unlike_training,
        "set_size": int(in_set.sum()) if model.calibration else None,
        "sure": answers.answer_text(sure) if sure else "",
    }


def _decoded(content: bytes, side: int) -> Image.Image:
    """Decode an image file at least at `side`."""
    try:
        with open_image(io.BytesIO(content)) as file:
            if file.format not in ("JPEG", "MPO") and file.width * file.height > PIXELS:
                raise ValueError(f"it has more than {PIXELS / 1e6:.0f} megapixels")
            return decode(file, side)
    except Exception as error:  # decoders raise whatever the bytes lead them into
        raise UserError(f"cannot read this file: {reason('', error)}; choose another image") from error


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
    return bytes(content)


async def _error(request: Request, error: Exception) -> Response:
    status, sentence = getattr(error, "status_code", 422), getattr(error, "detail", str(error))
    return JSONResponse({"error": sentence}, status, HEADERS)
