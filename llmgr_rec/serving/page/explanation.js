// Shows the answer of /explain for one item.

import { element, nameOf } from "./elements.js";

const PARTS = {
  encoder: "Session encoder",
  item_knn: "Clicked together (item-kNN)",
  text_knn: "Similar words (text-kNN)",
  embedding_knn: "Similar texts (embedding-kNN)",
  llm: "Language model",
  text_encoder: "Language model on titles",
  reranker: "Re-ranking",
  popularity: "Popularity",
};
const SHOWN_WORDS = 5;

const partName = (name) => name.split("+").map((one) => PARTS[one] ?? one).join(" + ");
const percent = (share) => `${Math.round(100 * share)} %`;
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;

export function explanation(answer, pick) {
  const [item] = answer.items;
  const shown = [element("p", { class: "sentence" }, item.text)];
  if (answer.note) shown.push(element("p", { class: "soft" }, answer.note));
  if (item.parts.length) shown.push(element("h3", {}, "Parts of the score"), ...parts(item));
  if (item.clicks.length) shown.push(element("h3", {}, "What each click means"), clicks(item));
  if (item.nearest.length) shown.push(element("h3", {}, "Nearest items"), nearest(item, pick));
  return shown;
}

function parts(item) {
  const named = item.parts.filter((part) => part.value !== 0);
  const bar = element(
    "div",
    { class: "shares", "aria-hidden": "true" },
    ...named.map((part, place) => element("span", { class: `part-${place}`, "data-share": part.share })),
  );
  for (const piece of bar.children) piece.style.flexGrow = piece.dataset.share;
  const rows = named.map((part, place) =>
    element(
      "li",
      { class: `part-${place}` },
      element("span", { class: "dot", "aria-hidden": "true" }),
      element(
        "div",
        {},
        element("b", {}, `${partName(part.name)} ${percent(part.share)}`),
        element("span", { class: "soft" }, ` ${signed(part.value)}`),
        ...part.clicks.slice(0, 3).map(restsOn),
      ),
    ),
  );
  return [bar, element("ul", { class: "parts" }, ...rows)];
}

function restsOn(click) {
  const words = click.words.slice(0, SHOWN_WORDS).map((word) => word.word);
  const title = nameOf(click.item_id, click.title);
  return element(
    "div",
    { class: "soft" },
    `${signed(click.value)} click ${click.position}, ${title}${words.length ? `: ${words.join(", ")}` : ""}`,
  );
}

function clicks(item) {
  const largest = Math.max(...item.clicks.map((click) => Math.abs(click.leave_one_out ?? 0)), 1e-9);
  const rows = item.clicks.map((click) => {
    const value = click.leave_one_out;
    const bar = element("span", { class: value < 0 ? "effect lowers" : "effect", "aria-hidden": "true" });
    bar.style.width = `${(100 * Math.abs(value ?? 0)) / largest}%`;
    return element(
      "tr",
      {},
      element("th", { scope: "row" }, `${click.position}. ${nameOf(click.item_id, click.title)}`),
      element("td", { class: "bar" }, bar),
      element("td", {}, value === null ? "–" : signed(value)),
    );
  });
  const caption = "How much the score falls when the click is left out.";
  return element("table", { class: "effects" }, element("caption", { class: "soft" }, caption), element("tbody", {}, ...rows));
}

function nearest(item, pick) {
  const rows = item.nearest.map((near) => {
    const button = element("button", { class: "item" }, nameOf(near.item_id, near.title));
    button.addEventListener("click", () => pick(near.item_id));
    return element("li", {}, button, element("span", { class: "soft number" }, near.similarity.toFixed(2)));
  });
  return element("ul", { class: "items" }, ...rows);
}
