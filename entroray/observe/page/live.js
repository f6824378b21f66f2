"use strict";
// A run whose files a server reads: asked for again as the server says that they changed.

async function ask(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

window.entroraySource = {
  run: async () => (await ask("run")).json(),
  step: async (step) => new Uint8Array(await (await ask(`step/${step}`)).arrayBuffer()),
  // Not while nobody looks: a browser has six connections for all tabs of one server.
  follow(changed) {
    let events = null;
    const said = el("p", { class: "note live", role: "status" });
    document.querySelector("main").before(said);
    const listen = () => {
      events?.close();
      if (document.hidden) return;
      events = new EventSource("events");
      events.onopen = () => { said.textContent = "Live: this page follows the folder of the run."; };
      events.onmessage = (event) => changed(Number(event.data));
      events.onerror = () => { said.textContent = "Not connected: if `entroray watch` has ended, start it again and open the address that it prints."; };
    };
    document.addEventListener("visibilitychange", listen);
    listen();
  },
};
