// Questions and changes. Whoever is not logged in any more is sent to the login page.

let token = ""

async function answerOf(response) {
  if (response.status === 401) {
    location.replace("/login")
    throw new Error("log in first")
  }
  const answer = await response.json()
  if (!response.ok) throw new Error(answer.error ?? `the dashboard answers ${response.status}`)
  return answer
}

export async function ask(path, query = {}) {
  const known = Object.entries(query).filter(([, value]) => value != null && value !== "")
  return answerOf(await fetch(`/api/${path}?${new URLSearchParams(known)}`))
}

export async function change(path, fields = {}) {
  return answerOf(await fetch(`/api/${path}`, {
    method: "POST",
    headers: { "content-type": "application/json", "x-csrf-token": token },
    body: JSON.stringify(fields),
  }))
}

export async function picture(part, name) {
  const response = await fetch(pictureUrl(part, name))
  if (!response.ok) throw new Error((await response.json()).error)
  return response.blob()
}

function pictureUrl(part, name) {
  return `/api/picture?${new URLSearchParams({ camera: part.camera, epoch: part.epoch, seq: part.seq, name })}`
}

export async function session() {
  const known = await ask("session")
  token = known.token
  return known
}
