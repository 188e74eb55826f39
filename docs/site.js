// A box above the table of optimizers: only rows that contain all of its words are shown.
const after = document.querySelector("#the-table");
const table = after && [...document.querySelectorAll("article table")].at(-1);
if (table) {
  const rows = [...table.tBodies[0].rows];
  const box = Object.assign(document.createElement("div"), { className: "filter" });
  box.innerHTML = '<input type="search" aria-label="Filter the table" placeholder="Filter: timm lion, pieces, option ..."><output></output>';
  after.after(box);
  const [input, count] = box.children;
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    count.value = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  };
  input.addEventListener("input", filter);
  filter();
}
