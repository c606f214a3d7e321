"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const names = data.classes, SIZE = 24, BULK = 0.9, UNDO = 100; // changes that a reload can undo
  const PIECE = 5000; // annotations in one request: a server takes some megabytes at once
  const asName = (text) => text.trim().normalize("NFC"); // accents composed, as the loaders of data have them
  const labels = new Map(names.map((name, label) => [asName(name), label]));
  const number = (n) => n.toLocaleString("en");
  const counted = (n, noun) => `${number(n)} ${noun}${n === 1 ? "" : "s"}`;
  const state = { items: [], total: 0, start: 0, focus: 0, anchor: null, map: 0, groups: {}, progress: {}, undo: [] };
  const storage = {
    key: "hnml-review:" + data.id,
    get(name, otherwise) {
      try { return JSON.parse(localStorage.getItem(this.key + name)) ?? otherwise; } catch { return otherwise; }
    },
    set(name, value) {
      try { localStorage.setItem(this.key + name, JSON.stringify(value)); }
      catch (error) { warn("This browser keeps nothing (" + error.message + "). Download the annotations before you close the page."); }
    },
  };
  const session = { // of this tab alone: no other one undoes what was decided here
    get(name) { try { return JSON.parse(sessionStorage.getItem(storage.key + name)) ?? []; } catch { return []; } },
    set(name, list) {
      try {
        sessionStorage.removeItem(storage.key + name); // none rather than an old one, where it has no room
        sessionStorage.setItem(storage.key + name, JSON.stringify(list.slice(-UNDO)));
      } catch { /* a reload forgets */ }
    },
  };
  const annotator = () => (data.served ? $("annotator").value.trim() || data.annotator : "report");

  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }
  function warn(text) { $("warning").textContent = text; $("warning").hidden = !text; }
  let toasting;
  function toast(text) {
    $("toast").textContent = $("live").textContent = text;
    $("toast").hidden = false;
    clearTimeout(toasting);
    toasting = setTimeout(() => ($("toast").hidden = true), 2500);
  }

  // -- where rows come from and annotations go: this file ...
  function fileSource() {
    const items = data.items, at = new Map(items.map((item) => [item.id, item]));
    const fileOf = (path) => path.slice(path.lastIndexOf("/") + 1), called = new Map();
    for (const item of items) called.set(fileOf(item.path), [...(called.get(fileOf(item.path)) || []), item]);
    let entries = storage.get("", {}); // sample id -> {annotation, label, name}
    items.forEach((item, row) => (item.row = row));
    const keep = () => storage.set("", entries);
    const annotationsOf = (item) => (entries[item.id] ? [{ ...entries[item.id], by: "" }] : []);
    function orderOf(name, rows) {
      if (name === "index") return rows.sort((a, b) => a.id - b.id);
      if (name !== "informative") return rows;
      const doubtful = [...items].sort((a, b) => Math.abs(a.score - 0.5) - Math.abs(b.score - 0.5) || a.row - b.row);
      const place = new Map(doubtful.map((item, n) => [item.id, Math.min(2 * item.row, 2 * n + 1)]));
      return rows.sort((a, b) => place.get(a.id) - place.get(b.id));
    }
    const groupOf = { pair: (i) => i.given + ">" + i.suggested, given: (i) => String(i.given), folder: (i) => i.folder };
    function view(q) {
      const text = q.text.normalize("NFC").toLowerCase();
      let rows = items.filter((item) => {
        const entry = entries[item.id];
        return (q.scope === "all" || q.status === "before" || item.issue)
          && (q.status === "before" ? item.before : q.status === "any" || !item.before)
          && (["any", "before"].includes(q.status) || (q.status === "open" ? !entry : entry && entry.annotation === q.status))
          && item.score >= q.least && (q.given === null || item.given === q.given)
          && (q.suggested === null || item.suggested === q.suggested)
          && (!q.folder || item.folder === q.folder) && (!text || item.path.normalize("NFC").toLowerCase().includes(text));
      });
      rows = orderOf(q.order, rows);
      if (q.group) {
        const key = groupOf[q.group], weight = new Map();
        for (const item of items) if (item.issue) weight.set(key(item), (weight.get(key(item)) || 0) + item.score);
        const ranks = new Map([...weight].sort((a, b) => b[1] - a[1]).map(([k], n) => [k, n]));
        const rank = (item) => ranks.get(key(item)) ?? ranks.size;
        rows = rows.map((item, n) => [rank(item), key(item), n, item])
          .sort((a, b) => a[0] - b[0] || (a[1] < b[1] ? -1 : a[1] > b[1] ? 1 : a[2] - b[2])).map((r) => r[3]);
      }
      return rows;
    }
    function progress() {
      const issues = items.filter((item) => item.issue), left = issues.filter((item) => !entries[item.id]);
      const tally = { wrong: 0, right: 0, unsure: 0 };
      for (const entry of Object.values(entries)) tally[entry.annotation]++;
      const others = data.elsewhere, undecided = left.length + others.issues;
      return { issues: issues.length + others.issues, decided: issues.length - left.length, split: 0, ...tally,
        elsewhere: others.issues,
        expected: (left.reduce((sum, item) => sum + item.score, 0) + others.expected) / Math.max(undecided, 1) };
    }
    const batches = new Map(session.get(":before")); // batch -> what its samples were said to be before
    return {
      query(q, start) {
        const rows = view(q), groups = {};
        start = Math.max(0, Math.min(start, Math.floor((rows.length - 1) / SIZE) * SIZE));
        const page = rows.slice(start, start + SIZE).map((item) => ({ ...item, annotations: annotationsOf(item) }));
        if (q.group) {
          for (const item of page) groups[(item.group = groupOf[q.group](item))] = { count: 0, wrong: 0 };
          for (const item of rows) {
            const group = groups[groupOf[q.group](item)];
            if (group) { group.count++; group.wrong += item.score; }
          }
        }
        return { items: page, start, total: rows.length, groups, progress: progress(), rate: null };
      },
      annotate(list, batch) {
        const before = [];
        for (const { index, annotation, new_label, new_label_name } of list) {
          if (!at.has(index)) continue;
          before.push([index, entries[index]]);
          if (annotation === null) delete entries[index];
          else entries[index] = { annotation, label: new_label, name: new_label_name };
        }
        batches.set(batch, before);
        session.set(":before", [...batches]);
        keep();
        return before.length;
      },
      bulk(q, annotation, batch) { return this.annotate(view(q).map((item) => entryFor(item, annotation)), batch); },
      undo(batch) {
        for (const [index, entry] of batches.get(batch).reverse()) if (entry) entries[index] = entry; else delete entries[index];
        batches.delete(batch);
        session.set(":before", [...batches]);
        keep();
      },
      undoes: (batch) => batches.has(batch),
      image: (item) => item.image,
      maps: (item) => (item.maps ? { maps: item.maps } : null),
      known(id, path) { // ids change where images came or went since: then the path tells
        const item = at.get(id), same = (one) => ("/" + one.path).endsWith("/" + path) || ("/" + path).endsWith("/" + one.path);
        if (!path || (item && (!item.path || same(item)))) return item;
        const found = (called.get(fileOf(path)) || []).filter(same);
        return found.length === 1 ? found[0] : undefined;
      },
      csv: () => toCsv(Object.entries(entries).map(([id, entry]) => ({ ...entry, item: at.get(Number(id)) })).filter((e) => e.item)),
      listen(changed) { addEventListener("storage", (event) => { if (event.key === storage.key) { entries = storage.get("", {}); changed(); } }); },
    };
  }

  // ... or `hnml review`
  function serverSource() {
    const maps = new Map();
    async function ask(path, body) {
      const options = body ? { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) } : {};
      const answer = await fetch(path, options);
      const found = await answer.json();
      const moved = answer.status === 403 || answer.status === 421; // a server with another address: it judges no request of this one
      if (!answer.ok) throw Object.assign(new Error(found.error), { moved, refused: !moved && answer.status < 500, failed: answer.status >= 500 });
      if (found.version !== undefined) version = found.version;
      if (found.gone) warn(`The folder of this audit was moved or deleted. Annotations are written to ${found.gone}, where it was.`);
      else if (found.stale) warn("The audit was written anew since this server was started: start it again to see the new scores. Annotations are kept.");
      return found;
    }
    let version = 0;
    const words = (q) => new URLSearchParams(Object.entries(q).filter(([, value]) => value !== null && value !== ""));
    return {
      query: (q, start) => ask("rows?" + words({ ...q, start, size: SIZE, annotator: annotator() })),
      async annotate(entries, batch) { return (await ask("annotate", { entries, batch, annotator: annotator() })).count; },
      async bulk(q, annotation, batch) { return (await ask("bulk", { query: q, annotation, batch, annotator: annotator() })).count; },
      undo: (batch) => ask("undo", { batch }),
      undoes: () => true,
      image: (item, side) => `image/${item.id}?side=${side}`,
      async maps(item) {
        if (!data.maps) return null;
        if (!maps.has(item.id)) maps.set(item.id, await ask(`maps/${item.id}`));
        return maps.get(item.id);
      },
      known: () => undefined,
      csv: null,
      listen(changed) {
        setInterval(async () => {
          const before = version;
          try { const now = (await ask("state")).version; if (now !== before) changed(); } catch { /* the next key says so */ }
        }, 3000);
      },
    };
  }
  const source = data.served ? serverSource() : fileSource();

  // -- the page
  const selected = (id) => ($(id).value === "" ? null : Number($(id).value));
  const query = () => ({
    scope: $("scope").value, status: $("status").value, given: selected("given"), suggested: selected("suggested"),
    folder: state.folder || "", text: $("text").value.trim(), least: Number($("least").value), order: $("order").value, group: $("group").value,
  });
  let asked = 0, shown = 0;
  async function refresh(start = state.start) {
    const mine = ++asked;
    try {
      const found = await source.query(query(), start);
      if (mine < shown) return;
      shown = mine;
      found.items = found.items.filter((item) => !hides(pendingOf(item.id)));
      Object.assign(state, found);
      state.focus = Math.max(0, Math.min(state.focus, state.items.length - 1));
      draw();
      return true;
    } catch (error) {
      warn(error.refused || error.moved || error.failed ? error.message : "The server does not answer. Start `hnml review` again; what is marked below stays.");
    }
  }
  function restart() { state.focus = 0; state.anchor = null; return refresh(0); }

  function heat(map) {
    const [h, w] = map.shape, values = Uint8Array.from(atob(map.values), (c) => c.charCodeAt(0));
    const canvas = make("canvas", { width: w, height: h, "aria-hidden": "true" });
    const context = canvas.getContext("2d"), pixels = context.createImageData(w, h);
    values.forEach((v, at) => {
      const t = v / 255; // transparent, red, orange, yellow
      pixels.data.set([255, Math.round(235 * Math.max(0, (t - 0.35) / 0.65)), Math.round(60 * (1 - t)), Math.round(200 * Math.min(1, t * 1.25))], 4 * at);
    });
    context.putImageData(pixels, 0, 0);
    return canvas;
  }
  function picture(item, side) {
    const frame = make("div", { class: "frame" }), url = source.image(item, side);
    if (!url) {
      frame.append(make("div", { class: "none" }, "No picture: " + item.reason));
      return frame;
    }
    const image = make("img", { src: url, alt: "", class: item.tiny ? "tiny" : null, decoding: "async" });
    image.addEventListener("load", () => { if (image.naturalWidth < 64) image.classList.add("tiny"); });
    image.addEventListener("error", () => image.replaceWith(make("div", { class: "none" }, "No picture: the file cannot be read.")));
    frame.append(image);
    return frame;
  }
  function says(item) {
    const suggested = item.suggested === item.given ? "?" : names[item.suggested];
    return make("div", { class: "says" }, make("span", { class: "g" }, names[item.given]), make("i", {}, "→"), make("span", { class: "s" }, suggested));
  }
  const entryOf = (item) => pendingOf(item.id) || item.annotations.find((one) => !data.served || one.by === annotator());
  function card(item) {
    const node = make("li", { class: "card", tabindex: "-1", "data-id": item.id });
    const frame = picture(item, pixels());
    frame.append(make("span", { class: "badge num" }, item.certainty), make("span", { class: "badge num" }, "#" + item.id));
    frame.title = "Zoom (Space)";
    const verdict = make("div", { class: "verdict", role: "group", "aria-label": "The given label is" });
    for (const name of ["wrong", "right", "unsure"]) verdict.append(make("button", { type: "button", tabindex: "-1", "data-set": name, "aria-pressed": "false" }, name[0].toUpperCase() + name.slice(1)));
    const fix = make("input", { list: "classes", placeholder: "Enter: another class", "aria-label": "True class of sample " + item.id, tabindex: "-1", maxlength: "200" });
    const none = item.suggested === item.given; // of what no model saw
    const new_class = make("span", { class: "new", hidden: none ? null : "" }, none ? "No other class is suggested: name it, or W leaves it open." : "");
    const why = item.why.join("; ");
    node.setAttribute("aria-label", `Sample ${item.id}. Given ${names[item.given]}, suggested ${names[item.suggested]}. Probably wrong: ${item.certainty}. ${why}`);
    node.append(frame, make("div", { class: "body" },
      make("div", {}, says(item), make("div", { class: "why" }, why)),
      make("div", { class: "annotations", hidden: "" }),
      ...(item.path ? [make("div", { class: "path" }, item.path)] : []),
      verdict, make("label", { class: "fix" }, make("span", {}, "True class"), fix, new_class)));
    return node;
  }
  function dress(node, item, place) {
    const entry = entryOf(item);
    node.dataset.verdict = entry ? entry.annotation : "";
    node.classList.toggle("now", place === state.focus);
    node.classList.toggle("picked", picked().includes(item) && state.anchor !== null);
    node.tabIndex = place === state.focus ? 0 : -1;
    for (const button of node.querySelectorAll("[data-set]")) button.setAttribute("aria-pressed", String(Boolean(entry) && button.dataset.set === entry.annotation));
    const fix = node.querySelector(".fix input");
    if (fix && document.activeElement !== fix) fix.value = entry && entry.annotation === "wrong" ? entry.name : "";
    const others = node.querySelector(".annotations"), said = item.annotations.filter((one) => one.by && one.by !== annotator());
    if (others) {
      others.hidden = !said.length && !item.before;
      others.textContent = (item.before ? "Decided in an earlier round. " : "") + said.map((one) => `${one.by}: ${one.annotation}${one.annotation === "wrong" ? ", " + (one.name || "class unknown") : ""}`).join(" · ");
    }
  }
  const pixels = () => (devicePixelRatio > 1.2 ? 640 : 480);
  const nodes = new Map();
  function draw() {
    const used = new Set(), list = [];
    let group = null;
    for (const [place, item] of state.items.entries()) {
      if (item.group !== undefined && item.group !== group) list.push(heading(item, (group = item.group)));
      if (!nodes.has(item.id)) nodes.set(item.id, card(item));
      dress(nodes.get(item.id), item, place);
      used.add(item.id);
      list.push(nodes.get(item.id));
    }
    for (const id of [...nodes.keys()]) if (!used.has(id)) nodes.delete(id);
    const had = document.activeElement && document.activeElement.closest && document.activeElement.closest(".card");
    const gallery = $("gallery");
    list.forEach((node, at) => { if (gallery.children[at] !== node) gallery.insertBefore(node, gallery.children[at] || null); });
    while (gallery.children.length > list.length) gallery.lastChild.remove();
    if (had && !had.isConnected && state.items.length) nodes.get(state.items[state.focus].id).focus({ preventScroll: true });
    const p = state.progress, pages = Math.max(1, Math.ceil(state.total / SIZE));
    $("empty").hidden = state.items.length > 0;
    const done = p.issues && p.decided + (p.elsewhere || 0) === p.issues && $("status").value === "open";
    const none = !p.issues && $("scope").value === "issues" && $("status").value === "open";
    $("empty").textContent = none ? "No label is probably wrong. The filters have all rows."
      : !done ? "Nothing matches these filters."
      : p.elsewhere ? `All label issues of this file (${number(p.decided)}) are decided; \`hnml review\` shows the others.`
      : `All label issues (${number(p.issues)}) are decided.`;
    $("page").value = Math.floor(state.start / SIZE) + 1;
    $("pages").textContent = number(pages);
    $("previous").disabled = state.start === 0;
    $("next").disabled = state.start + SIZE >= state.total;
    const rest = p.issues - p.decided;
    const expected = rest ? `, about ${(100 * p.expected).toFixed(0)} % of the remaining are wrong` : "";
    $("count").textContent = `${number(p.decided)} of ${number(p.issues)} decided${expected} · ${number(p.wrong)} wrong, ${number(p.right)} right, ${number(p.unsure)} unsure${p.split ? `, ${p.split} disputed` : ""} · ${number(state.total)} shown`;
    $("bar").style.width = (100 * p.decided) / Math.max(p.issues, 1) + "%";
    const now = state.items[state.focus];
    $("pair-wrong").disabled = !now;
    $("pair-wrong").textContent = now ? `All of ${names[now.given]} → ${names[now.suggested]} above 90 %: wrong` : "All of this pair";
    drawRate();
    drawZoom();
  }
  function heading(item, key) {
    const by = $("group").value, group = state.groups[key];
    const title = by === "pair" ? `${names[item.given]} → ${names[item.suggested]}` : by === "given" ? names[item.given] : item.folder || "(no folder)";
    const only = make("button", { type: "button", class: "link small" }, "only these");
    only.addEventListener("click", () => {
      if (by === "folder") state.folder = item.folder;
      else $("given").value = item.given;
      if (by === "pair") $("suggested").value = item.suggested;
      $("clear").disabled = false;
      restart();
    });
    return make("li", { class: "group" }, make("b", {}, title), make("span", { class: "soft small num" }, `${number(group.count)} shown, about ${number(Math.round(group.wrong))} wrong`), only);
  }
  function drawRate() {
    const r = state.rate;
    $("rate").hidden = !r || $("order").value !== "rate";
    if ($("rate").hidden) return;
    const found = r.rate === null ? "no estimate yet" : `${(100 * r.rate).toFixed(1)} % of all labels are wrong, ± ${(100 * r.margin).toFixed(1)} points`;
    $("rate").textContent = `Annotate these ${number(r.needed)} to know the noise rate within about 3 points: ${number(r.annotated)} done, ${found} (95 %).`;
  }

  // -- annotations
  const waiting = storage.get(":waiting", []); // batches that the server has not confirmed
  const refused = storage.get(":refused", []); // batches that the server will not take, each with its `reason`
  const held = new Map();
  for (const one of waiting) for (const entry of one.entries || []) held.set(entry.index, entry);
  const pendingOf = (id) => { const e = held.get(id); return e && { annotation: e.annotation, label: e.new_label, name: e.new_label_name, by: annotator() }; };
  function hides(entry) {
    const status = $("status").value;
    return Boolean(entry) && (status === "open" || status === "mine") && entry.annotation !== null;
  }
  function entryFor(item, annotation, label = item.suggested, name = names[label]) {
    const wrong = annotation === "wrong" && label !== item.given; // which says no class if no other one is suggested
    const own = annotation === "right" ? [item.given, names[item.given]] : wrong ? [label, name] : [-1, ""];
    return { index: item.id, annotation, new_label: own[0], new_label_name: own[1], label_name: names[item.given], path: item.path };
  }
  const id = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");
  const picked = () => {
    if (state.anchor === null) return state.items.slice(state.focus, state.focus + 1);
    return state.items.slice(Math.min(state.anchor, state.focus), Math.max(state.anchor, state.focus) + 1);
  };
  function annotate(items, annotation, label, name) {
    if (!items.length) return;
    const entries = items.map((item) => entryFor(item, annotation, label ?? item.suggested, name ?? names[label ?? item.suggested]));
    const first = state.items.indexOf(items[0]), several = items.length > 1;
    state.anchor = null;
    const keepsPlace = $("status").value === "open" || $("status").value === "mine";
    send({ entries, batch: id() });
    if (keepsPlace && annotation !== null) state.items = state.items.filter((item) => !items.includes(item));
    state.focus = keepsPlace && annotation !== null ? first : annotation === null ? state.focus : Math.min(first + items.length, state.items.length - 1);
    state.focus = Math.max(0, Math.min(state.focus, state.items.length - 1));
    const classes = new Set(entries.map((entry) => entry.new_label_name || "class unknown"));
    const what = annotation === null ? "undecided again" : annotation === "wrong" && classes.size === 1 ? `wrong, ${[...classes][0]}` : annotation;
    toast(several ? `${items.length} samples: ${what}` : `Sample ${items[0].id}: ${what}`);
    draw();
    see();
  }
  // One batch at a time goes in and out of the browser's list: another tab of this review may keep its own there.
  const sameBatch = (a, b) => a.batch === b.batch && a.undoes === b.undoes;
  const stored = (one) => storage.get(":waiting", []).filter((other) => !sameBatch(one, other));
  function send(batch) {
    waiting.push(batch);
    for (const entry of batch.entries || []) held.set(entry.index, entry);
    if (data.served) storage.set(":waiting", [...stored(batch), batch]);
    deliver();
  }
  function release(one) {
    const still = new Set(waiting.flatMap((other) => (other.entries || []).map((entry) => entry.index)));
    for (const entry of one.entries || []) if (!still.has(entry.index)) held.delete(entry.index);
  }
  function drawRefused() {
    if (!data.served) return;
    const entries = refused.flatMap((one) => one.entries || []);
    $("refused").hidden = !refused.length;
    $("refused-download").hidden = !entries.length;
    $("refused-download").textContent = `Download ${number(entries.length)} not taken`;
  }
  let delivering = false, retry;
  async function deliver() {
    if (delivering) return;
    delivering = true;
    clearTimeout(retry);
    while (waiting.length) {
      const one = waiting[0];
      $("saved").textContent = data.served ? `keeping ${waiting.length}` : "";
      try {
        const count = one.undoes ? await source.undo(one.undoes) : one.query ? await source.bulk(one.query, one.annotation, one.batch) : await source.annotate(one.entries, one.batch);
        if (!one.undoes) { remember([...state.undo, one.batch]); if (one.query) toast(`${counted(count, "sample")}: ${one.annotation}`); }
        else toast("Undone");
        if ($("warning").dataset.offline) { delete $("warning").dataset.offline; warn(""); }
      } catch (error) {
        if (!error.refused) { // the server is away: nothing is lost, and nothing pretends to be kept
          $("warning").dataset.offline = "1";
          const kept = `${counted(waiting.length, "annotation")} kept in this browser.`;
          warn(error.failed ? `${error.message} ${kept} It is tried again until the server can.`
            : error.moved ? `The server was started again and has another address: ${kept} Open the address that \`hnml review\` printed, in this browser.`
            : `The server does not answer: ${kept} Start \`hnml review\` again with the same port, and open its address here.`);
          $("saved").textContent = `${waiting.length} not kept yet`;
          if (error.moved) delivering = false; // no retry helps
          else retry = setTimeout(() => { delivering = false; deliver(); }, 1500);
          return;
        }
        if (!one.undoes) refused.push({ ...one, reason: error.message });
        storage.set(":refused", refused);
        drawRefused();
        delete $("warning").dataset.offline;
        warn(error.message);
      }
      waiting.shift();
      if (data.served) storage.set(":waiting", stored(one));
      if (refused.some((other) => sameBatch(one, other))) release(one); // its cards come back
      if (!waiting.length && !(await refresh())) break;
      release(one);
    }
    delivering = false;
    $("saved").textContent = refused.length ? `${counted(refused.length, "change")} not taken by the server` : data.served ? "all on disk" : state.undo.length ? "kept in this browser" : "";
    draw();
  }
  function remember(batches) {
    state.undo = batches;
    session.set(":undo", batches);
    $("undo").disabled = !batches.length;
  }
  function undo() {
    const batch = state.undo.at(-1);
    remember(state.undo.slice(0, -1));
    if (batch) send({ undoes: batch });
  }
  function bulkPair() {
    const now = state.items[state.focus];
    if (!now) return;
    const q = { ...query(), scope: "issues", status: "open", given: now.given, suggested: now.suggested, least: BULK, order: "likely", group: "" };
    send({ query: q, annotation: "wrong", batch: id() });
  }

  // -- moving
  function see() {
    const now = state.items[state.focus], node = now && nodes.get(now.id);
    if (!node) return;
    const inside = document.activeElement && document.activeElement.closest(".card, dialog");
    if (!inside || inside.matches(".card")) node.focus({ preventScroll: true });
    const box = node.getBoundingClientRect(), top = $("review").querySelector(".tools").getBoundingClientRect().bottom;
    if (box.top < top || box.bottom > innerHeight) node.scrollIntoView({ block: box.height > innerHeight - top ? "start" : "nearest" });
  }
  function move(by, extend) {
    if (extend) state.anchor ??= state.focus; else state.anchor = null;
    state.focus = Math.max(0, Math.min(state.items.length - 1, state.focus + by));
    draw();
    see();
  }
  async function turn(by) {
    const start = state.start + by * SIZE;
    if (start < 0 || start >= state.total) return;
    state.focus = 0;
    state.anchor = null;
    await refresh(start);
    $("review").scrollIntoView({ block: "start" });
  }
  const columns = () => {
    const boxes = state.items.map((item) => nodes.get(item.id).offsetTop);
    return Math.max(1, boxes.filter((top) => top === boxes[0]).length);
  };

  // -- zoom and maps
  async function drawZoom() {
    const zoom = $("zoom"), now = state.items[state.focus];
    if (!zoom.open) return;
    if (!now) return zoom.close();
    if (zoom.dataset.id !== String(now.id)) {
      const frame = picture(now, 1280), maps = make("div", { class: "legend-maps", role: "group", "aria-label": "Where the model sees" });
      ["picture", names[now.given], names[now.suggested]].forEach((text, n) => maps.append(make("button", { type: "button", "data-map": n }, text)));
      const verdict = make("div", { class: "verdict" });
      for (const name of ["wrong", "right", "unsure"]) verdict.append(make("button", { type: "button", "data-set": name }, name[0].toUpperCase() + name.slice(1)));
      zoom.replaceChildren(make("div", { class: "zoom" }, frame, make("div", { class: "body" }, says(now),
        make("div", { class: "why" }, `probably wrong: ${now.certainty}`), ...now.why.map((text) => make("div", { class: "why" }, text)), make("div", { class: "path" }, now.path || "#" + now.id), ...(data.maps ? [maps] : []), verdict)));
      zoom.dataset.id = now.id;
    }
    dress(zoom, now, -1);
    zoom.removeAttribute("tabindex");
    await overlay(zoom.querySelector(".frame"), now);
  }
  function bare(frame) {
    for (const node of frame.querySelectorAll("canvas, .seen")) node.remove();
    frame.classList.remove("veil");
  }
  async function overlay(frame, item) {
    let found = null;
    try { found = state.map ? await source.maps(item) : null; } catch (error) { warn(error.message); }
    const maps = found && found.maps;
    bare(frame);
    frame.classList.toggle("veil", Boolean(maps));
    if (maps && found.image) frame.append(make("img", { src: found.image, alt: "", class: "seen" })); // the part that the model sees
    if (maps) frame.append(heat(maps[state.map - 1]));
    for (const button of document.querySelectorAll("[data-map]")) button.setAttribute("aria-pressed", String(Number(button.dataset.map) === state.map));
    return !state.map || maps;
  }
  async function cycleMaps(to = (state.map + 1) % 3) {
    state.map = to;
    const now = state.items[state.focus];
    if (!now) return;
    for (const [key, node] of nodes) if (key !== now.id) bare(node.querySelector(".frame"));
    let ok;
    try { ok = await overlay(nodes.get(now.id).querySelector(".frame"), now); } catch (error) { return toast("No map: " + error.message); }
    toast(!ok ? "There is no map of this picture." : state.map ? `Where the model sees ${names[state.map === 1 ? now.given : now.suggested]}` : "Picture");
    if (!ok) state.map = 0;
    drawZoom();
  }
  function zoomIn() {
    if (!state.items.length) return;
    delete $("zoom").dataset.id;
    $("zoom").showModal();
    drawZoom();
  }

  // -- events
  $("gallery").addEventListener("click", (event) => {
    const node = event.target.closest(".card");
    if (!node || event.target.closest("input")) return;
    const place = state.items.findIndex((item) => String(item.id) === node.dataset.id), button = event.target.closest("[data-set]");
    if (event.shiftKey) state.anchor ??= state.focus; else state.anchor = null;
    state.focus = place;
    if (button) {
      const items = picked(), off = items.length === 1 && button.getAttribute("aria-pressed") === "true";
      return annotate(items, off ? null : button.dataset.set);
    }
    draw();
    node.focus({ preventScroll: true });
    if (event.target.closest(".frame") && !event.shiftKey) zoomIn();
  });
  function choose(input) {
    const node = input.closest(".card"), item = state.items.find((one) => String(one.id) === node.dataset.id);
    const text = asName(input.value), hint = node.querySelector(".new");
    if (!item || !text) return;
    const exact = labels.get(text) ?? -1, lower = names.map((n) => asName(n).toLowerCase());
    const close = names.filter((_, n) => lower[n].startsWith(text.toLowerCase()));
    const label = exact >= 0 ? exact : close.length === 1 ? names.indexOf(close[0]) : lower.indexOf(text.toLowerCase());
    hint.hidden = label >= 0;
    if (label < 0 && close.length) {
      hint.textContent = `${number(close.length)} classes begin with “${text}”: ${close.slice(0, 5).join(", ")}${close.length > 5 ? ", …" : ""}`;
      return;
    }
    if (label < 0 && hint.dataset.name !== text) {
      hint.dataset.name = text;
      hint.textContent = `“${text}” is no class yet: Enter again adds it.`;
      return;
    }
    input.blur();
    state.focus = state.items.indexOf(item);
    if (label === item.given) return annotate([item], "right");
    annotate([item], "wrong", label, label < 0 ? text : names[label]);
    see();
  }
  $("zoom").addEventListener("click", (event) => {
    const button = event.target.closest("[data-set]"), map = event.target.closest("[data-map]");
    if (button) annotate([state.items[state.focus]], button.dataset.set);
    else if (map) cycleMaps(Number(map.dataset.map));
    else if (event.target === $("zoom") || event.target.closest(".frame")) $("zoom").close();
  });
  $("zoom").addEventListener("close", see);
  const palette = names.length <= 10 ? names.map((_, label) => label) : frequent();
  function frequent() {
    const counts = new Map(data.frequent ? data.frequent.map((label, n) => [label, 10 - n]) : []);
    for (const item of data.items || []) if (item.issue) counts.set(item.suggested, (counts.get(item.suggested) || 0) + 1);
    return [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, 10).map(([label]) => label).sort((a, b) => a - b);
  }
  function keyOf(event) { // where a layout has no Latin letters, or its digits want Shift, the place of the key tells
    const place = /^(?:Key([A-Z])|Digit([0-9]))$/.exec(event.code);
    if (place && place[2] && !event.shiftKey) return place[2];
    if (place && place[1] && (event.key === "Process" || /^[^ -~]$/.test(event.key))) return place[1].toLowerCase();
    return event.key.length === 1 ? event.key.toLowerCase() : event.key;
  }
  document.addEventListener("keydown", (event) => {
    const target = event.target, field = target.matches("input, select, textarea");
    if (field) {
      if (target.closest(".fix") && event.key === "Enter") { event.preventDefault(); choose(target); }
      else if (event.key === "Escape") { target.blur(); see(); }
      else if (target.id === "page" && event.key === "Enter") { target.blur(); $("page").dispatchEvent(new Event("change")); }
      return;
    }
    if ((event.ctrlKey || event.metaKey) && keyOf(event) === "z") { event.preventDefault(); return undo(); }
    if (event.ctrlKey || event.metaKey || event.altKey || $("review").hidden) return;
    if (target.matches("button, summary") && (event.key === "Enter" || event.key === " ")) return;
    if ($("keys").open) return;
    const key = keyOf(event);
    const verdicts = { w: "wrong", r: "right", u: "unsure", x: null };
    const across = $("zoom").open ? 1 : columns();
    const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across, Home: -SIZE, End: SIZE };
    const digit = "1234567890".indexOf(key);
    if (event.repeat && (key in verdicts || digit >= 0 || key === "b")) return; // one that is held decides one card
    if (key in verdicts) annotate(picked(), verdicts[key]);
    else if (digit >= 0 && key.length === 1) {
      const label = palette[digit], items = picked();
      if (label === undefined || !items.length) return;
      const right = items.filter((item) => item.given === label), wrong = items.filter((item) => item.given !== label);
      if (wrong.length) annotate(wrong, "wrong", label);
      if (right.length) annotate(right, "right");
    } else if (key in moves) move(moves[key], event.shiftKey);
    else if (key === " ") { if ($("zoom").open) $("zoom").close(); else zoomIn(); }
    else if (key === "m") { if (data.maps) cycleMaps(); }
    else if (key === "a") { state.anchor = 0; state.focus = Math.max(0, state.items.length - 1); draw(); }
    else if (key === "b") bulkPair();
    else if (key === "n" || key === "PageDown") turn(1);
    else if (key === "p" || key === "PageUp") turn(-1);
    else if (key === "g") { $("page").focus(); $("page").select(); }
    else if (key === "/") { $("filters").open = true; $("text").focus(); }
    else if (key === "?") $("keys").showModal();
    else if (key === "Enter" || key === "c") {
      if ($("zoom").open) $("zoom").close();
      const now = state.items[state.focus];
      if (now) nodes.get(now.id).querySelector(".fix input").focus();
    } else if (key === "Escape" && state.anchor !== null) { state.anchor = null; draw(); }
    else return;
    event.preventDefault();
  });

  // -- CSV; a leading = + - @ would be a formula to a spreadsheet
  const fields = ["index", "annotation", "new_label", "new_label_name", "label_name", "path", "annotator"];
  function cell(value) {
    let text = String(value ?? "");
    if (/^[=+\-@\t\r]/.test(text) && typeof value === "string") text = "'" + text;
    return /[",\n\r]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  }
  function toCsv(entries) {
    const lines = [fields.join(",")];
    for (const { item, annotation, label, name } of entries) lines.push([item.id, annotation, label, name, names[item.given], item.path, ""].map(cell).join(","));
    return lines.join("\r\n") + "\r\n";
  }
  function parseCsv(text) {
    const rows = [[]], first = text.split("\n", 1)[0];
    const separator = [",", ";", "\t"].sort((a, b) => first.split(b).length - first.split(a).length)[0]; // a spreadsheet's, by its language
    let value = "", quoted = false;
    for (let at = 0; at < text.length; at++) {
      const c = text[at];
      if (quoted) { if (c === '"' && text[at + 1] === '"') { value += c; at++; } else if (c === '"') quoted = false; else value += c; }
      else if (c === '"') quoted = true;
      else if (c === separator || c === "\n") { rows.at(-1).push(value.replace(/\r$/, "")); value = ""; if (c === "\n") rows.push([]); }
      else value += c;
    }
    if (value || rows.at(-1).length) rows.at(-1).push(value);
    return rows.filter((row) => row.length > 1);
  }
  const plain = (text) => (/^'[=+\-@\t\r]/.test(text || "") ? text.slice(1) : text || "");
  function importCsv(text) {
    $("toast").hidden = true; // it spoke of something else
    const [header, ...rows] = parseCsv(text.replace(/^\ufeff/, ""));
    const at = Object.fromEntries((header || []).map((name, n) => [name, n]));
    const verdictAt = at.annotation ?? at.mark;
    if (at.index === undefined || verdictAt === undefined) return warn("This file has no columns `index` and `annotation`; a file of annotations comes from this page.");
    const entries = [], strangers = [], unknown = [], again = [], said = new Map();
    for (const row of rows) {
      const index = /^\s*-?\d+(\.0*)?\s*$/.test(row[at.index]) ? Number(row[at.index]) : NaN; // an empty cell is not 0
      const annotation = row[verdictAt], path = plain(row[at.path]), item = source.known(index, path);
      const given = plain(row[at.label_name]), label = row[at.new_label] === "" || at.new_label === undefined ? -1 : Number(row[at.new_label]);
      const name = asName(plain(row[at.new_label_name]) || names[label] || ""), found = labels.get(name);
      const open = annotation === "wrong" && label === -1 && row[at.new_label]; // wrong, and no class is known
      const strange = Number.isNaN(index) || (!data.served && !item) || (item && given && asName(given) !== asName(names[item.given]));
      const sample = item ? item.id : index, word = annotation === "wrong" ? `wrong ${open} ${name}` : annotation;
      if (!["wrong", "right", "unsure"].includes(annotation)) unknown.push(`“${annotation ?? ""}” of sample ${row[at.index]}`);
      else if (strange) strangers.push(row[at.index]);
      else if (said.has(sample)) { if (said.get(sample) !== word) again.push("sample " + row[at.index]); }
      else {
        said.set(sample, word);
        entries.push(item ? entryFor(item, annotation, name ? found ?? -1 : open ? item.given : item.suggested, names[found] ?? (name || names[item.suggested]))
          : { index, annotation, new_label: found ?? -1, new_label_name: name || (open ? "" : null), label_name: given || null, path: path || null });
      }
    }
    for (let start = 0; start < entries.length; start += PIECE) send({ entries: entries.slice(start, start + PIECE), batch: id() });
    const out = (what, list) => (list.length ? [`${what} and left out: ${number(list.length)} of ${counted(rows.length, "row")}, ${list.slice(0, 5).join(", ")}.`] : []);
    warn([...out("Said once more, in another way,", again), ...out("Of another run", strangers.map((index) => "sample " + index)), ...out("Neither wrong, right nor unsure", unknown)].join(" "));
    toast(`${counted(entries.length, "annotation")} imported`);
  }
  function save(file, text) {
    const link = make("a", { download: file, href: text === null ? file : URL.createObjectURL(new Blob([text], { type: "text/csv" })) });
    link.click();
    if (text !== null) setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  $("download").addEventListener("click", () => save("annotations.csv", source.csv && source.csv()));
  $("import").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", async () => { if ($("file").files[0]) importCsv(await $("file").files[0].text()); $("file").value = ""; });

  // -- controls
  for (const key of ["given", "suggested"]) names.forEach((name, label) => $(key).append(make("option", { value: label }, name)));
  $("classes").append(...names.map((name) => make("option", { value: name })));
  palette.forEach((label, n) => $("palette").append(make("span", {}, make("kbd", {}, String((n + 1) % 10)), " " + names[label])));
  for (const key of ["scope", "status", "given", "suggested", "group", "order"]) $(key).addEventListener("change", restart);
  $("least").addEventListener("input", () => { $("least-text").textContent = Math.round(100 * $("least").value); restart(); });
  let typing;
  $("text").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(restart, data.served ? 150 : 0); });
  $("clear").addEventListener("click", () => {
    for (const key of ["given", "suggested", "group", "text"]) $(key).value = "";
    Object.assign($("scope"), { value: "issues" }), Object.assign($("status"), { value: "open" }), Object.assign($("order"), { value: "likely" });
    $("least").value = 0;
    $("least-text").textContent = "0";
    state.folder = "";
    restart();
  });
  $("page").addEventListener("change", () => {
    const page = Math.round(Number($("page").value.replace(/\D/g, "")));
    state.focus = 0;
    refresh((Math.max(1, Math.min(page || 1, Math.max(1, Math.ceil(state.total / SIZE)))) - 1) * SIZE);
  });
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  $("undo").addEventListener("click", undo);
  $("page-wrong").addEventListener("click", () => annotate(state.items.slice(), "wrong"));
  $("page-right").addEventListener("click", () => annotate(state.items.slice(), "right"));
  $("pair-wrong").addEventListener("click", bulkPair);
  $("help").addEventListener("click", () => $("keys").showModal());
  $("keys-close").addEventListener("click", () => $("keys").close());
  function tab(name) {
    for (const one of ["review", "charts"]) { $(one).hidden = one !== name; $("tab-" + one).setAttribute("aria-selected", String(one === name)); }
  }
  for (const one of ["review", "charts"]) $("tab-" + one).addEventListener("click", () => tab(one));
  $("charts").addEventListener("click", (event) => {
    const link = event.target.closest("[data-pair]");
    if (!link) return;
    const [given, suggested] = link.dataset.pair.split(",");
    $("given").value = given;
    $("suggested").value = suggested;
    $("filters").open = true;
    tab("review");
    restart();
  });
  if (data.served) {
    $("annotator").value = storage.get(":annotator", data.annotator);
    $("annotator").addEventListener("change", () => { storage.set(":annotator", annotator()); restart(); });
    $("refused-download").addEventListener("click", () => {
      const columns = [...fields, "reason"];
      const rows = refused.flatMap((one) => (one.entries || []).map((entry) => ({ ...entry, annotator: annotator(), reason: one.reason })));
      save("not_taken.csv", [columns, ...rows.map((row) => columns.map((name) => row[name]))].map((row) => row.map(cell).join(",") + "\r\n").join(""));
    });
    $("refused-forget").addEventListener("click", () => { refused.length = 0; storage.set(":refused", refused); drawRefused(); warn(""); deliver(); });
    drawRefused();
  }
  remember(session.get(":undo").filter(source.undoes));
  source.listen(() => refresh());
  restart().then(() => { if (waiting.length || refused.length) deliver(); });
})();
