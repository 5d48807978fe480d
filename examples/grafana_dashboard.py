"""Grafana's dashboard of one line, examples/grafana/inspectd.json: `python -m examples.grafana_dashboard [--check]`.

The panels stand here as they are read, a line or two each; Grafana's own words for them are added below.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

TARGET = Path(__file__).parent / "grafana" / "inspectd.json"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_HERE = 'instance="$instance"'
_CAMERA = f'{_HERE}, camera=~"$camera"'
_RATE = "[$__rate_interval]"
_STATES = {"STARTING": "blue", "RUNNING": "green", "PAUSED": "orange", "DRAINING": "orange"}


@dataclass(frozen=True)
class Panel:
    """One picture: its questions as {legend: PromQL}, how wide it is (of 24) and what a reader should know."""

    title: str
    asks: dict[str, str]
    about: str
    kind: str = "timeseries"
    unit: str = "short"
    width: int = 8
    height: int = 8
    alarm_at: float | None = None
    more: dict[str, Any] = field(default_factory=dict)


def _sum(by: str, metric: str, labels: str) -> str:
    return f"sum by ({by}) (rate({metric}{{{labels}}}{_RATE}))"


def _quantile(share: float) -> str:
    return f"histogram_quantile({share}, sum by (le, stage) (rate(inspectd_stage_seconds_bucket{{{_HERE}}}{_RATE})))"


_STACKED = {"custom": {"stacking": {"mode": "normal"}, "fillOpacity": 40}}
_REJECTED = _sum("camera", "inspectd_verdicts_total", f'{_CAMERA}, outcome="REJECT"')
_JUDGED = _sum("camera", "inspectd_verdicts_total", _CAMERA)

ROWS: dict[str, list[Panel]] = {
    "Now": [
        Panel("State", {"{{state}}": f"inspectd_state{{{_HERE}}} == 1"}, "Anything but RUNNING: the PLC holds REJECT.",
              kind="stat", width=4, height=4, more={"textMode": "name"}),
        Panel("Parts a second", {"all": f"sum(rate(inspectd_verdicts_total{{{_CAMERA}}}{_RATE}))"},
              "Verdicts of all chosen cameras.", kind="stat", width=4, height=4),
        Panel("Reject share", {"all": f"sum({_REJECTED}) / sum({_JUDGED})"},
              "Of all verdicts, whatever the reason.", kind="stat", unit="percentunit", width=4, height=4),
        Panel("Alarms", {"{{camera}} {{kind}}": f"inspectd_camera_degraded{{{_CAMERA}}} == 1"},
              "DRIFT: scores have left the calibration's. SETUP: the pictures have. inspectd status says by how much.",
              kind="stat", width=4, height=4, alarm_at=1, more={"textMode": "name", "noValue": "none"}),
        Panel("PLC bridges", {"bridges": f"inspectd_permit_bridges{{{_HERE}}}"},
              "Bridges that are heard; without one every part is rejected.", kind="stat", width=4, height=4),
        Panel("Journal", {"fault": f"inspectd_journal_fault{{{_HERE}}}"},
              "1: it cannot be written (a full disk); the books wait in memory.",
              kind="stat", width=4, height=4, alarm_at=1),
    ],
    "Verdicts": [
        Panel("Verdicts by outcome and reason",
              {"{{outcome}} {{reason}}": _sum("outcome, reason", "inspectd_verdicts_total", _CAMERA)},
              "Parts a second. A PASS has no reason.", unit="cps", width=12, more=_STACKED),
        Panel("Reject share by camera", {"{{camera}}": f"{_REJECTED} / {_JUDGED}"},
              "Of all verdicts, whatever the reason.", unit="percentunit", width=12),
        Panel("Rejects against the engine's promise",
              {"{{camera}}": f"inspectd_false_reject_rate_estimate{{{_CAMERA}}}",
               "{{camera}} at least": f"inspectd_false_reject_rate_low{{{_CAMERA}}}",
               "{{camera}} at most": f"inspectd_false_reject_rate_high{{{_CAMERA}}}",
               "{{product}} promised": f"inspectd_false_reject_rate_promised{{{_HERE}}}"},
              "DEFECT among judged parts, 95 % bounds. 'At least' above 'promised': more than good parts explain.",
              unit="percentunit"),
        Panel("Parts that never arrived", {"{{camera}}": f"increase(inspectd_sequence_gaps_total{{{_CAMERA}}}{_RATE})"},
              "Numbers that a camera skipped; each is REJECT MISSING."),
        Panel("Deadlines missed", {"{{camera}}": f"increase(inspectd_deadline_missed_total{{{_CAMERA}}}{_RATE})"},
              "Parts rejected as LATE."),
    ],
    "Times": [
        Panel("p50 by stage", {"{{stage}}": _quantile(0.5)},
              "Interpolated between the histogram's bounds.", unit="s"),
        Panel("p99 by stage", {"{{stage}}": _quantile(0.99)},
              "total: arrival to verdict. queue high: too many frames; infer high: the processor is shared.", unit="s"),
        Panel("Frames that wait or are inspected", {"bytes": f"inspectd_queue_bytes{{{_HERE}}}"},
              "queue_mb bounds it.", unit="bytes"),
    ],
    "Drift and engines": [
        Panel("Drift", {"{{camera}}": f"inspectd_drift_statistic{{{_CAMERA}}}"},
              "Evidence that scores have left the calibration's: up to 0.6 on a quiet line, 1 is the alarm.",
              alarm_at=1),
        Panel("Set-up", {"{{camera}}": f"inspectd_setup_statistic{{{_CAMERA}}}"},
              "The same for brightness, sharpness and position.", alarm_at=1),
        Panel("Score limit", {"{{product}}": f"inspectd_score_limit{{{_HERE}}}"},
              "Scores at or above it are rejected; a step is another engine."),
        Panel("Engines at work", {"": f"inspectd_engine_info{{{_HERE}}}"}, "Version and digest by product.",
              kind="table", width=12, height=6, more={"instant": True}),
        Panel("Swaps", {"{{product}} {{result}}": f"increase(inspectd_engine_swaps_total{{{_HERE}}}{_RATE})"},
              "active: the new engine stayed. failed, returned: the old one judges.", height=6),
        Panel("p99 in the last swap", {"p99": f"inspectd_swap_p99_seconds{{{_HERE}}}"},
              "Arrival to verdict while the last engine was loaded and took over.", kind="stat", unit="s", width=4,
              height=6),
    ],
    "PLC": [
        Panel("Lease", {"silent for": f"inspectd_permit_lease_seconds{{{_HERE}}}"},
              "Since the quietest bridge was heard. Beyond 0.3 s its output is REJECT.", unit="s", width=12,
              alarm_at=0.3),
        Panel("Permits that no bridge has acknowledged", {"verdicts": f"inspectd_permits_unacked{{{_HERE}}}"},
              "They are sent again until they expire.", width=12),
    ],
    "Books and doors": [
        Panel("Journal behind the disk", {"lag": f"inspectd_journal_lag_seconds{{{_HERE}}}"},
              "What a power cut would cost now.", unit="s", width=6, alarm_at=2),
        Panel("Rejects not recorded", {"frames": f"inspectd_recorder_dropped_frames{{{_HERE}}}"},
              "Since the start; the books are complete all the same.", width=6),
        Panel("Denied", {"{{reason}}": f"increase(inspectd_auth_denied_total{{{_HERE}}}{_RATE})"},
              "Peers and messages turned away; one that tries again counts again.", width=6),
        Panel("Frames refused", {"{{camera}} {{reason}}": f"increase(inspectd_frames_refused_total{{{_HERE}}}{_RATE})"},
              "Not taken in: no verdict, the PLC rejects the part.", width=6),
    ],
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """The whole file, for Grafana 10 and newer."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"type": "row", "title": title, "id": len(panels) + 1, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})  # fmt: skip
        y += 1
        x, tallest = 0, 0
        for panel in row:
            if x + panel.width > 24:
                x, y, tallest = 0, y + tallest, 0
            place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
            panels.append({"id": len(panels) + 1, "gridPos": place, **_panel(panel)})
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest
    return {
        "title": "inspectd: one line",
        "uid": "inspectd-line",
        "description": "Verdicts, times, drift, the PLC's lease and the books of one inspectd. docs/monitoring.md",
        "tags": ["inspectd"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "panels": panels,
    }


def _panel(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.alarm_at is not None:
        steps.append({"color": "red", "value": panel.alarm_at})
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.kind == "timeseries":
        marks = {"thresholdsStyle": {"mode": "dashed" if panel.alarm_at is not None else "off"}}
        defaults["custom"] = {"fillOpacity": 10, "showPoints": "never", **marks, **panel.more.get("custom", {})}
        defaults["min"] = 0
    if "noValue" in panel.more:
        defaults["noValue"] = panel.more["noValue"]
    is_instant = bool(panel.more.get("instant")) or panel.kind == "stat"
    options: dict[str, Any] = {}
    if panel.kind == "stat":
        options = {"textMode": panel.more.get("textMode", "auto"), "colorMode": "background", "graphMode": "none",
                   "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}  # fmt: skip
    elif panel.kind == "timeseries":
        options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    overrides = [_coloured(name, color) for name, color in _STATES.items()] if panel.title == "State" else []
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": _SOURCE, "expr": expr, "legendFormat": legend,
             "instant": is_instant, "range": not is_instant,
             "format": "table" if panel.kind == "table" else "time_series"}
            for number, (legend, expr) in enumerate(panel.asks.items())
        ],
        "fieldConfig": {"defaults": defaults, "overrides": overrides},
        "options": options,
    }  # fmt: skip


def _coloured(name: str, color: str) -> dict[str, Any]:
    return {
        "matcher": {"id": "byName", "options": name},
        "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": color}}],
    }


def _variables() -> list[dict[str, Any]]:
    def asked(name: str, label: str, query: str, **more: Any) -> dict[str, Any]:
        return {"type": "query", "name": name, "label": label, "datasource": _SOURCE, "definition": query,
                "query": {"query": query, "refId": name}, "refresh": 2, "sort": 1, **more}  # fmt: skip

    return [
        {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus"},
        asked("instance", "Line", "label_values(inspectd_build_info, instance)"),
        asked("camera", "Camera", f"label_values(inspectd_drift_statistic{{{_HERE}}}, camera)",
              multi=True, includeAll=True, current={"text": "All", "value": "$__all"}),
    ]  # fmt: skip


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


@click.command()
@click.option("--check", is_flag=True, help="Only say whether the file is what the panels here make.")
def main(check: bool) -> None:  # noqa: FBT001 - click
    """Write the file."""
    if not check:
        TARGET.write_text(text())
    elif TARGET.read_text() != text():
        sys.exit(f"{TARGET}: not what the panels make; python -m examples.grafana_dashboard")


if __name__ == "__main__":
    main()
