const form = document.querySelector(".filter");
const sessions = [...document.querySelectorAll(".session")].map((element) => ({
  element,
  text: element.textContent.toLowerCase(),
  hit: element.dataset.hit,
  clicks: Number(element.dataset.clicks),
}));

function filter() {
  const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
  const outcome = form.elements.outcome.value;
  const [shortest, longest] = form.elements.clicks.value.split("-").map(Number);
  let count = 0;
  for (const session of sessions) {
    const shown =
      words.every((word) => session.text.includes(word)) &&
      (!outcome || session.hit === outcome) &&
      session.clicks >= shortest &&
      session.clicks <= longest;
    session.element.hidden = !shown;
    count += shown;
  }
  document.querySelector("#shown").textContent = `${count} of ${sessions.length} sessions`;
}

if (form) {
  form.hidden = false;
  for (const event of ["input", "change"]) form.addEventListener(event, filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
}
