"""How the ranks of a world share one model, and from an initialised torch.distributed world to their groups."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from moegraft.core.errors import ParallelError
from moegraft.parallel.collectives import Agreement, Communicator, GroupHealth

Dispatch = Literal["all_to_all", "all_gather"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """World = tp * ep ranks; rank = ep_rank * tp + tp_rank: the ranks of one tensor-parallel group are neighbours.

    tp: ranks that share the intermediate size F of every expert · ep: ranks that share the experts ·
    fully_sharded: the low-rank side is shared too (A of w13 along rank, B of w2 along D) · dispatch: how rows reach the
    experts of other ranks · data_parallel: every expert-parallel rank brings a batch of its own ·
    timeout_seconds: after which a collective that a peer has not joined ends in a ParallelError.
    """

    tp: int = 1
    ep: int = 1
    fully_sharded: bool = False
    dispatch: Dispatch = "all_to_all"
    data_parallel: bool = False
    timeout_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name, value in (("tp", self.tp), ("ep", self.ep)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if self.dispatch not in ("all_to_all", "all_gather"):
            raise ValueError(f"dispatch is {self.dispatch!r}, expected 'all_to_all' or 'all_gather'")
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds is {self.timeout_seconds}, expected more than 0")

    @property
    def world_size(self) -> int:
        return self.tp * self.ep

    def tp_rank_of(self, rank: int) -> int:
        """Which share of F a rank holds."""
        return rank % self.tp

    def ep_rank_of(self, rank: int) -> int:
        """Which share of the experts a rank holds."""
        return rank // self.tp

    def tp_ranks(self, ep_rank: int) -> tuple[int, ...]:
        """The ranks that hold the same experts."""
        return tuple(ep_rank * self.tp + tp_rank for tp_rank in range(self.tp))

    def ep_ranks(self, tp_rank: int) -> tuple[int, ...]:
        """The ranks that hold the same share of F."""
        return tuple(ep_rank * self.tp + tp_rank for ep_rank in range(self.ep))


def backend_of(device: torch.device | str) -> str:
    """What torch.distributed is initialised with: tensors on the CPU travel over gloo, those on CUDA over NCCL."""
    return "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"


class ParallelGroups:
    """This rank's place in the world and the groups that it talks to: ``world``, ``control``, ``tp`` and ``ep``.

    ``tp``: the ranks that hold the same experts. ``ep``: the ranks that hold the same share of F. ``control``: all
    ranks, for votes on adapters, which may be cast from another thread than the one whose layers use ``world``.
    """

    def __init__(
        self,
        config: ParallelConfig,
        *,
        world: Communicator,
        control: Communicator,
        tp: Communicator,
        ep: Communicator,
    ) -> None:
        self.config = config
        self.world = world
        self.control = control
        self.tp = tp
        self.ep = ep
        self._made: list[dist.ProcessGroup] = []
        self._health = GroupHealth()

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def sharing(self) -> tuple[tuple[int, ...], ...]:
        """The sets of ranks that bring the same rows."""
        config = self.config
        if config.data_parallel:
            return tuple(config.tp_ranks(ep_rank) for ep_rank in range(config.ep))
        return (tuple(range(config.world_size)),)

    @classmethod
    def alone(cls) -> ParallelGroups:
        """One process: every group has one rank, nothing is ever sent."""
        return cls(
            ParallelConfig(),
            world=Communicator.alone("world"),
            control=Communicator.alone("control"),
            tp=Communicator.alone("tensor-parallel"),
            ep=Communicator.alone("expert-parallel"),
        )

    @classmethod
    def create(cls, config: ParallelConfig, device: torch.device | str = "cpu") -> ParallelGroups:
        """Collective: every rank of the initialised world calls it with the same config.

        ``device``: see ``backend_of``. Raises ParallelError where torch.distributed is not initialised, its world has
        another size, or the ranks' configs differ.
        """
        if not (dist.is_available() and dist.is_initialized()):
            if config.world_size == 1:
                return cls.alone()
            raise ParallelError(
                f"{_needs(config)}, but torch.distributed is not initialised; start them with torchrun "
                f"--nproc-per-node {config.world_size} and call torch.distributed.init_process_group()"
            )
        backend, rank, health = backend_of(device), dist.get_rank(), GroupHealth()
        made: list[dist.ProcessGroup] = []

        def communicator(name: str, groups: list[tuple[int, ...]]) -> Communicator:
            """Every rank makes every group, in the same order, as torch.distributed wants it."""
            mine = Communicator.alone(name, rank)
            for ranks in groups:
                if len(ranks) == 1:
                    continue
                group = dist.new_group(list(ranks), timeout=timedelta(seconds=config.timeout_seconds), backend=backend)
                if rank in ranks:
                    made.append(group)
                    mine = Communicator(
                        name,
                        ranks,
                        ranks.index(rank),
                        group=group,
                        timeout_seconds=config.timeout_seconds,
                        health=health,
                    )
            return mine

        everyone = tuple(range(dist.get_world_size()))
        try:
            # The group of all ranks is the same under every config: over it they find out whether theirs agree.
            world = communicator("world", [everyone])
            with Agreement(world).step() as step:
                step.same("the ParallelConfig that they were started with", lambda: config)
            if world.size != config.world_size:
                raise ParallelError(f"{_needs(config)}, but the world of torch.distributed has {world.size}")
            parallel = cls(
                config,
                world=world,
                control=communicator("control", [everyone]),
                tp=communicator("tensor-parallel", [config.tp_ranks(ep_rank) for ep_rank in range(config.ep)]),
                ep=communicator("expert-parallel", [config.ep_ranks(tp_rank) for tp_rank in range(config.tp)]),
            )
            # No rank goes on, and is lost, while others still make their groups.
            parallel.control.all_gather_object(None)
        except RuntimeError as error:
            for group in made:
                dist.destroy_process_group(group)
            if isinstance(error, ParallelError):
                raise
            raise ParallelError(
                f"rank {rank}: a group of ranks could not be made within {config.timeout_seconds:g} s; a peer is dead, "
                f"late, or does something else: {str(error).splitlines()[0]}"
            ) from error
        parallel._made, parallel._health = made, health
        return parallel

    def warm_up(self, device: torch.device) -> None:
        """Collective: one exchange of ``device`` tensors in every group, and waits for it.

        NCCL connects two ranks when a group first sends, which must not be while a CUDA graph is captured.
        """
        for ranks in (self.world, self.tp, self.ep):
            if ranks.size > 1:
                ranks.all_reduce(torch.ones(1, device=device))
                ranks.all_to_all(torch.ones(ranks.size, device=device), [1] * ranks.size, [1] * ranks.size)
                ranks.traffic.reset()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def another(self, name: str) -> Communicator:
        """Collective: one more group of all ranks, for what another thread than the others' sends; on the host."""
        if self.world.size == 1:
            return Communicator.alone(name)
        timeout = self.config.timeout_seconds
        group = dist.new_group(list(self.world.ranks), timeout=timedelta(seconds=timeout), backend="gloo")
        self._made.append(group)
        rank, ranks = self.world.rank, self.world.ranks
        return Communicator(name, ranks, rank, group=group, timeout_seconds=timeout, health=self._health)

    def close(self) -> None:
        """Gives the groups back; the world of torch.distributed stays."""
        for group in self._made:
            dist.destroy_process_group(group)
        self._made = []


def _needs(config: ParallelConfig) -> str:
    return f"tp = {config.tp} and ep = {config.ep} need {config.world_size} processes"
