// What is said of an answer depends on its confidence and on the threshold, which the user moves.
window.showSureness = (threshold) => {
  for (const element of document.querySelectorAll("[data-confidence]")) {
    element.classList.toggle("unsure", Number(element.dataset.confidence) < threshold);
  }
};

// A picture may be pasted anywhere on the page: it goes where the visible tab takes files.
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])].filter((file) => file.type.startsWith("image/"));
  if (files.length === 0) return;
  event.preventDefault();
  const visible = (selector) =>
    [...document.querySelectorAll(selector)].find((element) => element.closest("[role=tabpanel]")?.offsetParent);
  const give = (input) => {
    const transfer = new DataTransfer();
    for (const file of input.multiple ? files : files.slice(0, 1)) transfer.items.add(file);
    input.files = transfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  };
  visible("#picture [aria-label='Remove Image']")?.click(); // only an empty one takes files
  setTimeout(() => {
    const input = visible("input[type=file]");
    if (input) return give(input);
    visible("#picture [aria-label='Upload file']")?.click(); // after the camera or its own clipboard there is no input
    setTimeout(() => {
      const again = visible("input[type=file]");
      if (again) give(again);
    }, 50);
  }, 50);
});

// Gradio leaves these buttons without a name, or with the key of one, and answers without a word to a screen reader.
new MutationObserver(() => {
  for (const element of document.querySelectorAll("#answer:not([aria-live]), #looked:not([aria-live])")) {
    element.setAttribute("aria-live", "polite");
  }
  for (const button of document.querySelectorAll(".gallery-item:not([aria-label])")) {
    const name = button.querySelector("img")?.src.split("/").pop();
    if (name) button.setAttribute("aria-label", `Example: ${decodeURIComponent(name)}`);
  }
  for (const button of document.querySelectorAll("[aria-label='common.upload']")) {
    button.setAttribute("aria-label", "Add pictures");
    button.title = "Add pictures";
  }
}).observe(document.body, { childList: true, subtree: true });
