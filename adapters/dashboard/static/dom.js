// Small helpers: elements, texts that change only when they must, shapes that read without colour, numbers and times.

const SVG = "http://www.w3.org/2000/svg"

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value)
    else if (value === true) element.setAttribute(name, "")
    else if (value !== false && value != null) element.setAttribute(name, value)
  }
  element.append(...children.flat().filter(child => child != null))
  return element
}

export const h = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children)
export const s = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children)

/** Write only what differs: ten states a second must not make a reader's cursor jump. */
export function text(element, value) {
  if (element.textContent !== value) element.textContent = value
}

const SHAPES = {
  good: [["circle", { cx: 12, cy: 12, r: 11 }], ["path", { d: "m6.5 12.5 3.8 3.8 7.2-8", class: "stroke" }]],
  bad: [["path", { d: "M8 1h8l7 7v8l-7 7H8l-7-7V8z" }], ["path", { d: "m8 8 8 8m0-8-8 8", class: "stroke" }]],
  wait: [["rect", { x: 1, y: 1, width: 22, height: 22, rx: 3 }], ["path", { d: "M9 7v10m6-10v10", class: "stroke" }]],
  none: [["path", { d: "M12 1 23 12 12 23 1 12z" }], ["path", { d: "M7 12h10", class: "stroke" }]],
}

/** A circle with a tick, an octagon with a cross, a square with bars, a diamond with a dash. */
export function shape(kind) {
  const parts = SHAPES[kind].map(([tag, attributes]) => s(tag, attributes))
  return s("svg", { viewBox: "0 0 24 24", class: "shape", "aria-hidden": "true" }, ...parts)
}

/** Shape and word together; built anew only when either changes. */
export function sign(element, kind, word, more = "") {
  const key = `${kind} ${word} ${more}`
  if (element.dataset.key === key) return
  element.dataset.key = key
  element.classList.remove(...Object.keys(SHAPES))
  element.classList.add(kind)
  element.replaceChildren(shape(kind), h("strong", {}, word), ...(more ? [h("span", {}, more)] : []))
}

export const number = (value, digits = 1) => (value == null ? "–" : value.toFixed(digits))

/** Three digits that matter: scores are 0.012 in one engine and 140 in another. */
export const score = value => (value == null ? "–" : Number(value.toPrecision(3)).toString())

export function clock(ns) {
  return ns == null ? "–" : new Date(ns / 1e6).toLocaleTimeString([], { hour12: false })
}

export function moment(ns) {
  if (ns == null) return "–"
  const date = new Date(ns / 1e6)
  return `${date.toLocaleDateString("sv-SE")} ${date.toLocaleTimeString("sv-SE")}`
}

export function bytes(count) {
  if (count == null) return "–"
  return count < 1e6 ? `${Math.round(count / 1e3)} kB` : `${(count / 1e6).toFixed(1)} MB`
}

export function fact(list, name) {
  const value = h("dd", {}, "–")
  list.append(h("div", {}, h("dt", {}, name), value))
  return value
}

export function table(caption, heads, rows) {
  return h(
    "table", {},
    h("caption", {}, caption),
    h("thead", {}, h("tr", {}, ...heads.map(head => h("th", { scope: "col" }, head)))),
    h("tbody", {}, ...rows.map(cells => h("tr", {}, ...cells.map(cell => (cell instanceof Element && cell.tagName === "TD" ? cell : h("td", {}, cell)))))),
  )
}
