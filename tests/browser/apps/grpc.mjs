// gRPC through the URL of a port: the sandbox speaks HTTP/2 without TLS, and answers with trailers.
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

export const port = 50051;
const definition = loader.loadSync(fileURLToPath(new URL("echo.proto", import.meta.url)));
const { Echo } = grpc.loadPackageDefinition(definition).echo;

export async function start({ ip }) {
  const server = new grpc.Server();
  server.addService(Echo.service, {
    Say: (call, answer) => call.request.text === "fail"
      ? answer({ code: grpc.status.NOT_FOUND, details: "no such word" })
      : answer(null, call.request),
    Chat: (call) => {
      call.on("data", (message) => call.write(message));
      call.on("end", () => call.end());
    },
  });
  await new Promise((done, failed) => server.bindAsync(
    `${ip}:${port}`, grpc.ServerCredentials.createInsecure(),
    (error) => error ? failed(error) : done()));
  return { stop: () => server.forceShutdown() };
}

export async function check({ url, certificate, edge }) {
  const { host, hostname, port } = new URL(url);
  const client = new Echo(`${edge}:${port}`, grpc.credentials.createSsl(certificate), {
    "grpc.default_authority": host,
    "grpc.ssl_target_name_override": hostname,
  });
  const say = (text) => new Promise((done, failed) => client.Say(
    { text }, { deadline: Date.now() + 20_000 },
    (error, answer) => error ? failed(error) : done(answer.text)));
  if ((await say("hello")) !== "hello") throw new Error("the answer has another text");
  const refusal = await say("fail").then(() => null, (error) => error);
  if (refusal?.code !== grpc.status.NOT_FOUND) throw new Error(`a status was lost: ${refusal}`);
  const chat = client.Chat({ deadline: Date.now() + 20_000 });
  for (const text of ["a", "b"]) {
    chat.write({ text });
    const answer = await new Promise((done, failed) => {
      chat.once("data", done);
      chat.once("error", failed);
    });
    if (answer.text !== text) throw new Error(`the stream answered ${answer.text}`);
  }
  chat.end();
  client.close();
}
