"""The section `model`: what is fine-tuned."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from fedray.config.clients import Dtype
from fedray.config.section import Section, absolute

Pooling = Literal["mean", "cls", "last", "head"]


class ModelConfig(Section):
    path: str
    """Hub id, local folder, `package:NAME` (the folder with a config.json inside an installed Python package), a local
    file in GGUF (`model.gguf`, dequantised to `dtype`), or `random` (weights drawn from the seed, architecture from
    `config`)."""
    config: dict[str, Any] = Field(default_factory=dict)
    """For `random`: a transformers configuration (`model_type` and its fields). Otherwise: overrides of its fields."""
    tokenizer: str | None = None
    """Hub id, local folder, `package:NAME`, or `bytes` (one token per UTF-8 byte). Default: the model's own."""
    revision: str | None = None
    """Git revision on the hub."""
    dtype: Dtype = "float32"
    """Type of the frozen base weights; adapters are always float32. A tier may have its own (`precision`)."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. Off unless you know its author."""
    pooling: Pooling | None = None
    """Classification and regression: what the task head reads of a text. The mean of its tokens' last hidden states,
    the first one (cls), the last one, or what transformers' own classifier of this architecture reads (head). Default:
    as a sentence encoder's folder says (`modules.json`), else head; last or mean (an encoder) where transformers has no
    classifier."""

    def with_absolute_paths(self, folder: Path) -> Self:
        """Return this section with local folders as absolute paths; relative ones are below `folder`."""

        def local(name: str) -> str:
            found = absolute(name, folder)
            return found if Path(found).exists() else name  # otherwise a hub id

        path = self.path if self.path == "random" else local(self.path)
        tokenizer = self.tokenizer if self.tokenizer in (None, "bytes") else local(self.tokenizer)
        return self.model_copy(update={"path": path, "tokenizer": tokenizer})
