"""Images in shards, read from front to back: webdataset's tar files, and parquet files, local or by URL."""

from __future__ import annotations

import dataclasses
import glob
import http.client
import io
import itertools
import json
import re
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from zoo.errors import DataError, MissingDependencyError, ZooError

__all__ = ["RawSample", "Shard", "Shards", "expand", "shuffled"]

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff", "gif")
ATTEMPTS = 5
RETRY_SECONDS = 0.5  # doubled from one attempt to the next
TIMEOUT_SECONDS = 60
ROWS_AT_ONCE = 64
FOOTERS_AT_ONCE = 8
SIZES = "sizes.json"
MISSING = "are missing"  # what is said of samples that a shard lacks
TIMMS_INFO = "_info.json"
CLASSES = "classes.txt"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of samples: its path or URL, and how many it holds."""

    url: str
    samples: int


class RawSample(NamedTuple):
    """A sample as its shard holds it: not decoded. `label` is None where it is missing or is no class."""

    name: str
    data: bytes | None
    label: int | None


class Shards:
    """The samples of `shards`, numbered through in their order. An ImageSource that is read from front to back."""

    def __init__(
        self, shards: Sequence[Shard], classes: Sequence[str], image_key: str | None, label_key: str | None
    ) -> None:
        self.shards = tuple(shards)
        self.starts = np.cumsum([0, *(shard.samples for shard in shards)])
        self.number_of = {name: number for number, name in enumerate(classes)}
        self.classes, self.image_key, self.label_key = len(classes), image_key, label_key

    def __len__(self) -> int:
        return int(self.starts[-1])

    def name(self, index: int) -> str:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return f"{self.shards[shard].url}, sample {index - self.starts[shard]}"

    def open(self, index: int) -> Image.Image:
        """One image by its number: reads its shard up to there."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        number = index - int(self.starts[shard])
        sample = next(self.read(shard, number, number + 1), None)
        if sample is None or sample.data is None:
            raise ValueError("the sample is missing")
        return Image.open(io.BytesIO(sample.data))

    def check(self) -> None:
        """Nothing: a shard that is gone is found out when it is opened."""

    def labels(self) -> np.ndarray:
        """Every sample's label, (N,) int64, -1 where it is missing. Reads all of a tar file, one column of parquet."""
        found = np.full(len(self), -1, dtype=np.int64)
        for shard, start in enumerate(self.starts[:-1]):
            try:
                samples = self.read(shard, 0, self.shards[shard].samples, images=False)
                for number, raw in enumerate(samples):
                    found[start + number] = -1 if raw is None or raw.label is None else raw.label
            except ZooError:
                raise
            except DAMAGED:
                pass  # what is missing is told when the images are read
        return found

    def read(
        self,
        shard: int,
        first: int,
        last: int,
        wanted: Callable[[int], bool] = lambda number: True,
        images: bool = True,
    ) -> Iterator[RawSample | None]:
        """The samples of a shard from the `first` up to the `last`: None for each that is not `wanted`.

        Ends early, or raises one of DAMAGED, where the shard does; raises DataError where it cannot be had.
        """
        url = self.shards[shard].url
        read = _read_parquet if url.endswith(".parquet") else _read_tar
        try:
            with open_shard(url) as file:
                samples = read(file, first, last, wanted, self.image_key, self.label_key, images)
                for number, found in enumerate(samples, first):
                    if found is None:
                        yield None
                    else:
                        yield RawSample(f"{url}, sample {number}", found[0], self._class_number(found[1]))
        except FileNotFoundError:
            raise DataError(f"The shard {url} is gone.") from None
        except ZooError:
            raise
        except Exception as error:  # connections break with as many types as there are file systems
            if "://" not in url or (isinstance(error, DAMAGED) and not isinstance(error, OSError)):
                raise
            raise DataError(f"The shard {url} cannot be read: {reason(error)}") from None

    def _class_number(self, label: Any) -> int | None:
        if isinstance(label, str):
            label = self.number_of[label] if label in self.number_of else int(label) if label.isdecimal() else None
        return int(label) if isinstance(label, int) and 0 <= label < self.classes else None

    def stretch(
        self, places: range, *, order: np.ndarray, wanted: Callable[[int], bool], refill: bool
    ) -> Iterator[tuple[int, tuple[int, int], RawSample | None]]:
        """The samples at `places` of the shards in `order`: (place in the stretch, (shard, number), sample).

        None stands for those that are not `wanted`. That a shard ends early is told once, by a sample without data at
        place -1; with `refill`, samples of the shards that follow take the places of those it lacks.
        """
        ends = np.cumsum([self.shards[shard].samples for shard in order])
        for position, end in enumerate(ends.tolist()):
            begin = end - self.shards[order[position]].samples
            first, last = max(places.start, begin), min(places.stop, end)
            if first < last:
                stretch = range(first - places.start, last - places.start)
                yield from self._part(np.roll(order, -position).tolist(), first - begin, stretch, wanted, refill)

    def _part(
        self, shards: list[int], first: int, places: range, wanted: Callable[[int], bool], refill: bool
    ) -> Iterator[tuple[int, tuple[int, int], RawSample | None]]:
        """Fill `places` from the first of `shards` on, beginning with its sample `first`."""
        place, lacking = places.start, ""
        for shard in shards:
            shift = place - first
            last = min(places.stop - shift, self.shards[shard].samples)

            def is_wanted(number: int, shift: int = shift) -> bool:
                return wanted(number + shift)

            problem = ""
            try:
                for number, raw in enumerate(self.read(shard, first, last, is_wanted), first):
                    yield place, (shard, number), raw
                    place += 1
            except ZooError:
                raise
            except DAMAGED as error:
                problem = f": {reason(error)}"
            if place - shift < last:
                missing = f"{self.shards[shard].url}: samples {place - shift} to {last - 1} {MISSING}{problem}"
                lacking = lacking or missing
                yield -1, (shard, -1), RawSample(missing, None, None)
            if place == places.stop or not refill:
                return
            first = 0
        what = "hold as many samples as they should" if place > places.start else "can be read"
        raise DataError(f"None of the {len(shards)} shards {what}. {lacking}.")


def shuffled(length: int, buffer: int, chance: np.random.Generator) -> list[int]:
    """The order in which `length` samples leave a shuffle buffer of `buffer` places, drawn beforehand."""
    draws = iter(chance.random(length))
    held: list[int] = []
    leaving: list[int] = []

    def let_go() -> None:
        number = int(next(draws) * len(held))
        held[number], held[-1] = held[-1], held[number]
        leaving.append(held.pop())

    for place in range(length):
        held.append(place)
        if len(held) >= buffer:
            let_go()
    while held:
        let_go()
    return leaving


# ------------------------------------------------------------------------------------------------------------ one shard


def _read_tar(
    file: BinaryIO,
    first: int,
    last: int,
    wanted: Callable[[int], bool],
    image_key: str | None,
    label_key: str | None,
    images: bool,
) -> Iterator[tuple[bytes | None, Any] | None]:
    """webdataset's layout: members of one sample follow one another and share the name up to the first dot."""
    with tarfile.open(fileobj=file, mode="r|*") as tar:
        members = (member for member in tar if _key(member))
        for number, (_, group) in enumerate(itertools.groupby(members, _key)):
            if number >= last:
                return
            if number < first:
                continue
            if not wanted(number):
                for member in group:
                    _content(tar, member)  # or it would be known only later that the shard breaks off here
                yield None
                continue
            image = label = None
            for member in group:
                kind = member.name.rsplit("/", 1)[-1].split(".", 1)[1].lower()
                if kind in ((image_key,) if image_key else IMAGE_KEYS):
                    image = _content(tar, member) if images else None
                elif kind == "cls" and label_key in (None, "cls"):
                    label = _content(tar, member).decode("utf-8", "replace").strip()
                elif kind == "json" and label is None and label_key != "cls":
                    label = _field(_content(tar, member), label_key or "label")
            yield image, label


def _field(text: bytes, key: str) -> Any:
    try:
        return json.loads(text).get(key)
    except (ValueError, AttributeError):
        return None


def _key(member: tarfile.TarInfo) -> str | None:
    """What the names of a sample's members begin with; None for what belongs to no sample."""
    folder, _, name = member.name.rpartition("/")
    if not member.isfile() or "." not in name or name.startswith((".", "__")):
        return None
    return f"{folder}/{name.split('.', 1)[0]}"


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _read_parquet(
    file: BinaryIO,
    first: int,
    last: int,
    wanted: Callable[[int], bool],
    image_key: str | None,
    label_key: str | None,
    images: bool,
) -> Iterator[tuple[bytes | None, Any] | None]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    columns = [label_key, image_key] if images else [label_key]
    end = 0
    for group in range(table.num_row_groups):
        begin, end = end, end + table.metadata.row_group(group).num_rows
        numbers = range(max(first, begin), min(last, end))
        keep = [wanted(number) for number in numbers]
        if not any(keep):
            yield from (None for _ in numbers)
            continue
        rows = itertools.chain.from_iterable(
            batch.to_pylist()
            for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False)
        )
        for row, is_wanted in zip(itertools.islice(rows, numbers.start - begin, None), keep, strict=False):
            cell = row.get(image_key)
            image = cell.get("bytes") if isinstance(cell, dict) else cell
            yield (image, row[label_key]) if is_wanted else None


# ------------------------------------------------------------------------------------------------------- finding shards


def expand(pattern: str) -> list[str]:
    """The names that braces stand for, as in a shell: "train-{0000..0127}.tar", "{a,b}.tar"; "::" joins patterns."""
    if "::" in pattern:
        return [name for part in pattern.split("::") for name in expand(part)]
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers:
        low, high = numbers.groups()
        options = [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    else:
        options = found[1].split(",")
    return [name for option in options for name in expand(pattern[: found.start()] + option + pattern[found.end() :])]


def find_tars(path: str, splits: Sequence[str]) -> list[str]:
    """The tar shards of the first of `splits` that there is under `path`, a folder or URL; or `path` itself.

    A split is the begin of the shards' names, or a pattern with braces or (locally) with wildcards.
    """
    if ".tar" in path:
        return _find(path)
    for split in splits:
        if ".tar" in split:
            found = _find(split if "://" in split or Path(split).is_absolute() else f"{path.rstrip('/')}/{split}")
        elif "://" in path:
            raise DataError(
                f"Shards behind {path} cannot be listed: give their names with data.train_split and data.val_split, "
                'such as "train-{0000..0127}.tar".'
            )
        else:
            root = Path(path).expanduser()
            pattern = glob.escape(split)
            found = sorted(map(str, {*root.glob(f"{pattern}.tar*"), *root.glob(f"{pattern}-*.tar*")}))
        if found:
            return found
    raise DataError(f"{path!r} holds no shards {' or '.join(f'{split}-*.tar' for split in splits)}.")


def _find(pattern: str) -> list[str]:
    names = expand(pattern)
    if "://" not in pattern:
        names = [str(Path(name).expanduser()) for name in names]
        names = [found for name in names for found in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    return names


def count_tars(urls: Sequence[str]) -> list[Shard]:
    """The shards with their sizes, from a file beside them, or by reading local ones.

    The file is `sizes.json`, {"name.tar": samples, ...}, or `_info.json` as timm's data sets on the Hub have it.
    """
    shards = []
    sizes: dict[str, dict[str, int]] = {}
    for url in urls:
        folder, _, name = url.rpartition("/")
        if folder not in sizes:
            sizes[folder] = _sizes(url)
        if name in sizes[folder]:
            shards.append(Shard(url, sizes[folder][name]))
        elif "://" in url:
            raise DataError(
                f"How many samples {url} holds is not known, and the schedule needs it: put {SIZES} beside it, "
                f'{{"{name}": 1000, ...}}.'
            )
        else:
            shards.append(Shard(url, _count_tar(url)))
    return shards


def _sizes(url: str) -> dict[str, int]:
    """The number of samples of each shard by name, as far as a file beside the shard `url` says it."""
    try:
        if (text := _beside(url, SIZES)) is not None:
            return {str(name): _whole(samples) for name, samples in json.loads(text).items()}
        if (text := _beside(url, TIMMS_INFO)) is not None:
            splits = json.loads(text)["splits"].values()
            return {
                str(name): _whole(samples)
                for split in splits
                for name, samples in zip(split["filenames"], split["shard_lengths"], strict=True)
            }
    except ZooError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError):
        folder = url.rpartition("/")[0]
        raise DataError(
            f"{SIZES} or {TIMMS_INFO} in {folder} must hold the number of samples of each shard by name, a whole "
            "number from 0 up."
        ) from None
    return {}


def _whole(samples: Any) -> int:
    if type(samples) is not int or samples < 0:
        raise ValueError(samples)
    return samples


def _count_tar(path: str) -> int:
    count = 0
    try:
        with tarfile.open(path) as tar:
            for _ in itertools.groupby(filter(None, map(_key, tar))):
                count += 1
    except FileNotFoundError:
        raise DataError(f"There is no shard {path}.") from None
    except DAMAGED as error:
        if count == 0:
            raise DataError(f"{path} cannot be read as a tar file: {reason(error)}") from None
    return count


def count_parquets(urls: Sequence[str]) -> tuple[list[Shard], Any]:
    """The shards with their sizes, and the schema of the first, from the files' footers."""
    import pyarrow.parquet

    def footer(url: str) -> tuple[int, Any]:
        try:
            with open_shard(url) as file:
                table = pyarrow.parquet.ParquetFile(file)
                return table.metadata.num_rows, table.schema_arrow
        except FileNotFoundError:
            raise DataError(f"There is no shard {url}.") from None
        except ZooError:
            raise
        except DAMAGED as error:
            raise DataError(f"{url} cannot be read as parquet: {reason(error)}") from None

    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        footers = list(pool.map(footer, urls))
    return [Shard(url, rows) for url, (rows, _) in zip(urls, footers, strict=True)], footers[0][1]


def class_names(url: str) -> tuple[str, ...]:
    """Names of the classes from `classes.txt` beside a shard, one on a line. Raises DataError where there is none."""
    text = _beside(url, CLASSES)
    if text is None:
        raise DataError(
            f"The classes of {url} are not known: give their number with data.num_classes, or their names, one on a "
            f"line, in {CLASSES} beside the shards."
        )
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _beside(url: str, name: str) -> str | None:
    """The text of a file beside a shard; None where there is none."""
    folder = url.rpartition("/")[0]
    try:
        with open_shard(f"{folder}/{name}" if folder else name) as file:
            return file.read().decode()
    except (FileNotFoundError, UnicodeDecodeError):
        return None


# -------------------------------------------------------------------------------------------------------- opening files


def open_shard(url: str) -> BinaryIO:
    """A shard, open to be read. Raises FileNotFoundError, or DataError where its server does not answer."""
    if url.startswith(("http://", "https://")):
        return io.BufferedReader(_HttpFile(url), buffer_size=1 << 20)
    if "://" not in url:
        return open(url, "rb")
    try:
        import fsspec  # type: ignore[import-untyped]

        return fsspec.open(url, "rb").open()
    except ImportError as error:
        raise MissingDependencyError(f"{url} cannot be opened: {reason(error)}") from None
    except FileNotFoundError:
        raise
    except Exception as error:  # as many types as there are file systems
        raise DataError(f"{url} cannot be had: {reason(error)}") from None


class _HttpFile(io.RawIOBase):
    """A file behind a URL, read from front to back or from anywhere; a connection that drops is made again."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.at = 0
        self.size: int | None = None
        self.response: Any = None
        self._with_retries(self._connect)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.size is not None

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if self.size is None:
            raise io.UnsupportedOperation("the server does not say how long the file is")
        target = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        if target != self.at:
            self._disconnect()
        self.at = target
        return target

    def readinto(self, buffer: Any) -> int:
        data = self._with_retries(lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _read(self, length: int) -> bytes:
        if self.size is not None and self.at >= self.size:
            return b""
        if self.response is None:
            self._connect()
        data = self.response.read(length)
        if not data and self.size is not None:
            raise http.client.IncompleteRead(b"", self.size - self.at)
        return data

    def _connect(self) -> None:
        headers = {"Range": f"bytes={self.at}-"} if self.at else {}
        request = urllib.request.Request(self.url, headers=headers)
        self.response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
        if self.at and self.response.status != 206:  # a server that knows no ranges
            left = self.at
            while left and (data := self.response.read(min(left, 1 << 20))):
                left -= len(data)
        elif not self.at and (length := self.response.headers.get("Content-Length")):
            self.size = int(length)

    def _disconnect(self) -> None:
        if self.response is not None:
            self.response.close()
            self.response = None

    def _with_retries(self, act: Callable[[], Any]) -> Any:
        for attempt in range(ATTEMPTS):
            try:
                return act()
            except urllib.error.HTTPError as error:
                if error.code in (404, 410):
                    raise FileNotFoundError(self.url) from None
                if error.code < 500 and error.code not in (408, 429):
                    raise DataError(f"{self.url} cannot be had: HTTP {error.code} {error.reason}.") from None
                failure: Exception = error
            except (OSError, http.client.HTTPException) as error:
                failure = error
            self._disconnect()
            if attempt < ATTEMPTS - 1:
                time.sleep(RETRY_SECONDS * 2**attempt)
        raise DataError(f"{self.url} cannot be had, tried {ATTEMPTS} times: {reason(failure)}.") from None


# what is raised for a shard that is not, or only partly, what it should be
DAMAGED = (tarfile.TarError, EOFError, zlib.error, OSError, ValueError)


def reason(error: BaseException) -> str:
    """The first line of what `error`, or what caused it, says."""
    cause = error.__cause__ or error
    lines = str(cause.reason if type(cause) is urllib.error.URLError else cause).strip().splitlines()
    return lines[0] if lines else type(error).__name__
