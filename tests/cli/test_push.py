"""`bcnn push` and hf://: against a stand-in for the hub's HTTP interface on this machine."""

import base64
import json
import socket
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

import bcnn as package
from bcnn.data.splits import SplitRecord
from bcnn.evaluation.metrics import as_text, proportion
from bcnn.evaluation.predictions import Predictions
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.training.run_state import StageResult
from bcnn.training.schema import absolute_paths
from bcnn.utils.errors import UserError


class Hub(ThreadingHTTPServer):
    """Repositories as the hub has them: what a push and a download ask for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits = 0
        self.stored: dict[str, bytes] = {}  # large files, by SHA-256
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def answer(self, content: object, code: int = 200, **headers: str) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else raw)

    def log_message(self, *_: object) -> None:
        self.server.asked.append(f"{self.command} {self.path}")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.stored[self.path.rpartition("/")[2]] = body
        self.answer({})

    def do_POST(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/commit/main"):
            *_, user, name, _, _ = self.path.split("/")
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "lfsFile":
                    hub.repositories[f"{user}/{name}"][value["path"]] = hub.stored[value["oid"]]
                elif line["key"] == "file":
                    content = base64.b64decode(value["content"])
                    hub.repositories[f"{user}/{name}"][value["path"]] = content
            hub.commits += 1
            address = f"{hub.url}/{user}/{name}/commit/{hub.commits:040x}"
            return self.answer({"commitUrl": address, "commitOid": address[-40:]})
        asked: Any = json.loads(body)
        if self.path == "/api/repos/create":
            if self.headers["Authorization"] != "Bearer mine":
                return self.answer({"error": "Invalid username or password."}, 401)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in hub.repositories
            hub.repositories.setdefault(name, {})
            hub.private |= {name} if not known and asked.get("visibility") == "private" else set()
            return self.answer({"url": f"{hub.url}/{name}"}, 409 if known else 200)
        if self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in asked["files"]]
            modes = {path: "regular" if path.endswith(".md") else "lfs" for path in paths}
            found = [{"path": p, "uploadMode": modes[p], "shouldIgnore": False} for p in paths]
            return self.answer({"files": found})
        if self.path.endswith("/objects/batch"):
            links = {each["oid"]: {"href": f"{hub.url}/{each['oid']}"} for each in asked["objects"]}
            found = [{**o, "actions": {"upload": links[o["oid"]]}} for o in asked["objects"]]
            return self.answer({"objects": found, "transfer": "basic"})
        assert self.path == "/api/validate-yaml"
        self.answer({})

    def do_GET(self) -> None:
        hub, name = self.server, "/".join(self.path.removeprefix("/api/models").split("/")[1:3])
        if name not in hub.repositories:
            return self.answer({}, 404, X_Error_Code="RepoNotFound")
        if self.path.startswith("/api/models/"):
            return self.answer({"id": name, "private": name in hub.private})
        content = hub.repositories[name].get(self.path.rpartition("/")[2])
        if content is None:
            return self.answer({}, 404, X_Error_Code="EntryNotFound")
        commit = f"{hub.commits:040x}"
        self.answer(content, ETag=f'"{sha1(content).hexdigest()}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


@pytest.fixture
def setenv(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Set environment variables that huggingface_hub reads once, when it is imported."""

    def change(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        reload(constants)

    yield change
    monkeypatch.undo()
    reload(constants)


@pytest.fixture
def hub(setenv: Any, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    thread = Thread(target=server.serve_forever)
    thread.start()
    own = {"HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "mine", "HF_HUB_DISABLE_XET": "1"}
    setenv(HF_ENDPOINT=server.url, **own)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def predictions() -> Predictions:
    """Forty test images, the last five of which are mistaken."""
    labels = torch.arange(40) % 3
    predicted = torch.where(torch.arange(40) < 35, labels, (labels + 1) % 3)
    shares = torch.eye(3)[predicted] * 0.7 + 0.1
    paths = [f"{i}.png" for i in range(40)]
    return Predictions(["blue", "green", "red"], paths, labels, shares, split="test")


@pytest.fixture
def run(calibrated: BCNN, predictions: Predictions, tmp_path: Path) -> Path:
    """A run that ended with `last/best.ckpt`, where another checkpoint lies, too."""
    names = [frozenset({f"{i:032x}" for i in range(*ends)}) for ends in ((0, 7), (7, 9), (9, 49))]
    calibrated.split = SplitRecord({"seed": 0}, *names)
    for name in ("best", "other"):
        save_checkpoint(calibrated, tmp_path / "run" / "last" / f"{name}.ckpt")
    ended = StageResult("last", tmp_path / "run" / "last" / "best.ckpt", {}, predictions=predictions)
    ended.write(tmp_path / "run")
    return tmp_path / "run"


def test_what_was_pushed_is_loaded_and_is_the_same_model(
    bcnn: Bcnn, hub: Hub, run: Path, calibrated: BCNN, setenv: Any
) -> None:
    outcome = bcnn("push", run, "me/colours")
    assert outcome.code == 0, outcome.err
    assert f"{hub.url}/me/colours" in outcome.out
    assert hub.repositories["me/colours"].keys() == {"model.safetensors", "README.md"}
    assert hub.commits == 1 and not hub.private
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    loaded = package.load_model("hf://me/colours")
    assert torch.equal(loaded(images), calibrated(images))
    assert loaded.classes == calibrated.classes and loaded.split == calibrated.split
    assert not any("README.md" in each for each in hub.asked if each.startswith("GET"))
    hub.asked.clear()
    setenv(HF_HUB_OFFLINE="1")  # from the cache
    assert torch.equal(package.load_model("hf://me/colours")(images), calibrated(images))
    assert not hub.asked


def test_a_name_on_the_hub_is_a_checkpoint_for_commands_and_training(
    bcnn: Bcnn, hub: Hub, run: Path, images: Path, tmp_path: Path
) -> None:
    bcnn("push", run, "me/colours", "--private")
    assert hub.private == {"me/colours"}
    here, there = (
        bcnn("predict", ckpt, images, "--format", "csv") for ckpt in (run, "hf://me/colours")
    )
    assert there.code == 0 and there.out == here.out
    cfg = configure("ckpt=hf://me/colours", "model.weights=hf://me/colours", "output=new")
    found = absolute_paths(cfg, tmp_path)
    assert load_model(found.ckpt).classes == ["blue", "green", "red"]
    assert found.model.weights == found.ckpt


def test_the_card_has_the_figures_of_these_weights_alone(
    bcnn: Bcnn, hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tiny, "licence", "cc-by-nc-4.0")
    bcnn("push", run, "me/colours")
    card = hub.repositories["me/colours"]["README.md"].decode()
    value, interval = as_text("top1", proportion(35, 40))
    assert f"| top-1 | {value} | {interval} |" in card and "Of 40 test images" in card
    assert "| 7 | 2 | 40 |" in card and "perceptual hash" in card
    assert "cc-by-nc-4.0" in card and "short side to 32 px" in card
    assert "95 % of the images, if these are like the 40 held-out images" in card
    assert 'bcnn.load_model("hf://me/colours")' in card
    assert card.endswith("- blue\n- green\n- red\n")

    outcome = bcnn("push", run / "last" / "other.ckpt", "me/colours")
    assert "the card shows no figures" in outcome.err
    card = hub.repositories["me/colours"]["README.md"].decode()
    assert "No figures of this model are known" in card and "%" not in card.partition("## Images")[0]


def test_a_class_is_named_in_the_card_whatever_it_is_called(
    bcnn: Bcnn, hub: Hub, tiny: BCNN, tmp_path: Path
) -> None:
    tiny.classes = ["a_b*", "<img src=x>", "two\nlines"]
    bcnn("push", save_checkpoint(tiny, tmp_path / "m.safetensors"), "me/odd")
    card = hub.repositories["me/odd"]["README.md"].decode()
    assert card.endswith("- a\\_b\\*\n- \\<img src=x\\>\n- two\\\\nlines\n")
    assert "It is not recorded which images" in card and "this model is not calibrated" in card


def test_mistakes_are_one_sentence(
    bcnn: Bcnn, hub: Hub, run: Path, setenv: Any, tmp_path: Path
) -> None:
    hub.repositories = {"me/empty": {}}
    for name, sentence in (
        ("me/empty", "hf://me/empty has no model.safetensors"),
        ("me/nothing", "the hub has no repository me/nothing that you may use"),
        ("colours", "'colours' is no name of a repository: give user/name"),
        ("me/../colours", "is no name of a repository"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_model(f"hf://{name}")
    for words, sentence in (
        (["colours"], "'colours' is no name of a repository: give user/name"),
        (["me/empty", "--private"], "--private: me/empty exists and is public"),
    ):
        outcome = bcnn("push", run, *words)
        assert outcome.code == 1 and sentence in outcome.err.replace("\n", " ")
    assert hub.repositories == {"me/empty": {}}

    setenv(HF_TOKEN="another's")
    assert "(Invalid username or password.)" in bcnn("push", run, "me/new").err
    setenv(HF_TOKEN="", HF_TOKEN_PATH=str(tmp_path / "none"))
    outcome = bcnn("push", run, "me/new")
    assert outcome.code == 1 and "log in by `hf auth login`, or set HF_TOKEN" in outcome.err

    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = listener.getsockname()[1]
    setenv(HF_TOKEN="mine", HF_ENDPOINT=f"http://127.0.0.1:{closed}")
    outcome = bcnn("push", run, "me/new")
    assert outcome.code == 1 and "me/new: the hub refuses or cannot be reached (" in outcome.err
    with pytest.raises(UserError, match="is not in the cache, and the hub cannot be reached"):
        load_model("hf://me/new")
