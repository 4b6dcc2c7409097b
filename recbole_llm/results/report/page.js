"use strict";
(() => {
  const root = document.documentElement;
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (prefersDark.matches ? "dark" : "light")) === "dark";

  // --- tables: a click on a column's head sorts by it, a second one the other way; empty cells stay last
  function compare(a, b, sign) {
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    const x = Number(a), y = Number(b);
    const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
    return sign * order;
  }
  for (const table of document.querySelectorAll("table")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const isNumber = column >= Number(table.dataset.left);
      const before = head.getAttribute("aria-sort");
      const down = before ? before === "ascending" : isNumber;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const rows = [...body.rows];
      rows.sort((a, b) => compare(a.cells[column].dataset.value, b.cells[column].dataset.value, down ? -1 : 1));
      body.append(...rows);
    }));
  }

  // --- plots
  const places = [...document.querySelectorAll("[data-figure]")];
  const figures = places.length ? JSON.parse(document.getElementById("figures").textContent) : [];

  function colors() {
    const style = getComputedStyle(root);
    const value = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: value("--line"), linecolor: value("--line"), zerolinecolor: value("--quiet") };
    return { text: value("--text"), page: value("--page"), axis };
  }
  function layoutOf(figure, width) {
    const { text, page, axis } = colors();
    const layout = structuredClone(figure.layout);
    for (const name of ["xaxis", "yaxis"]) Object.assign(layout[name], axis);
    return Object.assign(layout, {
      paper_bgcolor: page, plot_bgcolor: page, ...(width ? { autosize: false, width } : { autosize: true }),
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: text },
      hoverlabel: { bgcolor: page, bordercolor: axis.gridcolor, font: { color: text } },
    });
  }
  const PAPER = { row: 335, whole: 690 };  // pixels of a plot on A4 or letter; two stand side by side in a row
  const draw = (some = places, onPaper = false) => Promise.all(some.map((place) => {
    const figure = figures[Number(place.dataset.figure)];
    const width = onPaper ? (place.closest(".row") ? PAPER.row : PAPER.whole) : 0;
    return Plotly.react(place, figure.data, layoutOf(figure, width), { responsive: true, displayModeBar: false });
  }));

  // --- legends: below the plot, a click hides or shows what is named
  const SVG = "http://www.w3.org/2000/svg";
  const DASHES = { dash: "5 3", dot: "2 2", dashdot: "5 2 1 2" };
  function swatch(trace) {
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("width", "22"); svg.setAttribute("height", "10"); svg.setAttribute("aria-hidden", "true");
    const isLine = (trace.mode || "").includes("lines");
    const shape = document.createElementNS(SVG, isLine ? "path" : "rect");
    const color = (isLine && trace.line.color) || trace.marker.color;
    if (isLine) {
      shape.setAttribute("d", "M0,5 H22"); shape.setAttribute("stroke", color); shape.setAttribute("stroke-width", "2.5");
      shape.setAttribute("stroke-dasharray", DASHES[trace.line.dash] || "none");
    } else {
      shape.setAttribute("x", "6"); shape.setAttribute("width", "10"); shape.setAttribute("height", "10");
      shape.setAttribute("fill", color);
    }
    svg.append(shape);
    return svg;
  }
  function plain(text) {  // names are escaped for plotly; here they become text
    return text.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
  }
  function addLegend(place) {
    const figure = figures[Number(place.dataset.figure)];
    if (!figure.layout.meta || !figure.layout.meta.legend) return;
    const list = document.createElement("ul");
    list.className = "legend";
    figure.data.forEach((trace, number) => {
      const item = document.createElement("li"), button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      button.append(swatch(trace), document.createTextNode(plain(trace.name || "")));
      button.addEventListener("click", () => {
        trace.visible = trace.visible === false;
        button.setAttribute("aria-pressed", String(trace.visible));
        redraw([place]);
      });
      item.append(button);
      list.append(item);
    });
    place.after(list);
  }

  async function load() {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.nonce = nonce;
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    places.forEach(addLegend);
    await draw();
    root.dataset.drawn = String(places.length);
  }
  let restore = null;  // what undoes the changes for print
  const nonce = document.currentScript.nonce;
  let redraw = () => {};
  if (places.length) {
    load().then(() => { redraw = draw; }).catch((error) => {
      document.getElementById("failed").hidden = false;
      console.error(error);
    });
  }
  // A plot in a closed <details> has no width yet.
  for (const details of document.querySelectorAll("details")) {
    details.addEventListener("toggle", () => { if (!restore) redraw(places.filter((place) => details.contains(place))); });
  }

  // --- light and dark
  const button = document.getElementById("theme");
  const show = () => { button.textContent = isDark() ? "Light" : "Dark"; button.hidden = false; redraw(); };
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; show(); });
  prefersDark.addEventListener("change", show);
  show();

  // --- print: light, all details open, plots as wide as the paper
  window.addEventListener("beforeprint", () => {
    const closed = [...document.querySelectorAll("details:not([open]):not(.long)")];
    const theme = root.dataset.theme;
    restore = () => {
      closed.forEach((details) => { details.open = false; });
      if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
    };
    closed.forEach((details) => { details.open = true; });
    root.dataset.theme = "light";
    redraw(places, true);
  });
  window.addEventListener("afterprint", () => { if (restore) restore(); restore = null; redraw(); });
})();
