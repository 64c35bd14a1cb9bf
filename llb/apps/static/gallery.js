// Rows of tiles that are buttons, their faces cut from one image. The traits are those of TileGallery.

function makeTile(model, url, n, [label, text]) {
  const side = model.get("side"), columns = model.get("columns");
  const button = document.createElement("button"), face = document.createElement("span");
  button.type = "button";
  button.title = label;
  button.setAttribute("aria-label", label);
  Object.assign(face.style, {
    width: `${side}px`, height: `${side}px`, backgroundImage: `url(${url})`, backgroundSize: `${columns * side}px auto`,
    backgroundPosition: `-${n % columns * side}px -${Math.floor(n / columns) * side}px`,
  });
  button.append(face, text);
  button.addEventListener("click", () => model.send({ tile: n }));
  return button;
}

function makeRow(title, tiles) {
  const group = document.createElement("section"), head = document.createElement("h4"), row = document.createElement("div");
  head.textContent = title;
  row.append(...tiles);
  group.append(head, row);
  return group;
}

function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "llb-tiles";
  el.append(root);
  let url = null;
  function draw() {
    const bytes = model.get("image"), old = url;
    url = bytes && bytes.byteLength ? URL.createObjectURL(new Blob([bytes])) : null;
    let n = 0;
    root.replaceChildren(...model.get("rows").map(([title, tiles]) => makeRow(title, tiles.map(t => makeTile(model, url, n++, t)))));
    root.dataset.drawn = String(model.get("version"));
    if (old) URL.revokeObjectURL(old);
  }
  model.on("change:version", draw);
  draw();
  return () => { if (url) URL.revokeObjectURL(url); };
}
export default { render };
