"""Configurations: frozen dataclasses are the schema; YAML and dotted flags fill them.

A mistyped key or flag is an error that names the nearest right one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from zoo.errors import ConfigError, MissingDependencyError, ZooError, describe_os_error, did_you_mean

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = [
    "UsageError",
    "flag_values",
    "load_config",
    "parse_config",
    "plain_flags",
    "read_yaml",
    "run_command",
    "to_plain",
    "to_yaml",
]


class UsageError(ConfigError):
    """A flag that does not exist, or one without its value: commands exit with status 2."""


Config = TypeVar("Config")


def parse_config(
    schema: type[Config],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    examples: str = "",
) -> Config:
    """`schema` filled from `--config file.yaml`, of several the later over the earlier, and dotted flags over them.

    `examples` are commands, one on a line, for `--help`. Raises UsageError for a flag that does not exist or one
    that is missing, ConfigError for a file that cannot be read, a mistyped key in it (both name the nearest), and a
    value of the wrong type. `--help` prints and exits.
    """
    try:
        from jsonargparse import ArgumentError
    except ImportError as error:
        raise MissingDependencyError('Configurations need jsonargparse: pip install "backbone-zoo[train]".') from error

    argv = list(sys.argv[1:] if argv is None else argv)
    _check_flags(schema, argv)
    for path in flag_values(argv, "--config"):
        _check_keys(schema, read_yaml(path), path, [name for name, _ in _fields(schema)])
    parser = _parser(typing.cast(type, schema), prog, description, examples)
    try:
        parsed = parser.parse_args(_files_first(argv))
        fields = parser.instantiate(parsed)
    except ArgumentError as error:
        raise ConfigError(_one_line(error)) from None
    return schema(**{field.name: fields[field.name] for field in dataclasses.fields(schema)})  # type: ignore[arg-type]


def _files_first(argv: Sequence[str]) -> list[str]:
    """`argv` with its files in front: with jsonargparse the later holds, and flags are to, wherever they stand."""
    files: list[str] = []
    flags: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        (files if token == "--config" or token.startswith("--config=") else flags).append(token)
        if token == "--config":
            files.extend(itertools.islice(tokens, 1))
    return [*files, *flags]


@functools.cache
def _parser(schema: type, prog: str, description: str, examples: str) -> ArgumentParser:
    """Kept, as reading the types of all fields takes much longer than parsing."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    parser = ArgumentParser(
        prog=prog,
        description=description,
        epilog="\n  ".join(["examples:", *examples.strip().splitlines()]) if examples else None,
        # lines of examples stay as they are
        formatter_class=type("Formatter", (DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter), {}),
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file to start from; flags go over it.")
    parser.add_class_arguments(schema)
    return parser


def run_command(main: Callable[[], object]) -> int:
    """Run a command for its exit status: what `main` returns (None: 0), 2 for wrong usage, 1 for other user errors.

    The message of an error goes to stderr.
    """
    try:
        status = main()
    except UsageError as error:
        return _complain(str(error), 2)
    except ZooError as error:
        return _complain(str(error), getattr(error, "exit_status", 1))
    except OSError as error:  # a full disk, a folder that may not be read
        return _complain(describe_os_error(error), 1)
    except KeyboardInterrupt:
        return 130
    return status if isinstance(status, int) else 0


def _complain(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


def load_config(schema: type[Config], path: str | Path, **changes: Any) -> Config:
    """`schema` filled from a YAML file, with whole sections of `changes` over it as nested dicts.

    Raises ConfigError as `parse_config` does.
    """
    return parse_config(schema, ["--config", str(path), *plain_flags(changes)], prog="config", description="")


def plain_flags(values: Mapping[str, Any]) -> list[str]:
    """Nested `values` as dotted flags, for `parse_config`."""
    return [f"--{key}={_flag_value(value)}" for key, value in _leaves(values)]


def to_plain(config: Any) -> dict[str, Any]:
    """Nested dicts and lists, for YAML, JSON and checkpoints."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_plain(config), sort_keys=False, width=120)


def _check_flags(schema: type, argv: Sequence[str]) -> None:
    """argparse names no nearest flag, so that is done before it parses."""
    names, open_ended, sections = ["config", "help", "print_config"], [], []
    for key, kind in _fields(schema):
        names.append(key)
        if dataclasses.is_dataclass(kind):
            sections.append(key)
        if typing.get_origin(kind) is dict:
            open_ended.append(f"{key}.")
    for position, token in enumerate(argv):
        if token == "-h":
            continue
        if token.startswith("--"):
            key = token[2:].partition("=")[0]
            if key not in names and not key.startswith(tuple(open_ended)):
                raise UsageError(f"There is no option --{key}.{_nearest(key, names, '--')}")
            is_last = position == len(argv) - 1 or argv[position + 1].startswith("--")
            if token == "--config=" or (is_last and "=" not in token and key not in ("help", "print_config")):
                raise UsageError(f"--{key} needs a value.")
            if key in sections and not next(flag_values(argv[position:], f"--{key}")).endswith((".yaml", ".yml")):
                raise UsageError(f"--{key} takes a YAML file. Single values have names of their own, as --{key}.name.")
        elif position == 0 or not argv[position - 1].startswith("--") or "=" in argv[position - 1]:
            raise UsageError(f"{token!r} stands alone: every value follows an option, as in --config {token}.")


def _check_keys(schema: type, values: Any, path: str, names: Sequence[str], prefix: str = "") -> None:
    if not isinstance(values, dict):
        what = f"{prefix.rstrip('.')} in {path}" if prefix else path
        raise ConfigError(f"{what} must hold names and values, as in `key: value`, not {values!r}.")
    kinds = typing.get_type_hints(schema)
    for key, value in values.items():
        if key not in kinds:
            raise ConfigError(f"{path}: there is no key {prefix}{key}.{_nearest(f'{prefix}{key}', names)}")
        if dataclasses.is_dataclass(kinds[key]):
            _check_keys(typing.cast(type, kinds[key]), value, path, names, f"{prefix}{key}.")


def _nearest(key: str, names: Sequence[str], dashes: str = "") -> str:
    """The key with the same last part, as `optimizer.lr` for `lr`; else the one most alike. With `dashes` before it."""
    same_leaf = [dashes + name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    if same_leaf:
        return f" Did you mean {' or '.join(same_leaf)}?"
    return did_you_mean(key, names, count=1).replace("Did you mean ", f"Did you mean {dashes}")


def _fields(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, kind in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            yield from _fields(typing.cast(type, kind), f"{prefix}{key}.")
        yield prefix + key, kind


def flag_values(argv: Sequence[str], flag: str) -> Iterator[str]:
    """The values that `argv` gives `flag`, as `--flag value` or `--flag=value`."""
    for position, token in enumerate(argv):
        if token == flag:
            yield argv[position + 1] if position + 1 < len(argv) else ""
        elif token.startswith(f"{flag}="):
            yield token.partition("=")[2]


def read_yaml(path: str) -> Any:
    """What a YAML file holds. Raises ConfigError when it is not there, or not YAML."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = [str(p) for p in Path(path).parent.glob("*.yaml")] if Path(path).parent.is_dir() else []
        raise ConfigError(f"There is no configuration {path!r}.{did_you_mean(path, near)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration {path!r} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {_one_line(error)}") from None


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _flag_value(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    )


def _one_line(error: Exception) -> str:
    """jsonargparse's message without its Python: types and choices as a YAML writer knows them."""
    text = " ".join(str(error).split()).replace("Parser key ", "").replace('"', "")
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    text = text.replace("Expected a int.", "Expected a whole number.")
    text = text.replace("Expected a tuple.", "Expected a list in brackets, such as [a, b].")
    text = text.replace("Expected a tuple", "Expected a list")
    text = re.sub(r"(?:a )?typing\.Literal\[(.*?)\]", r"one of \1", text)
    text = re.sub(
        r"Does not validate .*? Errors: - (.*) - Expected a NoneType Given value type: .*? Given value:",
        r"\1. Got:",
        text,
    )
    choice = re.search(r"Expected one of ((?:'[^']*'(?:, )?)+)\. Got(?: value)?: (\S+?)\.?$", text)
    near = did_you_mean(choice[2], re.findall(r"'([^']*)'", choice[1])) if choice else ""
    return text.rstrip(".") + "." + near
