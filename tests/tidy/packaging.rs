//! Scripts of the packages, as far as they can be run without building any.

use std::{
    fmt::Write as _,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

/// Runs packaging/without-path.sh.
#[expect(clippy::disallowed_methods, reason = "the script is a process")]
fn without_path(directory: &str, text: &str) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/without-path.sh");
    let mut command = Command::new(script);
    command.arg(directory).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("bash and sed");
    child.stdin.take().expect("a pipe").write_all(text.as_bytes()).expect("written");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{directory}");
    String::from_utf8(output.stdout).expect("text")
}

/// Encodes as in a URL; `kept` are the characters that stay beside letters and digits.
fn encoded(text: &str, kept: &str) -> String {
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || kept.as_bytes().contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _infallible = write!(out, "%{byte:02X}");
        }
        out
    })
}

#[test]
fn bill_of_materials_does_not_say_where_it_was_built() {
    for top in ["/build", "/srv/a.b[c]*d", "/srv/a b+c&d|e,f", "/tmp/\u{fc}^$(x)\\y{1}?#"] {
        let (url, part) = (encoded(top, "/-._~"), encoded(top, "-._~"));
        let text = format!(
            "path+file://{top}/agent#0.1\nfile://{url}/agent\nvcs=file:%2F%2F{part}%2Fagent\n{}\n",
            encoded(&part, "-._~")
        );
        let wanted = "path+file:///pve-sandbox/agent#0.1\nfile:///pve-sandbox/agent\n\
             vcs=file:%2F%2F%2Fpve-sandbox%2Fagent\n%252Fpve-sandbox\n";
        assert_eq!(without_path(top, &text), wanted, "{top}");
        let other = "file:///srv/aXb/c pkg:cargo/serde@1.0 /bui ld\n";
        assert_eq!(without_path(top, other), other, "{top}: nothing else changes");
    }
}
