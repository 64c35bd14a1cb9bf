// An image beside its map of objects; a patch is chosen by mouse or keyboard. The traits are those of PatchPicker.
const INK = "#222222", CHOSEN = "#D55E00";

function make(tag, className, attributes = {}) {
  const node = document.createElement(tag);
  node.className = className;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

/** What is announced about the chosen patch. */
function sentence(model) {
  const p = model.get("patch"), w = model.get("grid")[1], k = model.get("objects")[p];
  if (p < 0 || k === undefined) return "no patch chosen; click one, or use the arrow keys";
  const name = model.get("names")[k], confidence = model.get("confidence")[p].toFixed(2);
  return `row ${Math.floor(p / w) + 1}, column ${p % w + 1}: object ${k}${name ? ` (${name})` : ""}, p ${confidence}`;
}

/** A pen on a canvas as large as the page shows it, and the size of a patch in its pixels; null while it is not shown. */
function prepare(canvas, bitmap, [h, w]) {
  const width = canvas.clientWidth, ratio = window.devicePixelRatio || 1;
  if (!width || !bitmap) return null;
  const height = Math.round(width * bitmap.height / bitmap.width);
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  return { pen, w, h, width, height, sx: width / w, sy: height / h };
}

/** Lines between neighbouring patches (i, j) for which differ(i, j). */
function drawEdges({ pen, w, h, sx, sy }, colour, size, differ) {
  pen.strokeStyle = colour;
  pen.lineWidth = size;
  pen.beginPath();
  for (let i = 0; i < w * h; i++) {
    const x = i % w, y = Math.floor(i / w);
    if (x + 1 < w && differ(i, i + 1)) { pen.moveTo((x + 1) * sx, y * sy); pen.lineTo((x + 1) * sx, (y + 1) * sy); }
    if (y + 1 < h && differ(i, i + w)) { pen.moveTo(x * sx, (y + 1) * sy); pen.lineTo((x + 1) * sx, (y + 1) * sy); }
  }
  pen.stroke();
}

/** Colours of the objects over a pale image, opacity for confidence; outlines where objects change. */
function drawColours(view, model) {
  const { pen, w, sx, sy, width, height } = view;
  const objects = model.get("objects"), confidence = model.get("confidence"), fills = model.get("fills");
  pen.fillStyle = "rgba(255,255,255,.5)";
  pen.fillRect(0, 0, width, height);
  objects.forEach((k, i) => {
    pen.globalAlpha = model.get("opacity") * confidence[i];
    pen.fillStyle = fills[k];
    pen.fillRect((i % w) * sx, Math.floor(i / w) * sy, sx + .5, sy + .5);
  });
  pen.globalAlpha = 1;
  const other = (a, b) => objects[a] !== objects[b];
  drawEdges(view, "white", 2.4, other);
  drawEdges(view, INK, 1, other);
}

function drawIds({ pen, sx, sy }, positions) {
  pen.font = "bold 12px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.lineWidth = 3;
  pen.lineJoin = "round";
  for (const [k, x, y] of positions) {
    pen.strokeStyle = "white";
    pen.strokeText(k, x * sx, y * sy);
    pen.fillStyle = INK;
    pen.fillText(k, x * sx, y * sy);
  }
}

function drawChosenPatch({ pen, w, sx, sy }, patch) {
  for (const [colour, size] of [["white", 5], [CHOSEN, 2.5]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = size;
    pen.strokeRect((patch % w) * sx, Math.floor(patch / w) * sy, sx, sy);
  }
}

function drawCanvas(canvas, bitmap, model) {
  const view = prepare(canvas, bitmap, model.get("grid"));
  if (!view) return;
  const isMap = canvas.dataset.llb === "map", objects = model.get("objects"), chosen = model.get("chosen");
  if (isMap) view.pen.filter = "grayscale(1)";
  view.pen.drawImage(bitmap, 0, 0, view.width, view.height);
  view.pen.filter = "none";
  if (isMap) drawColours(view, model);
  const rim = (a, b) => (objects[a] === chosen) !== (objects[b] === chosen);
  drawEdges(view, "white", 5, rim);
  drawEdges(view, INK, 2.4, rim);
  if (isMap) drawIds(view, model.get("positions"));
  if (model.get("patch") >= 0) drawChosenPatch(view, model.get("patch"));
}

const clamp = (x, n) => Math.min(n - 1, Math.max(0, x));

/** The patch under the mouse. */
function patchAt(event, canvas, [h, w]) {
  const box = canvas.getBoundingClientRect();
  const x = Math.floor((event.clientX - box.left) / box.width * w), y = Math.floor((event.clientY - box.top) / box.height * h);
  return clamp(y, h) * w + clamp(x, w);
}

/** The patch a key leads to from another one; null for other keys, and for shortcuts. */
function patchAfterKey(event, patch, [h, w]) {
  const from = Math.max(0, patch), x = from % w, y = Math.floor(from / w);
  const to = {
    ArrowLeft: [x - 1, y], ArrowRight: [x + 1, y], ArrowUp: [x, y - 1], ArrowDown: [x, y + 1], Home: [0, y], End: [w - 1, y],
  }[event.key];
  if (!to || event.ctrlKey || event.metaKey || event.altKey) return null;
  return patch < 0 ? 0 : clamp(to[1], h) * w + clamp(to[0], w);
}

/** Hide the static image that stands in for the explorer where there is no kernel. */
function hideStandIn(id) {
  const style = document.createElement("style");
  style.textContent = `[data-llb-stand-in="${id}"] { display: none }`;
  document.head.append(style);
  return style;
}

function render({ model, el }) {
  const root = make("div", "llb-picker", { role: "application", "aria-roledescription": "patch picker", tabindex: "0" });
  root.dataset.lmSuppressShortcuts = "true";   // JupyterLab would take the arrow keys for itself
  const canvases = ["image", "map"].map(name => make("canvas", "llb-canvas", { "aria-hidden": "true", "data-llb": name }));
  const live = make("div", "llb-line", { role: "status", "aria-live": "polite" });
  root.append(...canvases);
  el.append(root, live);
  let bitmap = null, wanted = 0;

  function draw() {
    for (const canvas of canvases) drawCanvas(canvas, bitmap, model);
    root.setAttribute("aria-label", model.get("label"));
    root.dataset.drawn = String(model.get("number"));
    live.textContent = sentence(model);
  }
  async function load() {
    const mine = ++wanted, bytes = model.get("image");
    if (!bytes || !bytes.byteLength) return;
    const found = await createImageBitmap(new Blob([bytes]));
    if (mine !== wanted) return;   // a later image came first
    bitmap = found;
    draw();
  }
  function pick(patch) {   // drawn at once; the kernel answers when it can
    if (patch === model.get("patch")) return;
    model.set({ patch, chosen: model.get("objects")[patch] });
    model.save_changes();
    draw();
  }
  for (const canvas of canvases) canvas.addEventListener("pointerdown", e => pick(patchAt(e, canvas, model.get("grid"))));
  root.addEventListener("keydown", event => {
    const patch = patchAfterKey(event, model.get("patch"), model.get("grid"));
    if (patch === null) return;
    event.preventDefault();
    event.stopPropagation();
    pick(patch);
  });

  const style = hideStandIn(model.get("stand_in"));
  const resized = new ResizeObserver(draw), seen = new IntersectionObserver(draw);
  for (const canvas of canvases) { resized.observe(canvas); seen.observe(canvas); }
  model.on("change:image", load);
  model.on("change:number change:patch change:names change:fills change:chosen", draw);
  load();
  return () => { resized.disconnect(); seen.disconnect(); style.remove(); };
}
export default { render };
