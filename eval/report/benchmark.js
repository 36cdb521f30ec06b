"use strict";
// Behaviour of an R-precision page: the selectors, the objects' order and filter, the detail, and the link in the hash.
// Text of others enters the page through textContent alone.

(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const choose = $("choose");
  const filter = $("filter"); // null where there are no objects
  const detail = $("detail");
  const forms = [choose, filter].filter(Boolean);

  // Choices: what the forms stand on. The hash of the address holds those that differ from the first ones.

  const chosen = () => Object.assign({}, ...forms.map((form) => Object.fromEntries(new FormData(form))));
  forms.forEach((form) => form.reset()); // browsers restore what a page was left with; the hash alone decides here
  const first = chosen();
  let opened = ""; // "ID/SEED" of the object in the detail

  function readHash() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    for (const form of forms) {
      for (const name of Object.keys(Object.fromEntries(new FormData(form)))) {
        const field = form.elements[name];
        field.value = wanted.get(name) ?? first[name];
        if (!new FormData(form).has(name)) field.value = first[name]; // a choice this page does not have
      }
    }
    return wanted.get("object") ?? "";
  }

  function writeHash() {
    const differing = Object.entries(chosen()).filter(([name, value]) => value !== first[name]);
    if (opened) differing.push(["object", opened]);
    const hash = "#" + new URLSearchParams(differing);
    if (hash !== (location.hash || "#")) history.replaceState(null, "", hash);
  }

  // Blocks: of each group of alternatives the one that fits is shown.

  function showBlocks() {
    const choice = chosen();
    for (const group of document.querySelectorAll(".views")) {
      let any = false;
      for (const block of group.children) {
        if (!block.classList.contains("view")) continue;
        block.hidden = Object.entries(block.dataset).some(([key, value]) => choice[key] !== value);
        any ||= !block.hidden;
      }
      group.querySelector(":scope > .absent").hidden = any;
    }
  }

  // Objects: the cards are in the page; those that are not shown are taken out of it.

  const list = $("cards");
  const cards = [];
  for (const card of list?.querySelectorAll("[data-object]") ?? []) cards[card.dataset.object] = card;
  const more = $("more") ?? element("li", { id: "more" }, element("span"), element("button", { type: "button" }));
  let head = data.most; // cards shown before the gap
  let sorted = []; // places in data.objects

  const viewIndex = ({ evaluator, shading, gallery }) =>
    data.views.findIndex((view) => view[0] === evaluator && view[1] === shading && view[2] === gallery);
  const digits = (value, n) => (value === null ? "–" : Number(value.toPrecision(n)).toString());
  const signed = (value) => (value === null ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3));

  function told(object, verdict) {
    if (object.failure) return ["failed", "failed: " + object.failure, ""];
    if (!verdict || verdict[1] === null) return ["miss", "not scored", ""];
    const [hit, rank, , margin] = verdict;
    return [hit >= data.hit ? "right" : "miss", "rank " + digits(rank, 3), signed(margin)];
  }

  function sortObjects() {
    if (!list) return;
    const choice = chosen();
    const view = viewIndex(choice);
    const verdict = (place) => data.objects[place].verdicts[view] ?? null;
    const margin = (place) => verdict(place)?.[3] ?? -Infinity;
    const words = choice.find.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (object, place) => {
      if (choice.group !== "all" && !object.groups.includes(choice.group)) return false;
      if (choice.show === "failures" && !object.failure) return false;
      if (choice.show === "misses" && !((verdict(place)?.[0] ?? 0) < data.hit)) return false;
      const text = `${data.captions[object.text]} ${object.id}`.toLowerCase();
      return words.every((word) => text.includes(word));
    };
    sorted = [...data.objects.keys()].filter((place) => fits(data.objects[place], place));
    sorted.sort((a, b) => (margin(a) === margin(b) ? a - b : margin(a) - margin(b)));
    if (choice.order === "best") sorted.reverse();
    showObjects();
  }

  function showObjects() {
    const view = viewIndex(chosen());
    const tail = Math.max(head, sorted.length - data.most);
    const shown = [...sorted.slice(0, head), ...sorted.slice(tail)];
    for (const place of shown) {
      const card = cards[place];
      const [style, rank, margin] = told(data.objects[place], data.objects[place].verdicts[view]);
      const [label, number] = card.querySelector(".verdict").children;
      label.className = style;
      label.textContent = rank;
      number.textContent = margin;
      card.hidden = false;
    }
    const items = shown.map((place) => cards[place]);
    const left = sorted.length - shown.length;
    if (left) {
      more.firstElementChild.textContent = `${left} more`;
      more.lastElementChild.textContent = `Show ${Math.min(left, 2 * data.most)}`;
      more.lastElementChild.hidden = false;
      items.splice(head, 0, more);
    }
    list.replaceChildren(...items);
    $("count").textContent = sorted.length
      ? `${shown.length} of ${data.objects.length} objects shown` + (left ? `, ${left} more between the two ends` : "")
      : "No object fits.";
  }

  // The detail of one object.

  function element(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    Object.assign(made, properties);
    made.append(...children);
    return made;
  }

  const words = (text) => element("span", { className: "words" }, text);

  function facts(entries) {
    const parts = entries.map(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
    return element("dl", {}, ...parts.flat());
  }

  function verdictTable(object) {
    const names = ["scored by", "R@1,\u00a0%", "rank", "cosine", "margin"];
    const top = element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));
    top.append(element("th", { scope: "col" }, words("nearest caption")));
    const chosenView = viewIndex(chosen());
    const rows = data.views.map((view, place) => {
      const verdict = object.verdicts[place];
      const [hit, rank, cosine, margin, nearest] = verdict ?? [null, null, null, null, null];
      const nearestText = nearest === null ? "–" : nearest === object.text ? "its own" : data.captions[nearest] || "–";
      const texts = [digits(hit === null ? null : 100 * hit, 3), digits(rank, 3)];
      texts.push(cosine === null ? "–" : cosine.toFixed(3).replace("-", "−"), signed(margin));
      return element(
        "tr",
        { className: place === chosenView ? "main" : "" },
        element("th", { scope: "row" }, view[0], words(`${view[1]}, gallery ${view[2]}`)),
        ...texts.map((text) => element("td", {}, text)),
        element("td", {}, words(nearestText)),
      );
    });
    const table = element("table", {}, element("thead", {}, top), element("tbody", {}, ...rows));
    return element("div", { className: "card" }, table);
  }

  function openDetail(place) {
    const object = data.objects[place];
    const caption = data.captions[object.text];
    const pictures = Object.entries(object.pictures).map(([row, id]) => {
      const image = element("img", { alt: `${row}: ${caption}`, src: $(id).getAttribute("href") });
      return element("figure", {}, image, element("figcaption", {}, row));
    });
    const entries = [["id", object.id], ["seed", String(object.seed)]];
    if (object.groups.length) entries.push(["groups", object.groups.join(", ")]);
    if (object.failure) entries.push(["failed", object.failure]);
    const beside = element("div", { className: "beside" }, ...pictures, facts(entries));
    $("detail-title").textContent = caption;
    $("detail-body").replaceChildren(beside, verdictTable(object));
    const at = sorted.indexOf(place);
    $("previous").disabled = at <= 0;
    $("next").disabled = at < 0 || at === sorted.length - 1;
    opened = `${object.id}/${object.seed}`;
    if (!detail.open) detail.showModal();
    writeHash();
  }

  function step(by) {
    const at = sorted.findIndex((place) => `${data.objects[place].id}/${data.objects[place].seed}` === opened);
    if (at >= 0 && sorted[at + by] !== undefined) openDetail(sorted[at + by]);
  }

  if (list) {
    list.addEventListener("click", (event) => {
      const card = event.target.closest("[data-object]");
      if (card) openDetail(Number(card.dataset.object));
    });
    more.lastElementChild.addEventListener("click", () => {
      const next = sorted[head];
      head += 2 * data.most;
      showObjects();
      cards[next].firstElementChild.focus();
    });
    $("close").addEventListener("click", () => detail.close());
    $("previous").addEventListener("click", () => step(-1));
    $("next").addEventListener("click", () => step(1));
    detail.addEventListener("keydown", (event) => {
      if (event.target.closest(".card")) return; // where the arrows scroll a wide table
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
    });
    detail.addEventListener("click", (event) => {
      if (event.target === detail) detail.close(); // beside it
    });
    detail.addEventListener("close", () => {
      opened = "";
      writeHash();
    });
  }

  // A link to a section must not take the choices' place in the hash.

  for (const link of document.querySelectorAll("nav a")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      document.querySelector(link.getAttribute("href")).scrollIntoView();
    });
  }

  function show() {
    showBlocks();
    sortObjects();
  }

  for (const form of forms) {
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => {
      head = data.most;
      show();
      writeHash();
    });
  }

  function restore() {
    const wanted = readHash();
    show();
    if (!list) return;
    const place = data.objects.findIndex((object) => `${object.id}/${object.seed}` === wanted);
    if (place >= 0) openDetail(place);
    else if (detail.open) detail.close();
  }
  window.addEventListener("hashchange", restore);
  restore();
})();
