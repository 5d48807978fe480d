// The login page: one request, and its refusal in words.
const form = document.getElementById("login")
const fault = document.getElementById("fault")

form.addEventListener("submit", async event => {
  event.preventDefault()
  const button = form.querySelector("button")
  button.disabled = true
  fault.textContent = ""
  try {
    const answer = await fetch("/api/login", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ name: form.elements.name.value, password: form.elements.password.value }),
    })
    if (answer.ok) {
      location.replace("/")
      return
    }
    fault.textContent = (await answer.json()).error
    form.elements.password.value = ""
    form.elements.password.focus()
  } catch {
    fault.textContent = "The dashboard does not answer."
  } finally {
    button.disabled = false
  }
})
