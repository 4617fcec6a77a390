"""Opens an exported folder as its own model card says, and computes logits."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TEXTS = [[257, 70, 80, 90, 75, 258], [257, 101, 66, 120, 258]]
"""Two texts of six and five tokens of the tokenizer `bytes`, whose padding is token 256."""


def batch() -> dict[str, torch.Tensor]:
    """Return the texts as one batch, padded on the right."""
    longest = max(map(len, TEXTS))
    ids = torch.tensor([text + [256] * (longest - len(text)) for text in TEXTS])
    return {"input_ids": ids, "attention_mask": (ids != 256).long()}


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a model's logits; those of padding are zero."""
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found if found.ndim == 2 else found * inputs["attention_mask"][:, :, None]


def opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the code of a folder's card from within it; return what it defines."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        sys.modules.pop("load", None)
        found: dict[str, Any] = {}
        exec(code[0], found)
    sys.modules.pop("load", None)
    return found


def opened_logits(folder: Path, opener: str, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Return the logits of the texts after the card's code has opened the folder. pyreft is told of the first and the
    last token of every text."""
    found, inputs = opened(folder, monkeypatch), batch()
    if opener != "pyreft":
        return logits(found["model"], inputs)
    model, layers = found["model"], len(found["model"].interventions) // 2
    places = [[[0] for _ in TEXTS]] * layers + [[[len(text) - 1] for text in TEXTS]] * layers
    return logits(lambda **given: model(given, unit_locations={"sources->base": (None, places)})[1], inputs)
