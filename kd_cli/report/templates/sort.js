for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].map(row => {
      const cell = row.cells[column], text = cell.dataset.v ?? cell.textContent.trim();
      return { row, text, number: text === "" ? NaN : Number(text) };
    });
    rows.sort((a, b) => {
      if (!a.text || !b.text) return !a.text - !b.text;  // the empty ones last, whichever way
      const numbers = !isNaN(a.number) && !isNaN(b.number);
      const order = numbers ? a.number - b.number : a.text.localeCompare(b.text, undefined, { numeric: true });
      return up ? order : -order;
    });
    table.tBodies[0].append(...rows.map(item => item.row));
  }));
}
