"""Errors that a user can mend. The command line prints their message as one line and exits with their status."""

from __future__ import annotations


class UserError(Exception):
    """Base of the errors whose message alone tells the user what was given, what was expected and what to do."""

    status = 1
    """Exit status of a command that ends with this error: 1 failed while running, 2 bad arguments."""


class ArgumentError(UserError, ValueError):
    """A command, a configuration key or a value that cannot be used."""

    status = 2


class DataError(UserError):
    """A data file that is missing, damaged or of another layout."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another architecture."""


class OutputError(UserError, OSError):
    """A folder or file that cannot be written: no permission, a full disk, a file where a folder should be."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class MissingPackageError(UserError, ImportError):
    """An optional package that was asked for and cannot be imported."""

    @classmethod
    def of(cls, what: str, package: str, extra: str, cause: ImportError) -> MissingPackageError:
        """The error for ``what`` (as the user asked for it), naming the package, why it fails, and the pip extra that brings it."""
        return cls(f"{what} needs the package {package}, which cannot be imported ({cause}); pip install 'ttcfast[{extra}]' brings it")
