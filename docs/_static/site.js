// What scrolls sideways can be reached by the keyboard, and the boards show the verdicts of one kind.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  for (const part of document.querySelectorAll("article :is(pre, .table-wrapper, .math, .scroll, .output)")) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
  }
  for (const caption of document.querySelectorAll(".caption[role=heading]")) caption.ariaLevel = 2;
  for (const fold of document.querySelectorAll("summary[aria-label]")) fold.removeAttribute("aria-label"); // its text says more
  for (const board of document.querySelectorAll(".board")) {
    const buttons = [...board.querySelectorAll("button")];
    for (const button of buttons) {
      button.addEventListener("click", () => {
        const chosen = button.getAttribute("aria-pressed") === "true" ? null : button.dataset.outcome;
        for (const each of buttons) each.setAttribute("aria-pressed", String(each.dataset.outcome === chosen));
        for (const card of board.querySelectorAll(".card")) card.hidden = chosen !== null && card.dataset.outcome !== chosen;
      });
    }
  }
});
