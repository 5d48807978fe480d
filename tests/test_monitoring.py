"""Prometheus' rules and Grafana's dashboard in examples/: promtool takes them, each alert fires when it should and not
when it should not, and they ask for nothing that the daemon does not export."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from urllib.request import urlopen

import pytest
import yaml

from daemon.config import load_config
from daemon.line.permit import PermitDesk
from daemon.record.metrics import Metrics
from tests.bundles import bad_pixels
from tests.daemons import ROOT, free_port, make_site
from tests.lines import send, wait_for

PROMETHEUS = ROOT / "examples/prometheus"
DASHBOARD = json.loads((ROOT / "examples/grafana/inspectd.json").read_text())
PAGE = (ROOT / "docs/monitoring.md").read_text()
RULES = [rule for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
TESTS = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRS = {f"{panel['title']} {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)


def promtool(*arguments):
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    return done.returncode, done.stdout + done.stderr


# --- the rules


@needs_promtool
def test_the_commands_of_the_page_find_nothing_wrong():
    commands = re.findall(r"^promtool (.*)$", PAGE, re.MULTILINE)
    assert [command.split()[:2] for command in commands] == [["check", "config"], ["check", "rules"], ["test", "rules"]]
    for command in commands:
        code, said = promtool(*command.split())
        assert code == 0, said
        assert "SUCCESS" in said
        assert "WARNING" not in said


@needs_promtool
def test_a_rule_that_fires_never_or_always_fails_its_test(tmp_path):
    shutil.copy(PROMETHEUS / "alerts_test.yml", tmp_path)
    fields = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
    for number, rule in enumerate(fields["groups"][0]["rules"]):
        rule["expr"] = f"({rule['expr']}) and vector(1) < 0" if number % 2 else f"({rule['expr']}) or vector(1)"
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(fields))
    code, said = promtool("test", "rules", tmp_path / "alerts_test.yml")
    assert code != 0
    assert [rule["alert"] for rule in RULES if rule["alert"] not in said] == []


def test_every_alert_has_a_series_that_fires_it_and_one_that_does_not():
    for rule in RULES:
        asked = [each for test in TESTS for each in test["promql_expr_test"] if f'"{rule["alert"]}"' in each["expr"]]
        assert {bool(each["exp_samples"]) for each in asked} == {True, False}, rule["alert"]


def test_every_alert_says_how_bad_it_is_what_it_is_and_what_to_do():
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in {"critical", "warning"}
        summary, description = rule["annotations"]["summary"], rule["annotations"]["description"]
        assert summary.startswith("{{ $labels.instance }}: ")
        assert len(description) > 80


def test_words_that_alerts_fill_in_are_labels_of_what_they_ask():
    for rule in RULES:
        (fired,) = [
            each["exp_samples"][0]["labels"]
            for test in TESTS
            for each in test["promql_expr_test"]
            if f'"{rule["alert"]}"' in each["expr"] and each["exp_samples"]
        ]
        labels = set(re.findall(r"(\w+)=", fired))
        assert set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))) <= labels, rule["alert"]


def test_alerts_name_only_commands_that_exist():
    from daemon.cli import cli

    told = set(re.findall(r"inspectd ([a-z][a-z-]+)(?= |;|\.)", str(RULES)))
    assert {"status", "doctor", "reset", "rollback", "resume"} <= told
    assert told <= set(cli.list_commands(None))


def test_the_scrape_knows_the_address_of_the_shipped_configuration():
    scrape = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    (job,) = scrape["scrape_configs"]
    assert job["job_name"] == "inspectd"
    host, port = load_config(ROOT / "config.yaml").metrics.address
    assert job["static_configs"][0]["targets"] == [f"{host}:{port}"]


# --- what is asked is there


def known():
    """Every series that the daemon may export, with its labels."""
    metrics = Metrics()
    labels = {
        family.name: set(collector._labelnames)
        for collector in vars(metrics).values()
        if hasattr(collector, "describe")
        for family in collector.describe()
    }
    found = {"up": set()}
    for family in metrics.registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        for suffix in suffixes:
            found[family.name + suffix] = labels[family.name] | ({"le"} if suffix == "_bucket" else set())
    return found


KNOWN = known()
ASKED = {**EXPRS, **{rule["alert"]: rule["expr"] for rule in RULES}}


@pytest.mark.parametrize("name", ASKED)
def test_a_question_asks_for_metrics_and_labels_that_the_daemon_exports(name):
    expr = ASKED[name]
    metrics = set(re.findall(r"\b(inspectd_\w+|up)\b(?=[{\[ )=]|$)", expr))
    assert metrics, expr
    assert metrics <= set(KNOWN)
    theirs = {"job", "instance"}.union(*(KNOWN[metric] for metric in metrics))
    matched = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expr))
    grouped = {label for group in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expr) for label in re.findall(r"\w+", group)}
    assert matched | grouped <= theirs


@pytest.mark.parametrize("name", EXPRS)
def test_a_legend_shows_labels_that_are_there(name):
    title, _, ref = name.rpartition(" ")
    (panel,) = [panel for panel in PANELS if panel["title"] == title]
    (target,) = [target for target in panel["targets"] if target["refId"] == ref]
    grouped = re.search(r"by \(([^)]*)\)", target["expr"])
    if grouped:
        left = {label.strip() for label in grouped[1].split(",")}
    else:
        left = set().union(*(KNOWN[metric] for metric in KNOWN if re.search(rf"\b{metric}\b", target["expr"])))
    assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= left


@needs_promtool
def test_promtool_reads_every_question_of_the_dashboard(tmp_path):
    filled = {"$instance": "box:9464", "$camera": "cam1|cam2", "$__rate_interval": "1m"}
    rules = []
    for number, expr in enumerate(EXPRS.values()):
        for word, value in filled.items():
            expr = expr.replace(word, value)  # noqa: PLW2901 - one word after the other
        assert "$" not in expr
        rules.append({"record": f"inspectd:panel:{number}", "expr": expr})
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    code, said = promtool("check", "rules", file)
    assert code == 0, said
    assert f"{len(EXPRS)} rules found" in said
    rules[0]["expr"] += " by by"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert promtool("check", "rules", file)[0] != 0


def test_the_dashboard_shows_what_a_line_is_watched_by():
    asked = " ".join(EXPRS.values())
    for metric in (
        "verdicts_total", "stage_seconds_bucket", "score_limit", "drift_statistic", "setup_statistic", "permit_lease_seconds",
        "permits_unacked", "permit_bridges", "queue_bytes", "sequence_gaps_total", "deadline_missed_total", "engine_info",
        "auth_denied_total", "journal_lag_seconds", "journal_fault", "state", "false_reject_rate_promised",
    ):  # fmt: skip
        assert f"inspectd_{metric}" in asked, metric
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["description"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


def test_no_two_panels_lie_on_one_another():
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


# --- what the daemon exports for them


def scraped(site):
    text = urlopen(f"http://{site.config['metrics']['bind']}/metrics").read().decode()
    return {
        name: float(value) for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[:1] != "#")
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = make_site(tmp_path_factory.mktemp("monitored"), tcp_curve=False)
    site.config["metrics"] = {"bind": f"127.0.0.1:{free_port()}"}
    site.config["cameras"]["cam2"] = site.config["cameras"]["cam1"]
    site.start()
    yield site
    assert site.stop() == 0


def test_a_camera_that_never_sent_anything_is_there_as_zeros(site):
    found = scraped(site)
    for name in ("frames_accepted_total", "sequence_gaps_total", "deadline_missed_total"):
        assert found[f'inspectd_{name}{{camera="cam2"}}'] == 0
    assert found['inspectd_verdicts_total{camera="cam2",outcome="PASS",reason=""}'] == 0
    assert found['inspectd_verdicts_total{camera="cam2",outcome="REJECT",reason="ENGINE_ERROR"}'] == 0
    assert found['inspectd_engine_swaps_total{product="part",result="returned"}'] == 0


def test_every_metric_of_a_question_is_in_a_live_scrape(site):
    with site.line() as line:
        part = send(line, 0, bad_pixels())
        wait_for(line, lambda: part.results and part.permits)
        names = {name.partition("{")[0] for name in scraped(site)}
        asked = {word for expr in ASKED.values() for word in re.findall(r"\binspectd_\w+\b", expr)}
        # Nobody was denied or refused here, and no engine was swapped for another.
        assert asked - names == {"inspectd_auth_denied_total", "inspectd_frames_refused_total"}


def test_the_state_and_the_bridges_are_told(site):
    assert scraped(site)['inspectd_state{state="RUNNING"}'] == 1
    with site.line():
        assert scraped(site)["inspectd_permit_bridges"] >= 1  # one of before is remembered for ten seconds
        assert site.run_command("pause").returncode == 0
        found = scraped(site)
        assert (found['inspectd_state{state="PAUSED"}'], found['inspectd_state{state="RUNNING"}']) == (1, 0)
        assert site.run_command("resume").returncode == 0
        assert scraped(site)['inspectd_state{state="RUNNING"}'] == 1


def test_a_state_that_nobody_knew_is_told_too():
    metrics = Metrics()
    value = metrics.registry.get_sample_value
    assert value("inspectd_state", {"state": "STARTING"}) == 1
    metrics.tell_state("FLYING")
    assert value("inspectd_state", {"state": "FLYING"}) == 1
    assert value("inspectd_state", {"state": "STARTING"}) == 0


def test_a_bridge_that_is_forgotten_is_not_counted():
    desk = PermitDesk("run", {}, 100)
    assert desk.bridges == 0
    desk.receive(b"plc", {"type": "HELLO", "nonce": "1"}, 0)
    assert desk.bridges == 1
    desk.tick(11_000_000_000)
    assert desk.bridges == 0
