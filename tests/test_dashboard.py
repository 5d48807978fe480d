"""The dashboard's server: who gets in, who may change, what it reads, what it says when nobody is there."""

from __future__ import annotations

import json
import os
import ssl
import stat
import struct
import time
import urllib.request
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from adapters.dashboard import users as users_module
from adapters.dashboard.app import Dashboard
from adapters.dashboard.books import Books, TooLongError
from adapters.dashboard.command import user_command
from adapters.dashboard.engines import histogram
from adapters.dashboard.gate import POLICY, Throttle
from adapters.dashboard.live import Live
from adapters.dashboard.settings import load_place, load_settings
from adapters.dashboard.users import load_users, save_user
from daemon.errors import ConfigError, UsageError, WireError
from daemon.keys import make_peer
from daemon.line.wire import encode_header
from tests.bundles import bad_pixels, install_bundle
from tests.daemons import make_site
from tests.dashboards import PASSWORD, Shown, add_user, png, record_frame, rejected, set_up, write_books
from tests.lines import pump_until, send, settle

OURS = {"origin": "http://testserver"}
SECOND_NS = 10**9
NOON_NS = 1_700_000_000 * SECOND_NS


@pytest.fixture(autouse=True)
def _cheap_hashes(monkeypatch):
    """The same function with less work: what is tested here is not how long it takes."""
    monkeypatch.setattr(users_module, "_N", 1 << 4)
    monkeypatch.setattr(users_module, "_P", 1)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A site with an engine, shared by the tests that do not start its daemon; each works in a copy of the folder."""
    return make_site(tmp_path_factory.mktemp("built"))


@pytest.fixture
def site(built, tmp_path):
    site = make_site_like(built, tmp_path / "site")
    set_up(site)
    return site


def make_site_like(built, folder):
    import copy
    import shutil

    shutil.copytree(built.folder, folder, symlinks=True)
    return type(built)(folder, copy.deepcopy(built.config))


@pytest.fixture
def dashboard(site):
    return Dashboard(load_place(site.folder / "dashboard.yaml"))


@pytest.fixture
def client(dashboard):
    return TestClient(dashboard.app, follow_redirects=False)


def log_in(client, name="olga", password=PASSWORD):
    return client.post("/api/login", json={"name": name, "password": password}, headers=OURS)


def token(client):
    return client.get("/api/session").json()["token"]


def change(client, path="activate", fields=None, **headers):
    asked = {"engine": "part/2", "shadow": 0} if fields is None else fields
    return client.post(f"/api/{path}", json=asked, headers={**OURS, "x-csrf-token": token(client), **headers})


# --- who gets in


@pytest.mark.parametrize("path", ["session", "rejects", "part", "picture", "scores", "engines", "books"])
def test_nothing_is_told_to_whoever_is_not_logged_in(client, path):
    answer = client.get(f"/api/{path}")
    assert answer.status_code == 401
    assert answer.json() == {"error": "log in first"}


def test_the_page_leads_to_the_login(client):
    answer = client.get("/")
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert "Log in" in client.get("/login").text


def test_the_right_password_opens_the_page(client):
    assert log_in(client).status_code == 200
    known = client.get("/api/session").json()
    assert (known["user"], known["role"], known["mayChange"]) == ("olga", "operator", True)
    assert "inspectd" in client.get("/").text


def test_a_wrong_password_and_an_unknown_name_are_refused_alike(client):
    wrong = [log_in(client, password="four words in a raw"), log_in(client, name="nobody")]
    assert [answer.status_code for answer in wrong] == [401, 401]
    assert wrong[0].json() == wrong[1].json()
    assert "set-cookie" not in wrong[0].headers


@pytest.mark.parametrize("body", [{}, {"name": "olga"}, {"name": 1, "password": PASSWORD}, [], "olga"])
def test_a_login_that_is_none_is_refused(client, body):
    assert client.post("/api/login", json=body, headers=OURS).status_code == 400


def test_a_login_takes_json_of_a_few_bytes_only(client):
    text = "application/x-www-form-urlencoded"
    assert client.post("/api/login", content=b"name=olga", headers={**OURS, "content-type": text}).status_code == 415
    assert log_in(client, password="x" * 5000).status_code == 413


@pytest.mark.parametrize(
    "headers", [{}, {"origin": "http://elsewhere"}, {"origin": "https://testserver"}, {"origin": "null"}]
)
def test_another_sites_page_cannot_log_anybody_in(client, headers):
    answer = client.post("/api/login", json={"name": "olga", "password": PASSWORD}, headers=headers)
    assert answer.status_code == 403


def test_the_cookie_is_for_this_page_alone(client):
    said = log_in(client).headers["set-cookie"].lower()
    assert said.startswith("inspectd=")
    assert {"httponly", "samesite=strict", "path=/", "max-age=43200"} <= {part.strip() for part in said.split(";")}
    assert "secure" not in said  # plain http on loopback: a browser would drop it


def test_over_tls_the_cookie_never_travels_in_the_open(site):
    set_up(site, tls={"certificate": "c.pem", "key": "k.pem"})
    dashboard = Dashboard(load_place(site.folder / "dashboard.yaml"))
    client = TestClient(dashboard.app, base_url="https://testserver")
    fields = {"name": "olga", "password": PASSWORD}
    said = client.post("/api/login", json=fields, headers={"origin": "https://testserver"}).headers["set-cookie"]
    assert said.startswith("__Host-inspectd=")
    assert "secure" in {part.strip().lower() for part in said.split(";")}
    assert client.get("/api/session").status_code == 200


def test_a_changed_cookie_is_worth_nothing(client, dashboard):
    log_in(client)
    value = client.cookies["inspectd"]
    another = value[:5] + ("A" if value[5] != "A" else "B") + value[6:]
    for changed in (another, value[1:], value.replace(".", "", 1), value[:-10], ""):
        assert TestClient(dashboard.app, cookies={"inspectd": changed}).get("/api/session").status_code == 401
    assert TestClient(dashboard.app, cookies={"inspectd": value}).get("/api/session").status_code == 200


def test_another_dashboards_cookie_is_worth_nothing(client, site, built, tmp_path):
    log_in(client)
    other = make_site_like(built, tmp_path / "other")
    set_up(other)
    stranger = TestClient(Dashboard(load_place(other.folder / "dashboard.yaml")).app, cookies=dict(client.cookies))
    assert stranger.get("/api/session").status_code == 401


def test_a_login_ends_by_itself(client, monkeypatch):
    log_in(client)
    later = int(time.time()) + 12 * 3600 + 5
    monkeypatch.setattr("itsdangerous.timed.TimestampSigner.get_timestamp", lambda _: later)
    assert client.get("/api/session").status_code == 401


def test_a_login_survives_a_restart_of_the_dashboard(client, site):
    log_in(client)
    again = TestClient(Dashboard(load_place(site.folder / "dashboard.yaml")).app, cookies=dict(client.cookies))
    assert again.get("/api/session").status_code == 200


def test_logging_out_takes_the_cookie_back(client):
    log_in(client)
    answer = client.post("/api/logout", json={}, headers={**OURS, "x-csrf-token": token(client)})
    assert answer.status_code == 200
    assert client.get("/api/session").status_code == 401


def test_whoever_is_taken_out_is_out_at_once(client, site):
    log_in(client)
    users_module.remove_user(site.folder / "dashboard-users.yaml", "olga")
    assert client.get("/api/session").status_code == 401
    assert log_in(client).status_code == 401


@pytest.mark.parametrize(("role", "password"), [("operator", "another four words"), ("viewer", PASSWORD)])
def test_another_password_or_role_ends_the_sessions_of_before(client, site, role, password):
    log_in(client)
    add_user(site, "olga", role, password)
    assert client.get("/api/session").status_code == 401


def test_a_users_file_that_breaks_lets_nobody_in(client, site):
    log_in(client)
    (site.folder / "dashboard-users.yaml").write_text("[{name: olga}]")
    assert client.get("/api/session").status_code == 401


def test_tries_are_limited_even_for_the_right_password(client, dashboard):
    now = SimpleNamespace(s=1000.0)
    dashboard.throttle = Throttle(clock=lambda: now.s)
    assert [log_in(client, password="wrong words here").status_code for _ in range(6)] == [401] * 5 + [429]
    answer = log_in(client)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "61")
    now.s += 60
    assert log_in(client).status_code == 200


def test_a_success_forgives_the_failures_before(client):
    for _ in range(4):
        assert [log_in(client, password="wrong words here").status_code for _ in range(3)] == [401] * 3
        assert log_in(client).status_code == 200


def test_many_addresses_together_are_limited_too():
    throttle = Throttle(most_of_all=20, clock=lambda: 0.0)
    for number in range(20):
        assert throttle.wait_s(f"10.0.0.{number}") == 0
        throttle.note(f"10.0.0.{number}")
    assert throttle.wait_s("10.0.0.99") == 60


# --- who may change


def test_a_viewer_changes_nothing(client):
    log_in(client, "vic")
    answer = change(client)
    assert (answer.status_code, answer.json()["error"]) == (403, "vic is a viewer; this needs the role operator")


@pytest.mark.parametrize(
    "headers", [{"x-csrf-token": ""}, {"x-csrf-token": "guessed"}, {"origin": "http://elsewhere"}, {"origin": ""}]
)
@pytest.mark.parametrize("path", ["activate", "rollback", "logout"])
def test_a_change_needs_our_own_page_and_the_sessions_token(client, path, headers):
    log_in(client)
    assert change(client, path, **headers).status_code == 403


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"engine": 1}, {"engine": "part/2", "shadow": -1}, {"engine": "part/2", "shadow": True},
        {"engine": "part/2", "shadow": "5"},
    ],
)  # fmt: skip
def test_an_activation_that_is_none_is_refused(client, fields):
    log_in(client)
    assert change(client, fields=fields).status_code == 400


@pytest.mark.parametrize("engine", ["../../etc/passwd", "part", "part/../x", "part/current"])
def test_an_engine_is_a_name_and_a_version(client, engine):
    log_in(client)
    answer = change(client, fields={"engine": engine, "shadow": 0})
    assert (answer.status_code, "NAME/VERSION" in answer.json()["error"]) == (409, True)


def test_without_a_daemon_nothing_is_changed_and_it_says_so(client):
    log_in(client)
    answer = change(client)
    assert (answer.status_code, answer.json()["error"]) == (503, "no daemon: nothing was changed")


@pytest.mark.parametrize("path", ["/", "/login", "/api/session", "/api/none", "/static/app.css", "/static/none"])
def test_every_answer_forbids_other_hosts_and_frames(client, path):
    headers = client.get(path).headers
    assert headers["content-security-policy"] == POLICY
    assert "http" not in POLICY
    assert "unsafe" not in POLICY
    assert headers["x-content-type-options"] == "nosniff"


def test_nothing_of_the_line_is_kept_by_a_browser(client):
    log_in(client)
    assert client.get("/api/session").headers["cache-control"] == "no-store"
    assert client.get("/").headers["cache-control"] == "no-store"
    assert client.get("/static/main.js").headers["cache-control"] == "no-cache"


def test_pages_and_code_name_no_other_host():
    from adapters.dashboard.app import STATIC

    files = sorted(STATIC.iterdir())
    assert {path.suffix for path in files} == {".html", ".js", ".css", ".svg"}
    for path in files:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text.replace('"wss" : "ws"}://', ""), path.name
        assert "innerHTML" not in text, path.name


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/..%2fapp.py", "/static/%2e%2e/users.py", "/static/index.html"]
)
def test_only_code_and_style_are_served_as_files(client, path):
    assert client.get(path).status_code == 404


# --- the books


def keys(answer):
    return [(row["camera"], row["seq"]) for row in answer.json()["rows"]]


def test_rejects_come_in_pages_that_do_not_shift(client, site):
    write_books(site, *(rejected(number, ns=NOON_NS + number // 2 * SECOND_NS) for number in range(120)))
    log_in(client)
    seen, before = [], ""
    for page in range(4):
        answer = client.get("/api/rejects", params={"before": before, "most": 50})
        seen += keys(answer)
        before = answer.json()["before"]
        if page == 0:  # newer ones come in while somebody reads
            write_books(site, *(rejected(number, ns=NOON_NS + number * SECOND_NS) for number in range(200, 210)))
        if before is None:
            break
    assert seen == [("cam1", number) for number in reversed(range(120))]


def test_rejects_are_filtered_by_camera_reason_and_time(client, site):
    site.config["cameras"]["cam2"] = site.config["cameras"]["cam1"]
    records = [
        rejected(1, ns=NOON_NS), rejected(2, ns=NOON_NS + 10, reason="LATE"), rejected(3, ns=NOON_NS + 20, camera="cam2"),
        rejected(4, ns=NOON_NS + 30, camera="cam2", reason="MISSING"),
        {**rejected(5, ns=NOON_NS + 40), "outcome": "PASS", "reason": None},
    ]  # fmt: skip
    write_books(site, *records)
    log_in(client)

    def found(**query):
        return [seq for _, seq in keys(client.get("/api/rejects", params=query))]

    assert found() == [4, 3, 2, 1]
    assert found(camera="cam2") == [4, 3]
    assert found(reason="LATE") == [2]
    assert found(camera="cam2", reason="LATE") == []
    assert found(**{"from": NOON_NS + 10, "to": NOON_NS + 30}) == [3, 2]
    assert found(camera="' OR 1=1 --") == []


@pytest.mark.parametrize(
    "query",
    [
        {"before": "[1]"},
        {"before": "nothing"},
        {"before": '["a", "b", "c", 1]'},
        {"from": "-1"},
        {"to": "1e9"},
        {"most": "x"},
    ],
)
def test_a_question_that_is_none_is_refused(client, site, query):
    write_books(site)
    log_in(client)
    assert client.get("/api/rejects", params=query).status_code == 400


def test_a_page_has_a_bounded_number_of_rows(client, site):
    write_books(site, *(rejected(number, ns=NOON_NS + number) for number in range(300)))
    log_in(client)
    assert len(keys(client.get("/api/rejects", params={"most": 100_000}))) == 200


def test_a_reject_is_shown_whole(client, site):
    record = rejected(7, ns=NOON_NS)
    write_books(site, record)
    record_frame(site, record, mask=png(255), heatmap=png(90))
    log_in(client)
    assert client.get("/api/rejects").json()["rows"][0]["recorded"]
    key = {"camera": "cam1", "epoch": "e1", "seq": 7}
    part = client.get("/api/part", params=key).json()
    assert (part["pictures"], len(part["regions"])) == (["frame", "mask", "heatmap"], 1)
    for name, value in (("frame", 128), ("mask", 255), ("heatmap", 90)):
        answer = client.get("/api/picture", params={**key, "name": name})
        assert (answer.headers["content-type"], answer.content) == ("image/png", png(value))


def test_a_reject_without_a_frame_says_so(client, site):
    write_books(site, rejected(7, ns=NOON_NS, reason="LATE"))
    log_in(client)
    key = {"camera": "cam1", "epoch": "e1", "seq": 7}
    assert client.get("/api/rejects").json()["rows"][0]["recorded"] is False
    assert client.get("/api/part", params=key).json()["pictures"] == []
    assert client.get("/api/picture", params={**key, "name": "frame"}).status_code == 404
    assert client.get("/api/part", params={**key, "seq": 8}).status_code == 404


@pytest.mark.parametrize("name", ["../../keys/server.yaml", "json", "", "frame.png", "/etc/passwd"])
def test_a_picture_is_one_of_three(client, site, name):
    record = rejected(7, ns=NOON_NS)
    write_books(site, record)
    record_frame(site, record)
    log_in(client)
    answer = client.get("/api/picture", params={"camera": "cam1", "epoch": "e1", "seq": 7, "name": name})
    assert answer.status_code == 400


def test_an_epoch_cannot_lead_out_of_the_folder(client, site):
    record = rejected(7, ns=NOON_NS, epoch="../../../keys/x")
    write_books(site, record)
    record_frame(site, record)
    log_in(client)
    key = {"camera": "cam1", "epoch": "../../../keys/x", "seq": 7, "name": "frame"}
    assert client.get("/api/picture", params=key).content == png()
    key["epoch"] = "../../../keys/server"
    assert client.get("/api/picture", params=key).status_code == 404


@pytest.mark.parametrize("file", ["../../keys/server.yaml", "/etc/passwd", "other.png", "", None])
def test_facts_that_name_another_file_show_none(client, site, file):
    record = rejected(7, ns=NOON_NS)
    write_books(site, record)
    record_frame(site, record)
    (facts,) = (site.folder / "run/rejects").rglob("*.json")
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "file": file}))
    log_in(client)
    key = {"camera": "cam1", "epoch": "e1", "seq": 7, "name": "frame"}
    assert client.get("/api/picture", params=key).status_code == 404


def test_a_link_in_the_place_of_a_frame_is_not_followed(client, site):
    record = rejected(7, ns=NOON_NS)
    write_books(site, record)
    record_frame(site, record)
    (frame,) = (site.folder / "run/rejects").rglob("*.png")
    frame.unlink()
    frame.symlink_to(site.folder / "keys/server.yaml")
    log_in(client)
    key = {"camera": "cam1", "epoch": "e1", "seq": 7, "name": "frame"}
    assert client.get("/api/picture", params=key).status_code == 404


def test_no_ledger_yet_is_told(client):
    log_in(client)
    answer = client.get("/api/rejects")
    assert answer.status_code == 404
    assert "has this configuration ever run?" in answer.json()["error"]


def test_a_ledger_that_is_none_is_told(client, site):
    folder = site.folder / "run/ledger"
    folder.mkdir(parents=True)
    (folder / "ledger.sqlite").write_text("no database at all, but long enough to be looked at" * 50)
    log_in(client)
    assert client.get("/api/rejects").status_code == 404


def test_reading_the_books_leaves_nothing_behind(client, site):
    write_books(site, rejected(1, ns=NOON_NS))
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (site.folder / "run/ledger").iterdir())
    log_in(client)
    assert keys(client.get("/api/rejects")) == [("cam1", 1)]
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (site.folder / "run/ledger").iterdir()) == before


def test_a_question_that_takes_too_long_is_given_up(site, monkeypatch):
    write_books(site, *(rejected(number, ns=NOON_NS + number) for number in range(5000)))
    monkeypatch.setattr("adapters.dashboard.books._LONGEST_S", -1.0)
    monkeypatch.setattr("adapters.dashboard.books._STEPS", 10)
    with pytest.raises(TooLongError, match="ask for less time"):
        Books(site.folder / "run/ledger", None).counts(0)


def test_figures_count_parts_and_changes_of_a_period(client, site):
    now_ns = time.time_ns()
    event = {
        "t": "event",
        "ns": now_ns,
        "user": "olga",
        "command": "activate",
        "engine": "part/2",
        "ok": True,
        "detail": None,
    }
    gone = {**rejected(10, ns=now_ns - 10**9, reason="MISSING"), "seqTo": 19, "score": None}
    old = rejected(1, ns=now_ns - 2 * 3600 * SECOND_NS)
    write_books(site, old, gone, event)
    log_in(client)

    def counts(period):
        rows = client.get("/api/books", params={"period": period}).json()["counts"]
        return {row["reason"]: row["parts"] for row in rows}

    assert counts("hour") == {"MISSING": 10}
    assert counts("shift") == {"MISSING": 10, "DEFECT": 1}
    (told,) = client.get("/api/books").json()["events"]
    assert (told["user"], told["command"], told["engine"], told["ok"]) == ("olga", "activate", "part/2", 1)
    assert client.get("/api/books", params={"period": "ever"}).status_code == 400


# --- engines and scores


def test_engines_are_listed_with_what_they_promise(client, site):
    install_bundle(site.folder / "engines", site.folder / "keys", version="2")
    (site.folder / "engines/part/3").mkdir()
    log_in(client)
    engines = {engine["version"]: engine for engine in client.get("/api/engines").json()["engines"]}
    assert sorted(engines) == ["1", "2", "3"]
    assert engines["1"]["isCurrent"]
    assert not engines["2"]["isCurrent"]
    assert engines["2"]["products"]["part"]["n"] == 20
    assert engines["2"]["golden"]["frames"] == 2
    assert "its manifest cannot be read" in engines["3"]["fault"]


def test_scores_lie_beside_those_of_the_calibration(client, site):
    digest = next(iter(_digests(site)))
    records = [
        {**rejected(number, ns=time.time_ns() - number * SECOND_NS), "engine": digest, "score": float(number)}
        for number in range(30)
    ]
    write_books(site, *records, {**rejected(99, ns=time.time_ns()), "engine": "another", "score": 1e9})
    log_in(client)
    found = client.get("/api/scores", params={"camera": "cam1"}).json()
    assert (found["n"], found["nCalibration"], found["engine"]) == (30, 20, "part/1")
    assert sum(found["line"]) == pytest.approx(1)
    assert sum(found["calibration"]) == pytest.approx(1)
    assert found["edges"][0] < found["medianCalibration"] < found["limit"] < found["edges"][-1]
    assert client.get("/api/scores", params={"camera": "cam9"}).status_code == 404


def _digests(site):
    import hashlib

    return [hashlib.sha256((site.folder / "engines/part/1/manifest.json").read_bytes()).hexdigest()]


def test_scores_are_shown_before_the_first_part(client):
    log_in(client)
    found = client.get("/api/scores", params={"camera": "cam1"}).json()
    assert (found["n"], found["median"]) == (0, None)
    assert sum(found["line"]) == 0


def test_calibration_that_is_not_the_manifests_is_not_shown(client, site):
    path = site.folder / "engines/part/1/calibration.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    log_in(client)
    answer = client.get("/api/scores", params={"camera": "cam1"})
    assert (answer.status_code, "is not what the manifest lists" in answer.json()["error"]) == (404, True)


def test_a_score_far_beyond_is_in_the_last_bar():
    found = histogram([0.0, 0.1, 1e6], [0.0, 0.1, 0.2], limit=1.0)
    assert found["line"][-1] == pytest.approx(1 / 3)
    assert found["edges"][-1] < 3


# --- what the results socket says


def result(seq, outcome="PASS", reason=None, camera="cam1", payloads=None, **more):
    header = {
        "camera": camera,
        "epoch": "e",
        "seq": seq,
        "outcome": outcome,
        "reason": reason,
        "score": 1.0,
        "limit": 2.0,
    }
    pictures = payloads or {}
    told = encode_header({**header, "payloads": list(pictures), **more})
    return [f"result/test/{camera}".encode(), told, *pictures.values()]


def test_the_newest_of_each_camera_is_kept():
    live = Live("test", {"cam1": "part", "cam2": "part"})
    live.take(result(1))
    live.take(result(2, "REJECT", "DEFECT", payloads={"frame": b"jpeg", "mask": b"png"}))
    live.take(result(3, "REJECT", "MISSING", seqFrom=3, seqTo=12))
    live.take(result(1, camera="cam2"))
    live.take(result(1, camera="cam9"))  # of another configuration
    facts = live.facts(0)
    assert (facts["cameras"]["cam1"]["passed"], facts["cameras"]["cam1"]["rejected"]) == (
        1,
        {"DEFECT": 1, "MISSING": 10},
    )
    assert [header["seq"] for header in facts["rejects"]] == [2, 3]
    assert [header["seq"] for header in live.facts(1)["rejects"]] == [3]
    assert live.cameras["cam1"].picture.parts == {"frame": b"jpeg", "mask": b"png"}
    assert live.cameras["cam1"].last["seq"] == 3
    assert live.cameras["cam2"].picture is None
    assert "cam9" not in facts["cameras"]


def test_what_is_kept_does_not_grow():
    live = Live("test", {"cam1": "part"})
    for seq in range(10_000):
        live.take(result(seq, "REJECT", "DEFECT"))
    assert len(live.facts(0)["rejects"]) <= 60
    assert len(live.cameras["cam1"].decided_s) <= 5000
    assert live.facts(0)["cameras"]["cam1"]["rejected"] == {"DEFECT": 10_000}


def test_a_late_score_joins_the_part_it_belongs_to():
    live = Live("test", {"cam1": "part"})
    live.take(result(1, "REJECT", "LATE", score=None, limit=None))
    late = [b"late/test/cam1", encode_header({"epoch": "e", "seq": 1, "score": 7.0, "limit": 2.0})]
    live.take(late)
    assert (live.cameras["cam1"].last["score"], live.cameras["cam1"].last["reason"]) == (7.0, "LATE")
    live.take(result(2))
    live.take(late)
    assert live.cameras["cam1"].last["score"] == 1.0


@pytest.mark.parametrize("parts", [[], [b"result/test/cam1"], [b"result/test/cam1", b"{"], [b"result/cam1", b"{}"]])
def test_a_message_that_is_none_is_refused(parts):
    with pytest.raises(WireError):
        Live("test", {"cam1": "part"}).take(parts)


# --- the WebSocket


def texts(socket):
    """States and pictures as they come: ("state", dict) or ("picture", (header, parts))."""
    while True:
        got = socket.receive()
        if got.get("text") is not None:
            yield "state", json.loads(got["text"])
        elif got.get("bytes") is not None:
            data = got["bytes"]
            (length,) = struct.unpack_from("<I", data)
            header = json.loads(data[4 : 4 + length])
            offset, parts = 4 + length, {}
            for name, size in header["parts"]:
                parts[name] = data[offset : offset + size]
                offset += size
            assert offset == len(data)
            yield "picture", (header, parts)
        else:
            raise AssertionError(got)


def wait(socket, condition, most=400):
    """The first thing told that fits; states come several times a second."""
    for _, (kind, told) in zip(range(most), texts(socket), strict=False):
        if found := condition(kind, told):
            return found
    raise AssertionError("what was waited for was not told")


def end_of(socket):
    """The code that the socket is closed with, soon."""
    codes = (got["code"] for got in (socket.receive() for _ in range(50)) if got["type"] == "websocket.close")
    return next(codes)


def test_a_socket_needs_our_own_page(dashboard):
    with TestClient(dashboard.app) as client:
        log_in(client)
        for headers in ({}, {"origin": "http://elsewhere"}):
            with pytest.raises(WebSocketDisconnect), client.websocket_connect("/live", headers=headers):
                pass


def test_a_socket_needs_a_login_and_ends_with_it(dashboard, site):
    with TestClient(dashboard.app) as client:
        with client.websocket_connect("/live", headers=OURS) as socket, pytest.raises(WebSocketDisconnect) as ended:
            socket.receive_text()
        assert ended.value.code == 4401
        log_in(client)
        with client.websocket_connect("/live", headers=OURS) as socket:
            assert json.loads(socket.receive_text())["state"] == "NO_DAEMON"
            users_module.remove_user(site.folder / "dashboard-users.yaml", "olga")
            assert end_of(socket) == 4401


def test_a_picture_is_sent_again_only_when_one_was_shown(dashboard):
    with TestClient(dashboard.app) as client:
        log_in(client)
        with client.websocket_connect("/live", headers=OURS) as socket:
            for seq in range(3):
                client.portal.call(dashboard.live.take, result(seq, payloads={"frame": b"jpeg"}))
            header, parts = wait(socket, lambda kind, told: told if kind == "picture" else None)
            assert parts == {"frame": b"jpeg"}
            client.portal.call(dashboard.live.take, result(9, payloads={"frame": b"newer"}))
            kinds = {kind for _, (kind, _) in zip(range(8), texts(socket), strict=False)}
            assert kinds == {"state"}
            socket.send_text(json.dumps({"shown": "cam1"}))
            header, parts = wait(socket, lambda kind, told: told if kind == "picture" else None)
            assert (header["header"]["seq"], parts) == (9, {"frame": b"newer"})


@pytest.mark.parametrize("said", ["{", "[]", '{"shown": "cam9"}', '{"shown": []}', "9" * 5000])
def test_words_that_are_not_ours_end_the_socket(dashboard, said):
    with TestClient(dashboard.app) as client:
        log_in(client)
        with client.websocket_connect("/live", headers=OURS) as socket:
            socket.receive_text()
            socket.send_text(said)
            assert end_of(socket) == 1008


def test_only_so_many_may_watch_at_once(dashboard, monkeypatch):
    monkeypatch.setattr("adapters.dashboard.watchers.MOST_WATCHERS", 2)
    with TestClient(dashboard.app) as client:
        log_in(client)
        first = client.websocket_connect("/live", headers=OURS)
        second = client.websocket_connect("/live", headers=OURS)
        with first as one, second as two:
            one.receive_text()
            two.receive_text()
            with client.websocket_connect("/live", headers=OURS) as third:
                assert end_of(third) == 1013
        with client.websocket_connect("/live", headers=OURS) as again:  # the two have gone
            assert json.loads(again.receive_text())["fresh"]


# --- with a real daemon


def test_the_page_hears_the_line_and_changes_it_in_a_users_name(site):
    install_bundle(site.folder / "engines", site.folder / "keys", version="2", seed=5)
    dashboard = Dashboard(load_place(site.folder / "dashboard.yaml"))
    with TestClient(dashboard.app) as client:
        log_in(client)
        with client.websocket_connect("/live", headers=OURS) as socket:
            assert wait(socket, lambda kind, told: kind == "state" and told["state"] == "NO_DAEMON")
            site.start()
            assert wait(socket, lambda kind, told: kind == "state" and told["state"] == "RUNNING" and told["status"])
            with site.line() as line:
                send(line, 0)
                send(line, 1, bad_pixels())
                settle(line)
                header, parts = wait(socket, lambda kind, told: told if kind == "picture" else None)
                assert (header["header"]["seq"], header["header"]["reason"]) == (1, "DEFECT")
                assert set(parts) == {"mask", "frame"}
                socket.send_text(json.dumps({"shown": "cam1"}))
                facts = wait(
                    socket,
                    lambda kind, told: told if kind == "state" and told["status"]["permits"]["bridges"] else None,
                )
                camera = facts["cameras"]["cam1"]
                assert (camera["passed"], camera["rejected"]) == (1, {"DEFECT": 1})
                assert facts["status"]["engines"]["part"]["goldenDeviation"] <= 1
                answer = change(client)
                assert answer.status_code == 200, answer.text
                assert answer.json()["engine"] == "part/2"
                refused = change(client)
                assert (refused.status_code, "at work already" in refused.json()["error"]) == (409, True)
                assert change(client, "rollback", {"engine": "part"}).json()["engine"] == "part/1"
            said = [(event["user"], event["command"], event["engine"], event["ok"]) for event in told_events(client, 3)]
            assert said == [
                ("olga", "rollback", "part/1", 1), ("olga", "activate", "part/2", 0), ("olga", "activate", "part/2", 1)
            ]  # fmt: skip
            assert "olga" in site.run_command("ledger").stdout
            site.kill()
            gone = wait(socket, lambda kind, told: told if kind == "state" and not told["heard"] else None)
            assert (gone["state"], gone["status"]) == ("NO_DAEMON", None)
            site.start()
            assert wait(socket, lambda kind, told: kind == "state" and told["state"] == "RUNNING")
            assert site.stop() == 0


def told_events(client, count):
    """The ledger follows the journal within a second."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        events = client.get("/api/books").json()["events"]
        if len(events) == count:
            return events
        time.sleep(0.05)
    raise AssertionError("the ledger does not tell of the changes")


def test_the_recorder_keeps_what_explains_a_reject(site):
    site.config["results"]["heatmap"] = True
    site.start()
    dashboard = Dashboard(load_place(site.folder / "dashboard.yaml"))
    client = TestClient(dashboard.app)
    log_in(client)
    with site.line() as line:
        part = send(line, 0, bad_pixels())
        settle(line)
        key = {"camera": "cam1", "epoch": line.epoch, "seq": 0}
        assert pump_until(line, lambda: client.get("/api/part", params=key).json().get("pictures"), 20)
    shown = client.get("/api/part", params=key).json()
    assert shown["pictures"] == ["frame", "mask", "heatmap"]
    assert shown["regions"] == part.results[0]["regions"]
    assert site.stop() == 0


def test_passed_parts_show_a_frame_now_and_then_where_config_asks(site):
    site.config["results"]["frame_every_ms"] = 3_600_000
    site.start()
    with site.line() as line:
        for seq in range(5):
            send(line, seq)
        settle(line)
        assert [part.results[0]["payloads"] for part in line.parts.values()] == [["frame"], [], [], [], []]
    assert site.stop() == 0


def test_a_key_for_this_lines_results_alone_is_enough(site):
    """And the dashboard hears nothing without one that allows it."""
    topics = ["result/test/*", "late/test/*", "health/test"]
    make_peer(site.folder / "keys", "shown", ["subscriber"], topics)
    make_peer(site.folder / "keys", "camera", ["camera"], ["*"])
    site.start()
    for peer, state in (("shown", "RUNNING"), ("camera", "NO_DAEMON")):
        set_up(site, peer=f"keys/{peer}.peer.yaml")
        with TestClient(Dashboard(load_place(site.folder / "dashboard.yaml")).app) as client:
            log_in(client)
            with client.websocket_connect("/live", headers=OURS) as socket:
                # The status comes over the control socket, which asks for no key: by then the results are heard, or not.
                states = [told["state"] for _, (_, told) in zip(range(12), texts(socket), strict=False)]
                assert states[-1] == state
    assert "WRONG_ROLE" in site.log
    assert site.stop() == 0


# --- its own process


def test_over_tls_it_serves_https_and_nothing_else(site):
    certificate(site.folder)
    config = set_up(site, tls={"certificate": "c.pem", "key": "k.pem"})
    shown = Shown(site, config)
    context = ssl.create_default_context(cafile=site.folder / "c.pem")
    shown.start(context=context)
    with urllib.request.urlopen(f"{shown.url}/login", timeout=5, context=context) as answer:
        assert answer.headers["server"] is None
    with pytest.raises(OSError, match=r".*"), urllib.request.urlopen(shown.url.replace("https", "http"), timeout=5):
        pass
    assert os.getpriority(os.PRIO_PROCESS, shown.process.pid) >= 10  # the line comes first
    assert shown.stop() == 0


def certificate(folder):
    """c.pem and k.pem for 127.0.0.1, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "dashboard")])
    now = datetime.now(timezone.utc)
    built = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1))
    built = built.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
    (folder / "c.pem").write_bytes(built.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "k.pem").write_bytes(secret)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tls": {"certificate": "none.pem", "key": "none.pem"}}, "none.pem cannot be used"),
        ({"users": "nobody.yaml"}, "nobody may log in yet; inspectd dashboard-user NAME --role operator"),
        ({"daemon": "none.yaml"}, "none.yaml: cannot be read"),
        ({"bind": "192.0.2.1:8080", "insecure": True}, "cannot be bound"),
    ],
)
def test_what_keeps_it_from_starting_is_told_and_ends_with_78(site, changes, told):
    done = site.run_command("dashboard", "--config", str(set_up(site, **changes)))
    assert done.returncode == 78, done.stderr
    assert told in done.stderr


# --- its own files


def refused(site, **changes):
    with pytest.raises(ConfigError) as told:
        load_settings(set_up(site, **changes))
    return str(told.value)


@pytest.mark.parametrize("bind", ["0.0.0.0:8080", "192.168.10.5:8080", "[::]:8080"])
def test_beyond_loopback_passwords_travel_encrypted_or_it_is_said(site, bind):
    assert "passwords would cross the network in the open" in refused(site, bind=bind)
    assert load_settings(set_up(site, bind=bind, insecure=True)).is_open
    assert not load_settings(set_up(site, bind=bind, tls={"certificate": "c.pem", "key": "k.pem"})).is_open


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"bnd": "x"}, "bnd: unknown key; known here: version, bind"),
        ({"bind": "8080"}, "wanted host:port"),
        ({"version": 2}, "version: found '2'"),
        ({"tls": {"certificate": "c.pem"}}, "tls.key: is missing"),
        ({"session_hours": 0}, "session_hours"),
        ({"session_hours": "long"}, "session_hours"),
    ],
)
def test_a_fault_in_the_file_is_told_with_its_path(site, changes, told):
    assert told in refused(site, **changes)


def test_paths_are_taken_from_the_files_folder(site):
    settings = load_settings(site.folder / "dashboard.yaml")
    assert settings.daemon == site.folder / "config.yaml"
    assert settings.secret == site.folder / "dashboard.secret"
    assert load_settings(set_up(site, users="/etc/users.yaml")).users.is_absolute()


def test_the_shipped_file_has_every_key_with_its_default():
    from adapters.dashboard.settings import Settings
    from tests.daemons import ROOT

    shipped = yaml.safe_load((ROOT / "dashboard.yaml").read_text())
    assert list(shipped) == list(Settings.model_fields)
    loaded = load_settings(ROOT / "dashboard.yaml")
    for name, known in Settings.model_fields.items():
        if name != "version":
            value = getattr(loaded, name)
            assert value == (ROOT / known.default if hasattr(known.default, "parts") else known.default)


def test_a_key_that_is_missing_is_told_with_its_command(site):
    with pytest.raises(ConfigError, match="inspectd keygen peer dashboard --role subscriber"):
        load_place(set_up(site, peer="keys/none.peer.yaml"))


def test_secrets_are_for_nobody_else(site, dashboard):
    for name in ("dashboard-users.yaml", "dashboard.secret"):
        assert stat.S_IMODE((site.folder / name).stat().st_mode) == 0o600
    assert PASSWORD not in (site.folder / "dashboard-users.yaml").read_text()
    (site.folder / "dashboard.secret").chmod(0o640)
    with pytest.raises(ConfigError, match="others can read this secret"):
        Dashboard(load_place(site.folder / "dashboard.yaml"))
    (site.folder / "dashboard-users.yaml").chmod(0o644)
    with pytest.raises(ConfigError, match="others can read the hashes"):
        load_users(site.folder / "dashboard-users.yaml")


def test_the_command_makes_changes_and_removes_users(site):
    config, users = str(site.folder / "dashboard.yaml"), site.folder / "dashboard-users.yaml"
    run = CliRunner()
    made = run.invoke(user_command, ["nina", "--role", "operator", "--config", config], input=f"{PASSWORD}\n")
    assert made.exit_code == 0, made.output
    assert "nina is a new operator" in made.output
    assert {user.name: user.role for user in load_users(users)} == {
        "olga": "operator",
        "vic": "viewer",
        "nina": "operator",
    }
    assert "now a viewer" in run.invoke(user_command, ["nina", "--config", config], input=f"{PASSWORD}\n").output
    assert "is out" in run.invoke(user_command, ["nina", "--remove", "--config", config]).output
    assert "nina" not in users.read_text()
    assert isinstance(run.invoke(user_command, ["nina", "--remove", "--config", config]).exception, UsageError)


@pytest.mark.parametrize(
    ("name", "password"), [("olga", "short"), ("../olga", PASSWORD), ("", PASSWORD), ("a b", PASSWORD)]
)
def test_a_name_or_password_that_is_none_is_refused(tmp_path, name, password):
    with pytest.raises(UsageError):
        save_user(tmp_path / "users.yaml", name, "viewer", password)
    assert list(tmp_path.iterdir()) == []


def test_real_hashes_are_dear(monkeypatch):
    monkeypatch.undo()
    hashed = users_module.hash_password(PASSWORD)
    assert hashed.startswith("scrypt$32768$8$3$")
    assert users_module.is_password(PASSWORD, hashed)
    assert not users_module.is_password(PASSWORD + " ", hashed)
