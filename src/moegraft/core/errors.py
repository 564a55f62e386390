"""Every error that moegraft raises on purpose. Each names what was found and what was expected."""

from __future__ import annotations


class MoegraftError(Exception):
    """Base of all errors raised on purpose by moegraft."""


class UnsupportedModelError(MoegraftError):
    """The model has no mixture-of-experts layer that moegraft can serve; the message names the class."""


class CheckpointError(MoegraftError):
    """A file, field or tensor of a model's checkpoint that cannot be read or served; no model was built."""


class NoBackendError(MoegraftError):
    """No backend can serve the layer, and the message holds every reason; or not the requested one, and why."""


class FileError(MoegraftError):
    """What a checked reader of files refuses. Adapters and checkpoints turn it into errors of their own."""


class StoredTensorError(FileError):
    """A tensor in a well-formed file that has a dtype which is not read, or values that are not finite."""


class AdapterError(MoegraftError):
    """Base of everything that is wrong with one adapter. Nothing was changed when it is raised."""


class AdapterFileError(AdapterError):
    """A file of the adapter is missing, truncated, malformed, a pickle, or escapes its folder."""


class AdapterConfigError(AdapterError):
    """``adapter_config.json`` is missing, malformed, or asks for something that cannot be served."""


class AdapterTensorError(AdapterError):
    """A tensor has the wrong shape, dtype or rank, holds non-finite values, or has no partner."""


class AdapterMismatchError(AdapterError):
    """A tensor names a module that the base model does not have: the adapter belongs to another base."""


class UnservedModuleError(AdapterMismatchError):
    """A tensor names a module that the base model has and that no adapter may touch; ``module``: its name there."""

    def __init__(self, message: str, *, module: str) -> None:
        super().__init__(message)
        self.module = module


class UnknownAdapterError(AdapterError, KeyError):
    """An adapter name that is not loaded; the message lists what is."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class AdapterNameError(AdapterError, ValueError):
    """A name that is taken, empty, or not a string."""


class AdapterMemoryError(AdapterError, MemoryError):
    """The adapter pool is too small; the message says how many bytes are needed and how many are free."""


class AdapterInUseError(AdapterError):
    """The adapter serves a batch in flight and can be neither unloaded nor evicted now."""


class BatchError(MoegraftError, ValueError):
    """The ``adapters=`` argument does not fit the batch, or a generation option cannot keep the mapping right.

    ``output``: what ``generate`` made of the other rows, where the error is about some rows only; else None.
    """

    def __init__(self, *args: object, output: object = None) -> None:
        super().__init__(*args)
        self.output = output


class ParallelError(MoegraftError, RuntimeError):
    """The ranks do not fit their configuration, or a collective failed: a peer is dead, late, or does something else.

    After a failed collective its groups are of no use: the processes have to be started again.
    """
