"""From checked headers to a plan: which tensors make which factor of which module. No tensor is read here.

Everything that names and shapes can tell is checked now, so that an adapter that does not fit is refused before its
data is touched. Problems are collected, one per module or stray tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from moegraft.core.errors import (
    AdapterConfigError,
    AdapterError,
    AdapterFileError,
    AdapterMismatchError,
    AdapterTensorError,
    UnservedModuleError,
)
from moegraft.files import TensorInfo, limits, shorten
from moegraft.lora.peft import fused
from moegraft.lora.peft.config import PeftConfig
from moegraft.lora.peft.fused import FusedTensors
from moegraft.lora.peft.names import Factor, Kind, Projection, Site, SiteFinder, TensorKey, parse_key
from moegraft.lora.targets import EmbeddingTarget, ExpertsTarget, LinearTarget, ModelTargets


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """An A and a B, their rank and the scale that B takes."""

    a: TensorInfo
    b: TensorInfo
    rank: int
    scale: float

    @property
    def infos(self) -> tuple[TensorInfo, TensorInfo]:
        """Both tensors."""
        return self.a, self.b


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedPair:
    """A pair for all experts in PEFT's packing; ``a_is_input`` None: the shapes do not tell."""

    projection: Projection
    pair: Pair
    a_is_input: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsPlan:
    """One experts module: pairs of single experts, pairs of three-dimensional tensors, fused pairs.

    ``magnitudes``: of single experts (DoRA).
    """

    target: ExpertsTarget
    single: Mapping[Projection, Mapping[int, Pair]] = field(default_factory=dict)
    stacked: Mapping[Projection, Pair] = field(default_factory=dict)
    fused: tuple[FusedPair, ...] = ()
    magnitudes: Mapping[Projection, Mapping[int, TensorInfo]] = field(default_factory=dict)

    def infos(self) -> list[TensorInfo]:
        """All of its tensors."""
        singles = [pair for pairs in self.single.values() for pair in pairs.values()]
        pairs = (*singles, *self.stacked.values(), *(fused_pair.pair for fused_pair in self.fused))
        magnitudes = [info for infos in self.magnitudes.values() for info in infos.values()]
        return [info for pair in pairs for info in pair.infos] + magnitudes

    def ranks(self) -> dict[str, int]:
        """Projection -> rank of an expert, the largest where they differ."""
        ranks = {str(projection): max(p.rank for p in pairs.values()) for projection, pairs in self.single.items()}
        ranks |= {str(projection): pair.rank for projection, pair in self.stacked.items()}
        return ranks | {str(fused_pair.projection): fused_pair.pair.rank for fused_pair in self.fused}


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearPlan:
    """One linear map; ``magnitude`` for DoRA; ``bias``: of lora_B (``lora_bias``).

    ``parts``: where the adapter has a pair for each of several blocks of outputs, those and where each block begins;
    ``pair`` is then the first, with the rank of all.
    """

    target: LinearTarget
    pair: Pair
    magnitude: TensorInfo | None = None
    bias: TensorInfo | None = None
    parts: tuple[tuple[Pair, int], ...] = ()

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """All of its tensors."""
        pairs = [info for pair, _ in self.parts for info in pair.infos] or self.pair.infos
        return (*pairs, *(info for info in (self.magnitude, self.bias) if info is not None))


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingPlan:
    """One embedding."""

    target: EmbeddingTarget
    pair: Pair


@dataclass(frozen=True, kw_only=True, slots=True)
class TokensPlan:
    """Rows of an embedding or of a head: ``info`` [rows, D] in place of the rows ``tokens`` of the base's ``param``."""

    target: EmbeddingTarget | LinearTarget
    param: str
    info: TensorInfo
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterPlan:
    """The whole adapter; ``saved``: module -> parameter -> tensor.

    ``tokens``: modules of which rows are replaced. ``twins``: tensors that must be equal, since both are one parameter.
    ``unused``: names of tensors that change nothing. ``left_out``: name of a tensor -> module of the base model that is
    not served, where such tensors may be left out.
    """

    experts: Mapping[str, ExpertsPlan]
    linears: Mapping[str, LinearPlan]
    embeddings: Mapping[str, EmbeddingPlan]
    tokens: Mapping[str, TokensPlan]
    saved: Mapping[str, Mapping[str, TensorInfo]]
    twins: tuple[tuple[TensorInfo, TensorInfo], ...]
    unused: tuple[str, ...]
    left_out: Mapping[str, str]
    problems: tuple[AdapterError, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    key: TensorKey
    site: Site
    info: TensorInfo


def plan_adapter(
    infos: Mapping[str, TensorInfo], config: PeftConfig, targets: ModelTargets, *, skip_unserved: bool = False
) -> AdapterPlan:
    """Sorts every tensor into a plan or into ``problems``; it raises nothing.

    ``skip_unserved``: what lies on modules that the base model has and that are not served goes into ``left_out``.
    """
    problems: list[AdapterError] = []
    if not infos:
        problems.append(AdapterFileError("the weight files hold no tensors"))
    left_out: dict[str, str] = {}
    groups = _sort_by_module(infos, config, targets, problems, left_out if skip_unserved else None)
    if left_out and len(left_out) == len(infos):
        stray = next(iter(left_out.values()))
        problems.append(AdapterMismatchError(f"all of its modules are unserved, such as {shorten(stray)}"))
    planner = _Planner(config, targets)
    for (kind, module), members in groups.items():
        try:
            planner.add(kind, module, members)
        except AdapterError as error:
            problems.append(error)
    planner.tie_tokens()
    problems += planner.biases_beside_dora()
    experts, notes = _settle_orientation(planner.experts, config)
    return AdapterPlan(
        experts=experts,
        linears=planner.linears,
        embeddings=planner.embeddings,
        tokens=planner.tokens,
        saved={module: params for module, params in planner.saved.items() if params},
        twins=tuple(planner.twins),
        unused=tuple(planner.unused),
        left_out=left_out,
        problems=tuple(problems),
        notes=(*notes, *planner.notes()),
    )


def _sort_by_module(
    infos: Mapping[str, TensorInfo],
    config: PeftConfig,
    targets: ModelTargets,
    problems: list[AdapterError],
    left_out: dict[str, str] | None,
) -> dict[tuple[Kind, str], list[_Member]]:
    groups: dict[tuple[Kind, str], list[_Member]] = {}
    finder = SiteFinder(targets)
    for info in infos.values():
        key = parse_key(info.name)
        try:
            site = finder.find(key)
        except AdapterMismatchError as error:
            if left_out is not None and isinstance(error, UnservedModuleError):
                left_out[info.name] = error.module
                continue
            is_bias = config.bias != "none" and key.factor is Factor.SAVED and "bias" in key.param
            error.args = (f"{info.file}: " + (f"bias {config.bias!r}: " if is_bias else "") + str(error),)
            problems.append(error)
            if len(problems) >= limits.MAX_STRAY:
                break
        else:
            groups.setdefault((site.kind, site.module), []).append(_Member(key=key, site=site, info=info))
    return groups


class _Planner:
    def __init__(self, config: PeftConfig, targets: ModelTargets) -> None:
        self._config = config
        self._targets = targets
        self.experts: dict[str, ExpertsPlan] = {}
        self.linears: dict[str, LinearPlan] = {}
        self.embeddings: dict[str, EmbeddingPlan] = {}
        self.tokens: dict[str, TokensPlan] = {}
        self.saved: dict[str, dict[str, TensorInfo]] = {}
        self.twins: list[tuple[TensorInfo, TensorInfo]] = []
        self.unused: list[str] = []

    def notes(self) -> list[str]:
        """What was left unused, in words."""
        if not self.unused:
            return []
        return [
            f"{len(self.unused)} tensors change nothing, such as {shorten(self.unused[0])}: copies of the base's, empty"
        ]

    def add(self, kind: Kind, module: str, members: list[_Member]) -> None:
        """Plans one module. Raises AdapterError."""
        if any(member.key.factor is Factor.TOKENS for member in members):
            self._plan_tokens(module, members)
        elif kind is Kind.EXPERTS:
            self.experts[module] = self._plan_experts(self._targets.experts[module], members)
        elif kind is Kind.LINEAR:
            self.linears[module] = self._plan_linear(self._targets.linears[module], members)
        elif kind is Kind.EMBEDDING:
            self.embeddings[module] = self._plan_embedding(self._targets.embeddings[module], members)
        else:
            self.saved[module] = self._plan_saved(module, members)

    def _plan_parts(self, target: LinearTarget, members: list[_Member]) -> LinearPlan:
        """q, k and v side by side, q and k of one size: a B that is block-diagonal, behind all of A."""
        self._refuse_dora(target.name, members)
        self._refuse_bias(target.name, members)
        pairs: dict[str, Pair] = {}
        for part in "qkv":
            held = [member for member in members if member.site.part == part]
            if held:
                a, b = _partners(_by_factor(held, (Factor.A, Factor.B)), Factor.A, Factor.B)
                size_out = b.info.shape[0] if b.info.shape else 0
                sizes = {"size_in": target.in_features, "size_out": size_out}
                pairs[part] = self._pair(a.info, b.info, name=a.key.module, **sizes)
        sizes = {part: pair.b.shape[0] for part, pair in pairs.items()}
        whole = next((member for member in members if not member.site.part), None)
        key_size = sizes.get("q", sizes.get("k", 0))
        value_size = sizes.get("v", target.out_features - 2 * key_size)
        if whole is not None or sizes.get("k", key_size) != key_size:
            raise AdapterTensorError(
                f"{(whole or members[-1]).info.where}: does not fit beside the parts of {target.name}"
            )
        if (key_size and 2 * key_size + value_size != target.out_features) or not 0 < value_size < target.out_features:
            raise AdapterTensorError(
                f"{members[0].info.where}: parts of {sizes} outputs, expected two of one size and a third, "
                f"{target.out_features} in all, as {target.name} has"
            )
        starts = {"q": 0, "k": key_size, "v": target.out_features - value_size}
        parts = tuple((pair, starts[part]) for part, pair in pairs.items())
        first = dataclasses.replace(parts[0][0], rank=sum(pair.rank for pair, _ in parts))
        return LinearPlan(target=target, pair=first, parts=parts)

    def _plan_linear(self, target: LinearTarget, members: list[_Member]) -> LinearPlan:
        if any(member.site.part for member in members):
            return self._plan_parts(target, members)
        found = _by_factor(members, (Factor.A, Factor.B, Factor.MAGNITUDE, Factor.B_BIAS))
        a, b = _partners(found, Factor.A, Factor.B)
        bias = self._lora_bias(target, a, found.get(Factor.B_BIAS))
        module = a.key.module
        parameter = f"{module}.{target.param}"
        pair = self._pair(
            a.info,
            b.info,
            name=parameter if self._config.names_parameter(parameter) else module,
            size_in=target.in_features,
            size_out=target.out_features,
        )
        magnitude = self._magnitude(a.info, found.get(Factor.MAGNITUDE), target.out_features, target)
        return LinearPlan(target=target, pair=pair, magnitude=magnitude, bias=bias)

    def _magnitude(
        self, a: TensorInfo, magnitude: _Member | None, size_out: int, target: LinearTarget | ExpertsTarget
    ) -> TensorInfo | None:
        """DoRA's vector [out], where the config says that there is one."""
        if (magnitude is not None) != self._config.use_dora:
            has = "has no lora_magnitude_vector" if magnitude is None else f"comes with {shorten(magnitude.info.name)}"
            raise AdapterTensorError(f"{a.where} {has}, but use_dora is {str(self._config.use_dora).lower()}")
        if magnitude is None:
            return None
        info = magnitude.info
        if info.shape != (size_out,):
            raise AdapterTensorError(f"{info.where}: shape {list(info.shape)}, expected [{size_out}]")
        if (target.weight if isinstance(target, LinearTarget) else target.weights) is None:
            raise AdapterConfigError(
                f"use_dora: {info.where} needs the base weight of {target.name}, which cannot be read"
            )
        return info

    def _lora_bias(self, target: LinearTarget, a: _Member, bias: _Member | None) -> TensorInfo | None:
        """The bias of lora_B [out], where the config says that there is one."""
        config, name = self._config, target.name
        if (bias is not None) != config.lora_bias:
            has = "has no lora_B.bias" if bias is None else f"comes with {shorten(bias.info.name)}"
            raise AdapterTensorError(f"{a.info.where} {has}, but lora_bias is {str(config.lora_bias).lower()}")
        if bias is None:
            return None
        if config.use_dora:
            raise AdapterConfigError(f"lora_bias: {bias.info.where}: a bias beside DoRA; not supported")
        if bias.info.shape != (target.out_features,):
            raise AdapterTensorError(
                f"{bias.info.where}: shape {list(bias.info.shape)}, expected [{target.out_features}]"
            )
        if "bias" not in self._targets.saveable.get(name, {}):
            raise AdapterConfigError(f"lora_bias: {bias.info.where}: {name} is none of the maps that can have a bias")
        return bias.info

    def _plan_embedding(self, target: EmbeddingTarget, members: list[_Member]) -> EmbeddingPlan:
        found = _by_factor(members, (Factor.EMBEDDING_A, Factor.EMBEDDING_B, Factor.MAGNITUDE))
        self._refuse_dora(target.name, members)
        self._refuse_bias(target.name, members)
        a, b = _partners(found, Factor.EMBEDDING_A, Factor.EMBEDDING_B)
        sizes = {"size_in": target.num_embeddings, "size_out": target.embedding_dim}
        return EmbeddingPlan(target=target, pair=self._pair(a.info, b.info, name=a.key.module, **sizes))

    def _plan_tokens(self, module: str, members: list[_Member]) -> None:
        member, *others = members
        target = self._targets.embeddings.get(module) or self._targets.linears.get(module)
        if others or target is None:
            raise AdapterTensorError(f"{members[-1].info.where}: trained rows beside other tensors of {module}")
        if isinstance(target, EmbeddingTarget):
            param, rows, columns = "weight", target.num_embeddings, target.embedding_dim
        else:
            param, rows, columns = target.param, target.out_features, target.in_features
        info = member.info
        tokens = self._config.tokens(member.key.module, is_embedding=isinstance(target, EmbeddingTarget))
        if not tokens or info.shape != (len(tokens), columns) or max(tokens) >= rows:
            raise AdapterTensorError(
                f"{info.where}: shape {list(info.shape)}, expected [{len(tokens)}, {columns}], a row for each token id "
                f"below {rows} that trainable_token_indices names for {module}"
            )
        self.tokens[module] = TokensPlan(target=target, param=param, info=info, tokens=tokens)

    def biases_beside_dora(self) -> Iterator[AdapterError]:
        """DoRA scales what the base gives less its bias, and knows the base's own."""
        for module, params in self.saved.items():
            linear = self.linears.get(module)
            if "bias" in params and linear is not None and linear.magnitude is not None:
                yield AdapterConfigError(
                    f"bias {self._config.bias!r}: {params['bias'].where}: a trained bias beside DoRA; not supported"
                )

    def tie_tokens(self) -> None:
        """Rows of an embedding that is the head's weight too are the head's, where the file has none of its own."""
        for plan in [plan for plan in self.tokens.values() if isinstance(plan.target, EmbeddingTarget)]:
            weight = self._targets.saveable.get(plan.target.name, {}).get(plan.param)
            for name, linear in self._targets.linears.items():
                is_tied = weight is not None and self._targets.saveable.get(name, {}).get(linear.param) is weight
                if is_tied and name not in self.tokens and name not in self.linears:
                    self.tokens[name] = dataclasses.replace(plan, target=linear, param=linear.param)

    def _plan_saved(self, module: str, members: list[_Member]) -> dict[str, TensorInfo]:
        params: dict[str, TensorInfo] = {}
        for member in members:
            param, info = member.site.param, member.info
            if member.key.factor is Factor.ORIGINAL:  # PEFT reads it into a module that no one calls
                self.unused.append(info.name)
                continue
            if param in params:
                self.twins.append((params[param], info))
            base = self._targets.saveable[module][param]
            linear = self._targets.linears.get(module)
            if linear is not None and param == "bias" and not linear.has_bias:
                raise AdapterMismatchError(f"{info.where}: {module} of the base model has no bias")
            if info.shape != tuple(base.shape):
                raise AdapterTensorError(
                    f"{info.where}: shape {list(info.shape)}, expected {list(base.shape)} as {module}.{param} of the "
                    "base model; where the vocabulary was resized for training, resize the base model in the same way"
                )
            if not base.dtype.is_floating_point:
                raise AdapterTensorError(f"{info.where}: would replace {module}.{param}, which is {base.dtype}")
            params[param] = info
        return params

    def _plan_experts(self, target: ExpertsTarget, members: list[_Member]) -> ExpertsPlan:
        self._refuse_bias(target.name, members)
        slots: dict[tuple[Projection | None, int | None, bool, int], list[_Member]] = {}
        for member in members:
            site = member.site
            if not target.has_gate and member.info.nbytes == 0 and member.key.module.endswith(".w3"):
                self.unused.append(member.info.name)  # Tinker's place for an up projection beside a gate
                continue
            depth = member.key.depth if site.is_fused else 0
            slots.setdefault((site.projection, site.expert, site.is_fused, depth), []).append(member)
        single: dict[Projection, dict[int, Pair]] = {}
        stacked: dict[Projection, Pair] = {}
        packed: list[tuple[Projection | None, FusedTensors]] = []
        magnitudes: dict[Projection, dict[int, TensorInfo]] = {}
        for (projection, expert, is_fused, depth), slot in slots.items():
            found = _by_factor(slot, (Factor.A, Factor.B, Factor.MAGNITUDE))
            a, b = _partners(found, Factor.A, Factor.B)
            if projection is None or expert is None:
                self._refuse_dora(f"{target.name} as a whole", slot, "linear layers and single experts")
            if is_fused:
                packed.append((projection, FusedTensors(module=a.key.module, depth=depth, a=a.info, b=b.info)))
            elif projection is not None and expert is not None:
                size_in, size_out = fused.sizes(target, projection)
                pair = self._pair(a.info, b.info, name=a.key.module, size_in=size_in, size_out=size_out)
                single.setdefault(projection, {})[expert] = pair
                magnitude = self._magnitude(a.info, found.get(Factor.MAGNITUDE), size_out, target)
                if magnitude is not None:
                    magnitudes.setdefault(projection, {})[expert] = magnitude
            elif projection is not None:
                stacked[projection] = self._stacked_pair(target, projection, a, b)
        plan = ExpertsPlan(
            target=target,
            single=single,
            stacked=stacked,
            fused=tuple(self._fused_pairs(target, packed)),
            magnitudes=magnitudes,
        )
        _check_projections(plan)
        _check_padding(plan)
        return plan

    def _fused_pairs(
        self, target: ExpertsTarget, packed: list[tuple[Projection | None, FusedTensors]]
    ) -> Iterable[FusedPair]:
        unknown = [tensors for projection, tensors in packed if projection is None]
        roles = [(projection, tensors, "weight") for projection, tensors in packed if projection is not None]
        for projection, tensors in fused.assign_roles(target, self._config, unknown):
            param = target.w2_param if projection is Projection.DOWN else target.w13_param
            roles.append((projection, tensors, param))
        for projection, tensors, param in roles:
            rank = fused.fused_rank(target, projection, tensors)
            pair = self._scaled(tensors.a, tensors.b, name=f"{tensors.module}.{param}", rank=rank)
            a_is_input = fused.a_is_input(target, projection, tensors)
            yield FusedPair(projection=projection, pair=pair, a_is_input=a_is_input)

    def _stacked_pair(self, target: ExpertsTarget, projection: Projection, a: _Member, b: _Member) -> Pair:
        """A [E or 1, r, in], B [E or 1, out, r]: 1 where one factor serves all experts."""
        size_in, size_out = fused.sizes(target, projection)
        num_experts = target.num_experts
        rank = a.info.shape[1] if len(a.info.shape) == 3 else 0
        wanted = (f"[{num_experts} or 1, r, {size_in}]", f"[{num_experts} or 1, {size_out}, r]")
        for member, shape, text in zip((a, b), ((rank, size_in), (size_out, rank)), wanted, strict=True):
            found = member.info.shape
            if rank == 0 or found[1:] != shape or found[0] not in (1, num_experts):
                raise AdapterTensorError(f"{member.info.where}: shape {list(found)}, expected {text}")
        return self._scaled(a.info, b.info, name=a.key.module, rank=rank)

    def _pair(self, a: TensorInfo, b: TensorInfo, *, name: str, size_in: int, size_out: int) -> Pair:
        """A [r, in] and B [out, r] of one module."""
        if len(a.shape) != 2 or a.shape[1] != size_in or a.shape[0] == 0:
            raise AdapterTensorError(f"{a.where}: shape {list(a.shape)}, expected [r, {size_in}]")
        rank = a.shape[0]
        if b.shape != (size_out, rank):
            raise AdapterTensorError(
                f"{b.where}: shape {list(b.shape)}, expected [{size_out}, {rank}] beside {shorten(a.name)}"
            )
        return self._scaled(a, b, name=name, rank=rank)

    def _scaled(self, a: TensorInfo, b: TensorInfo, *, name: str, rank: int) -> Pair:
        """``name``: of the module, or of the parameter if that was targeted; PEFT's patterns match it."""
        expected, origin = self._config.rank(name)
        if rank != expected:
            raise AdapterTensorError(f"{a.where}: rank {rank} (shape {list(a.shape)}), but the config says {origin}")
        return Pair(a=a, b=b, rank=rank, scale=self._config.scale(name, rank))

    def _refuse_bias(self, module: str, members: list[_Member]) -> None:
        bias = next((m for m in members if m.key.factor is Factor.B_BIAS), None)
        if bias is not None or self._config.lora_bias:
            where = (bias or members[0]).info.where
            raise AdapterConfigError(f"lora_bias: {where}: biases are supported on linear layers only, not on {module}")

    def _refuse_dora(self, module: str, members: list[_Member], where_served: str = "linear layers") -> None:
        magnitude = next((m for m in members if m.key.factor is Factor.MAGNITUDE), None)
        if magnitude is not None or self._config.use_dora:
            where = (magnitude or members[0]).info.where
            raise AdapterConfigError(f"use_dora: {where}: DoRA is supported on {where_served} only, not on {module}")


def _by_factor(members: Iterable[_Member], wanted: tuple[Factor, ...]) -> dict[Factor, _Member]:
    found: dict[Factor, _Member] = {}
    for member in members:
        factor = member.key.factor
        if factor not in wanted:
            expected = " and ".join(wanted[:2])
            raise AdapterTensorError(f"{member.info.where}: {factor} on {member.site.module}, expected {expected}")
        if factor in found:
            raise AdapterTensorError(f"{member.info.where}: is the same factor as {shorten(found[factor].info.name)}")
        found[factor] = member
    return found


def _partners(found: Mapping[Factor, _Member], *factors: Factor) -> tuple[_Member, _Member]:
    for factor, other in (factors, factors[::-1]):
        if factor not in found:
            present = found.get(other) or next(iter(found.values()))
            raise AdapterTensorError(f"{present.info.where}: has no {factor} beside it")
    return found[factors[0]], found[factors[1]]


def _check_projections(plan: ExpertsPlan) -> None:
    """One projection comes in one form only."""
    forms: dict[Projection, TensorInfo] = {}

    def take(projection: Projection, info: TensorInfo) -> None:
        parts = (Projection.GATE, Projection.UP) if projection is Projection.GATE_UP else (projection,)
        for part in parts:
            if part in forms:
                raise AdapterTensorError(
                    f"{info.where}: {part} of {plan.target.name}, as is {shorten(forms[part].name)}"
                )
            forms[part] = info

    for projection, pairs in plan.single.items():
        take(projection, next(iter(pairs.values())).a)
    for projection, pair in plan.stacked.items():
        take(projection, pair.a)
    for fused_pair in plan.fused:
        take(fused_pair.projection, fused_pair.pair.a)


def _check_padding(plan: ExpertsPlan) -> None:
    """Bounds the zeros that experts of smaller rank, or absent ones, are padded with."""
    held = {expert for pairs in plan.single.values() for expert in pairs}
    count = plan.target.num_experts if plan.stacked or plan.fused else len(held)
    for projection, pairs in plan.single.items():
        ranks = [pair.rank for pair in pairs.values()]
        if count * max(ranks) > limits.MAX_PADDING * sum(ranks):
            largest = max(pairs.values(), key=lambda pair: pair.rank)
            raise AdapterTensorError(
                f"{largest.a.where}: rank {largest.rank} of one expert pads {plan.target.name} {projection} to "
                f"{count} * {max(ranks)} rows, more than {limits.MAX_PADDING} times the "
                f"{sum(ranks)} that the file holds"
            )


def _settle_orientation(
    plans: Mapping[str, ExpertsPlan], config: PeftConfig
) -> tuple[dict[str, ExpertsPlan], list[str]]:
    """Fills in ``a_is_input`` where shapes do not tell: as the file's other fused pairs, else by the version."""
    all_pairs = [(plan.target, pair) for plan in plans.values() for pair in plan.fused]
    told = {pair.a_is_input for _, pair in all_pairs if pair.a_is_input is not None}
    by_version = {
        name: fused.version_a_is_input(config.peft_version, is_transposed=plan.target.is_transposed)
        for name, plan in plans.items()
    }
    agreed = next(iter(told)) if len(told) == 1 else None
    settled = {}
    for name, plan in plans.items():
        default = by_version[name] if agreed is None else agreed
        pairs = tuple(
            dataclasses.replace(pair, a_is_input=default if pair.a_is_input is None else pair.a_is_input)
            for pair in plan.fused
        )
        settled[name] = dataclasses.replace(plan, fused=pairs)
    return settled, _orientation_notes(settled, told, config) if all_pairs else []


def _orientation_notes(plans: Mapping[str, ExpertsPlan], told: set[bool], config: PeftConfig) -> list[str]:
    sides = sorted({"input" if pair.a_is_input else "output" for plan in plans.values() for pair in plan.fused})
    source = "told by the shapes" if told else f"told by peft_version {config.peft_version or '(absent, before 0.18)'}"
    return [f"fused experts: lora_A lies on the {' or '.join(sides)} side, {source}"]
