"""Settings: one frozen base class, YAML in, clear errors out.

Every settings class of Samara derives from :class:`Config`. A misspelt key is refused with the
nearest valid one, each error starts with the full path of its key
(``pretrain.optimizer.lr: …``), and ``key=value`` overrides follow the same YAML rules as the file.
Nothing here imports torch.
"""

from __future__ import annotations

import copy
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from samara.errors import ConfigError, did_you_mean

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """Base of all settings: frozen, unknown keys refused, fields described by their docstrings."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )

    def resolved(self) -> Self:
        """The same settings with every shorthand spelled out; what a run folder records."""
        return self


class _Loader(yaml.SafeLoader):
    """Safe YAML that also refuses a key written twice and reads ``3e-4`` as a number."""


# YAML 1.1 wants a dot and a signed exponent in a float; people write 3e-4.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            line = key_node.start_mark.line + 1
            raise ConfigError(f"{key}: written twice (line {line}); keep one")
        seen.add(key)
    loader.flatten_mapping(node)
    return dict(yaml.SafeLoader.construct_mapping(loader, node, deep=deep))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def parse_yaml(text: str, *, origin: str) -> Any:
    """Parse YAML text.

    Args:
        text: The YAML document.
        origin: What to call it in an error message.

    Raises:
        ConfigError: If the text is not YAML, with the line.
    """
    try:
        # A subclass of SafeLoader: no Python object can be built from the file.
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{origin}: not valid YAML at line {line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from error


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: If the file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    data = parse_yaml(text, origin=str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, this file holds {_kind(data)}")
    return data


class _Dumper(yaml.SafeDumper):
    """Writes a list of plain values on one line: the 28 widths of a design, not 28 lines."""


def _represent_list(dumper: _Dumper, data: Sequence[Any]) -> yaml.SequenceNode:
    flow = not any(isinstance(item, (dict, list, tuple)) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(tuple, _represent_list)


def dump_yaml(data: Any) -> str:
    """Write plain data as YAML; :func:`parse_yaml` reads it back to the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of ``data`` with each ``path.to.key=value`` set.

    A value is read by YAML rules (``8``, ``true``, ``[1, 2]``, ``null``). A number in the path
    indexes a list. Keys on the way that do not exist are made, so that validation, not this
    function, says whether they are known.

    Raises:
        ConfigError: If an override has no ``=`` or runs through a value that holds no keys.
    """
    result: dict[str, Any] = copy.deepcopy(dict(data))
    for override in overrides:
        path, separator, raw = override.partition("=")
        if not separator or not path.strip():
            raise ConfigError(f"{override}: an override is written key=value, as optimizer.lr=3e-4")
        keys = path.strip().split(".")
        node: Any = result
        for depth, key in enumerate(keys[:-1]):
            node = _child(node, key, path=".".join(keys[: depth + 1]))
        _assign(node, keys[-1], parse_yaml(raw, origin=path), path=path)
    return result


def _child(node: Any, key: str, *, path: str) -> Any:
    if isinstance(node, dict):
        if node.get(key) is None:
            node[key] = {}
        return node[key]
    if isinstance(node, list):
        return node[_index(node, key, path=path)]
    raise ConfigError(f"{path}: cannot be set, its parent holds {_kind(node)}")


def _assign(node: Any, key: str, value: Any, *, path: str) -> None:
    if isinstance(node, dict):
        node[key] = value
    elif isinstance(node, list):
        node[_index(node, key, path=path)] = value
    else:
        raise ConfigError(f"{path}: cannot be set, its parent holds {_kind(node)}")


def _index(node: list[Any], key: str, *, path: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise ConfigError(f"{path}: '{key}' is no position in a list of {len(node)}")
    return int(key)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``over`` laid on top: mappings merge key by key, else ``over`` wins."""
    result = copy.deepcopy(dict(base))
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merge(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def validate(config_type: type[ConfigT], data: Any, *, path: str = "") -> ConfigT:
    """Build ``config_type`` from plain data.

    Args:
        config_type: The settings class.
        data: What YAML or JSON gave.
        path: Where ``data`` stands in the recipe; the start of every error.

    Raises:
        ConfigError: One line per mistake, each with the full path of its key.
    """
    try:
        return config_type.model_validate(data)
    except ValidationError as error:
        errors = [dict(item) for item in error.errors()]
        lines = [_explain(config_type, e, path) for e in errors if not _is_other_branch(e, errors)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _is_other_branch(error: dict[str, Any], errors: Sequence[dict[str, Any]]) -> bool:
    """Whether ``error`` only says that a mapping is no ``str``, in a union that also takes one."""
    parent = error["loc"][:-1]
    return (
        error["type"].endswith("_type")
        and isinstance(error.get("input"), dict)
        and any(e is not error and e["loc"][: len(parent)] == parent for e in errors)
    )


def _explain(config_type: type[Config], error: dict[str, Any], prefix: str) -> str:
    location, owner = _walk(config_type, error["loc"])
    where = ".".join(part for part in [prefix, *location] if part) or "recipe"
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        known = owner.model_fields if owner is not None else {}
        return f"{where}: unknown key{did_you_mean(location[-1], known)}"
    if kind == "missing":
        return f"{where}: is required and not given"
    if kind == "union_tag_invalid":
        context = error["ctx"]
        options = [option.strip().strip("'") for option in context["expected_tags"].split(",")]
        key = str(context["discriminator"]).strip("'")
        tag = context["tag"]
        return f"{where}.{key}: unknown value '{tag}'{did_you_mean(tag, options)}"
    if kind == "union_tag_not_found":
        key = str(error["ctx"]["discriminator"]).strip("'")
        return f"{where}.{key}: is required and not given"
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return f"{where}: unknown value {value!r}{did_you_mean(str(value), options)}"
    if kind == "value_error":
        message = str(error["ctx"]["error"])
        return f"{where}: {message}"
    message = error["msg"][0].lower() + error["msg"][1:]
    shown = repr(value) if not isinstance(value, (dict, list)) else _kind(value)
    return f"{where}: {message}, got {shown}"


def _walk(
    config_type: type[Config], location: Sequence[str | int]
) -> tuple[list[str], type[Config] | None]:
    """Follow a pydantic location; drop the union labels in it that are no keys of the recipe."""
    path: list[str] = []
    candidates: list[Any] = [config_type]
    owner: type[Config] | None = config_type
    for part in location:
        models = [c for c in candidates if isinstance(c, type) and issubclass(c, Config)]
        fields = [m for m in models if str(part) in m.model_fields]
        if fields:
            owner = fields[0]
            path.append(str(part))
            candidates = _members(owner.model_fields[str(part)].annotation)
        elif _labels(models, part):
            owner = next(iter(_labels(models, part)))
            candidates = [owner]
        elif models and isinstance(part, str) and not _is_label(part):
            owner = models[0] if owner not in models else owner
            path.append(part)
            candidates = []
        elif isinstance(part, int) or not _is_label(str(part)):
            path.append(str(part))
            candidates = [member for c in candidates for member in _members(c, items=True)]
    return path, owner


def _labels(models: Sequence[type[Config]], part: str | int) -> list[type[Config]]:
    """The union members pydantic means by ``part``: a class name or a discriminator's value."""
    found = []
    for model in models:
        tags = {
            str(option)
            for field in model.model_fields.values()
            if typing.get_origin(field.annotation) is typing.Literal
            for option in typing.get_args(field.annotation)
        }
        if part == model.__name__ or str(part) in tags:
            found.append(model)
    return found


def _is_label(part: str) -> bool:
    """Whether a location part is pydantic's name of a union member, as ``tuple[int, ...]``."""
    return part in {"int", "float", "str", "bool", "none"} or bool(re.search(r"[\[\](-]", part))


def _members(annotation: Any, *, items: bool = False) -> list[Any]:
    """The types an annotation may hold; with ``items``, those inside a list, tuple or mapping."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _members(arguments[0], items=items)
    if origin in (typing.Union, types.UnionType):
        return [member for a in arguments for member in _members(a, items=items)]
    if items and arguments:
        inner = arguments[1:] if origin in (dict, Mapping) else arguments
        return [member for a in inner for member in _members(a)]
    return [annotation]


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing"}
    return names.get(type(value), f"{value!r}")
