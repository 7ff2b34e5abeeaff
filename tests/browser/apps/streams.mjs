// What needs no browser: server-sent events, a large upload, HTTP/2, and gRPC through the URL.
import crypto from "node:crypto";
import http2 from "node:http2";
import https from "node:https";
import tls from "node:tls";
import { once } from "node:events";
import { close, serve } from "./http.mjs";

export const port = 8001;
const MIB = Number(process.env.PVE_SANDBOX_UPLOAD_MIB ?? 1024);

export async function start({ ip }) {
  const server = await serve(ip, port, async (request, response) => {
    if (request.url === "/events") {
      response.writeHead(200, { "Content-Type": "text/event-stream" });
      for (let tick = 0; tick < 5; tick++) {
        response.write(`data: ${tick}\n\n`);
        await new Promise((next) => setTimeout(next, 200));
      }
      return response.end();
    }
    const sum = crypto.createHash("sha256");
    for await (const part of request) sum.update(part);
    return response.end(sum.digest("hex"));
  });
  return { stop: () => close(server) };
}

export async function check({ url, agent, edge }) {
  await events(url, agent);
  await upload(url, agent);
  await twice(url, edge);
}

async function events(url, agent) {
  const request = https.get(`${url}/events`, { agent });
  const [response] = await once(request, "response");
  const arrivals = [];
  for await (const part of response) arrivals.push([Date.now(), part.toString()]);
  const [first, last] = [arrivals.at(0)[0], arrivals.at(-1)[0]];
  if (arrivals.length < 5 || last - first < 500) {
    throw new Error(`events were held back: ${arrivals.length} parts in ${last - first} ms`);
  }
}

async function upload(url, agent) {
  const part = crypto.randomBytes(1 << 20);
  const sum = crypto.createHash("sha256");
  const request = https.request(`${url}/upload`, { method: "POST", agent });
  const answer = once(request, "response");
  for (let sent = 0; sent < MIB; sent++) {
    sum.update(part);
    if (!request.write(part)) await once(request, "drain");
  }
  request.end();
  const [response] = await answer;
  const got = (await response.toArray()).join("");
  const sent = sum.digest("hex");
  if (got !== sent) throw new Error(`${MIB} MiB arrived as ${got} instead of ${sent}`);
}

async function twice(url, edge) {
  const { hostname, port } = new URL(url);
  const session = http2.connect(url, {
    createConnection: () => tls.connect({
      host: edge, port, servername: hostname, ALPNProtocols: ["h2"], rejectUnauthorized: false,
    }),
  });
  const ask = async () => {
    const stream = session.request({ ":method": "POST", ":path": "/" });
    stream.end("x");
    const [headers] = await once(stream, "response");
    await stream.toArray();
    return headers[":status"];
  };
  const answers = await Promise.all([ask(), ask()]);
  session.close();
  if (answers.join() !== "200,200") throw new Error(`over HTTP/2: ${answers}`);
}
