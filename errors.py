"""The one exception that means "the user can put this right", and how a command ends. Standard library alone."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

ASIDE = ".partial-"  # names of half-written things contain this; they may be deleted at any time


class UserError(ValueError):
    """A mistake the user can put right.

    The message is one clear sentence: what is wrong, where, and what to do. The command line prints it as
    ``error: <sentence>`` and exits with 1; no traceback is shown. Bugs of ours must not be raised as this.

    leaves_at_once: the process ends without the interpreter's clean-up, which would not come to its end.
    """

    leaves_at_once = False


def run_command(command: Callable[[], object]) -> None:
    """Call `command` as the whole of a programme, and end a failure the way users should see it.

    A `UserError`, a full or read-only disk, or a wrong path of the user's: ``error: <sentence>`` and exit code 1.
    Ctrl-C: exit code 130, quietly. Anything else is a bug of ours: its traceback, and a line that says so.
    ``SHAPELOOM_TRACEBACK=1`` shows the traceback of user errors too.
    """
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sentence = sentence_of(error, sys.argv[1:])
        if sentence is None:
            print("error: this is a bug in shapeloom; please report it with the lines below", file=sys.stderr)
            raise
        if os.environ.get("SHAPELOOM_TRACEBACK"):
            raise
        print(f"error: {sentence}", file=sys.stderr)
        if isinstance(error, UserError) and error.leaves_at_once:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        sys.exit(1)


def sentence_of(error: Exception, arguments: list[str]) -> str | None:
    """What to tell the user, or None where the error is not the user's. `arguments`: the words of the command line."""
    if isinstance(error, UserError):
        return str(error)
    if not isinstance(error, OSError):
        return None
    path = error.filename.partition(ASIDE)[0] if isinstance(error.filename, str) else ""
    at = f" ({path})" if path else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{at}; free some space and start the same command again, finished work is kept"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and path:
        return f"{path} cannot be read or written ({error.strerror})"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST) and _named(
        path, arguments
    ):
        return f"{path}: {error.strerror}"
    return None


def _named(path: str, arguments: list[str]) -> bool:
    """Whether the user named `path`, a folder it is in or something in it, on the command line."""
    if not path:
        return False
    wanted = Path(os.path.abspath(path))
    named = [Path(os.path.abspath(word.partition("=")[2] or word)) for word in arguments if not word.startswith("--")]
    return any(folder == wanted or folder in wanted.parents or wanted in folder.parents for folder in named)
