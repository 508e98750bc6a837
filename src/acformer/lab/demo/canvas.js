// The image of canvas.py: a click, or Enter on the patch that the arrow keys reached, is the event "patch".
// gradio gives: element, the component's root, which stays; trigger; watch. What is inside is patched in place.
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const NEXT = { "-": "select it to pin it", p: "pinned; select it to remove it", r: "removed; select it to free it" };
let at = null; // [row, column] of the cursor

const svg = () => element.querySelector("svg");
const numbers = (name) => svg().dataset[name].split(" ").map(Number);

function show() {
  const cursor = svg() && svg().querySelector(".cursor");
  if (!cursor) return;
  cursor.style.display = at ? "block" : "none";
  if (!at) return;
  const [rows, columns] = numbers("grid"), [left, top, width, height] = numbers("square");
  at = [Math.min(at[0], rows - 1), Math.min(at[1], columns - 1)];
  cursor.setAttribute("x", left + (at[1] * width) / columns);
  cursor.setAttribute("y", top + (at[0] * height) / rows);
  const patch = at[0] * columns + at[1], head = numbers("heads")[patch];
  const kind = head ? `an anchor, chosen by head ${head}` : "not an anchor";
  element.querySelector(".where").textContent =
    `Row ${at[0] + 1}, column ${at[1] + 1}: ${kind}; ${NEXT[svg().dataset.pins[patch]]}.`;
}

function patchUnder(event) {
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg().getScreenCTM().inverse());
  const [rows, columns] = numbers("grid"), [left, top, width, height] = numbers("square");
  const row = Math.floor(((point.y - top) / height) * rows), column = Math.floor(((point.x - left) / width) * columns);
  return row >= 0 && row < rows && column >= 0 && column < columns ? [row, column] : null;
}

function choose() {
  if (at) trigger("patch", { patch: at[0] * numbers("grid")[1] + at[1] });
}

function hide() {
  if (svg()) svg().querySelector(".cursor").style.display = "none";
}

element.addEventListener("focusin", show);
element.addEventListener("focusout", hide);
element.addEventListener("pointerleave", hide);
element.addEventListener("pointermove", (event) => {
  if (!event.target.closest("svg") || event.pointerType !== "mouse") return;
  at = patchUnder(event);
  show();
});
element.addEventListener("click", (event) => {
  if (!event.target.closest("svg")) return;
  at = patchUnder(event);
  show();
  choose();
});
element.addEventListener("keydown", (event) => {
  if (!event.target.closest("svg") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in STEPS) {
    const [rows, columns] = numbers("grid"), [down, right] = STEPS[event.key];
    const from = at || [Math.floor(rows / 2) - down, Math.floor(columns / 2) - right];
    at = [Math.min(Math.max(from[0] + down, 0), rows - 1), Math.min(Math.max(from[1] + right, 0), columns - 1)];
    show();
  } else if (event.key === "Enter" || event.key === " ") choose();
  else return;
  event.preventDefault();
});
watch("value", show);
