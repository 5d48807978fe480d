// Rejects of the ledger: filters, pages from the newest on, a click for the full frame.

import { ask } from "/static/api.js"
import { h, moment, score, shape, table } from "/static/dom.js"

export const title = "History"

export function open(root, app) {
  const any = h("option", { value: "" }, "all")
  const options = names => [any.cloneNode(true), ...names.map(name => h("option", { value: name }, name))]
  const camera = h("select", { name: "camera" }, ...options(Object.keys(app.session.cameras)))
  const reason = h("select", { name: "reason" }, ...options(app.session.reasons))
  const from = h("input", { type: "datetime-local", name: "from" })
  const until = h("input", { type: "datetime-local", name: "to" })
  const form = h(
    "form", { class: "filters" },
    h("label", {}, "Camera", camera), h("label", {}, "Reason", reason), h("label", {}, "From", from), h("label", {}, "Until", until),
    h("button", { type: "submit", class: "main" }, "Show"),
  )
  const rows = h("div", { class: "scroll", id: "rows", role: "region", tabindex: "0", "aria-label": "Rejects" })
  const note = h("p", { class: "note", role: "status" })
  const newer = h("button", { type: "button", onclick: () => turn(pages.slice(0, -1)) }, "Newer")
  const older = h("button", { type: "button", onclick: () => turn([...pages, next]) }, "Older")
  root.append(h("h2", {}, "Rejects"), form, note, rows, h("div", { class: "pages" }, newer, older))
  let pages = [""] // where each page up to this one begins; "" is the newest
  let next = null
  let asked = 0

  async function turn(begins) {
    const turnOf = ++asked
    const query = { camera: camera.value, reason: reason.value, from: ns(from), to: ns(until), before: begins.at(-1) }
    try {
      const answer = await ask("rejects", query)
      if (turnOf !== asked) return // another question was asked meanwhile
      pages = begins
      next = answer.before
      rows.replaceChildren(answer.rows.length ? listed(answer.rows, app) : h("p", { class: "note" }, "No reject."))
      note.textContent = `${answer.rows.length} rejects, page ${pages.length}`
      newer.disabled = pages.length === 1
      older.disabled = next == null
    } catch (error) {
      note.textContent = error.message
    }
  }
  form.addEventListener("submit", event => {
    event.preventDefault()
    turn([""])
  })
  turn([""])
  return () => {
    asked++
  }
}

const ns = input => (input.value ? `${new Date(input.value).getTime()}000000` : "")

const kept = part => (part.recorded ? "Frame" : "Facts")

function listed(rows, app) {
  const heads = ["Decided", "Camera", "Part", "Reason", "Score", "Limit", "Frame"]
  return table("Newest first", heads, rows.map(part => [
    moment(part.decided_ns), part.camera, part.part_id ?? (part.seq === part.seq_to ? part.seq : `${part.seq} to ${part.seq_to}`),
    h("span", { class: "reason" }, shape("bad"), part.reason), score(part.score), score(part.score_limit),
    h("button", { type: "button", "aria-label": `${kept(part)} of part ${part.part_id ?? part.seq}, ${part.camera}`,
      onclick: () => app.showPart(part) }, kept(part)),
  ]))
}
