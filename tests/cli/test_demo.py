"""The page to drop photographs on: its answers, what it refuses, and how it behaves in a browser."""

import base64
import http.client
import io
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import pytest
import torch
from conftest import COLOURS, bounded, mutated, set_up, watched, write_images
from hypothesis import given
from PIL import Image

from bcnn.cli import demo
from bcnn.cli.answers import NEAREST, Answers, Gallery
from bcnn.cli.server import MEGABYTES, Server
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import save_model
from bcnn.utils.errors import UserError
from bcnn.utils.interruption import Interruption
from bcnn.utils.options import command

HOSTILE = ["<img src=x onerror=alert(1)>", "b\u202elue", "red"]


@pytest.fixture
def gallery(tiny: BCNN, tmp_path: Path) -> Gallery:
    torch.nn.init.normal_(tiny.backbone.features.weight)  # no image is all zeros to it
    write_images(tmp_path / "photos" / "train", 4)
    data = set_up(tmp_path / "photos", val_fraction=0.0, batch_size=5)
    return Gallery(tiny, data.train, data.evaluation_dataloader(data.train))


@pytest.fixture
def server(tiny: BCNN, gallery: Gallery) -> Iterator[Server]:
    """Of a network whose classes have the names of `COLOURS`, and their photographs."""
    answers = Answers(tiny, gallery)
    with Server("127.0.0.1", 0) as server:
        server.page = answers.page("best.ckpt", server.nonce, MEGABYTES)
        server.answer = answers.answer
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    server: Server, content: bytes = b"", path: str = "/photograph", verb: str = "POST", **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """Status, content and headers of a response; a header that is None is not sent."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    with_dashes = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(verb, path, content, with_dashes)
    response = connection.getresponse()
    text = response.read().decode()
    said = json.loads(text) if response.getheader("Content-Type") == "application/json" else text
    connection.close()
    return response.status, said, dict(response.getheaders())


def jpeg(colour: tuple[int, int, int] = (40, 60, 200), size: tuple[int, int] = (300, 200)) -> bytes:
    noise = np.random.default_rng(0).normal(0, 40, (*size[::-1], 3))
    content = io.BytesIO()
    Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8)).save(content, "JPEG")
    return content.getvalue()


def encoded(kind: str) -> bytes:
    content = io.BytesIO()
    Image.open(io.BytesIO(jpeg(size=(60, 50)))).save(content, kind)
    return content.getvalue()


def picture(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


def test_classes_and_what_told_them_apart(server: Server, tiny: BCNN, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(jpeg())
    status, answer, _ = ask(server, jpeg())
    assert status == 200
    probabilities = tiny.predict(tmp_path / "photo.jpg")[0]
    order = probabilities.argsort(descending=True).tolist()
    classes = answer["classes"]
    assert [each["name"] for each in classes] == [tiny.classes[label] for label in order]
    found = torch.tensor([each["probability"] for each in classes])
    torch.testing.assert_close(found, probabilities[order], atol=1e-3, rtol=0.02)
    for each in classes[1:]:
        ratio = np.log(classes[0]["probability"] / each["probability"])
        assert each["logits"] == pytest.approx(ratio, abs=1e-3)
    assert answer["crop"] == pytest.approx([1 / 6, 0, 5 / 6, 1]) and answer["ratio"] == 1.5
    pixels = np.asarray(picture(classes[1]["picture"])).astype(int)
    outside = pixels[:, : pixels.shape[1] // 8]
    assert abs(np.ptp(outside, axis=2)).max() < 12 < np.ptp(pixels, axis=2).max()  # grey, not coloured
    assert picture(answer["photograph"]).size == pixels.shape[1::-1]


def test_the_nearest_photographs_are_those_of_the_descriptors(
    server: Server, tiny: BCNN, gallery: Gallery
) -> None:
    path, label = gallery.samples[5]
    _, answer, _ = ask(server, Path(path).read_bytes())
    nearest = answer["nearest"]
    assert len(nearest) == NEAREST and nearest[0]["file"] == Path(path).name
    assert nearest[0]["apart"] < 0.002 and nearest[0]["name"] == tiny.classes[label]
    transform = tiny.preprocessing.evaluation()
    rows = tiny.descriptor(torch.stack([transform(Image.open(p)) for p, _ in gallery.samples]))
    apart = (rows - rows[5]).norm(dim=1).sort().values[:NEAREST]
    assert [each["apart"] for each in nearest] == pytest.approx(apart.tolist(), abs=0.002)
    assert picture(nearest[0]["picture"]).size == (48, 40)


def test_photographs_of_any_shape_and_networks_of_one_class(tiny: BCNN) -> None:
    for size in ((1, 1), (3000, 1), (1, 700)):
        content = io.BytesIO()
        Image.new("RGB", size, (200, 10, 10)).save(content, "PNG")
        assert Answers(tiny).answer(content.getvalue())["nearest"] == []
    tiny.classes = ["thing"]
    tiny.head = torch.nn.Linear(tiny.head.in_features, 1)
    tiny.head.linear = lambda labels: (tiny.head.weight[labels], tiny.head.bias[labels])
    (only,) = Answers(tiny).answer(jpeg())["classes"]
    assert only["probability"] == 1


@pytest.mark.fuzz
@given(content=mutated([jpeg(), *map(encoded, ("PNG", "GIF", "TIFF", "WEBP"))]))
def test_whatever_is_sent_has_an_answer_or_a_sentence(tiny: BCNN, content: bytes) -> None:
    with bounded(), catch_warnings():
        simplefilter("ignore")
        try:
            assert Answers(tiny).answer(content)["classes"]
        except UserError as error:
            assert "choose a photograph" in str(error)


def bomb() -> bytes:
    content = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(content, "PNG")
    return content.getvalue()


def test_what_is_no_photograph_is_told_in_a_sentence(server: Server) -> None:
    for content, reason in (
        (b"", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (jpeg()[:300], "truncated"),
        (bomb(), "decompression bomb"),
    ):
        status, said, _ = ask(server, content)
        assert status == 422 and reason in said["error"].lower() and "JPEG, " in said["error"]
    assert ask(server, jpeg())[0] == 200


def test_an_answer_that_is_not_finite_is_none(server: Server, tiny: BCNN) -> None:
    tiny.backbone.features.weight.data.fill_(1e30)
    status, said, _ = ask(server, jpeg())
    assert status == 422 and "not finite" in said["error"]


def test_pages_of_others_get_nothing(server: Server) -> None:
    port = server.server_address[1]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        for verb, path in (("GET", "/"), ("POST", "/photograph")):
            status, said, _ = ask(server, jpeg(), path, verb, Host=host)
            assert status == 403 and set(said) == {"error"}
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{port + 1}"):
        assert ask(server, jpeg(), Origin=origin)[0] == 403
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "192.168.1.7:80"):
        assert ask(server, jpeg(), Host=host, Origin=f"http://{host}")[0] == 200


def test_requests_that_are_none(server: Server) -> None:
    assert ask(server, path="/nowhere")[0] == ask(server, path="/../demo.py", verb="GET")[0] == 404
    assert ask(server, path="/photograph", verb="GET")[0] == 404
    for length in ("-1", "", "9" * 5000):
        assert ask(server, Content_Length=length)[0] == 411
    status, said, _ = ask(server, Content_Length=str(MEGABYTES * 10**6 + 1))
    assert status == 413 and "50 MB" in said["error"]


def test_the_page_allows_itself_nothing_else(server: Server) -> None:
    _, _, headers = ask(server, path="/", verb="GET")
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert f"script-src 'nonce-{server.nonce}';" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"


def run(*words: str) -> int:
    return command(demo.Options, demo.main, demo.USAGE, words)


def test_a_command_says_where_the_page_is_and_ends_by_ctrl_c(
    tiny: BCNN, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tiny, tmp_path / "best.safetensors")
    write_images(tmp_path / "photos" / "train", 2)
    pages: list[str] = []

    def interrupted(server: Server) -> None:
        pages.append(server.page)
        raise Interruption(signal.SIGINT)

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    ckpt = f"ckpt={tmp_path / 'best.safetensors'}"
    assert run(ckpt, f"data={tmp_path / 'photos'}", "port=0") == 130
    said = capsys.readouterr()
    assert "drop photographs on http://127.0.0.1:" in said.out and "anybody" not in said.out
    assert "interrupted (SIGINT)" in said.err and "Of the 6 it was trained on" in pages[0]
    assert run(ckpt, "host=0.0.0.0", "port=0") == 130
    said = capsys.readouterr()
    assert "drop photographs on http://127.0.0.1:" in said.out and "for anybody" in said.out


def test_mistakes_are_told_before_anything_is_loaded(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, sentence in (
        ([f"port={server.server_address[1]}"], "try another port (0: one that is free)"),
        (["port=65536"], "from 0 to 65535"),
        (["host="], "an address of this machine"),
        (["host=nowhere.invalid", "port=0"], "host=nowhere.invalid"),
    ):
        assert run("ckpt=nowhere", *words) == 1
        assert sentence in capsys.readouterr().err
    assert run("ckpt=nowhere", "port=0") == 1
    assert "no such file of weights: nowhere" in capsys.readouterr().err


DROP = """([text, type]) => {
  const files = new DataTransfer();
  files.items.add(new File([Uint8Array.from(atob(text), each => each.charCodeAt())], "x.jpg"));
  const carried = type === "paste" ? {clipboardData: files} : {dataTransfer: files};
  dispatchEvent(Object.assign(new Event(type, {cancelable: true}), carried));
}"""


def test_the_page_in_a_browser(server: Server, tiny: BCNN, browser: Any, tmp_path: Path) -> None:
    tiny.classes = HOSTILE
    tab, said, fetched = watched(browser)
    tab.goto(server.address)
    assert not tab.is_visible("main")

    # a file that is chosen: its classes, and what told the first from the second
    (tmp_path / "photo.jpg").write_bytes(jpeg())
    tab.set_input_files("#file", tmp_path / "photo.jpg")
    tab.wait_for_selector("#classes button")
    names = tab.eval_on_selector_all(
        "#classes button span:first-child", "all => all.map(o => o.innerText)"
    )
    assert sorted(names) == sorted(HOSTILE)
    widths = tab.eval_on_selector_all("img", "all => all.map(one => one.naturalWidth)")
    assert len(widths) == 2 + NEAREST and min(widths) > 0
    caption = tab.inner_text("#evidence figcaption")
    assert f"told {names[0]} from {names[1]}" in caption and "times as likely" in caption

    # another class, and the first alone
    before = tab.get_attribute("#evidence img", "src")
    tab.click("#classes button:nth-child(3)")
    assert tab.get_attribute("#evidence img", "src") != before
    assert names[2] in tab.inner_text("#evidence .scale")
    tab.click("#classes button:nth-child(1)")
    assert f"for {names[0]}" in tab.inner_text("#evidence .scale")
    assert tab.get_attribute("#classes button:nth-child(1)", "aria-pressed") == "true"

    # dropped and pasted ones, of other colours
    for kind, colour in (("drop", COLOURS["green"]), ("paste", COLOURS["red"])):
        before = tab.get_attribute("#seen img", "src")
        tab.evaluate(DROP, [base64.b64encode(jpeg(colour, (90, 80))).decode(), kind])
        tab.wait_for_function("src => document.querySelector('#seen img').src !== src", arg=before)
        assert tab.get_attribute("#seen img", "src") != before

    # the frame lies where the network looked
    frame, shown = tab.locator("#seen i").bounding_box(), tab.locator("#seen img").bounding_box()
    assert frame["width"] / shown["width"] == pytest.approx(80 / 90, abs=0.01)

    assert {url for url in fetched if not url.startswith("data:")} == {
        f"{server.address}/",
        f"{server.address}/photograph",
    }
    assert said == []

    # what is none is told, and the page goes on
    tab.evaluate(DROP, [base64.b64encode(b"no photograph").decode(), "drop"])
    tab.wait_for_selector("#says.wrong")
    assert "choose a photograph" in tab.inner_text("#says")
    tab.set_viewport_size({"width": 390, "height": 844})
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    tab.set_input_files("#file", tmp_path / "photo.jpg")
    tab.wait_for_selector("#says:not(.wrong):not(.busy)")
    assert tab.inner_text("#says") == ""
