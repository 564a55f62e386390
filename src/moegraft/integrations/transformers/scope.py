"""Which modules of a transformers model see the rows of its tokens, each token once and in order.

Only there is it known which adapter a row uses. What is not known to be of that kind is left out, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

# Modules of a text stack that see other rows than the tokens', by the end of their names: why adapters may not touch
# them. tests/test_families.py looks for them in every family that transformers has.
_OTHER_ROWS: Mapping[str, str] = {
    ".indexer.k_layernorm": "it runs on keys pooled over blocks of tokens",  # Qwen4-Exp
    ".ngram_embedding": "it looks up several n-grams a token",  # Qwen4-Exp
    ".qkv_proj.v_proj_delayed": "it runs once more on the state before the first token",  # Zaya
}
# What stands on a model beside its stack of layers and sees the rows that leave it.
HEADS = ("lm_head", "score", "classifier", "qa_outputs")


class HookedExperts(nn.Module):
    """What transformers' ``use_experts_implementation`` makes of an experts class. For annotations only: it declares
    the attributes that are read here, and no model has an instance of it."""

    down_proj: torch.Tensor
    act_fn: nn.Module
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class TextScope:
    """The modules whose rows are tokens of the batch, without what lies inside experts modules.

    ``stack``: the name of the PreTrainedModel that holds the token embedding. ``owners``: every PreTrainedModel by
    name. ``experts``: those of the stack.
    """

    stack: str
    owners: Mapping[str, PreTrainedModel]
    experts: Mapping[str, HookedExperts]
    modules: Mapping[str, nn.Module]

    @classmethod
    def of(cls, model: PreTrainedModel, hooked: Mapping[str, HookedExperts]) -> TextScope:
        """What belongs to the text stack itself, and the heads of the models around it. ``hooked``: all experts."""
        owners = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
        stack = _text_stack(model, owners)
        modules = {
            name: module
            for name, module in model.named_modules()
            if _why_other_rows(owners, stack, name) is None and innermost(hooked, name) is None
        }
        experts = {name: module for name, module in hooked.items() if innermost(owners, name) == stack}
        return cls(stack=stack, owners=owners, experts=experts, modules=modules)

    def why_not(self, name: str) -> str | None:
        """Why the rows of a module are not known to be the tokens'; None where they are."""
        return _why_other_rows(self.owners, self.stack, name)

    def why_shared(self, name: str) -> str | None:
        """Why the rows of an experts module are not known to be all tokens: others stand in the same layer."""
        layer = _layer_of(name)
        others = [other for other in self.experts if other != name and _layer_of(other) == layer]
        if not layer or not others:
            return None
        return (
            f"shares its layer with '{others[0]}': each of them sees a part of the tokens (those of one modality, "
            "say), and which adapter a row of such a part uses cannot be told"
        )


def _text_stack(model: PreTrainedModel, owners: Mapping[str, PreTrainedModel]) -> str:
    """The innermost PreTrainedModel around the token embedding; the model itself where it does not tell."""
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return ""
    name = next((name for name, module in model.named_modules() if module is embedding), "")
    return innermost(owners, name) or ""


def _layer_of(name: str) -> str:
    """The part of a module's name up to its last number: the layer that it stands in."""
    return name[: max((match.end() for match in re.finditer(r"(^|\.)\d+(?=\.)", name)), default=0)]


def _why_other_rows(owners: Mapping[str, PreTrainedModel], stack: str, name: str) -> str | None:
    owner = innermost(owners, name) or ""
    if owner == stack:
        return next((reason for end, reason in _OTHER_ROWS.items() if f".{name}".endswith(end)), None)
    if owner and not f"{stack}.".startswith(f"{owner}."):
        return f"belongs to '{owner}' ({type(owners[owner]).__name__}), whose rows are no tokens of the batch"
    head = name.removeprefix(f"{owner}.") if owner else name
    if head in HEADS or head == "":
        return None
    return f"stands outside of the text stack '{stack}', where rows are not known to be the tokens'"


def innermost(prefixes: Container[str], name: str) -> str | None:
    """The longest prefix that is ``name`` or one of its ancestors; the root is the empty name."""
    while name not in prefixes:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name
