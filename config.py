"""Settings: frozen pydantic models, and the merging of preset < file < command line.

A stage's settings are a `Config` beside what they configure. `load_config` fills one from a section of a preset
(``launch/presets/tiny.yaml``, or any YAML or JSON file of that form), a file (such as a run's ``config.json``), and
overrides written ``optim.lr=1e-4``. Every mistake is one sentence with the full path of the key.
"""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import UserError
from .files import read_json, sha256_json

PRESETS = Path(__file__).resolve().parent / "launch" / "presets"
MAX_FILE_BYTES = 4 << 20


class Config(BaseModel):
    """Base of every settings class: values cannot be changed after checking, unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, defaults included; what a run's ``config.json`` holds."""
        return self.model_dump(mode="json")

    def sha256(self) -> str:
        """A hash of all values; equal settings have equal hashes whatever file or order they came from."""
        return sha256_json(self.to_dict())


AnyConfig = TypeVar("AnyConfig", bound=BaseModel)  # a Config, or any other frozen pydantic model


def load_config(
    cls: type[AnyConfig],
    preset: str | Path | None = None,
    section: str | None = None,
    config_file: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    values: Mapping[str, Any] | None = None,
) -> AnyConfig:
    """Merge preset < config file < values < overrides over the defaults of `cls`, and check the result.

    Args:
        preset: a name in ``launch/presets/``, or the path of a YAML or JSON file of the same form.
        section: the preset's section for `cls`; None takes the whole file. A preset without that section is refused.
        config_file: YAML or JSON; either the settings themselves, or a file of sections.
        overrides: ``a.b=value``; the value is read as YAML.
        values: plain values of a command's own options, such as ``{"data": "raw/"}``; None among them is left out.
    Raises: UserError for a missing file, an unknown key (naming the nearest), or a value of the wrong type.
    Example: ``load_config(TrainConfig, "tiny", "autoencoder", overrides=["optim.lr=1e-4"])``
    """
    data: dict[str, Any] = {}
    if preset is not None:
        data = _section_of_preset(preset, section, cls)
    if config_file is not None:
        loaded = read_settings_file(config_file, "config file")
        if section is not None and section not in cls.model_fields and isinstance(loaded.get(section), dict):
            loaded = loaded[section]
        _refuse_unknown_keys(cls, loaded, f" in {config_file}")
        data = merge(data, loaded)
    data = merge(data, {name: value for name, value in (values or {}).items() if value is not None})
    for override in overrides:
        data = merge(data, parse_override(override, cls))
    return check_config(cls, data)


def check_config(cls: type[AnyConfig], data: dict[str, Any], where: str = "") -> AnyConfig:
    """Make a `cls` of plain values. Raises UserError with the path of the first wrong key, found in `where`."""
    _refuse_unknown_keys(cls, data, where)
    for _ in range(32):  # each round may turn one float such as 1e6 into the integer that was meant
        try:
            return cls.model_validate_json(json.dumps(data, default=str), strict=True)
        except ValidationError as error:
            problems = error.errors(include_url=False)
            if not _integral_float_fixed(data, problems):
                raise UserError(_sentence(problems, where)) from None
    raise UserError(_sentence(problems, where))


def preset_names() -> list[str]:
    """The names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_path(preset: str | Path) -> Path:
    """The file of a preset's name, or of a path. Raises UserError that names the nearest preset."""
    name = str(preset)
    looks_like_a_path = name.endswith((".yaml", ".yml", ".json")) or "/" in name
    if looks_like_a_path:
        return Path(preset)
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = preset_names()
        raise UserError(f"unknown preset '{name}'{_nearest(name, known)} (there are: {', '.join(known) or 'none'})")
    return path


def read_settings_file(path: str | Path, what: str) -> dict[str, Any]:
    """Read a YAML or JSON file of settings; the file must hold a mapping. Raises UserError."""
    path = Path(path)
    if path.suffix == ".json":
        loaded = read_json(path, what, limit_bytes=MAX_FILE_BYTES)
    else:
        loaded = _read_yaml(path, what)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{what} {path} holds a {type(loaded).__name__}, expected keys and values")
    return loaded


def parse_override(text: str, cls: type[BaseModel]) -> dict[str, Any]:
    """``"optim.lr=1e-4"`` -> ``{"optim": {"lr": 1e-4}}``. Raises UserError."""
    key, equals, value = text.partition("=")
    key = key.strip()
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"'{text}' is not an override: write key=value, for example optim.lr=1e-4")
    try:
        parsed: Any = yaml.load(value, _Loader)  # a SafeLoader
    except (yaml.YAMLError, RecursionError):
        raise UserError(f"the value of the override '{text}' is not valid YAML") from None
    for part in reversed(parts):
        parsed = {part: parsed}
    _refuse_unknown_keys(cls, parsed, "")
    return parsed


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A new mapping: `over` wins, and mappings are merged key by key (lists are replaced)."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def known_keys(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of `cls`, groups included: ``optim``, ``optim.lr``, ..."""
    for name, field in cls.model_fields.items():
        yield prefix + name
        for group in _groups(field.annotation):
            yield from known_keys(group, f"{prefix}{name}.")


# --- private ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-4`` is a number (YAML 1.1: text), ``on`` is text, and no key is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if isinstance(key, (str, int, float)) and keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] not in ("bool", "float", "timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d[\d_]*\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(?:inf|Inf|nan|NaN))$"),
    "-+.0123456789",
)


def _read_yaml(path: Path, what: str) -> Any:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{what} {path} is larger than {MAX_FILE_BYTES} bytes, so it is not one of settings")
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{what} {path} is not valid YAML ({line}{error.problem})") from None
    except (yaml.YAMLError, RecursionError):
        raise UserError(f"{what} {path} is not valid YAML") from None


def _section_of_preset(preset: str | Path, section: str | None, cls: type[BaseModel]) -> dict[str, Any]:
    path = preset_path(preset)
    loaded = read_settings_file(path, "preset")
    if section is not None:
        if section not in loaded:
            known = ", ".join(sorted(map(str, loaded))) or "none"
            raise UserError(f"preset {path} has no section '{section}' (its sections: {known})")
        loaded = loaded[section]
        if loaded is None:
            loaded = {}
        if not isinstance(loaded, dict):
            raise UserError(f"section '{section}' of preset {path} is not a list of keys and values")
    of = f"section '{section}' of " if section is not None else ""
    _refuse_unknown_keys(cls, loaded, f" in {of}{path}")
    return loaded


def _groups(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes an annotation may hold: ``Optim``, ``Optim | None``, ``Annotated[A | B, ...]``."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return [annotation] if issubclass(annotation, BaseModel) else []
    if typing.get_origin(annotation) in (list, tuple, dict, set, frozenset):
        return []
    return [group for inner in typing.get_args(annotation) for group in _groups(inner)]


def _refuse_unknown_keys(cls: type[BaseModel], data: dict[str, Any], where: str) -> None:
    every = list(known_keys(cls))

    def walk(classes: list[type[BaseModel]], values: dict[Any, Any], prefix: str) -> None:
        for name, value in values.items():
            fields = [group.model_fields[name] for group in classes if name in group.model_fields]
            if not fields:
                key = f"{prefix}{name}"
                raise UserError(f"unknown key '{key}'{where}{_nearest(key, every)}")
            inner = [group for field in fields for group in _groups(field.annotation)]
            if inner and isinstance(value, dict):
                walk(inner, value, f"{prefix}{name}.")

    walk([cls], data, "")


def _nearest(key: str, known: list[str]) -> str:
    """``"; did you mean 'optim.lr'?"``, or nothing where no key is near."""
    group, _, leaf = key.rpartition(".")
    in_group = [k for k in known if k.rpartition(".")[0] == group]
    same_leaf = [k for k in known if k.rpartition(".")[2] == leaf]
    found = (
        same_leaf[:1]
        or difflib.get_close_matches(key, in_group, 1, 0.6)
        or difflib.get_close_matches(key, known, 1, 0.6)
        or [k for k in known if difflib.SequenceMatcher(None, leaf, k.rpartition(".")[2]).ratio() >= 0.75][:1]
    )
    return f"; did you mean '{found[0]}'?" if found else ""


def _sentence(problems: list[Any], where: str) -> str:
    problem = problems[0]
    key = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("function-"))
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if problem["type"] == "missing":
        text = f"key '{key}' is missing{where}"
    elif problem["type"] in ("value_error", "assertion_error"):
        text = f"key '{key}'{where}: {message}" if key else f"{message}{where}"
    else:
        expected = message[0].lower() + message[1:]
        expected = expected.replace("input should be", "should be").replace("valid dictionary", "group of keys")
        text = f"key '{key}'{where} {expected}, got {_short(problem.get('input'))}"
    more = len(problems) - 1
    return text + (f" (and {more} more mistake{'s' * (more > 1)})" if more else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _integral_float_fixed(data: dict[str, Any], problems: list[Any]) -> bool:
    """Turn ``total_steps: 1e6`` into the integer that was meant; strict checking sees a float there."""
    fixed = False
    for problem in problems:
        value = problem.get("input")
        if problem["type"] != "int_type" or not isinstance(value, float) or not value.is_integer():
            continue
        holder: Any = data
        *path, last = problem["loc"]
        try:
            for part in path:
                holder = holder[part]
            if holder[last] == value:
                holder[last] = int(value)
                fixed = True
        except (KeyError, IndexError, TypeError):
            continue  # a union's label is part of the path: leave it to the message
    return fixed
