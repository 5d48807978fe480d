// A frame with what was found on it: the heatmap in colours from "near the limit" to "far beyond", the mask's outline.
// Where there is no mask, the regions' boxes are drawn.

const AROUND = [[-1, -1], [0, -1], [1, -1], [-1, 0], [1, 0], [-1, 1], [0, 1], [1, 1]]
const COLOURS = colours()

/** 128 is the limit: below 48 nothing, then yellow to orange, from the limit on red to violet. RGBA for each of 256. */
function colours() {
  const table = new Uint8ClampedArray(1024)
  for (let value = 48; value < 256; value++) {
    const below = (value - 48) / 80
    const beyond = (value - 128) / 127
    const rgba = value < 128 ? [255, 225 - 115 * below, 0, 30 + 160 * below] : [225 - 65 * beyond, 0, 30 + 110 * beyond, 225]
    table.set(rgba, 4 * value)
  }
  return table
}

/** {frame, mask, heatmap} as blobs -> the same as bitmaps. */
export async function decode(parts) {
  const names = Object.keys(parts)
  const bitmaps = await Promise.all(names.map(name => createImageBitmap(parts[name])))
  return Object.fromEntries(names.map((name, index) => [name, bitmaps[index]]))
}

export function release(bitmaps) {
  for (const bitmap of Object.values(bitmaps ?? {})) bitmap.close()
}

/** `strength` from 0 to 1; `regions` in the frame's pixels; `most` pixels on the longer side. */
export function paint(canvas, bitmaps, { strength, regions = [], most = 1600 }) {
  const { frame, mask, heatmap } = bitmaps
  const scale = Math.min(1, most / Math.max(frame.width, frame.height))
  const [width, height] = [Math.round(frame.width * scale), Math.round(frame.height * scale)]
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height })
  const context = canvas.getContext("2d")
  context.globalAlpha = 1
  context.drawImage(frame, 0, 0, width, height)
  if (strength <= 0) return
  if (heatmap) {
    context.globalAlpha = strength
    context.drawImage(recoloured(heatmap, width, height, COLOURS), 0, 0)
  }
  context.globalAlpha = Math.min(1, 0.4 + strength)
  const thick = Math.max(1, Math.round(Math.max(width, height) / 300))
  if (mask) {
    context.drawImage(outline(mask, width, height, thick + 1, [0, 0, 0]), 0, 0)
    context.drawImage(outline(mask, width, height, thick, [0, 255, 255]), 0, 0)
  } else {
    boxes(context, regions, scale, thick)
  }
  context.globalAlpha = 1
}

function sheet(width, height) {
  const canvas = document.createElement("canvas")
  Object.assign(canvas, { width, height })
  return [canvas, canvas.getContext("2d", { willReadFrequently: true })]
}

/** A gray picture through a table of 256 RGBA values. */
function recoloured(picture, width, height, table) {
  const [canvas, context] = sheet(width, height)
  context.drawImage(picture, 0, 0, width, height)
  const pixels = context.getImageData(0, 0, width, height)
  const data = pixels.data
  for (let at = 0; at < data.length; at += 4) {
    const from = 4 * data[at]
    data[at + 1] = table[from + 1]
    data[at + 2] = table[from + 2]
    data[at + 3] = table[from + 3]
    data[at] = table[from]
  }
  context.putImageData(pixels, 0, 0)
  return canvas
}

function outline(mask, width, height, thick, colour) {
  const table = new Uint8ClampedArray(1024)
  for (let value = 128; value < 256; value++) table.set([...colour, 255], 4 * value)
  const solid = recoloured(mask, width, height, table)
  const [canvas, context] = sheet(width, height)
  for (const [x, y] of AROUND) context.drawImage(solid, x * thick, y * thick)
  context.globalCompositeOperation = "destination-out"
  context.drawImage(solid, 0, 0)
  return canvas
}

function boxes(context, regions, scale, thick) {
  for (const [colour, width] of [["#000", 2 * thick + 2], ["#0ff", 2 * thick]]) {
    context.strokeStyle = colour
    context.lineWidth = width
    for (const { x, y, w, h } of regions) context.strokeRect(x * scale, y * scale, w * scale, h * scale)
  }
}
