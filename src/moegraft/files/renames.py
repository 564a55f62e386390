"""Names that modules have in adapters but not in the model of today's transformers, and how to find the latter.

Facts from transformers' ``conversion_mapping.py`` and from the modelling code of transformers 4. A rule rewrites the
name of a module or of a saved parameter; rules may follow each other. A rewritten name counts only if the model has
it and has no other rewritten form of it, so that a rule cannot send a tensor to a place that does not exist.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moegraft.files import limits


@dataclass(frozen=True, slots=True)
class Rename:
    """``pattern`` is replaced in a module's name, for these model types (all, where empty)."""

    pattern: str
    replacement: str
    model_types: frozenset[str] = frozenset()


def _for(*model_types: str) -> frozenset[str]:
    return frozenset(model_types)


_MIXTRAL_LIKE = _for("mixtral", "minimax", "minimax_m2", "phimoe", "kimi_linear", "minimax_m3_vl", "minimax_m3_vl_text")
_GRANITE_LIKE = _for("granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa")
_LINEAR_ATTENTION = _for("kimi_linear", "glm5_next", "bailing_hybrid")
_INDEXED = _for("minimax_m3_vl", "minimax_m3_vl_text")
_OMNI = _for("qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text")
_SCORE_CORRECTION = _for("exaone_moe", "minimax_m3_vl", "minimax_m3_vl_text", "hy_v3", "laguna")

RENAMES = (
    # Multimodal wrappers moved their language model; a text model may also be attached without its head.
    Rename(r"^language_model\.model\.", "model.language_model."),
    Rename(r"^model\.language_model\.model\.", "model.language_model."),
    Rename(r"^language_model\.lm_head\Z", "lm_head"),
    Rename(r"^model\.language_model\.", "model."),
    Rename(r"^model\.(?!language_model\.)", "model.language_model."),
    Rename(r"^model\.", ""),
    Rename(r"^(?!model\.|language_model\.)", "model."),
    Rename(r"^backbone\.", "model.", _for("nemotron_h")),
    # The thinker of Qwen3-Omni by itself, or inside the whole model.
    Rename(r"^thinker\.", "", _OMNI),
    Rename(r"^(?!thinker\.)", "thinker.", _OMNI),
    # What torch's parallel wrappers leave.
    Rename(r"^module\.", ""),
    # Tinker's names.
    Rename(r"^(model\.)?unembed_tokens\Z", "lm_head"),
    Rename(r"\.attn(?=\.|$)", ".self_attn", _for("gpt_oss")),
    # The block around router and experts.
    Rename(r"\.block_sparse_moe(?=\.|$)", ".mlp", _MIXTRAL_LIKE),
    # Routers.
    Rename(r"\.mlp\.gate\Z", ".mlp.router", _for("phimoe")),
    Rename(r"\.mlp\.router\.gate\Z", ".mlp.gate", _for("hy_v3")),
    Rename(r"\.router\.layer\Z", ".router", _GRANITE_LIKE),
    Rename(r"\.mlp\.moe_statics\Z", ".mlp.gate.moe_statics", _for("ernie4_5_moe")),
    Rename(r"\.mlp(?:\.experts)?\.e_score_correction_bias\Z", ".mlp.gate.e_score_correction_bias", _SCORE_CORRECTION),
    # Shared experts.
    Rename(r"\.mlp\.shared_mlp(?=\.|$)", ".mlp.shared_experts", _for("hy_v3")),
    Rename(r"\.mlp\.shared_expert(?=\.|$)", ".mlp.shared_experts", _for("laguna")),
    # Attention.
    Rename(r"\.self_attn\.index_([qk]_(?:proj|norm))\Z", r".self_attn.indexer.\1", _INDEXED),
    Rename(r"\.attention(?=\.|$)", ".self_attn", _for("bailing_hybrid")),
    Rename(r"\.self_attn\.dense\Z", ".self_attn.o_proj", _for("bailing_hybrid")),
    Rename(r"\.self_attn\.(f_(?:[ab]_)?proj)\Z", r".self_attn.forget_gate.\1", _LINEAR_ATTENTION),
    Rename(r"^model\.word_embeddings\Z", "model.embed_tokens", _for("bailing_hybrid")),
)

# Projections of an expert, by the name that its module had: ``experts.3.w1``, ``experts.3.gate_proj``.
GATE_NAMES = frozenset({"gate_proj", "w1"})
UP_NAMES = frozenset({"up_proj", "w3"})
DOWN_NAMES = frozenset({"down_proj", "w2"})

# Modules of transformers 4 that held one fused parameter ``weight`` of what is the experts module today:
# last name -> (path of the experts module from its parent, whether it is the second projection).
FUSED_MODULES = {
    "input_linear": (".experts", False),  # GraniteMoe
    "output_linear": (".experts", True),
    "fc1": ("", False),  # Aria: experts.fc1
    "fc2": ("", True),
}


class Renamer:
    """The names that a module may have today: its own first, then all that the rules make of it."""

    def __init__(self, model_type: str) -> None:
        self._rules = [
            (re.compile(rule.pattern), rule.replacement)
            for rule in RENAMES
            if not rule.model_types or model_type in rule.model_types
        ]

    def candidates(self, module: str) -> tuple[str, ...]:
        """All names reachable by the rules, without repetition; at most ``MAX_RENAMED`` of them."""
        names = [module]
        for name in names:  # grows meanwhile
            for pattern, replacement in self._rules:
                renamed = pattern.sub(replacement, name, count=1)
                if renamed not in names and len(names) < limits.MAX_RENAMED:
                    names.append(renamed)
        return tuple(names)
