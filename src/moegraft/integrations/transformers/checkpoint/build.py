"""transformers builds the model; the experts layers that stay packed are emptied before it loads the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from moegraft.core.errors import CheckpointError
from moegraft.integrations.transformers.host.storage import empty_experts

METHOD = "moegraft"
# Models of more kinds of input first.
_AUTO_CLASSES: tuple[Any, ...] = (AutoModelForMultimodalLM, AutoModelForImageTextToText, AutoModelForCausalLM)


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """``formats``: the experts modules that moegraft keeps packed, and in which of its formats."""

    def __init__(self, formats: Mapping[str, str] | None = None, **_: Any) -> None:
        self.quant_method = METHOD
        self.formats = dict(formats or {})


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """transformers' seam for quantisation methods, used for one thing: to empty modules before weights are loaded."""

    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name in self.quantization_config.formats:
            empty_experts(model.get_submodule(name))
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """The packed weights are no parameters: a saved model would be without its experts."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config without what it says of quantisation: the model of the unquantised checkpoint."""
    for holder in {id(one): one for one in (config, config.get_text_config())}.values():
        for key in ("quantization_config", "compression_config"):
            if hasattr(holder, key):
                delattr(holder, key)
    return config


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that builds and loads the model of a config, with all parts that the config describes.

    What the config names as its architecture; otherwise, of a config with towers the model that has them. For
    Qwen3.5-MoE transformers knows a text model under the same config: it would take no images.
    """
    found = [auto for auto in _AUTO_CLASSES if type(config) in auto._model_mapping]
    named = [auto for auto in found if _model_name(auto, config) in (config.architectures or ())]
    if config.get_text_config() is config:
        found.reverse()
    return (*named, *found, AutoModelForCausalLM)[0]


def _model_name(auto: Any, config: PreTrainedConfig) -> str:
    model_class = auto._model_mapping[type(config)]
    name: str = (model_class[0] if isinstance(model_class, tuple) else model_class).__name__
    return name


def hollow_structure(config: PreTrainedConfig, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model on the meta device: its modules and shapes, no weights. ``dtype``: by default the config's.

    Raises ValueError where transformers has no model for the config.
    """
    options = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config, **options)
    return model


def build_model(
    structure: PreTrainedModel, packed: PackedConfig, state: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> PreTrainedModel:
    """A model of the class and config of ``structure`` from the weights that are not packed, in eval mode.

    ``state`` has the names of the checkpoint; transformers renames and fuses as it does for any checkpoint. Raises
    CheckpointError for a tensor of the model that is not in ``state``, and for one of ``state`` that the model lacks.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of keys is turned into an error below
    try:
        model, info = type(structure).from_pretrained(
            None,
            config=structure.config,
            state_dict=dict(state),
            dtype=dtype,
            quantization_config=packed,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
        )
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"transformers cannot load what stands beside the experts: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    _check_complete(model, structure, info)
    return model.requires_grad_(False)


def _check_complete(model: PreTrainedModel, structure: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """``info``: what transformers says of the loading. Its version 5.17 compares no shapes beside a quantiser."""
    for key, what in (
        ("mismatched_keys", "has another shape than in the model"),
        ("missing_keys", "is missing in the checkpoint"),
        ("unexpected_keys", "has no place in the model"),
    ):
        names = sorted(item if isinstance(item, str) else item[0] for item in info[key])
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(f"tensor {names[0]} {what} ({type(model).__name__}){more}")
    shapes = {name: tuple(tensor.shape) for name, tensor in structure.state_dict().items()}
    for name, tensor in model.state_dict().items():
        found = tuple(tensor.shape)
        if found != shapes[name]:
            raise CheckpointError(
                f"tensor {name} has another shape than in the model: found {found}, expected {shapes[name]}"
            )
