"""Writes the tables of README.md and docs/accuracy.md from bench/results/*.json, so that no number is typed by hand.

python -m bench.tables [--check]     (--check: exit 1 when a page is not what the results say)
"""

from __future__ import annotations

import json
import sys
from statistics import mean
from typing import Any

import click

from bench.record import RESULTS, ROOT


def table() -> str:
    """README's, from line.json, accuracy.json and demo.json."""
    line, accuracy, demo = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("line", "accuracy", "demo"))
    runs = {(run["precision"], run["threads"]): run for run in line["quietest"]}
    machine = line["machine"]
    rows = [("what", "measured"), ("---", "---")]
    for key in (("f32", 2), ("bf16", 2)):
        run = runs[key]
        stages = run["stages"]
        setting = f"{key[0]}, {key[1]} inference threads, half load"
        rows += [
            (f"arrival to verdict, {setting}", _times(stages["totalMs"])),
            (f"of it the daemon's own part, {setting}", _times(stages["ownMs"])),
            (f"throughput, {setting.rpartition(',')[0]}", f"{run['throughputPerS']} frames/s"),
        ]
    rows += [
        ("build from 300 images of 300x300 (the demo's)", f"{demo['buildSeconds']} s"),
        *(_accuracy_row(name, variants) for name, variants in accuracy["summary"].items()),
        ("solar cells (the demo): image AUROC", f"{demo['imageAuroc']:.3f}"),
        (
            "solar cells: false rejects / promised bound",
            f"{demo['falseRejectRate']:.2%} / {demo['falseRejectBound95']:.2%}",
        ),
        ("solar cells: escapes", f"{demo['escapeRate']:.1%}"),
        *_peer_rows(),
        ("solar cells: send to verdict at 25/s", f"p50 {demo['p50Ms']:.1f} ms, p99 {demo['p99Ms']:.1f} ms"),
    ]
    frame, network = _by(line["frameHw"]), _by(line["networkHw"])
    head = (
        f"{machine['processor']}, {machine['cores']} cores (shared). Frames of {frame}, network input {network}, "
        f"{line['bankRows']} rows, through the encrypted sockets, the quietest of the rounds. Made by "
        "`python -m bench.tables` from [bench/results](bench/results), which say commit, versions and options."
    )
    return "\n".join([head, "", *(f"| {left} | {right} |" for left, right in rows)])


def _peer_rows() -> list[tuple[str, str]]:
    """Decode to verdict against the peer, where it was measured."""
    path = RESULTS / "peer.json"
    if not path.exists():
        return []
    rows = []
    result = json.loads(path.read_text())
    for precision, found in result["all"].items():
        # The median of the rounds' ratios, where there is one: the box changes its speed between rounds.
        ratio = result["ratio"] if precision == result["precision"] else found["peerMs"] / found["oursMs"]
        times = f"{found['oursMs']:.1f} ms against {found['peerMs']:.1f} ms: {ratio:.1f} times as fast"
        aurocs = f"image AUROC {found['oursAuroc']:.3f} against {found['peerAuroc']:.3f}"
        what = f"decode to verdict, {precision}, against anomalib 2.7.0's PatchCore in OpenVINO, in turns"
        rows.append((what, f"{times}; {aurocs}"))
    return rows


def _accuracy_row(name: str, variants: dict[str, Any]) -> tuple[str, str]:
    """Plain 1-NN, and the fullest engine that was measured."""
    shown = list(dict.fromkeys(["1-NN", _fullest(variants)]))
    words = [f"{_figure(variants[key], 'imageAuroc')} / {_figure(variants[key], 'pixelAuroc')}" for key in shown]
    return f"{name}: image / pixel AUROC, {'; '.join(shown)}", "; ".join(words)


def _fullest(variants: dict[str, Any]) -> str:
    for kind in ("fused", "LDKNN chosen", "LDKNN fixed"):
        for name in variants:
            if name.startswith(kind):
                return name
    return "1-NN"


def accuracy_tables() -> str:
    """A table for each set: a row a variant, mean and spread over the seeds."""
    summary = json.loads((RESULTS / "accuracy.json").read_text())["summary"]
    columns = {
        "image AUROC": "imageAuroc", "pixel AUROC": "pixelAuroc", "AUPRO": "aupro", "image AP": "imageAp",
        "F1 at the limit": "f1AtLimit", "false rejects": "falseRejectRate", "bound95": "bound95",
        "ms a frame": "msAFrame", "build s": "buildSeconds",
    }  # fmt: skip
    blocks = []
    for name, variants in summary.items():
        lines = [f"### {name}", "", f"| engine | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
        for variant, found in variants.items():
            cells = [_figure(found, key) for key in columns.values()]
            lines.append(f"| {variant} | {found['imageAuroc']['seeds']} | {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


_NOISES = ("repair", "repair, ordinary denoising", "repair without noise")


def noise_table() -> str:
    """Noise & Pattern's claim: mean over the sets that all three trainings have, of each set's mean over its seeds."""
    summary = json.loads((RESULTS / "accuracy.json").read_text())["summary"]
    sets = [name for name, variants in summary.items() if set(_NOISES) <= set(variants)]
    if not sets:
        return "Not measured yet."
    lines = [
        "Over " + ", ".join(f"{name} ({_seeds(summary[name])} seeds)" for name in sets) + ".",
        "",
        "| training | image AUROC | pixel AUROC (sets with masks) |",
        "|---|---|---|",
    ]
    for variant in _NOISES:
        figures = []
        for key in ("imageAuroc", "pixelAuroc"):
            found = [summary[name][variant][key]["mean"] for name in sets if key in summary[name][variant]]
            figures.append(f"{mean(found):.3f}" if found else "-")
        words = "anchored noise" if variant == "repair" else variant.removeprefix("repair").strip(", ")
        lines.append(f"| {words} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _seeds(variants: dict[str, Any]) -> int:
    return min(int(variants[variant]["imageAuroc"]["seeds"]) for variant in _NOISES)


def choice_table() -> str:
    """Each set: plain 1-NN, the chosen setting, the best of the grid; means over the seeds."""
    path = RESULTS / "choice.json"
    runs = list(json.loads(path.read_text())["runs"].values()) if path.exists() else []
    lines = [
        "| data | seeds | plain 1-NN | chosen | best at its input | best of all | worst loss | rank correlation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(run["set"] for run in runs):
        own = [run for run in runs if run["set"] == name]
        figures = [f"{mean(run[key] for run in own):.3f}" for key in ("plain", "chosen", "bestAtInput", "best")]
        worst = min(run["chosen"] - run["plain"] for run in own)
        correlations = [run["rankCorrelation"] for run in own if run["rankCorrelation"] == run["rankCorrelation"]]
        correlation = f"{mean(correlations):.2f}" if correlations else "-"
        lines.append(f"| {name} | {len(own)} | {' | '.join(figures)} | {worst:+.3f} | {correlation} |")
    return "\n".join(lines)


def limit_table() -> str:
    """The promise under redraws, for each product, from limits.json."""
    found = json.loads((RESULTS / "limits.json").read_text())
    lines = [
        "| product | n / held out | wanted | mean false rejects | over bound95 (perfect pool) | capture order |",
        "|---|---|---|---|---|---|",
    ]
    for name, product in found["products"].items():
        for target in product["targets"]:
            promised = "" if target["supported"] else f", {target['promised']:.1%} supported"
            order = target["captureOrder"]
            lines.append(
                f"| {name} | {target['n']} / {target['m']} | {target['target']:.0%}{promised} | "
                f"{target['falseRejectRate']:.2%} | {target['shareOverBound']:.1%} ({target['exactShare']:.1%}) | "
                f"{order['falseRejectRate']:.1%} ({order['bound95']:.1%}) |"
            )
    return "\n".join(lines)


def _figure(found: dict[str, Any], key: str) -> str:
    value = found.get(key)
    if value is None:
        return "-"
    digits = 1 if key in {"msAFrame", "buildSeconds"} else 3
    spread = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"


def transport_table() -> str:
    """p50 and p99 of each way and size and what the p50 is made of, from transport.json."""
    found = json.loads((RESULTS / "transport.json").read_text())
    keys = ("p50Ms", "p99Ms", "messageMs", "headerMs", "pixelsMs")
    lines = ["| frame | by | p50 ms | p99 ms | message | header | pixels |", "|---" * 7 + "|"]
    lines += [
        f"| {row['size']} | {row['kind']} | {' | '.join(f'{row[key]:.2f}' for key in keys)} |" for row in found["rows"]
    ]
    alone = ", ".join(f"{size}: {value:.2f} ms" for size, value in found["readMs"].items())
    return "\n".join([*lines, "", f"read(2) alone out of /dev/shm: {alone}."])


def reliability_table() -> str:
    """Swaps, restarts, strangers, soak and fuzzer: what was wanted and what was found, of those that were run."""
    rows: list[tuple[str, str, str]] = [("run", "wanted", "found"), ("---", "---", "---")]
    if swaps := _found("swaps.json"):
        p99 = f"p99 {swaps['p99QuietMs']:.1f} ms, during swaps {swaps['p99DuringMs']:.1f} ms"
        files = f"{swaps['openFilesWarm']} to {swaps['openFilesEnd']} files"
        rows += [
            (
                f"{swaps['swaps']} swaps, {swaps['sent']} parts",
                "one verdict each",
                f"{len(swaps['problems'])} problems",
            ),
            ("", "p99 at most twice", f"{p99}: {swaps['p99Ratio']:.1f} times"),
            ("", "no growth", f"{swaps['residentWarmMb']} to {swaps['residentEndMb']} MB, {files}"),
        ]
    if found := _found("restarts.json"):
        rows += [
            (
                f"{found['rounds']} times kill -9 under {found['framesPerS']:g} frames a second, {found['sent']} parts",
                "every accepted part one verdict, on the wire too; no stale or foreign PASS believed",
                f"{found['problemsFound']} problems ({found['inFlightAtKills']} parts were in flight)",
            ),
            ("", "READY after at most 3 s", _seconds(found, "restartToReadySeconds")),
            ("", "first verdict after at most 3.5 s", _seconds(found, "restartToFirstVerdictSeconds")),
        ]
    if found := _found("strangers.json"):
        p99 = f"p99 {found['before']['p99Ms']:.1f} ms, during the flood {found['during']['p99Ms']:.1f} ms"
        rows += [
            (f"{found['handshakes']} handshakes by strangers", "no frame lost", f"{len(found['problems'])} problems"),
            ("", "p99 at most 1.5 times", f"{p99}: {found['p99DuringToBefore']:.1f} times"),
        ]
    if soak := _found("soak.json"):
        slope = soak["memorySlopeMbPerHour"]
        balance = f"{soak['accepted']} + {soak['missing']}, {soak['verdicts']}"
        rows += [
            (f"soak of {soak['minutes']:g} minutes (60 wanted)", "accepted + missing = verdicts", balance),
            ("", "no deadline missed outside faults", str(soak["deadlineMissedOutsideFaults"])),
            ("", "memory below 2 MB/h", "too short to tell" if slope is None else f"{slope:.1f} MB/h"),
            ("", "no growth of descriptors", f"{soak['openFilesWarm']} to {soak['openFilesEnd']}"),
        ]
    if found := _found("fuzz.json"):
        targets = found["targets"]
        rows.append(
            (
                f"{len(targets)} parsers under atheris",
                "1,000,000 executions of each without a crash",
                f"{min(target['runs'] for target in targets):,} or more, {sum(t['crashes'] for t in targets)} crashes",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _seconds(found: dict[str, Any], name: str) -> str:
    return f"median {found[f'{name}Median']:.1f} s, most {found[f'{name}Max']:.1f} s"


def _found(name: str) -> dict[str, Any]:
    path = RESULTS / name
    return dict(json.loads(path.read_text())) if path.exists() else {}


def search_table() -> str:
    """The forms of the search by bank rows, from scale.json."""
    found = json.loads((RESULTS / "scale.json").read_text())["search"]
    forms = list(found[0]["ms"])
    lines = [f"| rows | {' | '.join(f'{form}: ms; nearest row found; worst excess' for form in forms)} |"]
    lines.append("|---" * (len(forms) + 1) + "|")
    for each in found:
        cells = [
            f"{each['ms'][form]:.1f}; {each['found'][form]:.1%}; {each['worstExcess'][form]:.1%}" for form in forms
        ]
        lines.append(f"| {each['rows']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def int8_table() -> str:
    """What the INT8 search finds, by bank rows and kept rows, from int8.json; the shipped number of rows is marked."""
    found = json.loads((RESULTS / "int8.json").read_text())
    counts = [each["kept"] for each in found["search"][0]["good"]]
    heads = [f"{kept} kept{' (ldknn_int8.cu)' if kept == found['kept'] else ''}" for kept in counts]
    lines = [f"| rows | frames | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for each in found["search"]:
        for kind, words in (("good", "good"), ("defect", "with a defect")):
            cells = [f"{one['found']:.3%}; {one['worstExcess']:.2%}" for one in each[kind]]
            lines.append(f"| {each['rows']} | {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cameras_table() -> str:
    """The highest sustained rate by number of cameras, from scale.json."""
    found = json.loads((RESULTS / "scale.json").read_text())["cameras"]
    lines = ["| cameras | frames/s in all | p50 ms | p99 ms | the loop, of a core | the daemon, of both cores |"]
    lines.append("|---" * 6 + "|")
    lines += [
        f"| {each['cameras']} | {each['framesPerS']:.0f} | {each['p50Ms']:.1f} | {each['p99Ms']:.1f} | "
        f"{each['loopShare']:.0%} | {each['daemonShare'] / 2:.0%} |"
        for each in found["curve"]
    ]
    return "\n".join(lines)


def drift_table() -> str:
    """Frames until the alarm on real frames, and false alarms in simulation, from drift.json."""
    found = _found("drift.json")
    if not found:
        return "Not measured yet."
    blur = f"blur of {found['sigma']:g} pixels"
    heads = ["data, seed (frames of the line, calibration scores)", "alarms before"]
    for fault in ("15 % less light", blur):
        heads += [f"{fault}: DRIFT / SETUP after", "of it rejected"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, splits in found["sets"].items():
        for split, each in splits.items():
            cells = [f"{name}, {split} ({each['frames']}, {each['calibrationScores']})"]
            cells.append(", ".join(each["unchanged"]["early"]) or "none")
            for fault in ("dimmed", "blurred"):
                one = each[fault]
                after = [_after(one, word) for word in ("DRIFT", "SETUP")]
                cells += [" / ".join(after), f"{one['rejected']:.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
    counts = [str(n) for n in next(iter(found["falseAlarms"].values()))]
    lines += ["", f"| false alarms in 100,000 scores, n = | {' | '.join(counts)} |", "|---" * (len(counts) + 1) + "|"]
    for name, of_n in found["falseAlarms"].items():
        cells = [f"{of_n[n]['mean']:g} (mean of {len(of_n[n]['runs'])})" for n in counts]
        lines.append(f"| scores as of {name} | {' | '.join(cells)} |")
    for name, simulated in found["setupFalseAlarms"].items():
        lines.append(f"| frames as of {name}, SETUP | {simulated['mean']:g} (its own n) |" + " - |" * (len(counts) - 1))
    gauge_ms = min(each["gaugeMs"] for splits in found["sets"].values() for each in splits.values())
    score_us = min(of_n[n]["microsecondsAScore"] for of_n in found["falseAlarms"].values() for n in counts)
    return "\n".join(
        [*lines, "", f"In the quietest run a frame's figures took {gauge_ms:.2f} ms, a score's test {score_us:.0f} µs."]
    )


def _after(found: dict[str, Any], word: str) -> str:
    return "before" if word in found["early"] else str(found[word] or "-")


def large_table() -> str:
    """5 megapixels through shared memory: the rate by bank and precision, and the stages alone, from large.json."""
    found = json.loads((RESULTS / "large.json").read_text())
    asked_for = f"{found['rate']:g} frames/s for {found['seconds']:g} s"
    lines = [
        f"| bank | {asked_for} | highest without OVERLOAD and LATE | p50 / p99 ms | core ms a frame |",
        "|---" * 5 + "|",
    ]
    for line in found["lines"]:
        asked, best = line["asked"], line["sustained"]
        overload, late = (asked["verdicts"].get(reason, 0) for reason in ("OVERLOAD", "LATE"))
        held = "held" if asked["sustained"] else f"{overload} OVERLOAD, {late} LATE of {asked['frames']}"
        lines.append(
            f"| {line['rows']} rows, {line['precision']} | {held} | {best['framesPerS']:.1f} frames/s | "
            f"{best['p50Ms']:.1f} / {best['p99Ms']:.1f} | {best['daemonMsAFrame']:.1f} |"
        )
    names = list(found["stages"])
    lines += ["", f"| stage alone: ms (of it this thread's processor) | {' | '.join(names)} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for stage in found["stages"][names[0]]:
        times = [found["stages"][name][stage] for name in names]
        cells = [f"{each['ms']:.2f} ({each['threadMs']:.2f})" for each in times]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def put(text: str, mark: str, block: str) -> str:
    """The page with what stands between a mark's begin and end replaced."""
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        sys.exit(f"found {text.count(begin)} of {begin} and {text.count(end)} of {end}, wanted one of each")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{block}\n\n{end}{rest.partition(end)[2]}"


def _times(statistics: dict[str, float]) -> str:
    return f"p50 {statistics['p50']:.1f} ms, p99 {statistics['p99']:.1f} ms"


def _by(size: list[int]) -> str:
    return "x".join(map(str, size))


def plc_table() -> str:
    """Parts into a PLC while everything is killed, from plc.json."""
    found = _found("plc.json")
    if not found:
        return "Not run yet: `python -m bench.plc`."
    lines = ["| way | parts | killed | passed by the daemon | passed by the PLC | wrong passes |", "|---" * 6 + "|"]
    for name, run in found["runs"].items():
        killed = ", ".join(f"{who} {count}" for who, count in sorted(run["kills"].items()))
        cells = (name, run["parts"], killed, run["passedByDaemon"], run["passedByPlc"], run["problemsFound"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    oldest_ms = max(run["oldestPassMs"] for run in found["runs"].values())
    pace = f"{found['framesPerS']:g} parts a second; the oldest PASS was taken {oldest_ms:.0f} ms after its verdict."
    return "\n".join([*lines, "", pace])


def groups_table() -> str:
    """Groups against true kinds, from review.json."""
    found = _found("review.json")
    if not found:
        return "Not measured yet."
    heads = "rejects, groups, adjusted Rand index, purity"
    lines = [f"| images | with the engine: {heads} | without: the same |", "|---" * 3 + "|"]
    for name, figures in found["groups"].items():
        cells = []
        for look in ("engine", "plain"):
            each = figures[look]
            agreed = f"{each['adjustedRandIndex']:.2f}, {each['purity']:.2f}"
            cells.append(f"{each['rejects']}, {each['decisions']}, {agreed}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def learning_table() -> str:
    """Shares that pass by the number of added images, means over the seeds, from review.json."""
    found = _found("review.json")
    if not found:
        return "Not measured yet."
    harmless = list(found["learning"][0])
    kinds = [kind for kind in found["learning"][0][harmless[0]][0] if kind != "added"]
    lines = [f"| called harmless | added | {' | '.join(f'{kind}: passed' for kind in kinds)} |"]
    lines.append("|---" * (len(kinds) + 2) + "|")
    for what in harmless:
        for rows in zip(*(seed[what] for seed in found["learning"]), strict=True):
            cells = [f"{mean(row[kind] for row in rows):.0%}" for kind in kinds]
            lines.append(f"| {what} | {mean(row['added'] for row in rows):g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def many_table() -> str:
    """One engine for all sets, step by step as in the paper's ablation, and the engines for each set alone."""
    found = _found("many.json")
    if not found:
        return "Not measured yet."
    summary, alone = found["summary"], json.loads((RESULTS / "accuracy.json").read_text())["summary"]
    sets = list(next(iter(summary.values())))
    rows = dict(summary)
    rows["fused, 30 ms, each product alone"] = {name: alone[name]["fused, 30 ms"] for name in sets}
    head = ["engine", "seeds", "mean image AUROC", *sets, "cosine on defects / elsewhere", "ms a frame"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for variant, figures in rows.items():
        if set(sets) - set(figures):
            continue  # some of its engines are not built yet
        seeds = min(figures[name]["imageAuroc"]["seeds"] for name in sets)
        whole = mean(figures[name]["imageAuroc"]["mean"] for name in sets)
        each = [f"{_mean(figures[name], 'imageAuroc')} / {_mean(figures[name], 'pixelAuroc')}" for name in sets]
        cosines = [
            [figures[name][key]["mean"] for name in sets if figures[name].get(key)]
            for key in ("cosineOnDefects", "cosineElsewhere")
        ]
        told = " / ".join(f"{mean(values):.2f}" for values in cosines) if all(cosines) else "-"
        times = [figures[name]["msAFrame"]["mean"] for name in sets if figures[name].get("msAFrame")]
        cells = [variant, str(seeds), f"{whole:.3f}", *each, told, f"{mean(times):.1f}" if times else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    if "memory" in found:
        one, every = found["memory"]["oneProductMb"], found["memory"]["allProductsMb"]
        lines += ["", f"Resident memory with one product {one:.0f} MB, with {len(sets)} products {every:.0f} MB."]
    return "\n".join(lines)


def _mean(found: dict[str, Any], key: str) -> str:
    return f"{found[key]['mean']:.3f}" if found.get(key) else "-"


@click.command()
@click.option("--check", is_flag=True)
def main(check: bool) -> None:  # noqa: FBT001 - click
    """Write the tables, or say which page lacks them."""
    blocks = {
        ("README.md", "measured"): table(),
        ("docs/accuracy.md", "measured"): accuracy_tables(),
        ("docs/accuracy.md", "noise"): noise_table(),
        ("docs/accuracy.md", "choice"): choice_table(),
        ("docs/accuracy.md", "limit"): limit_table(),
        ("docs/accuracy.md", "many"): many_table(),
        ("docs/performance.md", "transport"): transport_table(),
        ("docs/performance.md", "search"): search_table(),
        ("docs/performance.md", "int8"): int8_table(),
        ("docs/performance.md", "cameras"): cameras_table(),
        ("docs/performance.md", "large"): large_table(),
        ("docs/plc.md", "plc"): plc_table(),
        ("docs/reliability.md", "runs"): reliability_table(),
        ("docs/drift.md", "drift"): drift_table(),
        ("docs/review.md", "review-groups"): groups_table(),
        ("docs/review.md", "review-learning"): learning_table(),
    }
    stale = []
    for (name, mark), block in blocks.items():
        path = ROOT / name
        text = path.read_text()
        wanted = put(text, mark, block)
        if text != wanted:
            stale.append(f"{name} ({mark})")
            if not check:
                path.write_text(wanted)
    if check and stale:
        sys.exit(f"{', '.join(stale)}: not what bench/results say; python -m bench.tables")


if __name__ == "__main__":
    main()
