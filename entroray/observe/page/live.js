"use strict";
// A run whose files a server reads: asked for again when the server says that they changed.

async function ask(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

window.entroraySource = {
  run: async () => (await ask("run")).json(),
  step: async (step) => new Uint8Array(await (await ask(`step/${step}`)).arrayBuffer()),
  // A browser has six connections for all its pages of a server: one page listens, and tells the others.
  follow(changed) {
    const said = el("p", { class: "note live", role: "status" }), channel = new BroadcastChannel("run");
    let state = { version: 0, live: true }, tell = null;
    const show = () => {
      said.textContent = state.live ? "Live: this page follows the folder of the run." : "Not connected: if `entroray watch` has ended, start it again and open the address that it prints.";
      if (!document.hidden) changed(state.version);
    };
    channel.onmessage = ({ data }) => { if (data) { state = data; show(); } else tell?.({}); };
    document.addEventListener("visibilitychange", show);
    document.querySelector("main").before(said);
    channel.postMessage(null);
    navigator.locks.request("run", () => new Promise(() => {
      const events = new EventSource("events");
      tell = (more) => { state = { ...state, ...more }; show(); channel.postMessage(state); };
      events.onopen = () => tell({ live: true });
      events.onmessage = (event) => tell({ version: Number(event.data) });
      events.onerror = () => tell({ live: false });
    }));
  },
};
