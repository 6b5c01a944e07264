// Makes elements of text and attributes; nothing is parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function element(tag, attributes = {}, ...children) {
  const made = filled(document.createElement(tag), attributes, children);
  if (tag === "button") made.type = "button";
  return made;
}

export function drawn(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

// How an item is called: by its title, or by its id where it has none.
export const nameOf = (id, title) => title || String(id);
