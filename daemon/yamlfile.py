"""YAML as people write it by hand: safe, a key twice is an error, and no message quotes the file.

Key files hold secrets, so a fault is told by its place alone.
"""

from __future__ import annotations

from typing import Any

import yaml


class YamlError(ValueError):
    """The text is not YAML, or names a key twice; the message gives line and column."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that does not let the second of two equal keys win in silence."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            mark = key_node.start_mark
            raise YamlError(f"line {mark.line + 1}, column {mark.column + 1}: a key stands twice in one section")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str) -> Any:
    """The data in `text`. Raises YamlError."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except YamlError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "at its end"
        raise YamlError(f"is not YAML: {place}; indent with spaces, close what was opened (quotes, brackets)") from None
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RecursionError,
    ) as error:
        # PyYAML lets what its constructors cannot make (a 13th month, !!int abc, !!bool maybe) through as it comes.
        raise YamlError(f"is not YAML ({type(error).__name__})") from None
