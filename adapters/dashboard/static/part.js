// One part in a dialog: the full frame, a slider for what was found on it, and what was decided.

import { ask, picture } from "/static/api.js"
import { fact, h, moment, score, sign } from "/static/dom.js"
import { decode, paint, release } from "/static/overlay.js"

/** `key` is {camera, epoch, seq}. */
export async function showPart(key) {
  const dialog = document.getElementById("part")
  const slider = h("input", { type: "range", min: 0, max: 100, value: 60, id: "part-strength" })
  const canvas = h("canvas", { role: "img", "aria-label": "no picture yet" })
  const note = h("p", { class: "note" }, "Loading …")
  const verdict = h("p", { class: "verdict" })
  const facts = h("dl", { class: "facts" })
  dialog.replaceChildren(
    h("div", { class: "dialog-head" },
      h("h2", { id: "part-title" }, `${key.camera}, part ${key.part_id ?? key.partId ?? key.seq}`),
      h("button", { type: "button", onclick: () => dialog.close() }, "Close")),
    verdict,
    h("div", { class: "slider" }, h("label", { for: "part-strength" }, "Overlay"), slider),
    h("div", { class: "frame" }, canvas),
    note, facts,
  )
  let bitmaps = null
  dialog.addEventListener("close", () => release(bitmaps), { once: true })
  dialog.showModal()
  try {
    const part = await ask("part", key)
    tell(part, verdict, facts)
    if (!part.pictures.includes("frame")) {
      note.textContent = "No frame of this part is kept: only DEFECT, BAD_FRAME and ENGINE_ERROR are recorded, and the oldest go."
      canvas.remove()
      return
    }
    const blobs = await Promise.all(part.pictures.map(name => picture(part, name)))
    bitmaps = await decode(Object.fromEntries(part.pictures.map((name, index) => [name, blobs[index]])))
    const draw = () => paint(canvas, bitmaps, { strength: slider.value / 100, regions: part.regions })
    slider.addEventListener("input", draw)
    draw()
    canvas.setAttribute("aria-label", `frame ${part.seq} of ${part.camera}, ${part.regions.length} marked regions`)
    note.textContent = part.pictures.includes("heatmap") ? "" : "No heatmap is kept with it (results.heatmap in config.yaml); outlines are drawn."
  } catch (error) {
    note.textContent = error.message
  }
}

function tell(part, verdict, facts) {
  sign(verdict, part.outcome === "PASS" ? "good" : "bad", part.outcome, part.reason ?? "")
  const known = {
    Decided: moment(part.decided_ns), Part: part.part_id ?? "–", Number: part.seq === part.seq_to ? part.seq : `${part.seq} to ${part.seq_to}`,
    Score: score(part.score), Limit: score(part.score_limit), "p-value": score(part.p_value),
    Regions: part.regions.length, Epoch: part.epoch, Engine: part.engine?.slice(0, 12) ?? "–",
  }
  for (const [name, value] of Object.entries(known)) fact(facts, name).textContent = value
}
