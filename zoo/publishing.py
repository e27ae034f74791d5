"""Publishing on the Hub: everything is made and checked here first, goes up in one commit, and is read back.

"Published" is said only of a commit whose files, downloaded again, are those that were sent, and whose model gives the
same logits.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import filecmp
import hashlib
import inspect
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, constants, errors, get_token
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import parse_ratelimit_headers, validate_repo_id
from torch import Tensor, nn

import zoo
from zoo.data.tokenizers import create_tokenizer
from zoo.errors import (
    CheckpointError,
    ConfigError,
    PublishError,
    UnknownModelError,
    ZooError,
    check_keywords,
    did_you_mean,
    first_line,
)
from zoo.exporting.checked import check_input
from zoo.factory import create_model
from zoo.files import checkpoint_places, whole_file
from zoo.history import FIGURES, SHRUNK
from zoo.hub import CONFIG, OWN_TYPE, WEIGHTS, is_language_model, save_pretrained, tokenizer_beside
from zoo.language_card import render_language_card
from zoo.loading import check_is_whole, names_weights
from zoo.model_card import (
    ENVIRONMENT,
    RECIPE,
    Base,
    RunRecord,
    command_without_paths,
    is_segmentation,
    read_published_run,
    read_run,
    render_model_card,
    without_paths,
)
from zoo.registry import (
    HUB_PREFIXES,
    UNSTATED,
    Weights,
    get_entry,
    is_restricted,
    list_models,
    misspelt_place,
    model_info,
    split_name,
)
from zoo.sparsity.masks import MASKS, load_masks
from zoo.weights import convert_checkpoint, fetch_from_hub, read_json, read_state_dict, split_hub_id, widths_of

__all__ = ["Draft", "Publication", "model_card", "prepare", "publish"]

Say = Callable[[str], object]
Answer = TypeVar("Answer")

TRIES = 5
LONGEST_WAIT = 300.0  # seconds that a rate limit may ask for before it is an error
# licences that a copy of must go along wherever weights are passed on, and where their text is
COPY_GOES_ALONG = {"fair-noncommercial-research-license": "LICENSE.md of github.com/facebookresearch/EUPE, for one"}
SPARSITY = ("sparsity.json", "masks.png")  # what a sparse run leaves beside its checkpoints
RESULTS = ("evaluation/results.json", "results.json")  # where a run or a checkpoint may keep an evaluation
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
LICENSE = "LICENSE"
BEFORE_HALVING = "before_halving"  # in published results: these are of the weights before they were halved


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """What is to be published: a folder, its files and their sizes in bytes, and remarks on what was left out."""

    folder: Path
    files: Mapping[str, int]
    remarks: tuple[str, ...] = ()

    @property
    def card(self) -> str:
        return (self.folder / "README.md").read_text(encoding="utf-8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Publication:
    """What was published, and proved to be there.

    `commit` is the full hash, `changed` whether it is a new one (else everything was there already), `replaced` files
    that were there before under the same names, and `kept` those that stay beside what was published.
    """

    repo_id: str
    url: str
    commit: str
    changed: bool
    pull_request: str | None
    files: Mapping[str, int]
    replaced: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


# ----------------------------------------------------------------------------------------------------------- publishing


def publish(
    source: nn.Module | str | Path,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    say: Say = lambda _: None,
    **options: Any,
) -> Publication:
    """Publish a model on the Hub: weights, configuration, what is known of its training, results and a card.

    All files go up in one commit, or none does. They are then downloaded to a fresh folder and compared, tensors bit by
    bit and logits, before this returns. Publishing the same again changes nothing and compares again.

    Args:
        source: a model that `create_model` made, the folder of a run (its best checkpoint), that of one of its
            checkpoints (best, last, shrunk), a folder in the Hub's layout, or a file of weights with `model=`.
        repo_id: "owner/name"; made if need be. Other files that it holds stay.
        private: of a repository that is made; a public one that exists is refused.
        create_pr: open a pull request instead of committing to main.
        commit_message: by default "Publish ARCHITECTURE".
        token: by default that of `hf auth login` or HF_TOKEN.
        say: is called with a line when there is something to wait for or to know.
        **options: those of `prepare`.

    Raises:
        PublishError: nothing was published, or what was cannot be proved; says which, and what to do.
        ConfigError, CheckpointError, UnknownModelError: as `prepare`.
    """
    known = inspect.signature(prepare).parameters.keys() - {"source", "folder", "repo_id"}
    check_keywords("publish", options, known)
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory(prefix="zoo-publish-", ignore_cleanup_errors=True) as scratch:
        draft = prepare(source, Path(scratch) / "repository", repo_id=repo_id, **options)
        for remark in draft.remarks:
            say(remark)
        message = commit_message or f"Publish {read_json(draft.folder / CONFIG)['architecture']}"
        hub = _Hub(repo_id, token, say)
        publication = hub.upload(draft, private=private, create_pr=create_pr, message=message)
        hub.verify(draft, publication)
        return publication


def check_repo_id(repo_id: str) -> None:
    """Raise ConfigError for what cannot name a repository."""
    try:
        if not isinstance(repo_id, str) or repo_id.count("/") != 1:
            raise errors.HFValidationError
        validate_repo_id(repo_id)
    except errors.HFValidationError:
        raise ConfigError(
            f"{repo_id!r} cannot name a repository: it should read OWNER/NAME, of letters, digits, '-', '_' and '.'."
        ) from None


class _Hub:
    """One repository, while something is being published there."""

    def __init__(self, repo_id: str, token: str | None, say: Say) -> None:
        self.repo_id, self.token, self.say = repo_id, token, say
        self.api = HfApi(token=token, library_name="backbone-zoo", library_version=zoo.__version__)
        self.state = "Nothing was published."

    def upload(self, draft: Draft, *, private: bool, create_pr: bool, message: str) -> Publication:
        """Commit the draft, whole or not at all. Raises PublishError."""
        with self._explained():
            created = not self._patiently(lambda: self.api.repo_exists(self.repo_id))
            if created:
                self._patiently(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True))
                self.state = f"Nothing was published; the repository {self.repo_id} was made and is empty."
            before = self._patiently(lambda: self.api.model_info(self.repo_id, files_metadata=True))
        if private and not before.private:
            raise PublishError(
                f"{self.repo_id} exists and is public, and --private was asked for. Nothing was published. "
                "Make it private in its settings on the Hub, or choose another name."
            )
        there = {sibling.rfilename: sibling for sibling in before.siblings or ()}
        replaced = [name for name in draft.files if name in there and not _is_same(draft.folder / name, there[name])]
        additions = [CommitOperationAdd(name, str(draft.folder / name)) for name in draft.files]
        try:
            with self._explained():
                commit = self._patiently(
                    lambda: self.api.create_commit(
                        self.repo_id,
                        additions,
                        commit_message=message,
                        create_pr=create_pr,
                        parent_commit=before.sha,  # a commit of another in between is an error, a second of ours, too
                    ),
                    (429,),
                )
        except PublishError as error:
            raise PublishError(f"{str(error).removesuffix(self.state)}{self._state_now(before.sha)}") from error
        except KeyboardInterrupt:
            self.say(f"Interrupted. {self._state_now(before.sha)}")
            raise
        pull_request = commit.pr_url if create_pr else None
        return Publication(
            repo_id=self.repo_id,
            url=pull_request or f"{constants.ENDPOINT}/{self.repo_id}",
            commit=commit.oid,
            changed=commit.oid != before.sha,
            pull_request=pull_request,
            files=draft.files,
            replaced=tuple(replaced),
            kept=tuple(sorted(there.keys() - draft.files.keys() - {".gitattributes"})),
        )

    def verify(self, draft: Draft, publication: Publication) -> None:
        """Download what was committed to a fresh cache, and hold it to the draft. Raises PublishError."""
        commit = publication.commit
        what = f"commit {commit[:12]} of {self.repo_id}"
        advice = (
            "Publish again to check again: what is there already is not sent twice. To take it back, revert the commit."
        )
        with tempfile.TemporaryDirectory(prefix="zoo-verify-", ignore_cleanup_errors=True) as cache:
            where: dict[str, Any] = {"cache_dir": cache, "token": self.token}
            try:
                for name in draft.files:
                    path = fetch_from_hub(self.repo_id, (name,), revision=commit, **where)
                    if not filecmp.cmp(path, draft.folder / name, shallow=False):
                        raise PublishError(f"{what} does not hold what was sent: {name} differs. {advice}")
                ours = _open(f"local-dir:{draft.folder}")
                theirs = _open(f"hf-hub:{self.repo_id}@{commit}", **where)
                inputs = check_input(ours)
                if not _same_tensors(ours, theirs) or not _close(_logits(ours, inputs), _logits(theirs, inputs), 1e-6):
                    raise PublishError(f"The model of {what} is not the one that was sent. {advice}")
            except PublishError:
                raise
            except (ZooError, OSError) as error:
                raise PublishError(
                    f"The files went up, but {what} is not proved to be whole. {error} {advice}"
                ) from error

    # ------------------------------------------------------------------------------------------------------- requests

    def _patiently(self, ask: Callable[[], Answer], retried: tuple[int, ...] = (429, 500, 502, 503, 504)) -> Answer:
        """`ask()`, again after the time that a busy Hub asks to wait. The client itself retries only uploads."""
        for attempt in range(1, TRIES + 1):
            try:
                return ask()
            except errors.HfHubHTTPError as error:
                status = error.response.status_code
                wait = _seconds_to_wait(error.response.headers, 2.0**attempt / 2)
                if status not in retried or attempt == TRIES or wait > LONGEST_WAIT:
                    raise
                reason = "is asked too often" if status == 429 else "has trouble"
                self.say(f"The Hub {reason} (HTTP {status}): trying again in {wait:g} s.")
                time.sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except ZooError:
            raise
        except (OSError, ValueError, RuntimeError, LookupError, errors.HTTPError) as error:
            raise PublishError(f"{self._explain(error)} {self.state}") from error

    def _explain(self, error: Exception) -> str:
        host = constants.ENDPOINT.partition("://")[2]
        refusal = error.__cause__ if isinstance(error, RuntimeError) else None  # so the client tells of large files
        response = getattr(refusal or error, "response", None)
        status = getattr(response, "status_code", None)
        stated = response.headers.get("X-Error-Message") if response is not None else None
        said = f" ({stated.rstrip('.')})" if stated else ""
        words = first_line(error).rstrip(".")
        if isinstance(error, errors.OfflineModeIsEnabled):
            return "Offline mode (HF_HUB_OFFLINE) is on, and publishing needs the network: unset it."
        if refusal is not None and status is not None and status != 429 and status < 500:  # it takes no token
            return (
                f"The Hub's storage refuses a file (HTTP {status}){said}: publish again, for leave to upload holds a "
                "while only. Where that does not help, check the clock and the proxy."
            )
        if status == 401 and (self.token or get_token()) is None:
            return "You are not logged in: run `hf auth login`, or set HF_TOKEN, with a token that may write."
        if status == 401:
            return f"The Hub does not accept your token (HTTP 401){said}: log in again with one that may write."
        if isinstance(error, errors.GatedRepoError):
            return f"{self.repo_id} is gated, and your account has no access: ask for it on its page."
        if status == 403:
            return (
                f"Your token may not do that to {self.repo_id} (HTTP 403){said}: use one that may write for "
                f"{self.repo_id.partition('/')[0]}, or, where the repository exists, propose the model with --pr."
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return f"There is no repository {self.repo_id}, or your token may not see it."
        if status == 412:
            return f"Someone else changed {self.repo_id} in the meantime (HTTP 412): publish again."
        if status == 429:
            return f"The Hub is asked too often (HTTP 429){said}: publish again later."
        if status is not None and status >= 500:
            return f"The Hub has trouble (HTTP {status}){said}: publish again later."
        if status is not None:
            return f"The Hub refuses (HTTP {status}){said or f': {words}'}."
        if isinstance(error, ValueError) and "Invalid metadata" in str(error):
            reason = " ".join(str(error).split()).partition(". ")[2].removeprefix("- ").rstrip(".")
            return f"The Hub refuses the card's metadata: {reason}."
        if isinstance(error, json.JSONDecodeError | LookupError):
            return f"{host} does not answer as a Hub does: check HF_ENDPOINT, or try again later."
        return f"The connection to {host} broke ({words}): publish again."

    def _state_now(self, before: str | None) -> str:
        """What an upload that failed has left: asked of the Hub, for a lost answer may have been a yes."""
        page = f"{constants.ENDPOINT}/{self.repo_id}/commits/main"
        try:
            now = self.api.model_info(self.repo_id, timeout=10).sha
        except Exception:  # there is trouble already, and this is but a question about it
            return f"Whether a commit was made is not known: see {page}."
        return self.state if now == before else f"Its main branch has another commit now, {str(now)[:12]}: see {page}."


def _is_same(path: Path, there: RepoSibling) -> bool:
    """Whether a file of the repository has the bytes of `path`, by the hash that the Hub states."""
    if there.lfs is not None:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == there.lfs.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == there.blob_id  # as git does


def _seconds_to_wait(headers: Mapping[str, str], otherwise: float) -> float:
    stated = headers.get("Retry-After", "").strip()
    if stated.isdigit():
        return float(stated)
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else otherwise


# ------------------------------------------------------------------------------------------------------------ preparing


def prepare(
    source: nn.Module | str | Path,
    folder: str | Path,
    *,
    repo_id: str | None = None,
    model: str | None = None,
    license: str | None = None,
    dataset: str | None = None,
    note: str | None = None,
    results: str | Path | None = None,
    has_rights: bool = False,
    half: bool = False,
    tokenizer: Any = None,
    license_file: str | Path | None = None,
) -> Draft:
    """Make the folder that `publish` would upload, without the network.

    Args:
        source: as in `publish`. Of a folder that was made here, the record of the run, results, licence and whatever
            else was said then stay, but for what is said anew.
        folder: new or empty; its parent must exist.
        repo_id: where it will be published, for the card.
        model: the architecture, where `source` is a file of weights.
        license: of the weights, by its id on the Hub, such as "apache-2.0"; by default that of the weights they come
            from, or what `config.json` states of one's own.
        dataset: id on the Hub of the data that the model was trained and measured on.
        note: what else the card should say.
        results: the `results.json` of an evaluation of these weights, or its folder.
        has_rights: publish weights that come from others without a licence, or under one that forbids it.
        half: keep the weights in half precision.
        tokenizer: of a language model, or the name of one for `create_tokenizer`; by default the one that lies beside
            its weights.
        license_file: the text of the licence, which is published as `LICENSE`. Some licences ask for it wherever the
            weights of others are passed on.

    Raises:
        ConfigError: a source, option or folder that will not do, weights without rights, outputs that are not finite.
        CheckpointError, UnknownModelError: a checkpoint that cannot be read, or is of no known model.
    """
    if license is not None and not LICENSE_ID.fullmatch(license):
        raise ConfigError(f"{license!r} is no licence's id on the Hub: such an id reads like apache-2.0 or cc-by-4.0.")
    if Path(folder).is_dir() and any(Path(folder).iterdir()):
        raise ConfigError(f"The folder {str(folder)!r} is not empty: choose another.")
    found = _find(source, model)
    quantization = getattr(found.model, "quantization", None)
    if half and quantization is not None:
        raise ConfigError(f"The model's weights are {quantization.to}, and are not halved: leave out half (--half).")
    is_language = is_language_model(found.model)
    if tokenizer is None and found.checkpoint is not None and is_language:
        tokenizer = tokenizer_beside(found.checkpoint)
    elif isinstance(tokenizer, str):
        tokenizer = create_tokenizer(tokenizer)
    is_draft, stated = found.said is not None, found.said or {}
    half = half or stated.get("half") is True
    dataset = dataset or (stated["dataset"] if isinstance(stated.get("dataset"), str) else None)
    base = _base_said(stated) or found.base
    license = _settle_license(found, base, license, has_rights)
    beside = found.checkpoint / LICENSE if found.checkpoint is not None and is_draft else None
    if license_file is None and beside is not None and beside.is_file() and license == _cfg(found.model).get("license"):
        license_file = beside
    if license_file is not None and license in (None, UNSTATED):
        raise ConfigError(
            "The text of a licence (--license-file) goes with a licence, and none is known of these weights: name it "
            "with --license, as other where the Hub has no id for it."
        )
    if base is not None and license in COPY_GOES_ALONG and license_file is None and not has_rights:
        raise ConfigError(
            f"The licence {license} of {base.name} asks that a copy of it goes along with the weights: name its text "
            f"with --license-file FILE. It lies beside the authors' code and weights: {COPY_GOES_ALONG[license]}."
        )
    license_text = None if license_file is None else _read_text(Path(license_file).expanduser())
    evaluation, remarks = _read_results(found, results)
    note = note or found.note
    with _described(found.model, base, license) as module:
        dtype = torch.float16 if half else None
        labels = _labels(module)
        draft = save_pretrained(module, folder, labels=labels, tokenizer=tokenizer, note=note, dtype=dtype)
    served = _open(f"local-dir:{draft}")
    inputs = check_input(served)
    logits = _logits(served, inputs)
    if not torch.isfinite(logits).all():
        shutil.rmtree(draft)
        raise ConfigError(
            "The model's outputs are not finite (NaN or infinite), so there is nothing worth publishing"
            + (": float16 does not hold these weights; leave out --half." if half else ".")
        )
    if not is_language and not _computes_as(found.model, served, inputs, logits):
        shutil.rmtree(draft)
        raise ConfigError(
            "The model computes something else once it is saved and opened again, so it was changed after create_model "
            "made it: give what was changed as an argument of create_model, which is saved with the weights."
        )
    if found.run is not None:
        _add_records(found.run, draft)
    masks = None if found.checkpoint is None else _add_masks(found.checkpoint, found.run, draft, remarks)
    changed = half and not _same_tensors(served, found.model)
    run_rounded = changed or stated.get("rounded") is True
    rounded = run_rounded if evaluation is None else changed or evaluation.get(BEFORE_HALVING) is True
    _say_in_config(draft, run=found.run, base=base, dataset=dataset, half=half, rounded=run_rounded)
    if evaluation is not None:
        public = _without_paths(evaluation) | ({BEFORE_HALVING: True} if rounded else {})
        _write(draft / "results.json", json.dumps(public, indent=1) + "\n")
        evaluation = public if is_draft else evaluation  # the run's data, which it is compared with, has no path either
    if rounded and (evaluation is not None or (found.run is not None and found.run.row is not None)):
        remarks.append(
            "The card's metadata has no figures, for halving changed the weights that were measured. To have them, "
            "make the halved model with --dry-run FOLDER, evaluate FOLDER, and publish it with --half and --results."
        )
    if license_text is not None:
        _write(draft / LICENSE, license_text)
    names = sorted(path.name for path in draft.iterdir())
    facts: dict[str, Any] = {"repo_id": repo_id, "run": found.run, "results": evaluation, "base": base, "masks": masks}
    facts |= {"license": license, "dataset": dataset, "note": note, "half": half, "rounded": rounded, "files": names}
    if is_language:
        opens = _opens_in_transformers(draft, inputs, logits, remarks)
        card = render_language_card(served, tokenizer=tokenizer, opens_in_transformers=opens, **facts)
        if tokenizer is None:
            remarks.append("There is no tokenizer beside the weights: name one with --tokenizer.")
    else:
        opens = _opens_in_timm(draft, inputs, logits)
        card = render_model_card(served, opens_in_timm=opens, **facts)
    _write(draft / "README.md", card)
    if not license:
        remarks.append("No licence is stated for these weights: name one with --license.")
    first = ("README.md", CONFIG, WEIGHTS)
    ordered = [*first, *(name for name in names if name not in first)]
    return Draft(folder=draft, files={name: (draft / name).stat().st_size for name in ordered}, remarks=tuple(remarks))


def model_card(source: nn.Module | str | Path, *, say: Say = lambda _: None, **options: Any) -> str:
    """The card that `publish` would give a model. Takes the options of `prepare`, and raises as it does."""
    with tempfile.TemporaryDirectory(prefix="zoo-card-", ignore_cleanup_errors=True) as scratch:
        draft = prepare(source, Path(scratch) / "repository", **options)
        for remark in draft.remarks:
            say(remark)
        return draft.card


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """A model with its weights, and what is known of them."""

    model: nn.Module
    base: Base | None
    run: RunRecord | None = None
    checkpoint: Path | None = None  # the folder with the weights
    note: str | None = None
    said: Mapping[str, Any] | None = None  # by `_say_in_config`, where `prepare` made the folder


def _find(source: nn.Module | str | Path, model: str | None) -> _Source:
    if isinstance(source, nn.Module):
        if not isinstance(getattr(source, "pretrained_cfg", None), Mapping):
            raise ConfigError(f"{type(source).__name__} has no pretrained_cfg: publish a model of zoo.create_model.")
        return _Source(model=source, base=_base_in_cfg(_cfg(source), source) if _has_loaded(source) else None)
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"A model, a folder or a file is published, not {type(source).__name__}.")
    place = os.fspath(source).removeprefix("local-dir:")
    path = Path(place).expanduser()
    if not place:
        raise ConfigError("What is published is named by the path of its folder or file, and this one is empty.")
    if not path.exists():
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise ConfigError(f"There is no run or checkpoint {str(path)!r}.{misspelt_place(place) or near}")
    if path.is_file() and not (path.name == WEIGHTS and model is None and (path.parent / CONFIG).is_file()):
        if model is None:
            raise ConfigError(f"{str(path)!r} does not say what model it is of: name the architecture with --model.")
        return _from_file(path, model)
    if model is not None:
        raise ConfigError(f"{str(path)!r} says itself what model it holds: leave out --model.")
    folder = path if path.is_dir() else path.parent
    if (folder / "config.yaml").is_file() and not (folder / CONFIG).is_file():
        return _from_run(folder)
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"{str(folder)!r} is neither the folder of a run (config.yaml, best or last) nor a checkpoint ({CONFIG}, "
            f"{WEIGHTS})."
        )
    if folder.name in ("best", "last", SHRUNK) and (folder.parent / "config.yaml").is_file():
        return _from_run(folder.parent, folder.name)
    module = _open(f"local-dir:{folder}")
    config = read_json(folder / CONFIG)
    note, ours = config.get("note"), config.get("zoo")
    said = ours.get("card") if isinstance(ours, dict) else None
    run = None
    if isinstance(said, dict) and isinstance(said.get("checkpoint"), str) and (folder / RECIPE).is_file():
        run = read_published_run(folder, said["checkpoint"], said.get("epoch"))
    return _Source(
        model=module,
        base=_base_in_cfg(_cfg(module), module),
        run=run,
        checkpoint=folder,
        note=note if isinstance(note, str) else None,
        said=said if isinstance(said, dict) else None,
    )


def _has_loaded(module: nn.Module) -> bool:
    """Whether a model took weights when it was made: else its description is of weights that it never had."""
    return hasattr(module, "load_report") or _cfg(module).get("architecture") not in list_models()


def _from_run(folder: Path, checkpoint: str | None = None) -> _Source:
    there = [name for name in ("best", "last") if (folder / name / CONFIG).is_file()]
    if not there:
        raise ConfigError(f"The run {str(folder)!r} has no checkpoint yet, neither best nor last.")
    checkpoint = checkpoint or there[0]
    run = read_run(folder, checkpoint)
    module = _open(f"local-dir:{folder / checkpoint}")
    return _Source(model=module, base=_base_of_run(run, module), run=run, checkpoint=folder / checkpoint)


def _from_file(path: Path, name: str) -> _Source:
    """A bare file of weights, in any published layout, as wide as it is."""
    entry = get_entry(name)
    with tempfile.TemporaryDirectory(prefix="zoo-convert-") as scratch:
        converted = Path(scratch) / WEIGHTS
        convert_checkpoint(path, converted, name)
        args = widths_of(read_state_dict(converted), entry)
        module = create_model(name, checkpoint_path=converted, **args)
    return _Source(model=module, base=_base_in_cfg(_cfg(module), module))


def _open(name: str, **where: Any) -> nn.Module:
    """The model of a repository or folder on the CPU, ready to be asked; timm's own where the zoo has none."""
    try:
        model = create_model(name, **where).eval()
        check_is_whole(model)
        return model
    except UnknownModelError:
        import timm

        config = read_json(_config_path(name, **where))
        if not timm.is_model(str(config.get("architecture"))):
            raise
    where.pop("token", None)
    try:
        model = timm.create_model(name, pretrained=True, **where)
    except (RuntimeError, TypeError, ValueError, AssertionError, OSError) as error:
        raise CheckpointError(f"timm does not open {name}: {error}") from error
    cfg = model.pretrained_cfg
    model.pretrained_cfg = model.default_cfg = cfg if isinstance(cfg, dict) else cfg.to_dict()
    return model.eval()


def _config_path(name: str, **where: Any) -> Path:
    if name.startswith(HUB_PREFIXES):
        repo, revision = split_hub_id(name)
        return fetch_from_hub(repo, (CONFIG,), revision=revision, **where)
    return Path(name.removeprefix("local-dir:")) / CONFIG


# -------------------------------------------------------------------------------------------------- origin and licences


def _base_of_run(run: RunRecord, module: nn.Module) -> Base | None:
    """What a run started from, by its configuration; what it saved says it for what came before."""
    section = run.config.get("model")
    section = section if isinstance(section, Mapping) else {}
    name, checkpoint = str(section.get("name", "")), section.get("checkpoint_path")
    checkpoint = checkpoint or section.get("backbone_weights")
    if isinstance(checkpoint, str) and checkpoint:
        return _base_by_name(checkpoint, module)
    if not names_weights(name, section.get("pretrained")):
        return None
    return _base_by_name(name, module)


def _base_by_name(name: str, module: nn.Module) -> Base:
    if name.startswith(HUB_PREFIXES):
        repo = split_hub_id(name)[0]
        known = _published_at(repo)
        license = known.license if known else _cfg(module).get("license")
        return Base(name=repo, hub_id=repo, license=license, trained=True)
    path = Path(name.removeprefix("local-dir:")).expanduser()
    if path.exists() or name.startswith("local-dir:") or "/" in name.removeprefix("timm/"):
        # what those weights themselves came from, as is said beside them or was found when they were loaded
        before = _base_in_cfg(_saved_cfg(path) or {}) or _base_in_cfg(_cfg(module))
        if before is not None:
            return dataclasses.replace(before, trained=True)
        return Base(name=str(without_paths(str(path.absolute()))), license=_cfg(module).get("license"), trained=True)
    if name.startswith("timm/"):
        full = name if "." in name else f"{name}.{_cfg(module).get('tag', '')}".rstrip(".")
        return Base(name=full, hub_id=full, license=_cfg(module).get("license"), trained=True)
    base_name, tag, _ = split_name(name)
    if base_name in list_models():
        return _base_of_weights(base_name, get_entry(base_name).find_weights(tag), trained=True)
    return Base(name=name, trained=True)


def _saved_cfg(path: Path) -> dict[str, Any] | None:
    """The description in a checkpoint's folder, or a run's, where it is still there."""
    for folder in (*checkpoint_places(path), path.parent):
        if (folder / CONFIG).is_file():
            config = read_json(folder / CONFIG)
            saved = config.get("pretrained_cfg")
            kept = {key: config.get(key) for key in ("architecture", "num_classes")}
            return {**saved, **kept} if isinstance(saved, dict) else None
    return None


def _base_in_cfg(cfg: Mapping[str, Any], module: nn.Module | None = None) -> Base | None:
    """The published weights that a model was loaded with, or has come from, as its `pretrained_cfg` says."""
    classes = getattr(module, "num_classes", cfg.get("num_classes"))
    architecture, tag = str(cfg.get("architecture")), cfg.get("tag")
    if tag and architecture in list_models():
        known = next((w for w in model_info(architecture).weights if w.tag == tag), None)
        if known is not None:
            return _base_of_weights(architecture, known, trained=classes not in (None, known.num_classes))
    origin = str(cfg.get("origin_url") or "")
    if architecture in list_models():
        known = next((w for w in model_info(architecture).weights if w.origin_url == origin and not w.hub_id), None)
        if known is not None:
            license = cfg.get("license") or known.license
            return dataclasses.replace(_base_of_weights(architecture, known, trained=True), license=license)
    if origin.startswith(f"{ORIGIN}/"):
        repo = origin.removeprefix(f"{ORIGIN}/")
        return Base(name=repo, hub_id=repo, license=cfg.get("license"), trained=True)
    if tag and architecture not in list_models():
        full = f"timm/{architecture}.{tag}"
        return Base(name=full, hub_id=full, license=cfg.get("license"))
    return None


ORIGIN = "https://huggingface.co"


def _base_of_weights(architecture: str, weights: Weights, trained: bool) -> Base:
    return Base(
        name=f"{architecture}.{weights.tag}",
        hub_id=weights.hub_id,
        url=weights.origin_url,
        license=weights.license,
        trained=trained,
    )


def _published_at(repo: str) -> Weights | None:
    """The authors' weights that lie in a repository, where the registry knows one set of them there."""
    found = [w for name in list_models() for w in model_info(name).weights if w.hub_id == repo]
    return found[0] if len({w.license for w in found}) == 1 else None


def _settle_license(found: _Source, base: Base | None, license: str | None, has_rights: bool) -> str | None:
    """The licence to publish under, where `license` was asked for. Raises ConfigError where it may not be."""
    own = _own_license(found.model)
    wanted = license or (own if found.said is not None else None)
    if not has_rights:
        for origin in (found.base, base):
            _check_rights(origin, wanted)
        if found.base is None and _has_loaded(found.model):
            _check_unknown_origin(_cfg(found.model), license)
    return wanted or (base.license if base else own)


def _own_license(module: nn.Module) -> str | None:
    """The licence that a description states of the weights: not one that is there because they may be others'."""
    stated = _cfg(module).get("license")
    if not _has_loaded(module) or _may_be_theirs(_cfg(module)) or not isinstance(stated, str):
        return None
    return stated if LICENSE_ID.fullmatch(stated) else None


def _may_be_theirs(cfg: Mapping[str, Any]) -> bool:
    """Whether all published weights of an architecture are restricted, and the licence of these does not differ."""
    architecture = str(cfg.get("architecture"))
    return architecture in list_models() and get_entry(architecture).is_restricted and is_restricted(cfg.get("license"))


def _check_rights(base: Base | None, license: str | None) -> None:
    """Raise ConfigError where the weights come from others who have not allowed it."""
    if base is None:
        return
    if base.license == UNSTATED:
        raise ConfigError(
            f"These weights come from {base.name}, whose authors state no licence, so nobody may pass them on without "
            "asking. Where you have their leave, say so with --i-have-the-rights."
        )
    if license and license != base.license and is_restricted(base.license):
        raise ConfigError(
            f"These weights come from {base.name}, whose licence is {base.license}: they cannot be given out as "
            f"{license}. Say --license {base.license}, or, where you may, --i-have-the-rights."
        )


def _check_unknown_origin(cfg: Mapping[str, Any], license: str | None) -> None:
    """Raise ConfigError where the weights may be those of others who have not allowed it."""
    architecture, published = str(cfg.get("architecture")), cfg.get("license")
    if not _may_be_theirs(cfg):
        return
    if published == UNSTATED or license != published:
        terms = "without a licence" if published == UNSTATED else f"under {published}"
        raise ConfigError(
            f"Nothing says whose weights these are, and those of {architecture} are published {terms}. Where you "
            "trained these from nothing, or have their authors' leave, say so with --i-have-the-rights. What "
            "save_pretrained or a run here has written says it itself."
        )


@contextlib.contextmanager
def _described(module: nn.Module, base: Base | None, license: str | None) -> Iterator[nn.Module]:
    """The model, its description naming its licence, and what it was trained from instead of what that was called."""
    before = _cfg(module)
    cfg = dict(before)
    if not _has_loaded(module):
        cfg = {key: value for key, value in cfg.items() if key not in ("tag", "license")}
    if license:
        cfg["license"] = license
    if base is not None and base.trained:
        cfg.pop("tag", None)
        if base.url or base.hub_id:
            cfg["origin_url"] = base.url or f"{ORIGIN}/{base.hub_id}"
    module.pretrained_cfg = cfg  # type: ignore[assignment]
    try:
        yield module
    finally:
        module.pretrained_cfg = before  # type: ignore[assignment]


def _cfg(module: nn.Module) -> dict[str, Any]:
    return module.pretrained_cfg  # type: ignore[return-value]


def _labels(module: nn.Module) -> list[str] | None:
    names = _cfg(module).get("label_names")
    fits = isinstance(names, list | tuple) and len(names) == getattr(module, "num_classes", None)
    return [str(name) for name in names] if fits and names else None


# -------------------------------------------------------------------------------------------------------------- records


def _read_results(found: _Source, given: str | Path | None) -> tuple[dict[str, Any] | None, list[str]]:
    """An evaluation's `results.json`, given or kept beside the checkpoint, and why one was left out."""
    path = None
    if given is not None:
        path = Path(given).expanduser()
        path = path / "results.json" if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(f"There are no results at {str(given)!r}: `eval.py --output FOLDER` writes them.")
    elif found.checkpoint is not None:
        folders = [found.checkpoint]
        if found.run is not None and _is_evaluated(found.run):
            folders.insert(0, found.run.folder)
        path = next((folder / name for folder in folders for name in RESULTS if (folder / name).is_file()), None)
        # what `prepare` made belongs together, in whatever order its files were copied or downloaded
        is_old = path is not None and path.stat().st_mtime < (found.checkpoint / CONFIG).stat().st_mtime
        if is_old and found.said is None:
            return None, [f"Left out: {path} is older than the checkpoint. Evaluate again, or name it with --results."]
    if path is None:
        return None, []
    results = read_json(path)
    classes = getattr(found.model, "num_classes", None)
    per_class = results.get("per_class")
    if is_language_model(found.model):
        if not isinstance(results.get("perplexity"), int | float) and not results.get("tasks"):
            raise ConfigError(
                f"{str(path)!r} does not hold the results of a language model's evaluation: it has neither perplexity "
                "nor tasks."
            )
        return results, []
    figure = "miou" if is_segmentation(found.model) else "top1"
    if not isinstance(results.get(figure), int | float):
        raise ConfigError(f"{str(path)!r} does not hold the results of this model's evaluation: it has no {figure}.")
    if results.get("method", "classifier") != "classifier":
        raise ConfigError(f"{str(path)!r} is of the features by {results['method']}, and not of the classifier.")
    some = results.get("label_map") in ("a", "r", "mini")  # parts of ImageNet, where other outputs are not asked
    if isinstance(per_class, Mapping) and len(per_class) != classes and not some:
        raise ConfigError(f"{str(path)!r} is of a model with {len(per_class)} classes, and this one has {classes}.")
    return results, []


def _is_evaluated(run: RunRecord) -> bool:
    """Whether `eval.py --model RUN` evaluates this checkpoint: the best, or the last where there is no best."""
    return run.checkpoint == ("best" if (run.folder / "best" / CONFIG).is_file() else "last")


def _say_in_config(
    draft: Path, *, run: RunRecord | None, base: Base | None, dataset: str | None, half: bool, rounded: bool
) -> None:
    """Keep in `config.json` what the card says and no other file does, for publishing the draft itself.

    Where other weights are saved there, it is gone with that file.
    """
    row = run.row if run else None
    said = {
        "checkpoint": run.checkpoint if run else None,
        "epoch": row.get("epoch") if row else None,
        "base": dataclasses.asdict(base) if base else None,
        "dataset": dataset,
        "half": half or None,
        "rounded": rounded or None,  # since the run measured them
    }
    config = read_json(draft / CONFIG)
    config["zoo"]["card"] = {key: value for key, value in said.items() if value is not None}
    _write(draft / CONFIG, json.dumps(config, indent=2) + "\n")


def _base_said(said: Mapping[str, Any]) -> Base | None:
    base = said.get("base")
    fields = [field.name for field in dataclasses.fields(Base)]
    if not isinstance(base, dict) or base.keys() != set(fields) or not isinstance(base["name"], str):
        return None
    texts = all(base[key] is None or isinstance(base[key], str) for key in ("hub_id", "url", "license"))
    return Base(**base) if texts and isinstance(base["trained"], bool) else None


def _without_paths(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results of an evaluation as they may be shown."""
    public: dict[str, Any] = without_paths(results)
    if isinstance(results.get("command"), str):
        public["command"] = command_without_paths(results["command"])
    return public


def _add_records(run: RunRecord, draft: Path) -> None:
    """The run's configuration and surroundings without what is private, its history and its curves."""
    config = {key: value for key, value in without_paths(run.config).items() if key not in ("output", "resume")}
    _write(draft / RECIPE, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    records = ("history.csv", "curves.png", "samples.md", f"{SHRUNK}/{FIGURES}", FIGURES)
    for path in (run.folder / name for name in records):
        if path.is_file() and (path.name != FIGURES or run.checkpoint == SHRUNK):
            shutil.copyfile(path, draft / path.name)
    # the configuration says all that a command does, and the command of a user's own program may hold secrets
    rows = [{key: value for key, value in without_paths(row).items() if key != "command"} for row in run.environment]
    if rows:
        _write(draft / ENVIRONMENT, json.dumps(rows, indent=1) + "\n")


def _add_masks(checkpoint: Path, run: RunRecord | None, draft: Path, remarks: list[str]) -> dict[str, Tensor] | None:
    """The masks of a sparse checkpoint, which are returned, and what reports them: a run reports its last ones."""
    if not (checkpoint / MASKS).is_file():
        return None
    shutil.copyfile(checkpoint / MASKS, draft / MASKS)
    if run is not None and run.folder == checkpoint:  # published, and so put together
        run = None
    folder, reported = (checkpoint, checkpoint) if run is None else (run.folder, run.folder / "last")
    there = [folder / name for name in SPARSITY if (folder / name).is_file()]
    belongs = (reported / MASKS).is_file() and filecmp.cmp(reported / MASKS, checkpoint / MASKS, shallow=False)
    if run is not None and belongs:  # a run that went on, and was stopped, has newer masks than it reported
        belongs = all(path.stat().st_mtime >= (reported / MASKS).stat().st_mtime for path in there)
    if belongs:
        for path in there:
            shutil.copyfile(path, draft / path.name)
    elif there:
        names = " and ".join(path.name for path in there)
        remarks.append(f"Left out: {names} of {folder}, which are of other masks than this checkpoint's.")
    return load_masks(checkpoint / MASKS)


def _read_text(path: Path) -> str:
    """The text of a licence."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"The licence's text cannot be read from {str(path)!r}: {reason}.") from error
    if not text.strip():
        raise ConfigError(f"{str(path)!r} is empty: it should be the licence's text.")
    return text


def _write(path: Path, text: str) -> None:
    try:
        with whole_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise ConfigError(f"Cannot write {str(path)!r}: {os.strerror(error.errno or errno.EIO)}.") from error


# ------------------------------------------------------------------------------------------------------------ comparing


def _logits(module: nn.Module, inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        return module(inputs.to(next(module.parameters())) if inputs.is_floating_point() else inputs)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    scale = float(b.abs().max())
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale)


def _same_tensors(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def _computes_as(original: nn.Module, served: nn.Module, images: Tensor, logits: Tensor) -> bool:
    """Whether the model that was saved gives the logits of what was opened, with the weights as they were rounded."""
    copied = copy.deepcopy(original).to("cpu", next(served.parameters()).dtype).eval()
    copied.load_state_dict(served.state_dict())
    return _close(_logits(copied, images), logits, 1e-3)


def _opens_in_timm(folder: Path, images: Tensor, logits: Tensor) -> bool:
    """Whether plain timm makes a model of the folder that gives these logits."""
    import timm

    architecture = str(read_json(folder / CONFIG)["architecture"])
    if not timm.is_model(architecture) or not timm.model_entrypoint(architecture).__module__.startswith("timm."):
        return False
    try:
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception:  # whatever stops timm is an answer to the question
        return False
    return _close(_logits(theirs, images), logits, 1e-4)


def _opens_in_transformers(folder: Path, tokens: Tensor, logits: Tensor, remarks: list[str]) -> bool:
    """Whether transformers makes a model of the folder that gives these logits."""
    if read_json(folder / CONFIG).get("model_type", OWN_TYPE) == OWN_TYPE:
        return False
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        remarks.append(
            'The card does not speak of transformers, which is not installed: pip install "backbone-zoo[export]", to '
            "have it tried."
        )
        return False
    dtype = logits.dtype
    try:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        with torch.inference_mode():
            answer = theirs(tokens).logits
    except Exception:  # whatever stops it is an answer to the question
        return False
    return _close(answer, logits, 1e-4 if dtype == torch.float32 else 2e-2)
