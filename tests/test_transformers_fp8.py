"""fp8 checkpoints as transformers itself loads them: FP8Experts behind a registry of their own, FP8Linear beside them.

transformers keeps fp8 weights on GPUs only, and runs FP8Linear with kernels that it downloads. Here its check of the
device is taken out, and a product in plain torch stands in for the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from support.adapters import TensorFactory, save_with_peft, write_adapter
from support.checkpoints import QuantisedCheckpoint, write_checkpoint
from support.families import FAMILIES, build
from support.fp8_truth import Rows, fp8_logits
from support.mixed import EXPERTS, random_ids
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import finegrained_fp8
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import moegraft
from moegraft.core.errors import UnsupportedModelError
from moegraft.integrations.transformers.host.storage import HostExperts
from moegraft.integrations.transformers.host.targets import discover_targets, experts_targets
from moegraft.lora.peft import load_peft_adapter
from moegraft.testing import assert_close_delta, relative_error

pytestmark = pytest.mark.usefixtures("one_thread", "no_gpu_needed")

# A sum in another order now and then rounds one activation to the next of 8 bits, which is 1/16 away from it.
TOL = 2e-2


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def matmul(
        x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block: list[int], dtype: torch.dtype, **_: object
    ) -> torch.Tensor:
        spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        return (x.float() @ (weight.float() * spread).T).to(dtype)

    kernel = SimpleNamespace(matmul=matmul)
    monkeypatch.setattr(finegrained_fp8, "load_finegrained_fp8_kernel", lambda: kernel)
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> QuantisedCheckpoint:
    return write_checkpoint("fp8 blocks", tmp_path_factory.mktemp("fp8"))


def load(checkpoint: QuantisedCheckpoint) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    kinds = {type(module) for module in model.modules()}
    assert FP8Linear in kinds
    assert any(issubclass(kind, FP8Experts) for kind in kinds)
    return model


def test_mixed_batch(checkpoint: QuantisedCheckpoint, tmp_path: Path) -> None:
    names = ("everything", None, "dora", "part")
    ids, targets = random_ids(len(names), 5), discover_targets(checkpoint.dense)
    configs = {
        "everything": LoraConfig(
            r=3, target_modules=["q_proj", "o_proj"], target_parameters=[*EXPERTS, "mlp.gate.weight"]
        ),
        "dora": LoraConfig(r=2, use_dora=True, target_modules=["k_proj", "o_proj"]),
    }
    for name, config in configs.items():
        save_with_peft(checkpoint.dense, config, tmp_path / name, ids)
    factory, legacy = TensorFactory(seed=3), FAMILIES["qwen3_moe"].legacy
    assert legacy is not None
    experts_name, target = next(iter(targets.experts.items()))
    factory.expert(experts_name, 2, target, legacy)
    write_adapter(tmp_path / "part", factory.tensors, target_modules=["gate_proj", "up_proj", "down_proj"])

    model = load(checkpoint)
    implementation, parameters = model.get_experts_implementation(), dict(model.named_parameters())
    with moegraft.attach(model, adapter_memory="8MiB") as graft:
        assert {(c.format_name, c.kept_by) for c in graft.explain()} == {("fp8", "transformers")}
        assert graft.bank.layout.dtype is torch.float32
        for name in (*configs, "part"):
            graft.load_adapter(tmp_path / name)
        found = graft(input_ids=ids, adapters=names).logits
        plain = graft(input_ids=ids).logits
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
        tokens = graft.generate(input_ids=ids, adapters=names, **options)
        alone = graft.generate(input_ids=ids, adapters=["dora"] * len(names), **options)
    assert torch.equal(tokens[2], alone[2])
    assert model.get_experts_implementation() == implementation
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())

    base = fp8_logits(checkpoint.dense, targets, None, Rows(128), input_ids=ids)
    assert relative_error(plain, base) <= TOL
    for i, name in enumerate(names):
        if name is None:
            assert torch.equal(found[i], plain[i])
        else:
            weights, _ = load_peft_adapter(tmp_path / name, targets, dtype=torch.float32)
            truth = fp8_logits(checkpoint.dense, targets, weights, Rows(128), input_ids=ids)
            assert_close_delta(found[i], plain[i], truth[i], base[i], TOL)


def test_bfloat16_activations_give_bfloat16_adapters(checkpoint: QuantisedCheckpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.bfloat16)
    with moegraft.attach(model, adapter_memory="1MiB") as graft:
        assert graft.bank.layout.dtype is torch.bfloat16
        assert graft(input_ids=random_ids()).logits.dtype is torch.bfloat16


def test_gradients_go_through_transformers_itself(checkpoint: QuantisedCheckpoint) -> None:
    """Outside a batch of adapters, where gradients are wanted; the stand-in reads unquantised activations."""
    ids, model = random_ids(), load(checkpoint)
    model.set_experts_implementation("eager")
    expected = checkpoint.dense(input_ids=ids).logits.detach()
    with moegraft.attach(model, adapter_memory="1MiB") as graft:
        found = model(input_ids=ids).logits
        assert found.requires_grad
        assert relative_error(found.detach(), expected) < 1e-5
        assert relative_error(graft(input_ids=ids).logits, expected) > 1e-3


def test_one_scale_a_matrix_and_static_activations(checkpoint: QuantisedCheckpoint) -> None:
    model = load(checkpoint)
    name, target = next(iter(experts_targets(model).items()))
    module = model.get_submodule(name)
    E, F, D = target.num_experts, target.intermediate_size, target.hidden_size
    module.block_size, module.activation_scheme = None, "static"
    module.gate_up_proj_scale_inv = torch.nn.Parameter(torch.rand(E, 2, 1))
    module.down_proj_scale_inv = torch.nn.Parameter(torch.rand(E, 1, 1))
    for projection in ("gate_up_proj", "down_proj"):
        setattr(module, f"{projection}_activation_scale", torch.nn.Parameter(0.1 * torch.rand(E)))
    weights = HostExperts.of(module).weights()
    w13, w2 = weights.dequantise(torch.float32)
    scale = module.gate_up_proj_scale_inv.detach().repeat_interleave(F, 1)
    torch.testing.assert_close(w13, module.gate_up_proj.detach().float() * scale)
    torch.testing.assert_close(w2, module.down_proj.detach().float() * module.down_proj_scale_inv.detach())
    step = module.gate_up_proj_activation_scale.max()
    x = torch.tensor([[3 * step.item(), 1e6, *[0.0] * (D - 2)]])
    torch.testing.assert_close(weights.quantise_input(x)[0, :2], torch.stack([3 * step, 448 * step]).detach())


def test_mxfp4_in_the_order_of_its_kernels_is_sent_to_our_reader() -> None:
    """What transformers makes of gpt-oss where it finds a GPU and the kernels that it downloads."""
    model = build("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts(model.config)
    with pytest.raises(UnsupportedModelError, match=r"Mxfp4GptOssExperts.*load_quantised"):
        moegraft.attach(model)


def test_refusals_name_module_and_reason(checkpoint: QuantisedCheckpoint) -> None:
    model = load(checkpoint)
    name, module = next((n, m) for n, m in model.named_modules() if isinstance(m, FP8Experts))
    module.block_size = (64, 64)
    with pytest.raises(UnsupportedModelError, match=rf"'{name}'.*blocks of \(64, 64\)"):
        moegraft.attach(model)
    module.down_proj = torch.nn.Parameter(torch.zeros(5, 256, 64, dtype=torch.int8), requires_grad=False)
    assert "torch.int8" in (HostExperts.of(module).unsupported() or "")
