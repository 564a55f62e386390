"""From the checked fields of a config.json to transformers' structure of the model; no code of the folder ever runs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moegraft.core.errors import CheckpointError
from moegraft.files import limits, shorten
from moegraft.integrations.transformers.checkpoint.build import plain_config
from moegraft.integrations.transformers.checkpoint.files import CONFIG_FILE
from moegraft.integrations.transformers.checkpoint.scheme import QUANTISATION_FIELDS

# Types of repositories with code of their own that is transformers' code of another type.
_ALIASES = {"kimi_k2": "deepseek_v3"}
_SEARCH_SECONDS = 10.0
# Names of fields that count something, and the largest number that is taken.
_CAPS = (
    (re.compile(r".*experts(?!.*(size|dim)).*"), limits.MAX_EXPERTS),
    (re.compile(r"(num_.*|n_|.*coder_)layers?|n_layer|depth"), limits.MAX_LAYERS),
    (re.compile(r".*vocab_size.*"), limits.MAX_VOCABULARY),
    (re.compile(r"(?!image|patch).*(_size|_dim|_rank|_heads|_groups|_embd)"), limits.MAX_SIZE),
)


def model_of_fields(fields: Mapping[str, Any], build: Callable[[PreTrainedConfig], PreTrainedModel]) -> PreTrainedModel:
    """``build`` of the config without its quantisation. Raises CheckpointError that names the file and the field."""
    check_sizes(fields)
    model_type = _ALIASES.get(str(fields.get("model_type")), fields.get("model_type"))
    fields = {**fields, "model_type": model_type}
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{CONFIG_FILE}: model_type is {shorten(model_type)}, expected one that transformers knows"
        )

    def attempt(tried: Mapping[str, Any]) -> PreTrainedModel:
        return build(plain_config(_config(tried)))

    try:
        return attempt(fields)
    except Exception as error:  # of whatever kind a field of an odd type or value leads to
        field = _field_at_fault(fields, attempt)
        what = "no config of a model that transformers can build" if field is None else field
        raise CheckpointError(f"{CONFIG_FILE}: {what}: {type(error).__name__}: {error}") from error


def check_sizes(fields: Mapping[str, Any], path: str = "") -> None:
    """Refuses numbers with which a model would take minutes to describe or memory without bound."""
    if path.count(".") > limits.MAX_CONFIG_DEPTH:
        raise CheckpointError(f"{CONFIG_FILE}: {shorten(path)} is nested too deeply")
    for name, value in fields.items():
        if isinstance(value, Mapping):
            if name not in QUANTISATION_FIELDS:
                check_sizes(value, f"{path}{name}.")
            continue
        cap = next((cap for pattern, cap in _CAPS if pattern.fullmatch(name)), None)
        for number in value if isinstance(value, list) else [value]:
            if cap is not None and isinstance(number, int | float) and not number <= cap:
                raise CheckpointError(f"{CONFIG_FILE}: {path}{name} is {shorten(number)}, expected at most {cap}")


def _special_floats(value: Any) -> Any:
    """As transformers writes numbers that JSON has no words for: {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [_special_floats(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {name: _special_floats(item) for name, item in value.items()}


def _config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    model_type = fields["model_type"]
    if model_type == "mistral" and "layer_types" in fields:  # as AutoConfig reads it
        model_type = "ministral"
    config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(
        {**_special_floats(fields), "model_type": model_type}
    )
    return config


def _field_at_fault(fields: Mapping[str, Any], attempt: Callable[[Mapping[str, Any]], object]) -> str | None:
    """The first field without which the model can be built, in words; None where none is found soon."""
    stop = time.monotonic() + _SEARCH_SECONDS
    for name, value, rest in _each_left_out(fields):
        if time.monotonic() > stop:
            return None
        try:
            attempt(rest)
        except Exception:  # not this one alone
            continue
        return f"{name} is {shorten(value)}"
    return None


def _each_left_out(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(name, value, the other fields), of objects within the config first."""
    for name, value in fields.items():
        if name == "model_type":
            continue
        if isinstance(value, Mapping):
            for inner, found, rest in _each_left_out(value):
                yield f"{name}.{inner}", found, {**fields, name: rest}
        yield name, value, {key: other for key, other in fields.items() if key != name}
