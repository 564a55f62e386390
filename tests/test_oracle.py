"""The oracle: which class serves a request, and a reason for every one that does not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from moegraft.build import build_fused_moe
from moegraft.core.config import BackendRequest, DeviceTarget, MoEConfig
from moegraft.core.errors import NoBackendError
from moegraft.formats import FORMAT_NAMES
from moegraft.formats.base import DenseExperts
from moegraft.lora.context import LoRAExpertsMixin, MoELoRAContext
from moegraft.moe.experts import FusedMoEExpertsModular
from moegraft.moe.layer import ExpertsOutput, PreparedRows
from moegraft.oracle import Decision, select_experts
from moegraft.oracle.select import EXPERTS_CLASSES

CPU = DeviceTarget(kind="cpu")


class _Experts(FusedMoEExpertsModular):
    @classmethod
    def is_supported_config(cls, request: BackendRequest) -> tuple[bool, str]:
        return True, ""

    def apply(self, rows: PreparedRows, lora_context: MoELoRAContext | None = None, **memory: Any) -> ExpertsOutput:
        raise AssertionError("the oracle runs nothing")


class BaseOnly(_Experts):
    pass


class Monolithic(LoRAExpertsMixin, _Experts):
    is_monolithic = True


class SmallOnly(LoRAExpertsMixin, _Experts):
    @classmethod
    def is_supported_config(cls, request: BackendRequest) -> tuple[bool, str]:
        return request.config.num_experts <= 4, f"it holds 4 experts, the layer has {request.config.num_experts}"


class OneRankOnly(LoRAExpertsMixin, _Experts):
    @classmethod
    def is_supported_config(cls, request: BackendRequest) -> tuple[bool, str]:
        one_rank = request.tp_size == request.ep_size == 1
        return one_rank, f"it runs on one rank, asked for tp {request.tp_size}, ep {request.ep_size}"


class General(LoRAExpertsMixin, _Experts):
    pass


ALL = (BaseOnly, Monolithic, SmallOnly, General)


def request(
    *,
    num_experts: int = 8,
    lora: bool = True,
    touched: bool = True,
    ep_size: int = 1,
    tp_size: int = 1,
    format_name: str = "dense",
) -> BackendRequest:
    config = MoEConfig(num_experts=num_experts, top_k=2, hidden_size=16, intermediate_size=8)
    return BackendRequest(
        config=config,
        device=CPU,
        format_name=format_name,
        lora=lora,
        adapters_touch_experts=touched,
        ep_size=ep_size,
        tp_size=tp_size,
    )


def reasons(decision: Decision) -> dict[str, str]:
    return {rejection.backend: rejection.reason for rejection in decision.rejections}


def test_every_class_is_chosen_or_has_a_reason() -> None:
    decision = select_experts(request(), classes=ALL)
    assert decision.experts_cls is General
    assert decision.backend == "General"
    assert reasons(decision) == {
        "BaseOnly": "it does not take LoRA",
        "Monolithic": "it is monolithic: no delta can be added inside",
        "SmallOnly": "it holds 4 experts, the layer has 8",
    }


def test_the_order_decides() -> None:
    decision = select_experts(request(num_experts=4), classes=ALL)
    assert decision.backend == "SmallOnly"
    assert reasons(decision)["General"] == "SmallOnly comes first in the order of preference"


def test_without_lora_all_may_serve() -> None:
    decision = select_experts(request(lora=False), classes=ALL)
    assert decision.backend == "BaseOnly"
    assert set(reasons(decision)) == {"Monolithic", "SmallOnly", "General"}


def test_adapters_that_touch_no_expert_leave_the_fastest_class() -> None:
    """Attention adapters on a model whose experts class takes no LoRA: nothing is asked of it."""
    assert select_experts(request(touched=False), classes=ALL).backend == "BaseOnly"
    assert select_experts(request(touched=False, ep_size=2), backend="BaseOnly", classes=ALL).backend == "BaseOnly"
    assert select_experts(request(touched=True), classes=ALL).backend == "General"


def test_a_layer_built_for_adapters_that_touch_no_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moegraft.build.layers.select_experts", partial(select_experts, classes=ALL))
    config = MoEConfig(num_experts=2, top_k=1, hidden_size=4, intermediate_size=4)
    weights = DenseExperts(w13=torch.zeros(2, 8, 4), w2=torch.zeros(2, 4, 4))
    _, decision = build_fused_moe(config, weights, lora_experts=False)
    assert decision.backend == "BaseOnly"
    _, decision = build_fused_moe(config, weights)
    assert decision.backend == "SmallOnly"


def test_a_monolithic_class_cannot_be_dispatched_to() -> None:
    classes = (Monolithic, General)
    decision = select_experts(request(touched=False, ep_size=4), classes=classes)
    assert decision.backend == "General"
    assert reasons(decision)["Monolithic"].startswith("it is monolithic: rows cannot be sent to 4 ranks")
    assert select_experts(request(touched=False, tp_size=4), classes=classes).backend == "Monolithic"


def test_parallelism_reaches_the_classes() -> None:
    decision = select_experts(request(tp_size=2, ep_size=2), classes=(OneRankOnly, General))
    assert decision.backend == "General"
    assert reasons(decision)["OneRankOnly"] == "it runs on one rank, asked for tp 2, ep 2"
    assert select_experts(request(), classes=(OneRankOnly, General)).backend == "OneRankOnly"


def test_a_class_by_name() -> None:
    decision = select_experts(request(num_experts=4), backend="General", classes=ALL)
    assert decision.backend == "General"
    assert reasons(decision)["SmallOnly"] == "General was asked for by name"


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        ("Monolithic", "^Monolithic cannot serve dense experts on cpu: it is monolithic"),
        ("BaseOnly", "^BaseOnly cannot serve dense experts on cpu: it does not take LoRA$"),
        ("SmallOnly", "^SmallOnly cannot serve dense experts on cpu: it holds 4 experts, the layer has 8"),
        ("Unheard", "no backend is called 'Unheard'; there are BaseOnly, Monolithic, SmallOnly, General"),
    ],
)
def test_a_name_that_cannot_serve(backend: str, why: str) -> None:
    with pytest.raises(NoBackendError, match=why):
        select_experts(request(), backend=backend, classes=ALL)


def test_when_none_serves_the_message_holds_every_reason() -> None:
    with pytest.raises(NoBackendError) as error:
        select_experts(request(), classes=ALL[:3])
    message = str(error.value)
    assert "dense experts on cpu" in message
    for cls in ALL[:3]:
        assert f"{cls.__name__}: it " in message


class TestRegistry:
    def test_no_two_classes_share_a_name(self) -> None:
        assert len({cls.__name__ for cls in EXPERTS_CLASSES}) == len(EXPERTS_CLASSES)

    @pytest.mark.parametrize("cls", EXPERTS_CLASSES, ids=lambda cls: cls.__name__)
    def test_a_strange_format_is_refused_in_words(self, cls: type[FusedMoEExpertsModular]) -> None:
        ok, reason = cls.is_supported_config(request(format_name="papyrus"))
        assert not ok
        assert reason

    @pytest.mark.parametrize("format_name", FORMAT_NAMES)
    def test_every_format_is_served_on_every_device(self, format_name: str) -> None:
        for device in (CPU, DeviceTarget(kind="cuda", capability=(7, 0)), DeviceTarget(kind="mps")):
            asked = replace(request(format_name=format_name), device=device)
            assert select_experts(asked).backend == "TorchExperts"

    def test_the_cpu_is_served(self) -> None:
        decision = select_experts(request())
        assert decision.backend == "TorchExperts"
        assert len(decision.rejections) == len(EXPERTS_CLASSES) - 1
        assert all(rejection.reason for rejection in decision.rejections)

    def test_nothing_is_touched(self) -> None:
        """Pure data: a device that this machine does not have can be asked for."""
        target = DeviceTarget(kind="cuda", capability=(9, 0), has_triton=False)
        config = MoEConfig(num_experts=8, top_k=2, hidden_size=16, intermediate_size=8, dtype=torch.bfloat16)
        decision = select_experts(BackendRequest(config=config, device=target))
        assert decision.backend == "TorchExperts"
        assert str(decision.request.device) == "cuda sm90"
