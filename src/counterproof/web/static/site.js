// Votes without leaving the page, results while one types, a running check line by line. Without script all of it works
// by forms and links.
(() => {
  const listen = (node, name, deed) => node && node.addEventListener(name, deed);

  // Votes: one listener for all lists, also those that come later.
  listen(document, "submit", async event => {
    const form = event.target.closest("form.vote");
    if (!form || !event.submitter || form.dataset.plain) return;
    event.preventDefault();
    const button = event.submitter, said = new URLSearchParams(new FormData(form, button));
    button.disabled = true;
    try {
      const answer = await fetch(form.action, {method: "POST", body: said, headers: {accept: "application/json"}});
      if (!answer.ok) throw new Error(answer.status);
      const {votes, voted} = await answer.json();
      button.value = voted ? "0" : "1";
      button.setAttribute("aria-pressed", String(voted));
      button.querySelector(".number").textContent = votes;
      button.querySelector(".deed").textContent = voted ? "take yours back" : "vote";
      button.disabled = false;
      button.focus();
    } catch {
      // Sent as a form: what comes back says why.
      button.disabled = false;
      form.dataset.plain = "1";
      form.requestSubmit(button);
    }
  });

  // Search while one types.
  const search = document.querySelector("form.search"), found = document.getElementById("found");
  if (search && found) {
    const status = document.getElementById("said");
    let waiting, asked;
    const look = async () => {
      const said = new URLSearchParams(new FormData(search));
      for (const [name, value] of [...said]) if (!value) said.delete(name);
      if (!/[\p{L}\p{N}]/u.test(said.get("q") || "")) return;
      if (asked) asked.abort();
      asked = new AbortController();
      const address = "/search?" + said;
      said.set("part", "1");
      found.setAttribute("aria-busy", "true");
      try {
        const answer = await fetch("/search?" + said, {signal: asked.signal});
        if (!answer.ok) return;
        found.innerHTML = await answer.text();
        history.replaceState(null, "", address);
        const number = found.querySelectorAll(".item").length;
        status.textContent = number + (number === 1 ? " paper shown" : " papers shown");
      } catch (problem) {
        if (problem.name !== "AbortError") throw problem;
      } finally {
        found.removeAttribute("aria-busy");
      }
    };
    const soon = () => { clearTimeout(waiting); waiting = setTimeout(look, 250); };
    listen(search, "input", soon);
    listen(search, "submit", event => { event.preventDefault(); clearTimeout(waiting); look(); });
  }

  // A check, as it runs.
  const current = document.getElementById("current");
  if (current && document.querySelector("h1").textContent === "Checks") {
    const log = current.querySelector(".log"), told = document.getElementById("told");
    const source = new EventSource("/runs/events");
    source.onmessage = event => {
      const check = JSON.parse(event.data);
      if (!check) return;
      if (String(check.number) !== current.dataset.number) { location.reload(); return; }
      current.querySelector(".state").textContent = check.state;
      if (log) {
        const end = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
        log.textContent = check.lines.join("\n");
        if (end) log.scrollTop = log.scrollHeight;
      }
      if (check.state !== current.dataset.state) {
        current.dataset.state = check.state;
        told.textContent = check.target + ": " + check.state;
        if (check.finished) {
          source.close();
          location.reload();
        }
      }
    };
  }
})();
