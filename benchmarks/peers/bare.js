// Node's `ws` and `socket.io`, without compression: node bare.js ws|socket.io PORT [CERTIFICATE KEY]
// With socket.io the frames of the plain dialect are the arguments of the event `m`, in both directions.
"use strict";

const fs = require("node:fs");
const http = require("node:http");
const https = require("node:https");

const [kind, port, certificate, key] = process.argv.slice(2);
const FILLER =
  "It was a bright cold day in April, and all the clocks were striking thirteen, thrice.".slice(0, 90 - 9 - 6 - 2);
const piece = (tag, n) => `${tag} ${String(n).padStart(6, "0")} ${FILLER}`;
const delta = (tag, n) => ({ type: "delta", tag, n, text: piece(tag, n) });
let broadcast = 0;

// `send` answers, `toAll` sends to everyone, `joined` makes the sender one of them.
function handle(frame, send, toAll, joined) {
  if (frame.type === "ping") {
    send({ type: "pong", nonce: frame.nonce });
  } else if (frame.type === "ask") {
    ask(frame, send);
  } else if (frame.type === "go") {
    for (let i = 0; i < frame.count; i++) toAll(delta(frame.tag, broadcast++));
  } else if (frame.type === "hello") {
    joined();
    send({ type: "hello_ok" });
  }
}

function ask({ tag, count, interval_ms: interval }, send) {
  if (interval === null) {
    for (let n = 0; n < count; n++) send(delta(tag, n));
    send({ type: "end" });
    return;
  }
  const start = performance.now();
  let n = 0;
  (function next() {
    send(delta(tag, n++));
    if (n === count) send({ type: "end" });
    else if (!interval) setImmediate(next);
    else setTimeout(next, Math.max(0, start + n * interval - performance.now()));
  })();
}

const server = certificate
  ? https.createServer({ cert: fs.readFileSync(certificate), key: fs.readFileSync(key) })
  : http.createServer();

if (kind === "ws") {
  const { WebSocketServer, WebSocket } = require("ws");
  const sockets = new WebSocketServer({ server, path: "/ws", perMessageDeflate: false });
  const everyone = new Set();
  sockets.on("connection", (ws) => {
    const send = (frame) => ws.send(JSON.stringify(frame));
    const toAll = (frame) => {
      const data = JSON.stringify(frame);
      for (const one of everyone) if (one.readyState === WebSocket.OPEN) one.send(data);
    };
    ws.on("message", (data) => handle(JSON.parse(data), send, toAll, () => everyone.add(ws)));
    ws.on("close", () => everyone.delete(ws));
    ws.on("error", () => {});
  });
} else {
  const { Server } = require("socket.io");
  const sockets = new Server(server, { transports: ["websocket"], perMessageDeflate: false, serveClient: false });
  sockets.on("connection", (socket) => {
    const send = (frame) => socket.emit("m", frame);
    const toAll = (frame) => sockets.emit("m", frame);
    socket.on("m", (frame) => handle(frame, send, toAll, () => {}));
  });
}
server.listen(Number(port), "127.0.0.1");
