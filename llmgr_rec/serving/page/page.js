// The page: a session built from items of the catalog, the lists of all models for it, and why they hold an item.
// Text of items gets into the page as text nodes only, never as HTML.

import { sessionGraph } from "./graph.js";
import { explanation } from "./explanation.js";
import { element, nameOf } from "./elements.js";

const LIST_LENGTH = 10;
const FOUND_LENGTH = 8;
const SEARCH_DELAY_MS = 150;

const byId = (id) => document.getElementById(id);
const titles = new Map();
let session = new URLSearchParams(location.search).getAll("s");
let asked = new AbortController();
let searched = new AbortController();
let searchTimer = 0;

async function ask(path, body, signal) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(path, { ...options, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the service does not answer; start it again and reload the page");
  }
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}

function say(text) {
  byId("status").textContent = text;
}

function showProblem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = !text;
}

// Runs a part of the page whose request may fail or be overtaken by a later one.
async function attempt(work) {
  try {
    await work();
    showProblem("");
  } catch (error) {
    if (error.name !== "AbortError") showProblem(error.message);
  }
}

const titleOf = (id) => titles.get(id) ?? id;

function remember(ids, names) {
  ids.forEach((id, place) => titles.set(String(id), nameOf(id, names[place])));
}

// --- Session

function change(next, message) {
  session = next;
  const address = new URL(location.href);
  address.searchParams.delete("s");
  session.forEach((id) => address.searchParams.append("s", id));
  history.replaceState(null, "", address);
  say(message);
  showSession();
  return showLists();
}

const add = (id) => change([...session, String(id)], `Added ${titleOf(String(id))}, click ${session.length + 1}`);

function move(from, to) {
  if (to < 0 || to >= session.length || from === to) return;
  const next = session.toSpliced(from, 1).toSpliced(to, 0, session[from]);
  change(next, `Moved ${titleOf(session[from])} to position ${to + 1} of ${session.length}`);
}

function remove(place) {
  change(session.toSpliced(place, 1), `Removed ${titleOf(session[place])}`);
  const left = byId("session").querySelectorAll(".remove");
  (left[Math.min(place, left.length - 1)] ?? byId("query")).focus();
}

function showSession() {
  byId("session").replaceChildren(...session.map(click));
  byId("session-actions").hidden = !session.length;
  byId("session-note").textContent = session.length
    ? "Oldest click first. Drag a click by its handle, or use the arrow keys on it."
    : "Click items in the order in which someone would look at them.";
  byId("graph-section").hidden = !session.length;
  showGraph();
}

function showGraph() {
  byId("graph").replaceChildren(...(session.length ? [sessionGraph(session, titleOf, byId("graph").clientWidth)] : []));
}

function click(id, place) {
  const title = titleOf(id);
  const position = `position ${place + 1} of ${session.length}`;
  const handle = element("button", { class: "icon handle", "aria-label": `Reorder ${title}, ${position}` }, "⠿");
  const up = element("button", { class: "icon up", "aria-label": `Move ${title} up` }, "↑");
  const down = element("button", { class: "icon down", "aria-label": `Move ${title} down` }, "↓");
  const cross = element("button", { class: "icon remove", "aria-label": `Remove ${title}` }, "✕");
  up.disabled = place === 0;
  down.disabled = place === session.length - 1;
  const moveAndFocus = (to, kind) => {
    move(place, to);
    const buttons = [...byId("session").children[to].querySelectorAll(`.${kind}, .handle`)];
    (buttons.reverse().find((button) => !button.disabled)).focus();
  };
  handle.addEventListener("keydown", (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    if (session[place + step] !== undefined) moveAndFocus(place + step, "handle");
  });
  up.addEventListener("click", () => moveAndFocus(place - 1, "up"));
  down.addEventListener("click", () => moveAndFocus(place + 1, "down"));
  cross.addEventListener("click", () => remove(place));
  const row = element("li", { class: "click" }, handle, element("span", { class: "name" }, title), up, down, cross);
  handle.addEventListener("pointerdown", (event) => drag(event, row, place));
  return row;
}

// Moves a row with the pointer, mouse or finger, to the place where it is let go.
function drag(event, row, from) {
  if (event.button !== 0) return;
  event.preventDefault();
  const rows = [...byId("session").children];
  const middles = rows.map((one) => one.getBoundingClientRect()).map((box) => box.top + box.height / 2);
  let to = from;
  const follow = (moved) => {
    const y = middles[from] + moved.clientY - event.clientY;
    to = middles.filter((middle, place) => place !== from && middle < y).length;
    row.style.transform = `translateY(${moved.clientY - event.clientY}px)`;
    rows.forEach((one, place) => {
      const lies = place !== from && (place < from ? place >= to : place <= to);
      one.classList.toggle("makes-room-below", lies && place < from);
      one.classList.toggle("makes-room-above", lies && place > from);
    });
  };
  const end = (last) => {
    event.target.removeEventListener("pointermove", follow);
    rows.forEach((one) => one.classList.remove("dragged", "makes-room-above", "makes-room-below"));
    row.style.transform = "";
    if (last.type === "pointerup") move(from, to);
  };
  row.classList.add("dragged");
  event.target.setPointerCapture(event.pointerId);
  event.target.addEventListener("pointermove", follow);
  event.target.addEventListener("pointerup", end, { once: true });
  event.target.addEventListener("pointercancel", end, { once: true });
}

// --- Lists

async function showLists() {
  asked.abort();
  asked = new AbortController();
  await attempt(async () => {
    const answer = await ask("lists", { session, k: LIST_LENGTH }, asked.signal);
    const clicks = answer.session;
    clicks.forEach((one, place) => titles.set(session[place], nameOf(session[place], one.title)));
    answer.lists.forEach((list) => remember(list.item_ids, list.titles));
    refreshNames(clicks);
    const none = answer.lists.every((list) => list.fallback);
    const unknown = clicks.filter((one) => !one.is_known).length;
    byId("lists-note").textContent = !session.length
      ? "No clicks yet: these are the most popular items. Click one to begin a session."
      : none
        ? "No item of the session is known: these are the most popular items."
        : `Click an item to add it to the session.${unknown ? ` Unknown items are ignored: ${unknown}.` : ""}`;
    replaceLists((none ? answer.lists.slice(-1) : answer.lists).map(list));
  });
}

// Keeps the focus at its place in the lists, so that the next item can be added by the keyboard.
function replaceLists(lists) {
  const row = document.activeElement.closest("#lists li");
  const column = [...byId("lists").children].indexOf(row?.closest(".list"));
  const place = row && [...row.parentElement.children].indexOf(row);
  byId("lists").replaceChildren(...lists);
  if (row) lists[Math.min(column, lists.length - 1)].querySelectorAll(".item")[place]?.focus();
}

// Names that were not known when the session was drawn, as after opening a shared address.
function refreshNames(clicks) {
  const drawn = [...byId("session").querySelectorAll(".name")].map((name) => name.textContent);
  if (drawn.some((name, place) => name !== titleOf(session[place]))) showSession();
  [...byId("session").children].forEach((row, place) => row.classList.toggle("unknown", !clicks[place].is_known));
}

function list(found) {
  const heading = `list-${found.name}`;
  const rows = found.item_ids.map((id, place) => {
    const title = nameOf(id, found.titles[place]);
    const row = element("li", { "data-item": id }, addButton(id, title));
    if (found.explains && !found.fallback) {
      const why = element("button", { class: "quiet why", "aria-label": `Why ${title}` }, "Why");
      why.addEventListener("click", () => explain(found, id, title));
      row.append(why);
    }
    ["mouseenter", "focusin"].forEach((kind) => row.addEventListener(kind, () => mark(id, true)));
    ["mouseleave", "focusout"].forEach((kind) => row.addEventListener(kind, () => mark(id, false)));
    return row;
  });
  return element(
    "section",
    { class: "list", "aria-labelledby": heading },
    element("h3", { id: heading }, found.title),
    element("ol", {}, ...rows),
  );
}

function mark(id, isOn) {
  for (const row of byId("lists").querySelectorAll("li")) {
    if (row.dataset.item === String(id)) row.classList.toggle("same", isOn);
  }
}

function addButton(id, title) {
  const button = element("button", { class: "item" }, title);
  button.addEventListener("click", () => add(id));
  return button;
}

// --- Explanation

async function explain(list, id, title) {
  byId("why-title").textContent = title;
  byId("why-model").textContent = `Why ${list.title} recommends`;
  byId("why-body").replaceChildren(element("p", { class: "soft" }, "…"));
  byId("why").showModal();
  try {
    const answer = await ask("explain", { session, items: [id], model: list.name });
    const pick = (other) => {
      byId("why").close();
      add(other);
    };
    byId("why-body").replaceChildren(...explanation(answer, pick));
  } catch (error) {
    byId("why-body").replaceChildren(element("p", { role: "alert" }, error.message));
  }
}

// --- Search

function search() {
  clearTimeout(searchTimer);
  searchTimer = setTimeout(() => attempt(find), SEARCH_DELAY_MS);
}

async function find() {
  searched.abort();
  searched = new AbortController();
  const query = byId("query").value.trim();
  if (!query) {
    byId("found").replaceChildren();
    byId("found-note").textContent = "";
    return;
  }
  const parameters = new URLSearchParams({ q: query, limit: FOUND_LENGTH });
  const { items } = await ask(`items?${parameters}`, null, searched.signal);
  remember(items.map((item) => item.item_id), items.map((item) => item.title));
  byId("found").replaceChildren(
    ...items.map((item) => element("li", {}, addButton(item.item_id, nameOf(item.item_id, item.title)))),
  );
  byId("found-note").textContent = items.length ? "" : "No title has these words.";
}

byId("query").addEventListener("input", search);
byId("search").addEventListener("submit", async (event) => {
  event.preventDefault();
  clearTimeout(searchTimer);
  await attempt(find);
  byId("found").querySelector("button")?.click();
});
byId("clear").addEventListener("click", () => {
  change([], "Session cleared");
  byId("query").focus();
});
byId("share").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(location.href);
    say("Link copied");
    byId("share").textContent = "Copied";
    setTimeout(() => (byId("share").textContent = "Copy link"), 2000);
  } catch {
    say("The browser does not allow copying; copy the address of the page");
  }
});
byId("why-close").addEventListener("click", () => byId("why").close());
byId("why").addEventListener("click", (event) => {
  if (event.target === byId("why")) byId("why").close();
});
window.addEventListener("resize", showGraph);

showSession();
showLists();
attempt(async () => {
  const health = await ask("health");
  const models = health.models.map((model) => model.title).join(", ");
  byId("about").textContent = `${health.num_items.toLocaleString("en")} items · ${models}`;
});
