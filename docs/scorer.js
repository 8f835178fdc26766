// Search results: answers first, then guides, then reference, and the reasons last.
const FIRST = { "how-do-i": 30, glossary: 25, quickstart: 12, performance: 8, cli: 4, reference: -8, faults: -4 };

// a word of the glossary comes before all else
const asked = (new URLSearchParams(location.search).get("q") || "").trim().toLowerCase();

var Scorer = {
  score: ([docname, title, anchor, , score]) =>
    score +
    (docname in FIRST ? FIRST[docname] : docname.startsWith("design/") || docname.startsWith("paper") ? -20 : 10) +
    (anchor.startsWith("#term-") && title.toLowerCase().split(", ").includes(asked) ? 60 : 0),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
