//! Finds the Debian mirror that this machine already uses, so that the template comes from there.

use std::fs;
use std::path::Path;

/// Mirror that Debian itself recommends.
pub const DEFAULT_MIRROR: &str = "http://deb.debian.org/debian";

/// Returns the mirror of the machine's own apt configuration below `etc_apt`, or the default.
pub fn mirror(etc_apt: &Path) -> String {
    let mut files = vec![etc_apt.join("sources.list")];
    if let Ok(entries) = fs::read_dir(etc_apt.join("sources.list.d")) {
        let mut more: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        more.sort();
        files.extend(more);
    }
    files
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok().map(|text| (file, text)))
        .find_map(|(file, text)| {
            let deb822 = file.extension().is_some_and(|ext| ext == "sources");
            if deb822 { in_deb822(&text) } else { in_list(&text) }
        })
        .unwrap_or_else(|| DEFAULT_MIRROR.to_owned())
}

/// Returns the first Debian archive in one-line style: `deb [options] URI suite main ...`.
pub fn in_list(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let rest = match rest.strip_prefix('[') {
            Some(options) => options.split_once(']')?.1,
            None => rest,
        };
        let mut words = rest.split_ascii_whitespace();
        let uri = words.next()?;
        let suite = words.next()?;
        let main = words.any(|component| component == "main");
        (main && is_debian(uri) && is_release(suite)).then(|| plain(uri))
    })
}

/// Returns the first Debian archive in deb822 style: stanzas of `Types:`, `URIs:`, `Suites:`.
pub fn in_deb822(text: &str) -> Option<String> {
    text.split("\n\n").find_map(|stanza| {
        let field = |name: &str| {
            stanza.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
            })
        };
        let words = |value: &str| -> Vec<String> {
            value.split_ascii_whitespace().map(str::to_owned).collect()
        };
        if field("Enabled").is_some_and(|value| value.eq_ignore_ascii_case("no")) {
            return None;
        }
        let deb = words(&field("Types")?).iter().any(|t| t == "deb");
        let release = words(&field("Suites")?).iter().any(|suite| is_release(suite));
        let main = words(&field("Components").unwrap_or_default()).iter().any(|c| c == "main");
        let uri = words(&field("URIs")?).into_iter().find(|uri| is_debian(uri))?;
        (deb && release && main).then(|| plain(&uri))
    })
}

/// Returns whether an archive is Debian's main one: its URI ends in `/debian` on every mirror.
/// Security and backports archives and those of other projects do not hold a whole system.
fn is_debian(uri: &str) -> bool {
    (uri.starts_with("http://") || uri.starts_with("https://"))
        && uri.trim_end_matches('/').ends_with("/debian")
}

fn is_release(suite: &str) -> bool {
    !suite.contains('-') && !suite.contains('/') && !suite.ends_with("-updates")
}

fn plain(uri: &str) -> String {
    uri.trim_end_matches('/').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirror_is_found_in_one_line_style() {
        let text = "# deb http://no.example/debian x main\n\
                    deb https://packages.example/apt cloud main\n\
                    deb http://security.debian.org/debian-security bookworm-security main\n\
                    deb [signed-by=/x y=z] http://mirror.example/debian/ bookworm main contrib\n";
        assert_eq!(in_list(text).as_deref(), Some("http://mirror.example/debian"));
        assert_eq!(in_list("deb cdrom:[x]/ bookworm main\n"), None);
    }

    #[test]
    fn mirror_is_found_in_deb822_style() {
        let text = "Types: deb\nURIs: https://deb.nodesource.com/node_20.x\nSuites: nodistro\n\
                    Components: main\n\n\
                    Types: deb\n# a comment: here\nURIs: http://deb.debian.org/debian\n\
                    Suites: bookworm bookworm-updates\nComponents: main\n\n\
                    Types: deb\nURIs: http://deb.debian.org/debian-security\n\
                    Suites: bookworm-security\nComponents: main\n";
        assert_eq!(in_deb822(text).as_deref(), Some("http://deb.debian.org/debian"));
        let off = "Enabled: no\nTypes: deb\nURIs: http://a/debian\nSuites: x\nComponents: main";
        assert_eq!(in_deb822(off), None);
    }

    #[test]
    fn default_mirror_is_used_if_none_is_found() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert_eq!(mirror(dir.path()), DEFAULT_MIRROR);
        fs::create_dir(dir.path().join("sources.list.d")).expect("mkdir");
        let list = "deb http://m.example/debian bookworm main\n";
        fs::write(dir.path().join("sources.list.d/a.list"), list).expect("write");
        assert_eq!(mirror(dir.path()), "http://m.example/debian");
    }
}
