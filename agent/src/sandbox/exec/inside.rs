//! How a command comes to run as the right user, in the right directory, with the right
//! environment: a small POSIX script that `lxc-attach` runs as the container's root and that ends
//! by becoming the command. Pure: texts in, texts out.
//!
//! - The user is looked up in there, by the container's own /etc/passwd. Whatever that file says can
//!   only fool the one who wrote it; nothing of it is read outside.
//! - Arguments and directory are arguments of the script, which never looks into them: no quoting,
//!   no second reading by a shell.
//! - The environment comes over descriptor 3, because the arguments of a process can be read by
//!   everyone on the host. The script closes the descriptor before it becomes the command.
//! - What goes wrong before that is said there in one word, so no exit code is taken for another.

use std::{collections::BTreeMap, ffi::OsString, fmt::Write as _};

use super::order::{Command, User};

/// What the script says on descriptor 3 when only the environment is missing.
pub(super) const READY: &str = "ready";
/// There is no such user.
pub(super) const NO_USER: &str = "user";
/// There is no such directory.
pub(super) const NO_CWD: &str = "cwd";
/// There is nothing to become another user with.
pub(super) const NO_SETPRIV: &str = "setpriv";
/// More of an answer is none.
pub(super) const ANSWER_BYTES_MAX: usize = 16;

/// Name of the variable that all processes of one command carry.
pub(super) const MARK: &str = "PVE_SANDBOX_EXEC";

/// The script. $1 is `n` and $2 a user's name, or `u` and a number; $3 the directory or nothing;
/// the rest is the command.
///
/// `read` takes one byte at a time from what it cannot seek in, so nothing is read ahead.
const SCRIPT: &str = r#"
__pve_fail() { echo "$1" >&3; exit 125; }
__pve_u= __pve_g= __pve_h= __pve_n=
while IFS=: read -r __pve_a __pve_b __pve_c __pve_d __pve_e __pve_f __pve_i; do
    case $1:$2 in n:"$__pve_a" | u:"$__pve_c")
        __pve_n=$__pve_a __pve_u=$__pve_c __pve_g=$__pve_d __pve_h=$__pve_f
        break ;;
    esac
done </etc/passwd
__pve_k=--init-groups
if [ -z "$__pve_u" ]; then
    [ "$1" = u ] || __pve_fail user
    __pve_k=--clear-groups
    __pve_u=$2 __pve_g=$2 __pve_n=$2 __pve_h=/
fi
if [ -n "$3" ]; then
    cd -- "$3" 2>/dev/null || __pve_fail cwd
else
    cd -- "$__pve_h" 2>/dev/null || cd /
fi
shift 3
if [ "$__pve_u" != 0 ]; then
    __pve_p=/usr/bin/setpriv
    [ -x "$__pve_p" ] || __pve_p=/bin/setpriv
    [ -x "$__pve_p" ] || __pve_fail setpriv
    set -- "$__pve_p" --reuid="$__pve_u" --regid="$__pve_g" "$__pve_k" -- "$@"
fi
export HOME="$__pve_h" USER="$__pve_n" LOGNAME="$__pve_n" XDG_RUNTIME_DIR="/run/user/$__pve_u"
echo ready >&3
__pve_v= __pve_l=
while IFS= read -r __pve_l <&3; do
    case $__pve_l in
        .) break ;;
        +*) __pve_v="$__pve_v
${__pve_l#+}" ;;
        *)
            [ -z "$__pve_v" ] || export "$__pve_v"
            __pve_v=$__pve_l ;;
    esac
done
[ "$__pve_l" = . ] || exit 125
[ -z "$__pve_v" ] || export "$__pve_v"
exec 3>&-
exec "$@"
"#;

/// Becomes the command that follows it.
const BECOME: &str = r#"exec "$@""#;

/// What every command has unless somebody says otherwise. HOME, USER and XDG_RUNTIME_DIR come from
/// the user.
const DEFAULTS: [(&str, &str); 2] =
    [("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), ("LANG", "C.UTF-8")];
/// On a terminal, this too.
const TERM: (&str, &str) = ("TERM", "xterm-256color");

/// The command's environment: the sandbox's own over the defaults, the caller's over both.
pub(super) fn environment(
    sandbox: &BTreeMap<String, String>,
    caller: &BTreeMap<String, String>,
    tty: bool,
    mark: &str,
) -> BTreeMap<String, String> {
    let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    let mut all: BTreeMap<_, _> = DEFAULTS.into_iter().map(owned).collect();
    all.extend(tty.then(|| owned(TERM)));
    for (name, value) in sandbox.iter().chain(caller) {
        all.insert(name.clone(), value.clone());
    }
    all.insert(MARK.to_owned(), mark.to_owned());
    all
}

/// The arguments for `lxc-attach`.
pub(super) fn argv(
    user: &User,
    cwd: Option<&str>,
    command: &Command,
    environment: &BTreeMap<String, String>,
) -> Vec<OsString> {
    let (kind, user) = match user {
        User::Name(name) => ("n", name.clone()),
        User::Id(uid) => ("u", uid.to_string()),
    };
    let mut argv: Vec<String> =
        ["/bin/sh", "-c", SCRIPT, "sh", kind, &user, cwd.unwrap_or("")].map(String::from).into();
    let command = match command {
        Command::Argv(argv) => argv.clone(),
        Command::Shell(line) => vec!["bash".to_owned(), "-c".to_owned(), line.clone()],
    };
    let mut special = environment.iter().filter(|(name, _)| is_special(name)).peekable();
    if special.peek().is_some() {
        argv.push("/usr/bin/env".to_owned());
        argv.extend(special.map(|(name, value)| format!("{name}={value}")));
        // `env` would take a program with a = in its name for one more variable.
        if command[0].contains('=') {
            argv.extend(["/bin/sh", "-c", BECOME, "sh"].map(String::from));
        }
    }
    argv.extend(command);
    argv.into_iter().map(OsString::from).collect()
}

/// What is sent once the script is ready.
pub(super) fn lines(environment: &BTreeMap<String, String>) -> String {
    let mut text = String::new();
    for (name, value) in environment.iter().filter(|(name, _)| !is_special(name)) {
        writeln!(text, "{name}={}", value.replace('\n', "\n+")).expect("a String takes all");
    }
    text.push_str(".\n");
    text
}

/// Names that mean something to one of the shells that may be /bin/sh, so that setting them would
/// fail, do something, or change the script. They travel as arguments of `env`.
fn is_special(name: &str) -> bool {
    const NAMES: [&str; 25] = [
        "COMP_WORDBREAKS",
        "DIRSTACK",
        "EPOCHREALTIME",
        "EPOCHSECONDS",
        "EUID",
        "FUNCNAME",
        "GROUPS",
        "HISTCMD",
        "IFS",
        "LANGUAGE",
        "LINENO",
        "OLDPWD",
        "OPTARG",
        "OPTERR",
        "OPTIND",
        "POSIXLY_CORRECT",
        "PPID",
        "PS4",
        "PWD",
        "RANDOM",
        "SECONDS",
        "SHELLOPTS",
        "SHLVL",
        "SRANDOM",
        "UID",
    ];
    name == "_"
        || NAMES.contains(&name)
        || ["BASH", "LC_", "__pve_"].iter().any(|start| name.starts_with(start))
}

#[cfg(test)]
mod tests;
