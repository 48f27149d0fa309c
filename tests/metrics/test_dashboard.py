"""The dashboard says nothing that Grafana's own schema does not know: make test-metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

dashboards = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins")

DASHBOARD = Path(__file__).resolve().parents[2] / "packaging" / "grafana" / "reaper.json"
OF_AN_IMPORT = {"__inputs", "__requires", "id"}  # what a file to import has besides the dashboard itself


def differences(ours: Any, read: Any, where: str = "") -> Iterator[str]:
    """Yield what of ``ours`` has been left out of ``read`` or changed in there: what the schema adds are its defaults."""
    if isinstance(ours, dict) and isinstance(read, dict):
        for key, value in ours.items():
            if key in read:
                yield from differences(value, read[key], f"{where}.{key}")
            else:
                yield f"{where}.{key} is unknown"
    elif isinstance(ours, list) and isinstance(read, list) and len(ours) == len(read):
        for index, (one, other) in enumerate(zip(ours, read, strict=True)):
            yield from differences(one, other, f"{where}[{index}]")
    elif ours != read:
        yield f"{where} is {ours!r}, and read as {read!r}"


def read_by_the_schema(found: dict[str, Any]) -> Any:
    plugins.register_default_plugins()
    return json.loads(encoder.JSONEncoder().encode(dashboards.Dashboard.from_json(found)))


def test_grafana_s_own_schema_knows_all_that_the_dashboard_says() -> None:
    found = json.loads(DASHBOARD.read_text("utf-8"))
    ours = {key: value for key, value in found.items() if key not in OF_AN_IMPORT}
    assert list(differences(ours, read_by_the_schema(ours))) == []


@pytest.mark.parametrize("where", ["panel", "options", "target"])
def test_what_the_schema_does_not_know_is_noticed(where: str) -> None:
    found = json.loads(DASHBOARD.read_text("utf-8"))
    panel = next(one for one in found["panels"] if one["type"] == "timeseries")
    {"panel": panel, "options": panel["options"], "target": panel["targets"][0]}[where]["colour"] = "red"
    assert any(".colour is unknown" in one for one in differences(found, read_by_the_schema(found)))
