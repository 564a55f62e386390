"""``adapter_config.json``: every field that changes the result is understood, or refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moegraft.core.errors import AdapterConfigError
from moegraft.files import limits, shorten
from moegraft.files.folder import StrictJSONError, parse_object
from moegraft.lora.peft.patterns import Budget, ModulePatterns

CONFIG_FILE = "adapter_config.json"

# Each changes what the adapter computes, in a way that low-rank pairs next to the base weights cannot express.
_REFUSED = {
    "alora_invocation_tokens": "aLoRA, which is active after an invocation sequence only",
    "arrow_config": "Arrow routing between adapters",
    "kasa_config": "KaSA, which replaces the base weights by a truncated decomposition",
    "layer_replication": "a base model with replicated layers",
    "monteclora_config": "MonteCLoRA, which samples around the adapter",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA, whose A reads pooled inputs",
}
# Each of these moves a part of the base weights into the adapter, which is meaningless beside the unchanged base.
_MOVES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_HARMLESS_INIT = ("gaussian", "eva", "orthogonal", "mica")
# Fields of peft.LoraConfig that only training, loading or bookkeeping reads; the file says which modules it holds.
_IGNORED = frozenset(
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out "
    "inference_mode layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config "
    "megatron_core modules_to_save qalora_group_size revision runtime_config target_modules task_type "
    "velora_config".split()
)
_READ = frozenset(
    "alpha_pattern bias init_lora_weights lora_alpha lora_bias peft_type peft_version r rank_pattern target_parameters "
    "trainable_token_indices use_dora use_rslora".split()
)


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """What the loader needs of the config. ``target_parameters``: names or dotted ends of names of parameters.

    ``token_indices``: name or dotted end of the name of an embedding or head -> its trained rows; "" is the embedding.
    """

    r: int
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    target_parameters: frozenset[str] = frozenset()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    peft_version: str | None = None
    rank_pattern: ModulePatterns | None = None
    alpha_pattern: ModulePatterns | None = None
    notes: tuple[str, ...] = ()

    def rank(self, module: str) -> tuple[int, str]:
        """Rank of a module, and the field that sets it, for messages."""
        found = None if self.rank_pattern is None else self.rank_pattern.find(module)
        if found is None:
            return self.r, f"r {self.r}"
        return int(found[1]), f"rank_pattern {shorten(found[0])}: {int(found[1])}"

    def scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (arXiv 2312.03732)."""
        found = None if self.alpha_pattern is None else self.alpha_pattern.find(module)
        alpha = self.lora_alpha if found is None else found[1]
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def tokens(self, module: str, *, is_embedding: bool) -> tuple[int, ...]:
        """The trained rows of an embedding or head, in the order of the tensor; none where the config names none."""
        for name, rows in self.token_indices.items():
            if (is_embedding and not name) or module == name or module.endswith(f".{name}"):
                return rows
        return ()

    def names_parameter(self, parameter: str) -> bool:
        """Whether ``target_parameters`` names a parameter: its full name or a dotted end of it (PEFT's rule)."""
        if not self.target_parameters:
            return False
        parts = parameter.split(".")
        return any(".".join(parts[start:]) in self.target_parameters for start in range(len(parts)))


def read_config(data: bytes) -> PeftConfig:
    """Parses and checks the bytes of ``adapter_config.json``.

    Raises AdapterConfigError: it is malformed, or asks for something that cannot be served; names the field.
    """
    try:
        return parse_config(parse_object(data))
    except (StrictJSONError, AdapterConfigError) as error:
        raise AdapterConfigError(f"{CONFIG_FILE}: {error}") from None


def parse_config(raw: Mapping[str, Any]) -> PeftConfig:
    """Checks the fields. Raises AdapterConfigError."""
    peft_type = raw.get("peft_type")
    if peft_type != "LORA":
        raise AdapterConfigError(f"peft_type {shorten(peft_type)} is not supported, expected 'LORA'")
    for name, meaning in _REFUSED.items():
        if raw.get(name):
            raise AdapterConfigError(f"{name}: {meaning}; not supported")
    _check_init(raw.get("init_lora_weights", True))
    bias = raw.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise AdapterConfigError(f"bias {shorten(bias)}, expected 'none', 'all' or 'lora_only'")
    budget = Budget() if raw.get("rank_pattern") or raw.get("alpha_pattern") else None
    return PeftConfig(
        r=_rank("r", raw.get("r")),
        lora_alpha=_number("lora_alpha", raw.get("lora_alpha")),
        use_rslora=_flag("use_rslora", raw.get("use_rslora")),
        use_dora=_flag("use_dora", raw.get("use_dora")),
        lora_bias=_flag("lora_bias", raw.get("lora_bias")),
        bias=bias,
        target_parameters=_names("target_parameters", raw.get("target_parameters")),
        token_indices=_token_indices("trainable_token_indices", raw.get("trainable_token_indices")),
        peft_version=_version(raw.get("peft_version")),
        rank_pattern=_patterns("rank_pattern", raw.get("rank_pattern"), _rank, budget),
        alpha_pattern=_patterns("alpha_pattern", raw.get("alpha_pattern"), _number, budget),
        notes=tuple(_unknown_fields(raw)),
    )


def _unknown_fields(raw: Mapping[str, Any]) -> list[str]:
    known = _READ | _IGNORED | _REFUSED.keys()
    unknown = [name for name, value in raw.items() if value and name not in known]
    notes = [f"{CONFIG_FILE}: unknown field {shorten(name)} was not read" for name in unknown[: limits.MAX_NOTES]]
    more = len(unknown) - len(notes)
    return [*notes, f"{CONFIG_FILE}: {more} more unknown fields were not read"] if more else notes


def _check_init(init: Any) -> None:
    if isinstance(init, bool) or init is None or init in _HARMLESS_INIT:
        return
    if isinstance(init, str) and init.lower().startswith(_MOVES_BASE):
        raise AdapterConfigError(
            f"init_lora_weights {shorten(init)}: the adapter fits a base model whose weights were changed with it; "
            "convert it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    raise AdapterConfigError(f"init_lora_weights {shorten(init)} is not known")


def _rank(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= limits.MAX_RANK:
        raise AdapterConfigError(f"{name} {shorten(value)}, expected an integer from 1 to {limits.MAX_RANK}")
    return value


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:  # the comparison is false for NaN as well
        raise AdapterConfigError(f"{name} {shorten(value)}, expected a finite number")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise AdapterConfigError(f"{name} {shorten(value)}, expected true or false")
    return bool(value)


def _names(name: str, value: Any) -> frozenset[str]:
    if value is None:
        return frozenset()
    if not isinstance(value, list) or any(not isinstance(item, str) or not item for item in value):
        raise AdapterConfigError(f"{name} {shorten(value)}, expected a list of names")
    if len(value) > limits.MAX_TARGET_PARAMETERS:
        raise AdapterConfigError(f"{name}: {len(value)} names, expected at most {limits.MAX_TARGET_PARAMETERS}")
    return frozenset(value)


def _token_indices(name: str, value: Any) -> dict[str, tuple[int, ...]]:
    found = {"": value} if isinstance(value, list) else value or {}
    if not isinstance(found, dict):
        raise AdapterConfigError(f"{name} {shorten(value)}, expected a list of token ids, or an object of such lists")
    for rows in found.values():
        ids = rows if isinstance(rows, list) else [None]
        if any(type(token) is not int or not 0 <= token < limits.MAX_VOCABULARY for token in ids):
            raise AdapterConfigError(f"{name} {shorten(rows)}, expected a list of token ids")
        if len(set(ids)) < len(ids) or len(ids) > limits.MAX_TOKEN_ROWS:
            raise AdapterConfigError(
                f"{name}: {len(ids)} token ids, expected different ones, at most {limits.MAX_TOKEN_ROWS}"
            )
    return {key: tuple(rows) for key, rows in found.items()}


def _version(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not re.match(r"[0-9]{1,4}\.[0-9]{1,4}(?![0-9])", value):
        raise AdapterConfigError(f"peft_version {shorten(value)}, expected a version such as '0.19.1'")
    return value


def _patterns(
    name: str, value: Any, check: Callable[[str, Any], float], budget: Budget | None
) -> ModulePatterns | None:
    if value is None or value == {}:
        return None
    if not isinstance(value, dict):
        raise AdapterConfigError(f"{name} {shorten(value)}, expected an object of pattern: value")
    return ModulePatterns(name, {key: check(f"{name}[{shorten(key)}]", item) for key, item in value.items()}, budget)
