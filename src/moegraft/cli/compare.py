"""The demo's proof: a mixed batch against each of its rows alone, in moegraft and in PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from moegraft.cli.loading import load_model
from moegraft.integrations.transformers import GraftedModel

# Float32 sums in another order (a padded batch, PEFT's merged weights); logits are of the order of 10.
LOGIT_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class MixedBatch:
    """A batch and what was generated for it, greedily.

    names: adapter of each row, None for the base · prompt_ids, prompt_mask [B, P], padded on the left ·
    ids [B, P + new] · pad: the id that fills both sides.
    """

    names: tuple[str | None, ...]
    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    ids: torch.Tensor
    pad: int

    @property
    def mask(self) -> torch.Tensor:
        """Attention mask of ``ids``."""
        return torch.cat([self.prompt_mask, (self.ids[:, self.prompt_ids.shape[1] :] != self.pad).long()], dim=1)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The mixed batch against its rows alone. ``logit_difference``: the largest, over all tokens of the answers."""

    rows: int
    rows_equal: int
    logit_difference: float

    @property
    def is_exact(self) -> bool:
        """Same tokens in every row, logits within float32 rounding."""
        return self.rows_equal == self.rows and self.logit_difference <= LOGIT_TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """``alone``: each row by itself in moegraft · ``peft``: each row in PEFT with its adapter ·
    ``base_rows_unchanged``: bit for bit what they are in the batch without adapters."""

    alone: Agreement
    peft: Agreement
    base_rows_unchanged: bool

    @property
    def is_exact(self) -> bool:
        """Whether all of it holds."""
        return self.alone.is_exact and self.peft.is_exact and self.base_rows_unchanged


def position_ids(mask: torch.Tensor) -> torch.Tensor:
    """Positions that do not count the padding on the left."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def compare(graft: GraftedModel, batch: MixedBatch, folder: Path, on_row: Callable[[], object]) -> Comparison:
    """``folder`` has the checkpoint ``base`` and the adapters by name; ``on_row`` is called after each row."""
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": position_ids(batch.mask)}
    mixed = graft(**inputs, adapters=batch.names).logits
    plain = graft(**inputs, adapters=[None] * len(batch.names)).logits
    reference = load_peft(folder, [name for name in dict.fromkeys(batch.names) if name is not None])
    alone, peft = [], []
    for name, row, prompt_length, logits in _rows(batch, mixed):
        answer = slice(prompt_length - 1, row.shape[1] - 1)  # the positions that predict the answer's tokens
        generated = graft.generate(
            input_ids=row[:, :prompt_length],
            attention_mask=torch.ones_like(row[:, :prompt_length]),
            adapters=[name],
            max_new_tokens=batch.ids.shape[1] - batch.prompt_ids.shape[1],
            do_sample=False,
        )
        own = graft(input_ids=row, adapters=[name]).logits[0]
        alone.append((torch.equal(generated, row), (logits - own)[answer].abs().max().item()))
        theirs = _peft_logits(reference, row, name)
        same_tokens = torch.equal(theirs[answer].argmax(-1), row[0, prompt_length:])
        peft.append((same_tokens, (logits - theirs)[answer].abs().max().item()))
        on_row()
    base_rows = [i for i, name in enumerate(batch.names) if name is None]
    return Comparison(
        alone=_agreement(alone),
        peft=_agreement(peft),
        base_rows_unchanged=torch.equal(mixed[base_rows], plain[base_rows]),
    )


def _rows(batch: MixedBatch, logits: torch.Tensor) -> Iterator[tuple[str | None, torch.Tensor, int, torch.Tensor]]:
    """(adapter, ids [1, S] without padding, length of the prompt, logits [S, V]) of each row."""
    for i, name in enumerate(batch.names):
        kept = batch.mask[i].bool()
        yield name, batch.ids[i, kept][None], int(batch.prompt_mask[i].sum()), logits[i, kept]


def _agreement(rows: list[tuple[bool, float]]) -> Agreement:
    largest = torch.tensor([difference for _, difference in rows]).max().item()  # unlike Python's max, keeps NaN
    return Agreement(rows=len(rows), rows_equal=sum(equal for equal, _ in rows), logit_difference=largest)


def load_peft(folder: Path, names: list[str]) -> PeftModel:
    """The base with every adapter, in PEFT."""
    first, *others = names
    model = PeftModel.from_pretrained(load_model(folder / "base", device="cpu"), folder / first, first)
    for name in others:
        model.load_adapter(folder / name, name)
    return model.eval()


def _peft_logits(model: PeftModel, ids: torch.Tensor, name: str | None) -> torch.Tensor:
    """Logits [S, V] of one row ``ids`` [1, S] with one adapter of PEFT, or with none."""
    with torch.no_grad():
        if name is None:
            with model.disable_adapter():
                base_logits: torch.Tensor = model(input_ids=ids).logits[0]
                return base_logits
        model.set_adapter(name)
        logits: torch.Tensor = model(input_ids=ids).logits[0]
        return logits
