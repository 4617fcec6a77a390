"""`fedray run` as a program that a signal can end."""

import os
import signal
import subprocess
import sys
from pathlib import Path


def start_run(config: Path, output: Path, **variables: str) -> "subprocess.Popen[bytes]":
    """Start `fedray run` on a cluster of its own, in a session of its own, with what it says on stderr in a pipe.

    Args:
        variables: of the environment.
    """
    command = [sys.executable, "-c", "from fedray.cli.app import main; main()", "run", str(config)]
    return subprocess.Popen(
        [*command, "--output", str(output)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "RAY_ADDRESS": "local", **variables},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # shells ignore it for `&`
    )
