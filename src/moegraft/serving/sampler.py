"""Draws one token for each row of logits, every row with its own parameters; all rows in one batch.

A row's draw depends on its logits, its parameters, its seed and how many tokens it has: never on the other rows. Each
draw takes one uniform number, a hash of seed and position, and inverts the cumulated probabilities at it.

Shape letters: R rows · V tokens of the vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from moegraft.serving.grammar import Matcher, forbid
from moegraft.serving.requests import SamplingParams, TokenLogprobs

_MASK64 = (1 << 64) - 1


@dataclass
class SamplingRow:
    """What one sequence brings to each of its draws. ``prompt``: its distinct token ids · ``generated``: how often
    each token has come · ``end_ids``: tokens that end it, forbidden before ``min_tokens``."""

    params: SamplingParams
    seed: int
    prompt: frozenset[int] = frozenset()
    end_ids: frozenset[int] = frozenset()
    matcher: Matcher | None = None
    generated: Counter[int] = field(default_factory=Counter)
    drawn: int = 0
    mask_W: torch.Tensor | None = None

    def prepare(self, vocab_size: int) -> None:
        """Before a draw: what the grammar lets come next. Raises MoegraftError where it has failed."""
        if self.matcher is not None:
            self.mask_W = torch.zeros(-(-vocab_size // 32), dtype=torch.int32)
            self.matcher.fill(self.mask_W)

    def accept(self, token: int) -> None:
        """After a draw."""
        self.generated[token] += 1
        self.drawn += 1
        if self.matcher is not None and not self.matcher.has_ended:
            self.matcher.accept(token)

    @property
    def needs_history(self) -> bool:
        """Whether a draw depends on the tokens before it, beside their number."""
        params = self.params
        has_penalty = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
        return self.matcher is not None or bool(has_penalty)

    def uniform(self, ahead: int = 0) -> float:
        """In [0, 1): a hash (splitmix64, twice) of the seed and the number of the draw."""
        mixed = _splitmix(_splitmix(self.seed & _MASK64) + self.drawn + ahead)
        return (mixed >> 11) / (1 << 53)


def sequence_seed(seed: int, index: int) -> int:
    """The seed of one of a request's n sequences; the first has the request's own."""
    return seed if index == 0 else _splitmix((seed & _MASK64) ^ _splitmix(index))


def _splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


@dataclass(frozen=True)
class Drawn:
    """``logprobs``: None for rows that do not ask for them · is_finite: whether a row's logits were."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...]
    is_finite: tuple[bool, ...]


class Draw:
    """Tokens that are being drawn on the device, where the next step finds them; ``read`` waits for them."""

    def __init__(
        self, tokens_R: torch.Tensor, best_R: torch.Tensor, rows: Sequence[SamplingRow], raw: _Logprobs | None
    ) -> None:
        self.tokens_R = tokens_R
        self._rows = rows
        self._raw = raw
        tensors = [tokens_R, best_R.isfinite()]
        self._host = [_to_host(tensor) for tensor in (tensors if raw is None else [*tensors, *raw.tensors])]
        self._event: torch.cuda.Event | None = None
        if tokens_R.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Drawn:
        """Raises what the device has raised meanwhile."""
        if self._event is not None:
            self._event.synchronize()
        tokens, is_finite, *rest = (tensor.tolist() for tensor in self._host)
        logprobs: list[TokenLogprobs | None] = [None] * len(self._rows)
        if self._raw is not None:
            for at, own, values, ids in zip(self._raw.asking, *rest, strict=True):
                count = self._rows[at].params.logprobs or 0
                top = tuple(zip(map(int, ids[:count]), values[:count], strict=True))
                logprobs[at] = TokenLogprobs(token_id=tokens[at], logprob=own, top=top)
        return Drawn(tuple(tokens), tuple(logprobs), tuple(is_finite))


@dataclass(frozen=True)
class _Logprobs:
    """What rows that ask for them get: the token's own, the largest ones and their ids."""

    asking: Sequence[int]
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


@torch.no_grad()
def draw(logits_RV: torch.Tensor, rows: Sequence[SamplingRow], *, ahead: int = 0) -> Draw:
    """One token a row, without waiting for the device. float32 logits are overwritten.

    ahead: draws of these rows that were begun and not accepted yet; such rows have no ``needs_history``.
    """
    if all(_is_argmax(row, ahead) for row in rows):
        best_R, tokens_R = logits_RV.max(dim=-1)
        return Draw(tokens_R, best_R, rows, None)
    logits_RV = logits_RV.float()
    best_R = logits_RV.amax(-1)
    asking = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    raw_RV = logits_RV[asking].log_softmax(-1) if asking else None
    _adjust(logits_RV, rows, ahead)
    tokens_R = logits_RV.argmax(-1)
    plain = [i for i, row in enumerate(rows) if not row.params.is_greedy and not _is_filtered(row.params)]
    filtered = [i for i, row in enumerate(rows) if not row.params.is_greedy and _is_filtered(row.params)]
    for chosen, draw_rows in ((plain, _draw), (filtered, _draw_filtered)):
        if chosen:
            at = torch.tensor(chosen, device=logits_RV.device)
            some = [rows[i] for i in chosen]
            uniform = [row.uniform(ahead) for row in some]
            tokens_R[at] = draw_rows(_scaled(logits_RV[at], some), some, uniform)
    raw = None if raw_RV is None else _logprobs(raw_RV, tokens_R[asking], rows, asking)
    return Draw(tokens_R, best_R, rows, raw)


def _is_argmax(row: SamplingRow, ahead: int) -> bool:
    """Whether the largest logit is all that is wanted."""
    params = row.params
    is_held = bool(row.end_ids) and row.drawn + ahead < params.min_tokens
    return params.is_greedy and params.logprobs is None and not (row.needs_history or params.logit_bias or is_held)


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


# Before temperature: penalties, bias, what must not come.


def _adjust(logits_RV: torch.Tensor, rows: Sequence[SamplingRow], ahead: int) -> None:
    for i, row in enumerate(rows):
        params = row.params
        if params.repetition_penalty != 1.0:
            _repetition(logits_RV[i], row)
        if row.generated and (params.presence_penalty or params.frequency_penalty):
            ids = _ids(row.generated, logits_RV)
            counts = torch.tensor(list(row.generated.values()), device=logits_RV.device, dtype=torch.float32)
            logits_RV[i, ids] -= params.presence_penalty + params.frequency_penalty * counts
        if params.logit_bias:
            bias = torch.tensor(list(params.logit_bias.values()), device=logits_RV.device, dtype=torch.float32)
            logits_RV[i, _ids(params.logit_bias, logits_RV)] += bias
        if row.drawn + ahead < params.min_tokens and row.end_ids:
            logits_RV[i, _ids(row.end_ids, logits_RV)] = float("-inf")
    guided = [i for i, row in enumerate(rows) if row.mask_W is not None]
    if guided:
        masks_RW = torch.stack([mask for row in rows if (mask := row.mask_W) is not None])
        at = torch.tensor(guided, device=logits_RV.device)
        allowed = logits_RV[at]
        forbid(allowed, masks_RW.to(logits_RV.device))
        logits_RV[at] = allowed


def _repetition(logits_V: torch.Tensor, row: SamplingRow) -> None:
    """Divides positive logits of tokens that have come, in prompt or answer, and multiplies negative ones."""
    ids = _ids(row.prompt | row.generated.keys(), logits_V)
    values, penalty = logits_V[ids], row.params.repetition_penalty
    logits_V[ids] = torch.where(values > 0, values / penalty, values * penalty)


def _ids(ids: object, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(ids), device=like.device, dtype=torch.long)  # type: ignore[call-overload]


# Temperature and draws


def _scaled(logits_RV: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    return logits_RV / _column(rows, lambda row: row.params.temperature, logits_RV).clamp(min=1e-5)


def _column(rows: Sequence[SamplingRow], of: Callable[[SamplingRow], float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[of(row)] for row in rows], dtype=torch.float64).to(like.device, like.dtype)


def _draw(logits_RV: torch.Tensor, _: Sequence[SamplingRow], uniform: Sequence[float]) -> torch.Tensor:
    """[R] token ids; a token of probability zero is never drawn."""
    weights_RV = logits_RV.softmax(-1)
    summed_RV = weights_RV.double().cumsum(-1)
    at_R = _invert(summed_RV, uniform)
    is_drawn = weights_RV.gather(1, at_R[:, None])[:, 0] > 0
    return torch.where(is_drawn, at_R, weights_RV.argmax(-1))


def _draw_filtered(logits_RV: torch.Tensor, rows: Sequence[SamplingRow], uniform: Sequence[float]) -> torch.Tensor:
    """[R] token ids, among the top k, then those of at least min_p of the best, then the smallest set of top_p.

    The sort is stable: tokens of equal logits keep their order, whatever other rows ask for.
    """
    sorted_RV, ids_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
    weights_RV = sorted_RV.softmax(-1)
    V = weights_RV.shape[1]
    ranks_V = torch.arange(V, device=logits_RV.device)
    k_R1 = torch.tensor([[row.params.top_k or V] for row in rows], device=logits_RV.device)
    min_p_R1 = _column(rows, lambda row: row.params.min_p, logits_RV)
    keep_RV = (ranks_V < k_R1) & (weights_RV >= min_p_R1 * weights_RV[:, :1])
    weights_RV = weights_RV * keep_RV
    summed_RV = weights_RV.double().cumsum(-1)
    before_RV = summed_RV - weights_RV
    top_p_R1 = _column(rows, lambda row: row.params.top_p, logits_RV).double()
    keep_RV = (before_RV < top_p_R1 * summed_RV[:, -1:]) | (ranks_V == 0)
    weights_RV = weights_RV * keep_RV
    last_R = (weights_RV > 0).sum(-1) - 1
    at_R = torch.minimum(_invert(weights_RV.double().cumsum(-1), uniform), last_R.clamp(min=0))
    return ids_RV.gather(1, at_R[:, None])[:, 0]


def _invert(summed_RV: torch.Tensor, uniform: Sequence[float]) -> torch.Tensor:
    """[R]: the first place at which the sums exceed the row's uniform number times the total."""
    uniform_R1 = torch.tensor(uniform, dtype=torch.float64)[:, None].to(summed_RV.device)
    at_R1 = torch.searchsorted(summed_RV.contiguous(), uniform_R1 * summed_RV[:, -1:], right=True)
    return at_R1[:, 0].clamp(max=summed_RV.shape[1] - 1)


def _logprobs(
    raw_RV: torch.Tensor, tokens_R: torch.Tensor, rows: Sequence[SamplingRow], asking: Sequence[int]
) -> _Logprobs:
    most = max(rows[at].params.logprobs or 0 for at in asking)
    own_R = raw_RV.gather(1, tokens_R[:, None])[:, 0]
    values, ids = raw_RV.topk(min(most, raw_RV.shape[1]), dim=-1) if most else (raw_RV[:, :0], raw_RV[:, :0].long())
    return _Logprobs(asking, (own_R, values, ids))
