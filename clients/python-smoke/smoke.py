"""A backend in Python, from the .proto files alone: five sandboxes, and what one does with them.

Configured like sandboxctl, in a lab by `. target/lab/env`. run.sh makes the modules of `sandbox.v1`.
"""
import os
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import grpc
from google.protobuf.duration_pb2 import Duration
from sandbox.v1 import exec_pb2, files_pb2, sandbox_pb2, state_pb2
from sandbox.v1.sandbox_pb2_grpc import SandboxServiceStub

COUNT = 5
CALL_S = 30  # No call is silent for more than 20 s.


def connect():
    env = os.environ
    token = env.get("SANDBOXCTL_TOKEN") or Path(env["SANDBOXCTL_TOKEN_FILE"]).read_text().strip()
    tls = grpc.ssl_channel_credentials(Path(env["SANDBOXCTL_CA"]).read_bytes())
    credentials = grpc.composite_channel_credentials(tls, grpc.access_token_call_credentials(token))
    # The controller is on our own network, whatever proxy leads to the rest of the world.
    options = [("grpc.enable_http_proxy", 0)]
    return grpc.secure_channel(urlsplit(env["SANDBOXCTL_ENDPOINT"]).netloc, credentials, options)


def create(client, snapshot, run, number):
    request = sandbox_pb2.CreateSandboxRequest(
        request_id=f"{run}-{number}",  # The same call again returns the same sandbox.
        snapshot_id=snapshot,
        metadata={"run": run},
        lifetime=state_pb2.Lifetime(ttl=Duration(seconds=600), ttl_action="EXPIRY_ACTION_DELETE"),
        wait=Duration(),  # Answers as soon as the creation is recorded.
    )
    return client.CreateSandbox(request, timeout=CALL_S).sandbox.id


def wait_until_running(client, mine):
    running = set()
    changes = client.WatchSandboxes(sandbox_pb2.WatchSandboxesRequest(filter=mine), timeout=120)
    for change in changes:
        sandbox = change.sandbox  # Empty in a heartbeat.
        if change.gone:
            raise RuntimeError(f"{sandbox.id} has ended: {sandbox.failure.message}")
        if sandbox.phase == state_pb2.PHASE_RUNNING:
            running.add(sandbox.id)
        if len(running) == COUNT:
            changes.cancel()
            return


def run_command(client, sandbox, shell, stdin=b""):
    """Yields the output while the command runs."""
    start = exec_pb2.ExecStart(id=sandbox, shell=shell, timeout=Duration(seconds=60))
    # The end of the requests is the end of the command's stdin.
    requests = iter([exec_pb2.ExecRequest(start=start), exec_pb2.ExecRequest(stdin=stdin)])
    for answer in client.Exec(requests, timeout=90):
        kind = answer.WhichOneof("message")
        if kind == "stdout":
            yield answer.stdout
        elif kind == "stderr":
            sys.stderr.buffer.write(answer.stderr)
        elif kind == "exit" and answer.exit.code != 0:
            raise RuntimeError(f"{shell}: exit code {answer.exit.code}")


def start_server(client, sandbox, shell):
    # A command with an exec_id runs on when its caller has gone, and is never started twice.
    start = exec_pb2.ExecStart(id=sandbox, exec_id="server", detached=True, shell=shell)
    for answer in client.StreamExec(exec_pb2.StreamExecRequest(start=start, no_stdin=True), timeout=60):
        if answer.message.stdout:  # Its first line says that it listens.
            return
    raise RuntimeError("the server has ended")


def fetch(url):
    # *.localhost is this machine. Browsers and curl know that; the resolver that Python asks may not.
    parts = urlsplit(url)
    there = f"127.0.0.1:{parts.port}" if parts.hostname.endswith(".localhost") else parts.netloc
    request = Request(parts._replace(netloc=there).geturl(), headers={"Host": parts.netloc})
    return build_opener(ProxyHandler({})).open(request, timeout=CALL_S).read()


def pages(client, mine):
    request = sandbox_pb2.ListSandboxesRequest(filter=mine, page_size=2)
    while True:
        page = client.ListSandboxes(request, timeout=CALL_S)
        yield [sandbox.id for sandbox in page.sandboxes]
        request.page_token = page.next_page_token
        if not page.next_page_token:
            return


def delete(client, sandbox):
    request = sandbox_pb2.DeleteSandboxRequest(id=sandbox)
    # DELETING when it takes longer than a call; the same call again waits on.
    while client.DeleteSandbox(request, timeout=CALL_S).sandbox.phase != state_pb2.PHASE_DELETED:
        pass


def main():
    with connect() as channel, ThreadPoolExecutor(COUNT) as pool:
        client = SandboxServiceStub(channel)
        snapshots = client.ListSnapshots(sandbox_pb2.ListSnapshotsRequest(), timeout=CALL_S).snapshots
        snapshot = os.environ.get("SANDBOXCTL_SNAPSHOT") or snapshots[0].id
        run = f"python-{uuid.uuid4().hex}"
        mine = sandbox_pb2.SandboxFilter(metadata={"run": run})
        try:
            ids = list(pool.map(lambda number: create(client, snapshot, run, number), range(COUNT)))
            wait_until_running(client, mine)
            print(f"{len(ids)} sandboxes run, created in parallel")

            first = ids[0]
            files = [
                files_pb2.FileContent(path=f"/srv/app/{n}.html", content=f"page {n}\n".encode())
                for n in range(50)
            ]
            client.WriteFiles(files_pb2.WriteFilesRequest(id=first, files=files), timeout=CALL_S)
            output = b"".join(run_command(client, first, "cat; ls /srv/app | wc -l", b"files: "))
            assert output == b"files: 50\n", output
            print("50 files written, and counted by a command with stdin and stdout")

            start_server(client, first, "cd /srv/app && exec python3 -u -m http.server 3000")
            expose = sandbox_pb2.ExposeHttpServiceRequest(id=first, name="web", port=3000)
            service = client.ExposeHttpService(expose, timeout=CALL_S).service
            assert fetch(f"{service.url}/49.html") == b"page 49\n"
            print(f"fetched a page from {service.url}")

            listed = list(pages(client, mine))
            assert [len(page) for page in listed] == [2, 2, 1], listed
            assert sorted(sum(listed, [])) == sorted(ids)
            print("listed by a filter, in pages of two")
        finally:
            list(pool.map(lambda sandbox: delete(client, sandbox), sum(pages(client, mine), [])))
        assert list(pages(client, mine)) == [[]]
        print("deleted them\nok")


if __name__ == "__main__":
    main()
