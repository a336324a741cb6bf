"""What can go wrong, and the exit code that says so (L0, stdlib only).

Every command ends with one of these codes. Code that finds a problem raises one of the classes
below with a message that names the file, key or value, the rule it breaks and the remedy; the
command line prints the message and exits with the class's code, without a traceback.
"""

EXIT_OK = 0
EXIT_FAILURE = 1
"""Anything that has no code of its own."""
EXIT_USAGE = 2
"""Wrong usage or configuration."""
EXIT_DAMAGE = 3
"""Damaged input, named in the message."""
EXIT_STOPPED = 75
"""Stopped by a signal or a time limit with a checkpoint saved; run again to go on (EX_TEMPFAIL)."""


class MegagptError(Exception):
    """A problem that the user can act on."""

    exit_code = EXIT_FAILURE


class UsageError(MegagptError):
    """Wrong usage or configuration: exit code 2."""

    exit_code = EXIT_USAGE


class DamageError(MegagptError):
    """A file that is not what its checksum or its format says: exit code 3."""

    exit_code = EXIT_DAMAGE


class Stopped(MegagptError):
    """The run was asked to stop and saved a checkpoint: exit code 75."""

    exit_code = EXIT_STOPPED
