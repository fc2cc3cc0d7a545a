"""`push`: an adapter's own files reach the hub, in one commit, and nothing else does. The hub is a server of this machine."""

import base64
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, close_session, constants

from grasp_lora.models.push import OWN_FILES

SECRET = "a text of the data"


class FakeHub:
    """The four calls of the hub that an upload makes, and what it was given.

    Args:
        private: of the repository that is there; None for none.
        refuses: HTTP status for every call that writes.
        there: files of that repository.
    """

    def __init__(self, private: bool | None = None, refuses: int | None = None, there: Sequence[str] = ()) -> None:
        self.private, self.refuses, self.there = private, refuses, there
        self.removed: list[str] = []
        self.created: dict[str, Any] | None = None
        self.files: dict[str, bytes] = {}
        self.bytes_received = b""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        self.bytes_received += body
        if method == "GET":
            if self.private is None:
                return 404, {"error": "none"}
            files = [{"rfilename": name} for name in self.there]
            return 200, {"id": "me/mine", "private": self.private, "sha": "a", "siblings": files}
        if self.refuses:
            return self.refuses, {"error": "no"}
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return 200, {"url": "https://huggingface.co/me/mine"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            names = [one["path"] for one in json.loads(body)["files"]]
            return 200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                self.removed.append(line["value"]["path"])
        return 200, {"commitOid": "a" * 40, "commitUrl": "https://huggingface.co/me/mine/commit/" + "a" * 40}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeHub]]:
    """Start a hub and make it the one that the library talks to, with a token of ours."""
    servers = []

    def start(**settings: Any) -> FakeHub:
        hub = FakeHub(**settings)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, answer = hub.answer(
                    self.command, self.path, self.rfile.read(int(self.headers["Content-Length"] or 0))
                )
                self.send_response(status)
                if status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                content = json.dumps(answer).encode()
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET  # noqa: N815 - so http.server calls it

            def log_message(self, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        go_online(monkeypatch, server.server_port)
        return hub

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
    close_session()


def go_online(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_one")


@pytest.fixture(autouse=True)
def adapter(finished_run: Path) -> Path:
    """An adapter with texts of the data in it and beside it."""
    folder = finished_run / "adapter"
    for name in ("prompt.jsonl", "notes.txt", ".env", "predictions.jsonl"):
        (folder / name).write_text(SECRET, encoding="utf-8")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "adapter_config.json").write_text(SECRET, encoding="utf-8")
    return folder


def test_only_the_own_files_of_an_adapter_are_uploaded(
    serve: Callable[..., FakeHub], cli: Callable[..., Any], adapter: Path
) -> None:
    hub = serve()
    result = cli("push", "run/adapter", "me/mine", "--yes", "--license", "apache-2.0")
    assert result.status == 0, result.err
    assert result.out.splitlines()[-1].endswith("/me/mine")
    assert hub.created is not None
    wanted = {"name": "mine", "organization": "me", "visibility": "private", "type": "model"}
    assert {"type": "model"} | hub.created == wanted  # the type of a model may be left out
    assert set(hub.files) == set(OWN_FILES) - {"adapter.gguf"}
    assert SECRET.encode() not in hub.bytes_received + b"".join(hub.files.values())
    for name in ("adapter_config.json", "adapter_model.safetensors", "grasp_lora.json"):
        assert hub.files[name] == (adapter / name).read_bytes()
    card = hub.files["README.md"].decode()
    assert ModelCard(card).data.license == "apache-2.0"
    assert 'adapter = "me/mine"' in card
    assert 'adapter = "."' in (adapter / "README.md").read_text(encoding="utf-8")  # ours stays as it was
    assert str(adapter.parents[1]) not in card


def test_without_yes_nothing_is_sent(serve: Callable[..., FakeHub], cli: Callable[..., Any], adapter: Path) -> None:
    hub = serve()
    result = cli("push", adapter, "me/mine", "--public")
    assert result.status == 0, result.err
    assert (hub.created, hub.files, hub.bytes_received) == (None, {}, b"")
    assert "would upload to me/mine (public)" in result.out
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert f"adapter_model.safetensors: {size:,} bytes" in result.out
    assert "left out: .env, checkpoint-3, notes.txt, predictions.jsonl, prompt.jsonl\n" in result.out
    assert "no licence; give one with --license" in result.out
    assert "'tiny-llama': others cannot load that from the hub" in result.out
    assert "add --yes" in result.out


@pytest.mark.parametrize("public", [False, True])
def test_a_repository_that_is_there_gets_a_commit(
    public: bool, serve: Callable[..., FakeHub], cli: Callable[..., Any]
) -> None:
    hub = serve(private=not public)
    result = cli("push", "run/adapter", "me/mine", "--yes", *["--public"] * public)
    assert result.status == 0, result.err
    assert hub.created is None
    assert "adapter_model.safetensors" in hub.files


def test_files_of_an_earlier_adapter_are_named_and_removed(
    serve: Callable[..., FakeHub], cli: Callable[..., Any], adapter: Path
) -> None:
    hub = serve(private=True, there=["adapter.gguf", "grasp_lora.json", "README.md", "notes.md", "adapter_config.json"])
    (adapter / "grasp_lora.json").unlink()
    (adapter / "README.md").unlink()
    told = "note: of an earlier adapter there, and removed: grasp_lora.json, adapter.gguf\n"
    plan = cli("push", adapter, "me/mine")
    assert told in plan.out
    assert "the README.md there stays" in plan.out
    assert (hub.removed, hub.files, hub.bytes_received) == ([], {}, b"")
    done = cli("push", adapter, "me/mine", "--yes")
    assert done.status == 0, done.err
    assert told in done.out
    assert hub.removed == ["grasp_lora.json", "adapter.gguf"]
    assert set(hub.files) == {"adapter_config.json", "adapter_model.safetensors"}


def test_nothing_is_removed_where_all_is_replaced_and_a_hub_that_is_silent_is_said(
    serve: Callable[..., FakeHub], cli: Callable[..., Any], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = serve(private=True, there=sorted(set(OWN_FILES) - {"adapter.gguf"}))
    result = cli("push", adapter, "me/mine", "--yes")
    assert "earlier adapter" not in result.out
    assert (result.status, hub.removed) == (0, [])
    close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "note: me/mine could not be looked at: files of an earlier adapter" in cli("push", adapter, "me/mine").out


def test_a_base_model_that_is_a_folder_here_is_noted(
    serve: Callable[..., FakeHub], cli: Callable[..., Any], adapter: Path
) -> None:
    """On the hub there may be a stranger's model of that name."""
    serve()
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "models/llama"}))
    assert "the base model that" not in cli("push", adapter, "me/mine").out
    Path("models/llama").mkdir(parents=True)
    told = "the base model that the adapter names is 'models/llama', a folder of this machine: on the hub there may be another"
    assert told in cli("push", adapter, "me/mine").out


def check_refused(result: Any, message: str) -> None:
    assert result.status == 2
    assert result.err.count("\n") == 1, result.err
    assert message in result.err


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        ({"private": False}, "me/mine is there and public: add --public"),
        ({"refuses": 401}, "(401); run `hf auth login`"),
        ({"refuses": 403}, "(403); take one that may write to me, or a name of your own"),
        ({"refuses": 409}, "(409); choose another name"),
        ({"refuses": 400, "private": True}, "me/mine: the hub refused: "),
    ],
)
def test_what_the_hub_refuses(
    hub: dict[str, Any], message: str, serve: Callable[..., FakeHub], cli: Callable[..., Any]
) -> None:
    found = serve(**hub)
    check_refused(cli("push", "run/adapter", "me/mine", "--yes"), message)
    assert found.files == {}


def test_a_private_repository_is_not_said_to_be_public(serve: Callable[..., FakeHub], cli: Callable[..., Any]) -> None:
    found = serve(private=True)
    message = "me/mine is there and private: leave --public out, or make it public on the hub first"
    check_refused(cli("push", "run/adapter", "me/mine", "--yes", "--public"), message)
    assert found.files == {}


def test_no_network_and_no_token(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_one")
    check_refused(cli("push", "run/adapter", "me/mine", "--yes"), "the hub cannot be reached")  # HF_HUB_OFFLINE
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        go_online(monkeypatch, nobody.getsockname()[1])
        check_refused(
            cli("push", "run/adapter", "me/mine", "--yes"), "me/mine: the hub cannot be reached at http://127"
        )
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    check_refused(cli("push", "run/adapter", "me/mine", "--yes"), "there is no token for the hub: run `hf auth login`")
    close_session()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run/adapter", "mine"], "'mine'; it must be ORG/NAME"),
        (["run/adapter", "me/mine/yours"], "it must be ORG/NAME"),
        (["run/adapter", "../mine"], "it must be ORG/NAME"),
        (["run/adapter", "me/m\u0456ne"], "it must be ORG/NAME"),
        (["run/adapter", "me/"], "it must be ORG/NAME"),
        (["run/adapter", "me/\x1b[31m"], r"'me/\x1b[31m'; it must be ORG/NAME"),
        (["run", "me/mine"], "adapter run: "),
        (["nowhere", "me/mine"], "there is no folder nowhere"),
        (["someone/adapter", "me/mine"], "there is no folder someone/adapter"),
        (["tiny-llama", "me/mine"], "adapter_config.json"),
        (["run/adapter", "me/mine", "--license", "GPL v3"], "--license is 'GPL v3'"),
    ],
)
def test_what_cannot_be_uploaded(
    arguments: list[str], message: str, serve: Callable[..., FakeHub], cli: Callable[..., Any]
) -> None:
    hub = serve()
    check_refused(cli("push", *arguments, "--yes"), message)
    assert hub.bytes_received == b""


def test_places_of_this_machine_links_and_damaged_cards(
    serve: Callable[..., FakeHub], cli: Callable[..., Any], adapter: Path, tmp_path: Path
) -> None:
    hub = serve()
    card = adapter / "README.md"
    whole = card.read_bytes()
    for content in (b"---\n- [\n---\n", b"\xff\xfe"):
        card.write_bytes(content)
        check_refused(cli("push", adapter, "me/mine", "--yes"), "README.md cannot be read")
    with card.open("wb") as huge:
        huge.truncate(2**40)
    check_refused(cli("push", adapter, "me/mine", "--yes"), "README.md cannot be read (it has 1099511627776 bytes")
    card.unlink()
    check_refused(cli("push", adapter, "me/mine", "--license", "mit"), "has no README.md to state a licence in")
    assert "there is no model card" in cli("push", adapter, "me/mine").out
    (tmp_path / "diary").write_bytes(whole)
    card.symlink_to(tmp_path / "diary")
    check_refused(cli("push", adapter, "me/mine", "--yes"), "README.md is a link")
    card.unlink()
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "/home/someone/models/llama"
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    check_refused(cli("push", adapter, "me/mine", "--yes"), "('/home/someone/models/llama')")
    shutil.rmtree(adapter)
    check_refused(cli("push", adapter, "me/mine", "--yes"), "there is no folder")
    assert hub.bytes_received == b""
