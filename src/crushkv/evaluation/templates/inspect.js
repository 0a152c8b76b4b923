"use strict";
// State is a layer (its number in the model), a KV head and a token, each null for all or none. It stands in the
// hash of the address, and everything shown follows from it.
(() => {
  const TIERS = ["evicted", "sink", "important", "representative", "recent"];
  const LETTERS = ["–", "S", "I", "R", "W"];
  const EVICTED = 0, REPRESENTATIVE = 3;
  const LISTED = 60; // entries of the panel's list
  const BINS = 400;

  const byId = (id) => document.getElementById(id);
  const page = JSON.parse(byId("data").textContent);
  const { pieces, layers, heads } = page;
  const tokens = pieces.length;
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const tiers = bytes(page.tiers); // [layers, heads, tokens]
  const buckets = new (page.wide ? Uint32Array : Uint16Array)(bytes(page.buckets).buffer); // [layers, heads, units]
  const NO_UNIT = page.wide ? 0xffffffff : 0xffff;
  const units = buckets.length / (layers.length * heads);

  const state = { layer: null, head: null, token: null };
  let hovered = null;

  // What the arrays say

  const tiersOf = (row, head) => tiers.subarray((row * heads + head) * tokens, (row * heads + head + 1) * tokens);
  const bucketsOf = (row, head) => buckets.subarray((row * heads + head) * units, (row * heads + head + 1) * units);
  const rows = () => (state.layer === null ? layers.map((_, row) => row) : [layers.indexOf(state.layer)]);
  const columns = () => (state.head === null ? Array.from({ length: heads }, (_, head) => head) : [state.head]);
  const pairs = () => rows().flatMap((row) => columns().map((head) => [row, head]));
  const oneHead = () => state.layer !== null && state.head !== null;

  function keptCounts(chosen) {
    const counts = new Uint16Array(tokens);
    for (const [row, head] of chosen) {
      const tier = tiersOf(row, head);
      for (let i = 0; i < tokens; i++) counts[i] += tier[i] !== EVICTED;
    }
    return counts;
  }

  const unitOf = (token) => (token < page.sink ? -1 : Math.floor((token - page.sink) / page.page));
  const firstOf = (unit) => page.sink + unit * page.page;
  const lastOf = (unit) => Math.min(firstOf(unit) + page.page, tokens) - 1;

  /** The chosen head's bucket around a token: the representative's unit and the units it stands for, or null. */
  function bucketAround(token) {
    if (!oneHead() || token < page.sink) return null;
    const all = bucketsOf(layers.indexOf(state.layer), state.head);
    const representative = all[unitOf(token)];
    if (representative === NO_UNIT) return null;
    const members = [];
    for (let unit = 0; unit < units; unit++) {
      if (all[unit] === representative && unit !== representative) members.push(unit);
    }
    return { representative, members };
  }

  // Making elements: text only ever through textContent

  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  const number = (value) => value.toLocaleString("en", { maximumFractionDigits: 1 });
  const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
  const shown = (text) => text.replace(/\r?\n/g, "↵").replace(/\t/g, "⇥") || "·";
  const unitName = page.page === 1 ? "token" : "page";
  const place = (unit) => (page.page === 1 ? `${firstOf(unit)}` : `${firstOf(unit)}–${lastOf(unit)}`);
  const unitText = (unit) => shown(pieces.slice(firstOf(unit), lastOf(unit) + 1).join("")).trim() || "␣";

  // The text

  const text = byId("text");
  const all = document.createDocumentFragment();
  const spans = pieces.map((piece, i) => {
    const span = document.createElement("span");
    span.id = `t${i}`;
    span.textContent = piece;
    if (piece === "") span.dataset.piece = "part";
    else if (/^\s*\n\s*$/.test(piece)) span.dataset.piece = "break";
    return all.appendChild(span);
  });
  text.append(all);

  const classes = new Array(tokens).fill("");
  let marked = [];

  function paintText() {
    let name;
    if (oneHead()) {
      const tier = tiersOf(layers.indexOf(state.layer), state.head);
      name = (i) => `t${tier[i]}`;
    } else {
      const chosen = pairs();
      const counts = keptCounts(chosen);
      name = (i) => `k${Math.ceil((10 * counts[i]) / chosen.length)}`;
    }
    for (let i = 0; i < tokens; i++) {
      const next = name(i);
      if (classes[i] !== next) spans[i].className = classes[i] = next;
    }
  }

  function paintMarks() {
    for (const span of marked) {
      delete span.dataset.mark;
      span.removeAttribute("aria-current");
    }
    marked = [];
    const mark = (unit, name) => {
      for (let i = firstOf(unit); i <= lastOf(unit); i++) {
        spans[i].dataset.mark = name;
        marked.push(spans[i]);
      }
    };
    const token = state.token ?? hovered;
    const bucket = token === null ? null : bucketAround(token);
    if (bucket) {
      bucket.members.forEach((unit) => mark(unit, "mate"));
      mark(bucket.representative, "representative");
    }
    text.removeAttribute("aria-activedescendant");
    if (state.token !== null) {
      spans[state.token].setAttribute("aria-current", "true");
      marked.push(spans[state.token]);
      text.setAttribute("aria-activedescendant", spans[state.token].id);
    }
  }

  // Controls and legend

  for (const [id, values] of [["layer", layers], ["head", Array.from({ length: heads }, (_, head) => head)]]) {
    byId(id).append(make("option", { value: "" }, "all"), ...values.map((value) => make("option", { value }, `${value}`)));
    byId(id).addEventListener("change", (event) => {
      set({ [id]: event.target.value === "" ? null : Number(event.target.value) });
    });
  }

  function paintControls() {
    byId("layer").value = state.layer ?? "";
    byId("head").value = state.head ?? "";
    const chosen = pairs();
    const counts = TIERS.map(() => 0);
    for (const [row, head] of chosen) for (const tier of tiersOf(row, head)) counts[tier]++;
    const entries = [1, 2, 3, 4, EVICTED].map((tier) => {
      const count = make("b", { "data-tier": TIERS[tier] }, number(counts[tier] / chosen.length));
      const swatch = oneHead() ? [make("span", { class: `swatch t${tier}` }, LETTERS[tier]), " "] : [];
      return make("span", {}, ...swatch, `${TIERS[tier]} `, count);
    });
    if (!oneHead()) {
      const scale = make("span", { class: "scale" });
      for (let level = 0; level <= 10; level++) scale.append(make("span", { class: `swatch k${level}` }));
      const all = plural(chosen.length, state.head === null ? "KV head" : "layer");
      entries.unshift(make("span", {}, "kept by 0 ", scale, ` ${all}`), make("span", { class: "quiet" }, "mean:"));
    }
    byId("legend").replaceChildren(...entries);
  }

  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("help-button").addEventListener("click", () => {
    byId("help").hidden = !byId("help").hidden;
    byId("help-button").setAttribute("aria-expanded", `${!byId("help").hidden}`);
  });

  // The strip: share kept, layers x stretches of the text

  function paintStrip() {
    const canvas = byId("strip-canvas");
    canvas.width = Math.min(tokens, BINS);
    canvas.height = layers.length;
    const context = canvas.getContext("2d");
    context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--link");
    layers.forEach((_, row) => {
      const chosen = columns();
      const counts = keptCounts(chosen.map((head) => [row, head]));
      for (let x = 0; x < canvas.width; x++) {
        const from = Math.floor((x * tokens) / canvas.width);
        const to = Math.floor(((x + 1) * tokens) / canvas.width);
        let kept = 0;
        for (let i = from; i < to; i++) kept += counts[i];
        context.globalAlpha = kept / ((to - from) * chosen.length);
        context.fillRect(x, row, 1, 1);
      }
    });
    byId("strip-heads").textContent = state.head === null ? "mean over KV heads" : `KV head ${state.head}`;
  }

  function paintStripMarks() {
    const layer = byId("strip-layer"), token = byId("strip-token");
    layer.hidden = state.layer === null;
    layer.style.top = `${(100 * layers.indexOf(state.layer)) / layers.length}%`;
    layer.style.height = `${100 / layers.length}%`;
    token.hidden = state.token === null;
    token.style.left = `${(100 * ((state.token ?? 0) + 0.5)) / tokens}%`;
  }

  byId("strip").style.setProperty("--layers", layers.length);
  byId("strip").addEventListener("click", (event) => {
    const box = byId("strip-canvas").getBoundingClientRect();
    const at = (offset, length, count) => Math.max(0, Math.min(count - 1, Math.floor((offset / length) * count)));
    const row = at(event.clientY - box.top, box.height, layers.length);
    set({ layer: layers[row], token: at(event.clientX - box.left, box.width, tokens) }, "center");
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintStrip);

  // The panel: one token, who keeps it, and its bucket

  function paintPanel() {
    const token = state.token ?? hovered;
    const panel = byId("panel");
    if (token === null) {
      const hint = oneHead()
        ? "Point at a token, or choose one: a representative shows what it stands for, an evicted token its representative."
        : "Point at a token, or choose one, to see who keeps it. Choose a layer and a KV head to see tiers.";
      panel.replaceChildren(make("p", { class: "quiet" }, hint));
      return;
    }
    const everywhere = layers.flatMap((_, row) => Array.from({ length: heads }, (_, head) => tiersOf(row, head)[token]));
    const kept = everywhere.filter((tier) => tier !== EVICTED).length;
    panel.replaceChildren(
      make("h2", {}, `Token ${token} `, make("code", {}, shown(pieces[token]))),
      make("p", { "data-kept": kept }, `Kept by ${kept} of ${plural(everywhere.length, "(layer, head) pair")}.`),
      ...(oneHead() ? bucketParts(token) : []),
      matrix(token),
    );
  }

  function bucketParts(token) {
    const own = tiersOf(layers.indexOf(state.layer), state.head);
    const tier = own[token];
    const where = make("p", {}, `Layer ${state.layer}, KV head ${state.head}: `, make("b", { class: `swatch t${tier}` }, TIERS[tier]));
    const bucket = bucketAround(token);
    if (bucket === null) {
      const why = own.includes(REPRESENTATIVE) ? "" : ": this KV head has none";
      return tier === EVICTED ? [where, make("p", {}, `No representative stands for it${why}.`)] : [where];
    }
    const { representative, members } = bucket;
    const list = make("ul", { id: "bucket" }, ...members.slice(0, LISTED).map((unit) => make("li", {}, goTo(unit))));
    if (members.length > LISTED) {
      list.append(make("li", { class: "quiet" }, `and ${plural(members.length - LISTED, unitName)} more, marked in the text`));
    }
    if (tier === REPRESENTATIVE) {
      const count = members.length
        ? `Stands for ${members.length} evicted ${unitName}${members.length === 1 ? "" : "s"}:`
        : "Stands for itself alone.";
      return [where, make("p", { "data-representative": firstOf(representative) }, count), list];
    }
    const others = members.length - 1;
    return [
      where,
      make("p", { "data-representative": firstOf(representative) }, "Its representative:"),
      make("ul", {}, make("li", {}, goTo(representative))),
      ...(others ? [make("p", {}, `It stands for ${plural(others, `other evicted ${unitName}`)}, too:`), list] : []),
    ];
  }

  function goTo(unit) {
    const onclick = () => set({ token: firstOf(unit) }, "center");
    return make("button", { type: "button", onclick }, make("span", {}, place(unit)), make("span", {}, unitText(unit)));
  }

  /** Tiers of a token in every layer and KV head. */
  function matrix(token) {
    const head = make("tr", {}, make("th", {}, "layer"), ...columnHeads());
    const body = layers.map((layer, row) => {
      const cells = Array.from({ length: heads }, (_, head) => {
        const tier = tiersOf(row, head)[token];
        const name = `layer ${layer}, KV head ${head}: ${TIERS[tier]}`;
        const pressed = `${layer === state.layer && head === state.head}`;
        const onclick = () => set({ layer, head, token });
        const attributes = { type: "button", class: `t${tier}`, title: name, "aria-label": name, "aria-pressed": pressed };
        return make("td", {}, make("button", { ...attributes, onclick }, LETTERS[tier]));
      });
      return make("tr", {}, make("th", {}, `${layer}`), ...cells);
    });
    return make("table", { class: "matrix" }, make("thead", {}, head), make("tbody", {}, ...body));
  }

  const columnHeads = () => Array.from({ length: heads }, (_, head) => make("th", { title: `KV head ${head}` }, `${head}`));

  // State and address

  function set(changes, scroll = null) {
    const before = { ...state };
    Object.assign(state, changes);
    const moved = (name) => state[name] !== before[name];
    if (moved("layer") || moved("head")) {
      paintText();
      paintControls();
    }
    if (moved("head")) paintStrip();
    hovered = null;
    paintMarks();
    paintStripMarks();
    paintPanel();
    const view = { layer: state.layer, head: state.head, token: state.token, view: oneHead() ? "tiers" : "shade" };
    for (const [name, value] of Object.entries(view)) document.body.dataset[name] = value ?? (name === "token" ? "none" : "all");
    if (scroll && state.token !== null) spans[state.token].scrollIntoView({ block: scroll });
    // Browsers refuse many changes of the address in a short time, as a key held down would make them.
    clearTimeout(writing);
    writing = setTimeout(writeHash, 150);
  }

  let writing;

  function writeHash() {
    const hash = Object.entries(state).filter(([, value]) => value !== null).map(([name, value]) => `${name}=${value}`).join("&");
    if (hash !== location.hash.slice(1)) history.replaceState(null, "", `#${hash}`);
  }

  /** What of the hash is there: the rest is none. */
  function readHash() {
    const given = new URLSearchParams(location.hash.slice(1));
    const read = (name, valid) => {
      const value = given.get(name) ?? "";
      return /^\d+$/.test(value) && valid(Number(value)) ? Number(value) : null;
    };
    return {
      layer: read("layer", (layer) => layers.includes(layer)),
      head: read("head", (head) => head < heads),
      token: read("token", (token) => token < tokens),
    };
  }

  addEventListener("hashchange", () => set(readHash(), "center"));

  // Pointer and keys

  const tokenAt = (event) => (event.target.parentNode === text ? Number(event.target.id.slice(1)) : null);

  function hover(token) {
    if (token === hovered || state.token !== null) return;
    hovered = token;
    paintMarks();
    paintPanel();
  }

  text.addEventListener("pointerover", (event) => hover(tokenAt(event)));
  text.addEventListener("pointerleave", () => hover(null));
  text.addEventListener("click", (event) => {
    const token = tokenAt(event);
    set({ token: token === state.token ? null : token });
  });

  /** The token below or above (direction 1 or -1), on the next line of the page. */
  function otherLine(token, direction) {
    const { offsetTop: top, offsetLeft: left } = spans[token];
    let i = token;
    while (spans[i] && spans[i].offsetTop === top) i += direction;
    if (!spans[i]) return token;
    let best = i;
    for (const line = spans[i].offsetTop; spans[i] && spans[i].offsetTop === line; i += direction) {
      if (Math.abs(spans[i].offsetLeft - left) < Math.abs(spans[best].offsetLeft - left)) best = i;
    }
    return best;
  }

  const moves = {
    ArrowLeft: (token) => token - 1,
    ArrowRight: (token) => token + 1,
    ArrowUp: (token) => otherLine(token, -1),
    ArrowDown: (token) => otherLine(token, 1),
    Home: () => 0,
    End: () => tokens - 1,
  };
  text.addEventListener("keydown", (event) => {
    const move = moves[event.key];
    if (!move || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const next = state.token === null ? (event.key === "End" ? tokens - 1 : 0) : move(state.token);
    set({ token: Math.max(0, Math.min(tokens - 1, next)) }, "nearest");
  });

  /** The next of the values all, first, ..., last, in a circle. */
  function step(name, values, direction) {
    const ring = [null, ...values];
    set({ [name]: ring[(ring.indexOf(state[name]) + direction + ring.length) % ring.length] });
  }

  function stepRepresentative(direction) {
    if (!oneHead()) return;
    const tier = tiersOf(layers.indexOf(state.layer), state.head);
    const is = (i) => tier[i] === REPRESENTATIVE && (i - page.sink) % page.page === 0;
    let i = (state.token ?? (direction > 0 ? -1 : tokens)) + direction;
    while (i >= 0 && i < tokens && !is(i)) i += direction;
    if (i >= 0 && i < tokens) set({ token: i }, "center");
  }

  const shortcuts = {
    "[": () => step("layer", layers, -1),
    "]": () => step("layer", layers, 1),
    ",": () => step("head", Array.from({ length: heads }, (_, head) => head), -1),
    ".": () => step("head", Array.from({ length: heads }, (_, head) => head), 1),
    n: () => stepRepresentative(1),
    p: () => stepRepresentative(-1),
    Escape: () => set({ token: null }),
  };
  addEventListener("keydown", (event) => {
    const shortcut = shortcuts[event.key];
    if (!shortcut || event.target instanceof HTMLSelectElement || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    shortcut();
  });

  const controls = byId("controls");
  new ResizeObserver(() => {
    document.documentElement.style.setProperty("--below-controls", `${controls.offsetHeight + 12}px`);
  }).observe(controls);

  paintText();
  paintControls();
  paintStrip();
  set(readHash(), "center");
  document.documentElement.dataset.ready = "true";
})();
