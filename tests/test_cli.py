"""The command line, on the demo's own checkpoint (trained shortly) and on tiny models of other families."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.adapters import FIXTURES
from support.families import build
from support.family_adapters import save_replacements
from typer.testing import CliRunner, Result

import moegraft
from moegraft.cli import demo as demo_module
from moegraft.cli.app import app
from moegraft.cli.compare import LOGIT_TOLERANCE, Agreement, MixedBatch, compare
from moegraft.cli.corpus import FACTS, STYLES
from moegraft.cli.demo import run_demo
from moegraft.cli.loading import encode_prompts, load_model, load_tokenizer
from moegraft.cli.structure import hollow_model
from moegraft.integrations.transformers.host.targets import discover_targets

QUESTION = "what does the owl say?"
# Enough for the base to know its facts and for the adapters to leave it; the demo itself trains them to the end.
STEPS = 45


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def run_json(*args: object) -> Any:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def assert_refused(result: Result, *words: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr with the words."""
    assert result.exit_code == 2
    assert result.stdout == ""
    *_, line = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in line


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The demo's JSON, whatever it found; ``kept_in`` has its checkpoint and adapters; ``record`` is what it prints."""
    records = []

    def run_and_keep(*args: Any, **kwargs: Any) -> Any:
        records.append(run_demo(*args, **kwargs))
        return records[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "run_demo", run_and_keep)
        result = run("demo", "--keep", tmp_path_factory.mktemp("demo"), "--max-steps", STEPS, "--json")
    found: dict[str, Any] = json.loads(result.stdout)
    return {**found, "record": records[0]}


@pytest.fixture(scope="module")
def folder(demo: dict[str, Any]) -> Path:
    return Path(demo["kept_in"])


def adapter_options(folder: Path) -> list[str]:
    return [f"--adapter={name}={folder / name}" for name in STYLES]


def test_demo_answers_and_agrees(demo: dict[str, Any]) -> None:
    rows = demo["rows"]
    assert [row["adapter"] for row in rows] == [None, *STYLES] * (len(rows) // 4)
    for base, *adapted in (rows[i : i + 4] for i in range(0, len(rows), 4)):
        assert base["answer"] == base["expected"]
        assert base["answer"] not in [row["answer"] for row in adapted]
    comparison = demo["comparison"]
    for found in (comparison["alone"], comparison["peft"]):
        assert found["rows_equal"] == found["rows"] == len(rows)
        assert 0 <= found["logit_difference"] <= LOGIT_TOLERANCE
    assert comparison["base_rows_unchanged"]
    assert demo["is_exact"]
    assert min(demo["speed"]["base"], demo["speed"]["mixed"]) > 0
    assert {name: loaded["ranks"] for name, loaded in demo["adapters"].items()} == {
        "shout": [8],
        "pirate": [6],
        "json": [4],
    }


def test_comparison_sees_swapped_adapters(folder: Path, tmp_path: Path) -> None:
    for name, real in {"base": "base", "shout": "pirate", "pirate": "shout"}.items():
        (tmp_path / name).symlink_to(folder / real)
    tokenizer = load_tokenizer(folder / "base")
    questions = encode_prompts(tokenizer, [QUESTION] * 3)
    names = (None, "shout", "pirate")
    with moegraft.attach(load_model(folder / "base", device="cpu"), adapter_memory="64MiB") as graft:
        for name in names[1:]:
            graft.load_adapter(folder / name, name=name)
        batch = MixedBatch(
            names=names,
            prompt_ids=questions["input_ids"],
            prompt_mask=questions["attention_mask"],
            ids=graft.generate(**questions, adapters=names, max_new_tokens=12, do_sample=False),
            pad=tokenizer.pad_token_id,
        )
        right = compare(graft, batch, folder, lambda: None)
        swapped = compare(graft, batch, tmp_path, lambda: None)
    assert right.is_exact
    assert swapped.alone.is_exact
    assert not swapped.is_exact
    assert swapped.peft.rows_equal == 1
    assert swapped.peft.logit_difference > 0.1


@pytest.mark.parametrize(
    "agreement",
    [
        Agreement(rows=2, rows_equal=1, logit_difference=0.0),
        Agreement(rows=2, rows_equal=2, logit_difference=2 * LOGIT_TOLERANCE),
        Agreement(rows=2, rows_equal=2, logit_difference=float("nan")),
    ],
)
def test_disagreement_is_not_exact(agreement: Agreement) -> None:
    assert not agreement.is_exact


def test_demo_shows_its_tables_and_fails_where_rows_differ(
    demo: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = demo["record"]
    monkeypatch.setattr(demo_module, "run_demo", lambda *_, **__: dataclasses.replace(real, is_exact=True))
    result = run("demo")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("base", *STYLES, "tokens/s"))
    monkeypatch.setattr(demo_module, "run_demo", lambda *_, **__: dataclasses.replace(real, is_exact=False))
    assert run("demo").exit_code == 1


def test_demo_keeps_out_of_used_folders(folder: Path) -> None:
    assert_refused(run("demo", "--keep", folder), "not empty")


def test_styles_differ_from_the_plain_answer_and_from_each_other() -> None:
    for fact in FACTS:
        assert len({fact.plain, *(style(fact) for style in STYLES.values())}) == 1 + len(STYLES)


def test_generate_asks_base_and_every_adapter(folder: Path) -> None:
    prompts = [QUESTION, "what is the capital of peru?"]
    options = [f"--prompt={prompt}" for prompt in prompts]
    answers = run_json("generate", folder / "base", *adapter_options(folder), *options, "--max-new-tokens", 16)
    rows = answers["rows"]
    assert [(row["prompt"], row["adapter"]) for row in rows] == [(p, a) for p in prompts for a in (None, *STYLES)]
    assert [row["text"] for row in rows if row["adapter"] is None] == [
        "the owl says hoot.",
        "the capital of peru is lima.",
    ]
    assert len({row["text"] for row in rows[:4]}) > 1

    used = ("--use", "shout,base")
    pair = run_json("generate", folder / "base", *adapter_options(folder), *options, *used, "--max-new-tokens", 16)
    assert [row["text"] for row in pair["rows"]] == [rows[1]["text"], rows[4]["text"]]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("--tp", 2), marks=pytest.mark.soak),
        ("--ep", 2, "--data-parallel", "--dispatch", "all_gather"),
    ],
)
def test_generate_on_ranks_of_its_own(folder: Path, layout: tuple[object, ...]) -> None:
    options = [*adapter_options(folder), "--prompt", QUESTION, "--dtype", "float32", "--device", "cpu"]
    alone = run_json("generate", folder / "base", *options, "--max-new-tokens", 6)
    ranks = run_json("generate", folder / "base", *options, "--max-new-tokens", 6, *layout)
    assert ranks["rows"] == alone["rows"]


def test_generate_ends_where_a_rank_fails(folder: Path) -> None:
    options = ["--adapter", "a=no-such-folder", "--prompt", QUESTION, "--device", "cpu"]
    assert_refused(run("generate", folder / "base", *options, "--ep", 2), "rank 0 of 2: ", "no-such-folder")


def test_generate_prints_a_table(folder: Path) -> None:
    result = run("generate", folder / "base", "--prompt", QUESTION, "--dtype", "float32", "--device", "cpu")
    assert result.exit_code == 0
    assert "hoot" in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--adapter", "shout"], ["NAME=PATH"]),
        (["--adapter", "base=x"], ["base"]),
        (["--adapter", "a=no-such-folder"], ["no-such-folder"]),
        (["--use", "shout"], ["shout", "known: base"]),
        (["--use", "base,base"], ["2 names for 1 prompts"]),
        (["--dtype", "int3"], ["int3", "bfloat16"]),
        (["--fully-sharded"], ["--fully-sharded without --tp"]),
        (["--ep", "1", "--data-parallel"], ["--data-parallel without --ep"]),
        (["--device", "nowhere"], ["nowhere"]),
    ],
)
def test_generate_refuses(folder: Path, options: list[str], words: list[str]) -> None:
    assert_refused(run("generate", folder / "base", "--prompt", QUESTION, *options), *words)


def test_generate_refuses_what_is_no_size_or_no_model(folder: Path) -> None:
    result = run("generate", folder / "base", "--prompt", QUESTION, "--adapter-memory", "lots")
    assert result.exit_code == 2
    assert "lots" in result.stderr
    assert_refused(run("generate", folder, "--prompt", QUESTION), str(folder))


def test_inspect_alone_and_with_its_base(folder: Path) -> None:
    alone = run_json("inspect", folder / "json")
    assert alone["ok"]
    assert (alone["r"], alone["use_rslora"], alone["tensors_in_file"]) == (4, True, 32)
    assert {module["target"] for module in alone["modules"]} == {None}

    fitted = run_json("inspect", folder / "json", "--base", folder / "base")
    assert fitted["ok"]
    ranks = {module["target"]: module["ranks"] for module in fitted["modules"]}
    assert ranks["model.layers.3.mlp.experts"] == {"gate_up": 4, "down": 4}
    assert ranks["model.layers.0.self_attn.q_proj"] == {"lora": 4}

    shown = run("inspect", folder / "json", "--base", folder / "base")
    assert shown.exit_code == 0
    assert "Would be applied" in shown.stdout


def test_inspect_names_what_is_wrong(folder: Path) -> None:
    wrong_base = run("inspect", FIXTURES / "v4_dsv3" / "adapter", "--base", folder / "base")
    assert wrong_base.exit_code == 1
    assert "shared_experts" in wrong_base.stdout
    assert "more like it" in wrong_base.stdout

    missing = run("inspect", folder / "no-such-adapter", "--json")
    assert missing.exit_code == 1
    found = json.loads(missing.stdout)
    assert not found["ok"]
    assert "no-such-adapter" in found["problems"][0]


def test_inspect_takes_dora_without_weights(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "base")
    adapter = save_replacements("qwen3_moe", tmp_path / "dora")
    found = run_json("inspect", adapter.path, "--base", tmp_path / "base")
    assert found["use_dora"]
    assert found["ok"], found["problems"]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3", "hunyuan_v1_moe"])
def test_hollow_model_has_the_targets_of_the_real_one(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.config.save_pretrained(tmp_path)
    hollow = hollow_model(tmp_path)
    assert all(parameter.untyped_storage().nbytes() <= 8 for parameter in hollow.parameters())
    expected, found = discover_targets(model), discover_targets(hollow)
    assert (found.experts, found.embeddings) == (expected.experts, expected.embeddings)
    assert list(found.linears) == list(expected.linears)
    for name, linear in expected.linears.items():
        assert dataclasses.replace(found.linears[name], weight=None) == dataclasses.replace(linear, weight=None)
    assert _shapes(found.saveable) == _shapes(expected.saveable)


def _shapes(saveable: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    return {
        module: {name: tuple(tensor.shape) for name, tensor in tensors.items()} for module, tensors in saveable.items()
    }


def test_explain_says_what_attach_says(tmp_path: Path) -> None:
    model = build("gpt_oss")
    model.save_pretrained(tmp_path)
    with moegraft.attach(model, adapter_memory="1MiB") as graft:
        expected = graft.explain()
    choices = run_json("explain", tmp_path, "--device", "cpu")["choices"]
    assert choices == json.loads(json.dumps([dataclasses.asdict(choice) for choice in expected]))
    shown = run("explain", tmp_path, "--device", "cpu")
    assert shown.exit_code == 0
    assert choices[0]["backend"] in shown.stdout


def test_explain_says_what_each_rank_would_keep(tmp_path: Path) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    shares = run_json("explain", tmp_path, "--device", "cpu", "--tp", 2, "--ep", 2)["shares"]
    assert [share["rank"] for share in shares] == [0, 1, 2, 3] * 2
    assert [share["experts"] for share in shares[:4]] == [[0, 1, 2]] * 2 + [[3, 4]] * 2
    assert [share["columns"] for share in shares[:4]] == [[0, 12], [12, 24]] * 2
    experts = [module for name, module in model.named_modules() if name.endswith("mlp.experts")]
    held = sum(parameter.nbytes for module in experts for parameter in module.parameters())
    assert sum(share["num_bytes"] for share in shares) == held
    shown = run("explain", tmp_path, "--device", "cpu", "--ep", 2).stdout
    assert "What each rank keeps" in shown
    assert "3 to 4" in shown


def test_explain_refuses_unknown_models(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(run("explain", tmp_path / "empty"), "empty")


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from moegraft.cli.app import app; from typer.testing import CliRunner; "
        "assert 'explain' in CliRunner().invoke(app, ['--help']).stdout; "
        "sys.exit(', '.join(sorted({'torch', 'transformers', 'peft'} & sys.modules.keys())) or None)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_absent_package_is_one_line() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; from moegraft.cli.app import app; "
        "sys.argv = ['moegraft', 'explain', '.']; app()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: transformers is not installed: pip install 'moegraft[demo]'\n"
