// The page: who is logged in, what the daemon says, which view is shown. A view is {title, open(root, app) -> close}.

import { change, session } from "/static/api.js"
import { h, sign, text } from "/static/dom.js"
import { Live } from "/static/live.js"
import { showPart } from "/static/part.js"
import * as books from "/static/view_books.js"
import * as engines from "/static/view_engines.js"
import * as history from "/static/view_history.js"
import * as line from "/static/view_line.js"
import * as review from "/static/view_review.js"
import * as scores from "/static/view_scores.js"

const VIEWS = { line, history, review, scores, engines, books }
const STATES = {
  RUNNING: ["good", "RUNNING"],
  PAUSED: ["wait", "PAUSED"],
  DRAINING: ["wait", "DRAINING"],
  STARTING: ["wait", "STARTING"],
  NO_DAEMON: ["bad", "NO DAEMON"],
  NO_DASHBOARD: ["bad", "NO DASHBOARD"],
}
const REMARKS = {
  PAUSED: "frames are refused",
  DRAINING: "it is about to end",
  NO_DAEMON: "nobody inspects; the PLC holds REJECT",
  NO_DASHBOARD: "this page is cut off; the line may be running",
}

const root = document.getElementById("main")
let close = () => {}

function showState({ detail }) {
  const [kind, word] = STATES[detail.state] ?? ["none", detail.state]
  const remark = detail.degraded === "JOURNAL" ? "disk full: the books wait in memory" : detail.degraded
  sign(document.getElementById("state"), detail.degraded ? "wait" : kind, word, remark ?? REMARKS[detail.state] ?? "")
  const title = `${detail.state === "RUNNING" ? "" : `${word} · `}inspectd`
  if (document.title !== title) document.title = title
}

function show(app) {
  const name = location.hash.startsWith("#/") ? location.hash.slice(2) : "line"
  const view = VIEWS[name] ?? VIEWS.line
  close()
  root.replaceChildren()
  for (const link of document.querySelectorAll("#views a")) {
    if (VIEWS[link.hash.slice(2)] === view) link.setAttribute("aria-current", "page")
    else link.removeAttribute("aria-current")
  }
  close = view.open(root, app)
}

const known = await session()
const app = { session: known, live: new Live(), showPart }
text(document.getElementById("line"), known.line)
text(document.getElementById("user"), `${known.user} (${known.role})`)
document.getElementById("views").append(...Object.entries(VIEWS).map(([name, view]) => h("a", { href: `#/${name}` }, view.title)))
const logout = document.getElementById("logout")
logout.addEventListener("click", async () => {
  await change("logout")
  location.replace("/login")
})
logout.hidden = false // not before it does something
app.live.addEventListener("state", showState)
app.live.open()
window.addEventListener("hashchange", () => {
  if (location.hash.startsWith("#/")) show(app)
})
show(app)
