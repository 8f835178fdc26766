// After a search the page opens at the section that has most of the words; words of its heading count twice.
const open = () => {
  const best = { score: 0, at: null };
  document.querySelectorAll("article section[id]").forEach((section) => {
    const found = [...section.querySelectorAll("span.highlighted")].filter((word) => word.closest("section") === section);
    const distinct = (words) => new Set(words.map((word) => word.textContent.toLowerCase())).size;
    const score = distinct(found) + distinct(found.filter((word) => word.closest("h1, h2, h3, h4")));
    if (score > best.score) Object.assign(best, { score, at: section });
  });
  if (best.at) best.at.scrollIntoView({ behavior: "instant" });
};
// the words are marked a moment after the page is there
addEventListener("load", () => location.hash || typeof Search !== "undefined" || setTimeout(open, 50));
