// The WebSocket: states ten times a second, pictures as fast as they are shown, connected again by itself.

const AGAIN_MS = 500
const SILENT_MS = 900 // states come every quarter of a second at least
const NOT_LOGGED_IN = 4401
const MOST_REJECTS = 60

/** Events: "state" (detail: the state), "picture" (detail: {camera, header, parts}). The newest of both is kept for a view
 *  that is opened later. */
export class Live extends EventTarget {
  rejects = [] // newest first
  pictures = new Map() // by camera
  #socket = null
  #heard = 0
  #silent = false

  open() {
    this.#heard = performance.now()
    this.#connect()
    setInterval(() => this.#listen(), 250)
  }

  /** The camera's picture is on the screen: its next one may come. */
  shown(camera) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify({ shown: camera }))
  }

  #connect() {
    const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/live`)
    this.#socket = socket
    socket.binaryType = "arraybuffer"
    socket.addEventListener("message", event => this.#take(event.data))
    socket.addEventListener("close", event => {
      if (event.code === NOT_LOGGED_IN) location.replace("/login")
      else setTimeout(() => this.#connect(), AGAIN_MS)
    })
  }

  #take(data) {
    this.#heard = performance.now()
    this.#silent = false
    if (typeof data === "string") {
      const state = JSON.parse(data)
      if (state.fresh) this.rejects = []
      this.rejects = [...state.rejects.reverse(), ...this.rejects].slice(0, MOST_REJECTS)
      this.#tell("state", state)
    } else {
      const picture = unpack(data)
      this.pictures.set(picture.camera, picture)
      this.#tell("picture", picture)
    }
  }

  #listen() {
    if (this.#silent || performance.now() - this.#heard < SILENT_MS) return
    this.#silent = true
    this.#tell("state", { heard: false, state: "NO_DASHBOARD", cameras: {}, rejects: [], status: null })
  }

  #tell(kind, detail) {
    this.dispatchEvent(new CustomEvent(kind, { detail }))
  }
}

const TYPES = { frame: "image/jpeg", mask: "image/png", heatmap: "image/png" }

function unpack(data) {
  const length = new DataView(data).getUint32(0, true)
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)))
  const parts = {}
  let offset = 4 + length
  for (const [name, size] of header.parts) {
    parts[name] = new Blob([new Uint8Array(data, offset, size)], { type: TYPES[name] })
    offset += size
  }
  return { ...header, parts }
}
