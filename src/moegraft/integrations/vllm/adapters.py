"""What an adapter's file means to PEFT, where vLLM reads it in another way or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.lora.layers import FusedMoE3DWithLoRA
from vllm.lora.lora_weights import LoRALayerWeights

from moegraft.core.errors import AdapterError
from moegraft.files import TensorInfo
from moegraft.lora.peft import fused
from moegraft.lora.peft.config import PeftConfig
from moegraft.lora.peft.names import Projection
from moegraft.lora.targets import ExpertsTarget

if TYPE_CHECKING:
    from vllm.lora.lora_model import LoRAModel

_Sides = tuple[torch.Tensor, torch.Tensor]


def split_fused_experts(
    loras: dict[str, LoRALayerWeights], name: str, names: list[str], layer: Any, config: PeftConfig
) -> None:
    """PEFT's ``target_parameters``, of every version of PEFT: factors of all experts in one tensor, by the rules of
    ``lora.peft.fused``, become what ``layer`` reads: a pair for each of ``names`` (gate, down and up of each expert),
    or gate and up and down in one pair each. Scales are folded already.

    Raises ValueError where the tensors fit neither of the layer's parameters.
    """
    found = {key: loras[key] for key in _fused_keys(loras, name)}
    is_3d = isinstance(layer, FusedMoE3DWithLoRA)
    if not found or layer.enable_moe_shared_loras or not (names or is_3d):
        return
    target = _whole_target(name, layer)
    pairs = [_as_fused(key, lora) for key, lora in found.items()]
    try:
        sides = {
            role: _sides(target, config, role, pair, found[pair.a.name])
            for role, pair in fused.assign_roles(target, config, pairs)
        }
    except AdapterError as error:
        raise ValueError(str(error)) from error
    for key in found:
        del loras[key]
    w13, w2 = (next((sides[role] for role in roles if role in sides), None) for roles in (_W13, (Projection.DOWN,)))
    if is_3d:
        for key, both, sizes in ((f"{name}.base_layer", w13, _W13[0]), (name, w2, Projection.DOWN)):
            loras[key] = _stacked(key, both or _nothing(target, sizes, layer.lora_dtype))
        return
    halves = 2 if target.has_gate else 1
    for number, key in enumerate(names):
        expert, position = divmod(number, halves + 1)  # gate, down, up; or up, down
        both = w2 if position == 1 else w13
        if both is not None:
            a_RI, b_RO = both[0][expert], both[1][expert]
            b_RO = b_RO if position == 1 else b_RO.chunk(halves, dim=1)[position // 2]
            loras[key] = LoRALayerWeights(key, 1, 1, a_RI.contiguous(), b_RO.T.contiguous())


_W13 = (Projection.GATE_UP, Projection.UP)


def _fused_keys(loras: dict[str, LoRALayerWeights], name: str) -> list[str]:
    """Keys of the layer, whatever its block is called (``mlp``, ``block_sparse_moe``): it has the same numbers."""

    def numbers(key: str) -> list[str]:
        return [part for part in key.split(".") if part.isdigit()]

    keys = [key for key, lora in loras.items() if torch.is_tensor(lora.lora_a)]
    ends = ("experts", "base_layer")
    return [
        key
        for key in keys
        if key.endswith(ends) and key.removesuffix(".base_layer").endswith(".experts") and numbers(key) == numbers(name)
    ]


def _whole_target(name: str, layer: Any) -> ExpertsTarget:
    """The layer of all ranks together, as transformers has it, without what vLLM's kernels pad."""
    moe = layer.moe_config
    inner = getattr(moe, "intermediate_size_per_partition_unpadded", None) or layer.intermediate_size_per_partition
    is_turned = getattr(layer, "_base_model", "") == "GptOssForCausalLM"
    return ExpertsTarget(
        name=name,
        num_experts=layer.global_num_experts,
        hidden_size=getattr(moe, "hidden_dim_unpadded", None) or layer.hidden_size,
        intermediate_size=inner * layer.tp_size,
        has_gate=moe.is_act_and_mul,
        is_transposed=is_turned,
        is_interleaved=is_turned,
        w13_param="gate_up_proj" if moe.is_act_and_mul else "up_proj",
    )


def _as_fused(key: str, lora: LoRALayerWeights) -> fused.FusedTensors:
    def info(tensor: torch.Tensor) -> TensorInfo:
        return TensorInfo(
            name=key, file="adapter", dtype=tensor.dtype, shape=tuple(tensor.shape), offset=0, nbytes=tensor.nbytes
        )  # fmt: skip

    module = key.removesuffix(".base_layer")
    return fused.FusedTensors(
        module=module, depth=int(key != module), a=info(lora.lora_a), b=info(lora.lora_b)
    )  # fmt: skip


def _sides(
    target: ExpertsTarget, config: PeftConfig, role: Projection, pair: fused.FusedTensors, lora: LoRALayerWeights
) -> _Sides:
    fused.fused_rank(target, role, pair)
    is_input = fused.a_is_input(target, role, pair)
    if is_input is None:
        is_input = fused.version_a_is_input(config.peft_version, is_transposed=target.is_transposed)
    return fused.split_fused(lora.lora_a, lora.lora_b, num_experts=target.num_experts, a_is_input=is_input)


def _stacked(key: str, both: _Sides) -> LoRALayerWeights:
    """[E * r, in] and [out, r * E], as vLLM has them of PEFT's newest version."""
    a_ERI, b_ERO = both
    b = b_ERO.permute(2, 1, 0).flatten(1).contiguous()
    return LoRALayerWeights(key, 1, 1, a_ERI.flatten(0, 1).contiguous(), b)


def _nothing(target: ExpertsTarget, role: Projection, dtype: torch.dtype) -> _Sides:
    """Rank 1 of zeros, where vLLM wants both parameters."""
    size_in, size_out = fused.sizes(target, role)
    E = target.num_experts
    return torch.zeros(E, 1, size_in, dtype=dtype), torch.zeros(E, 1, size_out, dtype=dtype)


def complete_experts(loras: dict[str, LoRALayerWeights], names: list[str], layer: Any) -> None:
    """Gives every expert all its matrices, as vLLM needs them: of rank 0 where the adapter has none of a projection,
    of zeros where it has those of other experts, padded with zeros where another expert's rank is larger."""
    if not any(name in loras for name in names):
        return
    per_expert = 3 if layer.moe_config.is_act_and_mul else 2
    inner, outer = layer.intermediate_size_per_partition * layer.tp_size, layer.hidden_size
    sizes = ((outer, inner), (inner, outer), (outer, inner))[:per_expert]  # gate, down, up
    for projection, (size_in, size_out) in enumerate(sizes):
        of_projection = names[projection::per_expert]
        rank = max((loras[name].lora_a.shape[0] for name in of_projection if name in loras), default=0)
        for name in of_projection:
            held = loras.get(name)
            if held is not None and held.lora_a.shape[0] == rank:
                continue
            a = torch.zeros(rank, size_in, dtype=layer.lora_dtype)
            b = torch.zeros(size_out, rank, dtype=layer.lora_dtype)
            if held is not None:
                a[: held.lora_a.shape[0]] = held.lora_a
                b[:, : held.lora_b.shape[1]] = held.lora_b
            loras[name] = LoRALayerWeights(name, 1, 1, a, b)


def fold_scales(lora_model: LoRAModel, config: PeftConfig, max_rank: int) -> None:
    """Each module's scale as PEFT has it (rank_pattern, alpha_pattern, rsLoRA), folded into B; vLLM's become 1.

    Raises ValueError where the rank of a module is above ``max_rank``.
    """
    for name, lora in lora_model.loras.items():
        rank, _ = config.rank(name)
        if rank > max_rank:
            raise ValueError(f"the rank of {name} is {rank}, max_lora_rank is {max_rank}")
        lora.lora_b *= config.scale(name, rank)
        lora.rank, lora.lora_alpha, lora.scaling = rank, rank, 1
