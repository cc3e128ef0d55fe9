"""The ``*_options`` tables of the configuration: keyword arguments of the function that a key names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from agentrl.errors import ConfigError, UnknownName


def option_names(function: Callable[..., Any]) -> list[str]:
    """The keyword-only arguments of ``function``."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def checked_options(
    key: str, function: Callable[..., Any], given: Mapping[str, Any], *, among: Sequence[str] | None = None
) -> dict[str, Any]:
    """``given``, converted to the types that ``function`` declares, and its defaults.

    Args:
        key: the configuration key, for the messages.
        function: takes the options as keyword-only arguments.
        given: values by name, as a TOML table has them.
        among: which of its arguments are options; default: all that are keyword-only.

    Raises:
        UnknownName: ``function`` has no such argument.
        ConfigError: a value of another type.
    """
    names = option_names(function) if among is None else list(among)
    hints = get_type_hints(function)
    defaults = {name: inspect.signature(function).parameters[name].default for name in names}
    converted: dict[str, Any] = {}
    for name, value in given.items():
        if name not in names:
            raise UnknownName(f"option of {key}:", name, names)
        try:
            converted[name] = TypeAdapter(hints[name]).validate_python(value, strict=None)
        except ValidationError as error:
            raise ConfigError(f"{key}.{name}: {error.errors()[0]['msg']}, got {value!r}.") from error
    return {name: value for name, value in defaults.items() if value is not inspect.Parameter.empty} | converted
