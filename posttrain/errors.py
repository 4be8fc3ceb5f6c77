"""Every error that posttrain raises on purpose. Each message says what to do about it.

PosttrainError
├── SettingsError        exit 2  an unknown or ill-typed setting, a stage order that cannot be
├── DataError            exit 2  a missing file or column, an empty or contaminated data set
├── ModelError           exit 2  a checkpoint that cannot be loaded or does not fit
├── RunDirError          exit 2  a directory that is no run, is locked or has other settings
├── SandboxError         exit 2  programs cannot be run safely on this machine
├── StoreError           exit 2  teacher targets that were made with something else
├── StageError           exit 3  the run failed after it was started
│   ├── EngineError          a generator died or did not answer in time
│   ├── MismatchError        engine and learner disagree about log-probabilities
│   ├── DivergenceError      non-finite losses or gradients, several in a row
│   ├── StarvationError      no group carries signal; says which bound to move
│   └── PlacementError       devices that were asked for are not there
└── Interrupted          exit 4  stopped by a signal; the same command resumes
"""

from __future__ import annotations


class PosttrainError(Exception):
    """Base of all; `exit_code` is what the command line ends with."""

    exit_code = 3


class SettingsError(PosttrainError):
    exit_code = 2


class DataError(PosttrainError):
    exit_code = 2


class ModelError(PosttrainError):
    exit_code = 2


class RunDirError(PosttrainError):
    exit_code = 2


class SandboxError(PosttrainError):
    exit_code = 2


class StoreError(PosttrainError):
    exit_code = 2


class StageError(PosttrainError):
    exit_code = 3


class EngineError(StageError):
    pass


class MismatchError(StageError):
    pass


class DivergenceError(StageError):
    pass


class StarvationError(StageError):
    pass


class PlacementError(StageError):
    pass


class Interrupted(PosttrainError):
    exit_code = 4
