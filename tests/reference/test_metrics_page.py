"""docs/reference/metrics.md places every figure in TensorBoard where the code does; tests/
test_tutorials.py compares it with the figures of a real run."""

import re
from pathlib import Path

import pytest

from megagpt.log.tags import _GROUP, tags

PAGE = (Path(__file__).resolve().parents[2] / "docs/reference/metrics.md").read_text()
EVENTS = ("checkpoint_stall_s", "perplexity", "validation_perplexity", "step")
"""Tags without a figure of that name in a step's or an evaluation's line."""


@pytest.mark.parametrize("name", sorted(set(_GROUP) - set(EVENTS)))
def test_a_figure_has_the_codes_tag(name):
    [tag] = tags({name: 1.0})
    [row] = [row for row in PAGE.splitlines() if re.match(rf"\|[^|]*`{name}`[^|]*\|", row)]
    place = tag.rpartition("/")[0]
    assert f"`{tag}`" in row or f"`{place}/...`" in row or f"`/{name}`" in row
    assert f"`{place}/" in row, f"{tag} is not in {row}"


def test_the_tags_of_records_in_records():
    record = {"norms": {"ratio": {"h.0": 1.0}}, "activations": {"rms": {"h.0": 1.0}}}
    record |= {"validation_losses": {"data/x": 2.0}, "sources": {"x": {"epochs": 1.0}}}
    for tag in tags(record):
        group = tag.partition("/")[0]
        assert f"`{group}/" in PAGE, tag
