"""Results as tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moegraft.cli.console import printable, stdout
from moegraft.core.memory import format_bytes

if TYPE_CHECKING:
    from moegraft.cli.compare import Agreement
    from moegraft.cli.demo import DemoResult
    from moegraft.cli.generate import Answers
    from moegraft.cli.structure import ModelExplanation
    from moegraft.cli.tune import TuneResult
    from moegraft.integrations.transformers.parallel.layout import RankShare
    from moegraft.integrations.vllm.explain import PluginExplanation
    from moegraft.lora.peft import AdapterInspection, ModuleSummary

_LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_WHOLE = (
    "module",
    "layer",
    "rank",
    "experts",
    "columns of F",
    "adapter",
    "kind",
    "ranks",
    "rows of A",
    "modules",
    "size",
    "layers",
)
_DETAIL = re.compile(r"\d+|lora_[AB]|(gate|up|down)_proj|w[123]")


def show_demo(result: DemoResult) -> None:
    """Base and every adapter side by side, then agreement and speed."""
    names = list(dict.fromkeys(row.adapter for row in result.rows))
    lines = []
    for question in dict.fromkeys(row.question for row in result.rows):
        answers = {row.adapter: row.answer for row in result.rows if row.question == question}
        lines.append([Text(question, style="bold"), *(_text(answers[name]) for name in names)])
    _show_table("One mixed batch", ["question", *(name or "base" for name in names)], lines, leading=1)
    right = sum(row.answer == row.expected for row in result.rows)
    speed = result.speed
    stdout.print(
        f"{len(result.rows)} rows in one generate call, {right} of them word for word what the row's adapter (or the "
        "base) was trained to say.",
        highlight=False,
    )
    stdout.print()
    facts = {
        "one by one": _agreement(result.comparison.alone),
        "in PEFT": _agreement(result.comparison.peft),
        "base rows": _base_rows(result),
        "tokens/s": Text(
            f"{speed.base:,.0f} without adapters, {speed.mixed:,.0f} with (x{speed.mixed / speed.base:.2f}); "
            f"batch of {speed.rows} rows"
        ),
    }
    for key, value in facts.items():
        stdout.print(Text(f"{key:<12}", style="bold").append_text(value))
    stdout.print()
    ranks = ", ".join(f"{name} {'/'.join(map(str, loaded.ranks))}" for name, loaded in result.adapters.items())
    stdout.print(
        f"A Qwen3-MoE of {result.parameters / 1e6:.1f}M parameters that knows {result.facts} facts by heart, and "
        f"adapters (ranks: {ranks}) that PEFT trained to say the same facts differently; all saved and loaded back "
        "as any checkpoint. One CPU thread. At this size a step is mostly Python, so speeds say little of real models.",
        style="dim",
        highlight=False,
    )
    where = f", kept in {result.kept_in}" if result.kept_in else ""
    stdout.print(_name(f"{result.seconds:.0f} s in total{where}.", style="dim"))


def _agreement(found: Agreement) -> Text:
    verdict = "equal" if found.is_exact else "DIFFERENT"
    return Text(
        f"{verdict}: same tokens in {found.rows_equal} of {found.rows} rows, logits within "
        f"{found.logit_difference:.1e}",
        style="green" if found.is_exact else "red",
    )


def _base_rows(result: DemoResult) -> Text:
    if result.comparison.base_rows_unchanged:
        return Text("bit for bit as in the batch without adapters", style="green")
    return Text("DIFFERENT from the batch without adapters", style="red")


def show_answers(answers: Answers) -> None:
    """One line a row of the batch."""
    lines, previous = [], None
    for row in answers.rows:
        shown = row.prompt if row.prompt != previous else ""
        lines.append([_text(shown), _name(row.adapter or "base", style="cyan"), _text(row.text)])
        previous = row.prompt
    _show_table("", ["prompt", "adapter", "answer"], lines)
    stdout.print(
        f"batch of {len(answers.rows)}, {answers.tokens_per_second:,.0f} tokens/s", style="dim", highlight=False
    )


def show_inspection(inspection: AdapterInspection, base: Path | None) -> None:
    """The file's facts, its modules with layers folded together, and what is wrong."""
    scale = "rank-stabilised " if inspection.use_rslora else ""
    facts = {
        "folder": inspection.path,
        "PEFT": inspection.peft_version or "unknown version",
        "rank, alpha": f"{_known(inspection.r)}, {_known(inspection.lora_alpha)} {scale}".strip()
        + (", DoRA" if inspection.use_dora else ""),
        "tensors": f"{inspection.tensors_in_file} ({', '.join(inspection.dtypes) or 'none'}), "
        + format_bytes(inspection.bytes_in_file),
    }
    for key, value in facts.items():
        stdout.print(Text.assemble((f"{key:<12}", "bold"), printable(value)), soft_wrap=True)
    if inspection.modules:
        _show_modules(inspection.modules)
    for note in inspection.notes:
        stdout.print(_name(f"note: {note}", style="yellow"), soft_wrap=True)
    for problem, alike in _alike(inspection.problems).items():
        more = f" (and {alike - 1} more like it)" if alike > 1 else ""
        stdout.print(_name(f"wrong: {problem}{more}", style="red"), soft_wrap=True)
    if inspection.ok:
        verdict = f"Would be applied to {base}." if base else "Nothing wrong in the files; --base checks the fit."
        stdout.print(_name(verdict, style="green"), soft_wrap=True)


def _alike(problems: Iterable[str]) -> dict[str, int]:
    """The first of all problems that differ in numbers, factor or suggestions only -> how many there are."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for problem in problems:
        kind = _DETAIL.sub("*", problem.partition("; the nearest are")[0])
        counts[first.setdefault(kind, problem)] += 1
    return dict(counts)


def _show_modules(modules: Iterable[ModuleSummary]) -> None:
    groups: dict[tuple[str, str, str, str], Counter[str]] = {}
    for module in modules:
        key = (_folded(module.name), module.kind, _ranks(module.ranks), _folded(module.target or ""))
        counts = groups.setdefault(key, Counter())
        counts.update(modules=1, nbytes=module.nbytes)
    is_fitted = any(target for *_, target in groups)
    lines = []
    for (name, kind, ranks, target), counts in groups.items():
        shown = _name(name if target in ("", name) else target)
        if target not in ("", name):
            shown.append(f"\n(file: {printable(name)})")
        lines.append([shown, *map(_name, (kind, ranks, counts["modules"], format_bytes(counts["nbytes"])))])
    _show_table("", ["module", "kind", "ranks" if is_fitted else "rows of A", "modules", "size"], lines)


def show_explanation(explanation: ModelExplanation) -> None:
    """Layers of one choice folded together, below each why others were refused; then how a checkpoint is read."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for choice in explanation.choices:
        reasons = "\n".join(f"not {rejection.backend}: {rejection.reason}" for rejection in choice.rejections)
        kind = (_folded(choice.layer), choice.format_name, choice.device, choice.backend, reasons)
        groups.setdefault(kind, []).append(choice.layer)
    for (name, format_name, device, backend, reasons), layers in groups.items():
        count = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
        stdout.print(_name(name, style="bold"), soft_wrap=True)
        served = _name(f"{count}, {format_name}, {device}: ").append(printable(backend), style="green")
        for line in (served, *map(_name, reasons.split("\n") if reasons else ["the only backend"])):
            stdout.print(_indented(line))
    if explanation.shares:
        _show_shares(explanation.shares)
    packed = sum(choice.kept_by == "moegraft" for choice in explanation.choices)
    if explanation.stored:
        stdout.print(
            _name(
                f"Stored as {explanation.stored}. moegraft reads {packed} experts layers itself and keeps them packed; "
                "quantised linear maps beside them are dequantised when they are loaded."
            ),
            soft_wrap=True,
        )


def show_plugin(explanation: PluginExplanation) -> None:
    """One line for each kind of module."""
    if explanation.absent is not None:
        stdout.print(_name(f"The plug-in leaves vLLM as it is here: {explanation.absent}. It would:"), soft_wrap=True)
    for service in explanation.services:
        by = "left to vLLM" if service.reason else "served by moegraft"
        line = _name(f"{service.count} {service.part}: ").append(by, style="yellow" if service.reason else "green")
        stdout.print(line.append(f" ({printable(service.reason)})" if service.reason else ""), soft_wrap=True)


def _show_shares(shares: Sequence[RankShare]) -> None:
    """One line a rank; layers of one share folded together."""
    groups: dict[tuple[object, ...], list[RankShare]] = {}
    for share in shares:
        kind = (share.rank, _folded(share.layer), share.experts, share.columns)
        groups.setdefault(kind, []).append(share)
    lines = []
    for alike in sorted(groups.values(), key=lambda alike: alike[0].rank):
        first = alike[0]
        size = format_bytes(sum(share.num_bytes for share in alike))
        experts = f"{first.experts[0]} to {first.experts[-1]}" if first.experts else "none"
        columns = f"{first.columns[0]} to {first.columns[1] - 1}" if first.columns[1] > first.columns[0] else "none"
        lines.append([_name(_folded(first.layer)), *map(_name, (first.rank, len(alike), experts, columns, size))])
    header = ["layer", "rank", "layers", "experts", "columns of F", "size"]
    _show_table("What each rank keeps", header, lines)


def show_tuning(results: Sequence[TuneResult]) -> None:
    """Microseconds of a layer by tokens, with the heuristic's tiles and with those that were found."""
    for result in results:
        lines = []
        for entry in result.entries:
            heuristic = "does not run" if entry.heuristic_us is None else f"{entry.heuristic_us:.1f}"
            lines.append([*map(_name, (entry.num_tokens, heuristic, f"{entry.us:.1f}"))])
        title = f"Layer {result.layer}: a call without adapters and one with"
        _show_table(title, ["tokens", "heuristic us", "us"], lines)
        stdout.print(
            _name(
                f"{result.measured} tile choices measured, {result.failed} did not run, {result.wrong} gave wrong "
                f"results; each is a line of {result.state}."
            ),
            soft_wrap=True,
        )
        if result.table is not None:
            stdout.print(_name(f"Table: {result.table}", style="green"), soft_wrap=True)
        if not result.is_complete:
            stdout.print(Text("Not finished: the same command goes on.", style="yellow"), soft_wrap=True)


def _show_table(title: str, header: Sequence[str], lines: Sequence[Sequence[Text]], *, leading: int = 0) -> None:
    """A table; where it would have to cut words to fit, each line as its first cell and the others below."""
    table = Table(
        title=title or None, title_justify="left", box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0)
    )
    table.leading = leading
    for column in header:
        # Names and numbers stay whole, running text breaks between words.
        table.add_column(column, no_wrap=column in _WHOLE, overflow="fold")
    for line in lines:
        table.add_row(*line)
    if _least_width(header, lines) <= stdout.width:
        stdout.print(table)
        return
    if title:
        stdout.print(Text(title, style="italic"))
    for first, *others in lines:
        stdout.print(first, soft_wrap=True)
        cells = [Text.assemble(f"{column}: ", cell) for column, cell in zip(header[1:], others, strict=True)]
        separator = ", " if all(column in _WHOLE for column in header) else "\n"
        stdout.print(_indented(Text(separator).join(cells)))


def _indented(text: Text) -> Padding:
    return Padding(text, (0, 0, 0, 4), expand=False)


def _least_width(header: Sequence[str], lines: Sequence[Sequence[Text]]) -> int:
    """Width of a table that cuts no word: a space on either side, one behind each column."""
    widths = []
    for column, *cells in zip(header, *lines, strict=True):
        whole = column in _WHOLE
        parts = [part for cell in (column, *cells) for part in (str(cell).split("\n") if whole else str(cell).split())]
        widths.append(max(map(cell_len, parts), default=0))
    return sum(widths) + 2 * len(widths) + 1


def _name(text: object, style: str = "") -> Text:
    """Others' names and values, as they may reach a terminal: no markup, no control characters, one line."""
    return Text(printable(text), style=style)


def _text(text: str) -> Text:
    """Prompts and answers: the same, with their line breaks."""
    return Text(printable(text, is_text=True))


def _folded(name: str) -> str:
    return _LAYER.sub("*", name)


def _ranks(ranks: Mapping[str, int]) -> str:
    return ", ".join(str(rank) if name == "lora" else f"{name} {rank}" for name, rank in ranks.items())


def _known(value: float | None) -> str:
    return "?" if value is None else f"{value:g}"
