(() => {
  const form = document.querySelector("form.filter"), papers = [...document.querySelectorAll("article.paper")];
  const texts = papers.map(paper => (paper.querySelector("header").textContent + " " +
    [...paper.querySelectorAll("h5")].map(heading => heading.textContent).join(" ")).toLowerCase());
  const apply = () => {
    const words = form.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    papers.forEach((paper, i) => {
      paper.hidden = !words.every(word => texts[i].includes(word)) ||
        (form.runs.checked && !paper.classList.contains("runs")) ||
        (form.room.value && form.room.value !== paper.parentElement.dataset.room);
      shown += !paper.hidden;
    });
    document.querySelectorAll("section.room").forEach(room => {
      room.hidden = !room.querySelector("article.paper:not([hidden])");
    });
    form.querySelector("output").value = shown + " of " + papers.length + " papers";
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", event => event.preventDefault());
  form.hidden = false;
  apply();
})();
