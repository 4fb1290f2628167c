"""`bcnn push` and hf://, against a stand-in for the hub's HTTP interface."""

import json
from base64 import b64decode
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import reload
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from conftest import Bcnn, Tiny, configure, save_checkpoint
from huggingface_hub import constants

from bcnn.data.splits import SplitRecord
from bcnn.evaluation.card import model_card
from bcnn.evaluation.metrics import NAMES, as_text, headline
from bcnn.evaluation.predictions import Predictions
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.training.run_state import StageResult
from bcnn.training.schema import absolute_paths
from bcnn.utils.errors import UserError

NOBODY = "http://127.0.0.1:1"


class Handler(BaseHTTPRequestHandler):
    """What pushes and downloads ask for; every file is small enough to be sent with its commit."""

    server: Any  # with `private`, names of repositories, and `files`, by name and path

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: Any, code: int = 200, **headers: str) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else raw)

    def do_POST(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        asked, *lines = map(json.loads, body.splitlines())
        if self.path == "/api/repos/create":
            if self.headers["Authorization"] != "Bearer mine":
                return self.answer({"error": "Invalid username or password."}, 401)
            name = f"{asked['organization']}/{asked['name']}"
            code = 409 if name in hub.files else 200
            hub.files.setdefault(name, {})
            if code == 200 and asked.get("visibility") == "private":
                hub.private.add(name)
            return self.answer({"url": f"{constants.ENDPOINT}/{name}"}, code)
        if self.path.endswith("/preupload/main"):
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer({"files": [{"path": each["path"], **mode} for each in asked["files"]]})
        if self.path.endswith("/commit/main"):
            name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            values = [line["value"] for line in lines]
            hub.files[name] |= {each["path"]: b64decode(each["content"]) for each in values}
            address = f"{constants.ENDPOINT}/{name}/commit/{0:040}"
            return self.answer({"commitUrl": address, "commitOid": f"{0:040}"})
        self.answer({})  # /api/validate-yaml

    def do_GET(self) -> None:
        hub, path = self.server, self.path.removeprefix("/api/models")
        name, _, file = path[1:].partition("/resolve/main/")
        if name not in hub.files:
            return self.answer({}, 404, X_Error_Code="RepoNotFound")
        if not file:
            return self.answer({"id": name, "private": name in hub.private})
        if file not in hub.files[name]:
            return self.answer({}, 404, X_Error_Code="EntryNotFound")
        content = hub.files[name][file]
        self.answer(content, ETag=sha1(content).hexdigest(), X_Repo_Commit=f"{0:040}")

    do_HEAD = do_GET


@pytest.fixture
def setenv(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Set environment variables that huggingface_hub reads when it is imported."""

    def change(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        reload(constants)

    yield change
    monkeypatch.undo()
    reload(constants)


@pytest.fixture
def hub(setenv: Any, tmp_path: Path) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.private = {}, set()
    thread = Thread(target=server.serve_forever)
    thread.start()
    setenv(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0")
    setenv(HF_HOME=str(tmp_path / "hf"), HF_TOKEN="mine")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(calibrated: BCNN, tmp_path: Path) -> Path:
    """A run that ended with `last/best.ckpt`; 5 of its 40 test images are mistaken."""
    used = (frozenset(f"{i:032x}" for i in range(*ends)) for ends in ((0, 7), (7, 9), (9, 49)))
    calibrated.split = SplitRecord({"seed": 0}, *used)
    labels = torch.arange(40) % 3
    shares = torch.eye(3)[torch.where(torch.arange(40) < 35, labels, 2 - labels)] * 0.7 + 0.1
    found = Predictions(
        calibrated.classes, [f"{i}.png" for i in range(40)], labels, shares, split="test"
    )
    best = save_checkpoint(calibrated, tmp_path / "run" / "last" / "best.ckpt")
    StageResult("last", best, {}, predictions=found).write(tmp_path / "run")
    return tmp_path / "run"


def test_a_pushed_model_is_loaded_by_its_name_also_from_the_cache(
    bcnn: Bcnn, hub: Any, run: Path, calibrated: BCNN, setenv: Any
) -> None:
    outcome = bcnn("push", run, "me/colours")
    assert outcome.code == 0 and f"{constants.ENDPOINT}/me/colours" in outcome.out
    assert hub.files["me/colours"].keys() == {"model.safetensors", "README.md"} and not hub.private
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": NOBODY}):
        setenv(**variables)
        loaded = load_model("hf://me/colours")
        assert torch.equal(loaded(images), calibrated(images))
        assert (loaded.classes, loaded.split) == (calibrated.classes, calibrated.split)


def test_a_name_on_the_hub_is_a_checkpoint_for_commands_and_training(
    bcnn: Bcnn, hub: Any, run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bcnn("push", run, "me/colours", "--private")
    assert hub.private == {"me/colours"}
    words = [images / "test", "--format", "csv", "--workers", 0]
    here, there = (bcnn("predict", ckpt, *words) for ckpt in (run, "hf://me/colours"))
    assert there.code == 0 and there.out == here.out
    assert bcnn("export", "hf://me/colours", "--format", "safetensors").code == 0
    assert load_model("model.safetensors").classes == ["blue", "green", "red"]
    names = ("ckpt=hf://me/colours", "model.weights=hf://me/colours")
    found = absolute_paths(configure(*names, "output=new"), tmp_path)
    assert load_model(found.ckpt).classes == ["blue", "green", "red"]
    assert found.model.weights == found.ckpt


def test_the_card_has_the_figures_of_these_weights_and_of_no_others(
    bcnn: Bcnn, hub: Any, run: Path, calibrated: BCNN, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tiny, "licence", "cc-by-nc-4.0")
    bcnn("push", run, "me/colours")
    card = hub.files["me/colours"]["README.md"].decode()
    figures = headline(Predictions.load(run / "last" / "predictions.npz"))
    for key in ("top1", "macro_top1", "nll"):
        assert "| {} | {} | {} |".format(NAMES[key], *as_text(key, figures[key])) in card
    assert "Of 40 test images" in card and "| 7 | 2 | 40 |" in card and "perceptual hash" in card
    assert "cc-by-nc-4.0" in card and "short side to 32 px" in card
    assert "95 % of the images, if these are like the 40 held-out images" in card
    assert 'bcnn.load_model("hf://me/colours")' in card and "predict hf://me/colours IMAGE" in card

    other = save_checkpoint(calibrated, run / "last" / "other.ckpt")
    assert "the card shows no figures" in bcnn("push", other, "me/colours").err
    card = hub.files["me/colours"]["README.md"].decode()
    assert "No figures of this model are known" in card and NAMES["top1"] not in card


def test_a_card_says_what_is_not_known_and_shows_class_names_as_they_are(tiny: BCNN) -> None:
    tiny.classes = ["a_b*", "<img src=x>", "two\nlines"]
    card = model_card("me/odd", tiny, None)
    assert card.endswith("- a\\_b\\*\n- \\<img src=x\\>\n- two\\\\nlines\n")
    assert "It is not recorded which images" in card and "this model is not calibrated" in card


def test_mistakes_are_one_sentence(
    bcnn: Bcnn, hub: Any, run: Path, setenv: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts to reach nobody

    def refused(name: str, sentence: str, *words: str) -> None:
        outcome = bcnn("push", run, name, *words)
        assert outcome.code == 1 and sentence in outcome.err and outcome.err.count("\n") == 1

    hub.files = {"me/empty": {}}
    for name, sentence in (
        ("me/empty", "hf://me/empty has no model.safetensors"),
        ("me/nothing", "the hub has no repository me/nothing that you may use"),
        ("me/../colours", "is no name of a repository: give user/name"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_model(f"hf://{name}")
    refused("colours", "'colours' is no name of a repository: give user/name")
    refused("me/empty", "--private: me/empty exists and is public", "--private")
    setenv(HF_TOKEN="another's")
    refused("me/new", "hf://me/new: Invalid username or password: check the network, the disk")
    setenv(HF_TOKEN="", HF_TOKEN_PATH="none")
    refused("me/new", "log in by `hf auth login`, or set HF_TOKEN")
    setenv(HF_TOKEN="mine", HF_ENDPOINT=NOBODY)
    refused("me/new", "Connection refused: check the network")
    with pytest.raises(UserError, match="is not in the cache, and the hub cannot be reached"):
        load_model("hf://me/new")
    assert hub.files == {"me/empty": {}}
