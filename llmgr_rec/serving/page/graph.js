// Draws the graph of a session: a node for each item with the number of its first click, an edge for each step.

import { drawn } from "./elements.js";

const RADIUS = 15;
const CELL_WIDTH = 104;
const CELL_HEIGHT = 112;
const TOP = 48;
const LABEL_LENGTH = 16;
const LABEL_LINES = 2;

export function sessionGraph(session, titleOf, width) {
  const items = [...new Set(session)];
  const edges = new Map();
  session.slice(1).forEach((id, place) => {
    const key = `${items.indexOf(session[place])}-${items.indexOf(id)}`;
    edges.set(key, (edges.get(key) ?? 0) + 1);
  });
  const columns = Math.max(2, Math.min(items.length, Math.floor(Math.max(width, 260) / CELL_WIDTH)));
  const rows = Math.ceil(items.length / columns);
  const size = { width: columns * CELL_WIDTH, height: rows * CELL_HEIGHT + 10 };
  const nodes = items.map((id, place) => ({ id, number: session.indexOf(id) + 1, ...position(place, columns) }));
  const last = items.indexOf(session.at(-1));
  const picture = drawn(
    "svg",
    { viewBox: `0 0 ${size.width} ${size.height}`, role: "img", class: "graph", width: size.width },
    drawn("title", {}, describe(items, edges, titleOf)),
    drawn(
      "defs",
      {},
      drawn(
        "marker",
        { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto",
          markerUnits: "userSpaceOnUse" },
        drawn("path", { d: "M0 0 8 4 0 8z", class: "arrow" }),
      ),
    ),
  );
  for (const [key, count] of edges) {
    const [from, to] = key.split("-").map(Number);
    picture.append(...edge(nodes[from], nodes[to], count, edges.has(`${to}-${from}`)));
  }
  nodes.forEach((node, place) => picture.append(drawnNode(node, titleOf(node.id), place === last)));
  return picture;
}

// Rows run to the right and to the left in turns, so that most steps lead to a neighbor.
function position(place, columns) {
  const row = Math.floor(place / columns);
  const along = place % columns;
  const column = row % 2 ? columns - 1 - along : along;
  return { x: (column + 0.5) * CELL_WIDTH, y: row * CELL_HEIGHT + TOP };
}

function edge(from, to, count, hasReverse) {
  const look = { class: "edge", "stroke-width": Math.min(1 + 0.7 * count, 5), "marker-end": "url(#arrow)" };
  if (from === to) {
    const [x, y] = [from.x, from.y - RADIUS];
    const path = `M${x - 7} ${y + 2}C${x - 20} ${y - 24} ${x + 20} ${y - 24} ${x + 8} ${y + 1}`;
    return [drawn("path", { ...look, d: path }), ...countLabel(count, x, y - 19)];
  }
  const [dx, dy] = [to.x - from.x, to.y - from.y];
  const length = Math.hypot(dx, dy);
  const [cx, cy] = bent(from, dx, dy, length, hasReverse);
  const start = toward(from, cx, cy, RADIUS + 1);
  const end = toward(to, cx, cy, RADIUS + 3);
  const path = drawn("path", { ...look, d: `M${start.x} ${start.y}Q${cx} ${cy} ${end.x} ${end.y}` });
  return [path, ...countLabel(count, (from.x + dx / 2 + cx) / 2, (from.y + dy / 2 + cy) / 2 - 4)];
}

// The control point of an edge. Both directions between two nodes are seen, and no edge runs through other nodes.
function bent(from, dx, dy, length, hasReverse) {
  const [x, y] = [from.x + dx / 2, from.y + dy / 2];
  if (dy === 0 && length > CELL_WIDTH * 1.1) return [x, y - Math.min((dx > 0 ? 0.2 : 0.28) * length, 76)];
  const bend = dx !== 0 && dy !== 0 ? 0.18 * length : hasReverse || length > CELL_HEIGHT * 1.1 ? 14 : 0;
  return [x + (bend * dy) / length, y - (bend * dx) / length];
}

function toward(node, x, y, distance) {
  const length = Math.hypot(x - node.x, y - node.y) || 1;
  return { x: node.x + ((x - node.x) / length) * distance, y: node.y + ((y - node.y) / length) * distance };
}

function countLabel(count, x, y) {
  return count > 1 ? [drawn("text", { x, y, class: "count" }, `×${count}`)] : [];
}

function drawnNode({ x, y, number }, title, isLast) {
  const lines = wrapped(title);
  return drawn(
    "g",
    { class: isLast ? "node last" : "node" },
    drawn("title", {}, isLast ? `${title} (last click)` : title),
    drawn("circle", { cx: x, cy: y, r: RADIUS }),
    drawn("text", { x, y: y + 4.5, class: "number" }, String(number)),
    ...lines.map((line, row) => drawn("text", { x, y: y + RADIUS + 15 + 14 * row, class: "label" }, line)),
  );
}

// At most two lines of whole words, the last with an ellipsis where the title goes on.
function wrapped(title) {
  const lines = [""];
  for (const word of title.split(/\s+/)) {
    const longer = lines.at(-1) ? `${lines.at(-1)} ${word}` : word;
    if (longer.length <= LABEL_LENGTH || !lines.at(-1)) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  const shown = lines.slice(0, LABEL_LINES).map((line) => (line.length > LABEL_LENGTH ? `${line.slice(0, LABEL_LENGTH - 1)}…` : line));
  if (lines.length > LABEL_LINES) {
    const end = shown[LABEL_LINES - 1].replace(/…$/, "");
    shown[LABEL_LINES - 1] = `${end.length >= LABEL_LENGTH ? end.slice(0, LABEL_LENGTH - 1) : end}…`;
  }
  return shown;
}

function describe(items, edges, titleOf) {
  const steps = [...edges].map(([key, count]) => {
    const [from, to] = key.split("-").map((place) => titleOf(items[place]));
    return `${from} to ${to}${count > 1 ? ` ${count} times` : ""}`;
  });
  return `Session graph with ${items.length} items. ${steps.length ? `Steps: ${steps.join("; ")}.` : "No steps yet."}`;
}
