"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const ids = new BigInt64Array(bytes(data.rows.index).buffer);
  const given = new Int32Array(bytes(data.rows.label).buffer);
  const suggested = new Int32Array(bytes(data.rows.suggested).buffer);
  const score = new Float32Array(bytes(data.rows.score).buffer);
  const total = ids.length, suspects = data.suspects, names = data.classes;
  const key = "noise-report:" + data.id;
  const state = { rows: false, page: 0, view: [], focus: 0 };
  let marks = {};

  function warn(text) { $("warning").textContent = text; $("warning").hidden = false; }
  try { marks = JSON.parse(localStorage.getItem(key) || "{}"); }
  catch (error) { warn("This browser does not keep marks (" + error.message + "). Download them before you close the page."); }
  function keep() {
    try { localStorage.setItem(key, JSON.stringify(marks)); }
    catch (error) { warn("The mark could not be kept (" + error.message + "). Download your marks now."); }
  }

  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  // -- which rows, in which order
  function select() {
    const limit = state.rows ? total : suspects.length;
    const g = $("given").value, s = $("suggested").value, least = Number($("least").value), m = $("marked").value;
    const found = [];
    for (let row = 0; row < limit; row++) {
      if (score[row] < least) break; // rows come in the order of the score
      if ((g !== "" && given[row] !== Number(g)) || (s !== "" && suggested[row] !== Number(s))) continue;
      if (m !== "") {
        const mark = marks[ids[row]] && marks[ids[row]].mark;
        if (m === "none" ? mark : mark !== m) continue;
      }
      found.push(row);
    }
    const by = $("sort").value;
    if (by === "index") {
      const order = BigInt64Array.from(found, (row) => ids[row]).sort();
      const at = new Map(found.map((row) => [ids[row], row]));
      state.view = Array.from(order, (id) => at.get(id));
    } else if (by !== "score") {
      const value = by === "given" ? given : suggested;
      state.view = Array.from(Float64Array.from(found, (row) => value[row] * 2 ** 32 + row).sort(), (v) => v % 2 ** 32);
    } else state.view = found;
    state.page = 0;
    state.focus = 0;
    draw();
  }

  // -- one card
  function heat(map) {
    const [h, w] = map.shape, values = bytes(map.values);
    const canvas = make("canvas", { width: w, height: h, "aria-hidden": "true" });
    const context = canvas.getContext("2d"), pixels = context.createImageData(w, h);
    values.forEach((v, at) => {
      const t = v / 255; // transparent, red, orange, yellow
      pixels.data.set([255, Math.round(235 * Math.max(0, (t - 0.35) / 0.65)), Math.round(60 * (1 - t)), Math.round(225 * Math.min(1, t * 1.25))], 4 * at);
    });
    context.putImageData(pixels, 0, 0);
    return canvas;
  }
  function shot(source, tiny, text, map) {
    const image = make("img", { src: source, alt: "", class: tiny ? "tiny" : null, decoding: "async" });
    const frame = make("div", { class: "frame" }, image, ...(map ? [heat(map)] : []));
    return make("div", { class: map ? "shot veil" : "shot" }, frame, make("span", { title: text }, text));
  }
  const percent = (p) => (100 * p).toFixed(p > 0.995 || p < 0.005 ? 1 : 0) + " %";

  function card(row, place) {
    const item = suspects[row], id = String(ids[row]), g = names[given[row]], s = names[suggested[row]];
    const node = make("li", { class: "card", tabindex: place === state.focus ? "0" : "-1", "data-row": row, "data-id": id });
    node.setAttribute("aria-label", `Sample ${id}. Given ${g}, suggested ${s}. Score ${score[row].toFixed(2)}.`);
    const shots = make("div", { class: "shots" });
    if (item.image) {
      shots.append(shot(item.image, item.tiny, "image", null));
      if (item.given_map) shots.append(shot(item.image, item.tiny, g, item.given_map), shot(item.image, item.tiny, s, item.suggested_map));
      else shots.append(make("div", { class: "soft small none", style: "grid-column:span 2" }, "This model gives no activation maps."));
    } else shots.append(make("div", { class: "none" }, "No picture: " + item.reason));
    const facts = make("div", { class: "facts num" }, make("span", {}, make("b", {}, score[row].toFixed(3)), " probably wrong"));
    for (const [text, value] of item.facts) facts.append(make("span", {}, text + " ", make("b", {}, value)));
    const verdict = make("div", { class: "verdict", role: "group", "aria-label": "The given label is" });
    for (const mark of ["wrong", "right", "unsure"]) verdict.append(make("button", { type: "button", tabindex: "-1", "data-set": mark, "aria-pressed": "false" }, mark[0].toUpperCase() + mark.slice(1)));
    const fix = make("input", { list: "classes", value: s, "aria-label": "True class of sample " + id, tabindex: "-1" });
    node.append(shots, make("div", { class: "body" },
      make("dl", { class: "says" }, make("dt", {}, "given"), make("dd", { class: "g" }, g), make("dt", {}, "suggested"), make("dd", { class: "s" }, s)),
      facts, make("div", { class: "path" }, item.path ? "#" + id + " · " + item.path : "#" + id), verdict,
      make("label", { class: "fix", hidden: "" }, "True class", fix)));
    show(node);
    return node;
  }
  function show(node) {
    const entry = marks[node.dataset.id];
    node.dataset.mark = entry ? entry.mark : "";
    for (const button of node.querySelectorAll("[data-set]")) button.setAttribute("aria-pressed", String(Boolean(entry) && button.dataset.set === entry.mark));
    const fix = node.querySelector(".fix");
    fix.hidden = !entry || entry.mark !== "wrong";
    if (entry && entry.mark === "wrong") fix.querySelector("input").value = names[entry.label];
  }

  // -- the page
  const size = () => (state.rows ? 100 : 24);
  const pages = () => Math.max(1, Math.ceil(state.view.length / size()));
  function draw() {
    const part = state.view.slice(state.page * size(), (state.page + 1) * size());
    $("gallery").hidden = state.rows;
    $("rows").hidden = !state.rows;
    if (state.rows) {
      $("gallery").replaceChildren();
      $("rows").tBodies[0].replaceChildren(...part.map((row) => {
        const entry = marks[ids[row]];
        const cells = [row + 1, ids[row], names[given[row]], names[suggested[row]], score[row].toFixed(4), entry ? entry.mark : ""];
        return make("tr", {}, ...cells.map((value) => make("td", { class: "num" }, String(value))));
      }));
    } else $("gallery").replaceChildren(...part.map(card));
    $("empty").hidden = part.length > 0;
    $("page").textContent = state.page + 1;
    $("pages").textContent = pages().toLocaleString("en");
    $("previous").disabled = state.page === 0;
    $("next").disabled = state.page >= pages() - 1;
    count();
  }
  function count() {
    const tally = { wrong: 0, right: 0, unsure: 0 };
    for (const entry of Object.values(marks)) tally[entry.mark]++;
    const what = state.rows ? "rows" : "suspects";
    $("count").textContent = `${state.view.length.toLocaleString("en")} of ${(state.rows ? total : suspects.length).toLocaleString("en")} ${what} · marked: ${tally.wrong} wrong, ${tally.right} right, ${tally.unsure} unsure`;
  }
  function turn(by) {
    const page = Math.min(pages() - 1, Math.max(0, state.page + by));
    if (page === state.page) return false;
    state.page = page;
    state.focus = 0;
    draw();
    $("suspects").scrollIntoView({ block: "start" });
    return true;
  }

  // -- marks
  function mark(node, value) {
    const id = node.dataset.id, row = Number(node.dataset.row);
    if (value === null) delete marks[id];
    else marks[id] = { mark: value, label: value === "wrong" ? suggested[row] : given[row] };
    keep();
    show(node);
    count();
    $("live").textContent = value === null ? `Sample ${id}: mark cleared` : `Sample ${id} marked ${value}`;
  }
  function focus(place) {
    const cards = $("gallery").children;
    if (!cards.length) return;
    if (cards[state.focus]) cards[state.focus].tabIndex = -1;
    state.focus = Math.min(cards.length - 1, Math.max(0, place));
    cards[state.focus].tabIndex = 0;
    cards[state.focus].focus();
    cards[state.focus].scrollIntoView({ block: "nearest" });
  }
  const columns = () => getComputedStyle($("gallery")).gridTemplateColumns.split(" ").length;

  $("gallery").addEventListener("click", (event) => {
    const node = event.target.closest(".card"), button = event.target.closest("[data-set]");
    if (!node) return;
    state.focus = Array.prototype.indexOf.call($("gallery").children, node);
    for (const other of $("gallery").children) other.tabIndex = other === node ? 0 : -1;
    if (button) mark(node, button.getAttribute("aria-pressed") === "true" ? null : button.dataset.set);
  });
  $("gallery").addEventListener("change", (event) => {
    const node = event.target.closest(".card"), label = names.indexOf(event.target.value);
    const entry = marks[node.dataset.id];
    if (label < 0) { event.target.setCustomValidity("This is none of the classes."); event.target.reportValidity(); return; }
    event.target.setCustomValidity("");
    if (entry) { entry.label = label; keep(); }
  });
  $("gallery").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "INPUT") return;
    const node = event.target.closest(".card");
    if (!node) return;
    const pressed = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const marksOf = { w: "wrong", r: "right", u: "unsure", x: null };
    const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns() };
    if (pressed in marksOf) {
      mark(node, marksOf[pressed]);
      if (marksOf[pressed]) {
        if (state.focus + 1 < $("gallery").children.length) focus(state.focus + 1);
        else if (turn(1)) focus(0);
      }
    } else if (pressed in moves) focus(state.focus + moves[pressed]);
    else if (pressed === "Home") focus(0);
    else if (pressed === "End") focus($("gallery").children.length - 1);
    else if (pressed === "n" || pressed === "PageDown") { if (turn(1)) focus(0); }
    else if (pressed === "p" || pressed === "PageUp") { if (turn(-1)) focus(0); }
    else if (pressed === "c") { const fix = node.querySelector(".fix"); if (!fix.hidden) fix.querySelector("input").focus(); }
    else if (pressed === "Enter" && event.target === node) node.querySelector("[data-set]").focus();
    else return;
    event.preventDefault();
  });

  // -- marks as a CSV; a leading = + - @ would be a formula to a spreadsheet
  function cell(value) {
    let text = String(value);
    if (/^[=+\-@\t\r]/.test(text) && !/^-?\d+(\.\d+)?$/.test(text)) text = "'" + text;
    return /[",\n\r]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  }
  $("download").addEventListener("click", () => {
    const lines = ["index,mark,new_label,new_label_name"];
    for (const [id, entry] of Object.entries(marks)) lines.push([id, entry.mark, entry.label, names[entry.label]].map(cell).join(","));
    const link = make("a", { download: "marks.csv", href: URL.createObjectURL(new Blob([lines.join("\r\n") + "\r\n"], { type: "text/csv" })) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });

  // -- controls
  for (const [id, labels] of [["given", given], ["suggested", suggested]]) {
    const used = new Set(labels);
    names.forEach((name, label) => { if (used.has(label)) $(id).append(make("option", { value: label }, name)); });
  }
  $("classes").append(...names.map((name) => make("option", { value: name })));
  for (const id of ["given", "suggested", "marked", "sort"]) $(id).addEventListener("change", select);
  $("least").addEventListener("input", () => { $("least-text").textContent = Number($("least").value).toFixed(2); select(); });
  for (const [id, rows] of [["as-gallery", false], ["as-rows", true]]) $(id).addEventListener("click", () => {
    state.rows = rows;
    $("as-gallery").setAttribute("aria-pressed", String(!rows));
    $("as-rows").setAttribute("aria-pressed", String(rows));
    select();
  });
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  addEventListener("storage", (event) => { if (event.key === key) { marks = JSON.parse(event.newValue || "{}"); draw(); } });
  select();
})();
