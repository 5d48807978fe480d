// Where the line's scores lie against the ones that the limit was set on, and whether they drift.

import { ask } from "/static/api.js"
import { h, number, s, score, text } from "/static/dom.js"

export const title = "Scores"

const AGAIN_MS = 10_000
const [WIDTH, HEIGHT, FOOT] = [800, 240, 28]

export function open(root, app) {
  const cards = Object.keys(app.session.cameras).map(name => {
    const words = h("p", {}, "Loading …")
    const drift = h("p", { class: "note" }, "Nothing judged since the daemon's start, the last reset or the last swap.")
    const chart = h("div", {})
    return { name, words, drift, chart, element: h("section", { class: "scores", "aria-labelledby": `scores-${name}` },
      h("h2", { id: `scores-${name}` }, name), words, chart, drift) }
  })
  root.append(h("p", { class: "note" },
    "Filled: parts of the last 24 hours (2,000 at most), judged by the engine at work. Outlined: the good images that its limit was set on. ",
    "The line is the limit; the last bar holds everything beyond it."), ...cards.map(card => card.element))
  const refresh = () => Promise.all(cards.map(draw))
  const timer = setInterval(refresh, AGAIN_MS)
  const take = ({ detail }) => {
    for (const card of cards) tellDrift(card.drift, detail.status?.watch?.[card.name])
  }
  app.live.addEventListener("state", take)
  refresh()
  return () => {
    clearInterval(timer)
    app.live.removeEventListener("state", take)
  }
}

async function draw(card) {
  try {
    const found = await ask("scores", { camera: card.name })
    const median = found.median == null ? "none yet" : `median ${score(found.median)}`
    text(card.words, `${found.engine}, limit ${score(found.limit)}. Line: ${found.n} scores, ${median}. ` +
      `Calibration: ${found.nCalibration}, median ${score(found.medianCalibration)}.`)
    card.chart.replaceChildren(chart(found, `Scores of ${card.name}: ${card.words.textContent}`))
  } catch (error) {
    text(card.words, error.message)
  }
}

function chart(found, words) {
  const { edges, line, calibration, limit } = found
  const [low, high] = [edges[0], edges.at(-1)]
  const x = value => (WIDTH * (value - low)) / (high - low)
  const most = Math.max(...line, ...calibration, 1e-9)
  const y = share => HEIGHT - FOOT - ((HEIGHT - FOOT - 12) * share) / most
  const bars = (shares, name, inset) => shares.map((share, index) => share && s("rect", {
    x: x(edges[index]) + inset, width: Math.max(1, x(edges[index + 1]) - x(edges[index]) - 2 * inset),
    y: y(share), height: HEIGHT - FOOT - y(share), class: name,
  })).filter(Boolean)
  const beyond = x(limit) > WIDTH * 0.7
  return s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", role: "img", "aria-label": words },
    ...bars(line, "bar-line", 2), ...bars(calibration, "bar-calibration", 0.5),
    s("path", { d: `M0 ${HEIGHT - FOOT}H${WIDTH}`, class: "axis" }),
    s("path", { d: `M${x(limit)} 0V${HEIGHT - FOOT}`, class: "limit" }),
    s("text", { x: x(limit) + (beyond ? -8 : 8), y: 18, "text-anchor": beyond ? "end" : "start" }, `limit ${score(limit)}`),
    s("text", { x: 2, y: HEIGHT - 6 }, score(low)), s("text", { x: WIDTH - 2, y: HEIGHT - 6, "text-anchor": "end" }, `${score(high)} and more`))
}

/** What the watch says of this camera: its alarms in its own words, else how far the nearer of both tests is from one. */
function tellDrift(element, byProduct) {
  const posts = Object.entries(byProduct ?? {})
  if (posts.length === 0) return
  const alarms = posts.flatMap(([product, post]) => Object.entries(post.alarms ?? {}).map(([word, what]) => `${word} (${product}): ${what}`))
  const quiet = posts.map(([product, post]) => {
    const rejects = post.rejects?.estimate == null ? "" : `, rejects ${number(100 * post.rejects.estimate, 1)} % (${post.rejects.promise})`
    return `${product}: scores ${share(post.driftStatistic)}, images ${share(post.setupStatistic)} of the way to an alarm${rejects}`
  })
  text(element, alarms.length ? `Alarm: ${alarms.join("; ")}. Look, then: inspectd reset` : `No alarm. ${quiet.join("; ")}`)
  element.classList.toggle("fault", alarms.length > 0)
}

function share(value) {
  return value == null ? "not measured" : `${number(100 * value, 0)} %`
}
