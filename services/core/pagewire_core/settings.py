"""Flags from the environment and from a YAML file, as the text that would stand on a command line.

One rule for every flag: command line > environment (PAGEWIRE_MAX_NUM_SEQS) > file (--config) > default. A file is
written as for vLLM: keys are long flag names with dashes or underscores; lists and mappings may be written as such.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CONFIG_VARIABLE = "PAGEWIRE_CONFIG"


@dataclass(frozen=True)
class Setting:
    """`source` is where it stands, to be named in errors; `name` is that of the flag, without dashes before it."""

    source: str
    name: str
    value: str | list[str]


def variable_of(name: str) -> str:
    """'max-num-seqs' -> 'PAGEWIRE_MAX_NUM_SEQS'."""
    return f"PAGEWIRE_{name.upper().replace('-', '_')}"


def from_environment(names: Iterable[str], environ: Mapping[str, str]) -> list[Setting]:
    found = ((variable_of(name), name) for name in names)
    return [
        Setting(variable, name, environ[variable])
        for variable, name in found
        if variable in environ and not is_service_link(environ[variable])
    ]


def is_service_link(text: str) -> bool:
    """Kubernetes sets PAGEWIRE_PORT to tcp://10.0.0.1:80 in every pod beside a service that is called pagewire."""
    return text.startswith(("tcp://", "udp://"))


def from_file(path: str) -> list[Setting]:
    """What a YAML file says. Raises ValueError with a sentence for what cannot be read or is no setting.

    A plain value stays the text that was typed: revision: 1.10 is not the number 1.1, and log-level: off is no boolean.
    """
    import yaml  # takes longer to import than all of this, and most command lines name no file

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        typed = yaml.safe_load(text)
        typed_values = {} if typed is None else typed
        if not isinstance(typed_values, dict):
            raise ValueError(f"{path} must have lines like max-num-seqs: 64")
        if typed is not None:
            _check_keys(path, yaml.compose(text, Loader=yaml.SafeLoader).value)
        plain = yaml.load(text, Loader=yaml.BaseLoader) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    pairs = zip(plain.items(), typed_values.values(), strict=True)
    return [_setting(path, str(key), value, typed) for (key, value), typed in pairs]


def _check_keys(path: str, pairs: Iterable[tuple[Any, Any]]) -> None:
    """Raises ValueError for a key that is there twice, of which YAML's readers take the last, and for a merge key."""
    lines: dict[str, int] = {}
    for key, _ in pairs:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            raise ValueError(f"'<<' in {path} (line {line}): mappings are not merged here; write the flags themselves")
        if key.value in lines:
            raise ValueError(f"{key.value!r} is in {path} twice: in lines {lines[key.value]} and {line}")
        lines[key.value] = line


def _setting(path: str, key: str, plain: Any, typed: Any) -> Setting:
    source = f"{key!r} in {path}"
    name = key.replace("_", "-")
    if typed is None or typed == []:
        raise ValueError(f"{source} has no value; leave it out to have the default")
    if isinstance(plain, dict):
        return Setting(source, name, json.dumps(typed))
    if isinstance(plain, list) and not all(isinstance(item, str) for item in plain):
        raise ValueError(f"{source} may be a list of plain values alone")
    return Setting(source, name, plain)
