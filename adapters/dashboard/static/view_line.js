// Each camera: its newest frame with what was found on it, the last verdict, score against limit, rate, state in words.

import { clock, fact, h, number, s, score, sign, text } from "/static/dom.js"
import { decode, paint, release } from "/static/overlay.js"

export const title = "Line"

const MOST_LISTED = 8

export function open(root, app) {
  const slider = h("input", { type: "range", min: 0, max: 100, value: localStorage.getItem("strength") ?? 60, id: "strength" })
  const cards = new Map(Object.entries(app.session.cameras).map(([name, product]) => [name, new Card(name, product, app)]))
  const list = h("ol", { class: "rejects" })
  const empty = h("p", { class: "note" }, "None since this page was opened.")
  root.append(
    h("div", { class: "cameras" }, ...[...cards.values()].map(card => card.element)),
    h("div", { class: "slider" }, h("label", { for: "strength" }, "Overlay on the pictures"), slider),
    h("section", { "aria-labelledby": "newest" }, h("h2", { id: "newest" }, "Newest rejects"), empty, list),
  )
  const take = ({ detail }) => {
    for (const [name, card] of cards) card.tell(detail, detail.cameras[name])
    if (detail.fresh || detail.rejects.length) listRejects()
  }
  const listRejects = () => {
    empty.hidden = app.live.rejects.length > 0
    list.replaceChildren(...app.live.rejects.slice(0, MOST_LISTED).map(part => row(part, app)))
  }
  const show = ({ detail }) => cards.get(detail.camera)?.show(detail, slider.value / 100)
  const redraw = () => {
    localStorage.setItem("strength", slider.value)
    for (const card of cards.values()) card.draw(slider.value / 100)
  }
  slider.addEventListener("input", redraw)
  app.live.addEventListener("state", take)
  app.live.addEventListener("picture", show)
  for (const picture of app.live.pictures.values()) show({ detail: picture })
  listRejects()
  return () => {
    app.live.removeEventListener("state", take)
    app.live.removeEventListener("picture", show)
    for (const card of cards.values()) card.close()
  }
}

function row(part, app) {
  const found = part.score == null ? "" : `, ${score(part.score)} of ${score(part.limit)}`
  const words = `${clock(part.decidedNs)} ${part.camera} ${part.reason}${found}`
  return h("li", {}, h("button", { type: "button", "data-part": part.partId, onclick: () => app.showPart(part) }, words))
}

class Card {
  #app
  #bitmaps = null
  #header = null

  constructor(name, product, app) {
    this.#app = app
    this.name = name
    this.state = h("p", { class: "state" })
    this.verdict = h("p", { class: "verdict" })
    this.canvas = h("canvas", { role: "img", "aria-label": `${name}: no picture yet` })
    this.caption = h("p", { class: "note" }, "No picture yet.")
    this.gauge = new Gauge()
    const facts = h("dl", { class: "facts" })
    this.rate = fact(facts, "Rate")
    this.passed = fact(facts, "Passed")
    this.rejected = fact(facts, "Rejected")
    this.part = fact(facts, "Part")
    this.element = h(
      "section", { class: "camera", "aria-labelledby": `camera-${name}`, "data-camera": name },
      h("div", { class: "camera-head" }, h("h2", { id: `camera-${name}` }, name, " ", h("small", {}, product)), this.state),
      h("div", { class: "camera-body" },
        h("div", {}, h("div", { class: "frame" }, this.canvas), this.caption),
        h("div", { class: "camera-facts" }, this.verdict, this.gauge.element, facts)),
    )
  }

  tell(state, camera) {
    if (!state.heard || camera == null) {
      sign(this.state, "bad", state.state === "NO_DASHBOARD" ? "NO DASHBOARD" : "NO DAEMON")
      sign(this.verdict, "none", "NO VERDICT")
      return
    }
    const { last } = camera
    if (state.state !== "RUNNING") sign(this.state, "wait", state.state)
    else if (camera.rate === 0) sign(this.state, "wait", "NO FRAMES")
    else sign(this.state, "good", "INSPECTING")
    if (last == null) sign(this.verdict, "none", "NO VERDICT")
    else sign(this.verdict, last.outcome === "PASS" ? "good" : "bad", last.outcome, last.reason ?? "")
    const rejected = Object.values(camera.rejected).reduce((sum, count) => sum + count, 0)
    text(this.rate, `${number(camera.rate)} / s`)
    text(this.passed, String(camera.passed))
    text(this.rejected, String(rejected))
    text(this.part, last == null ? "–" : `${last.partId ?? last.seq}`)
    this.gauge.tell(last?.score, last?.limit)
    this.#captionFor(last)
  }

  async show({ header, parts }, strength) {
    let bitmaps
    try {
      bitmaps = await decode(parts)
    } catch {
      text(this.caption, "The newest picture cannot be decoded.")
      this.#app.live.shown(this.name)
      return
    }
    release(this.#bitmaps)
    this.#bitmaps = bitmaps
    this.#header = header
    this.draw(strength)
    this.canvas.dataset.part = header.partId
    const found = header.outcome === "PASS" ? "passed" : `rejected, ${header.regions.length} marked regions`
    this.canvas.setAttribute("aria-label", `${this.name}: part ${header.partId ?? header.seq}, ${found}`)
    // The next one is asked for when this one is on the screen: a slow tablet gets fewer, not later ones.
    requestAnimationFrame(() => this.#app.live.shown(this.name))
  }

  draw(strength) {
    if (this.#bitmaps) paint(this.canvas, this.#bitmaps, { strength, regions: this.#header.regions, most: 900 })
  }

  close() {
    release(this.#bitmaps)
    this.#bitmaps = null
  }

  #captionFor(last) {
    const shown = this.#header
    if (shown == null) return
    const same = last != null && last.epoch === shown.epoch && last.seq === shown.seq
    const what = `${shown.outcome} of ${clock(shown.decidedNs)}, part ${shown.partId ?? shown.seq}`
    const why = this.#app.session.sends.frameEveryMs ? "" : "; passed parts send none (results.frame_every_ms)"
    text(this.caption, same ? `Picture: this part, ${clock(shown.decidedNs)}` : `Picture: ${what}${why}`)
  }
}

/** Score against limit: a bar that reaches a line. */
class Gauge {
  constructor() {
    this.bar = s("rect", { x: 0, y: 6, height: 14, width: 0, class: "gauge-bar" })
    const limit = s("path", { d: "M66.7 0v26", class: "gauge-limit" })
    this.svg = s("svg", { viewBox: "0 0 100 26", preserveAspectRatio: "none", class: "gauge", "aria-hidden": "true" },
      s("rect", { x: 0, y: 6, width: 100, height: 14, class: "gauge-back" }), this.bar, limit)
    this.words = h("p", { class: "gauge-words" }, "No score")
    this.element = h("div", {}, this.words, this.svg)
  }

  tell(value, limit) {
    if (value == null || limit == null) {
      text(this.words, "No score")
      this.bar.setAttribute("width", 0)
      return
    }
    text(this.words, `Score ${score(value)}, limit ${score(limit)}`)
    this.bar.setAttribute("width", Math.max(0, Math.min(100, (66.7 * value) / limit)))
    this.bar.classList.toggle("beyond", value >= limit)
  }
}
