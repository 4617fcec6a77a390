"""docs/evaluation.md: its tables have every metric and every rule, and its short configurations are valid."""

import re

import pytest
from examples import DOCS
from small_config import SMALLEST

from fedray.config import load_config, parse_yaml
from fedray.config.metric import METRICS
from fedray.config.registry import Registry
from fedray.evaluation.extraction_rule import EXTRACTION_RULES
from fedray.evaluation.metrics import check_metric

PAGE = (DOCS / "evaluation.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading, without its first two lines."""
    lines = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize(("heading", "registry"), [("Metrics", METRICS), ("Extraction rules", EXTRACTION_RULES)])
def test_the_tables_are_complete(heading: str, registry: Registry[object]) -> None:
    assert sorted(row[0].strip("`") for row in table(heading)) == sorted(registry.names)


READS = {
    "predictions": {"classes", "numbers", "answer tokens"},
    "losses": {"losses"},
    "texts": {"texts"},
    "likelihoods": {"options"},
}


def test_the_metrics_are_what_the_table_says() -> None:
    for name, task, reads, *_ in table("Metrics"):
        metric = METRICS.find(name.strip("`"))
        assert metric.tasks == (task,)
        assert reads in READS[metric.reads]


def test_options_are_on_the_page() -> None:
    for registry in (METRICS, EXTRACTION_RULES):
        for name in registry.names:
            for option in registry.find(name).model_fields:
                assert re.search(rf"`{option}\b|{option}: ", PAGE), f"{name}: {option}"


def test_its_short_configurations_are_valid() -> None:
    blocks = [block.split("```")[0] for block in PAGE.split("```yaml\n")[1:]]
    assert len(blocks) >= 3
    for block in blocks:
        config = load_config({**SMALLEST, "method": "fedavg", **parse_yaml(block, "page")})
        for metric in config.evaluation.metrics:
            check_metric(metric, config.task)
