// Page-wide: an image dropped anywhere or pasted is uploaded; a slider moved by keys is let go when the key is.
() => {
  const give = (files) => {
    const input = document.querySelector("#images input[type=file]");
    if (!input || !files || !files.length) return;
    const one = new DataTransfer();
    one.items.add(files[0]);
    input.files = one.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  };
  const over = (on) => document.body.classList.toggle("dropping", on);
  document.addEventListener("dragover", (event) => { event.preventDefault(); over(true); });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) over(false); });
  document.addEventListener("drop", (event) => { event.preventDefault(); over(false); give(event.dataTransfer.files); });
  document.addEventListener("paste", (event) => give(event.clipboardData.files));
  document.addEventListener("keyup", (event) => {
    const moved = /^(Arrow|Page|Home|End)/.test(event.key);
    if (moved && event.target.type === "range") event.target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
  });
}
