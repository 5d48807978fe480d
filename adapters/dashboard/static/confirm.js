// A question before a change, in a dialog: what will happen, perhaps a field, yes or no.

import { h } from "/static/dom.js"

/** True or false; with `field` ({label, input}) what was typed into it, or null where the answer is no. */
export function confirm(question, words, field = null) {
  const dialog = document.getElementById("confirm")
  return new Promise(resolve => {
    const no = field ? null : false
    const end = answer => {
      resolve(answer)
      dialog.close()
    }
    dialog.replaceChildren(
      h("h2", { id: "confirm-title" }, question), h("p", {}, words, " It is written into the books with your name."),
      ...(field ? [h("label", { for: field.input.id }, field.label), field.input] : []),
      h("div", { class: "buttons" },
        h("button", { type: "button", class: "main", id: "yes", onclick: () => end(field ? field.input.value : true) }, "Yes, do it"),
        h("button", { type: "button", onclick: () => end(no) }, "No")),
    )
    dialog.addEventListener("close", () => resolve(no), { once: true })
    dialog.showModal()
  })
}
