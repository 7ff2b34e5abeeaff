//! Web requests into a sandbox: its server, and this machine's `curl` in the network of a node.

use super::{
    booted::Booted,
    root::said,
    steps::{CLI, until},
};

/// Body of each answer of the server.
pub(crate) const ANSWER: &str = "hello";
const PORT: &str = "9001";
/// Longest request, in seconds.
const REQUEST_S: &str = "5";

/// Server that answers all requests alike, in a thread for each connection: one that is reset ends its thread alone.
const SERVER: &str = r#"
import _thread, socket
def answer(c):
    with c:
        h = b""
        while b"\r\n\r\n" not in h:
            p = c.recv(4096)
            if not p:
                return
            h += p
        c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("0.0.0.0", 9001))
s.listen(128)
while True:
    try:
        c, _ = s.accept()
    except ConnectionError:
        continue
    _thread.start_new_thread(answer, (c,))
"#;

/// Starts the server in a sandbox and exposes it to everybody; returns its host name.
#[track_caller]
pub(crate) fn serve(node: &Booted, id: &str) -> String {
    node.ok(&[CLI, "exec", "--detach", id, "--", "python3", "-c", SERVER]);
    let url = node.ok(&[CLI, "expose", id, PORT, "--public"]);
    let host = url.lines().find_map(|line| line.strip_prefix("https://")).expect("an address");
    let host = host.trim_end_matches('/').to_owned();
    until_answer(node, &host, &format!("{ANSWER} 200"));
    host
}

/// Waits until the server answers with this body and status by a node's listener for tunnels.
#[track_caller]
pub(crate) fn until_answer(node: &Booted, host: &str, answer: &str) {
    let told = || by_tunnel(node, host);
    until(&format!("{answer} from {host}"), told, || told() == answer);
}

/// Sends a request to the listener for tunnels of a node's Caddy; returns body and status.
pub(crate) fn by_tunnel(node: &Booted, host: &str) -> String {
    let header = format!("Host: {host}");
    curl(node, &["--header", &header, "--write-out", " %{http_code}", "http://127.0.0.1:8480/"]).1
}

/// Runs `curl` in a node's network; returns exit code and output.
pub(crate) fn curl(node: &Booted, words: &[&str]) -> (Option<i32>, String) {
    let mut command = node.outside("curl");
    command.args(["--silent", "--show-error", "--noproxy", "*", "--max-time", REQUEST_S]);
    said(&command.args(words).output().expect("curl"))
}
