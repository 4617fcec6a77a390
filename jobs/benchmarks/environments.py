"""The environments of fedray's peers: one per peer, created on first use, with the same torch as fedray."""

import hashlib
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from measure import Failed

PEERS = {"flwr": ("flwr[simulation]>=1.41,<2",), "pfl": ("pfl[pytorch]>=0.6,<0.7",)}
COMMON = ("torch", "transformers", "peft", "tokenizers", "safetensors")
"""Packages that local training uses; every environment has the versions in constraints.txt."""


def environment(peer: str, root: Path, constraints: Path) -> Path:
    """Return the Python of a peer's environment below `root`; install the environment if necessary.

    Raises:
        Failed: the installation fails, or its torch is another build.
    """
    lines = constraints.read_text(encoding="utf-8").splitlines()
    wanted = [*PEERS[peer], *(line for line in lines if line.partition("==")[0] in COMMON)]
    folder, stamp = root / peer, root / peer / ".installed"
    digest = hashlib.sha256("\n".join(wanted).encode()).hexdigest()
    python = folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != digest:
        print(f"installing {', '.join(wanted)} into {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        _run([str(python), "-m", "pip", "install", "--quiet", *wanted])
        stamp.write_text(digest)
    theirs, ours = (_torch(str(executable)) for executable in (python, sys.executable))
    if theirs != ours:
        raise Failed(f"{peer}: its torch is {theirs}, fedray's is {ours}; install the same build into {folder}")
    return python


def versions(python: Path | str, names: Sequence[str]) -> dict[str, str]:
    """Return the versions of packages in an environment, without the packages that it lacks."""
    code = (
        "import sys, importlib.metadata as m\n"
        "have = {d.name.lower() for d in m.distributions()}\n"
        "print(*[f'{n}={m.version(n)}' for n in sys.argv[1:] if n in have])"
    )
    return dict(pair.split("=", 1) for pair in _run([str(python), "-c", code, *names]).split())


def _torch(python: str) -> str:
    return _run([python, "-c", "import torch; print(torch.__version__, torch.version.git_version)"]).strip()


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return done.stdout
