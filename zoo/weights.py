"""Weights: where a checkpoint lies, how it is fetched and checked, and how it gets into a model.

Nothing that can run code is ever loaded, nothing is half-written, and a model either takes a checkpoint or stays as it
was.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import hashlib
import http.client
import inspect
import json
import logging
import math
import os
import pickle
import re
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import quote, urlsplit

import huggingface_hub
import safetensors
import safetensors.torch
import torch
from huggingface_hub import constants, errors
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

import zoo
from zoo.errors import CheckpointError, ConfigError, DownloadError, UnknownModelError, ZooError, did_you_mean, some
from zoo.files import check_writable, whole_file
from zoo.layers.wrappers import unwrapped
from zoo.registry import HUB_PREFIXES, UNSTATED, Entry, Weights, get_entry, is_restricted, split_name
from zoo.units import shape_text

__all__ = ["LoadReport", "convert_checkpoint", "fetch", "load_checkpoint", "locate", "read_state_dict"]

StateDict: TypeAlias = dict[str, Tensor]
Converter: TypeAlias = Callable[[StateDict, nn.Module], StateDict]

_logger = logging.getLogger(__name__)

DEFAULT_FILES = ("model.safetensors", "pytorch_model.bin")  # in a repository or folder, the first that is there
INDEX = "model.safetensors.index.json"  # of a checkpoint in several files, as transformers and huggingface_hub write it
SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".bin", ".pt")
OWN_WEIGHTS = "give a file of your own with checkpoint_path= (--checkpoint)"  # instead of a model's published weights


# ------------------------------------------------------------------------------------------------------------- fetching


def fetch(
    weights: Weights,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    refresh: bool = False,
) -> Path:
    """The checkpoint file of `weights`, in the cache; downloaded, and its SHA-256 checked, if it is not there yet.

    Of a checkpoint in several files it is the index, with the files beside it.

    What is cached is used without a request, unless `refresh` asks whether it is current. `revision` (a branch, tag or
    commit) takes the place of the one the entry names. Raises DownloadError.
    """
    if weights.hub_id is not None:
        return _fetch_whole(
            weights.hub_id,
            (weights.filename,) if weights.filename else (*DEFAULT_FILES, INDEX),
            revision=revision or weights.revision,
            sha256=weights.sha256 if revision in (None, weights.revision) else None,
            cache_dir=cache_dir,
            token=token,
            refresh=refresh,
            instead=OWN_WEIGHTS,
        )
    if weights.page is not None:
        raise DownloadError(
            f"The weights {weights.tag!r} can only be fetched by hand, from {weights.page}"
            f"{f' ({weights.note})' if weights.note else ''}: then give the file with checkpoint_path= (--checkpoint)."
        )
    if weights.url is None:
        raise ConfigError(f"The weights {weights.tag!r} name neither a Hub repository nor a URL.")
    if revision is not None:
        raise DownloadError(f"{weights.url} is a single file without revisions: leave out '@{revision}'.")
    fetched = _fetch_url(weights.url, weights.sha256, cache_dir, refresh)
    return fetched if weights.filename is None else _from_zip(fetched, weights.filename)


def fetch_from_hub(
    repo: str,
    filenames: Sequence[str],
    *,
    revision: str | None = None,
    sha256: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    refresh: bool = False,
    instead: str = "name a folder or file of your own",
) -> Path:
    """The first of `filenames` that the Hub repository has, in the Hub's cache.

    Raises DownloadError, which says what can be done `instead`.
    """
    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    if not refresh:
        for filename in filenames:
            with _explained(repo, filename, revision, cache_dir, instead):
                cached = huggingface_hub.try_to_load_from_cache(repo, filename, **where)
            if isinstance(cached, str):
                return Path(cached)
    for filename in filenames:
        with _explained(repo, " or ".join(filenames), revision, cache_dir, instead):
            try:
                path = huggingface_hub.hf_hub_download(
                    repo,
                    filename,
                    **where,
                    token=token,
                    library_name="backbone-zoo",
                    library_version=zoo.__version__,
                )
            except errors.EntryNotFoundError as error:
                # "not found locally" is a kind of "not found", but means that the Hub was not reached
                if filename == filenames[-1] or isinstance(error, errors.LocalEntryNotFoundError):
                    raise
                continue
        if Path(path).is_symlink():
            etag = Path(path).resolve().name  # what the Hub stated names the blob in its cache
        else:  # no symbolic links on this system, so no blobs
            with _explained(repo, filename, revision, cache_dir, instead):
                url = huggingface_hub.hf_hub_url(repo, filename, revision=revision)
                etag = huggingface_hub.get_hf_file_metadata(url, token=token).etag or ""
        _check_hub_file(Path(path), etag, sha256, f"{filename} of {repo}")
        return Path(path)
    raise AssertionError("unreachable: the last file name returns or raises")


def _fetch_whole(repo: str, filenames: Sequence[str], *, sha256: str | None = None, **where: Any) -> Path:
    """`fetch_from_hub`, and where the file is the index of a checkpoint in several files, those too."""
    found = fetch_from_hub(repo, filenames, sha256=sha256, **where)
    if found.name == INDEX:
        for shard in _shards(found):
            fetch_from_hub(repo, (shard,), **where)
    return found


def _check_hub_file(path: Path, etag: str, sha256: str | None, what: str) -> None:
    """Hold a downloaded file to what was promised; one that differs leaves the cache before anyone uses it.

    The ETag of a large file is its SHA-256; that of a small one, a git hash, promises less and is passed over.
    """
    promised = [digest for digest in (etag, sha256) if digest and re.fullmatch("[0-9a-f]{64}", digest)]
    if not promised:
        return
    blob = path.resolve()
    found = _sha256(blob)
    for digest in promised:
        if found != digest:
            path.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)
            raise _hash_mismatch(what, digest, found)


def _hash_mismatch(what: str, promised: str, found: str) -> DownloadError:
    return DownloadError(
        f"{what} was damaged on the way, or replaced at its source: its SHA-256 is {found}, not {promised}. "
        "It was removed from the cache; try again."
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


URL_TRIES = 5
URL_TIMEOUT = 30.0  # seconds without a byte


def _fetch_url(url: str, sha256: str | None, cache_dir: str | Path | None, refresh: bool) -> Path:
    """A file behind a plain URL, cached under the host and path it came from."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.endswith("/") or re.search(r"\s", url):
        raise DownloadError(f"{url!r} is not the URL of a file: it should read like https://host/path/file.pth.")
    root = Path(cache_dir) if cache_dir is not None else Path(constants.HF_HUB_CACHE).parent / "zoo"
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    names = [part for part in (parts.netloc, *path.split("/")) if part not in ("", ".", "..")]
    target = root.joinpath(*(quote(name, safe="") for name in names))
    if target.is_file() and not refresh:
        return target
    with _explained(None, url, None, root, OWN_WEIGHTS):
        if constants.HF_HUB_OFFLINE:
            raise errors.OfflineModeIsEnabled(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as file:
            _download(url, file)
            file.flush()
            found = _sha256(Path(file.name))
            if sha256 is not None and found != sha256:
                raise _hash_mismatch(url, sha256, found)
    return target


def _from_zip(archive: Path, member: str) -> Path:
    """`member` of a zip archive in the cache, as a file beside it. Raises DownloadError."""
    target = archive.with_name(f"{archive.name}.{quote(member, safe='')}")
    if target.is_file() and target.stat().st_mtime >= archive.stat().st_mtime:
        return target
    try:
        with zipfile.ZipFile(archive) as parts, parts.open(member) as part, whole_file(target) as file:
            shutil.copyfileobj(part, file)
    except KeyError as error:
        raise DownloadError(f"{archive} holds no {member}: fetch the archive anew with refresh.") from error
    except zipfile.BadZipFile as error:
        raise DownloadError(
            f"{archive} is no whole zip archive ({error}): remove it, or fetch it anew with refresh."
        ) from error
    return target


def _download(url: str, file: BinaryIO) -> None:
    """Stream `url` into `file`; a connection that breaks is taken up again where it broke, if the server can."""
    etag: str | None = None
    for attempt in range(URL_TRIES):
        have = file.tell() if etag else 0
        headers = {"User-Agent": f"backbone-zoo/{zoo.__version__}", "Accept-Encoding": "identity"}
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": str(etag)}
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=URL_TIMEOUT) as response:
                if response.status != 206:
                    have = 0
                file.seek(have)
                file.truncate()
                etag = response.headers.get("ETag")
                if etag is None or etag.startswith("W/"):
                    etag = None  # without a strong ETag nobody can say that the rest belongs to the same file
                length = response.headers.get("Content-Length")
                total = have + int(length) if length else None
                with tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1]) as bar:
                    while chunk := response.read(1 << 20):
                        file.write(chunk)
                        bar.update(len(chunk))
                if total is not None and file.tell() != total:
                    raise http.client.IncompleteRead(b"", total - file.tell())
                return
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            if attempt == URL_TRIES - 1:
                raise
            _logger.warning("%s: the connection broke (%s); trying again.", url, error)
            time.sleep(0.2 * 2**attempt)


# ------------------------------------------------------------------------------------------------------ network errors


@contextlib.contextmanager
def _explained(
    repo: str | None, filename: str, revision: str | None, cache: str | Path | None, instead: str
) -> Iterator[None]:
    try:
        yield
    except ZooError:
        raise
    except (OSError, errors.HTTPError, errors.HFValidationError, http.client.HTTPException) as error:
        raise _explain(error, repo, filename, revision, Path(cache or constants.HF_HUB_CACHE), instead) from error


def _explain(
    error: BaseException, repo: str | None, filename: str, revision: str | None, cache: Path, instead: str
) -> DownloadError:
    """What went wrong while `filename` was fetched, and what to do about it, or `instead`.

    `repo` is None for a file behind a plain URL, which is then `filename`.
    """
    what = f"{filename} of {repo}" if repo else filename
    host = urlsplit(constants.ENDPOINT if repo else filename).netloc
    at = f"@{revision}" if revision else ""
    login = "log in with `hf auth login`, set HF_TOKEN or pass token="

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # the client wraps every failure to ask in this one
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None) or getattr(error, "code", None)

    if isinstance(error, errors.GatedRepoError):
        if status == 403:
            return DownloadError(
                f"{repo} is gated, and your account is not among those with access: "
                f"accept its terms at https://huggingface.co/{repo} and try again once access is granted."
            )
        return DownloadError(f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then {login}.")
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        if repo is None:
            prefetch = f"Unset HF_HUB_OFFLINE to fetch it to {cache}"
        else:
            first = filename.split(" or ")[0]
            option = f" --revision {revision}" if revision else ""
            prefetch = f"Fetch it while online with `hf download {repo} {first}{option}`"
        return DownloadError(
            f"{what} is not in the cache, and offline mode (HF_HUB_OFFLINE) is on. {prefetch}, or {instead}."
        )
    if isinstance(error, errors.HFValidationError):
        return DownloadError(
            f"{repo!r} is not a repository of the Hub: it should read owner/name, or owner/name@revision."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return DownloadError(f"{repo} has no revision {revision!r}: see https://huggingface.co/{repo}/commits/main.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return DownloadError(
            f"There is no repository {repo} on the Hub, or it is private and you have no access to it. "
            f"Check the name; if it is private, {login}."
        )
    if isinstance(error, errors.EntryNotFoundError):
        return DownloadError(
            f"{repo}{at} has no {filename}: https://huggingface.co/{repo}/tree/{revision or 'main'} lists its files."
        )
    if isinstance(error, errors.FileMetadataError):
        return DownloadError(f"{host} does not answer as a Hub does, so {what} was not fetched: check HF_ENDPOINT.")
    if status is not None:
        if status in (401, 403):
            advice = f"check the name and your access; {login}" if repo else instead
            return DownloadError(f"{host} refuses access to {what} (HTTP {status}): {advice}.")
        if status in (404, 410):
            return DownloadError(f"There is no {what} at {host} (HTTP {status}): check the name, or {instead}.")
        if status == 429 or status >= 500:
            trouble = "is asked too often" if status == 429 else "has trouble"
            return DownloadError(f"{host} {trouble} (HTTP {status}), so {what} was not fetched: try again later.")
        return DownloadError(f"{host} answered HTTP {status} when asked for {what}.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DownloadError(
            f"{what} does not fit on the disk of {cache} ({os.strerror(error.errno)}): "
            "free some space, or choose another cache with cache_dir= or HF_HOME."
        )
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return DownloadError(
            f"{host} sent {what} in another length than it had announced; nothing was kept. Try again."
        )
    if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol", "URLError"):
        return DownloadError(
            f"Cannot reach {host} to fetch {what} ({getattr(error, 'reason', error)}): "
            f"check the connection and proxy, or {instead}."
        )
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
        return DownloadError(
            f"Cannot write {what} to {cache} ({os.strerror(error.errno)}): "
            "choose another cache with cache_dir= or HF_HOME."
        )
    return DownloadError(
        f"The connection to {host} broke again and again while fetching {what} ({error or type(error).__name__}); "
        "nothing was kept. Try again later."
    )


# ------------------------------------------------------------------------------------------------------------- locating


def split_hub_id(source: str) -> tuple[str, str | None]:
    """`"hf-hub:owner/name@revision"` -> `("owner/name", "revision")`."""
    repo, _, revision = source.split(":", 1)[1].partition("@")
    return repo, revision or None


def locate(
    source: str | Path,
    *,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    refresh: bool = False,
) -> Path:
    """The checkpoint file that `source` means.

    `source` is a file, a folder (its `model.safetensors`, `pytorch_model.bin` or only checkpoint), with or without
    `local-dir:` before it, or a repository `hf-hub:owner/name@revision`. Of a checkpoint in several files it is the
    index, with the files beside it. Raises CheckpointError, DownloadError.
    """
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"A checkpoint is a path, a repository or a state dict, not {type(source).__name__}.")
    text = os.fspath(source)
    if text.startswith(HUB_PREFIXES):
        repo, revision = split_hub_id(text)
        where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token, "refresh": refresh}
        return _fetch_whole(repo, (*DEFAULT_FILES, INDEX), **where)
    path = Path(text.removeprefix("local-dir:")).expanduser()
    if not text.removeprefix("local-dir:"):
        raise CheckpointError("The name of a checkpoint is empty: give a file, a folder or hf-hub:owner/name.")
    if path.is_dir():
        return _checkpoint_in(path)
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{text!r} is a link that leads nowhere: to {os.readlink(path)!r}.")
    if not path.exists():
        hint = ""
        if path.parent.is_dir():
            hint = did_you_mean(path.name, [p.name for p in path.parent.iterdir()])
        if not hint and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text):
            hint = f" For the repository of that name on the Hub, write hf-hub:{text}."
        raise CheckpointError(f"There is no checkpoint {text!r}.{hint}")
    return path


def _checkpoint_in(folder: Path) -> Path:
    for name in (*DEFAULT_FILES, INDEX):
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES) and path.is_file())
    found = [path for path in found if path.name != "state.pt"]  # what a run goes on with, which holds no weights
    if len(found) == 1:
        return found[0]
    names = [path.name for path in found or sorted(folder.iterdir())]
    if found:
        raise CheckpointError(f"The folder {str(folder)!r} holds several checkpoints: name one of {some(names)}.")
    there = f"It holds {some(names)}." if names else "It is empty."
    raise CheckpointError(f"The folder {str(folder)!r} holds no checkpoint ({', '.join(SUFFIXES)}). {there}")


# -------------------------------------------------------------------------------------------------------------- reading

EMA_KEYS = ("state_dict_ema", "model_ema", "net_E")
WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "module", "net")


def read_state_dict(path: str | Path, *, use_ema: bool = True) -> StateDict:
    """The tensors of a checkpoint file, on the CPU, under their own names.

    Reads safetensors, and PyTorch files as long as they hold nothing but data. What training scripts wrap around a
    state dict (`state_dict`, `model`, DistributedDataParallel's `module.`, ...) is taken off; where there are averaged
    weights beside the last ones, `use_ema` chooses them, as timm does. Tensors of a safetensors file are mapped from it
    until they are written to: replace such a file, as every writer here does, but do not write into it while it is in
    use. Raises CheckpointError.
    """
    path = Path(path)
    return unwrap(_read(path), str(path), use_ema)


def _read(path: Path) -> Any:
    """What a checkpoint file holds, with all that is wrapped around its tensors. Raises CheckpointError."""
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    try:
        with open(path, "rb") as file:
            start = file.read(256)
    except OSError as error:
        raise CheckpointError(f"Cannot read the checkpoint {str(path)!r}: {error.strerror}.") from error
    if not start:
        raise CheckpointError(f"The checkpoint {str(path)!r} is empty.")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{str(path)!r} is a Git LFS pointer and not the checkpoint: fetch that with `git lfs pull`."
        )
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise CheckpointError(f"{str(path)!r} is a web page and not a checkpoint: download the file itself.")
    is_safetensors = start[8:9] == b"{"
    if path.suffix == ".safetensors" or is_safetensors:
        return _read_safetensors(path)
    return _read_pickle(path)


def _shards(index: Path) -> list[str]:
    """The files of a checkpoint that is spread over several. Raises CheckpointError."""
    parts = read_json(index).get("weight_map")
    names = list(dict.fromkeys(parts.values())) if isinstance(parts, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(f"{str(index)!r} does not say which files beside it hold the tensors.")
    return names


def _read_shards(index: Path) -> StateDict:
    tensors: StateDict = {}
    for name in _shards(index):
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{str(index)!r} names {name}, which is not beside it: fetch all of the checkpoint.")
        tensors |= read_state_dict(index.parent / name)
    missing = [key for key in read_json(index)["weight_map"] if key not in tensors]
    if missing:
        raise CheckpointError(f"The files of {str(index)!r} lack {len(missing)} of its tensors: {some(missing)}.")
    return tensors


def _read_safetensors(path: Path) -> StateDict:
    try:
        return {key: _with_own_storage(tensor) for key, tensor in safetensors.torch.load_file(path).items()}
    except safetensors.SafetensorError as error:
        cut = any(sign in str(error) for sign in ("not fully covered", "invalid header length"))
        reason = "it was cut short or changed" if cut else "its header is not one"
        raise CheckpointError(
            f"{str(path)!r} is not a whole safetensors file: {reason} ({error}). Download or copy it again."
        ) from error


def _with_own_storage(tensor: Tensor) -> Tensor:
    """The same memory, but as a storage that ends where the tensor does: `torch.save` writes whole storages."""
    whole = tensor.untyped_storage()
    start = tensor.data_ptr() - whole.data_ptr()
    if not tensor.numel() or not tensor.is_contiguous():
        return tensor
    part = whole[start : start + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(part, 0, tensor.shape, tensor.stride())


def _read_pickle(path: Path) -> Any:
    try:
        # training scripts, timm's among them, store their arguments beside the weights: a Namespace is plain data
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(
            r"Unsupported (?:class|global) ([\w.]+)", str(error)
        )
        if needed:
            raise CheckpointError(
                f"{str(path)!r} holds more than tensors: reading it would run code ({needed[1]}), so it was not read. "
                "Where you trust it, open it with torch.load(weights_only=False) and save its state_dict() alone."
            ) from error
        raise _not_a_checkpoint(path, error) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OSError) as error:
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{str(path)!r} is a TorchScript program, which holds code: save the state_dict() of its model instead."
            ) from error
        raise _not_a_checkpoint(path, error) from error


def _not_a_checkpoint(path: Path, error: Exception) -> CheckpointError:
    detail = re.search(r"WeightsUnpickler error: (.+)", str(error))
    reason = (detail[1] if detail else str(error).partition("\n")[0]).split(". ")[0].strip() or type(error).__name__
    return CheckpointError(
        f"{str(path)!r} is not a whole PyTorch or safetensors checkpoint: it was cut short, or is something else "
        f"({reason[:200]}). Download or copy it again."
    )


def unwrap(loaded: Any, name: str, use_ema: bool = True) -> StateDict:
    """The state dict within whatever a checkpoint file held. Raises CheckpointError."""
    while key := _wrapper_keys(loaded, use_ema)[0]:
        loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{name} holds a {type(loaded).__name__} and no state dict: save model.state_dict().")
    tensors = {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, Tensor)}
    others = [str(key) for key in loaded if key not in tensors]
    if not tensors:
        held = f"holds no tensors, but {some(others) if others else 'nothing at all'}"
        inner = [key for key, value in loaded.items() if isinstance(value, Mapping) and _holds_tensors(value)]
        hint = f" Tensors lie in {some(map(repr, inner))}: save what you mean of it alone." if inner else ""
        raise CheckpointError(f"{name} {held}.{hint}")
    if others:
        raise CheckpointError(f"{name} holds things that are not tensors among its tensors: {some(others)}.")
    tensors = {key.replace("_orig_mod.", ""): value for key, value in tensors.items()}  # torch.compile
    while all(key.startswith("module.") for key in tensors):  # DataParallel and its kin
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _holds_tensors(value: Mapping[Any, Any]) -> bool:
    return any(isinstance(tensor, Tensor) for tensor in value.values())


def _wrapper_keys(loaded: Any, use_ema: bool) -> tuple[str | None, str | None]:
    """Under which key the tensors lie, and, of averaged and last weights side by side, the key of those not taken."""
    if not isinstance(loaded, Mapping):
        return None, None
    found = [
        next((key for key in keys if isinstance(loaded.get(key), Mapping) and loaded[key]), None)
        for keys in (EMA_KEYS, WRAPPER_KEYS)
    ]
    averaged, last = found
    if averaged is None or last is None:
        return averaged or last, None
    return (averaged, last) if use_ema else (last, averaged)


def _choice_of_weights(loaded: Any, use_ema: bool) -> str:
    """Which of averaged and last weights `unwrap` takes, in words; nothing where there is no choice."""
    while True:
        key, other = _wrapper_keys(loaded, use_ema)
        if other is not None:
            names = ("averaged", "last") if use_ema else ("last", "averaged")
            return f"The {names[0]} weights ({key}) were taken, not the {names[1]} ones ({other})"
        if key is None:
            return ""
        loaded = loaded[key]


# -------------------------------------------------------------------------------------------------------------- loading


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What became of a checkpoint.

    Attributes:
        source: where it came from.
        loaded: how many tensors the model took.
        converted: whether it was in a layout other than the zoo's.
        dropped: tensors of the checkpoint that the model did not take.
        adapted: tensors that were changed to fit the model's input channels.
        fresh: tensors of the model that the checkpoint did not set.
        notes: the same in words.
        choice: which of averaged and last weights were taken, in words, where the checkpoint has both.
    """

    source: str
    loaded: int
    converted: bool = False
    dropped: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    choice: str = ""

    def __str__(self) -> str:
        layout = ", converted from a published layout" if self.converted else ""
        parts = [f"{self.loaded} tensors from {self.source}{layout}", self.choice, *self.notes]
        return ". ".join(filter(None, parts)) + "."


def load_checkpoint(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    *,
    strict: bool = True,
    convert: Converter | None = None,
    use_ema: bool | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    refresh: bool = False,
) -> LoadReport:
    """Load a checkpoint into `model`, whole or not at all.

    Published layouts are converted. As timm does, a classifier for another number of classes is left out, and the
    first convolution is adapted to the model's input channels; the report says so. Where the weights come from, as far
    as it is known, becomes part of the model's `pretrained_cfg`, and is asked for when they are published.

    Args:
        model: on any device; tensors that are on the meta device are allocated.
        source: a file, a folder, `hf-hub:owner/name@revision`, or a state dict.
        strict: raise if any tensor is missing, unexpected or misshapen. Otherwise load those that fit.
        convert: from the checkpoint's layout to the model's; the registered one of the model by default.
        use_ema: take the averaged weights where the checkpoint has both, or the last ones. By default what was
            evaluated of the model's published weights, where these agree, and else the averaged ones.
        cache_dir: where downloads are kept.
        token: for private and gated repositories.
        refresh: ask the Hub whether the cached checkpoint is current.

    Raises CheckpointError for a checkpoint that cannot be read or does not fit, DownloadError.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"load_checkpoint takes a torch.nn.Module as its model, not {type(model).__name__}.")
    model = unwrapped(model)
    path, name, loaded = None, "the state dict", source
    if not isinstance(source, Mapping):
        path = locate(source, cache_dir=cache_dir, token=token, refresh=refresh)
        name, loaded = os.fspath(source), _read(path)
    if use_ema is None:
        cfg = getattr(model, "pretrained_cfg", None) or getattr(_behind_wrapper(model)[0], "pretrained_cfg", None)
        use_ema = _evaluated_are_averaged(_entry_of(cfg or {}))
    tensors = unwrap(loaded, "The state dict" if path is None else str(path), use_ema)
    report = _load(model, tensors, name, strict, convert, ours=path is not None)
    report = dataclasses.replace(report, choice=_choice_of_weights(loaded, use_ema))
    for module in {_behind_wrapper(model)[0], model}:
        entry = _entry_of(getattr(module, "pretrained_cfg", None) or {})
        keeps_some = "load_report" in module.__dict__ and bool(report.fresh)  # of the weights that it had before
        if entry is not None and not keeps_some:
            origin = _origin(entry, path, name, report.converted)
            _note_origin(module, origin)
            if report.converted and origin.get("tag") and module is model:
                _warn_of_other_args(module, entry, entry.find_weights(origin["tag"]))
        if entry is not None and path is not None and module is model:
            _warn_of_outdated(entry, path)
        module.__dict__["load_report"] = report
    return report


def _load(
    model: nn.Module, tensors: StateDict, name: str, strict: bool, convert: Converter | None, ours: bool
) -> LoadReport:
    module, is_wrapper = _behind_wrapper(model)
    inner = next((f"{child}." for child, part in model.named_children() if part is module), "")
    if inner and all(key.startswith(inner) for key in tensors):  # what the wrapper's own state_dict() gave
        tensors = {key.removeprefix(inner): tensor for key, tensor in tensors.items()}
    cfg = getattr(model, "pretrained_cfg", None) or getattr(module, "pretrained_cfg", None) or {}
    entry = _entry_of(cfg)
    converted = _convert(convert or (entry.convert if entry else None), tensors, module, name)
    was_converted = converted.keys() != tensors.keys()
    fit = _Fit(module, converted, cfg, entry)
    if is_wrapper:
        fit.adapt_to_features()
    fit.adapt()
    fit.check(
        name,
        strict,
        "The model was left as it was: build it with the arguments that the checkpoint was trained with, or pass "
        "strict=False to load what fits." + _names_itself(name),
        given=tensors,
    )
    _assign(module, fit.tensors, ours)
    return LoadReport(
        source=name,
        loaded=len(fit.tensors),
        converted=was_converted,
        dropped=tuple(fit.dropped),
        adapted=tuple(fit.adapted),
        fresh=tuple(key for key in fit.targets if key not in fit.tensors and not key.endswith(COUNTER)),
        notes=tuple(fit.notes),
    )


ORIGIN_KEYS = ("tag", "license", "origin_url")  # of a pretrained_cfg: what says whose weights they are
ORIGIN = "zoo"  # in the metadata of a safetensors file: the same as JSON, empty where they are nobody else's


def of_own_weights(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """`cfg` without what it says of published weights, which a checkpoint of one's own is not."""
    published = ("license", "hf_hub_id", "hf_hub_filename", "url", "origin_url")
    return {key: value for key, value in cfg.items() if key not in published} | {"tag": ""}


def origin_metadata(architecture: str, cfg: Mapping[str, Any]) -> dict[str, str]:
    """What a safetensors file says of where its weights come from, so that it says so wherever it is moved.

    Nothing of architectures whose published weights may all be passed on.
    """
    entry = _entry_of({"architecture": architecture})
    if entry is None or not any(is_restricted(weights.license) for weights in entry.weights):
        return {}
    origin = {key: cfg[key] for key in ORIGIN_KEYS if cfg.get(key)}
    if origin.keys() == {"license"} and not is_restricted(origin["license"]):
        origin = {}  # the licence of one's own weights is no origin
    return {ORIGIN: json.dumps(origin)}


def _note_origin(model: nn.Module, origin: dict[str, str]) -> None:
    cfg = of_own_weights(model.pretrained_cfg) | origin  # type: ignore[arg-type]
    model.__dict__.update(pretrained_cfg=cfg, default_cfg=cfg)


def _origin(entry: Entry, path: Path | None, name: str, converted: bool, tag: str | None = None) -> dict[str, str]:
    """Whose weights a checkpoint holds, as its file, its folder or its layout tells; empty where they are one's own.

    Of weights of unknown origin, where those that are published may not be passed on, it is the licence of these alone.
    """
    if tag:
        return _published(entry.find_weights(tag))
    known = None if path is None else _recorded_origin(entry, path)
    if known is not None:
        return known
    if name.startswith(HUB_PREFIXES):
        there = [weights for weights in entry.weights if weights.hub_id == split_hub_id(name)[0]]
        if there:
            return _published(there[0])
    if not entry.weights:
        return {}
    # the licence that allows least: which set of weights a file holds, nothing says
    strictest = min(entry.weights, key=lambda w: (w.license != UNSTATED, not is_restricted(w.license)))
    if converted and entry.task != "language":  # training here, or in timm, saves another layout
        return _published(strictest)
    return {"license": strictest.license} if entry.is_restricted else {}


def _warn_of_outdated(entry: Entry, path: Path) -> None:
    for part, why in entry.outdated_files.items():
        if part in path.name:
            _logger.warning("%s fits %s, but %s.", path.name, entry.name, why)


def _warn_of_other_args(model: nn.Module, entry: Entry, weights: Weights) -> None:
    """Say so where weights were trained with other arguments than the model has, and so give another function."""
    own: Mapping[str, Any] = model.__dict__.get("_model_args", {})
    other = {
        key: value
        for key, value in weights.args.items()
        if json.dumps(own.get(key, entry.default(key, None))) != json.dumps(value)  # tuples are lists in a config.json
    }
    if other:
        _logger.warning(
            "These look like the weights %s.%s, which were trained with %s. The model has %s, and gives other outputs "
            "than they were trained to: create it as %r.",
            *(entry.name, weights.tag),
            ", ".join(f"{key}={value!r}" for key, value in other.items()),
            ", ".join(f"{key}={own.get(key, entry.default(key, None))!r}" for key in other),
            f"{entry.name}.{weights.tag}",
        )


def _published(weights: Weights) -> dict[str, str]:
    return {"tag": weights.tag, "license": weights.license}


def _recorded_origin(entry: Entry, path: Path) -> dict[str, str] | None:
    """What the zoo wrote about a checkpoint, in it or in the `config.json` beside it; None where it wrote none."""
    saved: Any = None
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(ORIGIN)
        with contextlib.suppress(ValueError):
            saved = None if text is None else json.loads(text)
    config = path.parent / "config.json"
    if saved is None and path.name in (*DEFAULT_FILES, INDEX) and config.is_file():
        found = read_json(config)
        if found.get("architecture") == entry.name and "zoo" in found:
            saved = found.get("pretrained_cfg")
    if not isinstance(saved, dict):
        return None
    return {key: str(saved[key]) for key in ORIGIN_KEYS if saved.get(key)}


def _entry_of(cfg: Mapping[str, Any]) -> Entry | None:
    try:
        return get_entry(cfg["architecture"])
    except (KeyError, UnknownModelError):  # a model that the zoo does not know: its layout is its own
        return None


def _evaluated_are_averaged(entry: Entry | None, tag: str | None = None) -> bool:
    """Whether the averaged weights of a file are those to take: what the published ones state, where they agree."""
    published = () if entry is None else entry.weights if tag is None else (entry.find_weights(tag),)
    stated = {weights.use_ema for weights in published}
    return stated != {False}


def _convert(convert: Converter | None, tensors: StateDict, model: nn.Module, name: str) -> StateDict:
    if convert is None:
        return dict(tensors)
    try:
        return dict(convert(dict(tensors), model))
    except ZooError:
        raise
    except Exception as error:  # a converter that stumbles has met a layout that is not the one it knows
        raise CheckpointError(f"{name} is in no layout that is known for this model ({error!r}).") from error


def _behind_wrapper(model: nn.Module) -> tuple[nn.Module, bool]:
    """The module that holds the weights, and whether `model` is one of timm's wrappers for features around it."""
    if not type(model).__module__.startswith("timm.models._features"):
        return model, False
    # of FeatureGetterNet, FeatureGraphNet and a FeatureHookNet that leaves the model whole; the others take it apart
    for name in ("model", "graph_module", *(["body"] if type(model).__name__ == "FeatureHookNet" else [])):
        if name in model._modules:
            return model.get_submodule(name), True
    return model, True


COUNTER = "num_batches_tracked"  # of batch norms; checkpoints older than it lack it


class _Fit:
    """A checkpoint on its way into a model: `tensors` is what the model will take."""

    def __init__(self, model: nn.Module, tensors: StateDict, cfg: Mapping[str, Any], entry: Entry | None) -> None:
        self.model = model
        self.targets: StateDict = model.state_dict(keep_vars=True)
        self.tensors = tensors
        self.cfg = cfg
        self.entry = entry
        self.classifiers = module_names(cfg.get("classifier") or (entry.classifier if entry else None))
        self.first_convs = module_names(cfg.get("first_conv") or (entry.first_conv if entry else None))
        self.dropped: list[str] = []
        self.adapted: list[str] = []
        self.notes: list[str] = []
        self.may_miss: set[str] = {key for key in self.targets if key.endswith(COUNTER)}

    def adapt(self) -> None:
        for name in self.classifiers:
            self._adapt_classifier(name)
        for name in self.first_convs:
            self._adapt_first_conv(f"{name}.weight")

    def _drop(self, keys: Iterable[str]) -> None:
        for key in keys:
            if self.tensors.pop(key, None) is not None:
                self.dropped.append(key)

    def adapt_to_features(self) -> None:
        """timm's wrapper names `stages.0` `stages_0`, and keeps what the chosen maps need."""

        def flat(key: str) -> str:
            name = re.sub(r"^(\w+)\.(\d+)\.", r"\1_\2.", key)
            return name if name in self.targets else key

        self.tensors = {flat(key): tensor for key, tensor in self.tensors.items()}
        unused = [key for key in self.tensors if key not in self.targets]
        if unused:
            self.notes.append(f"{len(unused)} tensors dropped: the chosen feature maps do not need them")
            self._drop(unused)

    def _adapt_classifier(self, name: str) -> None:
        missing_part = _absent(self.model, name)
        if missing_part:
            top = name.split(".")[0]
            gone = [
                key
                for key in self.tensors
                if key.startswith(f"{missing_part}.")
                or (
                    key.startswith(f"{top}.")
                    and key not in self.targets
                    and _absent(self.model, key.rpartition(".")[0])
                )
            ]
            if gone:
                self.notes.append(f"{missing_part} dropped: the model has no classifier")
                self._drop(gone)
            return
        own = [key for key in self.targets if key.startswith(f"{name}.")]
        given = self.tensors.get(f"{name}.weight")
        wanted = self.targets.get(f"{name}.weight")
        if given is not None and wanted is not None:
            same_width = math.prod(given.shape[1:]) == math.prod(wanted.shape[1:])
            if given.ndim and wanted.ndim and given.shape[0] != wanted.shape[0] and same_width:
                self._drop([key for key in self.tensors if key.startswith(f"{name}.")])
                self.may_miss.update(own)
                self.notes.append(
                    f"{name} dropped, as the checkpoint has {given.shape[0]} classes and the model {wanted.shape[0]}: "
                    "it stays as the model initialised it"
                )
        elif not any(key.startswith(f"{name}.") for key in self.tensors):
            promised = self.cfg.get("num_classes")
            if promised is not None and promised != getattr(self.model, "num_classes", promised):
                self.may_miss.update(own)
                self.notes.append(f"{name} stays as the model initialised it, as the checkpoint has no classifier")

    def _adapt_first_conv(self, key: str) -> None:
        given, wanted = self.tensors.get(key), self.targets.get(key)
        if given is None or wanted is None or given.ndim != 4 or wanted.ndim != 4:
            return
        before, after = given.shape[1], wanted.shape[1]
        if before == after or (given.shape[0], *given.shape[2:]) != (wanted.shape[0], *wanted.shape[2:]):
            return
        from timm.models._manipulate import adapt_input_conv

        self.tensors[key] = adapt_input_conv(after, given, base_chans=before)
        self.adapted.append(key)
        self.notes.append(f"{key} adapted from {before} to {after} input channels")

    def check(self, name: str, strict: bool, advice: str, given: StateDict | None = None) -> None:
        """Raise CheckpointError for what does not fit, or drop it if that is allowed.

        The error says with which arguments a model would fit what was `given`, where the family can tell.
        """
        for key, tensor in self.tensors.items():
            is_real = tensor.is_floating_point() or tensor.is_complex()
            if key in self.targets and self.targets[key].is_floating_point() and not is_real and tensor.any():
                raise CheckpointError(
                    f"{key} in {name} holds whole numbers ({str(tensor.dtype).removeprefix('torch.')}), and the "
                    "model's are not: is it quantised? Load the weights that it was made from."
                )
        missing = [key for key in self.targets if key not in self.tensors and key not in self.may_miss]
        unexpected = [key for key in self.tensors if key not in self.targets]
        misshapen = [
            key
            for key, tensor in self.tensors.items()
            if key in self.targets and tensor.shape != self.targets[key].shape
        ]
        if not (missing or unexpected or misshapen):
            return
        shapes = [
            f"{key} ({shape_text(self.tensors[key].shape)}, the model has {shape_text(self.targets[key].shape)})"
            for key in misshapen
        ]
        lists = [
            f"{len(keys)} {kind}: {some(keys)}"
            for kind, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", shapes))
            if keys
        ]
        fitting = len(self.tensors) - len(unexpected) - len(misshapen)
        architecture = self.cfg.get("architecture") or type(self.model).__name__
        if fitting == 0:
            raise CheckpointError(
                f"Nothing in {name} fits {architecture}: {_whose(self.tensors)}?{_names_itself(name)}\n"
                + "\n".join(lists)
            )
        heads = tuple(f"{head}." for head in self.classifiers)
        if not unexpected and not misshapen and all(key.startswith(heads) for key in missing):
            advice = (
                "It holds no classifier: build the model with num_classes=0 for none, or pass strict=False to keep the "
                "one that the model was initialised with."
            )
        elif strict and given is not None:
            advice += _fitting_arguments(self.entry, given)
        if strict:
            raise CheckpointError(f"{name} does not fit {architecture}. {advice}\n" + "\n".join(lists))
        self.notes += lists
        self._drop([*unexpected, *misshapen])


def _whose(tensors: StateDict) -> str:
    if {"backbone", "neck"} <= {key.partition(".")[0] for key in tensors}:
        return "is it a segmentation network's, which create_model makes with task='segmentation'"
    return "is it a checkpoint of another model"


def _names_itself(name: str) -> str:
    """A sentence on a folder that says which model its weights are of; "" where `name` is none."""
    place = Path(name)
    folder = place if place.is_dir() else place.parent
    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8")) if place.exists() else None
    except (OSError, ValueError):
        return ""
    if not isinstance(told, dict) or not told.keys() & {"architecture", "model_type"}:
        return ""
    return (
        f" {folder} says itself what it is a model of: name it instead of an architecture, 'local-dir:{folder}', "
        "without arguments of another."
    )


def _fitting_arguments(entry: Entry | None, tensors: StateDict) -> str:
    """How to create the model that a checkpoint belongs to, as a sentence; "" for a family that cannot tell."""
    if entry is None or entry.arguments_of is None:
        return ""
    try:
        found = entry.arguments_of(tensors)
    except CheckpointError:  # of another family
        return ""
    arguments = [f"{key}={value!r}" for key, value in found.items() if value != entry.default(key, value)]
    return f" Its shapes are those of zoo.create_model({', '.join([repr(entry.name), *arguments])})."


def module_names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and value else tuple(value or ())


def _absent(model: nn.Module, name: str) -> str:
    """The first part of a dotted module name that the model lacks, or has put an Identity in place of; else ""."""
    module = model
    parts = name.split(".")
    for i, part in enumerate(parts):
        child = module._modules.get(part)
        if child is None or isinstance(child, nn.Identity):
            return ".".join(parts[: i + 1])
        module = child
    return ""


@torch.no_grad()
def _assign(model: nn.Module, tensors: StateDict, ours: bool) -> None:
    """Put checked tensors into the model: copied, or where it is on the meta device, taken as they are if `ours`."""
    targets = model.state_dict(keep_vars=True)
    if not any(targets[key].is_meta for key in tensors):
        model.load_state_dict(tensors, strict=False)
        return
    tied: dict[int, Tensor] = {}  # what the model ties stays tied, and nothing else shares memory
    storages: set[int] = set()
    for key, tensor in tensors.items():
        target = targets[key]
        if id(target) in tied:
            continue
        device = tensor.device if target.is_meta else target.device
        storage = tensor.untyped_storage()
        is_free = ours and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in storages
        value = tensor.to(device, target.dtype, copy=not is_free).contiguous()
        storages.add(storage.data_ptr())
        tied[id(target)] = nn.Parameter(value, target.requires_grad) if isinstance(target, nn.Parameter) else value
    values = {key: tied[id(targets[key])] for key in tensors}
    model.load_state_dict(values, strict=False, assign=True)


# ----------------------------------------------------------------------------------------------------------- converting


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    name: str | None = None,
    *,
    overwrite: bool = False,
    use_ema: bool | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    refresh: bool = False,
) -> LoadReport:
    """Write a checkpoint in any published layout as safetensors in the zoo's layout, with nothing left out.

    `name` is the architecture; without it, the `config.json` beside the checkpoint says it. `use_ema` is that of
    `load_checkpoint`. Raises CheckpointError for a checkpoint that does not fit the architecture, ConfigError for an
    output that cannot be written.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ConfigError(
            f"A checkpoint is converted to safetensors: name the output {out.stem}.safetensors, not {out.name!r}."
        )
    check_writable(out)
    if out.exists() and not overwrite:
        raise ConfigError(f"{str(out)!r} exists: give another name, or overwrite it with overwrite=True (--overwrite).")
    where: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "refresh": refresh}
    path = locate(source, **where)
    loaded = _read(path)
    tag = split_name(name)[1] if name else None
    if name is not None:
        entry = get_entry(name)
        args = dict(entry.find_weights(tag).args) if tag else {}
    else:
        architecture, args = _saved_architecture(source, path, where)
        entry = get_entry(architecture)
    if use_ema is None:
        use_ema = _evaluated_are_averaged(entry, tag)
    tensors = unwrap(loaded, str(path), use_ema)
    if args.get("task", entry.task) != entry.task:  # with a head that the entry does not know
        model = _saved_model(source, path, where)
    else:
        model = _model_for(tensors, source, entry, args)
    converted = _convert(entry.convert, tensors, model, os.fspath(source))
    fit = _Fit(model, converted, {"architecture": entry.name}, entry)
    fit.check(os.fspath(source), True, "Nothing was written: was it trained as another architecture?")
    was_converted = converted.keys() != tensors.keys()
    origin = _origin(entry, path, os.fspath(source), was_converted, tag)
    tensors = {key: fit.tensors[key] for key in fit.targets if key in fit.tensors}
    write_safetensors(tensors, out, origin_metadata(entry.name, origin))
    choice = _choice_of_weights(loaded, use_ema)
    return LoadReport(source=os.fspath(source), loaded=len(fit.tensors), converted=was_converted, choice=choice)


def _model_for(tensors: StateDict, source: str | Path, entry: Entry, args: Mapping[str, Any]) -> nn.Module:
    """A model on the meta device as wide, at its input and at its classifier, as the checkpoint is."""
    from zoo.factory import build_module

    found = _convert(entry.convert, tensors, build_module(entry, args, device="meta"), os.fspath(source))
    return build_module(entry, {**args, **widths_of(found, entry)}, device="meta")


def widths_of(tensors: Mapping[str, Tensor], entry: Entry) -> dict[str, Any]:
    """`num_classes` and `in_chans` of a model of `entry` that has these tensors, where it takes such arguments."""
    takes = inspect.signature(entry.build).parameters
    args: dict[str, Any] = {}
    if entry.classifier and "num_classes" in takes:
        heads = [tensors[key] for name in module_names(entry.classifier) if (key := f"{name}.weight") in tensors]
        args["num_classes"] = heads[0].shape[0] if heads else 0
    if entry.first_conv and "in_chans" in takes:
        stems = [tensors[key] for name in module_names(entry.first_conv) if (key := f"{name}.weight") in tensors]
        args |= {"in_chans": stems[0].shape[1]} if stems and stems[0].ndim == 4 else {}
    return args


def _saved_model(source: str | Path, path: Path, where: Mapping[str, Any]) -> nn.Module:
    """The model that the config.json beside a checkpoint describes, on the meta device."""
    from zoo.factory import create_model

    text = os.fspath(source)
    place = text if text.startswith(HUB_PREFIXES) else f"local-dir:{path.parent}"
    return create_model(place, pretrained=False, device="meta", **where)


def _saved_architecture(source: str | Path, path: Path, where: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    from zoo.hub import load_config

    text = os.fspath(source)
    try:
        config = text if text.startswith(HUB_PREFIXES) else f"local-dir:{path.parent}"
        architecture, args, _ = load_config(config, **where)
    except (CheckpointError, DownloadError) as error:
        raise ConfigError(
            f"Which architecture is {text}? It comes without a readable config.json: name it, e.g. 'poolformer_s12' "
            "(--model poolformer_s12)."
        ) from error
    return architecture, args


def write_safetensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, whole or not at all. Raises CheckpointError."""
    storages: set[int] = set()
    plain: StateDict = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # the format has no shared memory: tied tensors, and slices of a larger one, are written out each
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(storage.data_ptr())
        plain[key] = tensor
    try:
        with whole_file(path) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            safetensors.torch.save_file(plain, file.name, metadata={"format": "pt", **(metadata or {})})
            # the library has put a file of its own there, which only the owner may read and which is not synced
            os.chmod(file.name, mode)
            _order_metadata(file.name)
            with open(file.name, "rb") as written:
                os.fsync(written.fileno())
    except (OSError, safetensors.SafetensorError) as error:
        if isinstance(error, ZooError):
            raise
        raise CheckpointError(f"Cannot write {str(path)!r}: {error}. Nothing was left behind.") from error


def _order_metadata(path: str) -> None:
    """Sort the metadata, which safetensors writes in another order each time: the same model gives the same bytes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows begin with a mark
    except RecursionError:
        raise CheckpointError(f"{str(path)!r} is not valid JSON: its brackets go too deep.") from None
    except OSError as error:
        raise CheckpointError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is not valid JSON: {error}.") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(loaded).__name__} where a JSON object should be.")
    return loaded
