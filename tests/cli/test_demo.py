"""`bcnn demo`: its answers, the requests that it refuses, and the page in a browser."""

import base64
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import pytest
import torch
from conftest import COLOURS, ROOT, Bcnn, network, set_up, watched, write_images
from fuzz import bounded, mutated
from hypothesis import given
from PIL import Image

from bcnn.cli import demo_server
from bcnn.cli.demo_server import SHOWN, Gallery, answer, build_server, compute_gallery
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import save_model
from bcnn.utils.errors import UserError

BLACK = Image.new("RGB", (60, 50))
HOSTILE = ["<img src=x onerror=alert(1)>", "b\u202elue", "red"]


@pytest.fixture
def gallery(tiny: BCNN, tmp_path: Path) -> Gallery:
    torch.nn.init.normal_(tiny.backbone.features.weight)  # no image is all zeros to it
    write_images(tmp_path / "photos" / "train", 4)
    data = set_up(tmp_path / "photos", val_fraction=0.0, batch_size=5)
    return compute_gallery(tiny, data.train, data.evaluation_dataloader(data.train))


@pytest.fixture
def port(tiny: BCNN, gallery: Gallery) -> Iterator[int]:
    """Of a server in a thread, of a network whose classes have the names of `COLOURS`."""
    server = build_server(tiny, gallery, "best.ckpt", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


def ask(
    port: int, content: Any = b"", path: str = "/image", verb: str = "POST", **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """Return status, content and headers of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(verb, path, content, headers, encode_chunked="Transfer-Encoding" in headers)
    response = connection.getresponse()
    text = response.read().decode()
    is_json = response.getheader("Content-Type") == "application/json"
    connection.close()
    return response.status, json.loads(text) if is_json else text, dict(response.getheaders())


def encoded(kind: str, image: Image.Image = BLACK) -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def jpeg(colour: tuple[int, int, int] = (40, 60, 200), size: tuple[int, int] = (300, 200)) -> bytes:
    noise = np.random.default_rng(0).normal(0, 40, (*size[::-1], 3))
    return encoded("JPEG", Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8)))


def test_classes_and_what_tells_them_apart(port: int, tiny: BCNN, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(jpeg())
    status, found, _ = ask(port, jpeg())
    assert status == 200
    probabilities = tiny.predict(tmp_path / "photo.jpg")[0]
    order = probabilities.argsort(descending=True).tolist()
    classes = found["classes"]
    assert [each["name"] for each in classes] == [tiny.classes[label] for label in order]
    shown = torch.tensor([each["probability"] for each in classes])
    torch.testing.assert_close(shown, probabilities[order], atol=1e-3, rtol=0.02)
    for each in classes[1:]:
        ratio = np.log(classes[0]["probability"] / each["probability"])
        assert each["logits"] == pytest.approx(ratio, abs=1e-3)
    assert found["crop"] == pytest.approx([1 / 6, 0, 5 / 6, 1]) and found["ratio"] == 1.5
    picture = base64.b64decode(classes[1]["picture"].partition("base64,")[2])
    pixels = np.asarray(Image.open(io.BytesIO(picture))).astype(int)
    outside = pixels[:, : pixels.shape[1] // 8]
    assert abs(np.ptp(outside, axis=2)).max() < 12 < np.ptp(pixels, axis=2).max()  # grey, not coloured


def test_a_calibrated_model_marks_its_set_and_what_it_does_not_know(
    port: int, calibrated: BCNN
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    calibrated.taxonomy = {"class": calibrated.classes, "kind": ["colour"] * 3}
    found = ask(port, encoded("PNG", Image.fromarray(noise)))[1]
    assert found["unlike_training"] is False and found["sure"].startswith("sure: ")
    limit = calibrated.calibration.threshold(0.95)
    for rank, each in enumerate(found["classes"]):
        assert each["in_set"] == (rank == 0 or each["probability"] >= limit)
    blue = encoded("PNG", Image.new("RGB", (32, 32), "navy"))
    assert ask(port, blue)[1]["unlike_training"] is True


def test_the_nearest_images_are_those_of_the_descriptors(
    port: int, tiny: BCNN, gallery: Gallery
) -> None:
    samples, _ = gallery
    path, label = samples[5]
    nearest = ask(port, Path(path).read_bytes())[1]["nearest"]
    assert len(nearest) == SHOWN and nearest[0]["file"] == Path(path).name
    assert nearest[0]["distance"] < 0.002 and nearest[0]["name"] == tiny.classes[label]
    transform = tiny.preprocessing.evaluation()
    descriptors = tiny.descriptor(torch.stack([transform(Image.open(p)) for p, _ in samples]))
    distances = (descriptors - descriptors[5]).norm(dim=1).sort().values[:SHOWN]
    assert [each["distance"] for each in nearest] == pytest.approx(distances.tolist(), abs=0.002)


@pytest.mark.fuzz
@given(content=mutated([jpeg(), *map(encoded, ("PNG", "GIF", "TIFF", "WEBP"))]))
def test_any_upload_has_an_answer_or_a_sentence(tiny: BCNN, content: bytes) -> None:
    with bounded(), catch_warnings():
        simplefilter("ignore")
        try:
            assert answer(tiny, ([], []), content)["classes"]
        except UserError as error:
            assert "choose another image" in str(error) and "BytesIO" not in str(error)


def test_a_file_that_cannot_be_decoded_is_a_sentence(port: int, tiny: BCNN) -> None:
    large = Image.new("L", (8_000, 8_000))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"  # Pillow would run Ghostscript
    for content in (b"", postscript, jpeg()[:300], encoded("PNG", large)):
        status, found, _ = ask(port, content)
        assert status == 422 and "choose another image" in found["error"]
    assert ask(port, encoded("JPEG", large))[0] == 200  # decoded at a fraction of its size
    tiny.backbone.features.weight.data.fill_(1e30)
    status, found, _ = ask(port, jpeg())
    assert status == 422 and "not finite" in found["error"]


def test_other_sites_get_nothing_and_the_page_loads_nothing(port: int) -> None:
    _, page, headers = ask(port, path="/", verb="GET")
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    nonce = re.search("script-src 'nonce-(.*?)';", policy)
    assert nonce and f'<script nonce="{nonce[1]}">' in page
    assert headers["x-content-type-options"] == "nosniff"
    for host in (f"evil.example:{port}", "127.0.0.1.evil.example", "192.0.2.7"):
        for verb, path in (("GET", "/"), ("POST", "/image")):
            status, found, _ = ask(port, jpeg(), path, verb, Host=host)
            assert status == 400 and "<" not in found
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{port + 1}"):
        assert ask(port, jpeg(), Origin=origin)[0] == 403
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", "[::1]:80", socket.gethostname()):
        assert ask(port, jpeg(), Host=host, Origin=f"http://{host}")[0] == 200


def test_an_upload_is_bounded_whatever_length_it_claims(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_server, "MEGABYTES", 0.1)
    assert ask(port, bytes(10**5 + 1))[0] == 413
    chunked = {"Transfer-Encoding": "chunked"}
    assert ask(port, iter([bytes(10**5), b"1"]), **chunked)[0] == 413
    assert ask(port, iter([jpeg(size=(60, 50))]), **chunked)[0] == 200


def slow_upload(port: int) -> socket.socket:
    """Begin an upload; return once the server waits for its content."""
    connection = socket.create_connection(("127.0.0.1", port))
    head = b"POST /image HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nExpect: 100-continue"
    connection.sendall(head + b"\r\n\r\n")
    assert b"100 " in connection.recv(100)
    return connection


def test_uploads_at_once_and_their_time_are_bounded(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [slow_upload(port) for _ in range(demo_server.UPLOADS)]
    assert ask(port, jpeg())[0] == 503
    assert ask(port, path="/", verb="GET")[0] == 200
    for connection in slow:
        connection.close()
    while ask(port, jpeg())[0] != 200:
        pass
    monkeypatch.setattr(demo_server, "SECONDS", 0.1)
    with slow_upload(port) as connection:
        assert b"408" in connection.recv(100)


@pytest.mark.slow
def test_a_process_serves_the_page_until_sigterm(tmp_path: Path) -> None:
    save_model(network(), tmp_path / "best.safetensors")
    write_images(tmp_path / "photos" / "train", 2)
    words = ["demo", tmp_path / "best.safetensors", "--port", "0", "--images", tmp_path / "photos"]
    command = [sys.executable, "-m", "bcnn", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process: Any = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    address = next(line.split()[3] for line in process.stdout if line.startswith("drop images on "))
    page = urllib.request.urlopen(address).read()
    assert b"Drop an image here" in page and b"Of 6 training images" in page
    process.send_signal(signal.SIGTERM)
    assert "interrupted (SIGTERM)" in process.communicate(timeout=20)[1]
    assert process.returncode == 143


def test_a_port_that_is_taken_is_a_sentence(bcnn: Bcnn, port: int) -> None:
    outcome = bcnn("demo", __file__, "--port", port)
    assert outcome.code == 1 and outcome.err.count("\n") == 1
    assert outcome.err.startswith("error: Address already in use") and str(port) in outcome.err


DROP = """([text, type]) => {
  const files = new DataTransfer();
  files.items.add(new File([Uint8Array.from(atob(text), each => each.charCodeAt())], "x.jpg"));
  const carried = type === "paste" ? {clipboardData: files} : {dataTransfer: files};
  dispatchEvent(Object.assign(new Event(type, {cancelable: true}), carried));
}"""


def test_the_page_in_a_browser(port: int, tiny: BCNN, browser: Any, tmp_path: Path) -> None:
    tiny.classes = HOSTILE
    tab, said, fetched = watched(browser)
    tab.goto(f"http://127.0.0.1:{port}")
    assert not tab.is_visible("main")

    # a file that is chosen: its classes, and what tells the first from the second
    (tmp_path / "photo.jpg").write_bytes(jpeg())
    tab.set_input_files("#file", tmp_path / "photo.jpg")
    tab.wait_for_selector("#classes button")
    names = tab.locator("#classes button span:first-child").all_inner_texts()
    assert sorted(names) == sorted(HOSTILE)
    widths = tab.eval_on_selector_all("img", "all => all.map(one => one.naturalWidth)")
    assert len(widths) == 2 + SHOWN and min(widths) > 0
    caption = tab.inner_text("#evidence figcaption")
    assert f"speak for {names[0]} and not for {names[1]}" in caption and "times as likely" in caption

    # another class
    before = tab.get_attribute("#evidence img", "src")
    tab.click("#classes button:nth-child(3)")
    assert tab.get_attribute("#evidence img", "src") != before
    assert names[2] in tab.inner_text("#evidence .scale")

    # dropped and pasted ones, of other colours
    for kind, colour in (("drop", COLOURS["green"]), ("paste", COLOURS["red"])):
        before = tab.get_attribute("#seen img", "src")
        tab.evaluate(DROP, [base64.b64encode(jpeg(colour, (90, 80))).decode(), kind])
        tab.wait_for_function("src => document.querySelector('#seen img').src !== src", arg=before)

    # the frame lies where the network looked
    frame, shown = tab.locator("#seen i").bounding_box(), tab.locator("#seen img").bounding_box()
    assert frame["width"] / shown["width"] == pytest.approx(80 / 90, abs=0.01)

    own = f"http://127.0.0.1:{port}/"
    assert {url for url in fetched if not url.startswith("data:")} == {own, f"{own}image"}
    assert said == []

    # a file that is no image is an error, and the next one is shown
    tab.evaluate(DROP, [base64.b64encode(b"no image").decode(), "drop"])
    tab.wait_for_selector("#says.wrong")
    assert "choose another image" in tab.inner_text("#says")
    tab.set_input_files("#file", tmp_path / "photo.jpg")
    tab.wait_for_selector("#says:not(.wrong):not(.busy)")

    tab.set_viewport_size({"width": 390, "height": 844})
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    boxes = [tab.locator(part).bounding_box() for part in ("#bars", "#seen")]
    assert boxes[0]["y"] < boxes[1]["y"]  # on a phone the answer comes first
