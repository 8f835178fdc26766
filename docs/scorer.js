// Search results: answers first, then guides, then reference, and the reasons last.
const FIRST = { "how-do-i": 30, glossary: 25, quickstart: 12, performance: 8, cli: 4, reference: -8, faults: -4 };

var Scorer = {
  score: ([docname, , , , score]) =>
    score + (docname in FIRST ? FIRST[docname] : docname.startsWith("design/") || docname.startsWith("paper") ? -20 : 10),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
