"use strict";
(async () => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");

  async function unpacked(id) {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  // What depends on the page's colours.
  function colours() {
    const style = getComputedStyle(root);
    const of = (name) => style.getPropertyValue(name).trim();
    const found = {
      "modebar.bgcolor": "rgba(0,0,0,0)", "modebar.color": of("--quiet"), "modebar.activecolor": of("--accent"),
      "paper_bgcolor": of("--raised"), "plot_bgcolor": of("--raised"), "font.color": of("--ink"), "font.size": 12,
      "hoverlabel.bgcolor": of("--paper"), "hoverlabel.font.color": of("--ink"), "hoverlabel.bordercolor": of("--rule"),
    };
    for (const axis of ["xaxis", "yaxis"]) {
      found[axis + ".gridcolor"] = of("--grid");
      found[axis + ".linecolor"] = of("--rule");
      found[axis + ".zerolinecolor"] = of("--rule");
    }
    return found;
  }

  // Text in lines of at most so many letters.
  function wrapped(text, letters) {
    const lines = [""];
    for (const word of text.split(" ")) {
      const longer = (lines.at(-1) + " " + word).trim();
      if (longer.length <= letters) lines[lines.length - 1] = longer;
      else lines.push(word);
    }
    return lines.filter(Boolean).join("<br>");
  }

  // Titles in lines that fit, and as many names of rows and columns as there is room for.
  function fitted(div) {
    const {xaxis, yaxis, height} = div.figure.layout;
    const found = {
      "xaxis.title.text": wrapped(xaxis.title.text, (div.clientWidth - 90) / 7),
      "yaxis.title.text": wrapped(yaxis.title.text, (height - 90) / 7),
    };
    for (const [axis, {names, texts}] of Object.entries(div.figure.labels)) {
      const room = axis === "xaxis" ? (div.clientWidth - 150) / 15 : (height - 120) / 15;
      const every = Math.max(1, Math.ceil(names.length / Math.max(1, room)));
      if (axis === "xaxis") {
        const longest = Math.max(...texts.map((text) => text.length));
        const turned = longest * 7 * names.length > every * (div.clientWidth - 150);
        const below = turned ? 7 * longest + 48 : 60;
        // The library places a title beside names where it fits between two of them, so it is placed here.
        const title = {text: found["xaxis.title.text"], showarrow: false, font: {size: 14}, xref: "paper", yref: "paper"};
        Object.assign(found, {
          "annotations": [{...title, x: 0.5, y: 0, yanchor: "top", yshift: 28 - below}], "xaxis.title.text": "",
          "xaxis.tickangle": turned ? -90 : 0, "xaxis.automargin": false, "margin.b": below, "height": height + below - 60,
        });
      }
      found[axis + ".tickvals"] = names.filter((_, index) => index % every === 0);
      found[axis + ".ticktext"] = texts.filter((_, index) => index % every === 0);
    }
    return found;
  }

  async function draw(div) {
    if (div.drawn || !div.clientWidth) return;
    div.drawn = true;
    const layout = structuredClone(div.figure.layout);
    for (const [path, value] of Object.entries({...colours(), ...fitted(div)})) {
      const parts = path.split(".");
      const last = parts.pop();
      parts.reduce((at, part) => (at[part] ??= {}), layout)[last] = value;
    }
    const config = {
      responsive: true, displaylogo: false, displayModeBar: div.clientWidth > 600 && "hover",
      modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
      toImageButtonOptions: {filename: div.dataset.figure},
    };
    await Plotly.newPlot(div, div.figure.data, layout, config);
  }

  function eachDrawn(change) {
    for (const div of document.querySelectorAll(".drawing")) {
      if (div.drawn && div.clientWidth) Plotly.relayout(div, change(div));
    }
  }

  for (const button of document.querySelectorAll(".views button")) {
    button.addEventListener("click", () => {
      const card = button.closest(".card");
      for (const other of card.querySelectorAll(".views button")) other.ariaPressed = String(other === button);
      for (const figure of card.querySelectorAll("figure")) figure.hidden = figure.id !== button.dataset.shows;
      const div = card.querySelector("figure:not([hidden]) .drawing");
      if (div.drawn) Plotly.Plots.resize(div);
      else if (div.figure) draw(div);
    });
  }

  for (const head of document.querySelectorAll("th[data-sort]")) {
    head.addEventListener("click", () => {
      const column = [...head.parentNode.children].indexOf(head);
      const body = head.closest("table").tBodies[0];
      const key = (row) => row.children[column].dataset.value ?? row.children[column].textContent;
      const down = head.dataset.sort !== "down";
      for (const other of head.parentNode.children) other.dataset.sort = "";
      head.dataset.sort = down ? "down" : "up";
      const rows = [...body.rows].sort((a, b) => {
        const [left, right] = [parseFloat(key(a)), parseFloat(key(b))];
        if (isNaN(left) && isNaN(right)) return key(a).localeCompare(key(b)) * (down ? 1 : -1);
        if (isNaN(left) || isNaN(right)) return isNaN(left) - isNaN(right);
        return down ? right - left : left - right;
      });
      body.append(...rows);
    });
  }

  try {
    if (typeof DecompressionStream === "undefined") {
      throw new Error("this browser cannot unpack the figures (DecompressionStream); a current one can");
    }
    const [library, figures] = await Promise.all([unpacked("library"), unpacked("figures")]);
    const script = document.createElement("script");
    script.textContent = library;
    document.head.append(script);
    const found = JSON.parse(figures);
    const drawings = [...document.querySelectorAll(".drawing")];
    for (const div of drawings) div.figure = found[div.dataset.figure];
    for (const div of drawings) {
      await draw(div);
      await new Promise((next) => setTimeout(next, 0));
    }
    dark.addEventListener("change", () => eachDrawn(colours));
    addEventListener("resize", () => eachDrawn(fitted));
    root.dataset.state = "ready";
  } catch (error) {
    document.getElementById("problem").textContent = "The figures cannot be drawn: " + error.message;
    root.dataset.state = "failed";
    console.error(error);
  }
})();
