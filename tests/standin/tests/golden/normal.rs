//! Normalizes output that differs between the recorded machine and this one.

use std::path::Path;

/// Normalizes one line of output for the comparison.
pub(crate) fn line(text: &str, dir: &Path) -> String {
    let mut text = text.replace(&dir.display().to_string(), "");
    text = text.replace("/var/lib/pve/tiny'", "/rpool/tiny'");
    text = text.replace("/rpool/data/", "POOL/").replace("/rpool/tiny/", "TINY/");
    text = strip_images(&text, "/var/lib/pve/local-btrfs/images/", "POOL/");
    text = strip_images(&text, "/var/lib/pve/tiny/images/", "TINY/");
    text = volumes(&text);
    text = after(&text, "hwaddr=", |c| c.is_ascii_hexdigit() || c == ':', "MAC");
    text = after(&text, ".conf.tmp.", |c| c.is_ascii_digit(), "PID");
    text = after(&text, "snaptime: ", |c| c.is_ascii_digit(), "TIME");
    text = after(&text, " after ", |c| c.is_ascii_digit(), "N");
    text = upid(&text);
    if text.contains("`-> ") {
        text = text.split(' ').map(moment).collect::<Vec<_>>().join(" ");
    }
    if text.contains("../src/lxc/") {
        // Line numbers differ between versions of LXC.
        text = after(&text, "lxc_attach_run_command: ", |c| c.is_ascii_digit(), "N");
    }
    if text.contains("VOL-") || text.contains("Volid ") {
        text = text.split(' ').filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" ");
        text = text.replace(" raw ", " subvol ");
    }
    text
}

/// Replaces a date or a time of day.
fn moment(word: &str) -> &str {
    let shape: String = word.chars().map(|c| if c.is_ascii_digit() { '9' } else { c }).collect();
    match shape.as_str() {
        "9999-99-99" => "DATE",
        "99:99:99" => "CLOCK",
        _ => word,
    }
}

/// Removes a directory level: `images/502/vm-502-disk-0` has one more than our paths.
fn strip_images(text: &str, prefix: &str, to: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(prefix) {
        out.push_str(&rest[..at]);
        out.push_str(to);
        rest = &rest[at + prefix.len()..];
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        if digits > 0 && rest[digits..].starts_with('/') {
            rest = &rest[digits + 1..];
        }
    }
    out + rest
}

/// Maps `btr:900/base-900-disk-0.raw` and `btr:basevol-900-disk-0` to `btr:VOL-900-disk-0`.
fn volumes(text: &str) -> String {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "-_./:@".contains(c);
    let mut out = String::new();
    let mut token = String::new();
    for c in text.chars().chain(['\0']) {
        if is_part(c) {
            token.push(c);
            continue;
        }
        out.push_str(&volume(&token));
        token.clear();
        if c != '\0' {
            out.push(c);
        }
    }
    out
}

fn volume(token: &str) -> String {
    let kinds = ["vm-", "base-", "subvol-", "basevol-"];
    let (head, name) = match token.rsplit_once(['/', ':']) {
        Some((_, name)) => (&token[..token.len() - name.len()], name),
        None => ("", token),
    };
    if !name.contains("-disk-") {
        return token.to_owned();
    }
    let Some(kind) = kinds.iter().find(|kind| name.starts_with(**kind)) else {
        return token.to_owned();
    };
    let name = name[kind.len()..].trim_end_matches(".raw").trim_end_matches(".subvol");
    let head = match head.split_once(':') {
        // Keeps the storage's name and drops the directory or base in front of the volume's name.
        Some((storage, _)) => format!("{storage}:"),
        None => head.to_owned(),
    };
    format!("{head}VOL-{name}")
}

fn after(text: &str, mark: &str, part: impl Fn(char) -> bool, to: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(mark) {
        let (head, tail) = rest.split_at(at + mark.len());
        out.push_str(head);
        out.push_str(to);
        rest = tail.trim_start_matches(&part);
    }
    out + rest
}

/// Removes pids and times from a task's name, and the time behind it in the index.
fn upid(text: &str) -> String {
    let words = text.split(' ').map(|word| {
        let parts: Vec<&str> = word.split(':').collect();
        match parts.as_slice() {
            ["UPID", node, _, _, _, kind, id, user, ""] => {
                format!("UPID:{node}:PID:PSTART:TIME:{kind}:{id}:{user}:")
            }
            _ => word.to_owned(),
        }
    });
    let words: Vec<String> = words.collect();
    let is_time = |word: &String| word.len() == 8 && word.bytes().all(|b| b.is_ascii_hexdigit());
    let mut out = Vec::new();
    for (index, word) in words.iter().enumerate() {
        let behind = index > 0 && words[index - 1].starts_with("UPID:");
        out.push(if behind && is_time(word) { "END".to_owned() } else { word.clone() });
    }
    out.join(" ")
}

#[test]
fn both_sides_normalize_to_the_same_line() {
    let dir = Path::new("/tmp/x");
    for (recorded, ours) in [
        (
            "rootfs: btr:102/vm-102-disk-0.raw,size=2G",
            "rootfs: btr:basevol-900-disk-0/subvol-102-disk-0,size=2G",
        ),
        (
            "create linked clone of mount point rootfs (btr:900/base-900-disk-0.raw)",
            "create linked clone of mount point rootfs (btr:basevol-900-disk-0)",
        ),
        (
            "-- /var/lib/pve/local-btrfs/images/900/base-900-disk-0 /var/lib/pve/local-btrfs/images/503/vm-503-disk-0' failed",
            "-- /tmp/x/rpool/data/basevol-900-disk-0 /tmp/x/rpool/data/subvol-503-disk-0' failed",
        ),
        ("a,hwaddr=BC:24:11:B7:5F:20,ip=dhcp", "a,hwaddr=BC:24:11:00:00:00,ip=dhcp"),
        (
            "UPID:pve1:00001476:0005B7B3:6B0456DF:vzclone:900:root@pam: 6B0456ED unexpected status",
            "UPID:pve1:00000001:00000002:6B000000:vzclone:900:root@pam: 6B000001 unexpected status",
        ),
    ] {
        assert_eq!(line(recorded, dir), line(ours, dir));
    }
}
