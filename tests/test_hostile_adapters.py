from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from support.families import build
from support.hostile import FAMILY, HostileCase, good_adapter, hostile_cases

from moegraft.core.errors import AdapterError, AdapterFileError
from moegraft.files import limits
from moegraft.integrations.transformers.host.targets import discover_targets
from moegraft.lora.peft import inspect_peft_adapter, load_peft_adapter
from moegraft.lora.targets import ModelTargets

MAX_MESSAGE = 2000


@pytest.fixture(scope="module")
def targets() -> ModelTargets:
    return discover_targets(build(FAMILY))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[HostileCase]:
    return list(hostile_cases(tmp_path_factory.mktemp("hostile")))


def test_the_adapter_that_the_cases_damage_loads(targets: ModelTargets, tmp_path: Path) -> None:
    _, report = load_peft_adapter(good_adapter(tmp_path), targets, dtype=torch.float32)
    assert report.tensors_applied == report.tensors_in_file == 18


def test_every_case_ends_in_its_error(cases: list[HostileCase], targets: ModelTargets) -> None:
    assert len(cases) >= 300
    wrong = []
    for case in cases:
        try:
            load_peft_adapter(case.path, targets, dtype=torch.float32)
        except AdapterError as error:
            message = str(error)
            missing = [text for text in case.must_mention if text not in message]
            if type(error) is not case.error_type or missing or len(message) > MAX_MESSAGE:
                wrong.append(f"{case.name}: {type(error).__name__}: {message[:300]} (missing {missing})")
        else:
            wrong.append(f"{case.name}: loaded")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("with_targets", [False, True])
def test_inspection_never_raises(cases: list[HostileCase], targets: ModelTargets, with_targets: bool) -> None:
    for case in cases:
        inspection = inspect_peft_adapter(case.path, targets if with_targets else None)
        assert not with_targets or not inspection.ok, case.name
        assert all(len(problem) <= MAX_MESSAGE for problem in inspection.problems), case.name


def test_more_tensors_than_an_adapter_may_have(
    targets: ModelTargets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no base says how many there could be."""
    path = good_adapter(tmp_path)  # 18 tensors
    for most, is_right in ((18, True), (17, False)):
        monkeypatch.setattr(limits, "MAX_ADAPTER_TENSORS", most)
        problems = inspect_peft_adapter(path).problems
        assert any("18 tensors, expected at most 17" in problem for problem in problems) is not is_right
    with pytest.raises(AdapterFileError, match="18 tensors, expected at most 17"):
        load_peft_adapter(path, targets, dtype=torch.float32)


def test_random_damage_is_an_adapter_error_or_harmless(targets: ModelTargets, tmp_path: Path) -> None:
    """Bytes flipped anywhere in either file: it loads, or it is refused; nothing else ever escapes."""
    rng = random.Random(5)
    folder = good_adapter(tmp_path)
    originals = {file: file.read_bytes() for file in folder.iterdir()}
    refused = 0
    for _ in range(400):
        file = rng.choice(sorted(originals))
        content = bytearray(originals[file])
        limit = min(len(content), 3000)  # the headers, where a byte says something
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(limit)] = rng.randrange(256)
        file.write_bytes(content)
        try:
            load_peft_adapter(folder, targets, dtype=torch.float32)
        except AdapterError:
            refused += 1
        file.write_bytes(originals[file])
    assert refused > 300
