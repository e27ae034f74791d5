"""Weights: fetched over real HTTP from a Hub on loopback, read from real files, loaded whole or not at all."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import http.server
import itertools
import json
import os
import pickle
import re
import socket
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.models import adapt_input_conv
from torch import nn

import zoo
from tests.hub_stub import Hub, corrupt, cut_at, shorten, status
from tests.launcher import Program, python
from zoo.errors import CheckpointError, ConfigError, DownloadError, UnknownModelError
from zoo.hub import load_config
from zoo.registry import Weights
from zoo.weights import LoadReport, fetch, locate, read_state_dict

SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}


def small(**args: Any) -> nn.Module:
    return zoo.create_model("poolformer_s12", **SMALL, **args)


def report_of(model: nn.Module) -> LoadReport:
    report = model.load_report
    assert isinstance(report, LoadReport)
    return report


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def published(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PoolFormer's tensors under the names of its authors."""

    def rename(key: str) -> str:
        key = re.sub(r"^stages\.(\d)\.blocks\.", lambda m: f"network.{2 * int(m[1])}.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.conv", lambda m: f"network.{2 * int(m[1]) - 1}.proj", key)
        key = re.sub(r"layer_scale(\d)\.scale", r"layer_scale_\1", key)
        key = key.replace("stem.conv", "patch_embed.proj")
        return key.replace("head.norm", "norm").replace("head.fc", "head")

    return {rename(key): tensor for key, tensor in state_dict.items()}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A model whose every tensor is random, so that none can be mistaken for an initial one."""
    torch.manual_seed(0)
    model = small(num_classes=10)
    for tensor in model.state_dict().values():
        tensor.normal_()
    return model


@pytest.fixture
def folder(trained: nn.Module, tmp_path: Path) -> Path:
    return zoo.save_pretrained(trained, tmp_path / "saved")


# ------------------------------------------------------------------------------------------------------------ downloads

PRELUDE = """
import json, os, resource, sys, time, urllib.error, urllib.request
from pathlib import Path
from zoo.errors import ZooError
from zoo.registry import Weights
from zoo.weights import fetch, fetch_from_hub

URL, HOME = os.environ["HUB_URL"], Path(os.environ["HF_HOME"])
sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 50)  # before it is tried again

def mark(name):
    try:
        urllib.request.urlopen(f"{URL}/mark/{name}")
    except urllib.error.HTTPError:
        pass

def repo(name, revision=None, filename=None, sha256=None, **where):
    return fetch(Weights(tag="", license="", hub_id=name, filename=filename, sha256=sha256), revision=revision, **where)

def link(path, sha256=None, revision=None, **where):
    url = path if "://" in path else URL + path
    return fetch(Weights(tag="", license="", url=url, sha256=sha256), revision=revision, **where)

def outcome(get, *args, **where):
    try:
        return get(*args, **where).read_bytes().decode("latin1")
    except ZooError as error:
        return f"{type(error).__name__}: {error}"

def files(root=HOME):
    # what a later run would find; not the locks, references and directories around it
    paths = [p for p in Path(root).rglob("*") if p.is_file() and not {".locks", "refs", ".no_exist"} & set(p.parts)]
    return sorted(p.name for p in paths if p.name not in ("CACHEDIR.TAG", ".agent_harnesses.json"))
"""

ERRORS = """
def cases():
    yield "private", repo, ("me/private",), {}
    yield "private, with a token", repo, ("me/private",), {"token": "hf_member"}
    yield "gated", repo, ("me/gated",), {}
    yield "gated, outsider", repo, ("me/gated",), {"token": "hf_outsider"}
    yield "gated, member", repo, ("me/gated",), {"token": "hf_member", "cache_dir": HOME / "member"}
    yield "no repository", repo, ("me/nothing",), {}
    yield "no revision", repo, ("me/small", "v9"), {}
    yield "no file", repo, ("me/small",), {"filename": "other.bin"}
    yield "no weights", repo, ("me/empty",), {}
    yield "bad name", repo, ("me/small/more",), {}
    yield "refused", repo, ("me/refused",), {}
    yield "trouble at once", repo, ("me/down",), {}
    yield "not a hub", repo, ("me/strange",), {}
    yield "shorter", repo, ("me/shorter",), {}
    yield "cut once", repo, ("me/cut-once",), {}
    yield "cut", repo, ("me/cut",), {}
    yield "corrupt", repo, ("me/corrupt",), {}
    yield "other hash", repo, ("me/bin",), {"sha256": "0" * 64, "cache_dir": HOME / "other"}
    yield "cache is a file", repo, ("me/bin",), {"cache_dir": __file__}
    yield "url", link, ("/files/net.pth",), {}
    yield "url, moved", link, ("/moved/net.pth",), {}
    yield "url, no file", link, ("/files/none.pth",), {}
    yield "url, trouble", link, ("/files/trouble.pth",), {}
    yield "url, other hash", link, ("/files/hash.pth", "0" * 64), {}
    yield "url, cut once", link, ("/files/cut-once.pth",), {}
    yield "url, cut", link, ("/files/cut.pth",), {}
    yield "url, not one", link, ("ftp://host/net.pth",), {}
    yield "url, revision", link, ("/files/net.pth",), {"revision": "v1"}
    yield "url, spaces", link, ("/files/my net.pth",), {}

if __name__ == "__main__":
    found = {"first": outcome(repo, "me/small"), "pinned": outcome(repo, "me/small", os.environ["FIRST_COMMIT"])}
    found["bin"] = outcome(repo, "me/bin")
    mark("cached")
    found["again"] = outcome(repo, "me/small")
    outcome(repo, "me/small", os.environ["FIRST_COMMIT"])
    outcome(repo, "me/bin")
    mark("errors")
    found |= {name: outcome(get, *args, **where) for name, get, args, where in cases()}
    found["files"] = files()
    found["corrupt, again"] = outcome(repo, "me/corrupt")
    mark("url-cached")
    outcome(link, "/files/net.pth")
    mark("url-refreshed")
    outcome(link, "/files/net.pth", refresh=True)
    mark("full-disk")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))  # no file may grow larger: what a full disk does
    found["full disk"] = outcome(repo, "me/bin", cache_dir=HOME / "full")
    found["url, full disk"] = outcome(link, "/files/net.pth", cache_dir=HOME / "full")
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    found["full files"] = files(HOME / "full")
    print(json.dumps(found))
"""

CACHED = """
found = {"cached": outcome(repo, "me/small"), "url": outcome(link, "/files/net.pth")}
found["uncached"] = outcome(repo, "me/other")
if "HF_HUB_OFFLINE" in os.environ:
    found["uncached, pinned"] = outcome(repo, "me/other", "v2")
found["url, uncached"] = outcome(link, "/files/other.pth")
print(json.dumps(found))
"""

REFRESH = """
found = {"stale": outcome(repo, "me/small")}
mark("refresh")
found["refreshed"] = outcome(repo, "me/small", refresh=True)
mark("after")
found["new"] = outcome(repo, "me/small")
mark("end")
print(json.dumps(found))
"""

NO_LINKS = """
found = {"corrupt": outcome(repo, "me/corrupt"), "files": files(), "again": outcome(repo, "me/corrupt")}
found["trouble"] = outcome(repo, "me/trouble")
print(json.dumps(found))
"""


CREATE = """
import torch, timm, zoo

def logits(model):
    channels = model.pretrained_cfg["input_size"][0]
    return model.eval()(torch.linspace(-1, 1, channels * 64 * 64).view(1, channels, 64, 64)).flatten()[:5].tolist()

def create(*args, **where):
    try:
        return logits(zoo.create_model(*args, **where))
    except ZooError as error:
        return f"{type(error).__name__}: {error}"

COMMIT = os.environ["ENTRY_COMMIT"]
found = {"tag": create("poolformer_s12.sail_in1k", pretrained=True)}
found["pinned"] = create(f"poolformer_s12.sail_in1k@{COMMIT}")
mark("created")
found["again"] = create("poolformer_s12", pretrained=True)
found["pinned again"] = create(f"poolformer_s12.sail_in1k@{COMMIT}")
mark("adapted")
torch.manual_seed(0)
grey = zoo.create_model("poolformer_s12", pretrained=True, num_classes=2, in_chans=1)
found["report"] = str(grey.load_report)
found["hub"] = create("hf-hub:me/trained")
args = {"num_classes": 10, **json.loads(os.environ["SMALL"])}
found["path"] = create("poolformer_s12", checkpoint_path="hf-hub:me/trained@main", **args)
found["hub, other revision"] = create("hf-hub:me/trained@v2")
found["bare"] = create("hf-hub:me/bin")
out = HOME / "out.safetensors"
zoo.convert_checkpoint("hf-hub:me/trained", out)
found["converted"] = out.is_file()
print(json.dumps(found))
"""


def start(script: str, path: Path, home: Path, hub_url: str, **env: str) -> Program:
    """Run a script in a process of its own, as huggingface_hub reads its environment once, at import."""
    path.write_text(PRELUDE + script)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    root = str(Path(zoo.__file__).parents[1])
    clean |= {"HF_ENDPOINT": hub_url, "HUB_URL": hub_url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    clean |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    clean |= {"PYTHONPATH": root, **env}
    return Program(path, env=clean)


def finish(process: Program) -> dict[str, Any]:
    done = process.finish()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def between(hub: Hub, mark: str) -> list[str]:
    """The requests after one mark and before the next, as "METHOD path"; not those of the process that runs beside."""
    lines = [f"{method} {path}" for method, path, _, _ in hub.requests if not re.match("/me/(corrupt|trouble)/", path)]
    rest = lines[lines.index(f"GET /mark/{mark}") + 1 :]
    return list(itertools.takewhile(lambda line: not line.startswith("GET /mark/"), rest))


BODY = bytes(range(256)) * 256  # 64 KiB
TEXT = BODY.decode("latin1")


@dataclasses.dataclass
class Network:
    hub: Hub
    online: dict[str, Any]
    refreshed: dict[str, Any]
    offline: dict[str, Any]
    unreachable: dict[str, Any]
    no_links: dict[str, Any]
    created: dict[str, Any]


def pretrained_file(seed: int) -> bytes:
    torch.manual_seed(seed)
    return safetensors.torch.save(zoo.create_model("poolformer_s12").state_dict())


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory, trained: nn.Module) -> Any:
    """Everything that needs a network, in six processes; what takes long there is waiting."""
    tmp = tmp_path_factory.mktemp("network")
    home = tmp / "home"
    with Hub() as hub:
        first = hub.repo("me/small", {"model.safetensors": BODY[::-1]}).refs["main"]
        hub.repos["me/small"].commit({"model.safetensors": BODY, "pytorch_model.bin": b"not this one"})
        hub.repo("me/bin", {"pytorch_model.bin": BODY})
        hub.repo("me/private", {"model.safetensors": BODY}, private=True)
        hub.repo("me/gated", {"model.safetensors": BODY}, gated=True)
        hub.repo("me/empty", {"README.md": b"nothing yet"})
        for name in ("refused", "trouble", "down", "strange", "shorter", "cut-once", "cut", "corrupt"):
            hub.repo(f"me/{name}", {"model.safetensors": BODY})
        hub.fault("HEAD", "me/refused/", status(403))
        hub.fault("HEAD", "me/trouble/", status(503))
        hub.fault("GET", "me/down/", status(503))
        hub.fault("HEAD", "me/strange/", lambda reply: reply.headers.clear())
        hub.fault("GET", "me/shorter/", shorten)
        hub.fault("GET", "me/cut-once/", cut_at(1000), times=1)
        hub.fault("GET", "me/cut/", cut_at(1000))
        hub.fault("GET", "me/corrupt/", corrupt, times=1)
        hub.files |= {f"/files/{name}.pth": BODY for name in ("net", "trouble", "hash", "cut-once", "cut")}
        hub.moved["/moved/net.pth"] = f"{hub.url}/files/net.pth"
        hub.fault("GET", "/files/trouble", status(500))
        hub.fault("GET", "/files/cut-once", cut_at(1000), times=1)
        hub.fault("GET", "/files/cut.pth", cut_at(1000))

        online = finish(start(ERRORS, tmp / "online.py", home, hub.url, FIRST_COMMIT=first))
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
            address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
            hub.repos["me/small"].commit({"model.safetensors": b"new"})
            hub.fault("GET", "me/corrupt/", corrupt, times=1)
            no_links = start(NO_LINKS, tmp / "links.py", tmp / "plain", hub.url, HF_HUB_DISABLE_SYMLINKS="1")
            unreachable = start(CACHED, tmp / "unreachable.py", home, hub.url, HF_ENDPOINT=address)
            offline = start(CACHED, tmp / "offline.py", home, hub.url, HF_HUB_OFFLINE="1")
            offline_found = finish(offline)
            saved = zoo.save_pretrained(trained, tmp / "trained")
            hub.repo("me/trained", {path.name: path.read_bytes() for path in saved.iterdir()})
            entry = hub.repo("timm/poolformer_s12.sail_in1k", {"model.safetensors": pretrained_file(1)})
            env = {"ENTRY_COMMIT": entry.refs["main"], "SMALL": json.dumps(SMALL)}
            entry.commit({"model.safetensors": pretrained_file(2)})
            created = finish(start(CREATE, tmp / "create.py", home, hub.url, **env))
            refreshed = finish(start(REFRESH, tmp / "refresh.py", home, hub.url))
            yield Network(hub, online, refreshed, offline_found, finish(unreachable), finish(no_links), created)


@pytest.mark.parametrize("case", ["first", "bin", "again", "private, with a token", "gated, member", "cut once"])
def test_fetch(network: Network, case: str) -> None:
    assert network.online[case] == TEXT


def test_fetch_pins_a_revision(network: Network) -> None:
    assert network.online["pinned"] == TEXT[::-1]


def test_what_is_cached_needs_no_request(network: Network) -> None:
    assert between(network.hub, "cached") == []
    assert between(network.hub, "url-cached") == []
    assert between(network.hub, "url-refreshed") == ["GET /files/net.pth"]
    assert between(network.hub, "after") == []


def test_refresh_asks(network: Network) -> None:
    assert network.refreshed == {"stale": TEXT, "refreshed": "new", "new": "new"}
    path = "/me/small/resolve/main/model.safetensors"
    assert between(network.hub, "refresh") == [f"HEAD {path}", f"GET {path}"]


def test_the_token_is_sent_to_the_hub_alone(network: Network) -> None:
    tokens = {path: token for _, path, token, _ in network.hub.requests}
    assert tokens["/me/private/resolve/main/model.safetensors"] in ("", Hub.TOKEN)
    assert Hub.TOKEN in {token for _, path, token, _ in network.hub.requests if path.startswith("/me/private/")}
    assert {token for _, path, token, _ in network.hub.requests if path.startswith("/files/")} == {""}


@pytest.mark.parametrize(
    ("case", "fragments"),
    [
        ("private", ["no repository me/private", "private", "HF_TOKEN"]),
        ("gated", ["me/gated is gated", "https://huggingface.co/me/gated", "hf auth login"]),
        ("gated, outsider", ["your account", "https://huggingface.co/me/gated"]),
        ("no repository", ["no repository me/nothing", "Check the name"]),
        ("no revision", ["me/small has no revision 'v9'"]),
        ("no file", ["me/small has no other.bin"]),
        ("no weights", ["me/empty has no model.safetensors or pytorch_model.bin"]),
        ("bad name", ["'me/small/more'", "owner/name"]),
        ("refused", ["refuses access", "403"]),
        ("trouble at once", ["has trouble", "503", "try again later"]),
        ("not a hub", ["does not answer as a Hub", "HF_ENDPOINT"]),
        ("shorter", ["another length", "Try again"]),
        ("cut", ["broke again and again", "Try again later"]),
        ("corrupt", ["damaged", "SHA-256", "removed from the cache"]),
        ("other hash", ["SHA-256", "0" * 64]),
        ("cache is a file", ["Cannot write", "cache_dir="]),
        ("full disk", ["does not fit on the disk", "cache_dir="]),
        ("url, no file", ["/files/none.pth", "404"]),
        ("url, trouble", ["has trouble", "500"]),
        ("url, other hash", ["SHA-256", "0" * 64]),
        ("url, cut", ["broke again and again", "nothing was kept"]),
        ("url, not one", ["not the URL of a file"]),
        ("url, spaces", ["not the URL of a file"]),
        ("url, revision", ["without revisions", "@v1"]),
        ("url, full disk", ["does not fit on the disk", "cache_dir="]),
    ],
)
def test_a_download_that_fails_says_why(network: Network, case: str, fragments: list[str]) -> None:
    message = network.online[case]
    assert message.startswith("DownloadError: ")
    for fragment in fragments:
        assert fragment in message


def test_a_hub_in_trouble_is_asked_again_before_giving_up(network: Network) -> None:
    assert "DownloadError: 127.0.0.1" in network.no_links["trouble"]
    assert "has trouble (HTTP 503)" in network.no_links["trouble"]


def test_nothing_half_written_stays(network: Network) -> None:
    def of(name: str) -> list[str]:
        return [file for file in network.online["files"] if name in file]

    kept = {"me/small": 2, "me/private": 1, "me/gated": 1, "me/bin": 1, "me/cut-once": 1}  # a blob and a link each
    assert len(of("model.safetensors")) == kept["me/small"] + 3
    assert of("incomplete") == of("tmp") == []
    assert of("hash.pth") == of("cut.pth") == []
    assert network.online["full files"] == []
    assert network.online["corrupt, again"] == TEXT


def test_a_url_is_taken_up_where_it_broke(network: Network) -> None:
    assert network.online["url"] == network.online["url, moved"] == network.online["url, cut once"] == TEXT
    ranges = [part for _, path, _, part in network.hub.requests if path == "/files/cut-once.pth"]
    assert ranges == ["", "bytes=1000-"]


def test_a_file_within_a_zip_archive(tmp_path: Path) -> None:
    site, cache = tmp_path / "site", tmp_path / "cache"
    site.mkdir()
    with zipfile.ZipFile(site / "net.zip", "w") as archive:
        archive.writestr("net/small.pth", "small")
        archive.writestr("net/large.pth", "large")
    (site / "broken.zip").write_text("no archive")
    asked = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def read(archive: str, member: str) -> str:
            url = f"http://127.0.0.1:{server.server_port}/{archive}"
            return fetch(Weights(tag="", license="", url=url, filename=member), cache_dir=cache).read_text()

        assert (read("net.zip", "net/small.pth"), read("net.zip", "net/large.pth")) == ("small", "large")
        assert asked == ["/net.zip"]  # once for both
        with pytest.raises(DownloadError, match=r"holds no net/other\.pth"):
            read("net.zip", "net/other.pth")
        with pytest.raises(DownloadError, match="is no whole zip archive"):
            read("broken.zip", "net/small.pth")
        server.shutdown()
    assert not list(cache.rglob("*other*"))


def test_weights_that_only_a_person_can_fetch() -> None:
    page = Weights(tag="best", license="", page="https://example.org/share", note="password 1234")
    with pytest.raises(
        DownloadError, match=r"by hand, from https://example\.org/share \(password 1234\).*checkpoint_path="
    ):
        fetch(page)
    assert page.source == "https://example.org/share"


def test_offline(network: Network) -> None:
    found = network.offline
    assert found["cached"] == found["url"] == TEXT
    assert "`hf download me/other model.safetensors`" in found["uncached"]
    assert "checkpoint_path= (--checkpoint)" in found["uncached"]
    assert "HF_HUB_OFFLINE" in found["uncached"]
    assert "`hf download me/other model.safetensors --revision v2`" in found["uncached, pinned"]
    assert "HF_HUB_OFFLINE" in found["url, uncached"]


def test_no_network(network: Network) -> None:
    assert network.unreachable["cached"] == TEXT
    assert "DownloadError: Cannot reach 127.0.0.1" in network.unreachable["uncached"]
    assert "checkpoint_path=" in network.unreachable["uncached"]


def test_the_hash_is_checked_without_symbolic_links_too(network: Network) -> None:
    assert "SHA-256" in network.no_links["corrupt"]
    assert network.no_links["files"] == []
    assert network.no_links["again"] == TEXT


def logits(model: nn.Module) -> Any:
    """What the same weights give; kernels round by where in memory the weights lie."""
    found = model.eval()(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)).flatten()[:5].tolist()
    return pytest.approx(found, rel=1e-3, abs=1e-4)


def test_create_pretrained(network: Network) -> None:
    torch.manual_seed(2)
    assert network.created["tag"] == network.created["again"]
    assert network.created["tag"] == logits(zoo.create_model("poolformer_s12"))
    torch.manual_seed(1)
    assert network.created["pinned"] == network.created["pinned again"]
    assert network.created["pinned"] == logits(zoo.create_model("poolformer_s12"))
    assert between(network.hub, "created") == []
    assert "1000 classes and the model 2" in network.created["report"]
    assert "from 3 to 1 input channels" in network.created["report"]


def test_create_from_a_repository(network: Network, trained: nn.Module) -> None:
    assert network.created["hub"] == network.created["path"]
    assert network.created["hub"] == logits(trained)
    assert network.created["hub, other revision"].startswith("DownloadError: me/trained has no revision 'v2'")
    assert network.created["bare"].startswith("DownloadError: me/bin has no config.json")
    assert network.created["converted"]


# ------------------------------------------------------------------------------------------------------------- locating


def test_locate_a_folder(folder: Path, tmp_path: Path) -> None:
    assert locate(folder) == locate(f"local-dir:{folder}") == folder / "model.safetensors"
    only = tmp_path / "only"
    only.mkdir()
    with pytest.raises(CheckpointError, match=r"holds no checkpoint.*empty"):
        locate(only)
    (only / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"holds no checkpoint.*notes\.txt"):
        locate(only)
    (only / "last.pth.tar").touch()
    assert locate(str(only)) == only / "last.pth.tar"
    (only / "best.pt").touch()
    with pytest.raises(CheckpointError, match=r"several checkpoints.*best\.pt, last\.pth\.tar"):
        locate(only)


def test_locate_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "poolformer.pth").touch()
    with pytest.raises(CheckpointError, match=r"no checkpoint .* Did you mean poolformer\.pth\?"):
        locate(tmp_path / "poolfromer.pth")
    (tmp_path / "link.pth").symlink_to(tmp_path / "gone.pth")
    with pytest.raises(CheckpointError, match=r"link\.pth' is a link that leads nowhere: to '.*gone\.pth'"):
        locate(tmp_path / "link.pth")
    with pytest.raises(CheckpointError, match="write hf-hub:timm/poolformer_s12"):
        locate("timm/poolformer_s12.sail_in1k")
    with pytest.raises(ConfigError, match="not int"):
        locate(3)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrapper", [None, "state_dict", "model_state_dict", "model", "module", "state_dict_ema", "model_ema"]
)
def test_read_what_training_scripts_write(
    trained: nn.Module, tmp_path: Path, wrapper: str | None, legacy: bool
) -> None:
    tensors = trained.state_dict()
    wrapped = {f"module._orig_mod.{key}": tensor for key, tensor in tensors.items()}
    content = wrapped if wrapper is None else {wrapper: wrapped, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "last.pth.tar", _use_new_zipfile_serialization=not legacy)
    assert equal(read_state_dict(tmp_path / "last.pth.tar"), tensors)


def test_weights_of_compiled_and_parallel_models(trained: nn.Module, tmp_path: Path) -> None:
    wrappers: list[Any] = [torch.compile, nn.DataParallel]
    for wrap in wrappers:
        model = small(num_classes=10)
        report = zoo.load_checkpoint(wrap(model), trained.state_dict())
        assert not report.fresh
        assert equal(model.state_dict(), trained.state_dict())
    with pytest.raises(ConfigError, match="the model that was compiled, which lies in its _orig_mod"):
        zoo.save_pretrained(wrappers[0](trained), tmp_path / "compiled")


def test_the_state_of_a_run_is_no_checkpoint(trained: nn.Module, tmp_path: Path) -> None:
    torch.save({"progress": {}}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint .* It holds state\.pt"):
        zoo.load_checkpoint(trained, tmp_path)


def test_averaged_weights_are_preferred(trained: nn.Module, tmp_path: Path) -> None:
    last, averaged = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    torch.save({"state_dict": last, "state_dict_ema": averaged}, tmp_path / "both.pth")
    assert equal(read_state_dict(tmp_path / "both.pth"), averaged)
    assert equal(read_state_dict(tmp_path / "both.pth", use_ema=False), last)


class Attack:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore")  # PyTorch's, of TorchScript's end
def test_nothing_that_runs_code_is_read(trained: nn.Module, tmp_path: Path) -> None:
    for legacy in (False, True):
        torch.save({"w": Attack(tmp_path / "made")}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError, match=r"would run code \((posix|nt)\.mkdir\)"):
            read_state_dict(tmp_path / "a.pth")
    assert not (tmp_path / "made").exists()
    torch.save(trained, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"zoo\.models\.metaformer\.MetaFormer"):
        read_state_dict(tmp_path / "model.pth")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_state_dict(tmp_path / "script.pt")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "legacy.pth"])
@pytest.mark.parametrize("part", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_file(trained: nn.Module, tmp_path: Path, name: str, part: float) -> None:
    path = tmp_path / name
    if name == "model.safetensors":
        safetensors.torch.save_file(trained.state_dict(), path)
    else:
        torch.save(trained.state_dict(), path, _use_new_zipfile_serialization=name == "model.pth")
    body = path.read_bytes()
    path.write_bytes(body[: int(part * len(body)) if part < 1 else int(part)])
    short = "header" if part == 4 and name == "model.safetensors" else "cut short"
    with pytest.raises(CheckpointError, match="empty" if part == 0 else short) as caught:
        read_state_dict(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"GIF89a" + bytes(500), "cut short, or is something else"),
        (b"just some text, quite a lot of it", "cut short, or is something else"),
        (pickle.dumps([1, 2, 3]), "cut short, or is something else|no state dict"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_a_foreign_file(tmp_path: Path, content: bytes, message: str, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(path)


def test_the_content_decides_and_not_the_suffix(trained: nn.Module, tmp_path: Path) -> None:
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "net.bin")
    assert equal(read_state_dict(tmp_path / "net.bin"), trained.state_dict())
    torch.save(trained.state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_state_dict(tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list and no state dict"),
        ({}, "holds no tensors, but nothing at all"),
        ({"epoch": 3, "lr": 0.1}, "holds no tensors, but epoch, lr"),
        ({"epoch": 3, "student": {"w": torch.ones(1)}}, "holds no tensors, but .* Tensors lie in 'student': save"),
        ({"w": torch.zeros(1), "epoch": 3}, "not tensors among its tensors: epoch"),
    ],
)
def test_no_state_dict(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "net.pth")


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Cannot read.*directory"):
        read_state_dict(tmp_path)


# -------------------------------------------------------------------------------------------------------------- loading


@pytest.fixture(params=["safetensors", "pth", "pth.tar", "folder", "local-dir", "state dict", "published"])
def source(request: pytest.FixtureRequest, trained: nn.Module, folder: Path, tmp_path: Path) -> Any:
    """The same weights, however they come."""
    tensors = trained.state_dict()
    match request.param:
        case "safetensors":
            return folder / "model.safetensors"
        case "pth":
            torch.save(tensors, tmp_path / "net.pth")
            return str(tmp_path / "net.pth")
        case "pth.tar":
            torch.save({"epoch": 1, "state_dict": tensors}, tmp_path / "net.pth.tar")
            return tmp_path / "net.pth.tar"
        case "folder":
            return str(folder)
        case "local-dir":
            return f"local-dir:{folder}"
        case "published":
            torch.save(published(tensors), tmp_path / "published.pth")
            return tmp_path / "published.pth"
        case _:
            return tensors


def test_load_from_every_source(trained: nn.Module, source: Any) -> None:
    model = small(num_classes=10)
    assert not equal(model.state_dict(), trained.state_dict())
    report = zoo.load_checkpoint(model, source)
    assert equal(model.state_dict(), trained.state_dict())
    assert report.loaded == len(model.state_dict())
    assert report.dropped == report.adapted == report.fresh == ()
    assert report.converted == ("published" in str(source))
    assert ("published layout" in str(report)) == report.converted


def test_other_classes_and_channels_from_every_source(trained: nn.Module, source: Any) -> None:
    wanted = trained.state_dict()
    for channels in (1, 5):
        model = small(num_classes=7, in_chans=channels)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        report = zoo.load_checkpoint(model, source)
        after = model.state_dict()
        head = ["head.fc.bias", "head.fc.weight"]
        assert sorted(report.dropped) == sorted(report.fresh) == head
        assert report.adapted == ("stem.conv.weight",)
        assert "10 classes and the model 7" in str(report)
        assert f"from 3 to {channels} input channels" in str(report)
        stem = adapt_input_conv(channels, wanted["stem.conv.weight"])
        torch.testing.assert_close(after["stem.conv.weight"], stem, rtol=0, atol=0)
        for key, tensor in after.items():
            if key != "stem.conv.weight":
                assert torch.equal(tensor, before[key] if key in head else wanted[key]), key


def test_no_classifier(trained: nn.Module, source: Any) -> None:
    model = small(num_classes=0)
    report = zoo.load_checkpoint(model, source)
    assert sorted(report.dropped) == ["head.fc.bias", "head.fc.weight"]
    assert report.fresh == ()
    images = torch.randn(1, 3, 64, 64)
    trained.eval()
    expected = trained.forward_head(trained.forward_features(images), pre_logits=True)  # type: ignore[operator]
    assert torch.equal(model.eval()(images), expected)


def test_everything_of_an_mlp_head_goes_with_it() -> None:
    args: dict[str, Any] = {"depths": (1, 1), "dims": (16, 32), "token_mixers": "sepconv", "res_scale_init": None}
    tensors = zoo.create_model("caformer_s18", num_classes=10, **args).state_dict()
    head = {key for key in tensors if key.startswith("head.fc.")}
    assert len(head) > 4
    assert set(zoo.load_checkpoint(zoo.create_model("caformer_s18", num_classes=0, **args), tensors).dropped) == head
    model = zoo.create_model("caformer_s18", num_classes=3, **args)
    report = zoo.load_checkpoint(model, tensors)  # only the last layer knows the classes
    assert set(report.dropped) == {"head.fc.fc2.weight", "head.fc.fc2.bias"}


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
def test_models_wrapped_for_features(trained: nn.Module, folder: Path, feature_cls: str) -> None:
    model = small(features_only=True, out_indices=(0, 2), feature_cls=feature_cls)
    report = zoo.load_checkpoint(model, folder)
    assert {"head.fc.weight", "stages.3.downsample.conv.weight"} <= set(report.dropped)
    images = torch.randn(1, 3, 64, 64)
    maps = model.eval()(images)
    expected = trained.eval().forward_intermediates(images, indices=[0, 2], intermediates_only=True)  # type: ignore[operator]
    for got, want in zip(list(maps.values()) if isinstance(maps, dict) else maps, expected, strict=True):
        assert torch.equal(got, want)


def test_timm_models_load_the_same_way() -> None:
    ours, theirs = (
        zoo.create_model("poolformer_s12", num_classes=10),
        timm.create_model("poolformer_s12", num_classes=5),
    )
    report = zoo.load_checkpoint(theirs, published(ours.state_dict()))
    assert report.converted
    assert sorted(report.dropped) == ["head.fc.bias", "head.fc.weight"]
    kept = {key for key in ours.state_dict() if not key.startswith("head.fc.")}
    assert all(torch.equal(theirs.state_dict()[key], ours.state_dict()[key]) for key in kept)


@pytest.mark.parametrize("on_meta", [False, True])
def test_what_does_not_fit_is_listed_and_nothing_changes(trained: nn.Module, on_meta: bool) -> None:
    tensors = dict(trained.state_dict())
    del tensors["stem.conv.bias"], tensors["head.fc.bias"]
    tensors["stages.0.blocks.0.extra"] = torch.zeros(1)
    tensors["stages.1.downsample.conv.bias"] = torch.zeros(3)
    model = small(num_classes=10, device="meta" if on_meta else None)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        zoo.load_checkpoint(model, tensors)
    message = str(caught.value)
    assert "2 missing: stem.conv.bias, head.fc.bias" in message
    assert "1 unexpected: stages.0.blocks.0.extra" in message
    assert "1 misshapen: stages.1.downsample.conv.bias (3, the model has 16)" in message
    if on_meta:
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        return
    assert equal(model.state_dict(), before)
    report = zoo.load_checkpoint(model, tensors, strict=False)
    assert set(report.fresh) == {"stem.conv.bias", "head.fc.bias", "stages.1.downsample.conv.bias"}
    assert set(report.dropped) == {"stages.0.blocks.0.extra", "stages.1.downsample.conv.bias"}
    assert "1 unexpected" in str(report)
    assert torch.equal(model.state_dict()["stem.conv.weight"], tensors["stem.conv.weight"])


def test_long_lists_are_counted(trained: nn.Module) -> None:
    with pytest.raises(CheckpointError, match=r"49 missing: .* and 29 more"):
        zoo.load_checkpoint(small(num_classes=10), {"stem.conv.bias": torch.zeros(8)})


@pytest.mark.parametrize("strict", [True, False])
def test_the_checkpoint_of_another_model(trained: nn.Module, strict: bool) -> None:
    wider = zoo.create_model("poolformer_s12")
    for tensors in ({"layer1.weight": torch.zeros(2)}, trained.state_dict()):
        with pytest.raises(CheckpointError, match=r"Nothing in the state dict fits poolformer_s12.*another model"):
            zoo.load_checkpoint(wider, tensors, strict=strict)


def test_load_into_wrong_things(folder: Path) -> None:
    with pytest.raises(ConfigError, match="not str"):
        zoo.load_checkpoint("poolformer_s12", folder)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not int"):
        zoo.load_checkpoint(small(), 3)  # type: ignore[arg-type]


class Tied(nn.Module):
    """Two names for one parameter, a frozen one, and a batch norm with its counter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2)
        self.b.weight = self.a.weight
        self.a.bias.requires_grad_(False)


def test_on_meta_tensors_keep_dtype_ties_and_gradients(tmp_path: Path) -> None:
    source = Tied()
    safetensors.torch.save_file({k: v.clone() for k, v in source.state_dict().items()}, tmp_path / "tied.safetensors")
    with torch.device("meta"):
        model = Tied().to(torch.float16)
    zoo.load_checkpoint(model, tmp_path / "tied.safetensors")
    assert model.a.weight is model.b.weight
    assert not model.a.bias.requires_grad
    assert model.b.bias.requires_grad
    assert model.a.weight.dtype == torch.float16
    assert torch.equal(model.a.weight, source.a.weight.to(torch.float16))
    assert model.state_dict()["norm.num_batches_tracked"].dtype == torch.int64


def test_a_state_dict_stays_the_callers(trained: nn.Module) -> None:
    model = small(num_classes=10, device="meta")
    tensors = {key: tensor.clone() for key, tensor in trained.state_dict().items()}
    zoo.load_checkpoint(model, tensors)
    for tensor in model.state_dict().values():
        tensor.zero_()
    assert equal(tensors, trained.state_dict())


def test_what_the_file_ties_and_the_model_does_not(tmp_path: Path) -> None:
    shared = torch.ones(2, 2)
    torch.save({"0.weight": shared, "1.weight": shared}, tmp_path / "net.pth")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    zoo.load_checkpoint(model, tmp_path / "net.pth")
    model.state_dict()["0.weight"].zero_()
    assert torch.equal(model.state_dict()["1.weight"], shared)


@pytest.mark.parametrize("name", ["model.safetensors", "net.pth"])
def test_a_model_outlives_the_file_it_came_from(trained: nn.Module, folder: Path, name: str) -> None:
    torch.save(trained.state_dict(), folder / "net.pth")
    model = small(num_classes=10, checkpoint_path=folder / name)
    torch.save({"w": torch.zeros(1)}, folder / "net.pth")  # written into, as torch.save does
    zoo.save_pretrained(small(), folder, overwrite=True)
    assert equal(model.state_dict(), trained.state_dict())


def test_loaded_tensors_are_like_any_other(trained: nn.Module, folder: Path, tmp_path: Path) -> None:
    model = small(num_classes=10, checkpoint_path=folder)
    torch.save(model.get_submodule("head").state_dict(), tmp_path / "head.pth")
    assert (tmp_path / "head.pth").stat().st_size < 10_000
    assert equal(copy.deepcopy(model).state_dict(), trained.state_dict())
    assert equal(pickle.loads(pickle.dumps(model.state_dict())), trained.state_dict())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.state_dict()["head.fc.bias"], trained.state_dict()["head.fc.bias"])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert equal(model.share_memory().state_dict(), before)
    assert equal(read_state_dict(folder / "model.safetensors"), trained.state_dict())


def test_batch_norm_counters_may_be_missing() -> None:
    model = Tied()
    tensors = {key: tensor for key, tensor in Tied().state_dict().items() if "num_batches" not in key}
    assert zoo.load_checkpoint(model, tensors).fresh == ()


# ----------------------------------------------------------------------------------------- creating, saving, converting


def test_create_model_takes_every_source(trained: nn.Module, source: Any) -> None:
    model = small(checkpoint_path=source, num_classes=10)
    assert equal(model.state_dict(), trained.state_dict())
    other = small(checkpoint_path=source, num_classes=4, in_chans=1)
    assert sorted(report_of(other).dropped) == ["head.fc.bias", "head.fc.weight"]
    assert torch.isfinite(other(torch.randn(1, 1, 64, 64))).all()


def test_saved_models_open_here_and_in_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "classes": {"num_classes": 3},
        "grey": {"in_chans": 1, "num_classes": 2},
    }
    for name, args in variants.items():
        model = zoo.create_model("poolformer_s12", head_norm_first=False, **args).eval()
        assert zoo.save_pretrained(model, tmp_path / name) == tmp_path / name
        assert sorted(os.listdir(tmp_path / name)) == ["config.json", "model.safetensors"]
        ours = zoo.create_model(f"local-dir:{tmp_path / name}").eval()
        theirs = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        images = torch.randn(1, args.get("in_chans", 3), 64, 64)
        assert equal(ours.state_dict(), model.state_dict())
        torch.testing.assert_close(ours(images), model(images))
        torch.testing.assert_close(theirs(images), model(images))
        assert ours.pretrained_cfg["num_classes"] == theirs.pretrained_cfg["num_classes"] == model.num_classes  # type: ignore[index]
    (tmp_path / "plain" / "other").touch()  # a file like any other: readable by whom the umask lets
    modes = {path.stat().st_mode for path in (tmp_path / "plain").iterdir()}
    assert len(modes) == 1
    with safetensors.safe_open(tmp_path / "plain" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_model_that_timm_trained_computes_as_in_timm(tmp_path: Path) -> None:
    from timm.models._hub import save_for_hf

    theirs = timm.models.poolformer_s12(num_classes=3).eval()  # timm's own, whatever its registry holds by now
    save_for_hf(theirs, str(tmp_path), safe_serialization=True)
    ours = zoo.create_model(f"local-dir:{tmp_path}").eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images))
    again = zoo.save_pretrained(ours, tmp_path / "again")
    torch.testing.assert_close(zoo.create_model(f"local-dir:{again}").eval()(images), theirs(images))
    assert load_config(f"local-dir:{again}")[1]["head_norm_first"] is False


def test_saved_arguments_come_back(trained: nn.Module, tmp_path: Path) -> None:
    labels = [f"class {i}" for i in range(10)]
    folder = zoo.save_pretrained(trained, tmp_path / "it", labels=labels, note="one epoch")
    architecture, args, cfg = load_config(f"local-dir:{folder}")
    assert architecture == "poolformer_s12"
    assert args["depths"] == SMALL["depths"]
    assert cfg["label_names"] == labels
    assert cfg["num_classes"] == 10
    assert json.loads((folder / "config.json").read_text())["note"] == "one epoch"
    model = zoo.create_model(f"local-dir:{folder}")
    assert equal(model.state_dict(), trained.state_dict())
    model.reset_classifier(4)  # type: ignore[operator]
    again = zoo.create_model(f"local-dir:{zoo.save_pretrained(model, tmp_path / 'again')}")
    assert equal(again.state_dict(), model.state_dict())
    assert "label_names" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_a_saved_model_without_classifier_gets_one(tmp_path: Path) -> None:
    folder = zoo.save_pretrained(small(num_classes=0), tmp_path / "headless")
    model = zoo.create_model(f"local-dir:{folder}", num_classes=5)
    assert report_of(model).fresh == ("head.fc.weight", "head.fc.bias")
    assert "has no classifier" in str(report_of(model))


def test_channels_last_and_shared_memory_are_saved(tmp_path: Path) -> None:
    model = small(num_classes=10).to(memory_format=torch.channels_last)
    stem = model.get_submodule("stages.0.blocks.0")
    stem.layer_scale2.scale = stem.layer_scale1.scale  # type: ignore[union-attr]
    folder = zoo.save_pretrained(model, tmp_path / "it")
    assert equal(read_state_dict(folder / "model.safetensors"), {k: v.clone() for k, v in model.state_dict().items()})


def test_saving_never_writes_over_unasked(trained: nn.Module, folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    (folder / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty.*overwrite=True"):
        zoo.save_pretrained(small(), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    zoo.save_pretrained(small(num_classes=2), folder, overwrite=True)
    assert len(read_state_dict(folder / "model.safetensors")["head.fc.bias"]) == 2
    assert (folder / "README.md").read_text() == "mine"
    assert os.listdir(folder.parent) == [folder.name]


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        ("none/it", {}, "no folder"),
        ("file", {}, "is a file"),
        ("it", {"labels": ["a", "b"]}, "10 classes.*not 2"),
        ("it", {"labels": ["a"] * 10}, "10 classes.*1 different"),
    ],
)
def test_saving_where_or_what_will_not_do(
    trained: nn.Module, tmp_path: Path, where: str, options: Any, message: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=message):
        zoo.save_pretrained(trained, tmp_path / where, **options)
    assert os.listdir(tmp_path) == ["file"]


def test_saving_what_is_no_model(tmp_path: Path) -> None:
    model = small()
    model.__dict__["_model_args"] = {"act": nn.GELU}
    with pytest.raises(ConfigError, match="'act' is not serializable"):
        zoo.save_pretrained(model, tmp_path / "it")
    with pytest.raises(ConfigError, match="as create_model makes it"):
        zoo.save_pretrained(nn.Linear(2, 2), tmp_path / "it")
    with pytest.raises(ConfigError, match="meta device"):
        zoo.save_pretrained(small(device="meta"), tmp_path / "it")


class Adapted(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


def test_saving_what_weights_alone_do_not_say(tmp_path: Path) -> None:
    hooked, patched, adapted = (small() for _ in range(3))
    hooked.get_submodule("head.fc").register_forward_hook(lambda module, inputs, output: output + 1)
    patched.forward = torch.neg
    next(part for part in adapted.modules() if type(part) is nn.Conv2d).__class__ = Adapted
    for model, what in (
        (hooked, r"head\.fc \(Linear\) has hooks: first merge adapters"),
        (patched, "the model .* has .* a forward of its own"),
        (adapted, r"\(Adapted\) has .* a forward of its own"),
    ):
        with pytest.raises(ConfigError, match=what):
            zoo.save_pretrained(model, tmp_path / "it")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("simplenet_test", lambda model: setattr(model.stages[0].blocks[0], "act", nn.LeakyReLU(0.3))),
        ("caformer_test", lambda model: setattr(model.stages[0].blocks[0].norm1, "eps", 0.1)),
        ("caformer_test", lambda model: setattr(model.stem.conv, "stride", (2, 2))),
    ],
)
def test_what_weights_alone_do_not_say_is_not_lost_in_silence(name: str, change: Any, tmp_path: Path) -> None:
    model = zoo.create_model(name)
    change(model)
    with pytest.raises(ConfigError, match=r"(blocks\.0\..*|stem\.conv) .*is not as the model's arguments build it"):
        zoo.save_pretrained(model, tmp_path / "saved")
    assert os.listdir(tmp_path) == []


def test_what_training_alone_uses_may_be_another(tmp_path: Path) -> None:
    model = zoo.create_model("emo_test", drop_path_rate=0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.01
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.head.drop.p = 0.5
    folder = zoo.save_pretrained(model, tmp_path / "saved")
    assert equal(zoo.create_model(f"local-dir:{folder}").state_dict(), model.state_dict())


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    it = str(tmp_path / "it")
    script = f"""
import resource, zoo
from zoo.errors import ZooError
model = zoo.create_model("poolformer_s12", **{SMALL!r})
folder = zoo.save_pretrained(model, {str(tmp_path / "source")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))
for write, *args in (zoo.save_pretrained, model, {it!r}), (zoo.convert_checkpoint, folder, {it!r} + ".safetensors"):
    try:
        write(*args)
    except ZooError as error:
        print(error)
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Cannot write") == 2
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_description_without_a_size(channels: int, tmp_path: Path) -> None:
    folder = Path(zoo.save_pretrained(small(in_chans=channels), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = None
    if channels == 3:
        for args in config["model_args"], config["zoo"]["model_args"]:
            args.pop("in_chans", None)
    (folder / "config.json").write_text(json.dumps(config))
    model: Any = zoo.create_model(f"local-dir:{folder}")
    assert model.pretrained_cfg["input_size"] == (channels, 224, 224)


@pytest.mark.parametrize("feature_cls", ["list", "getter", "fx"])
def test_wrappers_take_what_their_own_state_dict_gives(feature_cls: str) -> None:
    source, target = (small(features_only=True, feature_cls=feature_cls).eval() for _ in range(2))
    report = zoo.load_checkpoint(target, source.state_dict())
    assert not report.dropped
    images = torch.randn(1, 3, 64, 64)
    for found, expected in zip(target(images), source(images), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a list where a JSON object should be"),
        ("{}", "names no architecture"),
        ('{"architecture": "poolformer_s13", "pretrained_cfg": {}}', "Did you mean"),
        (None, r"has no config\.json"),
        ("[" * 100_000, "not valid JSON: its brackets go too deep"),
        ('{"architecture": "poolformer_s12", "pretrained_cfg": {"input_size": 5}}', "says input_size is 5"),
        ('{"architecture": "poolformer_s12", "pretrained_cfg": {"input_size": [3]}}', r"says input_size is \(3,\)"),
        ('{"architecture": "poolformer_s12", "pretrained_cfg": {"mean": "grey"}}', "says mean is 'grey'"),
        ('{"architecture": "poolformer_s12", "pretrained_cfg": {"crop_pct": "q"}}', "says crop_pct is 'q'"),
        (
            '{"architecture": "poolformer_s12", "pretrained_cfg": {"mean": []}}',
            r"says mean is \(\), and not a number for",
        ),
        (
            '{"architecture": "poolformer_s12", "pretrained_cfg": {"std": [0.0]}}',
            r"std is \(0\.0,\), and not a number above",
        ),
        (
            '{"architecture": "poolformer_s12", "pretrained_cfg": {"interpolation": "bicubicc"}}',
            "says interpolation is 'bicubicc'. Did you mean bicubic",
        ),
        ('{"architecture": "poolformer_s12", "pretrained_cfg": {"crop_mode": 3}}', "says crop_mode is 3"),
        ('{"architecture": "poolformer_s12", "pretrained_cfg": {}, "label_names": 5}', "says label_names is 5"),
        (
            '{"architecture": "poolformer_s12", "pretrained_cfg": {}, "zoo": {"model_args": {}, '
            '"kept_widths": {"tensors": {}, "features": 5}}}',
            "kept_widths says that the features are 5",
        ),
        (
            '{"architecture": "poolformer_s12", "zoo": {"model_args": {}, "quantization": {"to": "int8"}}}',
            "poolformer_s12 is no language model, and only those are quantised",
        ),
    ],
)
def test_a_bad_config(folder: Path, config: str | None, message: str) -> None:
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises((CheckpointError, ConfigError, UnknownModelError), match=message):
        zoo.create_model(f"local-dir:{folder}")


def test_a_config_that_an_editor_saved(trained: nn.Module, folder: Path) -> None:
    """Some begin a file with a mark."""
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(text, encoding="utf-8-sig")
    assert equal(zoo.create_model(f"local-dir:{folder}").state_dict(), trained.state_dict())


def test_no_folder() -> None:
    with pytest.raises(CheckpointError, match="There is no folder"):
        zoo.create_model("local-dir:nowhere")


def test_convert(trained: nn.Module, folder: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": published(trained.state_dict())}, folder / "net.pth.tar")
    out = tmp_path / "out.safetensors"
    report = zoo.convert_checkpoint(folder / "net.pth.tar", out)  # config.json beside it says what it is
    assert report.converted
    assert equal(safetensors.torch.load_file(out), trained.state_dict())
    with pytest.raises(ConfigError, match=r"exists.*overwrite"):
        zoo.convert_checkpoint(folder, out)
    assert not zoo.convert_checkpoint(folder, out, overwrite=True).converted
    assert equal(safetensors.torch.load_file(out), trained.state_dict())


def test_convert_asks_for_what_it_needs(trained: nn.Module, tmp_path: Path) -> None:
    torch.save(trained.state_dict(), tmp_path / "net.pth")
    with pytest.raises(ConfigError, match="Which architecture"):
        zoo.convert_checkpoint(tmp_path / "net.pth", tmp_path / "out.safetensors")
    with pytest.raises(ConfigError, match=r"net\.safetensors"):
        zoo.convert_checkpoint(tmp_path / "net.pth", tmp_path / "net.bin", "poolformer_s12")
    with pytest.raises(CheckpointError, match="Nothing was written"):
        zoo.convert_checkpoint(tmp_path / "net.pth", tmp_path / "out.safetensors", "poolformer_s12")
    with pytest.raises(UnknownModelError, match="poolformer_s12"):
        zoo.convert_checkpoint(tmp_path / "net.pth", tmp_path / "out.safetensors", "poolformer_s13")
    assert os.listdir(tmp_path) == ["net.pth"]


def test_convert_keeps_every_class_and_channel(tmp_path: Path) -> None:
    for classes in (3, 0):
        model = zoo.create_model("poolformer_s12", num_classes=classes, in_chans=2)
        torch.save(published(model.state_dict()), tmp_path / "net.pth")
        zoo.convert_checkpoint(tmp_path / "net.pth", tmp_path / "out.safetensors", "poolformer_s12", overwrite=True)
        assert equal(safetensors.torch.load_file(tmp_path / "out.safetensors"), model.state_dict())


def test_whole_numbers_are_no_weights(tmp_path):
    model = zoo.create_model("slak_test", pretrained=False)
    scaled = {key: (value * 100).to(torch.int8) for key, value in model.state_dict().items()}
    torch.save(scaled, tmp_path / "int8.pt")
    with pytest.raises(CheckpointError, match=r"int8\.pt holds whole numbers \(int8\), and the model's are not"):
        zoo.load_checkpoint(model, tmp_path / "int8.pt")
