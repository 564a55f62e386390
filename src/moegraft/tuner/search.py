"""Search for the base tiles of a layer on one device; what measures a choice is the caller's."""

from __future__ import annotations

import enum
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from moegraft.core.errors import MoegraftError
from moegraft.tuning.heuristic import gemm_tiles, heuristic_tiles, token_tiles
from moegraft.tuning.tiles import GemmTile, MoETiles, TokenTile, TuningShape

Measure = Callable[[TuningShape, MoETiles], float]
"""Microseconds of one layer call of that shape with those tiles, after its result was found right.

Raises WrongResultError where it was not, DeviceLostError where no later trial can run, and anything else where the
tiles do not fit the device.
"""

Prepare = Callable[[Sequence[tuple[TuningShape, MoETiles]]], None]
"""Told which trials come next, so that their kernels can be compiled side by side."""

BLOCK_MS = (16, 32, 64, 128)
MAX_DEFAULT_RATIO = 1.3
"""A ``block_m`` whose default tiles take this much longer than another's is not searched further."""
CHUNK = 64
"""Trials that are prepared together: what a search that is stopped may have compiled for nothing."""
MIN_GAIN = 0.01
"""Tiles replace the heuristic's where they are faster by this share: less is noise."""


class WrongResultError(Exception):
    """The tiles ran, and their result is not that of the reference."""


class DeviceLostError(MoegraftError):
    """A trial left the device in a state in which nothing runs any more; a new process has to go on."""


class Verdict(enum.StrEnum):
    """What became of a trial."""

    MEASURED = "measured"
    WRONG = "wrong"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """``us``: microseconds of a call; infinite unless measured. ``reason``: of any other verdict, one line."""

    shape: TuningShape
    tiles: MoETiles
    verdict: Verdict
    us: float = math.inf
    reason: str = ""


class Journal:
    """Finished trials, one JSON line each, so that a search that was interrupted goes on where it stopped.

    ``context`` says what else decides a time (device, versions, dtype): lines of another one are left alone.
    """

    def __init__(self, path: Path, context: str = "") -> None:
        self.path = path
        self._context = context
        self._done: dict[str, dict[str, Any]] = {}
        text = path.read_text() if path.exists() else ""
        self._needs_newline = text != "" and not text.endswith("\n")
        for line in text.splitlines():
            try:
                trial = json.loads(line)
                self._done[trial["trial"]] = trial
            except (ValueError, TypeError, KeyError):  # the last line of a search that was killed
                continue

    def find(self, shape: TuningShape, tiles: MoETiles) -> Trial | None:
        done = self._done.get(self._key(shape, tiles))
        if done is None:
            return None
        us = math.inf if done["us"] is None else done["us"]
        return Trial(shape=shape, tiles=tiles, verdict=Verdict(done["verdict"]), us=us, reason=done["reason"])

    def append(self, trial: Trial) -> None:
        """On disk when it returns, as far as this process can tell."""
        key = self._key(trial.shape, trial.tiles)
        us = trial.us if math.isfinite(trial.us) else None
        done = {"trial": key, "verdict": trial.verdict, "us": us, "reason": trial.reason}
        with self.path.open("a") as file:
            file.write("\n" * self._needs_newline + json.dumps(done) + "\n")
        self._needs_newline = False
        self._done[key] = done

    def _key(self, shape: TuningShape, tiles: MoETiles) -> str:
        base = [self._context, asdict(shape), tiles.block_m, asdict(tiles.gemm13), asdict(tiles.gemm2)]
        return json.dumps(base, sort_keys=True)


class TileSearch:
    """Tries ``candidates`` of every shape (which differ in ``num_tokens``), then joins the best of either GEMM.

    First each ``block_m`` with its default tiles, then their neighbours for those that are not far behind. Shapes take
    turns, so that a search that is stopped early has spent as much on each.
    """

    def __init__(
        self,
        shapes: Sequence[TuningShape],
        measure: Measure,
        journal: Journal,
        prepare: Prepare = lambda trials: None,
    ) -> None:
        self._measure = measure
        self._prepare = prepare
        self._journal = journal
        self.trials: dict[TuningShape, dict[MoETiles, Trial]] = {shape: {} for shape in shapes}

    @property
    def max_trials(self) -> int:
        """A bound of the trials of a search that comes to its end."""
        return sum(len(candidates(shape)) + len(block_ms(shape)) for shape in self.trials)

    @property
    def counts(self) -> Counter[Verdict]:
        return Counter(trial.verdict for trials in self.trials.values() for trial in trials.values())

    def run(
        self, *, on_trial: Callable[[Trial], None] = lambda trial: None, is_over: Callable[[], bool] = lambda: False
    ) -> bool:
        """Whether the search came to its end before ``is_over``. Raises DeviceLostError; what was tried is kept."""
        for plan in (self._defaults, self._neighbours, self._joined):
            for chunk in _chunks(plan()):
                missing = [(shape, tiles) for shape, tiles in chunk if self._journal.find(shape, tiles) is None]
                if missing and not is_over():
                    self._prepare(missing)
                for shape, tiles in chunk:
                    trial = self._journal.find(shape, tiles)
                    if trial is None:
                        if is_over():
                            return False
                        trial = self._try(shape, tiles)
                    self.trials[shape][tiles] = trial
                    on_trial(trial)
        return True

    def entries(self) -> list[dict[str, Any]]:
        """Table entries from what has been tried: one for each shape with tiles that run."""
        best = (best_trial(shape, list(trials.values())) for shape, trials in self.trials.items())
        return [_entry(trial, self.trials[trial.shape]) for trial in best if trial is not None]

    def _defaults(self) -> list[tuple[TuningShape, MoETiles]]:
        return _in_turns({shape: [default_at(shape, block_m) for block_m in block_ms(shape)] for shape in self.trials})

    def _neighbours(self) -> list[tuple[TuningShape, MoETiles]]:
        plan = {}
        for shape, trials in self.trials.items():
            times = {trial.tiles.block_m: trial.us for trial in trials.values() if trial.verdict is Verdict.MEASURED}
            limit = MAX_DEFAULT_RATIO * min(times.values(), default=math.inf)
            left = {block_m for block_m in block_ms(shape) if times.get(block_m, 0.0) <= limit}
            plan[shape] = [t for t in candidates(shape) if t.block_m in left and t not in trials]
        return _in_turns(plan)

    def _joined(self) -> list[tuple[TuningShape, MoETiles]]:
        joined = {
            shape: [join_best(shape, block_m, list(trials.values())) for block_m in block_ms(shape)]
            for shape, trials in self.trials.items()
        }
        return _in_turns({shape: [t for t in tiles if t is not None] for shape, tiles in joined.items()})

    def _try(self, shape: TuningShape, tiles: MoETiles) -> Trial:
        lost: DeviceLostError | None = None
        try:
            trial = Trial(shape=shape, tiles=tiles, verdict=Verdict.MEASURED, us=self._measure(shape, tiles))
        except Exception as error:  # whatever the compiler or the driver says: these tiles cannot be used
            verdict = Verdict.WRONG if isinstance(error, WrongResultError) else Verdict.FAILED
            reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            trial = Trial(shape=shape, tiles=tiles, verdict=verdict, reason=reason)
            lost = error if isinstance(error, DeviceLostError) else None
        self._journal.append(trial)
        if lost is not None:
            raise lost
        return trial


def _chunks(plan: Sequence[tuple[TuningShape, MoETiles]]) -> Iterator[Sequence[tuple[TuningShape, MoETiles]]]:
    """CHUNK trials at a time."""
    return (plan[start : start + CHUNK] for start in range(0, len(plan), CHUNK))


def _in_turns(plan: Mapping[TuningShape, Sequence[MoETiles]]) -> list[tuple[TuningShape, MoETiles]]:
    rounds = zip_longest(*plan.values())
    return [(s, t) for round_ in rounds for s, t in zip(plan, round_, strict=True) if t is not None]


def block_ms(shape: TuningShape) -> tuple[int, ...]:
    """The heuristic's ``block_m``, then its neighbours."""
    start = heuristic_tiles(shape).block_m
    return (start, *(block_m for block_m in (start // 2, start * 2) if block_m in BLOCK_MS))


def default_at(shape: TuningShape, block_m: int) -> MoETiles:
    """The heuristic's tiles, had it chosen this ``block_m``."""
    gemm13, gemm2 = gemm_tiles(block_m, shape)
    return replace(heuristic_tiles(shape), block_m=block_m, gemm13=gemm13, gemm2=gemm2)


def candidates(shape: TuningShape) -> list[MoETiles]:
    """For each ``block_m`` its default, then with one GEMM's tile changed: the two run one after the other, so their
    best tiles are independent. The heuristic's choice is the first."""
    found: list[MoETiles] = []
    for block_m in block_ms(shape):
        default = default_at(shape, block_m)
        found.append(default)
        found += [replace(default, gemm13=tile) for tile in _neighbours(default.gemm13, block_m)]
        found += [replace(default, gemm2=tile) for tile in _neighbours(default.gemm2, block_m)]
    return list(dict.fromkeys(found))


def variants(shape: TuningShape) -> dict[str, MoETiles]:
    """Ways of a call that are no table's to choose, by name; the heuristic's is the first."""
    found = {"as chosen": heuristic_tiles(shape)}
    if shape.num_tokens == 1:
        return found | _token_variants(shape)
    default = default_at(shape, found["as chosen"].block_m)
    for which, tile in (("gemm13", default.gemm13), ("gemm2", default.gemm2)):
        for changed in (*_neighbours(tile, default.block_m), *_side_by_side(tile)):
            fields = asdict(changed).items()
            name = ", ".join(f"{field} {value}" for field, value in fields if value != getattr(tile, field))
            found[f"{which} {name}"] = replace(default, **{which: changed})  # type: ignore[arg-type]
    for block_m in block_ms(shape)[1:]:
        found[f"block_m {block_m}"] = default_at(shape, block_m)
    both = [list(_side_by_side(tile)) for tile in (default.gemm13, default.gemm2)]
    for i, (gemm13, gemm2) in enumerate(zip(*both, strict=False)):
        found[f"both side by side {i}"] = replace(default, gemm13=gemm13, gemm2=gemm2)
    return found


def _side_by_side(tile: GemmTile) -> Iterator[GemmTile]:
    """Programs so small that a multiprocessor has two or more at once: one stores while another multiplies."""
    if tile.num_warps == 8:
        half = replace(tile, block_n=tile.block_n // 2, num_warps=4, num_stages=3)
        yield half
        yield replace(half, num_stages=2, block_k=64)
        yield replace(half, group=2 * tile.group)
        yield replace(half, tma=False)
    elif tile.num_stages > 2:
        yield replace(tile, num_stages=2)
        yield replace(tile, num_warps=8)
        yield replace(tile, block_k=2 * tile.block_k, num_stages=2)
        yield replace(tile, block_n=2 * tile.block_n, num_warps=8)


def _token_variants(shape: TuningShape) -> dict[str, MoETiles]:
    """The kernels of other batches, those of a single token, and the latter with one thing changed."""
    default = heuristic_tiles(shape)
    tokens = default.token or token_tiles(shape)
    found = {"rows": replace(default, token=None), "token": replace(default, token=tokens)}
    for name, w13 in _token_neighbours(tokens.w13):
        found[f"w13 {name}"] = replace(default, token=replace(tokens, w13=w13))
    for name, w2 in _token_neighbours(tokens.w2):
        found[f"w2 {name}"] = replace(default, token=replace(tokens, w2=w2))
    return found


def _token_neighbours(tile: TokenTile) -> Iterator[tuple[str, TokenTile]]:
    n, k = tile.block_n, tile.block_k
    for changed in (
        replace(tile, block_n=n // 2),
        replace(tile, block_n=n * 2),
        replace(tile, block_k=k // 2),
        replace(tile, block_k=k * 2),
        replace(tile, block_n=n // 2, block_k=k * 2),
        replace(tile, block_n=n // 2, num_warps=2),
        replace(tile, num_warps=8),
        replace(tile, block_n=n * 2, num_warps=8),
    ):
        yield f"{changed.block_n} x {changed.block_k}, {changed.num_warps} warps", changed


def join_best(shape: TuningShape, block_m: int, trials: Sequence[Trial]) -> MoETiles | None:
    """The best tile of each GEMM together; None where neither was measured."""
    default = default_at(shape, block_m)
    measured = [t for t in trials if t.tiles.block_m == block_m and t.verdict is Verdict.MEASURED]
    best13 = min((t for t in measured if t.tiles.gemm2 == default.gemm2), key=_us, default=None)
    best2 = min((t for t in measured if t.tiles.gemm13 == default.gemm13), key=_us, default=None)
    if best13 is None and best2 is None:
        return None
    return replace(
        default,
        gemm13=default.gemm13 if best13 is None else best13.tiles.gemm13,
        gemm2=default.gemm2 if best2 is None else best2.tiles.gemm2,
    )


def best_trial(shape: TuningShape, trials: Sequence[Trial]) -> Trial | None:
    """The fastest trial, if it beats the heuristic's by MIN_GAIN; else the heuristic's; None where nothing runs."""
    measured = [trial for trial in trials if trial.verdict is Verdict.MEASURED]
    best = min(measured, key=_us, default=None)
    default = next((trial for trial in measured if trial.tiles == heuristic_tiles(shape)), best)
    if best is None or default is None:
        return None
    return best if best.us <= (1 - MIN_GAIN) * default.us else default


def _us(trial: Trial) -> float:
    return trial.us


def _entry(best: Trial, trials: dict[MoETiles, Trial]) -> dict[str, Any]:
    fields = {"gemm13": asdict(best.tiles.gemm13), "gemm2": asdict(best.tiles.gemm2)}
    for tile in fields.values():
        del tile["block_l"]  # read by LoRA only, so the heuristic's: see table.py
    entry = {"num_tokens": best.shape.num_tokens, "block_m": best.tiles.block_m, **fields, "us": round(best.us, 2)}
    default = trials.get(heuristic_tiles(best.shape))
    if default is not None and math.isfinite(default.us):
        entry["heuristic_us"] = round(default.us, 2)
    return entry


def _neighbours(tile: GemmTile, block_m: int) -> Iterator[GemmTile]:
    yield replace(tile, tma=not tile.tma)
    for stages in (tile.num_stages - 1, tile.num_stages + 1):
        yield replace(tile, num_stages=stages)
    yield replace(tile, block_n=tile.block_n // 2)
    yield replace(tile, block_n=tile.block_n * 2)
    if block_m <= 32:
        yield replace(tile, block_n=tile.block_n // 2, block_k=tile.block_k * 2, num_stages=3)
    else:
        yield replace(tile, group=tile.group * 2)
        yield replace(tile, num_warps=12 - tile.num_warps)
