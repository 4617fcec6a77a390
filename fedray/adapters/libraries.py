"""peft and pyreft, imported when an adapter is first attached, without the parts that fedray never uses."""

import contextlib
import io
import sys
from importlib import import_module

from fedray.adapters.first_use import load_on_first_use


def import_peft() -> None:
    """Import peft without bitsandbytes: it looks for layers over bitsandbytes' weights, which fedray never has."""
    if "peft" not in sys.modules:
        load_on_first_use("bitsandbytes")
        import_module("peft")


def import_pyreft() -> None:
    """Import pyreft without `evaluate` and plots, which its trainer and pyvene import."""
    if "pyreft" not in sys.modules:
        load_on_first_use("evaluate", "matplotlib.pyplot")
        with silent():  # pyvene announces what is not installed
            import_module("pyreft")


def silent() -> contextlib.redirect_stdout[io.StringIO]:
    """Return a context in which what pyreft and pyvene print is lost."""
    return contextlib.redirect_stdout(io.StringIO())
