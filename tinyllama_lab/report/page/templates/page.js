"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const read = (id) => JSON.parse(byId(id).textContent);
  const make = (name, text, className) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };

  // ---- colours -------------------------------------------------------------------------
  const root = document.documentElement;
  const prefers = matchMedia("(prefers-color-scheme: dark)");
  const remembered = () => {
    try { return localStorage.getItem("theme"); } catch { return null; }
  };
  const remember = (theme) => {
    try { localStorage.setItem("theme", theme); } catch { /* browsers may block storage for a page from disk */ }
  };
  const asked = /theme=(dark|light)/.exec(location.hash);
  const chosen = asked ? asked[1] : remembered();
  if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  const isDark = () => (root.dataset.theme ?? (prefers.matches ? "dark" : "light")) === "dark";
  const showTheme = () => {
    byId("theme").textContent = isDark() ? "Light colours" : "Dark colours";
  };

  // ---- charts --------------------------------------------------------------------------
  const charts = read("chart-data");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const painted = (layout) => {
    const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), color: colour("--soft") };
    const font = { color: colour("--ink"), size: 13, family: getComputedStyle(document.body).fontFamily };
    return {
      ...layout,
      font,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      dragmode: coarse ? false : "zoom", // a finger on a chart scrolls the page
      xaxis: { ...layout.xaxis, ...axis },
      yaxis: { ...layout.yaxis, ...axis },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font },
    };
  };
  const draw = (node) => {
    const chart = charts[node.dataset.chart];
    node.setAttribute("aria-label", chart.finding);
    const options = { responsive: true, displaylogo: false, displayModeBar: false };
    return Promise.resolve()
      .then(() => Plotly.react(node, structuredClone(chart.data), painted(chart.layout), options))
      .then(() => { node.dataset.drawn = isDark() ? "dark" : "light"; })
      .catch((error) => { node.textContent = `This chart cannot be drawn here (${error}).`; });
  };
  const drawAll = () => document.querySelectorAll("[data-chart]").forEach(draw);
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember(root.dataset.theme);
    showTheme();
    drawAll();
  });
  prefers.addEventListener("change", () => { showTheme(); drawAll(); });
  byId("cost")?.addEventListener("change", (event) => {
    const node = document.querySelector("[data-chart^='cost-']");
    node.dataset.chart = `cost-${event.target.value}`;
    node.closest("figure").querySelector(".finding").textContent = charts[node.dataset.chart].finding;
    draw(node);
  });

  // ---- the table of trials -------------------------------------------------------------
  const table = byId("trial-table");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  const words = rows.map((row) => row.textContent.toLowerCase());
  const isNumber = heads.map((head) => head.classList.contains("number"));
  rows.forEach((row) => isNumber.forEach((is, at) => is && row.cells[at].classList.add("n")));
  const sort = (at) => {
    const down = heads[at].getAttribute("aria-sort") === "ascending";
    const value = (row) => {
      const text = row.cells[at].textContent;
      return isNumber[at] ? parseFloat(text) : text;
    };
    const keyed = rows.map((row, number) => [value(row), number, row]);
    const order = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    keyed.sort(([a, i], [b, j]) => {
      const lost = Number(Number.isNaN(a)) - Number(Number.isNaN(b)); // what has no number is last
      if (lost || Number.isNaN(a)) return lost || i - j;
      return (down ? -order(a, b) : order(a, b)) || i - j;
    });
    heads.forEach((head) => head.setAttribute("aria-sort", "none"));
    heads[at].setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...keyed.map(([, , row]) => row));
  };
  heads.forEach((head, at) => head.firstElementChild.addEventListener("click", () => sort(at)));
  const filter = () => {
    const wanted = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, number) => {
      row.hidden = !wanted.every((word) => words[number].includes(word));
      shown += !row.hidden;
    });
    byId("filtered").textContent = wanted.length ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
  };
  byId("filter").addEventListener("input", filter);

  // ---- completions side by side --------------------------------------------------------
  const written = read("written-data");
  const show = () => {
    const at = Number(byId("prompt").value);
    byId("asked").textContent = written.prompts[at].prompt;
    const { intent, reference } = written.prompts[at];
    byId("expected").textContent = reference + (intent ? `\n(intent: ${intent})` : "");
    document.querySelectorAll(".completion").forEach((card) => {
      const trial = written.trials[card.querySelector("select").value];
      const completion = trial && trial.outputs[at];
      const [greedy, sampled] = card.querySelectorAll("p");
      greedy.textContent = !trial ? "" : completion ? completion.output || "(nothing)" : "(not asked)";
      sampled.hidden = !completion || completion.sampled === undefined;
      sampled.textContent = sampled.hidden ? "" : `Sampled: ${completion.sampled}`;
    });
  };
  const card = (number) => {
    const element = make("article", undefined, "completion");
    const select = make("select");
    select.setAttribute("aria-label", `Trial ${number + 1} of the comparison`);
    select.append(new Option("– no trial –", ""));
    written.trials.forEach((trial, at) => select.append(new Option(trial.label, String(at))));
    select.value = String(written.first[number] ?? "");
    select.addEventListener("change", show);
    element.append(select, make("p"), make("p", "", "sampled"));
    element.querySelectorAll("p").forEach((text) => { text.tabIndex = 0; }); // long ones scroll
    return element;
  };
  if (byId("prompt")) {
    written.prompts.forEach(({ prompt }, at) => {
      const line = prompt.replace(/\s+/g, " ");
      const text = `${at + 1}. ${line.length > 110 ? `${line.slice(0, 110)}…` : line}`;
      byId("prompt").append(new Option(text, String(at)));
    });
    byId("written").append(...[0, 1, 2, 3].map(card));
    byId("prompt").addEventListener("change", show);
    show();
  }

  showTheme();
  drawAll();
})();
