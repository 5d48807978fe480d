// The engines on disk, which one judges, and the two changes an operator may make, each behind a question.

import { ask, change } from "/static/api.js"
import { confirm } from "/static/confirm.js"
import { h, score, sign } from "/static/dom.js"

export const title = "Engines"

export function open(root, app) {
  const swap = h("p", { class: "verdict", role: "status" })
  const note = h("p", { class: "note", role: "alert" })
  const list = h("div", { class: "engines" })
  root.append(h("h2", {}, "Engines"), swap, note, list)
  if (!app.session.mayChange) note.textContent = "You are a viewer: an operator may activate an engine or roll back."
  let known = []
  let told = ""
  let status = null

  const draw = () => list.replaceChildren(...known.map(engine => card(engine, status, app, order)))
  const refresh = async () => {
    try {
      known = (await ask("engines")).engines
      draw()
    } catch (error) {
      note.textContent = error.message
    }
  }
  const take = ({ detail }) => {
    status = detail.status
    tellSwap(swap, status?.swap)
    const key = JSON.stringify([status?.engines, status?.swap?.result, detail.heard])
    if (key !== told) {
      told = key
      refresh()
    }
  }
  async function order(path, fields, question) {
    const answered = await asked(question, path === "activate")
    if (answered == null) return
    note.textContent = "Asked; the daemon loads and proves the engine beside the one at work …"
    try {
      const done = await change(path, path === "activate" ? { ...fields, shadow: answered } : fields)
      note.textContent = `${done.engine} is at work.`
    } catch (error) {
      note.textContent = error.message
    }
    refresh()
  }
  app.live.addEventListener("state", take)
  refresh()
  return () => app.live.removeEventListener("state", take)
}

function tellSwap(element, swap) {
  if (swap == null) {
    element.replaceChildren()
    delete element.dataset.key
    return
  }
  const kind = { active: "good", failed: "bad", returned: "bad" }[swap.result] ?? "wait"
  const { frames, agreed } = swap.comparison
  const compared = frames ? `, ${agreed} of ${frames} compared frames agreed` : ""
  sign(element, kind, swap.result.toUpperCase(), `${swap.engine}${compared}${swap.reason ? `: ${swap.reason}` : ""}`)
}

function card(engine, status, app, order) {
  const atWork = Object.values(status?.engines ?? {}).find(each => each.digest === engine.digest)
  const state = h("p", { class: "state" })
  if (engine.fault) sign(state, "bad", "UNREADABLE", engine.fault)
  else if (atWork) sign(state, "good", "AT WORK", golden(atWork, engine))
  else sign(state, "none", engine.isPrevious ? "PREVIOUS" : engine.isCurrent ? "CURRENT ON DISK" : "ON THE SHELF")
  const products = Object.entries(engine.products ?? {}).map(([name, judged]) => h("li", {},
    `${name}: limit ${score(judged.limit)}, false rejects at most ${(100 * judged.bound95).toFixed(1)}\u00a0% (95\u00a0%), set on ${judged.n} images`))
  const facts = engine.fault ? [] : [
    h("p", {}, `Built ${engine.created}, input ${engine.size[1]}×${engine.size[0]}, ${engine.branches.join(" + ")}, ${engine.golden.frames} golden frames`),
    h("ul", {}, ...products),
  ]
  const buttons = []
  if (app.session.mayChange && !engine.fault && !atWork) {
    buttons.push(h("button", { type: "button", class: "main", onclick: () => order("activate", { engine: engine.engine }, `Activate ${engine.engine}?`) }, "Activate"))
  }
  if (app.session.mayChange && atWork) {
    buttons.push(h("button", { type: "button", onclick: () => order("rollback", { engine: engine.name }, `Roll ${engine.name} back to the engine before?`) }, "Roll back"))
  }
  return h("section", { class: "engine", "data-engine": engine.engine, "aria-label": engine.engine },
    h("h3", {}, engine.engine), state, ...facts, h("div", { class: "buttons" }, ...buttons))
}

function golden(atWork, engine) {
  if (atWork.goldenDeviation == null) return ""
  return `${engine.golden.frames} golden frames good, ${Math.round(100 * atWork.goldenDeviation)} % of the tolerance used`
}

/** The number of frames to compare (0 for a rollback), or null where the answer is no. */
async function asked(question, mayCompare) {
  if (!mayCompare) return (await confirm(question, "The engine before takes over between two frames.")) ? 0 : null
  const words = "It is verified and proven beside the engine at work, takes over between two frames, and if it fails in its first 20 the old one is back."
  const input = h("input", { type: "number", min: 0, max: 1000000, value: 0, id: "shadow" })
  const answer = await confirm(question, words, { label: "Live frames to judge with both before", input })
  return answer == null ? null : Math.max(0, Math.round(Number(answer) || 0))
}
