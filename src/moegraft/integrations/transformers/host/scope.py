"""Which modules of a transformers model see the rows of its tokens, each token once and in order.

Only there is it known which adapter a row uses. What is not known to be of that kind is left out, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from moegraft.integrations.transformers.host.storage import HostExperts

# Modules of a text stack that see other rows than the tokens', by the end of their names: why adapters may not touch
# them. tests/test_families.py looks for them in every family that transformers has.
_OTHER_ROWS: Mapping[str, str] = {
    ".compressor.kv_norm": "runs on states pooled over blocks of tokens",  # DeepSeek-V4
    ".compressor.indexer.kv_norm": "runs on keys pooled over blocks of tokens",  # DeepSeek-V4
    ".indexer.k_layernorm": "runs on keys pooled over blocks of tokens",  # Qwen4-Exp
    ".qkv_proj.v_proj_delayed": "runs once more on the state before the first token",  # Zaya
}
# What stands on a model beside its stack of layers and sees the rows that leave it.
HEADS = ("lm_head", "score", "classifier", "qa_outputs")


@dataclass(frozen=True, kw_only=True)
class TextScope:
    """The modules whose rows are tokens of the batch, without what lies inside experts modules.

    ``stack``: the name of the PreTrainedModel that holds the token embedding. ``decoder``: of the one whose rows the
    heads see. ``owners``: every PreTrainedModel by name. ``experts``: those of the stack.
    """

    stack: str
    decoder: str
    owners: Mapping[str, PreTrainedModel]
    experts: Mapping[str, HostExperts]
    modules: Mapping[str, nn.Module]

    @classmethod
    def of(cls, model: PreTrainedModel, hooked: Mapping[str, HostExperts]) -> TextScope:
        """What belongs to the text stack itself, and the heads of the models around it. ``hooked``: all experts."""
        names = {id(module): name for name, module in model.named_modules()}
        owners = {names[id(part)]: part for part in model.modules() if isinstance(part, PreTrainedModel)}
        stack = innermost(owners, names.get(id(_token_embedding(model)), "")) or ""
        decoder = names.get(id(model.get_decoder()), "")
        scope = cls(
            stack=stack,
            decoder=decoder,
            owners=owners,
            experts={name: module for name, module in hooked.items() if innermost(owners, name) == stack},
            modules={},
        )
        modules = {
            name: module
            for name, module in model.named_modules()
            if scope.why_not(name) is None and innermost(hooked, name) is None
        }
        return replace(scope, modules=modules)

    def why_not(self, name: str) -> str | None:
        """Why the rows of a module are not known to be the tokens'; None where they are."""
        owner = innermost(self.owners, name) or ""
        if owner == self.stack:
            return next((reason for end, reason in _OTHER_ROWS.items() if f".{name}".endswith(end)), None)
        if owner and not _is_within(self.stack, owner):
            return f"belongs to '{owner}' ({type(self.owners[owner]).__name__}), whose rows are no tokens of the batch"
        if name == owner:
            return None
        if name.removeprefix(f"{owner}.") not in HEADS:
            return f"stands outside of the text stack '{self.stack}', where rows are not known to be the tokens'"
        if not _is_within(self.stack, self.decoder):
            return f"stands on '{self.decoder}', whose rows are no tokens of the batch"
        return None

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


def _token_embedding(model: PreTrainedModel) -> nn.Module | None:
    """None where the model does not tell."""
    try:
        embedding: nn.Module = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return embedding


def _is_within(name: str, ancestor: str) -> bool:
    return not ancestor or f"{name}.".startswith(f"{ancestor}.")


def _layer_of(name: str) -> str:
    """The part of a module's name up to its last number: the layer that it stands in."""
    return name[: max((match.end() for match in re.finditer(r"(^|\.)\d+(?=\.)", name)), default=0)]


def innermost(prefixes: Container[str], name: str) -> str | None:
    """The longest prefix that is ``name`` or one of its ancestors; the root is the empty name."""
    while name not in prefixes:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name
