"""The alerts fire when they should and keep quiet when not, by Prometheus' own rule tester."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from granite_ray import metrics
from tests.deployments import DEPLOY

LABELS = '{task="summarize", checkpoint="c"}'


@pytest.fixture(scope="module")
def rules() -> dict[str, Any]:
    documents = yaml.safe_load_all((DEPLOY / "base" / "monitoring.yaml").read_text())
    [found] = [document for document in documents if document["kind"] == "PrometheusRule"]
    return dict(found["spec"])


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    marks = {"task": "summarize", "checkpoint": "c", **labels}
    written = ", ".join(f'{key}="{value}"' for key, value in marks.items())
    return {"series": f"{name}{{{written}}}", "values": values}


def promtool(rules: dict[str, Any], folder: Path, interval: str, *cases: dict[str, Any]) -> None:
    """Run Prometheus' tester; fail with what it says."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool, of Debian's package prometheus, is not installed")
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    tests = {"rule_files": ["rules.yaml"], "evaluation_interval": interval, "tests": list(cases)}
    (folder / "tests.yaml").write_text(yaml.safe_dump(tests))
    for words in (("check", "rules", "rules.yaml"), ("test", "rules", "tests.yaml")):
        done = subprocess.run(
            ["promtool", *words], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def alerting(name: str, at: str, *fires: dict[str, str]) -> dict[str, Any]:
    labels = [{"exp_labels": {"task": "summarize", "checkpoint": "c", **fire}} for fire in fires]
    return {"alertname": name, "eval_time": at, "exp_alerts": labels}


def without_words(rules: dict[str, Any]) -> dict[str, Any]:
    """The rules without annotations, which the tester would want word for word."""
    stripped = json.loads(json.dumps(rules))
    for group in stripped["groups"]:
        for rule in group["rules"]:
            del rule["annotations"]
    return dict(stripped)


def test_no_success_for_26_hours(rules: dict[str, Any], tmp_path: Path) -> None:
    name = "ray_granite_last_success_timestamp_seconds"
    cron = "kube_cronjob_status_last_successful_time"
    idle_night = {
        "series": f'{cron}{{cronjob="granite-night"}}',
        "values": f"0x119 {25 * 3600}x60",
    }
    promtool(
        without_words(rules),
        tmp_path,
        "15m",
        {
            "interval": "15m",
            "input_series": [series(name, "0x4 _x200")],
            "alert_rule_test": [
                alerting("GraniteNoSuccess", "25h"),
                alerting("GraniteNoSuccess", "27h", {"severity": "critical"}),
            ],
        },
        {
            "interval": "15m",
            "input_series": [series(name, "0x4 _x200"), idle_night],
            "alert_rule_test": [alerting("GraniteNoSuccess", "31h")],
        },
    )


def test_more_than_one_percent_failed(rules: dict[str, Any], tmp_path: Path) -> None:
    name = "ray_granite_documents_total"
    promtool(
        without_words(rules),
        tmp_path,
        "1m",
        *(
            {
                "interval": "1m",
                "input_series": [
                    series(name, "0+1000x120", status="ok"),
                    series(name, f"0+{failed}x120", status="failed"),
                ],
                "alert_rule_test": [alerting("GraniteManyFailed", "90m", *fires)],
            }
            for failed, fires in ((9, []), (12, [{"severity": "warning"}]))
        ),
    )


def test_less_than_half_the_speed_of_the_week(rules: dict[str, Any], tmp_path: Path) -> None:
    name, progress = "ray_granite_documents_total", series("ray_granite_progress_ratio", "0.5x900")
    promtool(
        without_words(rules),
        tmp_path,
        "10m",
        *(
            {
                "interval": "10m",
                "input_series": [
                    series(name, f"0+1000x400 400000+{speed}x60", status="ok"),
                    progress,
                ],
                "alert_rule_test": [alerting("GraniteSlow", "4300m", *fires)],
            }
            for speed, fires in ((800, []), (300, [{"severity": "warning"}]))
        ),
    )


def test_replicas_that_die_again_and_again(rules: dict[str, Any], tmp_path: Path) -> None:
    name = "ray_granite_engine_restarts_total"
    promtool(
        without_words(rules),
        tmp_path,
        "1m",
        *(
            {
                "interval": "1m",
                "input_series": [series(name, f"0x30 {deaths}x60")],
                "alert_rule_test": [alerting("GraniteRestarts", "40m", *fires)],
            }
            for deaths, fires in ((2, []), (6, [{"severity": "warning"}]))
        ),
    )


def test_every_metric_that_is_asked_for_is_one_that_is_exported() -> None:
    exported = exported_names()
    dashboard = json.loads((DEPLOY / "grafana" / "granite.json").read_text())
    asked = {
        name
        for text in (
            (DEPLOY / "base" / "monitoring.yaml").read_text(),
            (DEPLOY / "README.md").read_text(),
            json.dumps(dashboard),
        )
        for name in re.findall(r"ray_granite_[a-z_]+[a-z]", text)
    }
    assert asked <= exported
    assert {name for panel in dashboard["panels"] for name in names_in(panel)} == exported


def test_prometheus_understands_every_panel_of_the_dashboard(tmp_path: Path) -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "granite.json").read_text())
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in dashboard["panels"]]
    assert len({place[:2] for place in places}) == len(places), "no panel hides another"
    rules = [
        {"record": f"panel_{at}", "expr": panel["targets"][0]["expr"]}
        for at, panel in enumerate(dashboard["panels"])
    ]
    promtool({"groups": [{"name": "panels", "rules": rules}]}, tmp_path, "1m")


def names_in(panel: dict[str, Any]) -> set[str]:
    return set(re.findall(r"ray_granite_[a-z_]+[a-z]", panel["targets"][0]["expr"]))


def exported_names() -> set[str]:
    """The names as Prometheus sees them, read from the source."""
    text = Path(metrics.__file__).read_text()
    counters = re.findall(r'_counter\(\s*"(\w+)"', text)
    gauges = re.findall(r'_gauge\(\s*"(\w+)"', text)
    return {f"ray_granite_{name}_total" for name in counters} | {
        f"ray_granite_{name}" for name in gauges
    }
