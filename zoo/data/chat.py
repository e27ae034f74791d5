"""Chat templates: how a conversation is written down for a model, in the Jinja that tokenizers are published with.

A template comes from whoever published the tokenizer, so it runs in Jinja's sandbox, where it can change nothing.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from zoo.errors import CheckpointError, DataError, MissingDependencyError

__all__ = ["Messages", "check_messages", "render"]

Messages = Sequence[Mapping[str, Any]]


def check_messages(messages: Messages) -> None:
    """Raise DataError unless these are messages: mappings with a "role" and "content"."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise DataError(
            'A conversation is a list of one message or more, such as [{"role": "user", "content": "Hello"}].'
        )
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f'Message {i} is {message!r}: it should be {{"role": "user", "content": "..."}}.')
        if "content" not in message and "tool_calls" not in message:
            raise DataError(f"Message {i}, of {message['role']!r}, has no content.")


def render(template: str, messages: Messages, **names: Any) -> str:
    """The text of a conversation. `names` is what the template may ask for besides `messages`.

    Raises CheckpointError for a template that is not one, DataError for messages that it refuses.
    """
    import jinja2

    check_messages(messages)
    try:
        return _compiled(template).render(messages=list(messages), **names)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"The chat template cannot be read: {error.message} (line {error.lineno}).") from error
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        raise DataError(f"The chat template refuses this conversation: {error}") from error


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    try:
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingDependencyError('Chat templates need jinja2: pip install "backbone-zoo[text]".') from error
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_block()]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise, strftime_now=_now)
    return environment.from_string(template)


@functools.cache
def _generation_block() -> type:
    """`{% generation %}...{% endgeneration %}` marks what the assistant says, for training; here it is passed over."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationBlock(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Scope:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return GenerationBlock


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes what HTML would misread


def _raise(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
