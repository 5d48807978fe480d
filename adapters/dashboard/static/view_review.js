// Rejects grouped by look: small pictures, severity apart from the score, marks of a whole group or of one part, undo.

import { ask, change } from "/static/api.js"
import { confirm } from "/static/confirm.js"
import { h, moment, score, shape, table } from "/static/dom.js"

export const title = "Review"

const WORDS = { "": "all", open: "not marked yet", good: "good", defect: "defect" }
const SHAPES = { open: "none", good: "good", defect: "bad" }

export function open(root, app) {
  const mark = h("select", { name: "mark" }, ...Object.entries(WORDS).map(([value, words]) => h("option", { value }, words)))
  const camera = h("select", { name: "camera" }, ...["", ...Object.keys(app.session.cameras)].map(value => h("option", { value }, value || "all")))
  const form = h(
    "form", { class: "filters" },
    h("label", {}, "Mark", mark), h("label", {}, "Camera", camera), h("button", { type: "submit", class: "main" }, "Show"),
  )
  const note = h("p", { class: "note", role: "status" })
  const made = h("p", { class: "note" })
  const groups = h("div", { class: "groups" })
  const decisions = h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Decisions" })
  root.append(h("h2", {}, "Rejects, grouped by look"), form, note, made, groups, h("h2", {}, "Decisions"), decisions)
  let known = null
  let turns = 0

  async function refresh() {
    const turn = ++turns
    try {
      const of = camera.value
      const answer = await ask("review", { mark: mark.value, camera: of })
      if (turn !== turns) return // another question was asked meanwhile
      known = { ...answer, camera: of } // a click is about what is shown, not about what the form says by then
      draw()
    } catch (error) {
      note.textContent = error.message
    }
  }

  function draw() {
    made.textContent = known.madeNs == null
      ? "No groups were made yet: inspectd review groups, on the line's machine."
      : `Grouped ${moment(Number(known.madeNs))} by inspectd review groups.${known.moreGroups ? ` ${known.moreGroups} smaller groups are not shown.` : ""}`
    const cards = known.groups.map(group => card(group, app, tools))
    if (known.ungroupedTotal) cards.push(rest(known, app, tools))
    groups.replaceChildren(...(cards.length ? cards : [h("p", { class: "note" }, "No reject with a frame.")]))
    decisions.replaceChildren(known.decisions.length ? listed(known.decisions, app, tools) : h("p", { class: "note" }, "Nobody has marked anything."))
  }

  async function tell(path, fields, words) {
    try {
      const done = await change(path, fields)
      note.textContent = `${done.marked} ${words}.`
    } catch (error) {
      note.textContent = error.message
    }
    await refresh()
  }

  const tools = {
    async group(group, word) {
      const count = word === "none" ? group.total - (group.marked.open ?? 0) : group.marked.open
      const where = known.camera ? `group ${group.number}, camera ${known.camera}` : `group ${group.number}`
      const name = await said(word, `${many(count)} of ${where}`)
      if (name == null) return
      const fields = { mark: word, group: group.number, madeNs: known.madeNs, ...(known.camera && { camera: known.camera }), ...(name && { name }) }
      await tell("mark", fields, `of ${where}: ${word} ${name}`.trim())
    },
    async part(part, word) {
      const name = await said(word, `part ${part.partId ?? part.seq} of ${part.camera}`)
      if (name == null) return
      const { camera: of, epoch, seq } = part
      await tell("mark", { mark: word, camera: of, epoch, seq, ...(name && { name }) }, `part: ${word} ${name}`.trim())
    },
    async undo(decision) {
      const words = "Those of them that were not marked anew since are open again."
      if (await confirm(`Take back ${decision.word} ${decision.name ?? ""} of ${many(decision.standing)}?`, words)) {
        await tell("unmark", { decision: decision.decision }, "open again")
      }
    },
  }
  form.addEventListener("submit", event => {
    event.preventDefault()
    note.textContent = ""
    refresh()
  })
  refresh()
  return () => {
    turns++
  }
}

const many = count => `${count} ${count === 1 ? "reject" : "rejects"}`

/** A defect's name ("" where it has none), "" for the other words, or null where the answer is no. */
async function said(word, what) {
  if (word === "good") {
    const words = "They were good parts: the next build may learn them, and then lets the like of them pass. Look for real defects among the pictures before."
    return (await confirm(`Mark ${what} as good?`, words)) ? "" : null
  }
  if (word === "none") return (await confirm(`Take the marks of ${what} back?`, "They are open again.")) ? "" : null
  const input = h("input", { type: "text", id: "defect-name", maxlength: 40, pattern: "[A-Za-z0-9][A-Za-z0-9_\\-]*", placeholder: "scratch" })
  const words = "They go into the test of the next build: it must still reject them."
  const name = await confirm(`Mark ${what} as defects?`, words, { label: "Name of the defect (may be left out)", input })
  return name == null ? null : name.trim()
}

function card(group, app, tools) {
  const { typical } = group
  const words = Object.entries(group.marked).map(([word, count]) => h("span", { class: "reason" }, shape(SHAPES[word.split(" ")[0]]), `${count} ${word}`))
  const open = group.marked.open ?? 0
  const buttons = app.session.mayMark && open ? [
    h("button", { type: "button", onclick: () => tools.group(group, "good") }, `All ${open} open: good`),
    h("button", { type: "button", onclick: () => tools.group(group, "defect") }, `All ${open} open: defects`),
  ] : []
  const shown = group.shown.length < group.total ? `, ${group.shown.length} shown, from the most typical to the least` : ""
  return h("section", { "data-group": group.number, "aria-label": `Group ${group.number}` },
    h("h3", {}, `Group ${group.number}: ${many(group.total)} `, h("small", {}, `${group.product}${shown}`)),
    h("p", { class: "marks" }, ...words),
    h("dl", { class: "facts" }, ...severity(typical)),
    h("ul", { class: "looks" }, ...group.shown.map(part => tile(part, app, tools))),
    h("div", { class: "buttons" }, ...buttons))
}

function rest(known, app, tools) {
  return h("section", { "data-group": "none", "aria-label": "Not grouped yet" },
    h("h3", {}, `Not grouped yet: ${many(known.ungroupedTotal)} `, h("small", {}, "the newest are shown; inspectd review groups puts them into groups")),
    h("ul", { class: "looks" }, ...known.ungrouped.map(part => tile(part, app, tools))))
}

const area = each => (each.share == null ? `${each.area} px` : `${(100 * each.share).toFixed(2)} %`)

function severity(typical) {
  const known = { "Area, median": area(typical), "Peak, median": `${typical.peak.toFixed(1)} × limit`, "Place, mostly": typical.place }
  return Object.entries(known).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))
}

function tile(part, app, tools) {
  const name = `part ${part.partId ?? part.seq}, ${part.camera}`
  const query = new URLSearchParams({ camera: part.camera, epoch: part.epoch, seq: part.seq })
  const picture = h("img", { src: `/api/look?${query}`, width: 192, height: 192, loading: "lazy", alt: `${name}: the marked place` })
  const word = part.mark?.word ?? "open"
  const words = part.mark ? `${part.mark.word} ${part.mark.name ?? ""}` : "open"
  const buttons = app.session.mayMark ? ["good", "defect", "none"].filter(each => each !== (part.mark?.word ?? "none")).map(each =>
    h("button", { type: "button", "aria-label": `${each === "none" ? "Undo the mark of" : `${each}:`} ${name}`, onclick: () => tools.part(part, each) }, { good: "Good", defect: "Defect", none: "Undo" }[each])) : []
  return h("li", {},
    h("button", { type: "button", class: "look", "aria-label": `Frame of ${name}`, onclick: () => app.showPart({ camera: part.camera, epoch: part.epoch, seq: part.seq, partId: part.partId }) }, picture),
    h("p", { class: "reason" }, shape(SHAPES[word]), words),
    h("p", { class: "note" }, `score ${score(part.score)}, area ${area(part)}, ${part.place}`),
    h("div", { class: "buttons" }, ...buttons))
}

function listed(decisions, app, tools) {
  return table("Newest first", ["When", "Who", "What", "Parts", "Still stands", ""], decisions.map(each => [
    moment(each.ns), each.user, each.word === "none" ? "taken back" : `${each.word} ${each.name ?? ""}`, String(each.parts), String(each.standing),
    app.session.mayMark && each.standing && each.word !== "none"
      ? h("button", { type: "button", "aria-label": `Undo ${each.word} of ${each.user}, ${each.parts} parts`, onclick: () => tools.undo(each) }, "Undo") : "",
  ]))
}
