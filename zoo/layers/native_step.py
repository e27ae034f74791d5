"""The decoder's step in C++ (`native_step.cpp`): compiled on first use with the system's compiler, called by ctypes.

Without a compiler, or with the environment variable ZOO_NATIVE=0, there is none, and PyTorch does the work. What was
compiled is kept in the user's cache, under a name that says of which source, by which compiler and for which processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.layers.kv_cache import KVCache

__all__ = ["CLayer", "CMatrix", "NativeStep", "address", "float_matrix", "library", "threads"]

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
SECONDS = 300  # that a compiler may take
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT8, INT4 = 3, 4
MOST_THREADS = 16  # more would wait for memory, and are made anew for each call

_logger = logging.getLogger(__name__)


class CMatrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("group", ctypes.c_int32),
    ]


class CLayer(ctypes.Structure):
    _fields_ = [
        ("qkv", CMatrix),
        ("o", CMatrix),
        ("gate_up", CMatrix),
        ("down", CMatrix),
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
    ]


class _CModel(ctypes.Structure):
    _fields_ = [
        ("dim", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("hidden", ctypes.c_int32),
        ("executed", ctypes.c_int32),
        ("qk_norm", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("embedding", CMatrix),
        ("head", CMatrix),
        ("layers", ctypes.POINTER(CLayer)),
    ]


class _CSlot(ctypes.Structure):
    _fields_ = [
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("length", ctypes.c_int64),
        ("is_ring", ctypes.c_int32),
        ("kind", ctypes.c_int32),
    ]


# ---------------------------------------------------------------------------------------------------------- the library


def library() -> ctypes.CDLL | None:
    """The compiled steps, or None where they cannot be had or ZOO_NATIVE=0 says not to use them."""
    return None if os.environ.get("ZOO_NATIVE") == "0" else _library()


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        loaded = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        _logger.warning("Decoding runs in PyTorch alone, which is slower: %s", _reason(error))
        return None
    pointer, long, short = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    loaded.zoo_step.argtypes = (pointer, pointer, long, long, pointer, short)
    loaded.zoo_linear.argtypes = (pointer, pointer, pointer, long, short)
    loaded.zoo_step.restype = loaded.zoo_linear.restype = None
    return loaded


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]} could not compile {SOURCE.name}: {(error.stderr or '').strip()[:500]}"
    return str(error)


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if found := shutil.which(name):
            return found
    raise OSError("no C++ compiler is installed (c++, g++, clang++, or what CXX names)")


def _processor() -> str:
    """What tells processors with different instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = {line for line in lines if line.lower().startswith(("flags", "features", "model", "cpu family", "cpu part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(told)])


def _folder() -> Path:
    """Where compiled steps are kept: in the user's cache, or, where that cannot be written to, for this process."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "backbone-zoo" / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return _own_folder()


@functools.cache
def _own_folder() -> Path:
    holder = tempfile.TemporaryDirectory(prefix="backbone-zoo-")
    _kept.append(holder)  # until the process ends
    return Path(holder.name)


_kept: list[Any] = []


def _compiled() -> Path:
    """The path of the compiled source, compiled now if need be; written whole, whoever else does the same."""
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=SECONDS, check=True)
    parts = (SOURCE.read_text(), " ".join(FLAGS), compiler, version.stdout, _processor())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    target = _folder() / f"step-{name}.so"
    if target.is_file():
        return target
    handle, fresh = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        for native in ("-march=native", "-mcpu=native", None):  # x86; some compilers for ARM; any
            command = [compiler, *FLAGS, *filter(None, (native,)), "-o", fresh, str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            if done.returncode == 0:
                os.replace(fresh, target)
                return target
        done.check_returncode()
        raise AssertionError("unreachable: a compiler that failed raises")
    finally:
        Path(fresh).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- matrices


def threads() -> int:
    """How many a call works with."""
    return min(torch.get_num_threads(), MOST_THREADS)


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def float_matrix(weight: Tensor) -> CMatrix:
    """(rows, cols), contiguous, of one of `KINDS`."""
    return CMatrix(address(weight), None, *weight.shape, KINDS[weight.dtype], 0)


class NativeStep:
    """A decoder as the library reads it. It keeps the tensors alive whose addresses it holds."""

    def __init__(
        self,
        *,
        sizes: Sequence[int],
        eps: float,
        rotary: tuple[Tensor, Tensor],
        norm: Tensor,
        embedding: CMatrix,
        head: CMatrix,
        layers: Sequence[CLayer],
        keep: Sequence[Tensor],
    ) -> None:
        """`sizes`: dim, heads, kv_heads, head_dim, hidden (the widest), executed layers, and 1 where queries and keys
        are normed, else 0.
        """
        self._layers = (CLayer * len(layers))(*layers)
        self._keep = (*rotary, norm, *keep)
        cos, sin = (address(table) for table in rotary)
        self._model = _CModel(*sizes, eps, cos, sin, address(norm), embedding, head, self._layers)
        self._slots: weakref.WeakKeyDictionary[KVCache, tuple[list[Any], Any]] = weakref.WeakKeyDictionary()
        self.vocab_size = int(head.rows)

    def __call__(self, native: ctypes.CDLL, token: int, cache: KVCache) -> Tensor:
        """(vocab_size,) float32 logits of what follows `token`, whose keys and values are written into the cache."""
        logits = torch.empty(self.vocab_size, dtype=torch.float32, device="cpu")  # as C++ writes them
        native.zoo_step(
            ctypes.byref(self._model),
            self._slots_of(cache),
            token,
            cache.length,
            logits.data_ptr(),
            threads(),
        )
        return logits

    def _slots_of(self, cache: KVCache) -> Any:
        known = self._slots.get(cache)
        if known is None or any(
            a is not b.tensors for a, b in zip(known[0], cache.layers, strict=True)
        ):  # somebody put other tensors there
            slots = (_CSlot * len(cache.layers))(
                *(
                    _CSlot(*map(address, layer.tensors), layer.length, layer.is_ring, KINDS[layer.tensors[0].dtype])
                    for layer in cache.layers
                )
            )
            known = self._slots[cache] = [layer.tensors for layer in cache.layers], slots
        return known[1]
