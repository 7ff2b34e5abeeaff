//! Environment of a command. Pure.

use std::collections::BTreeMap;

/// Name of the variable that all processes of one command carry.
pub(super) const MARK: &str = "PVE_SANDBOX_EXEC";

/// Variables of every command, unless they are overridden. HOME, USER, LOGNAME and XDG_RUNTIME_DIR
/// come from the user, inside.
const DEFAULTS: [(&str, &str); 2] =
    [("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), ("LANG", "C.UTF-8")];
/// Variable that is added on a terminal.
const TERM: (&str, &str) = ("TERM", "xterm-256color");

/// Builds the command's environment: the sandbox's own over the defaults, the caller's over both.
pub(super) fn environment(
    sandbox: &BTreeMap<String, String>,
    caller: &BTreeMap<String, String>,
    tty: bool,
) -> BTreeMap<String, String> {
    let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    let mut all: BTreeMap<_, _> = DEFAULTS.into_iter().map(owned).collect();
    all.extend(tty.then(|| owned(TERM)));
    for (name, value) in sandbox.iter().chain(caller) {
        all.insert(name.clone(), value.clone());
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caller_env_overrides_sandbox_env_and_defaults() {
        let map = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect::<BTreeMap<_, _>>()
        };
        let sandbox = map(&[("LANG", "de"), ("A", "sandbox"), ("B", "sandbox")]);
        let all = environment(&sandbox, &map(&[("A", "caller"), ("TERM", "dumb")]), true);
        assert_eq!((&*all["LANG"], &*all["A"], &*all["B"]), ("de", "caller", "sandbox"));
        assert_eq!(all["TERM"], "dumb");
        assert!(!environment(&sandbox, &map(&[]), false).contains_key("TERM"));
    }
}
