"""The typed errors that users see, one class a kind.

Every message says what happened, where, what was expected and found, and what to do next.
"""


class DllmcError(Exception):
    """Base class of every error that dllmc raises on purpose."""


class ConfigError(DllmcError):
    """A config.json, a model spec or compile options that are incomplete, contradictory or not supported."""


class CheckpointError(DllmcError):
    """A checkpoint folder whose files or tensors are missing, corrupt, or do not fit its config."""


class CaptureError(DllmcError):
    """A module that cannot be captured as a denoising step; names the node and the line in the user's model."""


class PassError(DllmcError):
    """A pipeline that cannot run, or a pass that left the graph in a state it must not leave."""


class BudgetError(DllmcError):
    """A memory budget that is too small; says what takes how many bytes, and the smallest budget that would do."""


class DeviceError(DllmcError):
    """A device that this machine has not, or that an artifact was not compiled for; says what to do instead."""


class ProgramError(DllmcError):
    """A program that is malformed, or whose memory plan would overwrite a value that is still needed."""


class ArtifactError(DllmcError):
    """An artifact directory that is incomplete, altered, or written by a newer version; names file and field."""


class ExportError(DllmcError):
    """An artifact cannot be exported in this form, or not on this machine."""


class RequestError(DllmcError):
    """A prompt or sampling parameters that cannot be served; raised before anything runs, with the numbers."""


class QueueFullError(DllmcError):
    """A request that came when as many were in line as the engine lets wait; try again when some are done."""


class CancelledError(DllmcError):
    """The request was cancelled, or its engine closed, before it was done."""


class DeadlineError(DllmcError):
    """The request was not done when its deadline passed."""


class StepError(DllmcError):
    """A request whose step failed; the error that it failed with is the cause. Others in the step went on."""


class TaskError(DllmcError):
    """A task that cannot be run: unknown, or a file of examples that is malformed; names the file and its line."""
