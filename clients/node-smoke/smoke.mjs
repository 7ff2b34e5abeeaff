// The wire from the side of a JavaScript backend: the same generated client over native gRPC and
// over gRPC-Web creates a sandbox, runs commands in it, meets errors and deletes it again.
//
// Configured like sandboxctl: SANDBOXCTL_ENDPOINT, SANDBOXCTL_TOKEN or SANDBOXCTL_TOKEN_FILE,
// SANDBOXCTL_CA; SANDBOXCTL_SNAPSHOT chooses a snapshot other than the first.
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { BinaryReader } from "@bufbuild/protobuf/wire";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport, createGrpcWebTransport } from "@connectrpc/connect-node";
import { SandboxService } from "../gen/sandbox/v1/sandbox_pb.js";
import { Phase } from "../gen/sandbox/v1/state_pb.js";

const CALL_MS = 30_000;
const RUNNING_MS = 120_000;

const env = (name) => {
  assert(process.env[name], `${name} must be set; in a lab: . target/lab/env`);
  return process.env[name];
};
const baseUrl = env("SANDBOXCTL_ENDPOINT");
const ca = readFileSync(env("SANDBOXCTL_CA"));
const token =
  process.env.SANDBOXCTL_TOKEN ?? readFileSync(env("SANDBOXCTL_TOKEN_FILE"), "utf8").trim();

const bearer = (value) => (next) => (request) => {
  request.header.set("authorization", `Bearer ${value}`);
  return next(request);
};
const options = (value) => ({
  baseUrl,
  nodeOptions: { ca },
  defaultTimeoutMs: CALL_MS,
  interceptors: [bearer(value)],
});
const transports = {
  "gRPC": (value) => createGrpcTransport(options(value)),
  "gRPC-Web": (value) => createGrpcWebTransport({ ...options(value), httpVersion: "1.1" }),
};

// google.rpc.ErrorInfo has two strings that matter; a generated package for it would be one more
// dependency for a dozen lines.
function errorInfo(error) {
  const detail = error.details.find(({ type }) => type === "google.rpc.ErrorInfo");
  if (!detail) return undefined;
  const reader = new BinaryReader(detail.value);
  const info = {};
  while (reader.pos < reader.len) {
    const [field, wireType] = reader.tag();
    if (field === 1) info.reason = reader.string();
    else if (field === 2) info.domain = reader.string();
    else reader.skip(wireType, field);
  }
  return info;
}

async function refused(call, code, reason) {
  const error = await call.then(
    () => assert.fail(`${reason} was expected, and the call succeeded`),
    (error) => ConnectError.from(error),
  );
  assert.equal(Code[error.code], Code[code], error.message);
  assert.deepEqual(errorInfo(error), { reason, domain: "pve-sandbox" }, error.message);
  assert(error.rawMessage.length > 0, "an error has a sentence");
}

async function running(client, sandbox) {
  let last = sandbox;
  if (last.phase === Phase.RUNNING) return last;
  for await (const change of client.watchSandbox({ id: last.id }, { timeoutMs: RUNNING_MS })) {
    last = change.sandbox;
    if (last.phase === Phase.RUNNING) return last;
    assert(last.phase !== Phase.FAILED, `the creation failed: ${last.failure?.message}`);
  }
  return assert.fail(`the watch ended with phase ${Phase[last.phase]}`);
}

async function execStream(client, id) {
  async function* messages() {
    const start = { id, command: { case: "argv", value: { args: ["cat"] } } };
    yield { message: { case: "start", value: start } };
    yield { message: { case: "stdin", value: new TextEncoder().encode("a line\n") } };
    yield { message: { case: "stdinEof", value: true } };
  }
  let [stdout, code] = ["", undefined];
  for await (const { message } of client.exec(messages())) {
    if (message.case === "stdout") stdout += new TextDecoder().decode(message.value);
    if (message.case === "exit") code = message.value.code;
  }
  assert.deepEqual({ stdout, code }, { stdout: "a line\n", code: 0 });
}

// What needs no full duplex: output as a stream, stdin by calls of its own.
async function execByCalls(client, id) {
  const execId = `smoke-${randomUUID()}`;
  const command = { case: "argv", value: { args: ["cat"] } };
  const subject = { case: "start", value: { id, execId, command } };
  let [stdout, code] = ["", undefined];
  for await (const { message } of client.streamExec({ subject })) {
    const said = message.message;
    if (said.case === "started") {
      const data = new TextEncoder().encode("by calls\n");
      const write = { id, execId, offset: said.value.stdinOffset, data, eof: true };
      const { offset } = await client.writeExecStdin(write);
      assert.equal(offset, BigInt(data.length), "all of it was taken");
    }
    if (said.case === "stdout") stdout += new TextDecoder().decode(said.value);
    if (said.case === "exit") code = said.value.code;
  }
  assert.deepEqual({ stdout, code }, { stdout: "by calls\n", code: 0 });
}

async function files(client, id) {
  const path = "/root/smoke/note";
  const content = new TextEncoder().encode("written in one step\n");
  const { written } = await client.writeFiles({ id, files: [{ path, content, mode: 0o600 }] });
  assert.equal(written, 1);
  let [file, text] = [undefined, ""];
  for await (const piece of client.readFile({ id, path })) {
    file ??= piece.file;
    text += new TextDecoder().decode(piece.data);
  }
  assert.deepEqual(
    { name: file.name, mode: file.mode, text },
    { name: "note", mode: 0o600, text: "written in one step\n" },
  );
  await refused(client.statFile({ id, path: `${path}.none` }), Code.NotFound, "FILE_NOT_FOUND");
}

async function story(name, transport) {
  const client = createClient(SandboxService, transport(token));
  const done = (what) => console.log(`${name}: ${what}`);

  const { snapshots } = await client.listSnapshots({});
  const snapshotId = process.env.SANDBOXCTL_SNAPSHOT ?? snapshots[0]?.id;
  assert(snapshotId, "no snapshot is known");

  const request = {
    requestId: `smoke-${randomUUID()}`,
    snapshotId,
    metadata: { made: "by the smoke test" },
    env: { GREETING: "hello" },
  };
  const { sandbox: created } = await client.createSandbox(request);
  try {
    const sandbox = await running(client, created);
    const again = await client.createSandbox(request);
    assert.equal(again.sandbox.id, sandbox.id, "the same request_id is the same sandbox");
    assert.equal(sandbox.metadata.made, "by the smoke test");
    done(`created ${sandbox.id} on ${sandbox.node}`);

    const shell = { case: "shell", value: 'printf "$GREETING"; printf oops >&2; exit 7' };
    const ran = await client.execCommand({ start: { id: sandbox.id, command: shell } });
    const text = (bytes) => new TextDecoder().decode(bytes);
    assert.deepEqual(
      { code: ran.exit.code, stdout: text(ran.stdout), stderr: text(ran.stderr) },
      { code: 7, stdout: "hello", stderr: "oops" },
    );
    // A request in HTTP/1.1 and its answer cannot overlap: full duplex is native gRPC's alone.
    if (name === "gRPC") await execStream(client, sandbox.id);
    await execByCalls(client, sandbox.id);
    done("ran commands in it");
    await files(client, sandbox.id);
    done("wrote and read a file");

    const unknown = { id: "pvelxc-00000000000000000000000000" };
    await refused(client.getSandbox(unknown), Code.NotFound, "SANDBOX_NOT_FOUND");
    const malformed = { id: "no such form" };
    await refused(client.getSandbox(malformed), Code.InvalidArgument, "FIELD_INVALID");
    const other = { ...request, metadata: { made: "otherwise" } };
    await refused(client.createSandbox(other), Code.AlreadyExists, "REQUEST_ID_REUSED");
    const missing = { requestId: `smoke-${randomUUID()}`, snapshotId: "no-such-snapshot" };
    await refused(client.createSandbox(missing), Code.NotFound, "SNAPSHOT_NOT_FOUND");
    const stranger = createClient(SandboxService, transport("not-a-token"));
    await refused(stranger.listSandboxes({}), Code.Unauthenticated, "TOKEN_INVALID");
    done("errors carry their reasons");
  } finally {
    const { sandbox } = await client.deleteSandbox({ id: created.id });
    assert([Phase.DELETED, Phase.DELETING].includes(sandbox.phase), Phase[sandbox.phase]);
    done("deleted it");
  }
}

for (const [name, transport] of Object.entries(transports)) {
  await story(name, transport);
}
console.log("ok");
// Idle HTTP/2 sessions would keep the process for minutes.
process.exit(0);
