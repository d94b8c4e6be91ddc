"use strict";
{
  const cards = [...document.querySelectorAll("article")];
  const column = document.getElementById("column");
  const outcome = document.getElementById("outcome");
  const count = document.getElementById("count");
  const show = () => {
    let shown = 0;
    for (const card of cards) {
      const { column: ofColumn, outcome: ofOutcome } = card.dataset;
      card.hidden =
        (column.value && ofColumn !== column.value) || (outcome.value && ofOutcome !== outcome.value);
      shown += !card.hidden;
    }
    count.value = `${shown} of ${cards.length}`;
  };
  column.addEventListener("change", show);
  outcome.addEventListener("change", show);
  show();
}
