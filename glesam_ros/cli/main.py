"""`glesam`: one parser, one sub-command a module."""

from __future__ import annotations

import argparse
import errno
import os
import select
import sys
from collections.abc import Sequence
from typing import Any

from glesam_ros import __version__
from glesam_ros.cli import (
    bag,
    bench,
    degrade,
    demo,
    evaluate,
    export,
    lqseg,
    models,
    reallq,
    restore,
    segment,
    semantic,
    semantic_evaluate,
    train,
)
from glesam_ros.cli.options import CommandError
from glesam_ros.cli.stopping import stop_code, terminable
from glesam_ros.optional import OPTIONAL, TRAIN

EPILOG = """\
examples:
  glesam demo                                   node and camera on this machine, nothing else needed
  glesam segment photo.jpg --out result         masks, overlay and JSON of one picture
  glesam segment photos/ -r --out result        a folder and the folders below
  glesam semantic photos/ --out result          road, car, person, ...: the class of every pixel
  glesam restore photos/ --out result           clear pictures of bad ones, see its --help
  glesam bag drive.mcap --out drive_masks       a recorded bag, with the result topics added
  glesam degrade photo.jpg --sheet sheet.png    the picture in rain, fog, night, ..., see its --help
  glesam lqseg verify lqseg_train               a data set of degraded pictures, see its --help
  glesam reallq pick drive.mcap --out set       its worst frames, to be labelled, see its --help
  glesam train tiny --data DATA --out runs/tiny train the model, here in tiny; see its --help
  glesam evaluate --data DATA --out result      how good the masks are, see its --help
  glesam evaluate-semantic --data D --out result  how good the classes are, see its --help
  glesam models get sam2.1_hiera_tiny           weights of a full-size model, see its --help
  glesam bench                                  how fast the model is on this machine

`glesam COMMAND --help` explains a command with its own examples.
exit codes: 0 done, 1 something failed (said in one line), 2 wrong usage, 130 stopped by Ctrl-C, 141 nobody read the
output to its end (glesam models | head -1), 143 stopped by SIGTERM; demo ends with 0 after both, train with 130."""


REMEDIES = {
    errno.EEXIST: "expected a folder or a free name, got a file; give another name",
    errno.ENOTDIR: "expected a folder above it, got a file; give another name",
    errno.EISDIR: "expected a file, got a folder; give another name",
    errno.EACCES: "permission denied; give another place, or mend its permissions",
    errno.EROFS: "read-only file system; give another place",
    errno.ENOSPC: "no space left on device; make room, or give another place",
}
"""What the system says of a file in three words, with what was expected and how to mend it."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of `glesam`; each command sets `func`, which takes the arguments and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="glesam",
        description="Instance masks from cameras and pictures, also when the picture is dark, rainy, blurred or noisy.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"glesam {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    modules = (
        demo, segment, semantic, restore, bag, bench, models, export, degrade, lqseg, reallq, train, evaluate,
        semantic_evaluate,
    )
    for module in modules:
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `glesam` and return its exit code, see `EPILOG`; 2 is raised as SystemExit by argparse."""
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:  # a daemon may have closed it
                sys.stdout.flush()  # as Python ends, it could only complain of a closed pipe or a full disk
    except BrokenPipeError as error:
        if unread := [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]:
            _silence(*unread)
            return 141
        text = str(error)  # of a pipe elsewhere
    except OSError as error:
        _silence(sys.stdout)
        text = f"the output cannot be written: {error}"
    print(f"glesam: error: {text}", file=sys.stderr)
    return 1


def _is_unread(stream: Any) -> bool:
    """Whether the other end of a pipe is closed, as behind `| head`."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except (AttributeError, OSError, ValueError):  # none, or no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _silence(*streams: Any) -> None:
    """Let what is still to be written go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _run(argv: Sequence[str] | None) -> int:
    args = make_parser().parse_args(argv)
    try:
        with terminable():
            return int(args.func(args) or 0)
    except BrokenPipeError:
        raise
    except (CommandError, OSError, MemoryError) as error:
        print(f"glesam {args.command}: error: {_text(error)}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        # torch is in two extras
        how = TRAIN if (args.command, error.name) == ("train", "torch") else OPTIONAL[error.name]
        text = str(error) if how in str(error) else f"{error}; install it: {how}"
        print(f"glesam {args.command}: error: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"glesam {args.command}: stopped", file=sys.stderr)
        return stop_code(stop)


def _text(error: Exception) -> str:
    """What to say of an error; Python's own MemoryError has no text."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        names = error.filename if error.filename2 is None else f"{error.filename} -> {error.filename2}"
        return f"{names}: {REMEDIES.get(error.errno or 0, error.strerror)}"
    return str(error) or "out of memory"


if __name__ == "__main__":
    sys.exit(main())
