// Permits and the PLC's lease, what is under way, the ledger's figures, and who changed what.

import { ask } from "/static/api.js"
import { bytes, fact, h, moment, shape, sign, table, text } from "/static/dom.js"

export const title = "Permits and books"

const AGAIN_MS = 10_000
const PERIODS = { hour: "last hour", shift: "last 8 hours", day: "last 24 hours" }

export function open(root, app) {
  const lease = h("p", { class: "state" })
  const facts = h("dl", { class: "facts" })
  const known = {
    bridges: fact(facts, "PLC bridges"), silent: fact(facts, "Quietest bridge heard"), unacked: fact(facts, "Verdicts not acknowledged"),
    flight: fact(facts, "Parts in flight"), queue: fact(facts, "Frames waiting"), journal: fact(facts, "Journal"),
  }
  const period = h("select", { id: "period" }, ...Object.entries(PERIODS).map(([value, words]) => h("option", { value }, words)))
  const counts = h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Table of verdicts" })
  const events = h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Table of changes" })
  const note = h("p", { class: "note", role: "status" })
  root.append(
    h("section", { "aria-labelledby": "permits" }, h("h2", { id: "permits" }, "Permits and lease"), lease, facts),
    h("section", { "aria-labelledby": "verdicts" }, h("h2", { id: "verdicts" }, "Verdicts"), h("label", { for: "period" }, "Period"), period, note, counts),
    h("section", { "aria-labelledby": "changes" }, h("h2", { id: "changes" }, "Changes"), events),
  )
  const refresh = async () => {
    try {
      const found = await ask("books", { period: period.value })
      note.textContent = ""
      counts.replaceChildren(found.counts.length ? countsTable(found.counts) : h("p", { class: "note" }, "No part in this time."))
      events.replaceChildren(found.events.length ? eventsTable(found.events) : h("p", { class: "note" }, "Nobody has changed anything."))
    } catch (error) {
      note.textContent = error.message
    }
  }
  const take = ({ detail }) => tell(detail, app.session.leaseMs, lease, known)
  period.addEventListener("change", refresh)
  app.live.addEventListener("state", take)
  const timer = setInterval(refresh, AGAIN_MS)
  refresh()
  return () => {
    clearInterval(timer)
    app.live.removeEventListener("state", take)
  }
}

function tell(state, leaseMs, lease, known) {
  const { status } = state
  const permits = status?.permits
  if (!state.heard) sign(lease, "bad", "NO LEASE", "no daemon: every bridge holds REJECT")
  else if (permits == null) sign(lease, "none", "UNKNOWN", "the daemon has not told its status")
  else if (permits.bridges === 0) sign(lease, "none", "NO BRIDGE", "no PLC bridge is connected")
  else if (state.state !== "RUNNING") sign(lease, "bad", "NO PASS", `${state.state.toLowerCase()}: bridges hold REJECT`)
  else if (permits.silentMs > leaseMs) sign(lease, "bad", "LEASE IN DOUBT", "a bridge is silent: it holds REJECT")
  else sign(lease, "good", "LEASE FRESH", `heartbeats hold for ${leaseMs} ms`)
  text(known.bridges, String(permits?.bridges ?? "–"))
  text(known.silent, permits?.silentMs == null ? "–" : `${100 * Math.ceil(permits.silentMs / 100)} ms ago at most`)
  text(known.unacked, String(permits?.unacked ?? "–"))
  text(known.flight, String(status?.inFlight ?? "–"))
  text(known.queue, bytes(status?.queueBytes))
  text(known.journal, status == null ? "–" : status.journalFault ?? "written")
}

function countsTable(counts) {
  const totals = {}
  for (const row of counts) totals[row.camera] = (totals[row.camera] ?? 0) + row.parts
  return table("Parts by camera, outcome and reason", ["Camera", "Outcome", "Reason", "Parts", "Share"], counts.map(row => {
    const outcome = h("span", { class: "reason" }, shape(row.outcome === "PASS" ? "good" : "bad"), row.outcome ?? "IN FLIGHT")
    return [row.camera, outcome, row.reason ?? "", String(row.parts), `${((100 * row.parts) / totals[row.camera]).toFixed(2)} %`]
  }))
}

function eventsTable(events) {
  return table("Newest first", ["When", "Who", "What", "Engine", "How it ended"], events.map(event => [
    moment(event.ns), event.user ?? "unknown", event.command, event.engine ?? "", event.ok ? event.detail ?? "done" : `refused: ${event.detail}`,
  ]))
}
